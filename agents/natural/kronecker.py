"""Approximations of the Fisher matrix with a closed inverse: diagonal, K-FAC and E-KFAC; preconditioners by them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from agents.natural.curvature import (
    Curvature,
    Precondition,
    Product,
    Solution,
    checked,
    gram_inverse,
    relative_damping,
)
from agents.natural.scores import FactoredScores, Scores

PRECONDITIONER_SAMPLES = {"diagonal": 1024, "kfac": 1024, "ekfac": 1024, "gram": 640}
"""About how many samples a preconditioner is made from: it changes the way of conjugate gradients, not their goal."""


class DampedInverse(ABC):
    """An approximation M of the damped Fisher matrix with a closed inverse."""

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """Multiply: v [p] to M v [p]."""

    @abstractmethod
    def solve(self, b: Tensor) -> Tensor:
        """Solve: b [p] to M⁻¹ b [p]."""


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
    """Give eigenvalues, none below 0, and eigenvectors; not numbers where the matrix has entries that are none."""
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


class ClosedForm(Curvature):
    """Curvature by an approximation M of F + λ I: w = M⁻¹ g."""

    form: type[Diagonal] | type[Kronecker]

    def solve(self, fisher: Scores, shift: Tensor, gradient: Tensor) -> Solution:
        M = self.form(fisher, shift)  # type: ignore[arg-type]
        return checked(M.solve(gradient), M.matvec, gradient)


class DiagonalCurvature(ClosedForm):
    form = Diagonal


class KroneckerCurvature(ClosedForm):
    form = Kronecker


class EigenKroneckerCurvature(ClosedForm):
    form = EigenKronecker


def _by_closed_form(name: str, form: Callable[..., DampedInverse]) -> Precondition:
    def precondition(scores: Scores, shift: Tensor | float) -> Product:
        return form(_few(name, scores), shift).solve

    return precondition


def _by_gram(scores: Scores, shift: Tensor | float) -> Product:
    """Precondition by the exact inverse of a few samples' matrix, in the space of samples.

    Source: Roosta-Khorasani & Mahoney 2019, "Sub-sampled Newton methods", https://arxiv.org/abs/1601.04737,
    curvature of a few samples; here it only preconditions.

    Raises:
        ValueError: the damping is not above 0.
    """
    inverse, definite = gram_inverse(_few("gram", scores), shift)
    # Conjugate gradients report what is not finite.
    return inverse if definite else lambda b: torch.full_like(b, torch.nan)


def _few(name: str, scores: Scores) -> Scores:
    stride = max(1, scores.n // PRECONDITIONER_SAMPLES[name])
    return scores if stride == 1 else scores.of(torch.arange(0, scores.n, stride, device=scores.device))


PRECONDITIONERS: dict[str, Precondition | None] = {
    "none": None,
    "diagonal": _by_closed_form("diagonal", Diagonal),
    "kfac": _by_closed_form("kfac", Kronecker),
    "ekfac": _by_closed_form("ekfac", EigenKronecker),
    "gram": _by_gram,
}
"""Name -> what makes b -> M⁻¹ b from some scores and the damping λ, for conjugate gradients."""


def effective_dimension(scores: FactoredScores, damping: float) -> Tensor:
    """Estimate tr(F (F + λ I)⁻¹), the number of directions that the damping leaves free, by E-KFAC; a scalar.

    Args:
        scores: Ψ.
        damping: λ / (tr F / p).
    """
    shift = relative_damping(scores, damping)
    eigenvalues = torch.cat([x.flatten() for x in EigenKronecker(scores, shift).eigenvalues])
    return (1 - shift / eigenvalues).sum()
