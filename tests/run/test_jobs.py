"""Several runs at once, as people start, stop and go on with them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agents import checkpoint
from agents.run import cli, jobs
from agents.run.folder import RunFolder, read_rows
from agents.run.jobs import Job

ROOT = Path(__file__).parents[2]
SIZES = {"num-envs": 2, "n-steps": 32, "net-arch": 8, "eval-episodes": 1, "checkpoint-every": 0, "target-kl": 0.01}
SMALL = ["npg", "--env", "InvertedPendulum-v5", *(f"--{name}={size}" for name, size in SIZES.items()), "--device=cpu"]


def folders(runs: Path) -> list[RunFolder]:
    return [RunFolder(file.parent) for file in sorted(runs.rglob("config.yaml"))]


def bits(folder: RunFolder) -> dict[str, str]:
    return {name: checkpoint.digest(x) for name, x in checkpoint.read(folder.last)[1].items()}


@pytest.mark.slow
def test_every_seed_is_a_run_as_if_it_was_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = [*SMALL, "--steps", "200", "--threads", "1", "--runs", str(tmp_path / "runs")]
    assert cli.train([*asked, "--seed", "4", "--seeds", "3", "--jobs", "2"]) == 0
    out = capfd.readouterr().out
    found = folders(tmp_path / "runs")
    assert [folder.read_config().run.seed for folder in found] == [4, 5, 6]
    assert len({folder.path.name[:15] for folder in found}) == 1  # one pattern names them all
    assert f"folders: {tmp_path}/runs/InvertedPendulum-v5/npg/{found[0].path.name[:17]}*" in out
    assert "mean return of 3 final policies" in out
    assert all(folder.read_state().state == "finished" for folder in found)
    assert "final policy, deterministic" in found[0].output.read_text()
    assert f"--seed 5 --run-dir {found[1].path}" in found[1].command.read_text()
    assert "--jobs" not in found[1].command.read_text()

    alone = RunFolder(tmp_path / "alone")
    single = [sys.executable, "train.py", *asked, "--seed", "5", "--run-dir", str(alone.path), "--quiet"]
    subprocess.run(single, cwd=ROOT, check=True, timeout=120)
    assert bits(alone) == bits(found[1])


@pytest.mark.slow
def test_what_fails_is_told_and_ends_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = ["train", *SMALL, "--steps", "64"]
    words = {"first": [*good, "--max-rejected-updates", "1"], "broken": ["resume", "nowhere"], "last": good}
    asked = [Job(name, words, RunFolder(tmp_path / name), new=name != "broken") for name, words in words.items()]
    (tmp_path / "broken").mkdir()
    assert jobs.work_off(asked, 1, "three", quiet=False) == 1
    assert [job.state for job in asked] == ["finished", "failed", "finished"]
    out = capfd.readouterr().out
    assert re.search(r"broken failed: .*no run folder at nowhere.* \(all that it said: .*output\.txt\)", out)


def test_what_is_refused_as_typed_is_tried_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = ["npg", "--env", "Hoper-v5", "--runs", str(tmp_path), "--seeds", "3", "--jobs", "1"]
    assert cli.train(wrong) == 2
    out = capfd.readouterr().out
    assert out.count("did you mean") == 2  # as it happens, and at the end
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--jobs", "2"], "--jobs is for several runs; give --seeds too."),
        (["--seeds", "0"], "--seeds is 0; give at least 1."),
        (["--seeds", "2", "--jobs", "0"], "--jobs is 0; give at least 1."),
        (["--seeds", "2", "--run-dir", "a"], "--run-dir is the folder of one run"),
        (["--seeds", "2", "--target-kl", "-1"], "target_kl is -1.0"),
    ],
)
def test_what_cannot_be_is_one_sentence(more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train([*SMALL, *more]) == 2
    assert capsys.readouterr().err.startswith(f"train.py: error: {sentence}")


def started(runs: Path, *more: str) -> subprocess.Popen[str]:
    """Two of three seeds, each with a checkpoint."""
    asked = ["train.py", *SMALL, "--steps", "10_000_000", "--runs", str(runs), "--seeds", "3", "--jobs", "2", *more]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *asked], cwd=ROOT, env=os.environ | {"COLUMNS": "200"}, **pipes)
    wait_until(lambda: process.poll() is not None or len(list(runs.rglob("last.zip"))) == 2)
    assert process.poll() is None, process.communicate()
    return process


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stop_saves_all_and_several_go_on_together(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process = started(tmp_path)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (143, "")
    stopped = folders(tmp_path)
    assert [folder.read_state().state for folder in stopped] == ["stopped", "stopped"]
    for folder in stopped:
        done = checkpoint.read_manifest(folder.last)["num_timesteps"]
        assert done == folder.read_state().steps == int(read_rows(folder.progress)[-1]["time/total_timesteps"])
        assert str(folder.path) in out
    assert "python train.py resume " in out
    again = out.partition("Not begun: seed 2. Begin so:\n")[2].strip()
    assert again.endswith("--seed 2 --seeds 1 --jobs 2")

    more = max(folder.read_state().steps for folder in stopped) + 64
    names = [str(folder.path) for folder in stopped]
    assert cli.train(["resume", *names, "--steps", str(more), "--jobs", "1"]) == 0
    assert [folder.read_state().state for folder in stopped] == ["finished", "finished"]
    assert all(folder.read_state().steps >= more for folder in stopped)
    assert "2 finished" in capfd.readouterr().out


@pytest.mark.slow
def test_runs_save_themselves_when_the_one_that_began_them_is_killed(tmp_path: Path) -> None:
    process = started(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: [folder.read_state().state for folder in folders(tmp_path)] == ["stopped", "stopped"])


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3, 5, 6}, raising=False)
    assert jobs._slots(2) == [[0, 2], [3, 5, 6]]
    assert jobs._slots(5) == [[0], [2], [3], [5], [6]]
    assert jobs._slots(6) == [[0], [2], [3], [5], [6], [0]]
    monkeypatch.delattr(os, "sched_getaffinity")
    assert jobs._slots(2) == [[], []]


def test_options_are_taken_out_however_they_are_written() -> None:
    words = ["--env", "A-v0", "--seeds", "3", "--steps=5", "--seed=7", "--net-arch", "8", "8", "--jobs", "2", "--quiet"]
    assert cli._without(words, {"seeds", "seed", "jobs"}) == [
        "--env", "A-v0", "--steps=5", "--net-arch", "8", "8", "--quiet",
    ]  # fmt: skip
