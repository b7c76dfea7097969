"""Workers that are killed, or hang, at random instants: does training end with the parameters of an undisturbed run?

Two kinds of runs are disturbed, PES on Hopper-v5 (windows whose pairs stay on the workers) and NPG. What happens to
them (--what):

    workers  are sent SIGKILL, some SIGSTOP, which is a process that hangs, whatever they do at that moment;
    nodes    of a head and two more, processes of their own on this machine: one is killed in the middle;
    driver   the process that trains is killed, and the run gone on with on other workers.

Results are kept under their names, so the parts may be run one by one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import agents
from agents import REGISTRY
from agents.cluster.executor import Executor, Serial
from agents.cluster.ray_executor import Ray
from agents.rollout.spread import Spread
from benchmarks.common import context, keep, read
from envs import make_vec

NAME = "cluster/failures"
RUNS: dict[str, dict[str, Any]] = {
    "pes": {"num_envs": 256, "n_steps": 20},
    "npg": {"num_envs": 128, "n_steps": 8, "net_arch": (16,)},
}


def made(name: str, executor: Executor) -> Any:
    """Make the agent of a run."""
    kind, settings = REGISTRY[name], dict(RUNS[name])
    env = make_vec("Hopper-v5", settings.pop("num_envs"), seed=1, autoreset=kind.autoreset)
    return kind(next(iter(kind.policy_aliases)), Spread(env, executor), seed=0, device="cpu", **settings)


def parameters(agent: Any) -> bytes:
    """Give the bits of all that was learned."""
    state = torch.cat([x.flatten().double() for x in agent.policy.state_dict().values()])
    return bytes(state.numpy().tobytes())


class Disturber(threading.Thread):
    """Kills and stops workers of an executor at random instants, the next one after an iteration has ended at least."""

    agent: Any

    def __init__(self, executor: Ray, kills: int, hangs: int, seconds: float, seed: int = 0) -> None:
        super().__init__(daemon=True)
        self.executor, self.random = executor, random.Random(seed)
        self.signals = [signal.SIGKILL] * kills + [signal.SIGSTOP] * hangs
        self.random.shuffle(self.signals)
        self.seconds = seconds

    def run(self) -> None:
        sent: set[int] = set()
        for number in self.signals:
            iteration = self.agent.iteration
            while iteration == self.agent.iteration:
                time.sleep(0.01)
            time.sleep(self.random.expovariate(1 / self.seconds))
            while not (pids := {worker.pid for worker in list(self.executor._workers)} - sent):
                time.sleep(0.01)
            pid = self.random.choice(sorted(pids))
            sent.add(pid)
            os.kill(pid, number)


def disturbed(name: str, executor: Ray, disturber: Any) -> dict[str, Any]:
    """Train until nothing disturbs any more and a while longer, and once more in peace."""
    agent, begun, after = made(name, executor), time.perf_counter(), 5
    disturber.agent = agent
    disturber.start()
    for _ in agent.iterations(10**8, log_interval=None):
        after -= not disturber.is_alive()
        if after <= 0:
            break
    seconds, metrics = time.perf_counter() - begun, executor.metrics()
    peaceful = made(name, Serial())
    for done in peaceful.iterations(10**8, log_interval=None):
        if done == agent.iteration:
            break
    same = parameters(agent) == parameters(peaceful)
    print(f"{name}: {agent.iteration} iterations in {seconds:.0f} s, {metrics}, same parameters: {same}", flush=True)
    return {"run": name, "iterations": agent.iteration, "seconds": seconds, "same": same, **metrics}


def lost_node(name: str) -> dict[str, Any]:
    """Train on a head and two further nodes, one of which is killed on the way."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    executor = Ray(3, cluster.address, timeout=30)

    def end_one() -> None:
        time.sleep(5)
        cluster.remove_node(nodes[0], allow_graceful=False)

    try:
        return disturbed(name, executor, threading.Thread(target=end_one))
    finally:
        executor.close()
        cluster.shutdown()


def lost_workers(name: str, arguments: Any) -> dict[str, Any]:
    """Train on workers that are killed, or hang, at random instants."""
    executor = Ray(arguments.workers, arguments.ray_address, timeout=arguments.timeout, states_every=8)
    try:
        return disturbed(name, executor, Disturber(executor, arguments.kills, arguments.hangs, arguments.seconds))
    finally:
        executor.close()


def lost_driver(name: str, steps: int = 40_000) -> dict[str, Any]:
    """Kill train.py in the middle and go on with another number of workers, beside a run in peace."""
    settings = " ".join(f"--{key.replace('_', '-')} {x}" for key, x in RUNS[name].items() if isinstance(x, int))
    options = f"{name} --env Hopper-v5 {settings} --steps {steps} --eval-every {steps} --eval-episodes 1 --threads 1"
    options += " --checkpoint-every 0 --quiet"
    train = [sys.executable, "-m", "agents.run"]
    with tempfile.TemporaryDirectory() as folder:
        begin = [*train, "train", *options.split(), "--run-dir"]
        run, peaceful = Path(folder, "run"), Path(folder, "peaceful")
        driver = subprocess.Popen([*begin, str(run), "--executor", "ray", "--workers", "2"])
        state = run / "state.json"
        while not (state.is_file() and json.loads(state.read_text())["steps"] > steps / 4):
            time.sleep(0.02)
        driver.kill()
        driver.wait()
        at = agents.load(run / "checkpoints" / "last.zip").num_timesteps
        subprocess.run([*train, "resume", str(run), "--workers", "1", "--quiet"], check=True)
        subprocess.run([*begin, str(peaceful), "--executor", "serial"], check=True)
        ends = [agents.load(each / "checkpoints" / "last.zip") for each in (run, peaceful)]
    same = parameters(ends[0]) == parameters(ends[1])
    print(f"{name}: killed at {at} of {ends[0].num_timesteps} steps, same parameters: {same}", flush=True)
    return {"run": name, "killed_at": at, "steps": ends[0].num_timesteps, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="*", default=["workers", "nodes", "driver"])
    parser.add_argument("--runs", nargs="*", default=list(RUNS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--hangs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--ray-address", help="of a cluster that runs, for --what workers")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds after which a worker counts as hung")
    parser.add_argument("--seconds", type=float, default=2.0, help="mean time between two disturbances")
    arguments = parser.parse_args()
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    about = context()
    happens = {"workers": lambda name: lost_workers(name, arguments), "nodes": lost_node, "driver": lost_driver}
    for what in arguments.what:
        for name in arguments.runs:
            row = {"what": what, **happens[what](name), **about}
            keep(NAME, read(NAME) or {"runs": []}, row, ("what", "run"))


if __name__ == "__main__":
    main()
