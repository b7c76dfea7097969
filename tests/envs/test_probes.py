"""The probes are proper environments, and their answers are as they say."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import make_vec
from envs.probes import PROBES, Endless, MultiBinaryBandit, MultiDiscreteBandit, Probe

GAMMA = 0.9


def episode(env_id: str, actions: list) -> tuple[list[float], bool, bool]:
    """Rewards of one episode that takes the actions in turn, and how it ended."""
    env = gymnasium.make(f"probes/{env_id}-v0")
    env.reset(seed=0)
    rewards = []
    for action in actions:
        _, reward, terminated, truncated, _ = env.step(action)
        rewards.append(float(reward))
        if terminated or truncated:
            break
    return rewards, terminated, truncated


@pytest.mark.parametrize("probe", PROBES)
def test_gymnasium_has_no_complaint(probe: type[Probe]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(f"probes/{probe.__name__}-v0").unwrapped)


@pytest.mark.parametrize("probe", PROBES)
def test_make_vec_finds_it(probe: type[Probe]) -> None:
    env = make_vec(f"probes/{probe.__name__}-v0", 2, seed=0)
    env.reset()
    env.step(env.action_space.sample())


@pytest.mark.parametrize(
    ("env_id", "actions", "rewards"),
    [
        ("OneStepReward", [0], [1.0]),
        ("TwoStepReward", [0, 0], [0.0, 1.0]),
        ("DiscreteAction", [0], [0.0]),
        ("DiscreteAction", [1], [1.0]),
        ("ContinuousAction", [np.array([0.5], np.float32)], [0.0]),
        ("ContinuousAction", [np.array([-0.5], np.float32)], [-1.0]),
        ("Survival", [1] * 20, [1.0] * 10),
        ("Survival", [1, 1, 0, 1], [1.0, 1.0, 0.0]),
        ("MultiDiscreteBandit", [np.array(MultiDiscreteBandit.BEST)], [1.0]),
        ("MultiDiscreteBandit", [np.array([2, 3])], [0.5]),
        ("MultiBinaryBandit", [np.array(MultiBinaryBandit.BEST, np.int8)], [1.0]),
        ("MultiBinaryBandit", [np.array([0, 1, 0], np.int8)], [0.0]),
    ],
)
def test_rewards_end_in_termination(env_id: str, actions: list, rewards: list[float]) -> None:
    assert episode(env_id, actions) == (rewards, True, False)


def test_endless_is_only_ever_truncated() -> None:
    rewards, terminated, truncated = episode("Endless", [0] * 50)
    assert rewards == [1.0] * Endless.TIME_LIMIT
    assert (terminated, truncated) == (False, True)


def test_two_steps_are_told_apart() -> None:
    env = make_vec("probes/TwoStepReward-v0", 1)
    assert env.reset()[0].item() == 0.0
    assert env.step([0])[0].item() == 1.0


def test_observation_is_the_reward_or_half_of_it_the_best_action() -> None:
    bet = make_vec("probes/ObservationReward-v0", 64, seed=0)
    observation, _ = bet.reset()
    assert set(observation.flatten().tolist()) == {-1.0, 1.0}
    assert bet.step(np.zeros(64, int))[1].tolist() == observation.flatten().tolist()

    follow = make_vec("probes/ObservationAction-v0", 64, seed=0)
    observation, _ = follow.reset()
    assert set(observation.flatten().tolist()) == {-1.0, 1.0}
    assert follow.step(observation / 2)[1].abs().max() == 0.0


def test_survivals_value_is_as_its_docstring_says() -> None:
    rewards, *_ = episode("Survival", [1] * 10)
    value = sum(GAMMA**t * reward for t, reward in enumerate(rewards))
    assert value == pytest.approx((1 - GAMMA**10) / (1 - GAMMA))
