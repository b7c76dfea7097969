"""Surrogates' first and second derivatives against the exact expected return of a small decision process."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agents.adaptation.inner_loop import InnerSGD, meta_gradients
from agents.rollout.surrogates import dice_surrogate, lvc_surrogate

STATES, ACTIONS = 2, 2
GENERATOR = torch.Generator().manual_seed(0)
REWARDS = torch.randn(STATES, ACTIONS, generator=GENERATOR, dtype=torch.float64)
NEXT = torch.softmax(torch.randn(STATES, ACTIONS, STATES, generator=GENERATOR, dtype=torch.float64), -1)
BASELINE = torch.randn(STATES, generator=GENERATOR, dtype=torch.float64)
THETA = torch.randn(STATES * ACTIONS, generator=GENERATOR, dtype=torch.float64)


class Process:
    """All trajectories of T steps from state 0: states and actions [K, T]."""

    def __init__(self, T: int) -> None:
        paths = [
            (states, actions)
            for states in itertools.product(range(STATES), repeat=T)
            for actions in itertools.product(range(ACTIONS), repeat=T)
            if states[0] == 0
        ]
        self.s, self.a = (torch.tensor(part) for part in zip(*paths, strict=True))
        r = REWARDS[self.s, self.a]
        moves = NEXT[self.s[:, :-1], self.a[:, :-1], self.s[:, 1:]]
        self.dynamics, self.returns = moves.prod(1), r.sum(1)
        self.advantages = r.flip(1).cumsum(1).flip(1) - BASELINE[self.s]
        self.begin = torch.zeros_like(self.s)

    def log_probs(self, theta: Tensor) -> Tensor:
        return torch.log_softmax(theta.view(STATES, ACTIONS), -1)[self.s, self.a]

    def weights(self, theta: Tensor) -> Tensor:
        return self.dynamics * self.log_probs(theta).sum(1).exp()

    def expected_return(self, theta: Tensor) -> Tensor:
        return (self.weights(theta) * self.returns).sum()

    def surrogate(self, kind: str, theta: Tensor, sampled_at: Tensor) -> Tensor:
        """Its expectation over trajectories of the policy sampled_at."""
        log_ratio = self.log_probs(theta) - self.log_probs(sampled_at)
        if kind == "lvc":
            values = lvc_surrogate(log_ratio, self.advantages)
        else:
            values = dice_surrogate(log_ratio, self.advantages, self.begin)
        return (self.weights(sampled_at) * values.sum(1)).sum()


def derivatives(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return torch.func.grad(f)(THETA), torch.func.jacrev(torch.func.jacrev(f))(THETA)


@pytest.mark.parametrize("T", [1, 3])
def test_dice_has_the_gradient_and_the_hessian_of_the_expected_return(T: int) -> None:
    process = Process(T)
    gradient, hessian = derivatives(process.expected_return)
    found_gradient, found_hessian = derivatives(lambda theta: process.surrogate("dice", theta, THETA))
    torch.testing.assert_close(found_gradient, gradient)
    torch.testing.assert_close(found_hessian, hessian)


def test_lvc_has_the_gradient_and_in_one_step_the_hessian() -> None:
    for T, exact in ((1, True), (3, False)):
        process = Process(T)
        gradient, hessian = derivatives(process.expected_return)
        found_gradient, found_hessian = derivatives(lambda theta, p=process: p.surrogate("lvc", theta, THETA))
        torch.testing.assert_close(found_gradient, gradient)
        assert torch.allclose(found_hessian, hessian) == exact


def test_dice_weights_other_parameters_by_the_importance_of_their_trajectories() -> None:
    process, other = Process(3), THETA.flip(0)
    # With A_t = Σ_{u >= t} r_u - b the sum over t is Σ_u r_u (Π_{v <= u} ratio - 1) and what the baseline adds, 0.
    difference = process.expected_return(other) - process.expected_return(THETA)
    torch.testing.assert_close(process.surrogate("dice", other, THETA), difference)


def test_products_stop_where_an_episode_begins() -> None:
    log_ratio = torch.randn(2, 7, generator=GENERATOR, dtype=torch.float64)
    advantages = torch.randn(2, 7, generator=GENERATOR, dtype=torch.float64)
    begin = torch.tensor([[0, 0, 0, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 6]])
    whole = dice_surrogate(log_ratio, advantages, begin)
    for row, cuts in ((0, (0, 3, 7)), (1, (0, 1, 6, 7))):
        for first, last in itertools.pairwise(cuts):
            part = slice(first, last)
            zeros = torch.zeros(last - first, dtype=torch.int64)
            alone = dice_surrogate(log_ratio[row, part], advantages[row, part], zeros)
            torch.testing.assert_close(whole[row, part], alone)


@pytest.mark.parametrize(("kind", "exact"), [("dice", True), ("lvc", False)])
def test_mamls_gradient_through_a_policy_gradient_step_against_finite_differences(kind: str, exact: bool) -> None:
    """d/dθ J(θ + α ∇J(θ)), by differences of the exact expected return."""
    process, alpha, h = Process(3), 0.3, 1e-5

    def after(theta: Tensor) -> float:
        return process.expected_return(theta + alpha * torch.func.grad(process.expected_return)(theta)).item()

    eye = torch.eye(len(THETA), dtype=THETA.dtype) * h
    differences = torch.tensor([(after(THETA + e) - after(THETA - e)) / (2 * h) for e in eye], dtype=THETA.dtype)

    def loss(theta: Tensor, batch: str) -> Tensor:
        if batch == "inner":
            return -process.surrogate(kind, theta[0], THETA)[None]
        return -process.expected_return(theta[0])[None]

    found = meta_gradients("maml", loss, THETA[None], ["inner"], "outer", InnerSGD(alpha))
    assert torch.allclose(-found[0], differences, atol=1e-8) == exact
