"""Runs and checkpoints of other people: opening them runs none of their code."""

import dataclasses
import sys
from pathlib import Path

import pytest

from agents import NPG, checkpoint
from agents.run import cli
from agents.run.folder import RunConfig, RunFolder
from agents.run.options import RunOptions, module_of

PAYLOAD = """
from pathlib import Path
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv
Path("executed").touch()
gymnasium.register("Foo-v0", entry_point=CartPoleEnv, max_episode_steps=10)
"""
PLANTED = "runs.shared.payload:Foo-v0"
"""A module in the run's folder: whoever works beside runs/ has it on sys.path, as a namespace package."""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run in runs/shared, with a payload."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("runs", "runs.shared", "runs.shared.payload"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return planted(Path("runs/shared"), PLANTED, {})


def planted(path: Path, env_id: str, env_kwargs: dict[str, str]) -> RunFolder:
    agent = NPG("MlpPolicy", "CartPole-v1", num_envs=2, n_steps=8, net_arch=(4,), seed=0, device="cpu")
    pairs = tuple(f"{name}={value}" for name, value in env_kwargs.items())
    config = dataclasses.asdict(agent.config)
    options = RunOptions(env=env_id, env_kwargs=pairs, steps=16, eval_episodes=1, run_dir=str(path), device="cpu")
    folder = RunFolder.create(RunConfig("npg", options.resolved(), config, dict.fromkeys(config, "flag")), "")
    manifest, tensors = agent._packed()
    for file in (folder.last, folder.best):
        checkpoint.write(file, {**manifest, "env_id": env_id, "env_kwargs": env_kwargs}, tensors)
    (path / "payload.py").write_text(PAYLOAD)
    return folder


COMMANDS = [
    ["resume", "runs/shared"],
    ["resume", "runs/shared", "--steps", "100", "--threads", "1"],
    ["evaluate", "runs/shared"],
    ["evaluate", "runs/shared", "--best"],
    ["evaluate", "runs/shared/checkpoints/last.zip", "--backend", "gymnasium"],
    ["evaluate", "runs/shared", "--video", "film.mp4"],
    ["evaluate", "runs/shared", "--env-kwargs", "a=1"],
    ["adapt", "runs/shared"],
    ["adapt", "runs/shared", "--beside", "runs/shared"],
    ["runs"],
    ["train", "npg", "--env", "CartPole-v1", "--init-from", "runs/shared", "--steps", "8", "--num-envs", "2",
     "--n-steps", "8", "--eval-episodes", "1", "--quiet"],
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_command_imports_what_a_file_names(
    shared: RunFolder, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(words)
    assert not Path("executed").exists()
    if words[0] in ("resume", "evaluate"):
        assert code == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert f"names the environment {PLANTED!r}" in sentence
        assert sentence.endswith("give --allow-import if you trust it.")
    else:
        assert code == (2 if words[0] == "adapt" else 0)


def test_arguments_of_an_environment_name_no_module_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    planted(Path("runs/shared"), "GymV26Environment-v0", {"make_kwargs": PLANTED})
    for command in ("resume", "evaluate"):
        assert cli.main([command, "runs/shared"]) == 2
        assert "the module 'runs.shared.payload' would be imported" in capsys.readouterr().err
    # One types the environment, and yet its arguments come from the file.
    assert cli.main(["evaluate", "runs/shared", "--env", "GymV26Environment-v0"]) == 2
    assert "would be imported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env_id", "env_kwargs", "module"),
    [
        ("Hopper-v5", {"xml_file": "hopper.xml", "n": 3}, None),
        ("probes/Survival-v0", {}, None),
        ("a.b:X-v0", {}, "a.b"),
        ("X-v0", {"make_kwargs": [{"id": "a:Y"}]}, "a"),
        ("X-v0", {"a:Y": 1}, "a"),
        ("X-v0", {"y": ":Y"}, ":Y"),
    ],
)
def test_modules_are_found_wherever_they_stand(env_id: str, env_kwargs: dict, module: str | None) -> None:
    assert module_of(env_id, env_kwargs) == module


def test_who_allows_the_import_has_it(shared: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resume", "runs/shared", "--allow-import"]) == 0
    assert Path("executed").exists()
    assert " runs/shared --episodes 100 --allow-import\n" in capfd.readouterr().out
    assert cli.main(["evaluate", "runs/shared", "--allow-import", "--episodes", "1"]) == 0
    assert cli.main(["evaluate", "runs/shared", "--env", PLANTED, "--episodes", "1"]) == 0


def test_a_state_that_the_first_update_cannot_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fomaml", "--env", "families/Point-v0", "--env-kwargs", "horizon=5", "--num-envs", "4", "--n-steps", "5"]
    words += ["--meta-batch-size", "2", "--steps", "40", "--eval-episodes", "1", "--quiet", "--device", "cpu"]
    assert cli.main(["train", *words, "--run-dir", str(tmp_path / "run")]) == 0
    folder = RunFolder(tmp_path / "run")
    manifest, tensors = checkpoint.read(folder.last)
    del tensors["fomaml.optimizer.adam.0.exp_avg_sq"]
    checkpoint.write(folder.last, manifest, tensors)
    asked = ["resume", str(folder.path), "--steps", "100", "--quiet"]
    capsys.readouterr()
    assert cli.main(asked) == 1
    sentence = capsys.readouterr().err.splitlines()[0]
    assert (
        f"error: {folder.last} holds a state from which training does not go on (KeyError: 'exp_avg_sq');" in sentence
    )
    with pytest.raises(checkpoint.CheckpointError) as caught:
        cli.main([*asked, "--debug"])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(("line", "odd"), [("algorithm: npg", "algorithm: npq"), ("num_envs: 2", "num_envs: 10000")])
def test_a_configuration_of_another_run_is_refused(
    tmp_path: Path, line: str, odd: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planted(tmp_path / "run", "CartPole-v1", {})
    folder.config.write_text(folder.config.read_text().replace(line, odd))
    assert cli.main(["resume", str(folder.path)]) == 1
    assert "are of different runs: their algorithm or num_envs differ." in capsys.readouterr().err
