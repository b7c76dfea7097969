"""GAE: arithmetic by hand, closed forms, and a scalar float64 reference under every mix of endings."""

import itertools

import pytest
import torch

from agents.rollout.buffer import gae, next_values, standardize


def reference(rewards, values, following, terminated, truncated, gamma, lam):
    """One environment at a time, one step at a time, in Python floats."""
    steps, columns = rewards.shape
    advantages = torch.zeros(steps, columns, dtype=torch.float64)
    for n in range(columns):
        running = 0.0
        for t in reversed(range(steps)):
            bootstrap = 0.0 if terminated[t, n] else gamma * following[t, n].item()
            delta = rewards[t, n].item() + bootstrap - values[t, n].item()
            ended = bool(terminated[t, n] or truncated[t, n])
            running = delta + (0.0 if ended else gamma * lam * running)
            advantages[t, n] = running
    return advantages


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def flags(*numbers):
    return torch.tensor(numbers, dtype=torch.bool)[:, None]


def test_by_hand():
    # gamma 0.5, lambda 0.5, so gamma * lambda = 0.25. Step 1 truncates; its true last observation is worth 10.
    # delta_3 = 4 + 0.5 * 8 - 3    =  5       A_3 = 5
    # delta_2 = 1 + 0.5 * 3 - 2    =  0.5     A_2 = 0.5 + 0.25 * 5 = 1.75
    # delta_1 = 2 + 0.5 * 10 - 1   =  6       A_1 = 6 (the recursion stops)
    # delta_0 = 1 + 0.5 * 1 - 4    = -2.5     A_0 = -2.5 + 0.25 * 6 = -1
    values = column(4, 1, 2, 3)
    final = (torch.tensor([1]), torch.tensor([0]), torch.tensor([10.0], dtype=torch.float64))
    following = next_values(values, torch.tensor([8.0], dtype=torch.float64), final)
    assert following[:, 0].tolist() == [1, 10, 3, 8]
    advantages, returns = gae(
        column(1, 2, 1, 4), values, following, flags(0, 0, 0, 0), flags(0, 1, 0, 0), gamma=0.5, gae_lambda=0.5
    )
    assert advantages[:, 0].tolist() == [-1, 6, 1.75, 5]
    assert returns[:, 0].tolist() == [3, 7, 3.75, 8]


def test_a_terminated_step_does_not_bootstrap():
    advantages, _ = gae(column(2), column(1), column(100), flags(1), flags(0), gamma=0.9, gae_lambda=0.9)
    assert advantages.item() == 1  # 2 - 1


def test_every_mix_of_endings_against_the_reference():
    steps = 4
    patterns = list(itertools.product([(0, 0), (1, 0), (0, 1), (1, 1)], repeat=steps))
    ended = torch.tensor(patterns, dtype=torch.bool)  # [256, T, 2]
    terminated, truncated = ended[..., 0].T, ended[..., 1].T
    generator = torch.Generator().manual_seed(0)
    rewards, values, following = torch.randn(3, steps, len(patterns), generator=generator, dtype=torch.float64)
    for gamma, lam in ((0.99, 0.95), (0.9, 1.0), (1.0, 0.7)):
        expected = reference(rewards, values, following, terminated, truncated, gamma, lam)
        advantages, returns = gae(rewards, values, following, terminated, truncated, gamma, lam)
        torch.testing.assert_close(advantages, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(returns, expected + values, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 3, 31, 32, 33, 500])
def test_every_length_against_the_reference(steps):
    generator = torch.Generator().manual_seed(steps)
    rewards, values, following = torch.randn(3, steps, 3, generator=generator, dtype=torch.float64)
    terminated, truncated = torch.rand(2, steps, 3, generator=generator) < 0.02
    expected = reference(rewards, values, following, terminated, truncated, 0.99, 0.95)
    advantages, _ = gae(rewards, values, following, terminated, truncated, 0.99, 0.95)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)


def vtrace(rewards, values, following, terminated, truncated, gamma, lam, rho):
    """Σ_k γ^k (Π_{i<k} λ ρ_{t+i}) ρ_{t+k} δ_{t+k}, summed term by term: V-trace's target less V, where c = λ ρ."""
    steps, columns = rewards.shape
    gained = torch.zeros(steps, columns, dtype=torch.float64)
    for n, first in itertools.product(range(columns), range(steps)):
        factor = 1.0
        for t in range(first, steps):
            bootstrap = 0.0 if terminated[t, n] else gamma * following[t, n].item()
            gained[first, n] += factor * rho[t, n].item() * (rewards[t, n].item() + bootstrap - values[t, n].item())
            factor *= gamma * lam * rho[t, n].item()
            if terminated[t, n] or truncated[t, n]:
                break
    return gained


def test_with_importance_weights_the_returns_are_v_traces():
    steps = 40
    generator = torch.Generator().manual_seed(5)
    rewards, values, following = torch.randn(3, steps, 6, generator=generator, dtype=torch.float64)
    terminated, truncated = torch.rand(2, steps, 6, generator=generator) < 0.05
    rho = torch.rand(steps, 6, generator=generator, dtype=torch.float64)
    rho[rho > 0.8], rho[rho < 0.1] = 1.0, 0.0
    given = rewards, values, following, terminated, truncated, 0.99, 0.95
    expected = vtrace(*given, rho)
    advantages, returns = gae(*given, rho)
    torch.testing.assert_close(returns, values + expected, rtol=1e-12, atol=1e-12)
    # What an action gained does not depend on how likely it was; what those after it gained does on theirs.
    torch.testing.assert_close((rho * advantages), expected, rtol=1e-12, atol=1e-12)
    assert (advantages[rho == 0] != 0).all()
    for ours, plain in zip(gae(*given, torch.ones_like(rho)), gae(*given), strict=True):
        assert torch.equal(ours, plain)


def test_standardized_advantages_have_weighted_moments():
    generator = torch.Generator().manual_seed(6)
    A, weights = torch.randn(500, generator=generator) * 3 + 2, torch.rand(500, generator=generator)
    shares, scaled = weights / weights.sum(), standardize(A, weights)
    assert (shares @ scaled).item() == pytest.approx(0, abs=1e-5)
    assert (shares @ scaled.square()).item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(standardize(A, torch.full_like(A, 0.3)), standardize(A), rtol=1e-5, atol=1e-5)
    assert (standardize(torch.full((5,), 1e6), weights[:5]) == 0).all()


def test_constant_reward_under_time_limits_is_worth_the_infinite_sum():
    # r = 1 for ever and V = 1 / (1 - gamma): a time limit is no end of the world, so every advantage is 0.
    gamma, steps = 0.9, 20
    values = torch.full((steps, 2), 1 / (1 - gamma), dtype=torch.float64)
    truncated = torch.zeros(steps, 2, dtype=torch.bool)
    truncated[4::5] = True
    advantages, returns = gae(
        torch.ones_like(values), values, values, torch.zeros_like(truncated), truncated, gamma, 0.95
    )
    torch.testing.assert_close(advantages, torch.zeros_like(values), rtol=0, atol=1e-13)
    torch.testing.assert_close(returns, values)
    # With V = 0 inside the rollout and the true value behind each limit, lambda = 1 gives the infinite sum as well.
    inside = torch.zeros_like(values)
    following = torch.where(truncated, values, inside)
    _, returns = gae(torch.ones_like(values), inside, following, torch.zeros_like(truncated), truncated, gamma, 1.0)
    torch.testing.assert_close(returns, values)


def test_lambda_zero_is_the_td_error_and_lambda_one_the_discounted_sum():
    generator = torch.Generator().manual_seed(3)
    steps, gamma = 12, 0.9
    rewards, values = torch.randn(2, steps, 2, generator=generator, dtype=torch.float64)
    last = torch.randn(2, generator=generator, dtype=torch.float64)
    following = torch.cat((values[1:], last[None]))
    never = torch.zeros(steps, 2, dtype=torch.bool)
    td, _ = gae(rewards, values, following, never, never, gamma, 0.0)
    torch.testing.assert_close(td, rewards + gamma * following - values)
    _, returns = gae(rewards, values, following, never, never, gamma, 1.0)
    discounts = gamma ** torch.arange(steps, dtype=torch.float64)
    for t in range(steps):
        expected = (discounts[: steps - t, None] * rewards[t:]).sum(0) + gamma ** (steps - t) * last
        torch.testing.assert_close(returns[t], expected)


def test_all_episodes_ended_leaves_one_step_errors():
    generator = torch.Generator().manual_seed(4)
    rewards, values, following = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    always, never = torch.ones(6, 2, dtype=torch.bool), torch.zeros(6, 2, dtype=torch.bool)
    advantages, returns = gae(rewards, values, following, always, never, 0.9, 0.9)
    torch.testing.assert_close(advantages, rewards - values)
    torch.testing.assert_close(returns, rewards)
    advantages, _ = gae(rewards, values, following, never, always, 0.9, 0.9)
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)


def test_the_last_observation_of_a_truncation_at_the_rollouts_end_wins_over_the_reset_one():
    final = (torch.tensor([1]), torch.tensor([1]), torch.tensor([5.0]))
    following = next_values(torch.zeros(2, 2), torch.tensor([7.0, 7.0]), final)
    assert following.tolist() == [[0, 0], [7, 5]]


def test_no_truncation():
    none = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert next_values(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0]), none).tolist() == [[2], [3]]


def test_dtype_follows_the_values_and_inputs_stay():
    rewards = torch.ones(3, 2, dtype=torch.float64)
    values, following = torch.ones(3, 2), torch.ones(3, 2)
    never = torch.zeros(3, 2, dtype=torch.bool)
    advantages, returns = gae(rewards, values, following, never, never, 0.9, 0.9)
    assert advantages.dtype == returns.dtype == torch.float32
    for untouched in (rewards, values, following):
        assert (untouched == 1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_advantages_that_are_no_numbers_are_not_taken_for_equal_ones(value: float) -> None:
    assert not standardize(torch.tensor([1.0, value, 2.0])).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_what_follows_an_episodes_end_does_not_reach_it(value: float, end: str) -> None:
    rewards = torch.tensor([[1.0], [1.0], [1.0], [value], [1.0]])
    values, ended = torch.zeros(5, 1), torch.zeros(5, 1, dtype=torch.bool)
    ended[[1, 3]] = True
    ends = (ended, ~ended & ended) if end == "terminated" else (~ended & ended, ended)
    A, returns = gae(rewards, values, values, *ends, 0.5, 1.0)
    for found in (A, returns):
        torch.testing.assert_close(found[[0, 1, 4], 0], torch.tensor([1.5, 1.0, 1.0]))
        assert not found[[2, 3]].isfinite().any()
