"""What the runs of peers' own tests share: which tests count, what fails of them, and by which cause."""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

Causes = Mapping[str, Sequence[str]]
"""Cause -> expressions, one of which a test's name and error match; where none does, the failure is ours."""
OURS = "OURS"


class Plugin:
    """Notes which test runs, for what it makes, and sorts the failures."""

    def __init__(self, causes: Causes) -> None:
        self.causes = causes
        self.running = ""
        self.made: set[str] = set()
        """The tests that made what is of ours."""
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, list[str]] = defaultdict(list)

    def counts(self, report: Any) -> bool:
        """Say whether a report is of a test that counts."""
        return report.nodeid in self.made and (report.when == "call" or report.failed)

    def pytest_runtest_setup(self, item: Any) -> None:
        self.running = item.nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not self.counts(report):
            return
        self.outcomes[report.nodeid] = report.outcome
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = f"{report.nodeid}: {getattr(crash, 'message', report.longrepr)}"
            causes = (name for name, kinds in self.causes.items() if any(re.search(kind, text) for kind in kinds))
            self.failures[next(causes, OURS)].append(text.splitlines()[0])


class Adapted:
    """What Stable-Baselines3 says in another way, in front of an agent: one environment of an id, minibatches that
    divide a rollout.
    """

    plugin: Plugin

    def __init__(self, policy: Any, env: Any, **keywords: Any) -> None:
        self.plugin.made.add(self.plugin.running)
        names = type(self).Config.names()  # type: ignore[attr-defined]
        if isinstance(env, str):
            keywords.setdefault("num_envs", 1)
        if "n_steps" in keywords and "batch_size" in names:
            n = keywords["n_steps"] * keywords.get("num_envs", getattr(env, "num_envs", 1))
            keywords.setdefault("batch_size", math.gcd(64, n))
        super().__init__(policy, env, **keywords)


class Chooses(Plugin):
    """Takes the tests that may be of our agents; what fails before it makes one counts too.

    Args:
        causes: see `Causes`.
        ours: the classes that stand in place of the peer's.
        others: the peer's classes that nothing of ours stands for.
        named: an expression that a test's source has if it is of ours without being given them.
    """

    def __init__(self, causes: Causes, ours: set[type], others: set[type], named: str) -> None:
        super().__init__(causes)
        self.ours, self.others, self.named = ours, others, named
        for one in ours:
            one.plugin = self  # type: ignore[attr-defined]

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        def concerns_us(item: Any) -> bool:
            given = set(filter(inspect.isclass, getattr(getattr(item, "callspec", None), "params", {}).values()))
            return not given & self.others and (
                bool(given & self.ours) or bool(re.search(self.named, inspect.getsource(item.function)))
            )

        config.hook.pytest_deselected(items=[item for item in items if not concerns_us(item)])
        items[:] = [item for item in items if concerns_us(item)]

    def counts(self, report: Any) -> bool:
        return super().counts(report) or report.failed


def parse(description: str | None, of: str) -> argparse.Namespace:
    """Read the command line: the folder of the tests of a peer, and which of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help=f"the folder of {of}'s tests")
    parser.add_argument("-k", default="", help="only tests whose names match, as of pytest")
    return parser.parse_args()


def run(plugin: Plugin, what: str, folders: Sequence[Path], root: Path, names: str) -> int:
    """Run the tests in folders and print what fails; 1 if a failure is ours, otherwise 0."""
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-rN", "-W", "ignore", "-k", names]
    pytest.main([*map(str, folders), f"--rootdir={root}", "-c", "/dev/null", *options], plugins=[plugin])
    print(f"\nOf {len(plugin.outcomes)} tests that make our {what}:")
    failed = sum(map(len, plugin.failures.values()))
    print(f"  {len(plugin.outcomes) - failed} pass or are skipped")
    for cause in (*plugin.causes, OURS):
        lines = plugin.failures[cause]
        print(f"\n{len(lines)} fail: {cause}", *(f"  {line[:200]}" for line in lines), sep="\n")
    return min(len(plugin.failures[OURS]), 1)
