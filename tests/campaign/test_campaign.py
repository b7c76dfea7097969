"""The campaign in short, and that it notices what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents import REGISTRY
from agents.run import cli
from tests.campaign import kills, watch

ROOT = Path(__file__).parents[2]


def campaign(tmp_path: Path, *options: object) -> dict[str, Any]:
    """Run the campaign in a process of its own, which has no threads that forks would lack."""
    words = [sys.executable, "-m", "tests.campaign", "--result", str(tmp_path / "r.json"), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    return found


def test_every_algorithm_is_killed() -> None:
    assert {words.split()[0] for words in kills.CASES.values()} == REGISTRY.keys()


def test_a_short_campaign_finds_nothing(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--algorithms", "npg", "--kills", 3, "--files", 40, "--words", 10)
    killed = found["kills"]["all"]
    assert killed["kills"] >= 3
    assert killed["ended with the same files"] == killed["finished"] > 0
    assert found["files"]["cases"] == 40
    assert found["files"]["refused"] > 25
    assert found["configurations and command lines"]["refused"] > 3
    assert [part["faults"] for part in found.values() if part.get("faults")] == []


@pytest.mark.slow
def test_a_campaign_over_all_algorithms_finds_nothing(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--kills", 40, "--files", 300, "--words", 100, "--disks", 2)
    assert found["kills"]["all"]["ended with the same tensors"] == found["kills"]["all"]["finished"] >= 11
    assert "not run" in found["disks"] or found["disks"]["ended with the same files"] == 2
    assert [part["faults"] for part in found.values() if part.get("faults")] == []


def sentence(text: str, code: int = 1) -> Callable[[list[str]], int]:
    def act(words: list[str]) -> int:
        print(text, file=sys.stderr)
        return code

    return act


def executing(words: list[str]) -> int:
    watch.CANARY.touch()
    return sentence("train.py: error: There is no such thing.")(words)


def swelling(words: list[str]) -> int:
    bytearray(b"x" * (2 * watch.MEMORY))
    return sentence("train.py: error: There is no such thing.")(words)


def raising(words: list[str]) -> int:
    raise KeyError("seed")


@pytest.mark.parametrize(
    ("act", "verdict"),
    [
        (sentence("train.py: error: There is no such thing; give another."), "refused"),
        (sentence("train.py: error: There is no such thing; give another.", 0), "accepted"),
        (sentence("KeyError"), "unclear"),
        (sentence("train.py: error: There is no such thing.\nAnd more."), "unclear"),
        (sentence(""), "unclear"),
        (raising, "traceback: KeyError in test_campaign.py, raising"),
        (executing, "runs code"),
        (swelling, "memory: x"),
    ],
)
def test_what_a_command_does_wrong_is_seen(act: Any, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "main", act)
    assert watch.watched(["x"], lambda: False).verdict == verdict
    watch.CANARY.unlink(missing_ok=True)


@pytest.mark.parametrize("part", ["digest", "best", "progress", "events"])
def test_what_a_run_lost_is_seen(part: str) -> None:
    whole: dict[str, Any] = {
        "digest": "a", "best": "b", "counters": {"seed": 3}, "progress": [{"a": "1"}], "evaluations": [], "events": {},
    }  # fmt: skip
    before = kills.Outcome(**whole)
    assert before.differences(kills.Outcome(**whole)) == []
    odd: Any = {"progress": [{"a": "1"}] * 2, "events": {"x": ["1: 2"]}}.get(part, "c")
    assert before.differences(kills.Outcome(**whole | {part: odd})) == [part]
