"""Parameters after 20 iterations of every algorithm, on 1, 2 and 4 local workers of Ray: are they the serial run's?

Small runs of some shards each, of which the last one is not full; compared are the bits of all that a policy holds.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
import warnings
from typing import Any

import torch

from agents import REGISTRY
from agents.cluster.executor import Executor, Serial
from agents.cluster.ray_executor import Ray
from agents.rollout.spread import Spread
from benchmarks.common import code_version, context, keep, read
from envs import make_vec

NAME = "cluster/same_bits"
HOPPER: dict[str, Any] = {"env": "Hopper-v5", "num_envs": 100, "n_steps": 8, "net_arch": (8,)}
TASKS = {"env": "families/Point-v0", "horizon": 10, "meta_batch_size": 16, "num_envs": 128, "n_steps": 10}
RUNS: dict[str, dict[str, Any]] = {
    "npg": HOPPER,
    "trpo": HOPPER,
    "copos": HOPPER,
    "ppo": {**HOPPER, "batch_size": 200, "n_epochs": 2},
    "pes": {"env": "Hopper-v5", "num_envs": 196, "n_steps": 5},
    "reptile": {**TASKS, "net_arch": (8,)},
    "fomaml": {**TASKS, "net_arch": (8,)},
    "maml": {**TASKS, "net_arch": (8,), "inner_steps": 2},
}


def trained(name: str, executor: Executor, iterations: int) -> Any:
    """Train an algorithm for some iterations."""
    kind, settings = REGISTRY[name], dict(RUNS[name])
    of_env = {key: settings.pop(key) for key in ("horizon",) if key in settings}
    env = make_vec(settings.pop("env"), settings.pop("num_envs"), seed=1, autoreset=kind.autoreset, **of_env)
    agent = kind(next(iter(kind.policy_aliases)), Spread(env, executor), seed=0, device="cpu", **settings)
    for done in agent.iterations(10**8, log_interval=None):
        if done == iterations:
            break
    return agent


def digest(agent: Any) -> str:
    """Give the SHA-256 of all that a policy holds, its statistics of observations too."""
    sha = hashlib.sha256()
    for name, values in sorted(agent.policy.state_dict().items()):
        sha.update(name.encode() + values.contiguous().numpy().tobytes())
    return sha.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--ray-address", help="of a cluster that runs, in place of one for each number of workers")
    parser.add_argument("--runs", nargs="*", default=list(RUNS))
    arguments = parser.parse_args()
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    about = {"iterations": arguments.iterations, "code": code_version(), **context()}
    found: dict[str, dict[str, str]] = {}
    for workers in (None, *arguments.workers):
        executor: Executor = Serial() if workers is None else Ray(workers, arguments.ray_address)
        for name in arguments.runs:
            begun = time.perf_counter()
            agent = trained(name, executor, arguments.iterations)
            row = found.setdefault(name, {})
            row["serial" if workers is None else f"{workers} workers"] = digest(agent)
            seconds, same, shards = time.perf_counter() - begun, len(set(row.values())) == 1, agent.env.vector.shards
            print(f"{name}: {workers or 'no'} workers, {len(shards)} shards, {seconds:.1f} s, same: {same}", flush=True)
            keep(NAME, read(NAME) or {"runs": []}, {"run": name, "same": same, "sha256": row, **about}, ("run",))
        executor.close()


if __name__ == "__main__":
    main()
