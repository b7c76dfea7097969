"""The running scale of scores, by hand and over long calms."""

from __future__ import annotations

import pytest
import torch

from agents.evolution.update import MOST_SURPRISE, RewardScale


def test_a_difference_after_a_calm_counts_no_more_than_before_it() -> None:
    """All survive for long; then one dies. The score is what it was, and so is its gradient."""
    scale = RewardScale()
    death = torch.full((20,), 100.0).double()
    death[3] = 0.0
    scales = [scale.update(death, memory=10.0).item() for _ in range(30)]
    for _ in range(500):
        scale.update(torch.full((20,), 100.0).double(), memory=10.0)
    assert scale.update(death, memory=10.0).item() == pytest.approx(scales[-1])
    # Greater differences are followed within an episode of ten windows.
    for _ in range(30):
        scales.append(scale.update(10 * death, memory=10.0).item())
    assert scales[-1] == pytest.approx(10 * scales[0], rel=0.05)


def test_without_a_memory_the_scale_is_the_windows_own() -> None:
    scale = RewardScale()
    for size in (1.0, 100.0, 0.01):
        assert scale.update(size * torch.tensor([1.0, -1.0]), memory=0.0).item() == pytest.approx(size)
    assert scale.update(torch.tensor([3.0, 3.0]), memory=0.0) == 1.0


def test_a_kept_scale_goes_on_as_it_would_have() -> None:
    scale, kept = RewardScale(), RewardScale()
    kept.load(scale.tensors())
    assert kept.variance is None
    for size in (4.0, 3.0, 2.0):
        scale.update(torch.tensor([size, -size]), memory=2.0)
    assert scale.variance < scale.highest
    kept.update(torch.tensor([0.0, 1.0]), memory=2.0)
    kept.load(scale.tensors())
    assert kept.update(torch.tensor([1.0, -1.0]), memory=2.0) == 4.0
    scale.update(torch.tensor([1.0, -1.0]), memory=2.0)
    assert kept.variance == scale.variance
    surprise = torch.tensor([0.0, 50.0])
    assert kept.update(surprise, memory=2.0).item() == pytest.approx(25.0 / MOST_SURPRISE)


@pytest.mark.parametrize("before", [0, 3])
def test_scores_that_are_not_finite_leave_no_trace(before: int) -> None:
    scale, untouched = RewardScale(), RewardScale()
    for each in (scale, untouched):
        for size in range(before):
            each.update(torch.tensor([size, -size]).double(), memory=2.0)
    for bad in (torch.nan, torch.inf):
        scale.update(torch.tensor([1.0, bad]).double(), memory=2.0)
    for size in (5.0, 1.0):
        window = torch.tensor([size, -size]).double()
        assert scale.update(window, memory=2.0) == untouched.update(window, memory=2.0)
    assert scale.variance == untouched.variance
