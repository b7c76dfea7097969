"""How far to go along a direction, and how well the quadratic model foretold what a step did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor

from agents.config import CommonConfig, above, at_least
from agents.natural import masked
from agents.natural.curvature import NaturalGradient
from agents.natural.kronecker import effective_dimension
from agents.natural.masked import KL_TOLERANCE, MOST_GROWTH
from agents.natural.scores import FactoredScores, Scores
from agents.natural.solution import Unread
from agents.policy.networks import Actor, assign_parameters, parameter_vector

MAX_CORRECTIONS = 4
"""How often a step is corrected to the true KL where it is within a factor of 2 of it by then."""
MOST_CORRECTIONS = 12
"""How often it is where it is farther off."""
BACKTRACKS = 10
"""Steps that a line search tries."""
SHRINKING = 0.8
"""The factor between two of them. Both are those of Schulman's modular_rl."""
PATIENCE = 20
"""Line searches that may find nothing, in a row, for one update without a direction: near its optimum a policy has few
steps left that gain."""
DETAILS_EVERY = 10
"""Iterations between measurements that cost time of their own."""


@dataclass(frozen=True, kw_only=True)
class StepConfig(CommonConfig):
    """How far an update goes."""

    target_kl: Annotated[float, above(0)] = 0.04
    """Step size: mean KL(old || new) of an update, in nats."""
    target_kl_end: Annotated[float, above(0)] | None = 0.001
    """Step size at the end of training, in nats, reached in equal steps; None keeps target_kl throughout."""
    line_search: bool = False
    """Whether steps are cut back until the KL is at most target_kl and the surrogate gains, as in TRPO; otherwise they
    are corrected to have the KL target_kl."""
    log_std_min: float | None = -1.6
    """Floor of the log standard deviation of Gaussian actions, in units of their bounds' half width, or None."""
    log_std_end: float | None = None
    """Where a ceiling of the log standard deviation, which falls in equal steps from log_std_init, ends with the
    training; None has no ceiling. What acts without noise should have been seen with little of it."""
    max_rejected_updates: Annotated[int, at_least(1)] = 5
    """Updates in a row without a usable direction or step after which training stops."""


class Line:
    """The policies θ + β w.

    Args:
        actor: has θ; its parameters are changed in place.
        direction: w, [p].
        old: θ's distributions at s.
        s: normalized observations, [n, O].
        log_std_min: floor of the log standard deviation of Gaussian actions, or None.
        ceiling: of the same, as `ceiling` gives it, [A], or None.

    Attributes:
        new: the distributions of the step that was taken last.
        is_cut: whether floor or ceiling may make a step another.
    """

    def __init__(
        self,
        actor: Actor,
        direction: Tensor,
        old: Any,
        s: Tensor,
        log_std_min: float | None = None,
        ceiling: Tensor | None = None,
    ) -> None:
        self.actor, self.direction, self.old, self.new, self.s = actor, direction, old, old, s
        self.floor = None if actor.log_std is None or log_std_min is None else actor.log_unit + log_std_min
        self.ceiling = ceiling
        self.is_cut = self.floor is not None or ceiling is not None

    @cached_property
    def theta(self) -> Tensor:
        """θ, [p]: the parameters before the first step."""
        return parameter_vector(self.actor)

    def kl(self, beta: float | Tensor) -> Any:
        """Take the step β and measure the mean KL(old || new), in nats: a number, or of a tensor β a tensor."""
        assign_parameters(self.actor, self.theta + beta * self.direction)
        if self.actor.log_std is not None and self.is_cut:
            self.actor.log_std.bias.clamp_(self.floor, self.ceiling)
        self.new = self.actor(self.s)
        mean = self.old.kl(self.new).mean()
        return mean.double() if isinstance(beta, Tensor) else mean.item()

    def match(self, quadratic: Tensor, target: float) -> Tensor:
        """Take the step that `match_kl` would, without asking a device for anything; β is 0 where there is none."""
        beta = masked.match_kl(self.kl, quadratic, target)
        self.kl(torch.where(beta > 0, beta, 0.0))
        return beta

    def back(self) -> None:
        """Put θ back."""
        assign_parameters(self.actor, self.theta)
        self.new = self.old


def ceiling(actor: Actor, log_std_max: float | Tensor, target_kl: float | Tensor) -> Tensor | None:
    """Give the ceiling of an actor's log standard deviations for an update, [A]; None where it has none.

    It is no further below their present values than what takes half of the update's KL: a fall by d in each of A
    actions is A d² nats, to second order.

    Args:
        log_std_max: the ceiling that is asked for, in units of the actions' half width.
        target_kl: of the update, in nats.
    """
    if actor.log_std is None:
        return None
    now = actor.log_std.bias.detach()
    return torch.maximum(actor.log_unit + log_std_max, now - (target_kl / (2 * len(now))) ** 0.5)


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
    longest, short, long = MOST_GROWTH * beta, 0.0, math.inf
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
            factor = 2.0 if kl <= 0 else 0.5
        beta = min(beta * factor, longest)
        # Rounding makes the KL of a step with next to no effect 0 or less; between such a step and one that is too
        # long the power law says nothing.
        short, long = (max(short, taken), long) if kl < target else (short, min(long, taken))
        if not short < beta < long and short > 0 and long < math.inf:
            beta = math.sqrt(short * long)
        if beta == taken:
            break
    if not kl <= 2 * target and short > 0:
        taken, kl = short, kl_at(short)
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


class Rejections:
    """Updates that changed nothing, and when they are too many.

    Args:
        most: how many in a row are.

    Attributes:
        updates: without a usable direction or step so far.
        steps: in which a line search found nothing so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.updates = self.steps = self.in_a_row = 0

    def count(self, beta: float, trivial: bool, searched: bool = False) -> str | None:
        """Count an update of the step β, and give the sentence that ends training if there were too many without.

        Args:
            beta: β.
            trivial: whether no step was to be found: without advantages, or where discrete actions are certain.
            searched: whether a line search looked for the step; else it is the solve that failed.
        """
        rejected = beta == 0 and not trivial
        self.steps += rejected and searched
        self.updates += rejected and not searched
        self.in_a_row = self.in_a_row + 1 if rejected else 0
        if self.in_a_row < self.most * (PATIENCE if searched else 1):
            return None
        found = "step within target_kl gained anything" if searched else "direction was usable"
        sentence = (
            f"In {self.in_a_row} updates in a row no {found}; the policy is as it was before them. Look for rewards or "
            "observations that are not finite, or give more cg_damping or more samples."
        )
        self.in_a_row = 0
        return sentence

    def tensors(self) -> dict[str, Tensor]:
        """Give the counts."""
        return {"counts": torch.tensor([self.updates, self.in_a_row, self.steps])}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        if "counts" in tensors:
            self.updates, self.in_a_row, self.steps = tensors["counts"].tolist()


def report_step(
    line: Line,
    beta: float | Tensor,
    step: NaturalGradient,
    Psi: Scores,
    a: Tensor,
    A: Tensor,
    explained: Tensor,
    damping: float | None = None,
) -> dict[str, Any]:
    """Compare what the step Δθ = β w did with what the quadratic model foretold, name by name as `CURVES` shows it.

    predicted_gain is gᵀ Δθ and gain the surrogate's, the mean of (π / π_old - 1) A; kl_quadratic is ½ Δθᵀ F Δθ, kl the
    mean KL(old || new) and kl_reverse that of KL(new || old), in nats; effective_samples is (Σ ρ)² / (n Σ ρ²) of the
    importance weights ρ = π / π_old: 1 where they are equal.

    Args:
        line: on which the step was taken.
        beta: β.
        step: w, g and wᵀ F w.
        Psi: the scores at θ, whose values are log π_old(a|s).
        a: actions, [n, *A].
        A: advantages, [n].
        explained: share of the returns' variance that the critic explains, a scalar.
        damping: with which the effective dimension is measured too, where scores factor; that costs time of its own,
            and None leaves it out.
    """
    log_ratio = line.new.log_prob(a) - Psi.values
    ratio = log_ratio.exp()
    gain, quadratic = beta * (step.gradient @ step.direction), beta**2 * step.quadratic
    if line.is_cut and (isinstance(beta, Tensor) or beta):
        # Where floor or ceiling have cut it, the step is another.
        moved = parameter_vector(line.actor) - line.theta
        gain, quadratic = step.gradient @ moved, Psi.matvec(moved).square().sum() / Psi.n
    values = {
        "predicted_gain": gain,
        "gain": (torch.expm1(log_ratio) * A).mean(),
        "kl_quadratic": 0.5 * quadratic,
        "kl": line.old.kl(line.new).mean(),
        "kl_reverse": line.new.kl(line.old).mean(),
        "effective_samples": ratio.sum().square() / (len(ratio) * ratio.square().sum()),
        "entropy": line.new.entropy().mean(),
        "gradient_norm": step.gradient.norm(),
        "cosine": torch.cosine_similarity(step.gradient, step.direction, dim=0),
        "compatible_r2": step.compatible_r2,
        "explained_variance": explained,
    }
    if line.actor.log_std is not None:
        values["std"] = line.actor.log_std.bias.exp().mean()
    if damping is not None and isinstance(Psi, FactoredScores):
        values["effective_dimension"] = effective_dimension(Psi, damping)
    if isinstance(step.solution, Unread):  # it comes to the host with the others
        return values | dict(zip(("cg_iterations", "cg_residual"), step.solution.numbers, strict=False))
    found = values | {"cg_iterations": step.solution.iterations}
    return found | ({"cg_residual": step.solution.residual} if math.isfinite(step.solution.residual) else {})


CURVES: dict[str, dict[str, list[str]]] = {
    "does the quadratic model hold": {
        "KL, nats: true, quadratic, reverse": ["train/kl", "train/kl_quadratic", "train/kl_reverse"],
        "gain: actual, predicted": ["train/gain", "train/predicted_gain"],
        "effective samples, of 1": ["train/effective_samples"],
        "rejected updates and steps": ["train/rejected_updates", "train/rejected_steps"],
    },
    "is the direction good": {
        "residual": ["train/cg_residual"],
        "iterations": ["train/cg_iterations"],
        "cosine of gradient and direction": ["train/cosine"],
        "effective dimension": ["train/effective_dimension"],
    },
    "do the fits explain": {
        "critic: explained variance": ["train/explained_variance"],
        "compatible R²": ["train/compatible_r2"],
    },
    "does it learn": {
        "return": ["rollout/ep_rew_mean", "eval/mean_reward"],
        "entropy, nats": ["train/entropy"],
        "standard deviation": ["train/std"],
        "discount": ["train/discount"],
    },
    "where the seconds go": {"collecting and training": ["time/collect_seconds", "time/train_seconds"]},
}
"""Group -> chart -> the curves that it shows together, for TensorBoard's page of custom scalars."""
