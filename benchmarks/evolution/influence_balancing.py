"""Influence balancing: only unbiased gradients find θ* = -1/6; truncation has the wrong sign.

Each window of one step scores its last state; SGD with learning rate 1e-4 (UORO: 1e-5) from θ = 0.5, as in Vicol,
Metz & Sohl-Dickstein 2021, figure 4. Reported is the loss after 500 steps with the final θ; at the start it is 8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from agents.evolution.engine import Scheme
from benchmarks.baselines import Rtrl, Uoro, rtrl, tbptt, uoro
from benchmarks.common import context, panels, save, write
from benchmarks.search import ascend, finite, loss_of
from benchmarks.toys import InfluenceBalancing

NAME = "evolution/influence_balancing"

TASK = InfluenceBalancing()
THETA = torch.tensor([0.5], dtype=torch.float64)
SIGMA, RATE = 0.1, 1e-4

Run = Iterator[tuple[int, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--uoro-updates", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    n, seeds = arguments.updates, range(arguments.seeds)
    plan: dict[str, tuple[Callable[[int], Run], range]] = {
        "RTRL": (partial(by_rtrl, n), range(1)),
        "PES, N = 1000": (partial(by_search, "pes", 1000, n), seeds),
        "PES, N = 100": (partial(by_search, "pes", 100, n), seeds),
        "PES, N = 10": (partial(by_search, "pes", 10, n), seeds),
        "truncated ES, N = 1000": (partial(by_search, "truncated_es", 1000, n), seeds),
        "TBPTT-1": (partial(by_tbptt, 1, n), range(1)),
        "TBPTT-10": (partial(by_tbptt, 10, n), range(1)),
        "TBPTT-100": (partial(by_tbptt, 100, n), range(1)),
        "UORO, learning rate 1e-5": (partial(by_uoro, arguments.uoro_updates), range(1)),
    }
    rows = []
    for method, (run, method_seeds) in plan.items():
        for seed in method_seeds:
            begin, curve = time.perf_counter(), [(0, loss_of(TASK, THETA, 500))]
            for update, theta in run(seed):
                if update % 100 == 0:
                    curve.append((update, loss_of(TASK, theta, 500)))
                    if finite(curve[-1][1]) is None:
                        break
            seconds = time.perf_counter() - begin
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "seconds": round(seconds, 2),
                    "updates": curve[-1][0],
                    "final_loss": finite(curve[-1][1]),
                    "curve": [(update, finite(loss)) for update, loss in curve],
                }
            )
            early = dict(curve).get(n, float("nan"))
            print(
                f"{method:26} seed {seed}  after {n} updates: {early:.3g}  after {curve[-1][0]}: {curve[-1][1]:.3g}"
                f"  {seconds:.1f} s",
                flush=True,
            )
    print(write(NAME, {**context(), "sigma": SIGMA, "learning_rate": RATE, "rows": rows}))
    plot(rows)


def by_search(method: str, particles: int, updates: int, seed: int) -> Run:
    scheme = Scheme.of(method, particles=particles, window=1)
    sgd = partial(torch.optim.SGD, lr=RATE)
    return ((update, theta) for update, theta, _ in ascend(TASK, scheme, THETA, SIGMA, sgd, updates, seed))


def by_tbptt(window: int, updates: int, seed: int) -> Run:
    theta, state = THETA, first_state()
    for update in range(1, updates + 1):
        gradient, _, state = tbptt(TASK, theta, state, window)
        theta = theta + RATE * gradient
        yield update, theta


def by_rtrl(updates: int, seed: int) -> Run:
    theta, carried = THETA, Rtrl.start(first_state(), THETA)
    for update in range(1, updates + 1):
        gradient, _, carried = rtrl(TASK, theta, carried, 1)
        theta = theta + RATE * gradient
        yield update, theta


def by_uoro(updates: int, seed: int) -> Run:
    theta, carried = THETA, Uoro.start(first_state(), THETA)
    for update in range(1, updates + 1):
        gradient, _, carried = uoro(TASK, theta, carried, 1, seed)
        theta = theta + 0.1 * RATE * gradient
        yield update, theta


def first_state() -> dict[str, Tensor]:
    zero = torch.zeros(1, dtype=torch.int64)
    return TASK.init(zero, zero)


def plot(rows: list[dict]) -> None:
    figure, (axis,) = panels(1, 1, 7.5, 4.5)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for row in rows:
        points = [(update, loss) for update, loss in row["curve"] if loss is not None and update <= 3000]
        color = f"C{methods.index(row['method'])}"
        axis.semilogy(
            *zip(*points, strict=True), color=color, alpha=0.8, label=row["method"] if row["seed"] == 0 else None
        )
    axis.set(xlabel="updates", ylabel="loss after 500 steps", ylim=(1e-17, 1e6), title="Influence balancing")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    print(save(figure, NAME))


if __name__ == "__main__":
    main()
