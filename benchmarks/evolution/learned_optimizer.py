"""A learned optimizer that trains a classifier: windows of 4 steps out of T.

The task of Vicol, Metz & Sohl-Dickstein 2021, section 5.4, on a smaller budget: scikit-learn's digits, one layer of 16
units, T = 200 in place of 1000 unless --horizon says otherwise, 20 particles. K = 4, σ = 0.05, Adam 3e-3 for the
58 weights of the optimizer. Reported is the mean training loss of whole episodes at θ, over keys that the search
never sees, beside SGD with momentum at the best of seven constant rates. Finished runs are kept by method, seed,
settings and versions, so that the table grows over several calls.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from agents.evolution.engine import Scheme
from benchmarks.common import context, keep, missing, panels, read, save, write
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
    parser.add_argument("--budget-minutes", type=float, default=60.0)
    parser.add_argument("--plot", action="store_true", help="only the figure of what is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Any] = {"runs": [], "sgd": {}, **(read(NAME) or {})}
    T = arguments.horizon
    problem = Classification(*digits(), (16,), batch_size=32)
    if not arguments.plot:
        if str(T) not in kept["sgd"]:
            kept["sgd"][str(T)] = tuned_sgd(problem, T)
            write(NAME, kept)
        settings = {name: getattr(arguments, name) for name in ("updates", "particles", "horizon")}
        keys = [{"method": method, "seed": seed, **settings} for seed in range(arguments.seeds) for method in METHODS]
        for key in missing(kept["runs"], keys, arguments.budget_minutes):
            run = {**key, **context(), **search(problem, **key)}
            keep(NAME, kept, run, key)
            print(
                f"{METHODS[key['method']]:13} seed {key['seed']}  loss {run['curve'][0][1]:.4f} -> "
                f"{run['final_loss']:.4f}  {run['inner_steps']:,} inner steps  {run['seconds']} s",
                flush=True,
            )
    for horizon, sgd in kept["sgd"].items():
        print(f"T = {horizon}: SGD with momentum, rate {sgd['rate']}: {sgd['loss']:.4f}")
    print(plot(kept))


def search(
    problem: Classification, method: str, seed: int, updates: int, particles: int, horizon: int
) -> dict[str, Any]:
    """Search once, and look at θ eight times on the way."""
    task = LearnedOptimizer(problem, horizon, scale=1e-2)
    theta = 0.1 * torch.randn(task.size, generator=torch.Generator().manual_seed(0))
    adam = partial(torch.optim.Adam, lr=3e-3)
    scheme = Scheme.of(method, particles=particles, window=4, horizon=horizon)
    ascent = ascend(task, scheme, theta, 0.05, adam, updates, seed)
    run = follow(ascent, theta, max(1, updates // 8), partial(mean_loss, task, horizon))
    del run["theta"]  # 58 weights at each point
    return run


def tuned_sgd(problem: Classification, horizon: int) -> dict[str, float]:
    """Return the best constant rate of SGD with momentum, and its loss."""
    task = LearningRateDecay(problem, horizon)
    # Without decay: the power is exp(-inf) = 0.
    rates = [(rate, torch.tensor([rate, 0.0]).log()) for rate in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)]
    loss, rate = min((mean_loss(task, horizon, decay), rate) for rate, decay in rates)
    return {"rate": rate, "loss": loss}


def plot(kept: dict[str, Any]) -> Any:
    horizons = sorted({run["horizon"] for run in kept["runs"]})
    figure, axes = panels(len(horizons), len(horizons), 5.2, 4.0)
    for axis, horizon in zip(axes, horizons, strict=True):
        for index, (method, label) in enumerate(METHODS.items()):
            mine = [run for run in kept["runs"] if (run["method"], run["horizon"]) == (method, horizon)]
            for number, run in enumerate(mine):
                name = None if number else label
                axis.plot(*zip(*run["curve"], strict=True), color=f"C{index}", label=name)
        axis.axhline(kept["sgd"][str(horizon)]["loss"], color="0.5", linestyle="--", label="tuned SGD with momentum")
        axis.set(xlabel="updates", ylabel="mean training loss, nats", yscale="log")
        axis.set_title(f"learned optimizer on digits, T = {horizon}", loc="left", fontsize=11)
    axes[0].legend(fontsize=8, frameon=False)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
