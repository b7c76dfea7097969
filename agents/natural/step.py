"""How far to go along a direction, and how well the quadratic model foretold what a step did."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.natural.curvature import NaturalGradient

KL_TOLERANCE = 0.05
"""Relative error of an update's KL that is left as it is."""
MAX_CORRECTIONS = 4
"""How often a step is corrected to the true KL."""
BACKTRACKS = 10
"""Steps that a line search tries."""
SHRINKING = 0.8
"""The factor between two of them. Both are those of Schulman's modular_rl."""


def matched_step(kl_at: Callable[[float], float], beta: float, target: float) -> tuple[float, float]:
    """The step at which the KL is the target, to KL_TOLERANCE, and that KL; (0, 0) if none was found within twice it.

    The KL grows nearly as the step's square, or as the power of it that the last two steps show, so that a few
    corrections hit the target.

    Args:
        kl_at: takes the step β and measures its mean KL divergence, in nats. The last call is of the step returned.
        beta: the first step, such as `fisher.step_size`.
        target: nats, above 0.
    """
    taken, kl = 0.0, math.inf
    for _ in range(MAX_CORRECTIONS + 1):
        last, taken, kl = (taken, kl), beta, kl_at(beta)
        if abs(kl / target - 1) <= KL_TOLERANCE:
            break
        correction = (target / kl) ** (1 / _power(last, (taken, kl))) if 0 < kl < math.inf else 0.5
        beta *= min(correction, 2.0)
    return (taken, kl) if kl <= 2 * target else (0.0, 0.0)


def _power(first: tuple[float, float], second: tuple[float, float]) -> float:
    """x between 1 and 4 with KL ∝ βˣ through two pairs of β and KL; 2 where they do not say."""
    (beta, kl), (other_beta, other_kl) = first, second
    if beta in (0.0, other_beta) or not (0 < kl < math.inf and 0 < other_kl < math.inf):
        return 2.0
    return min(max(math.log(other_kl / kl) / math.log(other_beta / beta), 1.0), 4.0)


def line_search(try_step: Callable[[float], tuple[float, float]], beta: float, target: float) -> tuple[float, float]:
    """The longest of the steps β, 0.8 β, 0.64 β, ... whose KL is at most the target and whose gain is above 0.

    Args:
        try_step: takes a step and measures (its mean KL in nats, the surrogate's gain). The last call is of the step
            returned.
        beta: the first step, at which the quadratic model has the KL target.
        target: nats, above 0.

    Returns:
        The step and its KL; (0, 0) if none does.

    Source: Schulman et al. 2015, appendix C, https://arxiv.org/abs/1502.05477.
    """
    for _ in range(BACKTRACKS):
        kl, gain = try_step(beta)
        if kl <= target and gain > 0:
            return beta, kl
        beta *= SHRINKING
    return 0.0, 0.0


@dataclass(frozen=True)
class StepReport:
    """What a step did beside what the quadratic model said; scalars."""

    predicted_gain: Tensor
    """gᵀ Δθ."""
    gain: Tensor
    """The surrogate's: mean of (π / π_old - 1) A."""
    kl_quadratic: Tensor
    """½ Δθᵀ F Δθ, in nats."""
    kl: Tensor
    """Mean KL(old || new), in nats."""
    kl_reverse: Tensor
    """Mean KL(new || old), in nats."""
    effective_samples: Tensor
    """(Σ ρ)² / (n Σ ρ²) of the importance weights ρ = π / π_old: 1 where they are equal."""


def report_step(
    beta: float, step: NaturalGradient, log_ratio: Tensor, A: Tensor, kl: Tensor, kl_reverse: Tensor
) -> StepReport:
    """The report of the step Δθ = β w.

    Args:
        beta: β.
        step: w, g and wᵀ F w.
        log_ratio: log π(a|s) - log π_old(a|s), [n].
        A: advantages, [n].
        kl, kl_reverse: KL(old || new) and KL(new || old), [n].
    """
    ratio = log_ratio.exp()
    return StepReport(
        predicted_gain=beta * (step.gradient @ step.direction),
        gain=(torch.expm1(log_ratio) * A).mean(),
        kl_quadratic=0.5 * beta**2 * step.quadratic,
        kl=kl.mean(),
        kl_reverse=kl_reverse.mean(),
        effective_samples=ratio.sum().square() / (len(ratio) * ratio.square().sum()),
    )
