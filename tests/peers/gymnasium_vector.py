"""Gymnasium's own vector tests with our vector environment in place of its SyncVectorEnv, and what fails, by cause.

    python tests/peers/gymnasium_vector.py gymnasium/tests

Its tests are read from a folder that you give, of the version that is installed; they are not part of its wheel, and
none is copied here. A test counts if it makes one of our environments. Not run with our own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import causes
import gymnasium
import torch
from gymnasium.vector import AutoresetMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from envs import GymVectorEnv

FILES = ("vector", "wrappers/vector")
CAUSES = {
    "packages that are not installed": ("DependencyNotInstalled",),
    "next-step autoreset is refused": (r"autoreset is .*NEXT_STEP",),
    "the test is of next-step mode without saying so, or the wrapper refuses same-step mode": (
        "Expected autoreset_mode to be NEXT_STEP or DISABLED", "test_record_episode_statistics.*'episode'",
        "test_vector_return_info", "test_final_obs_info",
        "test_warning_on_mismatched_single_observation_space",
    ),
    "images, and observations of several parts or texts, are refused": ("the observation space is",),
    "environments are of one kind, there are no observation modes": (
        "has other spaces than environment 0", "test_invalid_observation_mode",
    ),
    "each reset is seeded, from a stream of our own": (
        "test_same_step_final_obs", "test_normalize_reward", "test_random_seeding_basics", "test_vector_env_equal",
        "test_autoreset_(within_step|disabled)",  # whose environments observe their seed
    ),
    "SyncVectorEnv has another sentence or kind of error": (
        "test_partial_reset_failure", r"actions have shape \(\)",
    ),
}  # fmt: skip
PLUGIN = causes.Plugin(CAUSES)


class Ours(GymVectorEnv):
    """With SyncVectorEnv's arguments, on NumPy; in same-step mode where a test does not say one."""

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gymnasium.Env]],
        copy: bool = True,
        observation_mode: Any = "same",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    ) -> None:
        PLUGIN.made.add(PLUGIN.running)
        super().__init__([make() for make in env_fns], autoreset=autoreset_mode)

    def reset(self, **arguments: Any) -> Any:
        observation, info = super().reset(**arguments)
        return observation.numpy(), info

    def step(self, actions: Any, ids: Any = None) -> Any:
        *tensors, info = super().step(actions, ids)
        return *(x.numpy() for x in tensors), {
            name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in info.items()
        }


def main() -> int:
    asked = causes.parse(__doc__, "Gymnasium")
    root = asked.tests.resolve().parent
    sys.path.insert(0, str(root))
    gymnasium.vector.SyncVectorEnv = gymnasium.vector.sync_vector_env.SyncVectorEnv = Ours
    return causes.run(PLUGIN, "environments", [root / "tests" / name for name in FILES], root, asked.k)


if __name__ == "__main__":
    sys.exit(main())
