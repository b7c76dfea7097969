"""Studies of hyperparameters."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from agents.run import cli
from agents.run.tuning import Sweep, Tune

optuna = pytest.importorskip("optuna", reason="the extra tune is not installed")

ROOT = Path(__file__).parents[2]
SMALL = ["tune", "npg", "--env", "InvertedPendulum-v5", "--steps", "600", "--search", "target_kl=0.001..0.1"]


def study_of(folder: Path) -> Any:
    return optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'study.db'}")


def test_a_study_goes_on_and_its_best_trial_is_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--study", str(tmp_path / "study")]
    assert cli.main([*SMALL, "--trials", "2", *where]) == 0
    assert cli.main([*SMALL, "--trials", "5", *where]) == 0
    trials = study_of(tmp_path / "study").trials
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert trials[0].params == {"target_kl": 0.01}  # the values of now come first
    best = max((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value)
    preset = tmp_path / "study" / "preset.yaml"
    found = yaml.safe_load(preset.read_text())["InvertedPendulum-v5"]
    assert found.get("target_kl", 0.01) == best.params["target_kl"]
    assert (tmp_path / "study" / "study.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.count("trial   0") == 1
    assert f"--preset {preset}" in out
    assert cli.main([*SMALL[:4], "--steps", "700", "--trials", "5", *where]) == 2
    assert "has steps 600, and 700 is asked for" in capsys.readouterr().err


def test_a_preset_of_a_file_is_trained_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from agents.run.folder import RunFolder

    preset, run = tmp_path / "preset.yaml", tmp_path / "run"
    preset.write_text("InvertedPendulum-v5: {target_kl: 0.0123, gamma: 0.9}\n")
    small = ["--steps", "8", "--num-envs", "2", "--n-steps", "8", "--eval-episodes", "1", "--quiet"]
    typed = ["train", "npg", "--env", "InvertedPendulum-v5", "--preset", str(preset), "--gamma", "0.8", *small]
    assert cli.main([*typed, "--run-dir", str(run)]) == 0
    kept = RunFolder.open(run).read_config()
    assert (kept.config["target_kl"], kept.origins["target_kl"]) == (0.0123, "preset")
    assert (kept.config["gamma"], kept.origins["gamma"]) == (0.8, "flag")
    capsys.readouterr()
    for text in ("Hopper-v5: {}", "InvertedPendulum-v5: {target_lk: 1}", "[", "InvertedPendulum-v5: {target_kl: -1}"):
        preset.write_text(text)
        assert cli.main([*typed, "--run-dir", str(tmp_path / "other")]) == 2
        assert "holds no preset of npg for InvertedPendulum-v5" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", *SMALL, "--trials", "6", "--study", str(tmp_path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [one.communicate(timeout=240) for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    trials = study_of(tmp_path).trials
    assert 6 <= len(trials) <= 7  # the last two may begin at once
    assert len({trial.params["target_kl"] for trial in trials}) == len(trials)
    assert all(trial.state.is_finished() for trial in trials)


def test_trials_that_lag_are_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(Tune("npg", "InvertedPendulum-v5", steps=600, search=("target_kl=0.001..0.1",)))
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=1e9))
    trial = study.ask()
    with pytest.raises(optuna.TrialPruned):
        sweep.objective(trial)
    assert list(study.trials[0].intermediate_values) == [8]  # after 512 steps of 600


def test_ranges_are_read_and_wrong_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(Tune("npg", "Hopper-v5", search=("target_kl=1e-3..0.1", "fisher=compatible,ekfac", "n_steps=16..64")))
    assert sweep.space == {"target_kl": (0.001, 0.1), "fisher": ["compatible", "ekfac"], "n_steps": (16.0, 64.0)}
    proposed = sweep.proposed(optuna.create_study().ask())
    assert isinstance(proposed["n_steps"], int)
    for text, said in {
        "target_lk=1..2": "did you mean 'target_kl'",
        "target_kl=2..1": "write target_kl=LOW..HIGH",
        "target_kl": "write target_kl=LOW..HIGH",
    }.items():
        assert cli.main([*SMALL[:4], "--search", text]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["tune", "ngp", "--env", "Hopper-v5"]) == 2
    assert "did you mean 'npg'?" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["npg", "trpo", "copos", "ppo", "pes", "reptile", "fomaml", "maml"])
def test_every_algorithm_has_something_to_look_for(algorithm: str) -> None:
    assert Sweep(Tune(algorithm, "Hopper-v5")).space
