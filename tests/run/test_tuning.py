"""Studies of hyperparameters."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from agents import NPG
from agents.cluster.executor import Serial
from agents.run import cli, tuning
from agents.run.tuning import Sweep, Tune

optuna = pytest.importorskip("optuna", reason="the extra tune is not installed")

ROOT = Path(__file__).parents[2]
SMALL = ["tune", "npg", "--env", "InvertedPendulum-v5", "--steps", "2500", "--search", "target_kl=0.001..0.1"]


def study_of(folder: Path) -> Any:
    return optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'study.db'}")


def test_a_study_goes_on_and_its_best_trial_is_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--study", str(tmp_path / "study")]
    assert cli.main([*SMALL, "--trials", "2", *where]) == 0
    assert cli.main([*SMALL, "--trials", "5", *where]) == 0
    trials = study_of(tmp_path / "study").trials
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert trials[0].params == {"target_kl": NPG.Config().target_kl}  # the values of now come first
    best = max((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value)
    preset = tmp_path / "study" / "preset.yaml"
    found = yaml.safe_load(preset.read_text())["InvertedPendulum-v5"]
    assert found.get("target_kl", NPG.Config().target_kl) == best.params["target_kl"]
    assert (tmp_path / "study" / "study.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.count("trial   0") == 1
    assert f"--preset {preset}" in out
    assert cli.main([*SMALL[:4], "--steps", "2600", "--trials", "5", *where]) == 2
    assert "has steps 2500, and 2600 is asked for" in capsys.readouterr().err


def test_trials_may_be_spread_over_an_executor_to_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used, start = [], Serial.start
    monkeypatch.setattr(Serial, "start", lambda self, makers: used.append(self) or start(self, makers))
    for name, more in (("spread", ["--executor", "serial"]), ("together", [])):
        assert cli.main([*SMALL, "--trials", "2", "--study", str(tmp_path / name), *more]) == 0
    spread, together = ([trial.value for trial in study_of(tmp_path / name).trials] for name in ("spread", "together"))
    assert spread == together
    assert len(used) == 2
    assert len(set(map(id, used))) == 1  # both trials, one after the other
    assert cli.main([*SMALL, "--workers", "2", "--study", str(tmp_path / "none")]) == 2
    assert "give --executor ray too" in capsys.readouterr().err


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


@pytest.mark.parametrize(("number", "times", "code"), [(signal.SIGTERM, 1, 143), (signal.SIGINT, 2, 130)])
def test_a_trial_that_is_stopped_comes_again(
    number: signal.Signals,
    times: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopping(*args: Any) -> Any:
        for _ in range(times):
            signal.raise_signal(number)
        return SimpleNamespace(mean=1.0)

    words = [*SMALL, "--trials", "2", "--study", str(tmp_path)]
    with monkeypatch.context() as amid:
        amid.setattr(tuning, "evaluate", stopping)  # of the first trial, after 2048 of its 2500 steps
        assert cli.main(words) == code
    out, err = capsys.readouterr()
    how = f"Stopped by {number.name}; the" if times == 1 else "train.py tune: stopped at once.\nThe"
    said = f"{how} study is saved, and trial 0, which was running, comes again first. Go on:\n  python train.py tune"
    assert said in (out if times == 1 else err)
    trials = study_of(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "WAITING"]
    assert cli.main(words) == 0
    trials = study_of(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[0].params == trials[1].params


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_study_that_runs(number: signal.Signals, code: int, tmp_path: Path) -> None:
    words = [sys.executable, "train.py", *SMALL, "--steps", "1e7", "--study", str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(2.0)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (code, "")
    assert "trial   0     stopped" in out
    assert f"Stopped by {number.name}; the study is saved, and trial 0" in out
    assert [trial.state.name for trial in study_of(tmp_path).trials] == ["FAIL", "WAITING"]


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
    sweep = Sweep(Tune("npg", "InvertedPendulum-v5", steps=2500, search=("target_kl=0.001..0.1",)))
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=1e9))
    trial = study.ask()
    with pytest.raises(optuna.TrialPruned):
        sweep.objective(trial)
    assert list(study.trials[0].intermediate_values) == [2]  # after 512 steps of 2500


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
