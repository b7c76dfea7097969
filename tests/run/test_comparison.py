"""Several runs side by side."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import NPG, REGISTRY
from agents.run import cli, statistics
from agents.run.comparison import normalized, pooled, sentence, told_apart
from agents.run.folder import EVALUATION_COLUMNS, RunConfig, RunFolder, append_row
from agents.run.options import RunOptions
from agents.run.statistics import Scored

A = np.array([[1.063, 0.934], [1.32, 1.052], [0.732, 1.181], [1.652, 1.474], [0.648, 0.367], [0.688, 1.021]])
B = np.array([[-0.563, 0.491], [-0.023, 0.234], [0.328, 0.442], [0.806, 1.121], [0.536, 1.283], [0.267, 0.776]])
"""Scores of 6 runs on 2 tasks."""


def test_the_numbers_are_rliables() -> None:
    # aggregate_iqm and probability_of_improvement of rliable 1.2.0
    assert statistics.iqm(A) == pytest.approx(0.9971666666666666, abs=1e-12)
    assert statistics.improvement(list(A.T), list(B.T))[0] == pytest.approx(0.7916666666666666, abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 32])
def test_the_interval_of_a_mean_and_the_interquartile_mean_are_scipys(n: int) -> None:
    from scipy.stats import bootstrap, trim_mean

    values = np.random.default_rng(n).normal(1000, 300, n)
    wanted = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert statistics.bootstrap_interval(values) == pytest.approx((wanted.low, wanted.high), rel=1e-14)
    assert statistics.iqm(values) == trim_mean(values, 0.25)


def test_an_interval_of_strata_draws_seeds_within_them() -> None:
    # Between the strata lie 100; a bootstrap across them would see that, one within them sees 0.1.
    rng = np.random.default_rng(0)
    low, high = statistics.stratified_interval(np.mean, rng.normal(0, 0.1, 40), rng.normal(100, 0.1, 40))
    half = 1.96 * 0.1 / 80**0.5
    assert (low, high) == pytest.approx((50 - half, 50 + half), abs=0.02)
    assert high - low == pytest.approx(2 * half, rel=0.25)


def test_an_interval_covers_what_it_should() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = statistics.difference(np.mean, [rng.normal(1, 1, 30)], [rng.normal(0, 1, 30)])
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_one_run_has_no_interval_and_ties_are_halves() -> None:
    assert np.isnan(statistics.stratified_interval(np.mean, np.ones(1))).all()
    assert statistics.improvement([np.array([1.0, 2.0])], [np.array([1.0, 0.0])])[0] == (0.5 + 1 + 1 + 1) / 4


def scored(group: str, seed: int, score: float, env: str = "Hopper-v5", **other: Any) -> Scored:
    values = {"algorithm": group, "steps": 1000, "seconds": 60.0, "episodes": 32, "interval": (score, score)}
    return Scored(path=f"{group}-{seed}", env=env, group=group, seed=seed, score=score, **(values | other))


def test_runs_of_one_algorithm_are_told_apart_by_what_differs_in_an_environment() -> None:
    shared = {"gamma": 0.99, "net_arch": (64, 64)}
    runs = [
        scored("", 0, 1.0, algorithm="npg", settings={**shared, "target_kl": 0.01}),
        scored("", 0, 1.0, algorithm="npg", settings={**shared, "target_kl": 0.02}),
        scored("", 0, 1.0, algorithm="ppo", settings=shared),
        scored("", 0, 1.0, algorithm="npg", env="Ant-v5", settings={**shared, "target_kl": 0.5}),
        scored("mine", 0, 1.0, algorithm="npg", settings={}),
    ]
    named = [run.group for run in told_apart(runs)]
    assert named == ["npg target_kl=0.01", "npg target_kl=0.02", "ppo", "npg", "mine"]


def test_scores_of_several_environments_are_between_the_first_policy_and_the_best_run() -> None:
    curve = {name: np.array([0.0, 1000.0]) for name in ("steps", "seconds")} | {"mean": np.array([10.0, 0.0])}
    runs = [scored("a", k, score, curve=curve) for k, score in enumerate((35.0, 60.0, 110.0))]
    assert normalized(runs)["a"]["Hopper-v5"].tolist() == [35.0, 60.0, 110.0]  # alone: returns
    both = [*runs, scored("a", 0, 3.0, env="Ant-v5", curve={})]
    assert normalized(both)["a"]["Hopper-v5"].tolist() == [0.25, 0.5, 1.0]
    assert pooled({"Hopper-v5": np.array([0.0, 0.5, 1.0, 5.0])})["iqm"] == 0.75


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (
            (9, 10, 11, 9, 10),
            (1, 2, 1, 2, 1),
            "^a is better than b on Hopper-v5: an IQM of 9.7 from 5 runs against",
        ),
        ((1, 2, 1, 2, 1), (9, 10, 11, 9, 10), "^b is better than a on Hopper-v5: .* probability 1.00"),
        ((1, 9, 2, 8, 5), (2, 8, 3, 9, 1), "^[ab] and [ab] cannot be told apart on Hopper-v5: "),
        ((9, 10, 11), (1, 2, 1), "Fewer than 5 seeds: such intervals are too narrow.$"),
        ((9,), (1, 2), "^a ended above b on Hopper-v5, but one seed says nothing of how runs differ: "),
    ],
)
def test_the_sentence_says_who_is_better_and_how_sure_that_is(a: Any, b: Any, said: str) -> None:
    import re

    scores = {name: {"Hopper-v5": np.array(x, dtype=float)} for name, x in (("a", a), ("b", b))}
    text = sentence("a", "b", scores)
    assert re.search(said, text), text
    assert "nan" not in text


def write_run(folder: Path, algorithm: str, seed: int, means: list[float], **changed: Any) -> Path:
    """A run's folder as training leaves it, without its agent."""
    run = RunOptions(env="Hopper-v5", steps=1_000_000, seed=seed, run_dir=str(folder))
    config = asdict(REGISTRY[algorithm].Config.of(changed))
    made = RunFolder.create(RunConfig(algorithm, run, config, dict.fromkeys(config, "default")), "train")
    for k, mean in enumerate(means):
        row = (k * 500_000, mean, mean, mean - 1, mean + 1, 8, 60.0 * k)
        append_row(made.evaluations, dict(zip(EVALUATION_COLUMNS, row, strict=True)))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in range(5):
        write_run(tmp_path / "runs" / "npg" / f"s{seed}", "npg", seed, [10.0, 500.0, 1000.0 + seed])
        write_run(tmp_path / "runs" / "ppo" / f"s{seed}", "ppo", seed, [10.0, 300.0, 600.0 + 10 * seed])
    write_run(tmp_path / "runs" / "ppo" / "s9", "ppo", 9, [])
    return tmp_path / "runs"


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_compare_writes_tables_files_and_a_sentence(
    runs: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"out.{name}" for name in (ending, "csv", "json")}
    options = ["--plot", str(files[ending]), "--csv", str(files["csv"]), "--json", str(files["json"])]
    assert cli.main(["compare", str(runs), *options]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "npg is better than ppo on Hopper-v5: an IQM of 1,002.0 from 5 runs against 620.0 from 5 runs" in out
    assert files[ending].read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")
    rows = list(csv.DictReader(files["csv"].open()))
    assert [(row["group"], row["score"]) for row in rows][:2] == [("npg", "1000.0"), ("npg", "1001.0")]
    found = json.loads(files["json"].read_text())
    assert len(found["runs"]) == 10
    assert found["groups"]["Hopper-v5"]["ppo"]["iqm"] == 620.0
    assert found["runs"][0]["curve"]["mean"] == [10.0, 500.0, 1000.0]
    assert cli.main(["compare", str(runs), "--csv", str(files["csv"])]) == 2


def test_groups_are_named_and_found_by_patterns(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["compare", f"first={runs}/npg/s[01]", f"rest={runs}/npg/s[234]", "--compare", "rest", "first"]) == 0
    )
    assert "rest is better than first" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["compare", str(runs), "--compare", "npg", "pqo"]) == 2
    assert "'pqo', which is no group and no run; did you mean 'ppo'?" in capsys.readouterr().err
    assert cli.main(["compare", f"{runs}/none*"]) == 2
    assert "There is no" in capsys.readouterr().err
    assert cli.main(["compare", f"{runs}/ppo/s9"]) == 1
    assert "no run with an evaluation" in capsys.readouterr().err


def test_evaluate_takes_several_and_compares_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        NPG("MlpPolicy", "InvertedPendulum-v5", seed=seed, num_envs=2, n_steps=8).save(tmp_path / f"agent{seed}")
    asked = ["--episodes", "3", "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert cli.main(["evaluate", f"{tmp_path}/agent*.zip", *asked]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    alone = []
    for seed in (0, 1):
        file = tmp_path / f"{seed}.json"
        assert cli.main(["evaluate", str(tmp_path / f"agent{seed}"), "--episodes", "3", "--json", str(file)]) == 0
        alone.append(json.loads(file.read_text())["returns"])
    assert [run["returns"] for run in found["runs"]] == alone
    assert found["groups"]["InvertedPendulum-v5"]["npg"]["mean"] == pytest.approx(np.mean(alone))
    capsys.readouterr()
    assert cli.main(["evaluate", f"{tmp_path}/agent*.zip", "--video", str(tmp_path / "film.mp4")]) == 2
    assert "--video films one run, and 2 are named" in capsys.readouterr().err
