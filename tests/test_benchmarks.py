"""Every benchmark says what it measures, and finds what it has measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from agents import NPG, REGISTRY
from benchmarks import common
from benchmarks.evolution import policy_search
from benchmarks.natural import ablation
from benchmarks.natural.direction import Trained, compare
from benchmarks.natural.iteration import STAGES, WRAPPED
from benchmarks.natural.training_peers import EnvironmentLayer
from benchmarks.optim import ppo_optimizers
from benchmarks.peers import Ours

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(str(file.relative_to(ROOT / "benchmarks").with_suffix("")) for file in ROOT.glob("benchmarks/*/*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_shows_its_help_and_keeps_results_under_its_name(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("benchmarks." + script.replace("/", "."))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        module.main()
    assert module.__doc__.split()[0] in capsys.readouterr().out
    assert script == module.NAME


def test_every_kept_file_belongs_to_a_script() -> None:
    kept = {str(file.relative_to(common.RESULTS).with_suffix("")) for file in common.RESULTS.rglob("*.*")}
    assert kept - {"natural/direction_trained"} <= set(SCRIPTS)


@pytest.mark.parametrize(
    ("name", "place", "algorithm"),
    [
        ("natural/returns", "settings", "npg"),
        ("natural/rollout_size", "config", "npg"),
        ("optim/ppo_peers", "settings", "ppo"),
    ],
)
def test_kept_configurations_name_options_of_now_and_retired_ones(name: str, place: str, algorithm: str) -> None:
    runs = [run for run in common.read(name)["runs"] if run.get("side", "ours, preset") == "ours, preset"]
    assert runs
    named = {option for run in runs for option in run[place]}
    assert named - common.RETIRED.keys() <= set(REGISTRY[algorithm].Config.names())


def test_each_stage_of_an_iteration_times_functions_that_exist() -> None:
    assert set(WRAPPED) == set(STAGES)
    absent = [
        f"{owner.__name__}.{name}"
        for functions in WRAPPED.values()
        for owner, names in functions
        for name in names
        if not callable(getattr(owner, name, None))
    ]
    assert absent == []


def test_our_direction_and_the_one_from_a_double_backward_pass_agree_on_a_problem_of_training() -> None:
    problem = Trained("Hopper-v5", 1024, (4,), iterations=1)
    found = compare(problem, 20, 1e-3, "none", turns=1, seconds=0)
    assert found["parameters"] == 11 * 4 + 4 + 4 * 3 + 3 + 3
    assert found["cosine"] > 0.9
    assert max(found["ours_residual"], found["other_residual"]) < 0.1


def test_short_runs_of_each_algorithm_say_what_they_reached() -> None:
    npg = ablation.train("Hopper-v5", {"num_envs": 4, "n_steps": 16}, 0, 128)
    assert ([steps for steps, _, _ in npg["curve"]], npg["rejected"], npg["stopped"]) == ([64, 128], 0, None)
    base = {"num_envs": 4, "n_steps": 16, "batch_size": 32, "n_epochs": 1}
    for optimizer in ("AMSGrad", "AdaBound"):
        ppo = ppo_optimizers.run("Hopper-v5", optimizer, {"learning_rate": 1e-3}, base, 0, 128)
        assert (len(ppo["curve"]), ppo["stopped"]) == (2, None)
    key = {"part": "swimmer", "env": "Hopper-v5", "steps": 2000, "side": "pes", "seed": 0}
    pes = policy_search.curve_of(key, 1)
    assert pes["steps_taken"] >= 2000
    assert pes["evaluation_steps"] >= 16


def test_the_environment_layer_repeats_an_iteration_s_steps() -> None:
    ours = Ours(NPG, "Hopper-v5", 0, 10**6, {"num_envs": 4, "n_steps": 8})
    layer = EnvironmentLayer("Hopper-v5", ours)
    for _ in range(2):
        layer.remember()
        assert ours.train(1) == 32
        layer.follow()
        assert layer.train(1) == 32
        assert torch.equal(layer.env.snapshot(None)["physics"], ours.agent.env.vector.snapshot(None)["physics"])
    layer.close()
    ours.close()


def test_a_kept_run_answers_its_key_although_options_have_been_retired() -> None:
    run = {"settings": {"gamma": 0.9, "fisher_rows": 64}, "versions": common.current_versions()}
    assert common.is_same(run, {"settings": {"gamma": 0.9}})
    assert not common.is_same(run, {"settings": {"gamma": 0.99}})
    assert not common.is_same({**run, "settings": {"gamma": 0.9, "fisher_rows": 32}}, {"settings": {"gamma": 0.9}})
    assert not common.is_same({**run, "versions": {}}, {"settings": {"gamma": 0.9}})


def test_runs_stand_under_their_place_and_another_process_s_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    mine = {"runs": []}
    common.keep("natural/x", {"runs": []}, {"seed": 1, "mean": 1.0}, ("seed",))
    common.keep("natural/x", mine, {"seed": 0, "mean": 2.0}, ("seed",))
    common.keep("natural/x", mine, {"seed": 0, "mean": 3.0}, ("seed",))
    assert mine == common.read("natural/x") == {"runs": [{"seed": 1, "mean": 1.0}, {"seed": 0, "mean": 3.0}]}
    assert common.as_json({"a": (1, 2)}) == json.loads('{"a": [1, 2]}')
