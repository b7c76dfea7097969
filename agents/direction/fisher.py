"""The natural gradient: solvers and the length of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.direction.scores import Scores

Status = Literal["converged", "max_iterations", "indefinite", "non_finite", "zero_rhs"]


@dataclass(frozen=True)
class Solution:
    """What a solver found for A x = b, and how far to trust it."""

    direction: Tensor
    """x, [p]; finite whatever the status, if x0 was."""
    iterations: int
    """Products with A that improved x."""
    residual: float
    """|b - A x| / |b|, by the solver's recurrence."""
    status: Status
    """converged: the residual is within the tolerance. max_iterations: it is not yet. indefinite: a direction with
    curvature at or below zero was met. non_finite: b or a product was not finite; both stop before x takes the bad
    direction. zero_rhs: |b|² = 0, so x = 0."""

    @property
    def converged(self) -> bool:
        """Whether A x = b holds to the tolerance."""
        return self.status in ("converged", "zero_rhs")


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    max_iterations: int,
    tolerance: float,
    x0: Tensor | None = None,
) -> Solution:
    """Solve A x = b for a symmetric positive definite A.

    Args:
        matvec: v [p] -> A v [p].
        b: [p].
        max_iterations: the most products with A (one more where x0 is given), at least 1.
        tolerance: stop when |b - A x| <= tolerance * |b|; not negative.
        x0: the first guess, [p]; zero if None.

    Raises:
        ValueError: max_iterations is below 1 or tolerance negative.

    Source: Nocedal & Wright 2006, Numerical Optimization, algorithm 5.2.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; give at least 1.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; give 0 or more.")
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - matvec(x0)
    d = r.clone()
    squared = r @ r
    size, rest = torch.stack((b @ b, squared)).tolist()
    if not math.isfinite(size) or not math.isfinite(rest):
        return Solution(x, 0, math.nan, "non_finite")
    if size == 0:
        return Solution(torch.zeros_like(b), 0, 0.0, "zero_rhs")
    for iteration in range(max_iterations):
        if rest <= tolerance**2 * size:
            return Solution(x, iteration, math.sqrt(rest / size), "converged")
        product = matvec(d)
        curvature = d @ product
        step = squared / curvature
        r.addcmul_(product, -step)
        following = r @ r
        # The only numbers that the host waits for, once per iteration.
        bend, next_rest = torch.stack((curvature, following)).tolist()
        if math.isfinite(bend) and bend <= 0:
            return Solution(x, iteration, math.sqrt(rest / size), "indefinite")
        if not math.isfinite(bend) or not math.isfinite(next_rest):
            return Solution(x, iteration, math.sqrt(rest / size), "non_finite")
        x.addcmul_(d, step)
        d.mul_(following / squared).add_(r)
        squared, rest = following, next_rest
    status: Status = "converged" if rest <= tolerance**2 * size else "max_iterations"
    return Solution(x, max_iterations, math.sqrt(rest / size), status)


@dataclass(frozen=True)
class NaturalGradient:
    """A direction in parameter space and what it is made of."""

    direction: Tensor
    """w, [p]."""
    gradient: Tensor
    """g = Ψᵀ A / n, [p]: the surrogate's gradient."""
    quadratic: Tensor
    """wᵀ F w with the undamped F, a scalar: twice the KL divergence of the step w, in nats, to second order."""
    solution: Solution
    """The solver's status and statistics."""


def damped_fisher(scores: Scores, damping: float) -> Callable[[Tensor], Tensor]:
    """The product v -> (F + λ I) v with F = Ψᵀ Ψ / n and λ = damping * tr F / p.

    Raises:
        ValueError: damping is negative.
    """
    if not damping >= 0:
        raise ValueError(f"damping is {damping}; give 0 or more.")
    shift = damping * scores.trace() / scores.p
    return lambda v: scores.fisher_matvec(v).addcmul_(v, shift)


def natural_gradient(
    scores: Scores,
    advantages: Tensor,
    *,
    damping: float,
    cg_iterations: int,
    cg_tolerance: float,
    rows: Tensor | None = None,
) -> NaturalGradient:
    """w = (F + λ I)⁻¹ g with g = Ψᵀ A / n and F = Ψᵀ Ψ / n.

    These are also the weights of the compatible value function: the minimizer of |Ψ w - A|² / n + λ |w|².

    Args:
        scores: Ψ of log π(a|s).
        advantages: A, [n], in the scores' dtype.
        damping: λ / (tr F / p), the damping relative to the mean eigenvalue; not negative.
        cg_iterations: the most conjugate-gradient iterations.
        cg_tolerance: relative residual to stop at.
        rows: the samples that F is estimated from, int64 [k], the same in every product; None takes all. g always
            takes all.

    Raises:
        ValueError: damping is negative.

    Source: Kakade 2001, theorem 1, https://papers.nips.cc/paper/2073-a-natural-policy-gradient.
    Differs from the paper: damped and solved by conjugate gradients, as Schulman et al. 2015, appendix C,
    https://arxiv.org/abs/1502.05477, and the damping is scaled with the Fisher matrix's trace.
    """
    gradient = scores.gradient(advantages)
    fisher = scores if rows is None else scores.of(rows)
    solution = conjugate_gradient(
        damped_fisher(fisher, damping),
        gradient,
        max_iterations=cg_iterations,
        tolerance=cg_tolerance,
    )
    slope = fisher.matvec(solution.direction)
    return NaturalGradient(solution.direction, gradient, slope @ slope / fisher.n, solution)


def step_size(quadratic: Tensor | float, target_kl: float) -> float:
    """The β for which the step β w has the KL divergence target_kl to second order: √(2 target_kl / wᵀ F w).

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
