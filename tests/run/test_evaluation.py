import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from agents.run.evaluation import Evaluation, evaluate
from envs import VectorEnv, make_vec


class Walk(gymnasium.Env):
    """Episodes of seed-dependent length L in 1..7 with reward action * t at step t; some end, some are cut."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Box(-10.0, 10.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.t = int(self.np_random.integers(1, 8)), 0
        self.start = self.np_random.standard_normal(3)
        return self.start, {}

    def step(self, action):
        self.t += 1
        over = self.t == self.length
        return (
            self.start + self.t,
            float(action[0]) * self.t,
            over and self.length % 2 == 0,
            over and self.length % 2 == 1,
            {},
        )


class Scripted:
    """Acts with a small random network, or with ones."""

    def __init__(self, ones: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(i, o, generator=generator) for i, o in ((3, 64), (64, 64), (64, 1))]
        self.ones = ones

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        if self.ones:
            return torch.ones(len(obs), 1)
        x = obs.float()
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


def walks(num_envs: int, autoreset: str = "disabled") -> VectorEnv:
    return make_vec(Walk, num_envs, autoreset=autoreset)


@pytest.mark.parametrize("episodes", [1, 5, 23])
def test_returns_and_lengths_are_those_of_the_seeds(episodes: int) -> None:
    found = evaluate(Scripted(ones=True), walks(4), episodes, seed=100)
    lengths = []
    for seed in range(100, 100 + episodes):
        env = walks(1)
        env.reset(seed=seed)
        lengths.append(env.envs[0].unwrapped.length)
    assert found.lengths.tolist() == lengths
    assert found.returns.tolist() == [n * (n + 1) / 2 for n in lengths]  # 1 + 2 + ... + n
    assert found.returns.dtype == np.float64
    assert found.steps == sum(lengths)


def test_the_result_does_not_depend_on_the_number_of_environments() -> None:
    expected = evaluate(Scripted(), walks(1), 23, seed=7)
    assert len(set(expected.returns)) > 10
    for num_envs in (2, 5, 16, 23, 40):
        found = evaluate(Scripted(), walks(num_envs), 23, seed=7)
        assert found.returns.tolist() == expected.returns.tolist()
        assert found.lengths.tolist() == expected.lengths.tolist()


def test_another_seed_gives_other_episodes() -> None:
    first, second = (evaluate(Scripted(), walks(4), 8, seed=seed) for seed in (0, 3))
    assert first.returns.tolist() != second.returns.tolist()
    assert first.returns[3:].tolist() == second.returns[:5].tolist()


def test_whether_to_sample_reaches_the_agent() -> None:
    seen = set()

    class Spy(Scripted):
        def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
            seen.add(deterministic)
            return super().act(obs)

    evaluate(Spy(), walks(2), 2, seed=0, deterministic=False)
    assert seen == {False}


def test_an_environment_that_resets_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="autoreset='disabled'"):
        evaluate(Scripted(), walks(2, "same_step"), 2, seed=0)


def test_no_episode_is_refused() -> None:
    with pytest.raises(ValueError, match="episodes is 0"):
        evaluate(Scripted(), walks(2), 0, seed=0)


def evaluation(*returns: float) -> Evaluation:
    return Evaluation(np.array(returns), np.ones(len(returns), dtype=np.int64), seed=0)


def test_interquartile_mean_leaves_out_a_quarter_on_each_side() -> None:
    # 8 values: 2 are cut below, 2 above; (3 + 4 + 5 + 6) / 4 = 4.5
    assert evaluation(1, 2, 3, 4, 5, 6, 70, 1000).iqm == 4.5
    # 5 values: int(0.25 * 5) = 1 is cut on each side; (2 + 3 + 4) / 3 = 3
    assert evaluation(-50, 2, 3, 4, 99).iqm == 3.0


def test_the_interval_holds_the_mean_and_is_near_the_normal_one() -> None:
    returns = np.random.default_rng(1).normal(100.0, 10.0, 400)
    lower, upper = evaluation(*returns).interval
    half = 1.96 * returns.std() / 20.0  # sqrt(400) = 20
    assert lower == pytest.approx(returns.mean() - half, abs=0.15)
    assert upper == pytest.approx(returns.mean() + half, abs=0.15)


def test_the_interval_repeats_itself() -> None:
    assert evaluation(1, 5, 9).interval == evaluation(1, 5, 9).interval


@pytest.mark.parametrize("returns", [(3.5,), (3.5, 3.5, 3.5)])
def test_without_spread_the_interval_is_the_value(returns: tuple[float, ...]) -> None:
    assert evaluation(*returns).interval == (3.5, 3.5)
    assert evaluation(*returns).iqm == 3.5


def test_nearly_equal_returns_have_a_finite_interval() -> None:
    lower, upper = evaluation(1.0, 1.0 + 2e-16, 1.0).interval
    assert np.isfinite([lower, upper]).all()
