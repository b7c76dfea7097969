"""Meta-optimization of a learning rate's start and decay: truncation prefers rates that decay too early.

The task of Vicol, Metz & Sohl-Dickstein 2021, section 5.2, on a smaller budget: scikit-learn's digits in place of
MNIST, two layers of 32 units in place of 100, T = Q = 400 in place of 5000, and 20 particles in place of 1000. K = 10,
σ = 0.1, Adam 1e-2 for (θ₀, θ₁) = log (initial rate, power). Reported is the mean training loss of whole episodes at θ,
over keys that the search never sees.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from agents.evolution.engine import Scheme
from benchmarks.common import context, panels, save, write
from benchmarks.digits import digits
from benchmarks.learning import Classification, LearningRateDecay
from benchmarks.search import METHODS, ascend, follow, mean_loss

NAME = "evolution/lr_decay"

THETA = torch.tensor([-3.0, 1.0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--particles", type=int, default=20)
    parser.add_argument("--horizon", type=int, default=400)
    parser.add_argument("--hidden", type=int, nargs="*", default=[32, 32])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    T = arguments.horizon
    task = LearningRateDecay(Classification(*digits(), tuple(arguments.hidden), batch_size=32), T, time_scale=T)
    adam = partial(torch.optim.Adam, lr=1e-2)
    rows = []
    for method, label in METHODS.items():
        scheme = Scheme.of(method, particles=arguments.particles, window=10, horizon=T)
        for seed in range(arguments.seeds):
            every = max(1, arguments.updates // 5)
            ascent = ascend(task, scheme, THETA, 0.1, adam, arguments.updates, seed)
            run = follow(ascent, THETA, every, partial(mean_loss, task, T))
            rows.append({"method": label, "seed": seed, **run})
            rate, power = torch.tensor(run["theta"][-1]).exp().tolist()
            print(
                f"{label:13} seed {seed}  loss {run['curve'][0][1]:.4f} -> {run['final_loss']:.4f}  rate {rate:.3f}"
                f"  power {power:.2f}  {run['inner_steps']:,} inner steps  {run['seconds']} s",
                flush=True,
            )
    print(write(NAME, {**context(), "settings": vars(arguments), "rows": rows}))
    plot(rows)


def plot(rows: list[dict]) -> None:
    figure, (curves, plane) = panels(2, 2, 5.2, 4.0)
    labels = list(METHODS.values())
    for row in rows:
        color, label = f"C{labels.index(row['method'])}", row["method"] if row["seed"] == 0 else None
        curves.plot(*zip(*row["curve"], strict=True), color=color, label=label)
        plane.plot(*zip(*row["theta"], strict=True), color=color, marker=".", label=label)
    curves.set(xlabel="updates", ylabel="mean training loss, nats", title="learning-rate decay on digits")
    plane.set(xlabel="θ₀, log initial rate", ylabel="θ₁, log power", title="paths")
    curves.legend(fontsize=8, frameon=False)
    print(save(figure, NAME))


if __name__ == "__main__":
    main()
