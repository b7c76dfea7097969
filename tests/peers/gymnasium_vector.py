"""Gymnasium's own vector tests with our vector environment in place of its SyncVectorEnv, and what fails, by cause.

    python tests/peers/gymnasium_vector.py gymnasium/tests

Its tests are read from a folder that you give, of the version that is installed; they are not part of its wheel, and
none is copied here. A test counts if it makes one of our environments. Not run with our own.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import pytest
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
        "test_vector_return_info", "test_warning_on_mismatched_single_observation_space",
    ),
    "observations are a Box, but no images": ("the observation space is",),
    "environments are of one kind, there are no observation modes": (
        "has other spaces than environment 0", "test_invalid_observation_mode",
    ),
    "each reset is seeded, from a stream of our own": (
        "test_same_step_final_obs", "test_normalize_reward", "test_random_seeding_basics", "test_vector_env_equal",
    ),
    "SyncVectorEnv has another sentence or kind of error": (
        "test_partial_reset_failure", r"actions have shape \(\)",
    ),
}  # fmt: skip
"""Cause -> expressions, one of which a test's name and error match; where none does, the failure is ours."""


class Ours(GymVectorEnv):
    """With SyncVectorEnv's arguments, on NumPy; in same-step mode where a test does not say one."""

    made: ClassVar[set[str]] = set()
    """The tests that made one."""
    running = ""

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gymnasium.Env]],
        copy: bool = True,
        observation_mode: Any = "same",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    ) -> None:
        Ours.made.add(Ours.running)
        super().__init__([make() for make in env_fns], autoreset=autoreset_mode)

    def reset(self, **arguments: Any) -> Any:
        observation, info = super().reset(**arguments)
        return observation.numpy(), info

    def step(self, actions: Any, ids: Any = None) -> Any:
        *tensors, info = super().step(actions, ids)
        return *(x.numpy() for x in tensors), {
            name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in info.items()
        }


class Plugin:
    """Sorts the failures."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, list[str]] = defaultdict(list)

    def pytest_runtest_setup(self, item: Any) -> None:
        Ours.running = item.nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.nodeid not in Ours.made or not (report.when == "call" or report.failed):
            return
        self.outcomes[report.nodeid] = report.outcome
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = f"{report.nodeid}: {getattr(crash, 'message', report.longrepr)}"
            causes = (name for name, kinds in CAUSES.items() if any(re.search(kind, text) for kind in kinds))
            self.failures[next(causes, "OURS")].append(text.splitlines()[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder of Gymnasium's tests")
    parser.add_argument("-k", default="", help="only tests whose names match, as of pytest")
    asked = parser.parse_args()
    root = asked.tests.resolve().parent
    sys.path.insert(0, str(root))
    gymnasium.vector.SyncVectorEnv = gymnasium.vector.sync_vector_env.SyncVectorEnv = Ours
    plugin = Plugin()
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-rN", "-W", "ignore", "-k", asked.k]
    folders = [str(root / "tests" / name) for name in FILES]
    pytest.main([*folders, f"--rootdir={root}", "-c", "/dev/null", *options], plugins=[plugin])
    print(f"\nOf {len(plugin.outcomes)} tests that make our environments:")
    failed = sum(map(len, plugin.failures.values()))
    print(f"  {len(plugin.outcomes) - failed} pass or are skipped")
    for cause in (*CAUSES, "OURS"):
        lines = plugin.failures[cause]
        print(f"\n{len(lines)} fail: {cause}", *(f"  {line[:200]}" for line in lines), sep="\n")
    return min(len(plugin.failures["OURS"]), 1)


if __name__ == "__main__":
    sys.exit(main())
