"""A learned optimizer that trains a classifier: windows of 4 steps out of T.

The task of Vicol, Metz & Sohl-Dickstein 2021, section 5.4, on a smaller budget: scikit-learn's digits, one layer of 16
units, T = 200 in place of 1000 unless --horizon says otherwise, 20 particles. K = 4, σ = 0.05, Adam 3e-3 for the
58 weights of the optimizer. Reported is the mean training loss of whole episodes at θ, over keys that the search
never sees, beside SGD with momentum at the best of seven constant rates.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from agents.evolution.engine import Scheme
from benchmarks.common import context, panels, save, write
from benchmarks.digits import digits
from benchmarks.learning import Classification, LearnedOptimizer, LearningRateDecay
from benchmarks.search import METHODS, ascend, follow, mean_loss

NAME = "evolution/learned_optimizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--particles", type=int, default=20)
    parser.add_argument("--horizon", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    T = arguments.horizon
    problem = Classification(*digits(), (16,), batch_size=32)
    task = LearnedOptimizer(problem, T, scale=1e-2)
    theta = 0.1 * torch.randn(task.size, generator=torch.Generator().manual_seed(0))
    # Without decay: the power is exp(-inf) = 0.
    rates = [(rate, torch.tensor([rate, 0.0]).log()) for rate in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)]
    sgd, rate = min((mean_loss(LearningRateDecay(problem, T), T, decay), rate) for rate, decay in rates)
    print(f"SGD with momentum, rate {rate}: {sgd:.4f}")
    adam = partial(torch.optim.Adam, lr=3e-3)
    rows = []
    for method, label in METHODS.items():
        scheme = Scheme.of(method, particles=arguments.particles, window=4, horizon=T)
        for seed in range(arguments.seeds):
            every = max(1, arguments.updates // 8)
            ascent = ascend(task, scheme, theta, 0.05, adam, arguments.updates, seed)
            run = follow(ascent, theta, every, partial(mean_loss, task, T))
            del run["theta"]  # 58 weights at each point
            rows.append({"method": label, "seed": seed, **run})
            print(
                f"{label:13} seed {seed}  loss {run['curve'][0][1]:.4f} -> {run['final_loss']:.4f}"
                f"  {run['inner_steps']:,} inner steps  {run['seconds']} s",
                flush=True,
            )
    results = {"settings": vars(arguments), "sgd": {"rate": rate, "loss": sgd}, "rows": rows}
    print(write(NAME, {**context(), **results}))
    plot(rows, sgd)


def plot(rows: list[dict], sgd: float) -> None:
    figure, (axis,) = panels(1, 1, 5.2, 4.0)
    labels = list(METHODS.values())
    for row in rows:
        label = row["method"] if row["seed"] == 0 else None
        axis.plot(*zip(*row["curve"], strict=True), color=f"C{labels.index(row['method'])}", label=label)
    axis.axhline(sgd, color="0.5", linestyle="--", label="tuned SGD with momentum")
    axis.set(xlabel="updates", ylabel="mean training loss, nats", title="learned optimizer on digits")
    axis.legend(fontsize=8, frameon=False)
    print(save(figure, NAME))


if __name__ == "__main__":
    main()
