"""What spreading costs: two workers beside the serial executor on the same cores, and the bytes that cross.

PES with windows of K = 100 steps on HalfCheetah-v5 (128 pairs) and NPG on Hopper-v5 (its preset). The sides alternate,
iteration by iteration; medians count. The physics of the serial side steps on all cores, that of a worker on one.
Bytes are those that Ray's serializer makes of the calls and the results of one iteration, beside what the formulas of
docs/cluster.md say.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from agents import REGISTRY
from agents.cluster.executor import Executor, Maker, Serial, Work
from agents.cluster.ray_executor import Ray
from agents.rollout.spread import Spread
from benchmarks.common import context, write
from envs import make_vec

NAME = "cluster/overhead"
RUNS: dict[str, dict[str, Any]] = {
    "pes": {"env": "HalfCheetah-v5", "num_envs": 256, "n_steps": 100, "estimator": "pes"},
    "npg": {"env": "Hopper-v5"},
}


class Weighed:
    """An executor that says how long the calls and results of another are, serialized."""

    def __init__(self, executor: Ray) -> None:
        self.executor, self.threads = executor, executor.threads
        self.sent = self.received = 0
        self.serializer = executor.ray._private.worker.global_worker.get_serialization_context()

    def start(self, makers: Sequence[Maker]) -> None:
        self.executor.start(makers)

    def each(self, work: Work, *shared: Any, own: Any = None, alters: bool = True) -> list[Any]:
        results = self.executor.each(work, *shared, own=own, alters=alters)
        self.sent += self._bytes(shared) + sum(map(self._bytes, own or ()))
        self.received += sum(map(self._bytes, results))
        return results

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.executor.close()

    def _bytes(self, value: Any) -> int:
        return int(self.serializer.serialize(value).total_bytes)


def training(name: str, executor: Executor) -> Iterator[int]:
    """Train on and on."""
    kind, settings = REGISTRY[name], dict(RUNS[name])
    env_id = settings.pop("env")
    config = dict(kind.Config.of(settings) if name == "pes" else kind.preset(env_id))
    env = make_vec(env_id, config.pop("num_envs"), seed=1, autoreset=kind.autoreset)
    agent = kind(next(iter(kind.policy_aliases)), Spread(env, executor), seed=0, device="cpu", **config)
    return agent.iterations(10**8, log_interval=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", nargs="*", default=list(RUNS))
    arguments = parser.parse_args()
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    torch.set_num_threads(1)
    executor = Ray(arguments.workers)
    rows = []
    for name in arguments.runs:
        weighed = Weighed(executor)
        sides = {"serial": training(name, Serial()), "workers": training(name, weighed)}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for iteration in range(arguments.iterations + 3):
            if iteration == 3:  # the first ones warm up
                weighed.sent = weighed.received = 0
            for side, run in sides.items():
                begun = time.perf_counter()
                next(run)
                seconds[side].append(time.perf_counter() - begun)
        medians = {side: statistics.median(values[3:]) for side, values in seconds.items()}
        row = {
            "run": name,
            "seconds": medians,
            "overhead": medians["workers"] / medians["serial"] - 1,
            "bytes_sent": weighed.sent / arguments.iterations,
            "bytes_received": weighed.received / arguments.iterations,
        }
        print(row, flush=True)
        rows.append(row)
    executor.close()
    print(write(NAME, {"context": context(), "rows": rows}))


if __name__ == "__main__":
    main()
