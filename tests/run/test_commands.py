"""train.py and evaluate.py as people run them."""

import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from rich.console import Console
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import NPG, checkpoint, load
from agents.run import cli, process, training
from agents.run.errors import RunError
from agents.run.folder import RunFolder
from agents.run.log import tag_of
from agents.run.report import hyperparameter_table
from agents.run.video import Film
from envs import make_vec

ROOT = Path(__file__).parents[2]
SIZES = {"num-envs": 4, "n-steps": 64, "net-arch": 16, "eval-episodes": 2, "checkpoint-every": 0, "target-kl": 0.01}
SMALL = ["npg", "--env", "Hopper-v5", *(f"--{name}={size}" for name, size in SIZES.items())]


def environment() -> dict[str, str]:
    """One BLAS thread in every process: another number of them may round otherwise."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, script, *map(str, arguments)]


def execute(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(script, *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )


def interrupt(
    run: Path,
    number: signal.Signals,
    steps: int,
    meanwhile: Callable[[], object] = lambda: None,
    options: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Train to a first checkpoint, then send a signal."""
    arguments = command("train.py", *SMALL, "--steps", steps, "--run-dir", run, *options)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), **pipes)
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "last.zip").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    meanwhile()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


def timeless(file: Path) -> list[dict[str, str]]:
    """Rows without what a clock decides."""
    return [{k: v for k, v in row.items() if "seconds" not in k and "time/" not in k} for row in rows(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 iterations that nothing interrupted."""
    run = tmp_path_factory.mktemp("finished") / "run"
    result = execute("train.py", *SMALL, "--steps", 3000, "--run-dir", run)
    assert result.returncode == 0, result.stderr
    (run / "stdout.txt").write_text(result.stdout)
    return run


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    assert names >= {
        "config.yaml",
        "command.txt",
        "versions.json",
        "checkpoints/last.zip",
        "checkpoints/best.zip",
        "evaluations.csv",
        "progress.csv",
        "curve.png",
    }
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert checkpoint.read(finished / "checkpoints" / "last.zip")[0]["num_timesteps"] == 3072
    evaluations = rows(finished / "evaluations.csv")
    assert [evaluations[0]["steps"], evaluations[-1]["steps"]] == ["0", "3072"]
    assert [evaluations[0]["episodes"], evaluations[-1]["episodes"]] == ["2", "32"]
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_prints_its_origins_its_result_and_what_to_type_next(finished: Path) -> None:
    out = (finished / "stdout.txt").read_text()
    assert re.search(r"target_kl +0\.01 +flag", out)
    assert re.search(r"gamma +\S+ +(default|preset)", out)
    assert "final policy, deterministic, after 3,072 environment steps" in out
    assert f"python evaluate.py {finished}" in out
    assert "\x1b" not in out


def test_a_run_that_ends_lower_names_its_better_policy(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    kept = rows(run / "evaluations.csv")
    with (run / "evaluations.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, kept[0].keys())
        writer.writeheader()
        writer.writerows([kept[0] | {"mean": "5000.0"}, *kept[1:]])
    result = execute("train.py", "resume", run, "--steps", 4096)
    assert f"better one  {run / 'checkpoints' / 'best.zip'}, evaluated at 5,000.0\n" in result.stdout


def test_tensorboard_shows_training_and_evaluation(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished)).Reload()
    assert {"train/kl", "eval/mean_reward"} <= set(events.Tags()["scalars"])
    tags = "eval/mean_reward", "verbose_eval/best_mean_reward"
    means, best = ([x.value for x in events.Scalars(tag)] for tag in tags)
    assert best == np.maximum.accumulate(means).tolist()
    assert events.Scalars("eval/mean_reward")[-1].step == 3072


def test_resuming_a_finished_run_says_so(finished: Path) -> None:
    before = (finished / "checkpoints" / "last.zip").read_bytes()
    result = execute("train.py", "resume", finished)
    assert result.returncode == 0
    assert result.stdout == f"{finished} is finished with 3,072 steps; --steps with a larger number goes on.\n"
    assert (finished / "checkpoints" / "last.zip").read_bytes() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_is_saved_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    result = interrupt(run, number, 10_000_000, meanwhile=lambda: cli.train(["resume", str(run)]))
    assert "Another process is training" in capsys.readouterr().err
    assert result.returncode == code, result.stderr
    assert result.stderr == "Stopping after this iteration; a second Ctrl-C stops at once.\n"
    assert f"python train.py resume {run}" in result.stdout
    done = checkpoint.read(run / "checkpoints" / "last.zip")[0]["num_timesteps"]
    assert int(rows(run / "progress.csv")[-1]["time/total_timesteps"]) == done
    assert f"after {done:,} environment steps" in result.stdout
    assert (run / "curve.png").exists()


def test_a_run_that_nobody_reads_is_saved_and_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command("train.py", *SMALL, "--steps", 10_000_000, "--run-dir", run)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), **pipes)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    said, again = process.stderr.read().splitlines()
    done = checkpoint.read(run / "checkpoints" / "last.zip")[0]["num_timesteps"]
    assert said.startswith(f"Stopped since nobody reads what it prints after {done:,} environment steps")
    assert again == f"  python train.py resume {run}"
    assert RunFolder(run).read_state().state == "stopped"


def test_a_run_whose_terminal_goes_away_is_saved(tmp_path: Path) -> None:
    run, errors = tmp_path / "run", tmp_path / "errors.txt"
    words = command("train.py", *SMALL, "--steps", 10_000_000, "--run-dir", run)
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may themselves run under nohup
        os.execve(words[0], words, environment())
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "last.zip").exists() and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    assert RunFolder(run).read_state().state == "stopped"
    done = checkpoint.read(run / "checkpoints" / "last.zip")[0]["num_timesteps"]
    said, _ = errors.read_text().splitlines()
    assert said.startswith(f"Stopped by SIGHUP after {done:,} environment steps; everything is saved.")


def test_a_killed_run_goes_on_as_if_nothing_happened(finished: Path, tmp_path: Path) -> None:
    killed = tmp_path / "run"
    assert interrupt(killed, signal.SIGKILL, steps=3000).returncode == -signal.SIGKILL
    with (killed / "progress.csv").open("a") as file:
        file.write("torn,")
    resumed = execute("train.py", "resume", killed, "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    (_, a), (_, b) = (checkpoint.read(run / "checkpoints" / "last.zip") for run in (killed, finished))
    assert {name: checkpoint.digest(x) for name, x in a.items()} == {
        name: checkpoint.digest(x) for name, x in b.items()
    }
    for file in ("evaluations.csv", "progress.csv"):
        assert timeless(killed / file) == timeless(finished / file)
    assert (killed / "command.txt").read_text().count("\n") == 2


def test_a_killed_run_goes_on_with_its_own_threads_and_device(tmp_path: Path) -> None:
    asked = ["--threads=2", "--quiet"]
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    uninterrupted = execute("train.py", *SMALL, "--steps", 3000, "--run-dir", whole.path, *asked)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert interrupt(killed.path, signal.SIGKILL, 3000, options=asked).returncode == -signal.SIGKILL
    resumed = execute("train.py", "resume", killed.path)
    assert resumed.returncode == 0, resumed.stderr
    assert "in place of" not in resumed.stdout
    settings = [folder.read_config().run for folder in (whole, killed)]
    assert [(run.threads, run.device) for run in settings] == [(2, settings[0].device)] * 2
    a, b = (checkpoint.read(folder.last)[1] for folder in (whole, killed))
    assert {name: checkpoint.digest(x) for name, x in a.items()} == {
        name: checkpoint.digest(x) for name, x in b.items()
    }


def test_flags_of_resume_are_used_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, threads = tmp_path / "run", []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    asked = [*SMALL, "--steps", "256", "--threads", "2", "--device", "cpu", "--quiet"]
    assert cli.train([*asked, "--run-dir", str(run)]) == 0
    threads.clear()
    assert cli.train(["resume", str(run), "--steps", "300", "--quiet"]) == 0
    assert threads[0] == 2
    threads.clear()
    capsys.readouterr()
    assert cli.train(["resume", str(run), "--steps", "600", "--threads", "3", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--threads 3 in place of the run's 2: ")
    assert "--device" not in out
    assert threads[0] == 3
    assert RunFolder.open(run).read_config().run.threads == 3
    assert cli.train(["resume", str(run), "--threads", "0"]) == 2
    assert cli.train(["resume", str(run), "--device", "warp9"]) == 2


def test_what_device_a_run_has_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.train([*SMALL, "--steps", "256", "--run-dir", str(run), "--quiet"]) == 0
    settings = RunFolder.open(run).read_config()
    assert settings.run.device == str(load(RunFolder(run).last).device) != "auto"


def test_more_steps_extend_a_finished_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.train([*SMALL, "--steps", "256", "--run-dir", str(run)]) == 0
    assert cli.train(["resume", str(run), "--steps", "0"]) == 2
    assert cli.train(["resume", str(run), "--steps", "512"]) == 0
    assert checkpoint.read(run / "checkpoints" / "last.zip")[0]["num_timesteps"] == 512
    assert "steps: 512" in (run / "config.yaml").read_text()


NAN = """
import gymnasium
import numpy as np

class Nan(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        reward = np.nan if self.steps == 200 else 1.0
        return np.zeros(2, np.float32), reward, self.steps % 5 == 0, False, {}

gymnasium.register("Nan-v0", Nan)
"""


def test_an_environment_that_breaks_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nanenv.py").write_text(NAN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = tmp_path / "run"
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    result = execute(
        "train.py", "npg", "--env", "nanenv:Nan-v0", *sizes, "--reused-rollouts", 0, "--steps", 2000, "--run-dir", run
    )
    assert result.returncode == 1
    sentence, note = result.stderr.splitlines()
    assert re.match(r"train\.py: error: .*NaN", sentence)
    assert note == f"The last saved state of this run is in {run}/checkpoints/last.zip."
    manifest, _ = checkpoint.read(run / "checkpoints" / "last.zip")
    assert manifest["num_timesteps"] == 3 * 64 * 4
    assert manifest["env_id"] == "nanenv:Nan-v0"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["npg", "--env", "Hoper-v5"], 2, r"'Hoper-v5'.*did you mean.*'Hopper-v5'"),
        (["npg", "--env", "nowhere:Hopper-v5"], 2, "No module named 'nowhere'"),
        (["npg", "--env", "Hopper-v5", "--env-kwargs", "gravity=1"], 2, "gravity"),
        (["npg", "--env", "Hopper-v5", "--device", "warp9"], 2, "--device is 'warp9'"),
        (["npg", "--env", "Hopper-v5", "--runs", "train.py"], 1, "cannot be written"),
        (["resume", "nowhere"], 1, "no run folder at nowhere"),
        (["resume", "tests"], 1, "tests is not a run folder"),
    ],
)
def test_what_cannot_run_is_one_sentence(
    arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.train(arguments) == code
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"train\.py( resume)?: error: .*{sentence}.*\n", err), err
    assert out == ""


def test_evaluation_writes_every_return_once(finished: Path, tmp_path: Path) -> None:
    outputs = ("--json", tmp_path / "e.json", "--plot", tmp_path / "e.png")
    result = execute("evaluate.py", finished, "--episodes", 5, "--seed", 7, *outputs)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "e.json").read_text())
    assert (record["env_id"], record["algorithm"], record["num_timesteps"]) == ("Hopper-v5", "npg", 3072)
    assert (record["seed"], record["episodes"], record["deterministic"]) == (7, 5, True)
    assert len(record["returns"]) == len(record["lengths"]) == 5
    assert record["mean"] == pytest.approx(sum(record["returns"]) / 5)
    assert record["interval"][0] <= record["mean"] <= record["interval"][1]
    assert f"{record['mean']:,.1f}" in result.stdout
    assert len(record["sha256"]) == 64
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")

    again = execute("evaluate.py", finished, "--json", tmp_path / "e.json")
    assert again.returncode == 2
    assert "exists and is not overwritten" in again.stderr
    assert json.loads((tmp_path / "e.json").read_text()) == record


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_plot_is_of_the_kind_that_its_name_says(finished: Path, tmp_path: Path, ending: str, begins: bytes) -> None:
    file = tmp_path / f"a.{ending}"
    assert cli.evaluate([str(finished), "--episodes", "2", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(begins)


class Standing:
    def act(self, observations: Any, deterministic: bool = False) -> Any:
        return torch.zeros(len(observations), 3)


def filmed(tmp_path: Path, **kwargs: Any) -> Film:
    pytest.importorskip("moviepy")
    try:
        return Film("Hopper-v5", {"width": 64, "height": 64, **kwargs}, 0, tmp_path / "a.mp4")
    except RunError as error:
        pytest.skip(f"this machine cannot render: {error}")


def test_a_film_has_the_environments_own_speed_and_follows_the_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with filmed(tmp_path, max_episode_steps=5) as film:
        assert film._envs[0].unwrapped.camera_name == "track"
        film.shoot(Standing(), True)
    from moviepy import VideoFileClip

    with VideoFileClip(str(tmp_path / "a.mp4")) as clip:
        assert clip.fps == 62.5  # of 125, every second one: as fast as it is
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    with filmed(tmp_path, camera_id=0) as film:
        assert film._envs[0].unwrapped.camera_name is None
    with Film("Hopper-v5", {"num_threads": 1, "width": 64, "height": 64}, 0, tmp_path / "b.mp4"):
        pass  # threads are the batched environments' own


def test_episodes_are_filmed_side_by_side_with_their_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setenv("MUJOCO_GL", "egl")
    file, options = tmp_path / "a.gif", {"width": 64, "height": 64, "max_episode_steps": 15}
    try:
        film = Film("Hopper-v5", options, 0, file, episodes=2)
    except RunError as error:
        pytest.skip(f"this machine cannot render: {error}")
    with film:
        returns = film.shoot(Standing(), True)
    assert len(set(returns)) == 2
    with Image.open(file) as picture:
        assert (picture.size, picture.n_frames) == ((128, 64), 4)  # of 125 frames a second every seventh, and the last
        left, right = (np.asarray(picture.convert("RGB").crop((64 * k, 0, 64 * k + 64, 20)), int) for k in (0, 1))
        assert (left > 240).any()  # what is written in
        assert (left != right).any()


def test_where_nothing_can_draw_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from agents.run.video import choose_renderer

    for name in ("MUJOCO_GL", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process, "has_library", lambda name: False)
    with pytest.raises(RunError, match="apt-get install libegl1"):
        choose_renderer()
    monkeypatch.setattr(process, "has_library", lambda name: name == "OSMesa")
    choose_renderer()
    assert os.environ["MUJOCO_GL"] == "osmesa"
    for name, why in {"off": "draws nothing", "glfw": "needs a screen, and there is none"}.items():
        monkeypatch.setenv("MUJOCO_GL", name)
        with pytest.raises(RunError, match=f"MUJOCO_GL is {name}, which {why}; leave it unset"):
            choose_renderer()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("elg", "MUJOCO_GL is elg; set it to egl, osmesa or glfw, or leave it unset."),
        ("EGL", "MUJOCO_GL is egl, whose library is not installed; apt-get install libegl1 libgl1, or leave it unset."),
    ],
)
def test_a_renderer_that_mujoco_cannot_be_imported_with_is_one_sentence(
    name: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "has_library", lambda name: False)
    monkeypatch.setenv("MUJOCO_GL", name)
    assert cli.train(["npg", "--env", "Hopper-v5"]) == 2
    assert capsys.readouterr().err == f"train.py: error: {sentence}\n"


def test_a_film_that_is_broken_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with filmed(tmp_path) as film:
        monkeypatch.setattr(Standing, "act", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            film.shoot(Standing(), True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("env_id", ["probes/Survival-v0", "families/Point-v0", "CartPole-v1"])
def test_what_cannot_be_filmed_is_said_before_the_evaluation(
    env_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import agents

    if env_id == "CartPole-v1" and importlib.util.find_spec("pygame"):
        pytest.skip("pygame is here")
    pytest.importorskip("moviepy")
    agents.NPG("MlpPolicy", env_id, num_envs=2).save(tmp_path / "a.zip")
    assert cli.evaluate([str(tmp_path / "a"), "--episodes", "2", "--video", str(tmp_path / "a.mp4")]) == 1
    out, err = capsys.readouterr()
    assert "cannot be filmed" in err
    assert out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]


TRAINED_ON = {
    "gymnasium.make": lambda: gymnasium.make("Hopper-v5", max_episode_steps=50, reset_noise_scale=0.01),
    "a DummyVecEnv": lambda: DummyVecEnv(
        [lambda: Monitor(gymnasium.make("Hopper-v5", max_episode_steps=50, reset_noise_scale=0.01))]
    ),
    "NumPy's numbers": lambda: make_vec(
        "Hopper-v5", 2, max_episode_steps=np.int64(50), reset_noise_scale=np.float64(0.01)
    ),
}


@pytest.mark.parametrize("kind", TRAINED_ON)
def test_agents_of_the_library_name_their_environment(kind: str, tmp_path: Path) -> None:
    import agents

    agents.NPG("MlpPolicy", TRAINED_ON[kind]()).save(tmp_path / "a.zip")
    manifest = checkpoint.read_manifest(tmp_path / "a")
    assert manifest["env_id"] == "Hopper-v5"
    assert manifest["env_kwargs"] == {"max_episode_steps": 50, "reset_noise_scale": 0.01}


def test_an_environment_may_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import agents

    wrapped = gymnasium.wrappers.TransformReward(gymnasium.make("InvertedPendulum-v5"), lambda r: 2 * r)
    agents.NPG("MlpPolicy", wrapped).save(tmp_path / "a.zip")
    asked = [str(tmp_path / "a"), "--episodes", "2"]
    assert cli.evaluate(asked) == 1
    assert "does not name its environment, which had no id; give one with --env." in capsys.readouterr().err
    record = tmp_path / "a.json"
    named = ["--env", "InvertedPendulum-v5", "--env-kwargs", "max_episode_steps=3", "--json", str(record)]
    assert cli.evaluate([*asked, *named]) == 0
    found = json.loads(record.read_text())
    assert (found["env_id"], found["env_kwargs"]) == ("InvertedPendulum-v5", {"max_episode_steps": 3})
    assert max(found["lengths"]) <= 3
    agents.NPG("MlpPolicy", gymnasium.make("Hopper-v5", healthy_reward=9.0)).save(tmp_path / "hopper.zip")
    assert cli.evaluate([str(tmp_path / "hopper"), "--episodes", "2", "--env", "HalfCheetah-v5"]) == 2
    assert "whose observation_space is" in capsys.readouterr().err  # not that it takes no healthy_reward
    capsys.readouterr()
    assert cli.evaluate([*asked, "--env", "Hopper-v5"]) == 2
    assert "whose observation_space is" in capsys.readouterr().err


@pytest.mark.parametrize("width", [70, 200])
def test_the_table_of_hyperparameters_is_whole(width: int) -> None:
    config = dataclasses.asdict(NPG.Config())
    console = Console(width=width, file=io.StringIO())
    console.print(hyperparameter_table(config, dict.fromkeys(config, "default"), width))
    lines = console.file.getvalue().splitlines()
    assert all(any(name in line for line in lines) for name in config)
    assert (len(lines) > len(config)) == (width == 70)


def test_an_iteration_longer_than_the_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--num-envs", "4", "--meta-batch-size", "2", "--n-steps", "100", "--net-arch", "8", "--eval-episodes", "1"]
    asked = ["fomaml", "--env", "families/Point-v0", *sizes, "--run-dir", str(tmp_path / "run")]
    assert cli.train([*asked, "--steps", "500"]) == 0
    said = re.search(
        r"one iteration is ([\d,]+) environment steps, more than the 500 asked for", capsys.readouterr().out
    )
    made = checkpoint.read_manifest(tmp_path / "run" / "checkpoints" / "last.zip")["num_timesteps"]
    assert said is not None
    assert said[1] == f"{made:,}"


def test_a_file_is_evaluated_like_its_run(finished: Path, tmp_path: Path) -> None:
    for name, target in {"run": finished, "file": finished / "checkpoints" / "last.zip"}.items():
        assert cli.evaluate([str(target), "--episodes", "3", "--json", str(tmp_path / name)]) == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("run", "file"))
    assert a["returns"] == b["returns"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere.zip"], 1, "no checkpoint file at nowhere.zip"),
        (["train.py"], 1, "train.py is damaged or not a geodesic-rl checkpoint"),
        (["train.py", "--best"], 2, "--best needs a run's folder"),
        (["train.py", "--episodes", "0"], 2, "--episodes is 0; give at least 1"),
        (["train.py", "--json", "nowhere/a.json"], 2, "there is no folder nowhere"),
        (["train.py", "--video", "a.avi"], 2, r"--video is a\.avi; give a name that ends in \.mp4 or \.gif"),
        (["train.py", "--video", "a"], 2, r"ends in \.mp4"),
        (["train.py", "--plot", "a.txt"], 2, r"ends in \.png or \.pdf or \.svg"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(
    arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.evaluate(arguments) == code
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"evaluate\.py: error: .*{sentence}.*\n", err), err
    assert out == ""


def test_a_run_without_usable_directions_stops_with_its_state_saved(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr("agents.natural.adaptive.AdaptiveInverse.update", lambda self, rows, rate: False)
    options = ["--fisher", "adaptive", "--max-rejected-updates", "2"]
    asked = [*SMALL, *options, "--policy", "LinearPolicy", "--steps", "5000", "--run-dir", str(run)]
    asked[asked.index("--checkpoint-every=0")] = "--checkpoint-every=1000"
    assert cli.train(asked) == 1
    message = capsys.readouterr().err
    assert "In 2 updates in a row no direction was usable" in message
    assert "last saved state" in message
    manifest, _ = checkpoint.read(run / "checkpoints" / "last.zip")
    assert (manifest["num_timesteps"], manifest["policy_class"]) == (2 * 4 * 64, "LinearPolicy")


def test_tensorboard_groups_the_curves_that_a_run_writes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    run = tmp_path / "run"
    assert cli.train([*SMALL, "--steps", "512", "--line-search", "--run-dir", str(run), "--quiet"]) == 0
    events = EventAccumulator(str(run))
    events.Reload()
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(NPG.dashboard)
    assert {"settings/text_summary", "command/text_summary", "versions/text_summary"} <= set(events.Tags()["tensors"])
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| env | Hopper-v5 |" in text
    assert "| target_kl | 0.01 | flag |" in text
    header = (run / "progress.csv").read_text().partition("\n")[0].split(",")
    assert header[0] == "time/total_timesteps"
    evaluated = [name for name in header if name.startswith("eval/")]
    trained = [name for name in header if not name.startswith("eval/")][1:]
    assert (evaluated, trained) == (sorted(evaluated), sorted(trained))
    charted = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    # As TensorBoard looks for a curve's tags.
    matches = {pattern: [tag for tag in events.Tags()["scalars"] if re.match(pattern, tag)] for pattern in charted}
    assert {tag for tags in matches.values() for tag in tags} == {
        tag_of(tag) for charts in NPG.dashboard.values() for tags in charts.values() for tag in tags
    }
    assert all(len(tags) == 1 for tags in matches.values())
    # What a person looks at first, and the details apart.
    grouped = {tag for tag in events.Tags()["scalars"] if tag.startswith(("eval/", "train/"))}
    few = {"train/kl", "train/entropy", "train/std", "train/explained_variance"}
    assert grouped == {"eval/mean_reward", "eval/mean_ep_length"} | few
    assert {"verbose_eval/lower", "verbose_train/kl_quadratic"} <= set(events.Tags()["scalars"])


def test_minutes_end_a_run_and_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ticks = RunFolder(tmp_path / "run"), itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: 0.05 * next(ticks)))
    monkeypatch.setattr(training._Training, "_ticks", lambda self: lambda ended: None)  # which asks in each step
    assert cli.train([*SMALL, "--minutes", "0.05", "--run-dir", str(run.path)]) == 0
    first = run.read_state()
    assert first is not None
    assert (first.state, first.share) == ("finished", 1.0)
    assert 3.0 <= first.seconds < 3.5  # an iteration over
    assert first.seconds < float(rows(run.evaluations)[-1]["seconds"])  # without the final evaluation
    kl = [float(row["train/kl"]) for row in rows(run.progress) if row["train/kl"]]
    assert kl[-1] < 0.005 < kl[0]  # the schedule follows the share of the time
    settings = run.read_config().run
    assert (settings.steps, settings.eval_every, settings.minutes) == (None, None, 0.05)
    assert len(rows(run.evaluations)) > 4
    capsys.readouterr()
    assert cli.train(["resume", str(run.path)]) == 0
    assert "--minutes with a larger number goes on" in capsys.readouterr().out
    assert cli.train(["resume", str(run.path), "--minutes", "0.08"]) == 0
    second = run.read_state()
    assert second is not None
    assert 4.8 <= second.seconds < 5.3
    assert first.steps < second.steps < 2 * first.steps  # as what the first process took counts
    out = capsys.readouterr().out
    assert f"goes on after {first.seconds / 60:.1f} of 0.08 minutes" in out
    assert cli.train(["resume", str(run.path), "--steps", str(second.steps + 1)]) == 0
    assert run.read_config().run.minutes is None


def test_a_run_has_one_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train([*SMALL, "--steps", "100", "--minutes", "1"]) == 2
    assert "--steps is 100 and --minutes 1.0; give one" in capsys.readouterr().err
    assert cli.train([*SMALL, "--minutes", "0"]) == 2


def test_a_run_says_where_it_is(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunFolder(finished).read_state()
    assert state is not None
    assert (state.state, state.steps, state.share) == ("finished", 3072, 1.0)
    assert state.evaluated == float(rows(finished / "evaluations.csv")[-1]["mean"])
    stopped, running = tmp_path / "stopped", list[bool]()
    interrupt(stopped, signal.SIGTERM, 10_000_000, meanwhile=lambda: running.append(RunFolder(stopped).is_locked()))
    state = RunFolder(stopped).read_state()
    assert state is not None
    assert (state.state, running, RunFolder(stopped).is_locked()) == ("stopped", [True], False)
    monkeypatch.setattr(NPG, "train", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.train([*SMALL, "--run-dir", str(tmp_path / "failed")])
    state = RunFolder(tmp_path / "failed").read_state()
    assert state is not None
    assert (state.state, state.error) == ("failed", "division by zero")
