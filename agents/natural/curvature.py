"""The natural gradient w = (F + λ I)⁻¹ g: estimates of the Fisher matrix F as objects, and how they are solved.

`CURVATURES` names them. Three are Ψᵀ Ψ / n for some scores Ψ, and take the solvers of this file; others have an inverse
of their own (`agents.natural.kronecker`, `agents.natural.adaptive`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from agents.config import CommonConfig, above, at_least, near
from agents.natural import masked
from agents.natural.scores import Scores
from agents.natural.solution import Solution, Status

Product = Callable[[Tensor], Tensor]

SOLVERS = ("auto", "cholesky", "gram", "cg")
"""cholesky: the p x p matrix. gram: the n x n matrix of sample products. cg: products with F alone. auto: by size."""

CHOLESKY_PARAMETERS = 130
"""The most parameters at which auto takes Cholesky: where it costs as much as 10 products of conjugate gradients for
n = 512, by benchmarks.natural.solvers on one x86-64 core. For larger n it costs up to three times as much there, and is
exact."""
GRAM_SAMPLES = 200
"""The most samples at which auto takes the Gram matrix where p is larger; measured likewise; hardly depends on p."""
CURVATURE_MEMORY = 25_600.0
"""Samples that factors are remembered over unless told otherwise."""
REMEMBERED_RESIDUALS = 64
"""The first residuals of conjugate gradients, which those after them are made orthogonal to: beside them, those after
are seldom wanted."""
MATRIX_BYTES = 2 * 2**30
"""The largest matrix that a solver may make; its factor is as large again."""

Precondition = Callable[[Scores, Tensor | float], Product]
"""Scores and the damping λ to b -> M⁻¹ b."""


@dataclass(frozen=True, kw_only=True)
class CurvatureConfig(CommonConfig):
    """How the Fisher matrix is estimated and the natural gradient solved for."""

    fisher: Literal["compatible", "analytic", "kfac", "ekfac", "diagonal", "empirical", "adaptive"] = "ekfac"
    """Estimate of the Fisher matrix: compatible (the sampled actions' scores), analytic (their mean over actions),
    kfac, ekfac, diagonal, adaptive (a running inverse), or empirical (the loss's gradients: no Fisher matrix, there to
    be compared)."""
    solver: Literal["auto", "cholesky", "gram", "cg"] = "auto"
    """Of estimates without a closed inverse: cholesky (p x p), gram (n x n), cg, or auto by size."""
    cg_preconditioner: Literal["none", "diagonal", "kfac", "ekfac", "gram"] = "none"
    """Of conjugate gradients, for the direction and the Gauss-Newton critic: none, diagonal, kfac, ekfac
    or gram (the inverse of a few samples' matrix)."""
    cg_warm_start: bool = False
    """Whether conjugate gradients begin at the last update's direction."""
    cg_max_steps: Annotated[int, at_least(1)] = 10
    """Most conjugate-gradient iterations per direction."""
    cg_tolerance: Annotated[float, above(0)] = 1e-3
    """Relative residual at which conjugate gradients stop."""
    curvature_samples: Annotated[int, at_least(1)] | None = None
    """Samples, drawn anew for each update, that the Fisher matrix and the critic's Gauss-Newton matrix are estimated
    from; None takes all. Gradients always take all."""
    cg_damping: Annotated[float, at_least(0)] = 1.0
    """Damping of the Fisher matrix, in units of its mean eigenvalue tr(F) / p."""
    curvature_memory: Annotated[float, at_least(0)] | None = None
    """Samples over which kfac and ekfac average their factors from update to update: one that is so many samples old
    weighs 1/e; 0 takes this update's alone, None 25,600 where there are factors. By samples, so that it means the same
    for every size of batch."""
    curvature_renewal: Annotated[int, at_least(1)] = 1
    """Updates between eigendecompositions of remembered factors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver != "auto" and self.fisher in ("kfac", "ekfac", "diagonal", "adaptive"):
            raise ValueError(
                f"solver is {self.solver!r}, but fisher={self.fisher!r} has an inverse of its own; give solver='auto', "
                "or fisher='compatible' or 'analytic'."
            )
        factors = self.fisher in ("kfac", "ekfac")
        self.require(
            "curvature_memory",
            not self.curvature_memory or factors,
            "0 or None, or fisher='kfac' or 'ekfac', whose factors can be remembered",
        )
        self.require(
            "curvature_renewal",
            self.curvature_renewal == 1 or (factors and self.curvature_memory != 0),
            "1, or a curvature_memory above 0 with fisher='kfac' or 'ekfac'",
        )
        if self.solver == "gram" and self.cg_damping == 0:
            raise ValueError(
                "cg_damping is 0.0 with solver='gram'; give damping above 0, or solver='cholesky' or 'cg'."
            )


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


class Curvature(ABC):
    """An estimate of the Fisher matrix and the direction that it gives, with what it keeps between updates.

    Args:
        c: its options, as a configuration has them: cg_damping, the damping λ in units of the mean eigenvalue
            tr(F) / p, and what a kind needs beside it.
        precondition: for conjugate gradients.
        seed: the run's, for what it draws.
    """

    def __init__(self, c: Any, precondition: Precondition | None = None, seed: int = 0) -> None:
        if not c.cg_damping >= 0:
            raise ValueError(f"damping is {c.cg_damping}; give 0 or more.")
        self.damping: float = c.cg_damping
        self.late = False
        """Whether what the host finds for a device is of the update before: `prepare` is called before each."""
        self.precondition, self.seed = precondition, seed

    def direction(self, Psi: Scores, A: Tensor, rows: Tensor | None = None) -> NaturalGradient:
        """Solve (F + λ I) w = g with g = Ψᵀ A / n. For F = Ψᵀ Ψ / n, w also minimizes |Ψ w - A|² / n + λ |w|²: it holds
        the weights of the compatible value function.

        Args:
            Psi: Ψ of log π(a|s), [n, p].
            A: advantages, [n], in Ψ's dtype.
            rows: the samples that F is estimated from, int64 [k], the same in every product; None takes all. g always
                takes all.

        Source: Kakade 2001, theorem 1, https://papers.nips.cc/paper/2073-a-natural-policy-gradient.
        Differs from the paper: damped, and the damping is scaled with the Fisher matrix's trace.
        """
        sampled, wanted = (Psi, A) if rows is None else (Psi.of(rows), A[rows])
        fisher = self.outer_products(sampled, wanted)
        gradient = Psi.gradient(A)
        solution = self.solve(fisher, self.damping * fisher.trace() / fisher.p, gradient)
        fitted = sampled.matvec(solution.direction)
        r2 = 1 - (wanted - fitted).square().sum() / wanted.square().sum()
        return NaturalGradient(solution.direction, gradient, fitted @ fitted / sampled.n, solution, r2)

    def outer_products(self, sampled: Scores, A: Tensor) -> Scores:
        """Give the scores whose Ψᵀ Ψ / n the estimate begins with, from some samples' and their advantages."""
        return sampled

    @abstractmethod
    def solve(self, fisher: Scores, shift: Tensor, gradient: Tensor) -> Solution:
        """Solve (F + λ I) w = g for `outer_products`, λ = shift, a scalar, and g, [p]."""

    def asks(self) -> dict[str, Tensor]:
        """Give by name what `prepare` wants of an update, that it may come to the host with other numbers."""
        return {}

    def prepare(self, heard: Mapping[str, Tensor]) -> None:  # noqa: B027, most need nothing
        """Find what an update needs of the host, from what the last one's `asks` has brought; else that is fetched."""

    def forget(self) -> None:  # noqa: B027
        """Estimate from an update's own samples alone from now on."""

    def tensors(self) -> dict[str, Tensor]:
        """Give what it keeps between updates."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027, most keep nothing
        """Take back what `tensors` gave."""


class Sampled(Curvature):
    """F = Ψᵀ Ψ / n: the outer products of the sampled actions' scores, unbiased (the compatible estimate).

    Options: solver, one of `SOLVERS`; of conjugate gradients cg_max_steps, cg_tolerance, and cg_warm_start, whether
    they begin at the last update's direction.
    """

    def __init__(self, c: Any, precondition: Precondition | None = None, seed: int = 0) -> None:
        super().__init__(c, precondition, seed)
        self.solver: str = c.solver
        self.max_steps, self.tolerance, self.warm_start = c.cg_max_steps, c.cg_tolerance, c.cg_warm_start
        self.last: Tensor | None = None

    def solve(self, fisher: Scores, shift: Tensor, gradient: Tensor) -> Solution:
        solver = choose_solver(fisher.n, fisher.p) if self.solver == "auto" else self.solver
        if solver == "cholesky":
            matrix = fisher.fisher()
            matrix.diagonal().add_(shift)
            return cholesky(matrix, gradient)
        if solver == "gram":
            return gram(fisher, gradient, shift)
        if solver != "cg":
            raise ValueError(f"There is no solver {solver!r}{near(solver, SOLVERS)}")
        product = damped(fisher, shift)
        solution = conjugate_gradient(
            product,
            gradient,
            max_iterations=self.max_steps,
            tolerance=self.tolerance,
            x0=None if self.last is None else _best_multiple(product, self.last, gradient),
            preconditioner=None if self.precondition is None else self.precondition(fisher, shift),
        )
        self.last = solution.direction if self.warm_start else None
        return solution

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.last is None else {"last_direction": self.last}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.last = tensors.get("last_direction")


class Expected(Sampled):
    """F with the expectation over actions taken exactly (the analytic estimate); for factored scores."""

    def outer_products(self, sampled: Scores, A: Tensor) -> Scores:
        assert sampled.roots is not None
        return sampled.roots()


class Empirical(Sampled):
    """The outer products of the LOSS's gradients, A² ψ ψᵀ. That is no estimate of the Fisher matrix: it shrinks the
    step where advantages are large; it is here to be compared.

    Source: Kunstner et al. 2019, https://arxiv.org/abs/1905.12558.
    """

    def outer_products(self, sampled: Scores, A: Tensor) -> Scores:
        return sampled.weighted(A)


def relative_damping(scores: Scores, damping: float) -> Tensor:
    """Give λ = damping * tr F / p, a scalar.

    Raises:
        ValueError: damping is negative.
    """
    if not damping >= 0:
        raise ValueError(f"damping is {damping}; give 0 or more.")
    return damping * scores.trace() / scores.p


def damped(scores: Scores, shift: Tensor | float) -> Product:
    """Give the product v -> (F + λ I) v."""
    shift = torch.as_tensor(shift, dtype=scores.dtype, device=scores.device)
    return lambda v: scores.fisher_matvec(v).addcmul_(v, shift)


def choose_solver(n: int, p: int) -> str:
    """Say what "auto" means for n samples and p parameters: "cholesky", "gram" or "cg"."""
    if p <= CHOLESKY_PARAMETERS:
        return "cholesky"
    return "gram" if n <= GRAM_SAMPLES else "cg"


def check_solver(name: str, n: int, p: int) -> None:
    """Raise ValueError where a solver's matrix is larger than MATRIX_BYTES in float32, and name those that fit."""
    sides = {"cholesky": p, "gram": n}
    fits = [solver for solver in SOLVERS if 4 * sides.get(solver, 0) ** 2 <= MATRIX_BYTES]
    if name not in fits:
        raise ValueError(
            f"solver is {name!r}, whose matrix for n = {n} samples and p = {p} parameters takes "
            f"{4 * sides[name] ** 2 / 2**30:.1f} GiB of at most {MATRIX_BYTES / 2**30:.0f}; give {' or '.join(fits)}."
        )


def conjugate_gradient(
    matvec: Product,
    b: Tensor,
    *,
    max_iterations: int,
    tolerance: float,
    x0: Tensor | None = None,
    preconditioner: Product | None = None,
) -> Solution:
    """Solve A x = b for a symmetric positive definite A.

    Args:
        matvec: v [p] -> A v [p].
        b: [p].
        max_iterations: the most products with A (one more where x0 is given), at least 1.
        tolerance: stop when |b - A x| <= tolerance * |b|; not negative.
        x0: the first guess, [p]; zero if None.
        preconditioner: v [p] -> M⁻¹ v [p] with a symmetric positive definite M near A; None is the identity.

    Raises:
        ValueError: max_iterations is below 1 or tolerance negative.

    Source: Nocedal & Wright 2006, Numerical Optimization, algorithms 5.2 and 5.3. Differs from them: residuals are made
    orthogonal to all before them, twice, since in float32 the recurrence alone loses that within some iterations
    (Golub & Van Loan 2013, Matrix Computations, section 10.3); that takes REMEMBERED_RESIDUALS p numbers at most.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; give at least 1.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; give 0 or more.")
    if b.device.type != "cpu":
        options: dict[str, Any] = {"x0": x0, "preconditioner": preconditioner, "remembered": REMEMBERED_RESIDUALS}
        return masked.conjugate_gradient(matvec, b, max_iterations=max_iterations, tolerance=tolerance, **options)
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - matvec(x0)
    z = r if preconditioner is None else preconditioner(r)
    d = z.clone()
    inner = r @ z
    size, rest, start = torch.stack((b @ b, r @ r, inner)).tolist()
    if not (math.isfinite(size) and math.isfinite(rest) and math.isfinite(start)):
        return Solution(x, 0, math.nan, "non_finite")
    if size == 0:
        return Solution(torch.zeros_like(b), 0, 0.0, "zero_rhs")
    kept = min(max_iterations - 1, REMEMBERED_RESIDUALS)
    residuals = b.new_empty(kept, len(b))
    duals = residuals if preconditioner is None else torch.empty_like(residuals)
    for iteration in range(max_iterations):
        if rest <= tolerance**2 * size:
            return Solution(x, iteration, math.sqrt(rest / size), "converged")
        if iteration < kept:  # rows of length 1 in the inner product of M⁻¹
            torch.div(r, inner.sqrt(), out=residuals[iteration])
            torch.div(z, inner.sqrt(), out=duals[iteration])
        product = matvec(d)
        curvature = d @ product
        step = inner / curvature
        r.addcmul_(product, -step)
        if 0 < iteration < max_iterations - 1:  # the second still is, and no direction comes after the last
            seen = min(iteration + 1, kept)
            for _ in range(2):
                r.addmv_(residuals[:seen].T, duals[:seen] @ r, alpha=-1)
        z = r if preconditioner is None else preconditioner(r)
        following = r @ z
        # The only numbers that the host waits for, once per iteration.
        bend, next_inner, next_rest = torch.stack((curvature, following, r @ r)).tolist()
        if math.isfinite(bend) and bend <= 0:
            return Solution(x, iteration, math.sqrt(rest / size), "indefinite")
        if not (math.isfinite(bend) and math.isfinite(next_rest) and math.isfinite(next_inner)):
            return Solution(x, iteration, math.sqrt(rest / size), "non_finite")
        x.addcmul_(d, step)
        d.mul_(following / inner).add_(z)
        inner, rest = following, next_rest
    status: Status = "converged" if rest <= tolerance**2 * size else "max_iterations"
    return Solution(x, max_iterations, math.sqrt(rest / size), status)


def cholesky(matrix: Tensor, b: Tensor, *, tolerance: float = math.inf) -> Solution:
    """Solve matrix x = b by a Cholesky factor.

    Args:
        matrix: [p, p], symmetric positive definite; otherwise x = 0 with the status "indefinite".
        b: [p].
        tolerance: the residual above which the status is "max_iterations", as of a solver that ran out of accuracy.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    return checked(_cholesky_solve(factor, b), lambda v: matrix @ v, b, tolerance, definite=info == 0)


def gram(scores: Scores, b: Tensor, shift: Tensor | float, *, tolerance: float = math.inf) -> Solution:
    """Solve (Ψᵀ Ψ / n + λ I) x = b in the space of samples: x = (b - Ψᵀ u / n) / λ, (Ψ Ψᵀ / n + λ I) u = Ψ b.

    The subtraction cancels digits where λ is small; one step of refinement gives them back.

    Args:
        scores: Ψ.
        b: [p].
        shift: λ, above 0: the matrix has no inverse without it.
        tolerance: as of `cholesky`.

    Raises:
        ValueError: λ is 0 or below.

    Source: Woodbury 1950; Golub & Van Loan 2013, Matrix Computations, sections 2.1.4 and 3.5.3.
    """
    inverse, definite = gram_inverse(scores, shift)

    def product(v: Tensor) -> Tensor:
        return scores.fisher_matvec(v).add_(v * shift)

    x = inverse(b)
    x += inverse(b - product(x))
    return checked(x, product, b, tolerance, definite=definite)


def gram_inverse(scores: Scores, shift: Tensor | float) -> tuple[Product, Tensor]:
    """Give the product b -> (Ψᵀ Ψ / n + λ I)⁻¹ b by `gram`'s formula without refinement, and whether the factor exists,
    a boolean of shape ().

    Raises:
        ValueError: λ is 0 or below, and on the host.
    """
    if torch.as_tensor(shift).device.type == "cpu" and shift <= 0:
        raise ValueError(f"the damping is {float(shift)}; the Gram matrix needs one above 0. Give cholesky or cg.")
    matrix = scores.gram().div_(scores.n)
    matrix.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(matrix)

    def inverse(b: Tensor) -> Tensor:
        u = _cholesky_solve(factor, scores.matvec(b))
        return (b - scores.rmatvec(u).div_(scores.n)) / shift

    return inverse, info == 0


def checked(
    x: Tensor, matvec: Product, b: Tensor, tolerance: float = math.inf, *, definite: Tensor | bool = True
) -> Solution:
    """Measure the residual of a direct solver's x for A x = b; zero where it is not finite or A not definite."""
    if b.device.type != "cpu":
        return masked.checked(x, matvec, b, tolerance, definite)
    size, rest = torch.stack((b @ b, (b - matvec(x)).square().sum())).tolist()
    if size == 0:
        return Solution(torch.zeros_like(b), 0, 0.0, "zero_rhs")
    if not definite and math.isfinite(size):
        return Solution(torch.zeros_like(b), 0, 1.0, "indefinite")
    if not math.isfinite(rest) or not math.isfinite(size):
        return Solution(torch.zeros_like(b), 0, math.nan, "non_finite")
    residual = math.sqrt(rest / size)
    return Solution(x, 0, residual, "converged" if residual <= tolerance else "max_iterations")


def _cholesky_solve(factor: Tensor, b: Tensor) -> Tensor:
    return torch.cholesky_solve(b[:, None], factor)[:, 0]


def _best_multiple(product: Product, x: Tensor, b: Tensor) -> Tensor:
    """Scale x by the c that minimizes the error of A c x = b in A's norm: never farther off than zero."""
    curvature = x @ product(x)
    return torch.where(curvature > 0, (x @ b) / curvature, 0.0) * x
