"""Toy 2-D regression: truncation prefers learning rates that are small at once; PES and NRES find the good schedule.

T = 100, K = 10, N = 100, σ = 0.3 (truncated ES also 1.0), Adam 1e-2 with β₁ = 0.99, from θ = (-4, -4), as in Vicol,
Metz & Sohl-Dickstein 2021, figure 5. Reported is the loss of a whole episode at θ; ES makes a tenth of the updates, so
that it makes the same number of steps. Pairs start at staggered phases except in the second row.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from agents.evolution.engine import Scheme
from benchmarks.common import context, panels, save, write
from benchmarks.search import ascend, follow, loss_of
from benchmarks.toys import ToyRegression

NAME = "evolution/toy_regression"

TASK = ToyRegression()
THETA = torch.tensor([-4.0, -4.0], dtype=torch.float64)
RUNS = [
    ("PES", "pes", 0.3, True),
    ("PES in lockstep", "pes", 0.3, False),
    ("PES + analytic", "pes_analytic", 0.3, True),
    ("NRES", "nres", 0.3, True),
    ("GPES, M = 5", "gpes", 0.3, True),
    ("ES", "es", 0.3, True),
    ("truncated ES", "truncated_es", 0.3, True),
    ("truncated ES, σ = 1", "truncated_es", 1.0, True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, method, sigma, staggered in RUNS:
        whole = method == "es"
        scheme = Scheme.of(
            method,
            particles=100,
            window=100 if whole else 10,
            horizon=100,
            resample_every=5 if method == "gpes" else None,
            staggered=staggered,
        )
        adam = partial(torch.optim.Adam, lr=1e-2, betas=(0.99, 0.999))
        for seed in range(arguments.seeds):
            # An update of whole episodes takes the steps of ten windows.
            windows = 10 if whole else 1
            updates, every = arguments.updates // windows, 50 // windows
            run = follow(ascend(TASK, scheme, THETA, sigma, adam, updates, seed), THETA, every, episode_loss)
            run["curve"] = [(update * windows, loss) for update, loss in run["curve"]]
            halfway = dict(run["curve"]).get(arguments.updates // 2)
            rows.append({"method": name, "seed": seed, "sigma": sigma, "halfway_loss": halfway, **run})
            first, last = run["theta"][-1]
            print(
                f"{name:22} seed {seed}  halfway {halfway:7.1f}  final {run['final_loss']:7.1f}  "
                f"θ = ({first:.2f}, {last:.2f})  {run['inner_steps']:,} inner steps  {run['seconds']:.1f} s",
                flush=True,
            )
    print(write(NAME, {**context(), "grid_best": grid_best(), "rows": rows}))
    plot(rows)


def episode_loss(theta: torch.Tensor) -> float:
    return loss_of(TASK, theta, 100)


def grid(points: int = 101) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rates and the losses of their grid."""
    values = torch.linspace(-6, 4, points, dtype=torch.float64)
    theta = torch.cartesian_prod(values, values)
    keys = torch.zeros(len(theta), dtype=torch.int64)
    return values, -TASK.unroll(theta, TASK.init(keys, keys), 100)[1].view(points, points)


def grid_best() -> float:
    return grid()[1].min().item()


def plot(rows: list[dict]) -> None:
    figure, (curves, plane) = panels(2, 2, 5.2, 4.0)
    values, losses = grid()
    plane.contourf(values, values, losses.T.log10(), levels=20, cmap="Greys")
    names = [run[0] for run in RUNS]
    for row in rows:
        color, label = f"C{names.index(row['method'])}", row["method"] if row["seed"] == 0 else None
        curves.plot(*zip(*row["curve"], strict=True), color=color, alpha=0.8, label=label)
        plane.plot(*zip(*row["theta"], strict=True), color=color, alpha=0.8)
    curves.set(xlabel="updates (ES: tenths)", ylabel="loss of an episode", title="Toy 2-D regression")
    curves.legend(fontsize=8, frameon=False)
    plane.set(xlabel="θ₀, log first learning rate", ylabel="θ₁, log last learning rate", title="log₁₀ loss and paths")
    print(save(figure, NAME))


if __name__ == "__main__":
    main()
