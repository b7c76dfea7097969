"""Approximations of the Fisher matrix with a closed inverse: diagonal, K-FAC and E-KFAC; preconditioners by them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agents.devices import fetched, sent
from agents.natural.curvature import (
    CURVATURE_MEMORY,
    Curvature,
    Precondition,
    Product,
    checked,
    gram_inverse,
    relative_damping,
)
from agents.natural.scores import FactoredScores, Scores
from agents.natural.solution import Solution

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


class Eigenbasis(NamedTuple):
    """The eigenvectors uᵢ vⱼᵀ of a block G ⊗ A."""

    of_outputs: Tensor
    """G's, as columns u, [out, out]."""
    of_inputs: Tensor
    """A's, as columns v, [m, m]."""
    eigenvalues: Tensor
    """The block's along uᵢ vⱼᵀ, none below 0, [out, m]."""

    @classmethod
    def of(cls, factors: list[tuple[Tensor, Tensor]]) -> list[Eigenbasis]:
        """Find those of blocks with the factors A and G; not numbers where a factor has entries that are none. A
        device's are found on the host, which waits for them once.
        """
        matrices = [matrix for pair in factors for matrix in pair]
        if (device := matrices[0].device).type != "cpu":
            host = iter(fetched(dict(enumerate(matrices))).values())
            return [cls(*(sent(x, device) for x in basis)) for basis in cls.of(list(zip(host, host, strict=True)))]
        eigen = [_eigen(matrix) for matrix in matrices]
        pairs = zip(eigen[::2], eigen[1::2], strict=True)
        return [cls(of_g[1], of_a[1], torch.outer(of_g[0], of_a[0])) for of_a, of_g in pairs]


class Kronecker(DampedInverse):
    """K-FAC: M is block-diagonal by layers, with the blocks G ⊗ A + λ I of G = Δᵀ Δ / n and A = Hᵀ H / n.

    The damping is exact, by the factors' eigenvectors; nothing is split between the factors.

    Args:
        scores: Ψ.
        shift: λ.
        bases: the layers' eigenvectors, such as those of remembered factors; None takes those of Ψ's own.

    Source: Martens & Grosse 2015, section 3 and equation 28, https://arxiv.org/abs/1503.05671.
    """

    def __init__(self, scores: FactoredScores, shift: Tensor | float, bases: list[Eigenbasis] | None = None) -> None:
        self._scores = scores
        self._bases = Eigenbasis.of(scores.kfac()) if bases is None else bases
        self.eigenvalues = [self._second_moments(place, basis) + shift for place, basis in enumerate(self._bases)]

    def _second_moments(self, place: int, basis: Eigenbasis) -> Tensor:
        return basis.eigenvalues

    def matvec(self, v: Tensor) -> Tensor:
        return self._scores.by_layer(v, lambda place, x: self._scaled(place, x, self.eigenvalues[place]))

    def solve(self, b: Tensor) -> Tensor:
        return self._scores.by_layer(b, lambda place, x: self._scaled(place, x, 1 / self.eigenvalues[place]))

    def _scaled(self, place: int, matrix: Tensor, factors: Tensor) -> Tensor:
        of_g, of_a, _ = self._bases[place]
        return of_g @ (of_g.T @ matrix @ of_a * factors) @ of_a.T


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Give eigenvalues, none below 0, and eigenvectors; not numbers where there are none to be found."""
    # Of float32 it may not converge where many eigenvalues are next to 0.
    for given in (matrix, matrix.double()) if matrix.isfinite().all() else ():
        try:
            values, vectors = torch.linalg.eigh(given)
        except torch.linalg.LinAlgError:
            continue
        # Row by row, as a checkpoint keeps them: products of another layout are rounded otherwise.
        return values.clamp_(min=0).to(matrix.dtype), vectors.to(matrix.dtype).contiguous()
    # A direction that is not finite is the caller's to reject.
    return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)


class EigenKronecker(Kronecker):
    """E-KFAC: K-FAC's eigenvectors with F's own second moments along them in place of K-FAC's eigenvalues.

    Of all matrices with these eigenvectors it is the nearest to F's blocks in the Frobenius norm.

    Source: George et al. 2018, section 3, https://arxiv.org/abs/1806.03884.
    """

    def _second_moments(self, place: int, basis: Eigenbasis) -> Tensor:
        return self._scores.second_moments(place, basis.of_outputs, basis.of_inputs)


class ClosedForm(Curvature):
    """Curvature by an approximation M of F + λ I: w = M⁻¹ g."""

    form: type[Diagonal] | type[Kronecker]

    def solve(self, fisher: Scores, shift: Tensor, gradient: Tensor) -> Solution:
        M = self.form(fisher, shift)  # type: ignore[arg-type]
        return checked(M.solve(gradient), M.matvec, gradient)


class DiagonalCurvature(ClosedForm):
    form = Diagonal


class KroneckerCurvature(ClosedForm):
    """Curvature by K-FAC, whose factors may be remembered from update to update.

    Options: curvature_memory, curvature_renewal; see `RunningFactors`.
    """

    form: type[Kronecker] = Kronecker

    def __init__(self, c: Any, precondition: Precondition | None = None, seed: int = 0) -> None:
        super().__init__(c, precondition, seed)
        memory = CURVATURE_MEMORY if c.curvature_memory is None else c.curvature_memory
        self.running = RunningFactors(memory, c.curvature_renewal) if memory else None

    def solve(self, fisher: Scores, shift: Tensor, gradient: Tensor) -> Solution:
        if self.running is None:
            return super().solve(fisher, shift, gradient)
        assert isinstance(fisher, FactoredScores)
        finite = self.running.take_in(fisher, self.late)
        if finite is False:
            return Solution(torch.zeros_like(gradient), 0, math.nan, "non_finite")
        M = self.form(fisher, shift, self.running.bases)
        return checked(M.solve(gradient), M.matvec, gradient, definite=finite)

    def asks(self) -> dict[str, Tensor]:
        return {} if self.running is None else self.running.named_factors()

    def prepare(self, heard: Mapping[str, Tensor]) -> None:
        if self.running is not None and self.running.factors:
            self.running.renew(heard)

    def forget(self) -> None:
        self.running = None

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.running is None else self.running.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            self.forget()
        elif self.running is not None:
            self.running.load(tensors)


class EigenKroneckerCurvature(KroneckerCurvature):
    form = EigenKronecker


class RunningFactors:
    """Averages of K-FAC's factors over the samples of all updates, of which older ones weigh less, and their bases.

    A sample after which m others came weighs exp(-m / memory); those of one update weigh the same. The weights are
    divided by their sum, so the first averages are those of the first updates alone.

    Args:
        memory: in samples, above 0.
        renewal: updates from one eigendecomposition to the next.

    Source: Martens & Grosse 2015, section 5. Differs from the paper: weights by samples in place of min(1 - 1/k, 0.95)
    in the k-th update.
    """

    def __init__(self, memory: float, renewal: int = 1) -> None:
        self.memory, self.renewal = memory, renewal
        self.factors: list[tuple[Tensor, Tensor]] = []
        """The layers' A and G."""
        self.bases: list[Eigenbasis] = []
        self.updates, self.weight = 0, torch.zeros((), dtype=torch.float64)

    def take_in(self, scores: FactoredScores, late: bool = False) -> Tensor | bool:
        """Average an update's factors in, and say whether they are finite: if not, nothing changes. On a device that is
        a boolean of shape (), and they come in as zeros if they are not.

        Args:
            late: whether `renew` is called before each update but the first.
        """
        new = scores.kfac()
        finite = torch.stack([x.isfinite().all() for pair in new for x in pair]).all()
        if scores.device.type != "cpu":
            new = [(torch.where(finite, A, 0.0), torch.where(finite, G, 0.0)) for A, G in new]
        elif not finite:
            return False
        self.weight = self.weight.to(scores.device).mul_(math.exp(-scores.n / self.memory)).add_(scores.n)
        share, self.factors = (scores.n / self.weight).to(scores.dtype), self.factors or new
        for kept, given in zip(self.factors, new, strict=True):  # in place, where recorded work reads them
            for x, y in zip(kept, given, strict=True):
                x.lerp_(y, share)
        if not (late and self.bases):
            if self.updates % self.renewal == 0:
                self.bases = Eigenbasis.of(self.factors)
            self.updates += 1
        return finite if scores.device.type != "cpu" else True

    def renew(self, heard: Mapping[str, Tensor]) -> None:
        """Put bases of the factors where those before are, if it is time for that.

        Args:
            heard: the factors by name, if they have come to the host.
        """
        if self.updates % self.renewal == 0:
            here = {name: heard.get(name, x) for name, x in self.named_factors().items()}
            bases = Eigenbasis.of([(here[f"{k}.A"], here[f"{k}.G"]) for k in range(len(self.factors))])
            for before, basis in zip(self.bases, bases, strict=True):
                for x, y in zip(before, basis, strict=True):
                    x.copy_(sent(y, x.device))
        self.updates += 1

    def named_factors(self) -> dict[str, Tensor]:
        """Give the factors by layer and name."""
        return {f"{k}.{name}": x for k, pair in enumerate(self.factors) for name, x in zip("AG", pair, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """Give what it keeps between updates."""
        counts = {"updates": torch.tensor(self.updates), "weight": self.weight}
        bases = {f"{k}.{name}": x for k, basis in enumerate(self.bases) for name, x in basis._asdict().items()}
        return counts | self.named_factors() | bases

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        layers = range(sum(name.endswith(".A") for name in tensors))
        own = {name: x.clone() for name, x in tensors.items()}
        self.factors = [(own[f"{k}.A"], own[f"{k}.G"]) for k in layers]
        self.bases = [Eigenbasis(*(own[f"{k}.{name}"] for name in Eigenbasis._fields)) for k in layers]
        self.updates = int(own.get("updates", 0))
        self.weight = own.get("weight", torch.zeros((), dtype=torch.float64))


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
    return lambda b: torch.where(definite, inverse(b), torch.nan)


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
