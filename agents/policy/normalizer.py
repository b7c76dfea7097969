"""Observation normalisation that belongs to the policy: saved with it, frozen while data is collected."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn


class Moments(NamedTuple):
    """What can be merged without loss of n numbers per column. float64; source: Chan, Golub and LeVeque 1979."""

    n: Tensor
    """How many, of shape ()."""
    mean: Tensor
    """[O]."""
    m2: Tensor
    """Sums of squared differences from the mean, [O]."""

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Sum up the rows of x [n, O]; n may be 0."""
        x = x.to(torch.float64)
        mean = x.sum(0) / max(len(x), 1)
        return cls(x.new_tensor(len(x)), mean, cls.spread(x - mean).sum(0))

    @staticmethod
    def spread(difference: Tensor) -> Tensor:
        """Return what a difference from the mean [..., O] adds to m2."""
        return difference.square()

    def merge(self, other: Self) -> Self:
        """Return those of both."""
        total = self.n + other.n
        parts, delta = total.clamp(min=1), other.mean - self.mean
        m2 = other.m2 + self.spread(delta) * (self.n * other.n / parts)
        return type(self)(total, self.mean + delta * (other.n / parts), self.m2 + m2)

    def to(self, device: torch.device | str) -> Self:
        """Return them on a device."""
        return type(self)(*(part.to(device) for part in self))


class ObservationNormalizer(nn.Module):
    """Subtracts the mean of all observations so far, divides by their standard deviation, clips to +-clip.

    Moments are kept in float64 and merged batch by batch. Before the first update it is the identity: normalized values
    are (x - shift) scale = x scale + offset, clipped.

    Args:
        size: O, the length of an observation.
        clip: bound of normalised values.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, size: int, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(size, dtype=torch.float64))
        self._refresh()

    def _refresh(self) -> None:
        """Recompute the float32 constants that forward uses."""
        variance = self.m2 / self.count if self.count > 0 else torch.ones_like(self.m2)
        scale = torch.rsqrt(variance + 1e-8)
        self.shift, self.scale, self.offset = self.mean.float(), scale.float(), (-self.mean * scale).float()

    def forward(self, observations: Tensor) -> Tensor:
        """[n, O] float32, normalised."""
        return torch.addcmul(self.offset, observations, self.scale).clamp_(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, observations: Tensor) -> None:
        """Take observations [n, O] into the statistics."""
        self.merge(Moments.of(observations))

    def merge(self, moments: Moments) -> None:
        """Take the moments of other observations into the statistics."""
        merged = Moments(self.count, self.mean, self.m2).merge(moments)
        for held, value in zip((self.count, self.mean, self.m2), merged, strict=True):
            held.copy_(value)
        self._refresh()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    def _apply(self, *args: Any, **kwargs: Any) -> ObservationNormalizer:
        super()._apply(*args, **kwargs)
        self._refresh()
        return self
