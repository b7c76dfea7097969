"""What a run comes through: kills at any place, full disks, folders that are moved, environments that misbehave."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import checkpoint, load
from agents.run import cli, outputs, report
from agents.run.folder import RunFolder, read_rows
from agents.run.training import _Training
from agents.saving import NewEpisodes

STEPS = "time/total_timesteps"
SIZES = {"num-envs": 2, "n-steps": 8, "net-arch": 4, "eval-episodes": 2, "eval-every": 32, "checkpoint-every": 0}


class Short(gymnasium.Env):
    """Episodes of five steps, whose rewards are the actions."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Box(-1, 1, (1,))
    act: Callable[["Short"], None] = lambda self: None
    """What misbehaves, in every step."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.steps += 1
        Short.act(self)
        observation = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return observation, float(action.sum()), False, self.steps == 5, {}


gymnasium.register("Short-v0", Short)


@pytest.fixture(autouse=True)
def behaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Short, "act", lambda self: None)
    monkeypatch.setattr(report, "plot_curve", lambda folder, title: folder.curve.touch())  # drawing takes its time


def train(path: Path, *options: object, algorithm: str = "npg", steps: int = 96) -> int:
    own = {"reused-rollouts": 0} if algorithm == "npg" else {}  # so that all iterations are as long
    sizes = [f"--{name}={size}" for name, size in (SIZES | own).items()]
    words = [algorithm, "--env", "Short-v0", *sizes, "--steps", steps, "--run-dir", path, "--threads", 1, *options]
    return cli.train(list(map(str, words)))


def resume(path: Path, *options: object) -> int:
    return cli.train(["resume", *map(str, (path, *options))])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp("whole") / "run"]


@pytest.fixture
def whole(undisturbed: list[Path]) -> Path:
    """A run that nothing disturbed."""
    (path,) = undisturbed
    assert path.exists() or train(path) == 0
    return path


def logs(path: Path) -> tuple[Any, ...]:
    """What a run logged, apart from times: its evaluations, its progress, and what TensorBoard shows."""
    folder = RunFolder(path)

    def timeless(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        timed = ("time/", "seconds")
        return [{key: x for key, x in row.items() if key == STEPS or not key.startswith(timed)} for row in rows]

    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    shown = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("time/") or tag == STEPS
    }
    return timeless(read_rows(folder.evaluations)), timeless(read_rows(folder.progress)), shown


def digests(path: Path) -> dict[str, str]:
    return checkpoint.read_manifest(path / "checkpoints" / "last.zip")["sha256"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved or said after it."""


def die(*_: Any, **__: Any) -> NoReturn:
    raise Killed


PLACES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def place(kill: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    PLACES[kill.__name__.replace("_", " ")] = kill
    return kill


def on_call(target: Any, name: str, number: int, patch: pytest.MonkeyPatch, after: bool = False) -> None:
    """Die in the number-th call of target.name, before it does anything, or after."""
    original, calls = getattr(target, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == number and not after:
            die()
        result = original(*args, **kwargs)
        return die() if len(calls) == number else result

    patch.setattr(target, name, counted)


@place
def before_a_checkpoint(patch: pytest.MonkeyPatch) -> None:
    on_call(RunFolder, "keep", 4, patch)


@place
def between_the_two_checkpoints(patch: pytest.MonkeyPatch) -> None:
    from agents import NPG

    on_call(NPG, "save", 5, patch)


def before_a_row(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Die before the number-th evaluation's row is written."""
    from agents.run import training

    return lambda patch: on_call(training, "append_row", number, patch)


PLACES |= {"before the row of an evaluation": before_a_row(2), "before the last row": before_a_row(4)}


@place
def before_the_curve(patch: pytest.MonkeyPatch) -> None:
    on_call(report, "plot_curve", 1, patch)


@place
def before_the_last_word(patch: pytest.MonkeyPatch) -> None:
    on_call(report, "plot_curve", 1, patch, after=True)


SHORT = {"between the two checkpoints", "before the row of an evaluation", "before the curve"}
slow = pytest.mark.slow  # a whole run each, of a second


@pytest.mark.parametrize(
    "kill", [pytest.param(kill, id=name, marks=[] if name in SHORT else slow) for name, kill in PLACES.items()]
)
def test_a_kill_at_any_place_loses_and_repeats_nothing(
    kill: Callable[[pytest.MonkeyPatch], None], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill(patch)
        patch.setattr(_Training, "_noting_the_last_state", contextlib.nullcontext)  # a dead process notes nothing
        with pytest.raises(Killed):
            train(path)
    assert resume(path) == 0
    assert digests(path) == digests(whole)
    assert logs(path) == logs(whole)
    assert {file.name for file in path.rglob("*")} >= {"curve.png", "best.zip", "last.zip", "previous.zip"}


def test_what_lacks_of_a_finished_run_is_made(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(whole, tmp_path / "run")
    (path / "curve.png").unlink()
    assert resume(path) == 0
    assert (path / "curve.png").is_file()
    assert "final policy" in capsys.readouterr().out
    assert logs(path)[0] == logs(whole)[0]
    assert resume(path) == 0
    assert "is finished" in capsys.readouterr().out


def test_the_last_two_checkpoints_are_kept(whole: Path) -> None:
    folder = RunFolder(whole)
    steps = [checkpoint.read_manifest(file)["num_timesteps"] for file in (folder.previous, folder.last)]
    assert steps in ([96, 96], [80, 96])  # the end is saved twice where a checkpoint is due at it
    assert load(folder.previous).num_timesteps == steps[0]


def test_a_damaged_last_checkpoint_falls_back_on_the_previous_one(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_a_checkpoint(patch)
        patch.setattr(_Training, "_noting_the_last_state", contextlib.nullcontext)
        with pytest.raises(Killed):
            train(path)
    folder = RunFolder(path)
    kept = folder.previous.read_bytes()
    folder.last.write_bytes(folder.last.read_bytes()[:-700])
    assert resume(path) == 0
    out = capsys.readouterr().out
    assert "last.zip is damaged" in out
    assert "goes on from the one before it, of 32 steps" in out
    assert folder.last.with_name("damaged.zip").is_file()
    assert kept != folder.previous.read_bytes()
    assert digests(path) == digests(whole)
    assert logs(path) == logs(whole)


def full_disk(monkeypatch: pytest.MonkeyPatch, files: str) -> list[str]:
    """Have the disk be full for files of a name until the returned list is emptied."""
    full = [files]
    write = os.write

    def refuse(name: str) -> None:
        if full and any(part in name for part in full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    def limited(descriptor: int, data: Any) -> int:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if full and any(part in name for part in full) and len(data) > 1:
            return write(descriptor, data[: len(data) // 2])  # the rest finds no room
        refuse(name)
        return write(descriptor, data)

    def replaced(path: Path) -> Any:
        refuse(str(path))
        return original(path)

    original = checkpoint.replaced
    monkeypatch.setattr(os, "write", limited)
    monkeypatch.setattr(checkpoint, "replaced", replaced)
    monkeypatch.setattr(outputs, "RETRY_SECONDS", 0.01)
    return full


@pytest.mark.parametrize(
    "files",
    [
        "last.zip",
        pytest.param("best.zip", marks=slow),
        "progress.csv",
        pytest.param("evaluations.csv", marks=slow),
        "events.out",
    ],
)
def test_a_full_disk_is_waited_for_and_costs_nothing(
    files: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full, sleep = full_disk(monkeypatch, files), outputs.Room._sleep

    def frees(room: outputs.Room) -> None:
        full.clear()
        sleep(room)

    monkeypatch.setattr(outputs.Room, "_sleep", frees)
    path = tmp_path / "run"
    assert train(path) == 0
    out = capsys.readouterr().out
    assert "is full, with" in out
    assert "There is room again" in out
    assert digests(path) == digests(whole)
    assert logs(path) == logs(whole)


def test_a_full_disk_stops_a_run_that_is_told_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        full = full_disk(patch, "nothing")
        keep, calls = RunFolder.keep, []

        def fills(folder: RunFolder, agent: Any) -> None:
            calls.append(agent.num_timesteps)
            if len(calls) == 3:
                full.append("last.zip")
            keep(folder, agent)

        patch.setattr(RunFolder, "keep", fills)
        assert train(path, "--disk-full", "stop") == 1
    err = capsys.readouterr().err
    assert "is full, with" in err
    assert "what it saved last stays" in err
    assert checkpoint.read_manifest(path / "checkpoints" / "last.zip")["num_timesteps"] == 32
    assert resume(path) == 0
    assert digests(path) == digests(whole)
    assert logs(path) == logs(whole)


def test_ctrl_c_ends_the_waiting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, "last.zip")
    monkeypatch.setattr(outputs.Room, "_sleep", lambda room: signal.raise_signal(signal.SIGINT))
    assert train(tmp_path / "run") == 1
    assert "The run has stopped" in capsys.readouterr().err


def test_a_run_whose_folder_is_moved_saves_itself_and_says_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, keep = tmp_path / "run", RunFolder.keep

    def moved(folder: RunFolder, agent: Any) -> None:
        keep(folder, agent)
        if agent.num_timesteps == 48:
            path.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "keep", moved)
        assert train(path) == 1
    assert "was moved or removed while the run was going on" in capsys.readouterr().err
    assert resume(path) == 0
    assert digests(path) == digests(whole)
    assert resume(tmp_path / "elsewhere") == 0
    assert digests(tmp_path / "elsewhere") == digests(whole)


AMID = 85
"""A step in the middle of the fourth iteration, after 48 steps of training; others are evaluations'."""


def broken_in_a_step(error: BaseException, after: int = AMID) -> Callable[[Short], None]:
    """Raise in the after-th step of the process."""
    steps: list[int] = []

    def act(env: Short) -> None:
        steps.append(env.steps)
        if len(steps) == after:
            raise error

    return act


@pytest.mark.parametrize(
    ("error", "said"),
    [
        pytest.param(ValueError("my own"), "ValueError: my own", marks=slow),
        (RuntimeError("my own"), "RuntimeError: my own"),
        pytest.param(OSError(5, "no such thing"), r"OSError: \[Errno 5\] no such thing", marks=slow),
        pytest.param(ZeroDivisionError("x"), "ZeroDivisionError: x", marks=slow),
        (SystemExit(0), r"RuntimeError: it called sys\.exit\(0\), which would have ended the process"),
    ],
)
def test_what_an_environment_raises_is_named_and_the_run_is_saved(
    error: BaseException, said: str, whole: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Short, "act", broken_in_a_step(error))
        assert train(path, "--checkpoint-every", 1000) == 1
    sentence, note = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"train\.py: error: environment \d of Short-v0, in step \d of episode \d+: {said} "
        rf"\({re.escape(__file__)}, line \d+, in act; --debug shows how it came there\)",
        sentence,
    )
    assert note.endswith("checkpoints/last.zip.")
    assert checkpoint.read_manifest(path / "checkpoints" / "last.zip")["num_timesteps"] == 48
    assert resume(path) == 0
    assert digests(path) == digests(whole)
    assert logs(path) == logs(whole)


def test_what_breaks_off_in_its_first_iteration_goes_on_exactly(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Short, "act", broken_in_a_step(ValueError("my own"), after=28))
        assert train(path, "--checkpoint-every", 1000) == 1
    manifest = checkpoint.read_manifest(path / "checkpoints" / "last.zip")
    assert (manifest["num_timesteps"], manifest["env_snapshot"]) == (0, "exact")
    assert resume(path) == 0
    assert digests(path) == digests(whole)
    assert logs(path) == logs(whole)


def test_in_python_an_environments_error_keeps_its_kind_and_says_where() -> None:
    from agents import NPG

    agent = NPG("MlpPolicy", "Short-v0", num_envs=2, n_steps=8, net_arch=[4], device="cpu")
    Short.act = broken_in_a_step(KeyError("mine"), 20)  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="mine") as caught:
        agent.learn(1000)
    assert caught.value.__notes__ == ["Raised in environment 1 of Short-v0, in step 5 of episode 1."]


@pytest.mark.parametrize("kind", ["reset", "make"])
def test_errors_of_reset_and_of_making_are_named_too(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("no display")

    monkeypatch.setattr(Short, "reset" if kind == "reset" else "__init__", fails)
    assert train(tmp_path / "run") == 1
    where = "environment 0 of Short-v0, in the reset of episode 0" if kind == "reset" else "Short-v0, when it was made"
    assert f"error: {where}: RuntimeError: no display" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=slow)])
def test_a_stop_within_an_evaluation_leaves_it(
    number: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "run", []

    def act(env: Short) -> None:
        steps.append(env)
        if len(steps) == 13:  # of the first evaluation
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Short, "act", act)
        assert train(path) == 128 + number
    assert len(steps) <= 14
    assert read_rows(RunFolder(path).evaluations) == []
    assert resume(path) == 0
    assert digests(path) == digests(whole)
    assert logs(path) == logs(whole)


def test_a_second_ctrl_c_stops_at_once_in_words_and_loses_nothing(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    steps: list[Short] = []

    def act(env: Short) -> None:
        steps.append(env)
        if len(steps) in (AMID, AMID + 1):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Short, "act", act)
        assert train(path, "--checkpoint-every", 1000) == 130
    first, *said = capfd.readouterr().err.splitlines()
    assert first == "Stopping after this iteration; a second Ctrl-C stops at once."
    assert said[0] == "train.py: stopped at once."
    assert len(steps) == AMID + 1
    assert resume(path) == 0
    assert digests(path) == digests(whole)
    assert logs(path) == logs(whole)


def test_a_step_that_hangs_is_named_saved_and_left(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "run", []

    def act(env: Short) -> None:
        steps.append(env)
        if len(steps) == AMID:
            time.sleep(60)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(Short, "act", act)
        assert train(path, "--step-timeout", 0.5) == 1
    assert time.monotonic() - began < 30
    sentence = r"environment \d of Short-v0, in step \d of episode \d+, has not come back for 0.5 seconds"
    assert re.search(sentence, capsys.readouterr().err)
    assert resume(path) == 0
    assert digests(path) == digests(whole)


def test_an_evaluation_in_which_nothing_ends_is_said_and_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agents.run import evaluation

    monkeypatch.setattr(Short, "act", lambda env: setattr(env, "steps", 0))  # never at its fifth step
    monkeypatch.setattr(evaluation, "LONGEST", 40)
    monkeypatch.setattr(evaluation, "PATIENCE", 0.0)
    assert train(tmp_path / "run", steps=32) == 0
    out = capsys.readouterr().out
    assert out.count("no episode of an evaluation has ended in 0 seconds; Ctrl-C stops it") == 1
    assert out.count("max_episode_steps=1000") == 1
    record = tmp_path / "record.json"
    assert cli.evaluate([str(tmp_path / "run"), "--episodes", "3", "--json", str(record)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Short-v0: no episode of an evaluation has ended in 0 seconds" in out
    assert "Short-v0: 3 of 3 episodes of an evaluation were left after 40 steps. Episodes need an end" in out
    assert json.loads(record.read_text())["cut"] == 3
    assert cli.evaluate([str(tmp_path), "--episodes", "3", "--csv", str(tmp_path / "a.csv")]) == 0
    assert "last.zip, on Short-v0: 3 of 3 episodes" in " ".join(capsys.readouterr().out.split())
    assert {row["episodes"] for row in read_rows(RunFolder(tmp_path / "run").evaluations)} == {"2", "32"}


def test_an_environment_that_does_not_repeat_is_said_at_the_start_in_the_manifest_and_at_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    monkeypatch.setattr(Short, "act", lambda env: env.np_random.bit_generator.advance(int(random.integers(9, 99))))
    path = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("error", NewEpisodes)  # it is said once
        assert train(path, steps=32) == 0
    assert capsys.readouterr().out.count("Whoever resumes this run begins new episodes, and not exactly: GymVec") == 1
    said = checkpoint.read_manifest(path / "checkpoints" / "last.zip")["env_snapshot"]
    assert "other observations after the same reset(seed) and actions" in said
    assert resume(path, "--steps", 64) == 0
    assert "New episodes begin: GymVectorEnv" in capsys.readouterr().out
