"""The natural gradient: estimates of the Fisher matrix, the direction, and the length of the step.

All estimates come from one captured forward and backward pass. Three are Ψᵀ Ψ / n for some scores Ψ, which the solvers
of `agents.natural.solvers` take; the others have an inverse of their own, and serve as preconditioners too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agents.natural.scores import FactoredScores, Scores
from agents.natural.solvers import (
    Product,
    Solution,
    Status,
    checked,
    cholesky,
    choose_solver,
    conjugate_gradient,
    gram,
    gram_inverse,
)

__all__ = [
    "ESTIMATES", "PRECONDITIONERS", "AdaptiveInverse", "Diagonal", "EigenKronecker", "Kronecker", "NaturalGradient",
    "Solution", "Status", "conjugate_gradient", "damped", "damped_fisher", "effective_dimension", "natural_gradient",
    "preconditioner",
    "step_size",
]  # fmt: skip

ESTIMATES = ("compatible", "analytic", "kfac", "ekfac", "diagonal", "empirical", "adaptive")
"""How the Fisher matrix is estimated.

compatible: the outer products of the sampled actions' scores, unbiased. analytic: their expectation over actions.
kfac, ekfac, diagonal: approximations of compatible with a closed inverse. adaptive: a running inverse of all updates'.
empirical: the outer products of the LOSS's gradients, A² ψ ψᵀ. That is no estimate of the Fisher matrix: it shrinks the
step where advantages are large (Kunstner et al. 2019, https://arxiv.org/abs/1905.12558); it is here to be compared.
"""
PRECONDITIONERS = ("none", "diagonal", "kfac", "ekfac", "gram")
"""Of conjugate gradients. gram: the exact inverse of a few samples' damped matrix, in the space of samples."""
PRECONDITIONER_SAMPLES = {"diagonal": 1024, "kfac": 1024, "ekfac": 1024, "gram": 640}
"""About how many samples a preconditioner is made from: it changes the way of conjugate gradients, not their goal."""


class DampedInverse(ABC):
    """An approximation M of the damped Fisher matrix with a closed inverse."""

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """M v: [p] -> [p]."""

    @abstractmethod
    def solve(self, b: Tensor) -> Tensor:
        """M⁻¹ b: [p] -> [p]."""


class Diagonal(DampedInverse):
    """M = diag(F) + λ I."""

    def __init__(self, scores: Scores, shift: Tensor | float) -> None:
        self._entries = scores.diagonal().add_(shift)

    def matvec(self, v: Tensor) -> Tensor:
        return v * self._entries

    def solve(self, b: Tensor) -> Tensor:
        return b / self._entries


class Kronecker(DampedInverse):
    """K-FAC: M is block-diagonal by layers, with the blocks G ⊗ A + λ I of G = Δᵀ Δ / n and A = Hᵀ H / n.

    The damping is exact, by the factors' eigenvectors; nothing is split between the factors.

    Source: Martens & Grosse 2015, section 3 and equation 28, https://arxiv.org/abs/1503.05671.
    """

    def __init__(self, scores: FactoredScores, shift: Tensor | float) -> None:
        self._scores = scores
        self._bases: list[tuple[Tensor, Tensor]] = []
        self.eigenvalues: list[Tensor] = []
        for place, (A, G) in enumerate(scores.kfac()):
            (of_g, basis_g), (of_a, basis_a) = _eigen(G), _eigen(A)
            self._bases.append((basis_g, basis_a))
            moments = self._second_moments(place, torch.outer(of_g, of_a))
            self.eigenvalues.append(moments.add_(shift))

    def _second_moments(self, place: int, eigenvalues: Tensor) -> Tensor:
        return eigenvalues

    def matvec(self, v: Tensor) -> Tensor:
        return self._scores.by_layer(v, lambda place, x: self._scaled(place, x, self.eigenvalues[place]))

    def solve(self, b: Tensor) -> Tensor:
        return self._scores.by_layer(b, lambda place, x: self._scaled(place, x, 1 / self.eigenvalues[place]))

    def _scaled(self, place: int, matrix: Tensor, factors: Tensor) -> Tensor:
        of_g, of_a = self._bases[place]
        return of_g @ (of_g.T @ matrix @ of_a * factors) @ of_a.T


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below 0, and eigenvectors; not numbers where the matrix has entries that are none."""
    if not matrix.isfinite().all():
        # LAPACK would raise; a direction that is not finite is the caller's to reject.
        return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_(min=0), vectors


class EigenKronecker(Kronecker):
    """E-KFAC: K-FAC's eigenvectors with F's own second moments along them in place of K-FAC's eigenvalues.

    Of all matrices with these eigenvectors it is the nearest to F's blocks in the Frobenius norm.

    Source: George et al. 2018, section 3, https://arxiv.org/abs/1806.03884.
    """

    def _second_moments(self, place: int, eigenvalues: Tensor) -> Tensor:
        return self._scores.second_moments(place, *self._bases[place])


class AdaptiveInverse(DampedInverse):
    """A running inverse B of G, where each update makes G into (1 - ε) G + ε F, F from a batch's rows.

    Exact, for F = Rᵀ R with k rows R: B ← [B - B Rᵀ ((1 - ε) / ε I + R B Rᵀ)⁻¹ R B] / (1 - ε), positive definite for
    every ε below 1. First order in ε: B ← (1 + ε) B - ε (R B)ᵀ (R B), positive definite only while ε times the largest
    eigenvalue of R B Rᵀ is below 1 + ε: an update that would go beyond is refused and B stays.

    Args:
        inverse: B, [p, p]; kept and changed in place.
        first_order: which form.

    Source: Amari, Park & Fukumizu 2000, "Adaptive method of realizing natural gradient learning for multilayer
    perceptrons" (first order, one sample at a time); the exact form is Woodbury's identity.
    """

    def __init__(self, inverse: Tensor, *, first_order: bool = False) -> None:
        self.inverse = inverse
        self.first_order = first_order

    def update(self, rows: Tensor, rate: float) -> bool:
        """Take rows R [k, p] in with the rate ε in (0, 1); False if that was refused."""
        projected = rows @ self.inverse
        inner = projected @ rows.T
        if not inner.isfinite().all():
            return False
        if self.first_order:
            if rate * torch.linalg.eigvalsh(inner)[-1] >= 1 + rate:
                return False
            self.inverse.mul_(1 + rate).addmm_(projected.T, projected, alpha=-rate)
            return True
        inner.diagonal().add_((1 - rate) / rate)
        factor, info = torch.linalg.cholesky_ex(inner)
        if info != 0:
            return False
        half = torch.linalg.solve_triangular(factor, projected, upper=False)
        self.inverse.addmm_(half.T, half, alpha=-1).div_(1 - rate)
        # What rounding makes asymmetric would grow by 1 / (1 - ε) in each update.
        self.inverse.copy_((self.inverse + self.inverse.T) / 2)
        return True

    def matvec(self, v: Tensor) -> Tensor:
        raise NotImplementedError("G itself is not kept.")

    def solve(self, b: Tensor) -> Tensor:
        return self.inverse @ b


def damping_rows(p: int, shift: float, places: Tensor) -> Tensor:
    """Rows R [k, p] whose Rᵀ R is λ I on average over uniform places, int64 [k], of the diagonal."""
    rows = torch.zeros(len(places), p, device=places.device)
    rows[torch.arange(len(places), device=places.device), places] = math.sqrt(shift * p / len(places))
    return rows


def preconditioner(name: str, scores: Scores, shift: Tensor | float) -> Product | None:
    """b -> M⁻¹ b for the approximation of that name, from at most PRECONDITIONER_SAMPLES samples; None for "none".

    Source of "gram": Roosta-Khorasani & Mahoney 2019, "Sub-sampled Newton methods", https://arxiv.org/abs/1601.04737
    (curvature of a few samples; here it only preconditions).

    Raises:
        ValueError: there is none of that name; or it is "gram" and the damping is not above 0.
    """
    if name == "none":
        return None
    stride = max(1, scores.n // PRECONDITIONER_SAMPLES.get(name, scores.n))
    some = scores if stride == 1 else scores.of(torch.arange(0, scores.n, stride, device=scores.device))
    if name != "gram":
        return closed_form(name, some, shift).solve  # type: ignore[arg-type]
    inverse, definite = gram_inverse(some, shift)
    # Conjugate gradients report what is not finite.
    return inverse if definite else lambda b: torch.full_like(b, torch.nan)


def closed_form(name: str, scores: FactoredScores, shift: Tensor | float) -> DampedInverse:
    """The approximation "diagonal", "kfac" or "ekfac" of F + λ I; ValueError for other names."""
    kinds: dict[str, Callable[..., DampedInverse]] = {"diagonal": Diagonal, "kfac": Kronecker, "ekfac": EigenKronecker}
    if name not in kinds:
        raise ValueError(f"there is no closed inverse {name!r}; give {' or '.join(kinds)}.")
    return kinds[name](scores, shift)


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
    compatible_r2: Tensor
    """1 - |A - Ψ w|² / |A|², a scalar: the share of the advantages that the compatible value function explains. For
    estimates other than compatible, and for advantages of another scale, it may be far below 0."""

    def refused(self, status: Status) -> NaturalGradient:
        """The same with no direction, and the status that says why."""
        solution = replace(self.solution, direction=torch.zeros_like(self.direction), status=status)
        return replace(
            self, direction=solution.direction, quadratic=torch.zeros_like(self.quadratic), solution=solution
        )


def relative_damping(scores: Scores, damping: float) -> Tensor:
    """λ = damping * tr F / p, a scalar.

    Raises:
        ValueError: damping is negative.
    """
    if not damping >= 0:
        raise ValueError(f"damping is {damping}; give 0 or more.")
    return damping * scores.trace() / scores.p


def damped(scores: Scores, shift: Tensor | float) -> Product:
    """The product v -> (F + λ I) v."""
    shift = torch.as_tensor(shift, dtype=scores.dtype, device=scores.device)
    return lambda v: scores.fisher_matvec(v).addcmul_(v, shift)


def damped_fisher(scores: Scores, damping: float) -> Product:
    """The product v -> (F + λ I) v with F = Ψᵀ Ψ / n and λ = damping * tr F / p.

    Raises:
        ValueError: damping is negative.
    """
    return damped(scores, relative_damping(scores, damping))


def natural_gradient(
    scores: Scores,
    advantages: Tensor,
    *,
    damping: float,
    cg_iterations: int,
    cg_tolerance: float,
    rows: Tensor | None = None,
    solver: str = "cg",
    cg_preconditioner: str = "none",
    x0: Tensor | None = None,
    estimate: str = "compatible",
    roots: Scores | None = None,
    running: AdaptiveInverse | None = None,
) -> NaturalGradient:
    """w = (F + λ I)⁻¹ g with g = Ψᵀ A / n and, for the compatible estimate, F = Ψᵀ Ψ / n.

    These are then also the weights of the compatible value function: the minimizer of |Ψ w - A|² / n + λ |w|².

    Args:
        scores: Ψ of log π(a|s); factored ones for every choice but "compatible" with the preconditioner "none".
        advantages: A, [n], in the scores' dtype.
        damping: λ / (tr F / p), the damping relative to the mean eigenvalue; not negative.
        cg_iterations: the most conjugate-gradient iterations.
        cg_tolerance: relative residual to stop at.
        rows: the samples that F is estimated from, int64 [k], the same in every product; None takes all. g always
            takes all.
        solver: one of `SOLVERS`; only "auto" for estimates that have a closed inverse.
        cg_preconditioner: one of `PRECONDITIONERS`.
        x0: where conjugate gradients begin, [p]: scaled to the length that suits g best; zero if None.
        estimate: one of `ESTIMATES`.
        roots: for "analytic", the scores of the distributions' fisher_roots, for the samples rows.
        running: for "adaptive", the inverse with this update's rows taken in.

    Raises:
        ValueError: damping is negative, or a name is unknown.

    Source: Kakade 2001, theorem 1, https://papers.nips.cc/paper/2073-a-natural-policy-gradient.
    Differs from the paper: damped and solved by conjugate gradients, as Schulman et al. 2015, appendix C,
    https://arxiv.org/abs/1502.05477, and the damping is scaled with the Fisher matrix's trace.
    """
    gradient = scores.gradient(advantages)
    sampled = scores if rows is None else scores.of(rows)
    if estimate == "adaptive":
        assert running is not None
        w = running.solve(gradient)
        solution = checked(w, lambda v: gradient, gradient)  # no product with G is at hand: no residual to measure
    elif estimate in ("kfac", "ekfac", "diagonal"):
        inverse = closed_form(estimate, sampled, relative_damping(sampled, damping))  # type: ignore[arg-type]
        solution = checked(inverse.solve(gradient), inverse.matvec, gradient)
    else:
        fisher = _outer_products(estimate, sampled, advantages if rows is None else advantages[rows], roots)
        solution = _solve(fisher, gradient, damping, solver, cg_iterations, cg_tolerance, cg_preconditioner, x0)
    fitted = sampled.matvec(solution.direction)
    wanted = advantages if rows is None else advantages[rows]
    r2 = 1 - (wanted - fitted).square().sum() / wanted.square().sum()
    return NaturalGradient(solution.direction, gradient, fitted @ fitted / sampled.n, solution, r2)


def _outer_products(estimate: str, scores: Scores, advantages: Tensor, roots: Scores | None) -> Scores:
    """The scores whose Ψᵀ Ψ / n is the estimate."""
    if estimate == "analytic":
        assert roots is not None
        return roots
    if estimate == "empirical":
        return scores.weighted(advantages)
    if estimate != "compatible":
        raise ValueError(f"there is no estimate {estimate!r}; give one of {', '.join(ESTIMATES)}.")
    return scores


def _solve(
    fisher: Scores,
    b: Tensor,
    damping: float,
    solver: str,
    iterations: int,
    tolerance: float,
    cg_preconditioner: str,
    x0: Tensor | None,
) -> Solution:
    shift = relative_damping(fisher, damping)
    if solver == "auto":
        solver = choose_solver(fisher.n, fisher.p)
    if solver == "cholesky":
        matrix = fisher.fisher()
        matrix.diagonal().add_(shift)
        return cholesky(matrix, b)
    if solver == "gram":
        return gram(fisher, b, shift)
    if solver != "cg":
        raise ValueError(f"there is no solver {solver!r}; give auto, cholesky, gram or cg.")
    product = damped(fisher, shift)
    inverse = preconditioner(cg_preconditioner, fisher, shift)
    start = None if x0 is None else _best_multiple(product, x0, b)
    return conjugate_gradient(
        product, b, max_iterations=iterations, tolerance=tolerance, x0=start, preconditioner=inverse
    )


def _best_multiple(product: Product, x: Tensor, b: Tensor) -> Tensor:
    """c x with the c that minimizes the error of A c x = b in A's norm: never farther off than zero."""
    curvature = x @ product(x)
    return torch.where(curvature > 0, (x @ b) / curvature, 0.0) * x


def effective_dimension(scores: FactoredScores, damping: float) -> Tensor:
    """tr(F (F + λ I)⁻¹), the number of directions that the damping leaves free, a scalar; estimated by E-KFAC.

    Args:
        scores: Ψ.
        damping: λ / (tr F / p).
    """
    shift = relative_damping(scores, damping)
    eigenvalues = torch.cat([x.flatten() for x in EigenKronecker(scores, shift).eigenvalues])
    return (1 - shift / eigenvalues).sum()


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
