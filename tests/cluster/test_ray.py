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
from shard_runs import CASES, bits, made, train

from agents import PES
from agents.cluster.executor import Serial
from agents.cluster.ray_executor import Ray

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray"), pytest.mark.filterwarnings("ignore:Worker .* is lost")]
ITERATIONS = 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def executors(ray: Any) -> Iterator[list[Ray]]:
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
