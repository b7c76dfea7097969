"""How an iteration's time would grow with workers: a discrete simulation of 10 to 10,000, with stragglers and failures.

It models `Ray`: the driver sends a call to each shard and takes each result in, one after the other, then updates; a
node fetches the policy once; a worker does its shards one after the other. Measured on one core are the seconds of a
shard's call, of the update for each shard and of the driver for a call, and the bytes. Assumed are the network, a
lognormal spread of the calls' seconds, and workers that die at a constant rate: their shards are done again by others,
after half of the calls between two states on average. Each worker has as many shards however many there are (weak
scaling), so a flat curve is ideal.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks.common import context, panels, save, write

NAME = "cluster/scaling"
WORKERS = (10, 30, 100, 300, 1000, 3000, 10_000)
KINDS: dict[str, dict[str, float]] = {
    "pes, HalfCheetah-v5, K = 100": {"call": 0.38, "update": 0.0007, "sent": 2_500, "received": 13_900, "calls": 2},
    "es, HalfCheetah-v5, 1000 steps": {"call": 3.8, "update": 0.0007, "sent": 2_500, "received": 13_900, "calls": 2},
    "npg, Hopper-v5, its preset": {"call": 0.37, "update": 0.02, "sent": 21_800, "received": 208_700, "calls": 1},
}
"""Measured on one core: seconds of a shard's iteration, and of the update for each; bytes to a node and from a shard;
and calls to a shard in an iteration."""


def simulated(kind: dict[str, float], workers: int, a: Any, random: np.random.Generator) -> float:
    """Give the seconds of one iteration."""
    shards, nodes = workers * a.shards, -(-workers // a.workers_of_node)
    told = nodes * kind["sent"] / a.bandwidth + np.arange(1, shards + 1) * a.driver  # calls are at their workers
    seconds = kind["call"] * random.lognormal(-(a.spread**2) / 2, a.spread, shards)
    dead = random.random(workers) < 1 - np.exp(-a.shards * kind["call"] / (a.hours * 3600))
    free, done = np.zeros(workers), np.empty(shards)
    for shard in range(shards):  # dealt out in blocks, as the executor does
        worker = shard // a.shards
        free[worker] = done[shard] = max(free[worker], told[shard]) + seconds[shard]
    for worker in np.flatnonzero(dead):
        own = slice(worker * a.shards, (worker + 1) * a.shards)
        noticed = done[own].mean() + a.notice
        # Repeats go to as many others as there are shards.
        done[own] = noticed + (1 + a.states_every / 2) * kind["call"] * (1 + random.random(a.shards))
    at, taken = 0.0, a.driver + kind["received"] / a.bandwidth
    for arrival in np.sort(done):
        at = max(at, arrival) + taken
    return at + (kind["calls"] - 1) * shards * 2 * a.driver + shards * kind["update"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--shards", type=int, default=2, help="of a worker")
    parser.add_argument("--driver", type=float, default=4e-4, help="seconds for a call, and for its result; measured")
    parser.add_argument(
        "--bandwidth", type=float, default=2.5e8, help="bytes a second that the driver takes in; measured"
    )
    parser.add_argument("--workers-of-node", type=int, default=16)
    parser.add_argument("--spread", type=float, default=0.15, help="of the logarithm of a call's seconds")
    parser.add_argument("--hours", type=float, default=500.0, help="mean life of a worker")
    parser.add_argument("--notice", type=float, default=1.0, help="seconds until a death is known")
    parser.add_argument("--states-every", type=int, default=16)
    arguments = parser.parse_args()
    rows = []
    figure, axes = panels(len(KINDS), 3, width=4.2)
    for (name, kind), axis in zip(KINDS.items(), axes, strict=True):
        ideal = arguments.shards * kind["call"]
        found = []
        for workers in WORKERS:
            random = np.random.default_rng(workers)
            times = [simulated(kind, workers, arguments, random) for _ in range(arguments.iterations)]
            share = ideal / np.array(times)
            found.append((float(np.median(share)), *map(float, np.quantile(share, (0.05, 0.95)))))
            rows.append({"kind": name, "workers": workers, "seconds": float(np.median(times)), "efficiency": found[-1]})
            print(f"{name}: {workers} workers, {np.median(times):.2f} s, efficiency {found[-1][0]:.2f}", flush=True)
        middle, low, high = np.array(found).T
        axis.semilogx(WORKERS, middle, marker="o", label="median iteration")
        axis.fill_between(WORKERS, low, high, alpha=0.2, label="5 to 95 % of iterations")
        axis.set(
            title=name, xlabel=f"workers, {arguments.shards} shards each", ylabel="share of the workers' time used"
        )
        axis.set_ylim(0, 1.05)
        axis.legend()
    save(figure, NAME)
    print(write(NAME, {"context": context(), "assumed": vars(arguments), "measured": KINDS, "rows": rows}))


if __name__ == "__main__":
    main()
