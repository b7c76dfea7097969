"""Every benchmark says what it measures, and finds what it has measured."""

import importlib
import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from agents import NPG, REGISTRY
from benchmarks import common, first_gpu
from benchmarks.evolution import policy_search
from benchmarks.natural import ablation, search
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
    second = {"envs/warp_learning_cuda", "natural/copos_sparse", "natural/direction_trained", "natural/trials"}
    assert kept - second <= set(SCRIPTS)


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
    assert named - common.SILENT.keys() <= set(REGISTRY[algorithm].Config.names())


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
    for optimizer in ("AMSGrad", "AdaBound, local time", "Muon", "K-FAC"):
        ppo = ppo_optimizers.run("Hopper-v5", optimizer, ppo_optimizers.GRID[optimizer][0], base, 0, 128)
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


@pytest.fixture(name="searched")
def _searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LINES", tmp_path / "search.jsonl")
    monkeypatch.setattr(search, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(search, "code_version", lambda: "here")


@pytest.mark.usefixtures("searched")
def test_a_searched_run_that_goes_on_is_the_run_that_never_stopped() -> None:
    key = search.key_of("512", "InvertedPendulum-v5", 60, 2048)
    half = search.train(key, None, 1024)
    search.append(half)
    ((same_key, before),) = search.todo([key, key], 2048, {"here"})
    assert (same_key, before) == (key, half)
    runs = [search.train(key, before, 2048), search.train(key, None, 2048)]
    returns, finals = zip(*(([x[::2] for x in run["curve"]], run["final"]) for run in runs), strict=True)
    assert [steps for steps, _ in returns[0]] == [512, 1024, 1536, 2048]
    assert returns[0] == returns[1]
    assert finals[0] == finals[1]
    assert runs[0]["seconds"] > half["seconds"]


@pytest.mark.usefixtures("searched")
def test_results_of_a_search_outlive_a_line_that_was_cut_short() -> None:
    first, second = ({"seed": seed, "settings": search.settings_of("512", "Ant-v5")} for seed in (1, 2))
    search.append(first)
    with search.LINES.open("a") as file:
        file.write('{"seed": 2, "cur')
    search.append(second)
    assert search.read_lines() == [first, second]


@pytest.mark.usefixtures("searched")
def test_results_of_a_search_outlive_new_and_retired_options() -> None:
    key = search.key_of("512", "Ant-v5", 60, 9)
    older = {
        name: value for name, value in key["settings"].items() if name not in ("curvature_renewal", "reused_rollouts")
    }
    search.append({**key, "settings": {**older, "fisher_rows": 64}})
    assert search.read_lines() == [key]


def test_a_score_is_the_mean_of_tasks_and_its_interval_of_their_seeds() -> None:
    tasks = ["Hopper-v5", "Reacher-v5"]
    (low, high), (worst, best) = (search.PUBLISHED[task][:2] for task in tasks)
    mean, lower, upper = search.score({tasks[0]: [low, high], tasks[1]: [best, best, worst, best]})
    assert mean == pytest.approx((0.5 + 0.75) / 2)
    assert (lower, upper) == pytest.approx((0.25, 1.0))
    assert search.score({tasks[0]: [high], tasks[1]: [best, best]})[0] == 1.0


def test_a_search_goes_on_with_the_better_half_and_with_those_to_be_kept() -> None:
    task, names = "Hopper-v5", ["default", "512", "512, no memory", "1024 of 64 x 16, KL 0.01"]
    lines = [
        {**search.key_of(name, task, 60, 9), "budget": 3, "curve": [[3, 0.1, value]], "final": None}
        for name, value in zip(names, (4.0, 3.0, 2.0, 1.0), strict=True)
    ]
    assert search.better_half(names, names[3:], lines, [task], range(60, 61), 3) == [*names[:2], names[3]]


def test_a_part_that_fails_on_a_gpu_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "machine": ("a poem", "this", 1.0),
        "wrong": ("no file", "json.tool {folder}/none.json", 1.0),
        "hanging": ("a sleep", "timeit -n 1 -r 1 'import time; time.sleep(60)'", 0.01),
        "last": ("a poem", "this", 1.0),
    }
    for name, value in {"PARTS": parts, "ROOT": tmp_path, "RESULTS": tmp_path / "results"}.items():
        monkeypatch.setattr(first_gpu, name, value)
    (tmp_path / "results" / "envs").mkdir(parents=True)
    (tmp_path / "results" / "envs" / "gpu.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["first_gpu"])
    with pytest.raises(SystemExit, match=r"^1$"):
        first_gpu.main()
    told = capsys.readouterr().out.splitlines()
    ends = [line.strip() for line in told[1:-1:2]]
    for end, pattern in zip(
        ends,
        (
            r"ok in \d+ s: .*let's do more of those!",
            r"FAILED: it failed after \d+ s: .*json.tool: error.* \(all of it: build/gpu/wrong.log\)",
            r"FAILED: it ended after 1 s, for it took too long: it printed nothing \(.*build/gpu/hanging.log\)",
            r"ok in \d+ s: .*",
        ),
        strict=True,
    ):
        assert re.fullmatch(pattern, end), end
    assert told[-1] == "2 of the parts failed. Please send back build/gpu.tar.gz, whatever failed."
    with tarfile.open(tmp_path / "build" / "gpu.tar.gz") as archive:
        assert {"gpu/gpu.json", *(f"gpu/{name}.log" for name in parts)} <= set(archive.getnames())

    monkeypatch.setattr(first_gpu, "PARTS", {"machine": parts["wrong"], "last": parts["last"]})
    with pytest.raises(SystemExit):
        first_gpu.main()
    assert "a poem" not in capsys.readouterr().out  # without a GPU nothing else is tried
