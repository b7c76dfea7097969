"""Step lengths on functions whose KL and gain are known."""

from __future__ import annotations

import math

import pytest
import torch

from agents.natural.curvature import NaturalGradient, Solution
from agents.natural.step import KL_TOLERANCE, SHRINKING, line_search, matched_step, report_step


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0, 3.8])
@pytest.mark.parametrize("first", [0.3, 1.0, 2.5])
def test_the_matched_step_has_the_kl(power: float, first: float) -> None:
    taken = []

    def kl_at(beta: float) -> float:
        taken.append(beta)
        return 0.02 * beta**power

    beta, kl = matched_step(kl_at, first, 0.02)
    assert kl == pytest.approx(0.02, rel=KL_TOLERANCE)
    assert kl == 0.02 * taken[-1] ** power
    assert beta == taken[-1]
    assert len(taken) <= (4 if first != 1.0 else 1)


def test_a_step_that_is_far_too_long_is_found() -> None:
    beta, kl = matched_step(lambda beta: 7e4 * beta, 0.45, 0.05)  # a policy that is nearly deterministic
    assert kl == pytest.approx(0.05, rel=1.0)
    assert 0 < kl == 7e4 * beta


def test_no_step_is_found_where_the_kl_is_not_finite() -> None:
    assert matched_step(lambda beta: math.nan, 1.0, 0.02) == (0.0, 0.0)
    assert matched_step(lambda beta: 1.0, 1.0, 0.02) == (0.0, 0.0)


def test_the_line_search_takes_the_first_step_that_gains_within_the_kl() -> None:
    tried = []

    def try_step(beta: float) -> tuple[float, float]:
        tried.append(beta)
        return beta**2, 0.5 - beta  # gains only below 1/2

    beta, kl = line_search(try_step, 1.0, 0.9)
    # 1 and 0.8^k: the KL holds from 0.8 on, the gain from 0.8^4 = 0.4096 on.
    assert beta == pytest.approx(SHRINKING**4)
    assert kl == pytest.approx(beta**2)
    assert tried == pytest.approx([SHRINKING**k for k in range(5)])
    assert line_search(lambda beta: (0.0, -1.0), 1.0, 0.9) == (0.0, 0.0)
    assert line_search(lambda beta: (math.nan, 1.0), 1.0, 0.9) == (0.0, 0.0)


def test_the_report_by_hand() -> None:
    w, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    solution = Solution(w, 1, 0.0, "converged")
    step = NaturalGradient(w, g, torch.tensor(4.0), solution, torch.tensor(0.0))
    log_ratio = torch.tensor([2.0, 1.0]).log()
    report = report_step(0.1, step, log_ratio, torch.tensor([1.0, -1.0]), torch.tensor([0.1, 0.3]), torch.ones(2))
    assert report.predicted_gain == pytest.approx(0.5)
    assert report.gain == pytest.approx(0.5)  # ((2 - 1) * 1 + 0) / 2
    assert report.kl_quadratic == pytest.approx(0.02)
    assert (report.kl, report.kl_reverse) == (pytest.approx(0.2), 1.0)
    assert report.effective_samples == pytest.approx(9 / (2 * 5))
