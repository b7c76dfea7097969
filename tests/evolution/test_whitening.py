"""The metric of perturbations: products of observations, and the matrix that makes normalized ones uncorrelated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.evolution.whitening import Products, whitening_matrix
from agents.policy.base import Moments


@pytest.mark.parametrize("counts", [(1, 4), (40, 3), (0, 5), (5, 0)])
def test_merged_products_are_those_of_everything(counts: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    parts = [torch.from_numpy(rng.normal(1e3, 1.0, (count, 3)).cumsum(1)) for count in counts]
    merged = Products.of(parts[0]).merge(Products.of(parts[1]))
    whole = torch.cat(parts)
    centered = whole - whole.mean(0)
    torch.testing.assert_close(merged.m2, centered.T @ centered, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(merged.columns().m2, Moments.of(whole).m2, rtol=1e-8, atol=1e-8)


def test_whitening_makes_normalized_observations_uncorrelated() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    x = 3.0 + torch.randn(5000, 4, generator=generator, dtype=torch.float64) @ mix
    # Normalized by statistics of earlier observations: neither centered nor of unit variance.
    shift, scale = torch.tensor([2.0, 3.0, 3.5, 0.0]).double(), torch.tensor([0.5, 1.0, 2.0, 0.1]).double()
    M = whitening_matrix(Products.of(x).of_normalized(shift, scale), damping=1e-12)
    torch.testing.assert_close(M, M.T)
    white = (x - shift) * scale @ M
    torch.testing.assert_close(white.T @ white / 5000, torch.eye(4).double(), rtol=0, atol=1e-5)
    # The mean square of M x stays O with damping too, where one observation is another's copy and one is always 0.
    x[:, 1], x[:, 2], shift[1], scale[1] = x[:, 0], 3.5, shift[0], scale[0]
    M = whitening_matrix(Products.of(x).of_normalized(shift, scale))
    assert M.isfinite().all()
    assert ((x - shift) * scale @ M).square().sum(1).mean().item() == pytest.approx(4.0, rel=1e-6)


def test_faded_moments_are_weighted_means() -> None:
    generator = torch.Generator().manual_seed(0)
    early, late = (torch.randn(n, 3, generator=generator, dtype=torch.float64).cumsum(1) for n in (40, 10))
    moments = Products.of(early).faded(0.1).merge(Products.of(1.0 + late))
    x, weights = torch.cat([early, 1.0 + late]), torch.tensor([0.1] * 40 + [1.0] * 10).double()
    weights /= weights.sum()
    torch.testing.assert_close(moments.mean, weights @ x)
    zero, one = torch.zeros(3).double(), torch.ones(3).double()
    torch.testing.assert_close(moments.of_normalized(zero, one), x.T @ (weights[:, None] * x))
