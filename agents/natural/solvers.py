"""Solvers of (F + λ I) x = b that say how far to trust their answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.natural.scores import Scores

Status = Literal["converged", "max_iterations", "indefinite", "non_finite", "zero_rhs"]
Product = Callable[[Tensor], Tensor]

SOLVERS = ("auto", "cholesky", "gram", "cg")
"""cholesky: the p x p matrix. gram: the n x n matrix of sample products. cg: products with F alone. auto: by size."""

CHOLESKY_PARAMETERS = 130
"""The most parameters at which auto takes Cholesky: where it costs as much as 10 products of conjugate gradients for
n = 512, by benchmarks/solvers.py on one x86-64 core. For larger n it costs up to three times as much there, and is
exact."""
GRAM_SAMPLES = 200
"""The most samples at which auto takes the Gram matrix where p is larger; measured likewise; hardly depends on p."""
MATRIX_BYTES = 2 * 2**30
"""The largest matrix that a solver may make; its factor is as large again."""


@dataclass(frozen=True)
class Solution:
    """What a solver found for A x = b, and how far to trust it."""

    direction: Tensor
    """x, [p]; finite whatever the status, if x0 was."""
    iterations: int
    """Products with A that improved x; 0 of a direct solver."""
    residual: float
    """|b - A x| / |b|; conjugate gradients' by their recurrence, a direct solver's measured."""
    status: Status
    """converged: the residual is within the tolerance. max_iterations: it is not yet. indefinite: a direction with
    curvature at or below zero was met, or a factor does not exist. non_finite: b or a product was not finite; both stop
    before x takes the bad direction. zero_rhs: |b|² = 0, so x = 0."""

    @property
    def converged(self) -> bool:
        """Whether A x = b holds to the tolerance."""
        return self.status in ("converged", "zero_rhs")


def choose_solver(n: int, p: int) -> str:
    """What "auto" means for n samples and p parameters: "cholesky", "gram" or "cg"."""
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

    Source: Nocedal & Wright 2006, Numerical Optimization, algorithms 5.2 and 5.3.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; give at least 1.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; give 0 or more.")
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
    for iteration in range(max_iterations):
        if rest <= tolerance**2 * size:
            return Solution(x, iteration, math.sqrt(rest / size), "converged")
        product = matvec(d)
        curvature = d @ product
        step = inner / curvature
        r.addcmul_(product, -step)
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
    return checked(_cholesky_solve(factor, b), lambda v: matrix @ v, b, tolerance, definite=bool(info == 0))


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


def gram_inverse(scores: Scores, shift: Tensor | float) -> tuple[Product, bool]:
    """The product b -> (Ψᵀ Ψ / n + λ I)⁻¹ b by `gram`'s formula without refinement, and whether the factor exists.

    Raises:
        ValueError: λ is 0 or below.
    """
    if shift <= 0:
        raise ValueError(f"the damping is {float(shift)}; the Gram matrix needs one above 0. Give cholesky or cg.")
    matrix = scores.gram().div_(scores.n)
    matrix.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(matrix)

    def inverse(b: Tensor) -> Tensor:
        u = _cholesky_solve(factor, scores.matvec(b))
        return (b - scores.rmatvec(u).div_(scores.n)) / shift

    return inverse, bool(info == 0)


def checked(x: Tensor, matvec: Product, b: Tensor, tolerance: float = math.inf, *, definite: bool = True) -> Solution:
    """x of a direct solver for A x = b with its measured residual; zero where it is not finite or A not definite."""
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
