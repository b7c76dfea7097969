"""On Ray's workers runs have the bits that they have here, whoever works, dies or hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from shard_runs import CASES, bits, made, train

from agents import PES
from agents.cluster import ray_executor
from agents.cluster.executor import Serial
from agents.cluster.ray_executor import ClusterError, Ray
from agents.run import cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray"),
    pytest.mark.filterwarnings("ignore:Worker .* is lost"),
    pytest.mark.timeout(900),  # each new worker imports for seconds, on a busy machine for minutes
]
ITERATIONS = 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def executors(ray: Any) -> Iterator[list[Ray]]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file
    found = [Ray(workers) for workers in (1, 2, 4)]
    yield found
    for executor in found:
        executor.close()


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_workers_gives_the_bits_of_the_serial_run(name: str, executors: list[Ray]) -> None:
    expected = bits(train(made(name, Serial()), ITERATIONS))
    for executor in executors:
        assert bits(train(made(name, executor), ITERATIONS)) == expected, executor.metrics()


@pytest.mark.parametrize("name", ["pes", "npg", "fomaml"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_workers_that_die_or_hang_change_nothing_and_are_counted(name: str, number: int, ray: Any) -> None:
    executor = Ray(2, timeout=10, states_every=3)

    def disturb(iteration: int) -> None:
        if iteration in (4, 9):  # the first with calls since the last states, the second with all shards moved before
            os.kill(executor._workers[-1].pid, number)

    expected = bits(train(made(name, Serial()), 12))
    with pytest.warns(RuntimeWarning, match=r"Worker \d+ is lost .*shards moved"):
        assert bits(train(made(name, executor), 12, disturb)) == expected
    metrics = executor.metrics()
    executor.close()
    assert metrics["cluster/lost_workers"] == 2
    assert metrics["cluster/moved_shards"] >= 2
    assert metrics["cluster/repeated_calls"] > 0


def test_what_breaks_off_within_an_iteration_is_saved_as_the_iteration_began(
    executors: list[Ray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executor = executors[1]
    agent, done = train(made("pes", executor), 3), executor._done

    def broken(calls: Any, alters: bool) -> list[Any]:
        if alters:
            executor._ask(0, calls[0])
            raise KeyboardInterrupt
        return done(calls, alters)

    agent.keeps_beginnings = True
    monkeypatch.setattr(executor, "_done", broken)
    with pytest.raises(KeyboardInterrupt):
        train(agent, 1)
    agent.save(tmp_path / "saved")
    monkeypatch.undo()
    loaded = PES.load(tmp_path / "saved", made("pes", executor).env, device="cpu")
    assert bits(train(loaded, 1)) == bits(train(made("pes", Serial()), 4))


def test_trials_of_a_study_are_those_of_one_process(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    words = ["tune", "npg", "--env", "InvertedPendulum-v5", "--steps", "1000", "--trials", "2", "--search"]
    values = []
    for name, more in (("ray", ["--executor", "ray", "--workers", "2"]), ("serial", ["--executor", "serial"])):
        assert cli.main([*words, "target_kl=0.001..0.1", "--study", str(tmp_path / name), *more]) == 0
        study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / name / 'study.db'}")
        values.append([trial.value for trial in study.trials])
    assert values[0] == values[1]


class Counts:
    """A shard that counts its calls."""

    calls = 0

    def state(self) -> int:
        return self.calls

    def restore(self, state: int) -> None:
        self.calls = state


def count_slowly_in(shard: Counts, pid: int) -> int:
    time.sleep(0.2 if os.getpid() == pid else 0.02)
    shard.calls += 1
    return shard.calls


def test_a_slow_node_has_fewer_shards_in_the_end(executors: list[Ray]) -> None:
    executor = executors[1]
    executor.start([Counts] * 6)
    slow, moved = executor._workers[0], executor.moved
    for done in range(1, 13):
        assert executor.each(count_slowly_in, slow.pid) == [done] * 6
    assert executor._loads()[slow] == 1
    assert executor.moved == moved + 2


def deadly_work(shard: Counts) -> int:
    shard.calls += 1
    if shard.calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return shard.calls


def test_what_no_worker_lives_through_is_given_up_in_words(
    executors: list[Ray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "MOST_ATTEMPTS", 2)
    executor = executors[0]
    executor.start([Counts])
    assert executor.each(deadly_work) == [1]
    with pytest.raises(ClusterError, match=r"2 workers were lost with the same call.*shard 0"):
        executor.each(deadly_work)


def test_the_example_for_ray_up_is_what_ray_takes_and_starts_its_workers() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (ROOT / "docs" / "cluster.md").read_text()
    config = prepare_config(yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]))
    validate_config(config)
    kinds = config["available_node_types"]
    assert {name: kind["min_workers"] for name, kind in kinds.items()} == {"head": 0, "workers": 8}
    assert all(kind["min_workers"] <= kind["max_workers"] <= config["max_workers"] for kind in kinds.values())
    assert "--include-dashboard=false" in config["head_start_ray_commands"][-1]


def test_an_error_of_the_environments_is_raised_as_it_is_and_not_repeated(executors: list[Ray]) -> None:
    agent = made("npg", executors[1])
    train(agent, 1)
    agent.policy.actor.net[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        train(agent, 1)
    assert executors[1].metrics()["cluster/lost_workers"] == 0


def test_a_killed_driver_is_gone_on_with_to_the_parameters_of_an_undisturbed_run(tmp_path: Path) -> None:
    words = "pes --env CartPole-v1 --num-envs 196 --n-steps 5 --eval-every 100000 --eval-episodes 1 --threads 1 --quiet"
    command = [sys.executable, "train.py", *words.split(), "--steps", "30000", "--checkpoint-every", "0", "--run-dir"]
    run, peaceful = tmp_path / "run", tmp_path / "peaceful"
    driver = subprocess.Popen([*command, str(run), "--executor", "ray", "--workers", "2"], cwd=ROOT)
    state, until = run / "state.json", time.monotonic() + 200
    while not (state.is_file() and json.loads(state.read_text())["steps"] > 5000) and time.monotonic() < until:
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    steps = PES.load(run / "checkpoints" / "last.zip").num_timesteps
    assert 0 < steps < 30000
    subprocess.run([sys.executable, "train.py", "resume", str(run), "--workers", "1", "--quiet"], cwd=ROOT, check=True)
    subprocess.run([*command, str(peaceful), "--executor", "serial"], cwd=ROOT, check=True)
    ends = (PES.load(folder / "checkpoints" / "last.zip") for folder in (run, peaceful))
    assert bits(next(ends)) == bits(next(ends))
