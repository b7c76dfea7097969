"""Step lengths on functions whose KL and gain are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from agents.natural.curvature import NaturalGradient, Solution
from agents.natural.scores import DenseScores
from agents.natural.step import KL_TOLERANCE, MOST_GROWTH, SHRINKING, Line, line_search, match_kl, report_step
from agents.policy.distributions import DiagonalGaussian, Head
from agents.policy.networks import Actor, parameter_vector


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0, 3.8])
@pytest.mark.parametrize("first", [0.3, 1.0, 2.5])
def test_the_match_kl_has_the_kl(power: float, first: float) -> None:
    taken = []

    def kl_at(beta: float) -> float:
        taken.append(beta)
        return 0.02 * beta**power

    beta, kl = match_kl(kl_at, first, 0.02)
    assert kl == pytest.approx(0.02, rel=KL_TOLERANCE)
    assert kl == 0.02 * taken[-1] ** power
    assert beta == taken[-1]
    assert len(taken) <= (4 if first != 1.0 else 1)


def test_a_step_that_is_far_too_long_is_found() -> None:
    beta, kl = match_kl(lambda beta: 7e4 * beta, 0.45, 0.05)  # a policy that is nearly deterministic
    assert kl == pytest.approx(0.05, rel=1.0)
    assert 0 < kl == 7e4 * beta


def test_no_step_is_found_where_the_kl_is_not_finite() -> None:
    assert match_kl(lambda beta: math.nan, 1.0, 0.02) == (0.0, 0.0)
    assert match_kl(lambda beta: 1.0, 1.0, 0.02) == (0.0, 0.0)


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


def test_a_step_without_effect_is_made_longer_and_refused_if_there_is_none() -> None:
    tried = []

    def kl_at(beta: float) -> float:
        tried.append(beta)
        return 0.0 if beta < 3 else 0.02

    assert match_kl(kl_at, 1.0, 0.02) == (4.0, 0.02)
    assert tried == [1.0, 2.0, 4.0]
    assert match_kl(lambda beta: 0.0, 1.0, 0.02) == (0.0, 0.0)


def test_a_step_between_none_and_far_too_long_is_found() -> None:
    # A policy that is nearly deterministic: rounding makes the KL of short steps negative.
    def kl_at(beta: float) -> float:
        return -1e-10 if beta < 1e-8 else 1e15 * beta**2.5

    beta, kl = match_kl(kl_at, 0.4, 0.05)
    assert kl == kl_at(beta)
    assert 0 < kl <= 0.1


def test_an_undershoot_is_no_match_while_longer_steps_are_allowed() -> None:
    # Far too long at first, then far too short: four corrections end at a ten-thousandth of the target.
    def kl_at(beta: float) -> float:
        return 1e6 if beta > 50 else 0.02 * (beta / 3) ** 4

    beta, kl = match_kl(kl_at, 100.0, 0.02)
    assert kl == pytest.approx(0.02, rel=0.5)
    assert kl == kl_at(beta)
    beta, kl = match_kl(lambda beta: 1e-6 * beta, 1.0, 0.02)  # out of reach: the longest step counts
    assert (beta, kl) == (MOST_GROWTH, pytest.approx(1e-6 * MOST_GROWTH))


def line_and_step(log_std_min: float | None = None) -> tuple[Line, NaturalGradient, DenseScores, torch.Tensor]:
    """A policy of one weight and one log standard deviation on two observations."""
    head = Head("gaussian", (1,))
    actor = Actor(head, torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)))
    with torch.no_grad():
        actor.net[0].weight.fill_(0.5)
    s, a = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [-1.0]])
    w, g = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])
    with torch.no_grad():
        old = actor(s)
    psi = torch.tensor([[0.5, -0.75], [-4.0, 3.0]])  # by hand: (a - mean) s and (a - mean)² - 1, for a scale of 1
    solution = Solution(w, 1, 0.0, "converged")
    step = NaturalGradient(w, g, (psi @ w).square().mean(), solution, torch.tensor(0.0))
    return Line(actor, w, old, s, log_std_min), step, DenseScores(old.log_prob(a), psi), a


def numbers(report: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in report.items()}


@torch.no_grad()
def test_the_report_by_hand() -> None:
    line, step, Psi, a = line_and_step()
    kl = line.kl(0.1)
    A = torch.tensor([1.0, -1.0])
    report = numbers(report_step(line, 0.1, step, Psi, a, A, torch.tensor(0.5)))
    new = DiagonalGaussian(torch.tensor([[0.6], [1.2]]), torch.tensor([[-0.2]]))
    ratio = (new.log_prob(a) - Psi.values).exp()
    assert report["predicted_gain"] == pytest.approx(0.1 * (3 - 2))
    assert report["kl_quadratic"] == pytest.approx(0.5 * 0.01 * (2.0**2 + 10.0**2) / 2)
    assert report["gain"] == pytest.approx(((ratio - 1) * A).mean().item())
    assert report["kl"] == pytest.approx(line.old.kl(new).mean().item()) == pytest.approx(kl)
    assert report["kl_reverse"] == pytest.approx(new.kl(line.old).mean().item())
    assert report["effective_samples"] == pytest.approx((ratio.sum() ** 2 / (2 * ratio.square().sum())).item())
    assert report["explained_variance"] == 0.5
    assert report["std"] == pytest.approx(math.exp(-0.2))
    line.back()
    assert parameter_vector(line.actor).tolist() == [0.5, 0.0]
    assert line.new is line.old


@torch.no_grad()
def test_the_report_is_of_the_step_that_the_floor_has_cut() -> None:
    line, step, Psi, a = line_and_step(log_std_min=-0.05)
    line.kl(0.1)
    assert parameter_vector(line.actor).tolist() == pytest.approx([0.6, -0.05])
    report = numbers(report_step(line, 0.1, step, Psi, a, torch.ones(2), torch.tensor(0.5)))
    moved = torch.tensor([0.1, -0.05])
    assert report["predicted_gain"] == pytest.approx(0.25)
    assert report["kl_quadratic"] == pytest.approx(0.5 * (Psi.matrix @ moved).square().mean().item())
