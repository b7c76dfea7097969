"""The user's own test: it passes where runs go on exactly, and fails where they do not."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from agents.run import cli, selftest

TASK = ["--env", "CartPole-v1", "--steps", "4000", "--device", "cpu"]


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest", "npg", *TASK, "--keep"]) == 0
    out = capsys.readouterr().out
    (kept,) = re.findall(r"^folders: (.*)$", out, flags=re.M)
    assert {file.name for file in (Path(kept) / "npg").iterdir() if file.is_dir()} == {"undisturbed", "killed"}
    shutil.rmtree(kept)
    found = re.search(r"npg +4,000 +([\d,]+) +(\w{16}) +(\w{16}) +the same", out)
    assert found is not None
    assert found[2] == found[3]
    assert 1000 < int(found[1].replace(",", "")) < 4000
    assert re.search(r"Killed runs go on exactly on this machine \(\d+ s\)\.", out)


@pytest.mark.parametrize(
    ("trial", "verdict"),
    [
        (selftest.Trial(64, "a" * 64, "b" * 64, True), "not the same"),
        (selftest.Trial(64, "a" * 64, "a" * 64, False), "rows differ"),
    ],
)
def test_a_difference_is_shown_and_fails(
    trial: selftest.Trial, verdict: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def tried(options: Any, name: str, scratch: Path) -> selftest.Trial:
        asked.append(name)
        return trial

    monkeypatch.setattr(selftest, "tried", tried)
    assert cli.main(["selftest", *TASK]) == 1
    out = capsys.readouterr().out
    assert asked == ["npg", "ppo", "pes"]
    assert len(re.findall(verdict, out)) == 3
    assert "npg, ppo, pes did not end as undisturbed" in out


def test_unknown_algorithms_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest", "npq"]) == 2
    assert "There is no algorithm 'npq'; did you mean 'npg'" in capsys.readouterr().err
