"""Runs listed, chosen and removed."""

import dataclasses
import io
import sys
from pathlib import Path

import pytest

from agents.run import cli
from agents.run.folder import RunConfig, RunFolder, RunState, append_row
from agents.run.options import RunOptions
from agents.run.runs import find


def made(runs: Path, leaf: str, env: str, algorithm: str, seed: int, state: RunState | None) -> RunFolder:
    path = runs / env.replace("/", "_") / algorithm / leaf
    options = RunOptions(env=env, seed=seed, steps=1000, runs=str(runs), run_dir=str(path))
    folder = RunFolder.create(RunConfig(algorithm, options, {}, {}), "")
    if state is not None:
        folder.write_state(state)
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five runs; the third one's process is gone, the fourth is of a first version, the last one has no evaluation."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    done = RunState("finished", 1024, 9.5, 1.0, 5.0, 12.25)
    made(folder, "20260101-000000-s0", "Hopper-v5", "npg", 0, done)
    made(folder, "20260103-000000-s1", "Hopper-v5", "npg", 1, dataclasses.replace(done, state="stopped", share=0.5))
    made(folder, "20260102-000000-s2", "Hopper-v5", "ppo", 2, dataclasses.replace(done, state="running", share=0.25))
    old = made(folder, "20251231-235959-s3", "families/AntDir-v0", "npg", 3, None)
    append_row(old.evaluations, {"steps": 1000, "mean": 7.5, "seconds": 3.0})
    made(folder, "20251231-000000-s4", "Ant-v5", "npg", 4, dataclasses.replace(done, state="failed", evaluated=None))
    return folder


def listed(capsys: pytest.CaptureFixture[str], *options: str) -> list[list[str]]:
    assert cli.main(["runs", *options]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_runs_are_listed_newest_first(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heading, *rows, last = listed(capsys)
    assert heading == ["task", "algorithm", "seed", "steps", "return", "state", "run"]
    assert rows == [
        ["Hopper-v5", "npg", "1", "1,024", "12.2", "stopped", "50", "%", "20260103-000000-s1"],
        ["Hopper-v5", "ppo", "2", "1,024", "12.2", "killed", "25", "%", "20260102-000000-s2"],
        ["Hopper-v5", "npg", "0", "1,024", "12.2", "finished", "20260101-000000-s0"],
        ["families/AntDir-v0", "npg", "3", "1,000", "7.5", "finished", "20251231-235959-s3"],
        ["Ant-v5", "npg", "4", "1,024", "-", "failed", "100", "%", "20251231-000000-s4"],
    ]
    assert " ".join(last) == "5 runs: 1 stopped, 1 killed, 2 finished, 1 failed"


def test_one_that_runs_is_seen_by_its_lock(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(runs / "Hopper-v5" / "ppo" / "20260102-000000-s2")
    with folder.lock():
        assert [run.state for run in find(["runs"])][1] == "running"
        assert cli.main(["runs", "--algorithm", "ppo", "--remove", "--yes"]) == 1
    assert "Another process is training" in capsys.readouterr().err
    assert folder.path.is_dir()


@pytest.mark.parametrize(
    ("options", "seeds"),
    [
        (["--env", "Hopper-v5"], [1, 2, 0]),
        (["--env", "*A*"], [3, 4]),
        (["--algorithm", "ppo"], [2]),
        (["--state", "finished"], [0, 3]),
        (["--seed", "4"], [4]),
        (["--env", "Hopper*", "--algorithm", "npg", "--last", "1"], [1]),
        (["runs/Ant-v5", "runs/Hopper-v5/npg/20260101-000000-s0", "runs/Ant-v5"], [0, 4]),
        (["--env", "Nothing-v0"], []),
    ],
)
def test_runs_are_chosen(runs: Path, options: list[str], seeds: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", *options, "--paths"]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert [int(path[-1]) for path in paths] == seeds
    assert all(Path(path).is_dir() for path in paths)


def test_runs_are_removed_with_the_folders_that_they_leave_empty(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["runs", "--env", "Hopper-v5", "--algorithm", "npg", "--remove"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(asked) == 2
    assert "no terminal to ask at; give --yes." in capsys.readouterr().err
    answers = iter(["n", "y"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert cli.main(asked) == 0
    assert len(find(["runs"])) == 5
    assert cli.main(asked) == 0
    assert [run.settings.run.seed for run in find(["runs"])] == [2, 3, 4]
    assert not (runs / "Hopper-v5" / "npg").exists()
    assert cli.main(["runs", str(runs / "Ant-v5" / "npg" / "20251231-000000-s4"), "--remove", "--yes"]) == 0
    assert [run.settings.run.seed for run in find(["runs"])] == [2, 3]
    assert cli.main(["runs", "--remove", "--yes"]) == 2
    assert "needs to know which runs" in capsys.readouterr().err
    assert len(find(["runs"])) == 2


def test_what_is_not_there_or_not_readable_is_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "Ant-v5" / "npg" / "20251231-000000-s4" / "config.yaml").write_text("[1")
    assert cli.main(["runs"]) == 0
    out, err = capsys.readouterr()
    assert "4 runs:" in out
    assert "config.yaml cannot be read as a run's configuration" in err
    assert cli.main(["runs", "nowhere"]) == 2
    assert "There is no folder nowhere" in capsys.readouterr().err
