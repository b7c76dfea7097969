"""Tiny environments with known answers. Importing this module registers them with Gymnasium as "probes/<name>-v0".

Values are those of a discount gamma; each class says what a right learner finds.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces


class Probe(gymnasium.Env[np.ndarray, Any]):
    """One number observed, in [-1, 1]; two actions unless a probe says otherwise; everything in one step by default.

    A probe says how it starts (`start`) and what an action does (`act`).
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Gymnasium declares it
    ACTIONS: ClassVar[gymnasium.Space] = spaces.Discrete(2)
    TIME_LIMIT: ClassVar[int | None] = None

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = deepcopy(self.ACTIONS)
        self.position = 0.0

    def start(self) -> float:
        """Give the first observation of an episode."""
        return 0.0

    def act(self, action: Any) -> tuple[float, bool]:
        """Give the reward of an action and whether it ends the episode; may set `position`, the next observation."""
        raise NotImplementedError

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.start()
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward, terminated = self.act(action)
        return self._observe(), reward, terminated, False, {}

    def _observe(self) -> np.ndarray:
        return np.array([self.position], dtype=np.float32)


class OneStepReward(Probe):
    """Reward 1, once: V = 1."""

    def act(self, action: Any) -> tuple[float, bool]:
        return 1.0, True


class ObservationReward(Probe):
    """The observation, -1 or 1 by chance, is the reward, once: V(s) = s."""

    def start(self) -> float:
        return float(self.np_random.choice([-1.0, 1.0]))

    def act(self, action: Any) -> tuple[float, bool]:
        return self.position, True


class TwoStepReward(Probe):
    """Reward 0, then 1: V(0) = gamma and V(1) = 1."""

    def act(self, action: Any) -> tuple[float, bool]:
        last = self.position == 1.0
        self.position = 1.0
        return float(last), last


class DiscreteAction(Probe):
    """The reward is the action, 0 or 1, once: the best action is 1, and its return 1."""

    def act(self, action: Any) -> tuple[float, bool]:
        return float(action), True


class ContinuousAction(Probe):
    """Reward -(a - 0.5)^2 for an action a in [-1, 1], once: the best action is 0.5, and its return 0."""

    ACTIONS = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def act(self, action: Any) -> tuple[float, bool]:
        return -((float(action[0]) - 0.5) ** 2), True


class ObservationAction(ContinuousAction):
    """Reward -(a - s/2)^2 for the observation s, -1 or 1 by chance, once: the best action is s/2, and its return 0."""

    def start(self) -> float:
        return float(self.np_random.choice([-1.0, 1.0]))

    def act(self, action: Any) -> tuple[float, bool]:
        return -((float(action[0]) - self.position / 2) ** 2), True


class Endless(Probe):
    """Reward 1 for ever, cut off by a time limit of 10 steps only: V = 1 / (1 - gamma)."""

    TIME_LIMIT = 10

    def act(self, action: Any) -> tuple[float, bool]:
        return 1.0, False


class Survival(Probe):
    """Reward 1 for each action 1, ten times at most; action 0 ends the episode with reward 0: best return 10.

    The observation k/10 counts the steps; under the best policy V(k/10) = (1 - gamma^(10 - k)) / (1 - gamma).
    """

    LENGTH = 10

    def act(self, action: Any) -> tuple[float, bool]:
        if not action:
            return 0.0, True
        step = round(self.position * self.LENGTH) + 1
        self.position = step / self.LENGTH
        return 1.0, step == self.LENGTH


class MultiDiscreteBandit(Probe):
    """Actions in {0, 1, 2} x {0, 1, 2, 3}; the reward is the share that equals (2, 1): best return 1."""

    BEST = (2, 1)

    ACTIONS = spaces.MultiDiscrete([3, 4])

    def act(self, action: Any) -> tuple[float, bool]:
        return float(np.mean(np.equal(action, self.BEST))), True


class MultiBinaryBandit(Probe):
    """Three bits; the reward is the share that equals (1, 0, 1): best return 1."""

    BEST = (1, 0, 1)

    ACTIONS = spaces.MultiBinary(3)

    def act(self, action: Any) -> tuple[float, bool]:
        return float(np.mean(np.equal(action, self.BEST))), True


PROBES: tuple[type[Probe], ...] = (
    OneStepReward,
    ObservationReward,
    TwoStepReward,
    DiscreteAction,
    ContinuousAction,
    ObservationAction,
    Endless,
    Survival,
    MultiDiscreteBandit,
    MultiBinaryBandit,
)

for _probe in PROBES:
    gymnasium.register(
        f"probes/{_probe.__name__}-v0",
        entry_point=f"envs.probes:{_probe.__name__}",
        max_episode_steps=_probe.TIME_LIMIT,
    )
