"""Observation normalisation that belongs to the policy: saved with it, frozen while data is collected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ObservationNormalizer(nn.Module):
    """Subtracts the mean of all observations so far, divides by their standard deviation, clips to +-clip.

    Moments are kept in float64 and merged batch by batch (Chan, Golub and LeVeque 1979). Before the first update it is
    the identity.

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
        self._scale = torch.rsqrt(variance + 1e-8).float()
        self._shift = self.mean.float()

    def forward(self, observations: Tensor) -> Tensor:
        """[n, O] float32, normalised."""
        return ((observations - self._shift) * self._scale).clamp_(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, observations: Tensor) -> None:
        """Take observations [n, O] into the statistics."""
        batch = observations.to(torch.float64)
        n = batch.shape[0]
        mean = batch.mean(0)
        delta = mean - self.mean
        total = self.count + n
        self.m2 += (batch - mean).square().sum(0) + delta.square() * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count += n
        self._refresh()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    def _apply(self, *args: Any, **kwargs: Any) -> ObservationNormalizer:
        super()._apply(*args, **kwargs)
        self._refresh()
        return self
