"""Gymnasium's own tests of vector environments and wrappers, with ours for SyncVectorEnv, and what fails, by cause.

    python tests/peers/gymnasium_vector.py Gymnasium/tests

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
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from envs import GymVectorEnv

CAUSES = {
    "packages are not installed here": ("DependencyNotInstalled", "No module named"),
    "wrappers of observations and RecordVideo refuse same-step autoreset": ("Expected autoreset_mode to be NEXT_STEP",),
    "next-step autoreset is refused: it puts fake transitions into the data": (r"autoreset is .*next_?step",),
    "next-step autoreset is expected, as Gymnasium's default": (
        "test_vector_return_info", r"test_normalize_reward\.py::test_(functionality|against|equivalence)",
        r"::test_record_episode_statistics\[",
    ),
    "other observations than a Box are refused, and FlattenObservation is named": (r"the observation space is ",),
    "other actions than a Box, Discrete, MultiDiscrete or MultiBinary are refused": (r"the action space is ",),
    "environments of differing spaces are refused": ("observation_mode", "has other spaces than environment 0"),
    "episodes are drawn from (seed, number of the episode), not from Gymnasium's own streams": (
        "np_random", "test_random_seed", "test_vector_env_equal.*SAME_STEP", r"test_same_step_final_obs\[Box.*KeyError",
    ),
    "Gymnasium has another kind of error where we have a sentence": (
        r"reset_mask is ", r"actions have shape \(\)", "DID NOT RAISE",
    ),
}  # fmt: skip
"""Cause -> expressions, one of which a test's name and error match; where none does, the failure is ours."""


class Ours(GymVectorEnv):
    """Takes SyncVectorEnv's arguments, and gives arrays in place of tensors, as ArrayConversion does."""

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
        if observation_mode != "same":
            raise ValueError(f"observation_mode is {observation_mode!r}; environments have equal spaces.")
        super().__init__([make() for make in env_fns], autoreset=autoreset_mode)

    def reset(self, **keywords: Any) -> Any:
        observation, info = super().reset(**keywords)
        return observation.numpy(), info

    def step(self, actions: Any, ids: Any = None) -> Any:
        *tensors, info = super().step(actions, ids)
        if isinstance(info.get("final_obs"), Tensor):
            final, ended = np.full(self.num_envs, None, object), info["_final_obs"].numpy()
            for i in np.flatnonzero(ended):
                final[i] = info["final_obs"][i].numpy()
            info = {**info, "final_obs": final, "_final_obs": ended}
        return *(tensor.numpy() for tensor in tensors), info


class Plugin:
    """Follows the tests, and sorts the failures."""

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
            errors = text + report.longreprtext  # those that led to the last one too
            causes = (name for name, kinds in CAUSES.items() if any(re.search(kind, errors, re.I) for kind in kinds))
            self.failures[next(causes, "OURS")].append(" ".join(text.split()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder of Gymnasium's tests")
    parser.add_argument("-k", default="", help="only tests whose names match, as of pytest")
    asked = parser.parse_args()
    gymnasium.vector.SyncVectorEnv = Ours  # type: ignore[misc]
    plugin, root = Plugin(), asked.tests.absolute()
    sys.path.insert(0, str(root.parent))
    folders = [str(root / name) for name in ("vector", "wrappers/vector")]
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-rN", "-W", "ignore", "-k", asked.k]
    pytest.main([*folders, f"--rootdir={root.parent}", "-c", "/dev/null", *options], plugins=[plugin])
    print(f"\nOf {len(plugin.outcomes)} tests that make our environments:")
    print(f"  {len(plugin.outcomes) - sum(map(len, plugin.failures.values()))} pass or are skipped")
    for cause in (*CAUSES, "OURS"):
        lines = plugin.failures[cause]
        print(f"\n{len(lines)} fail: {cause}", *(f"  {line[:200]}" for line in lines), sep="\n")
    return min(len(plugin.failures["OURS"]), 1)


if __name__ == "__main__":
    sys.exit(main())
