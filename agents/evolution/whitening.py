"""Perturbations with a metric of their own: the inverse of the products of normalized observations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from agents.checkpoint import with_prefix
from agents.config import CommonConfig, at_least
from agents.devices import fetched
from agents.policy.base import Moments, ObservationNormalizer


@dataclass(frozen=True, kw_only=True)
class WhiteningConfig(CommonConfig):
    """Whether perturbations are whitened."""

    whitening_memory: Annotated[int, at_least(1)] | None = None
    """Observations over which the products of a search's normalized observations are averaged, exponentially. Once so
    many are seen, its perturbations, and with them its updates, have the inverse of that matrix for a metric: a natural
    gradient in the first layer's weights. None never does that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whitening_memory is not None and not self.normalize_observations:
            raise ValueError(
                f"whitening_memory is {self.whitening_memory}, but normalize_observations is False; only normalized "
                "observations are whitened: give whitening_memory=None, or normalize."
            )


class Products(Moments):
    """Moments whose m2 [O, O] sums the products of every two columns' differences from their means."""

    __slots__ = ()

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> Self:
        """Sum up the rows of x [n, O], or those in a mask [n]; there may be none."""
        n, mean, _ = Moments.of(x, mask)
        difference = x.to(torch.float64) - mean
        if mask is not None:
            difference = difference.masked_fill(~mask[:, None], 0)
        return cls(n, mean, difference.T @ difference)

    @staticmethod
    def spread(delta: Tensor) -> Tensor:
        """Return what two means that differ by delta [O] add to m2."""
        return delta.outer(delta)

    def faded(self, kept: float) -> Self:
        """Let the numbers count `kept` times as much in what is merged next."""
        return self._replace(n=self.n * kept, m2=self.m2 * kept)

    def of_normalized(self, shift: Tensor, scale: Tensor) -> Tensor:
        """Average the products [O, O] of every two of (x - shift) scale; n is above 0."""
        center = (self.mean - shift) * scale
        return self.m2 / self.n * scale[:, None] * scale + center.outer(center)

    def columns(self) -> Moments:
        """Leave the products of different columns out."""
        return Moments(self.n, self.mean, self.m2.diagonal())


class Whitening:
    """The products of recent observations, and the matrix that makes normalized ones uncorrelated.

    Args:
        memory: observations over which products are averaged, exponentially, and that are seen before the first matrix.
        size: O.
    """

    def __init__(self, memory: int, size: int) -> None:
        self.memory = memory
        self.observed = Products(*(torch.zeros(shape, dtype=torch.float64) for shape in ((), (size,), (size, size))))

    def matrix(self, normalizer: ObservationNormalizer) -> Tensor | None:
        """Return M [O, O] for observations as the normalizer normalizes them now; None if too few have been seen."""
        host = fetched({name: getattr(normalizer, name) for name in ("count", "shift", "scale")})
        if host["count"] < self.memory:
            return None
        return whitening_matrix(self.observed.of_normalized(host["shift"].double(), host["scale"].double())).float()

    def observe(self, shards: Sequence[Products]) -> list[Moments]:
        """Take a window's observations in, which earlier ones fade by, and return them without products."""
        host = fetched({f"{k}.{name}": x for k, shard in enumerate(shards) for name, x in shard._asdict().items()})
        shards = [Products(*(host[f"{k}.{name}"] for name in Products._fields)) for k in range(len(shards))]
        seen = sum(products.n.item() for products in shards)
        self.observed = self.observed.faded(math.exp(-seen / self.memory))
        for products in shards:
            self.observed = self.observed.merge(products)
        return [products.columns() for products in shards]

    def tensors(self) -> dict[str, Tensor]:
        """Return its state."""
        return {f"observed.{name}": value for name, value in self.observed._asdict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        if held := with_prefix(tensors, "observed."):
            self.observed = Products(**held).to(self.observed.n.device)


def whitening_matrix(C: Tensor, damping: float = 0.01) -> Tensor:
    """Return M ~ (C + damping c I)^-1/2 [O, O], symmetric: by it, normalized observations x become uncorrelated.

    C is E[x xᵀ], c the mean of its diagonal. M is scaled such that M x has the mean square O, whatever x's own is.
    """
    values, vectors = torch.linalg.eigh(C)
    values = values.clamp(min=0)
    damped = values + damping * values.mean()
    M = vectors / damped.sqrt() @ vectors.T
    return M * (len(C) / (values / damped).sum()).sqrt()
