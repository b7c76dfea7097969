"""How far to go along a direction, and how well the quadratic model foretold what a step did."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from agents.natural.curvature import NaturalGradient
from agents.natural.scores import Scores
from agents.policy.networks import Actor, assign_parameters, parameter_vector

KL_TOLERANCE = 0.05
"""Relative error of an update's KL that is left as it is."""
MAX_CORRECTIONS = 4
"""How often a step is corrected to the true KL where it is within a factor of 2 of it by then."""
MOST_CORRECTIONS = 12
"""How often it is where it is farther off."""
MOST_GROWTH = 16.0
"""Longest step, in units of the one that the quadratic model gives."""
BACKTRACKS = 10
"""Steps that a line search tries."""
SHRINKING = 0.8
"""The factor between two of them. Both are those of Schulman's modular_rl."""


class Line:
    """The policies θ + β w.

    Args:
        actor: has θ; its parameters are changed in place.
        direction: w, [p].
        old: θ's distributions at s.
        s: normalized observations, [n, O].
        log_std_min: floor of the log standard deviation of Gaussian actions, or None.

    Attributes:
        new: the distributions of the step that was taken last.
    """

    def __init__(self, actor: Actor, direction: Tensor, old: Any, s: Tensor, log_std_min: float | None = None) -> None:
        self.actor, self.direction, self.old, self.new, self.s = actor, direction, old, old, s
        self.log_std_min = log_std_min

    @cached_property
    def theta(self) -> Tensor:
        """θ, [p]: the parameters before the first step."""
        return parameter_vector(self.actor)

    def kl(self, beta: float) -> float:
        """Take the step β and measure the mean KL(old || new), in nats."""
        assign_parameters(self.actor, self.theta + beta * self.direction)
        if self.actor.log_std is not None and self.log_std_min is not None:
            self.actor.log_std.bias.clamp_(min=self.log_std_min)
        self.new = self.actor(self.s)
        return self.old.kl(self.new).mean().item()

    def back(self) -> None:
        """Put θ back."""
        assign_parameters(self.actor, self.theta)
        self.new = self.old


def step_size(quadratic: Tensor | float, target_kl: float) -> float:
    """Give the β for which the step β w has the KL target_kl to second order: √(2 target_kl / wᵀ F w).

    Args:
        quadratic: wᵀ F w with the undamped F.
        target_kl: nats, not negative.

    Raises:
        ValueError: the quadratic is not positive and finite (a zero direction has no length to choose), or target_kl is
            negative.

    Source: Rajeswaran et al. 2017 (the normalized step size), https://arxiv.org/abs/1703.02660.
    """
    quadratic = float(quadratic)
    if not 0 < quadratic < math.inf:
        raise ValueError(f"quadratic is {quadratic}; it must be positive and finite. Look at the solution's status.")
    if not target_kl >= 0:
        raise ValueError(f"target_kl is {target_kl}; give 0 or more nats.")
    return math.sqrt(2 * target_kl / quadratic)


def match_kl(kl_at: Callable[[float], float], beta: float, target: float) -> tuple[float, float]:
    """Find the step at which the KL is the target, to KL_TOLERANCE, and that KL.

    The KL grows nearly as the step's square, or as the power of it that the last two steps show, so that a few
    corrections hit the target. What cannot reach it within MOST_GROWTH gets the longest step tried.

    Args:
        kl_at: takes the step β and measures its mean KL divergence, in nats. The last call is of the step returned.
        beta: the first step, such as `step_size`.
        target: nats, above 0.

    Returns:
        (0, 0) if no step had a KL above 0 and at most twice the target.
    """
    longest = MOST_GROWTH * beta
    taken, kl = 0.0, math.inf
    for correction in range(MOST_CORRECTIONS + 1):
        last, taken, kl = (taken, kl), beta, kl_at(beta)
        near = target / 2 <= kl <= 2 * target
        if abs(kl / target - 1) <= KL_TOLERANCE or (near and correction >= MAX_CORRECTIONS):
            break
        if 0 < kl < math.inf:
            power = 2.0
            if 0 < last[1] < math.inf:  # KL ∝ β^power through the last two steps
                power = min(max(math.log(kl / last[1]) / math.log(taken / last[0]), 1.0), 4.0)
            factor = min((target / kl) ** (1 / power), 2.0)
        else:
            factor = 2.0 if kl == 0 else 0.5
        beta = min(beta * factor, longest)
        if beta == taken:
            break
    return (taken, kl) if 0 < kl <= 2 * target else (0.0, 0.0)


def line_search(try_step: Callable[[float], tuple[float, float]], beta: float, target: float) -> tuple[float, float]:
    """Find the longest of the steps β, 0.8 β, 0.64 β, ... whose KL is at most the target and whose gain is above 0.

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


def report_step(line: Line, beta: float, step: NaturalGradient, Psi: Scores, a: Tensor, A: Tensor) -> StepReport:
    """Compare what the step Δθ = β w did with the quadratic model's word.

    Args:
        line: on which the step was taken.
        beta: β.
        step: w, g and wᵀ F w.
        Psi: the scores at θ, whose values are log π_old(a|s).
        a: actions, [n, *A].
        A: advantages, [n].
    """
    log_ratio = line.new.log_prob(a) - Psi.values
    ratio = log_ratio.exp()
    gain, quadratic = beta * (step.gradient @ step.direction), beta**2 * step.quadratic
    if beta and line.log_std_min is not None:
        # Where the floor has cut it, the step is another.
        moved = parameter_vector(line.actor) - line.theta
        gain, quadratic = step.gradient @ moved, Psi.matvec(moved).square().sum() / Psi.n
    return StepReport(
        predicted_gain=gain,
        gain=(torch.expm1(log_ratio) * A).mean(),
        kl_quadratic=0.5 * quadratic,
        kl=line.old.kl(line.new).mean(),
        kl_reverse=line.new.kl(line.old).mean(),
        effective_samples=ratio.sum().square() / (len(ratio) * ratio.square().sum()),
    )
