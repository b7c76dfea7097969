"""Meta-optimization of a learning rate's start and decay: truncation prefers rates that decay too early.

The task of Vicol, Metz & Sohl-Dickstein 2021, section 5.2, on a smaller budget: scikit-learn's digits in place of
MNIST (four fifths to train on, a fifth for validation), one layer of 32 units in place of two of 100, T = Q = 300 in
place of 5000, and 16 particles in place of 1000. K = 10, σ = 0.1, and θ = (θ₀, θ₁) = log (initial rate, power).

Every method makes the same number of inner steps. Beside the evolution strategies stand: the gradient of whole
unrolled episodes, 5 an update; the gradient truncated to windows, of as many episodes as there are particles; and
random search, which draws θ uniformly in the box that is drawn and keeps the one with the least loss in an episode of
its own. Adam's step is such that all others could go equally far, 4 in each of θ.

Reported are, of whole episodes at θ whose keys no search sees, the mean training loss over the episode and the
validation accuracy at its end. Finished runs are kept by method, seed, settings and versions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import noise
from agents.evolution.engine import Scheme
from benchmarks.common import context, keep, missing, panels, read, save, write
from benchmarks.digits import digits
from benchmarks.learning import Classification, LearningRateDecay
from benchmarks.search import METHODS, ascend, finite, follow

NAME = "evolution/lr_decay"

THETA = torch.tensor([-5.0, 1.5])
BOX = ((-7.0, 1.0), (-3.0, 3.0))
REACH = 4.0
WINDOW, SIGMA, EPISODES = 10, 0.1, 5
LABELS = METHODS | {"unrolled": "unrolled gradient", "tbptt": "truncated gradient", "random": "random search"}
KEYS = [2**31 + 777 * i for i in range(4)]
"""Of episodes that no search sees."""
Ascent = Iterator[tuple[int, Tensor, Any]]


class Search:
    """The task, and how each method searches with so many inner steps."""

    def __init__(self, horizon: int, particles: int, updates: int) -> None:
        inputs, labels = digits()
        n = len(labels) * 4 // 5
        self.problem = Classification(inputs[:n], labels[:n], (32,), batch_size=32)
        self.held_out = inputs[n:], labels[n:]
        self.T, self.particles, self.updates = horizon, particles, updates
        self.task = LearningRateDecay(self.problem, horizon, time_scale=horizon)
        self.budget = updates * particles * WINDOW

    def ascent(self, method: str, seed: int) -> tuple[Ascent, int]:
        """Return updates of θ, and how many there will be."""
        if method == "random":
            draws = self.budget // self.T
            return self.draw(draws, seed), draws
        if method == "unrolled":
            updates = self.budget // (EPISODES * self.T)
            return self.descend(EPISODES, self.T, updates, seed), updates
        if method == "tbptt":
            return self.descend(self.particles, WINDOW, self.updates, seed), self.updates
        scheme = Scheme.of(method, particles=self.particles, window=WINDOW, horizon=self.T)
        # Truncated ES unrolls the mean parameters too.
        updates = self.updates * 2 // len(scheme.signs)
        adam = partial(torch.optim.Adam, lr=REACH / updates)
        return ascend(self.task, scheme, THETA, SIGMA, adam, updates, seed), updates

    def descend(self, episodes: int, window: int, updates: int, seed: int) -> Ascent:
        """Follow the gradient of a window of several episodes, which go on in the next one, or begin anew."""
        theta, keys, state = THETA.clone(), noise.stream(seed, "episode", 0), None
        adam = torch.optim.Adam([theta], lr=REACH / updates)
        for update in range(1, updates + 1):
            if state is None:
                state = self.task.init(torch.from_numpy(keys.integers(2**31, size=episodes)), torch.arange(episodes))
            rows = theta.expand(episodes, -1).clone().requires_grad_()
            state, score, ended = self.task.unroll(rows, state, window)
            (gradient,) = torch.autograd.grad(-score.sum(), rows)
            theta.grad = gradient.mean(0)
            adam.step()
            state = None if ended.any() else {name: value.detach() for name, value in state.items()}
            yield update, theta, SimpleNamespace(steps=torch.tensor(episodes * window))

    @torch.no_grad()
    def draw(self, draws: int, seed: int) -> Ascent:
        """Draw θ uniformly in the box; gives the best one so far."""
        generator = noise.stream(seed, "episode", 0)
        (low, high), keys = np.array(BOX).T, torch.from_numpy(generator.integers(2**31, size=draws))
        thetas = torch.from_numpy(generator.uniform(low, high, (draws, 2))).float()
        scores = self.task.unroll(thetas, self.task.init(keys, torch.arange(draws)), self.T)[1]
        scores = scores.where(scores.isfinite(), -torch.inf)  # as bad as can be where it diverged
        for update in range(1, draws + 1):
            yield update, thetas[scores[:update].argmax()], SimpleNamespace(steps=torch.tensor(self.T))

    @torch.no_grad()
    def measure(self, theta: Tensor, keys: list[int]) -> tuple[Tensor, Tensor]:
        """Return the mean training loss and the final validation accuracy [n] at each θ [n, 2], means over episodes."""
        rows, n = theta.repeat_interleave(len(keys), 0), len(theta)
        state = self.task.init(torch.tensor(keys * n), torch.arange(len(rows)))
        state, scores, _ = self.task.unroll(rows, state, self.T)
        inputs, labels = self.held_out
        right = [
            (self.problem.logits(weights, inputs.expand(len(weights), -1, -1)).argmax(-1) == labels).float().mean(1)
            for weights in state["weights"].split(64)
        ]
        return (-scores / self.T).view(n, -1).mean(1), torch.cat(right).view(n, -1).mean(1)

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Search once, and look at θ ten times on the way."""
        accuracies: list[float] = []

        def look(theta: Tensor) -> float:
            loss, accuracy = self.measure(theta[None], KEYS)
            accuracies.append(round(accuracy.item(), 4))
            return loss.item()

        updates, count = self.ascent(method, seed)
        found = follow(updates, THETA, max(1, count // 10), look)
        each = found["inner_steps"] / count
        found["curve"] = [
            [round(update * each), loss, accuracy]
            for (update, loss), accuracy in zip(found["curve"], accuracies, strict=True)
        ]
        return {**found, "accuracy": accuracies[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--horizon", type=int, default=300)
    parser.add_argument("--budget-minutes", type=float, default=60.0)
    parser.add_argument("--plot", action="store_true", help="only the table and the figure of what is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: getattr(arguments, name) for name in ("horizon", "particles", "updates")}
    search = Search(**settings)
    kept: dict[str, Any] = {"runs": [], "surface": None, **(read(NAME) or {})}
    keys = [
        {"method": method, "seed": seed, **settings} for seed in range(arguments.seeds) for method in arguments.methods
    ]
    if not arguments.plot:
        for key in missing(kept["runs"], keys, arguments.budget_minutes):
            found = {**key, **context(), **search.run(key["method"], key["seed"])}
            keep(NAME, kept, found, key)
            rate, power = torch.tensor(found["theta"][-1]).exp().tolist()
            print(
                f"{LABELS[key['method']]:18} seed {key['seed']}  loss {found['final_loss']:.4f}  accuracy "
                f"{found['accuracy']:.4f}  rate {rate:.3f}  power {power:.2f}  {found['inner_steps']:,} inner steps  "
                f"{found['seconds']} s",
                flush=True,
            )
        if kept["surface"] is None or kept["surface"]["horizon"] != search.T:
            kept["surface"] = surface(search)
            write(NAME, kept)
    runs = [run for run in kept["runs"] if {name: run[name] for name in settings} == settings]
    table(runs)
    print(plot(runs, kept["surface"]))


def surface(search: Search, points: int = 25) -> dict[str, Any]:
    """Measure losses and accuracies on a grid of θ."""
    axes = [np.linspace(low, high, points) for low, high in BOX]
    theta = torch.cartesian_prod(*(torch.from_numpy(axis).float() for axis in axes))
    parts = [search.measure(rows, KEYS[:2]) for rows in theta.split(64)]
    loss, accuracy = (torch.cat(part) for part in zip(*parts, strict=True))
    best = loss.where(loss.isfinite(), torch.inf).argmin()
    return {
        "horizon": search.T,
        "axes": [axis.tolist() for axis in axes],
        "loss": [finite(round(value, 4)) for value in loss.tolist()],
        "accuracy": [round(value, 4) for value in accuracy.tolist()],
        "best": {"theta": theta[best].tolist(), "loss": loss[best].item(), "accuracy": accuracy[best].item()},
    }


def table(runs: list[dict[str, Any]]) -> None:
    for method, label in LABELS.items():
        mine = [run for run in runs if run["method"] == method]
        if mine:
            ends = " ".join(f"{run['final_loss']:.3f}/{run['accuracy']:.3f}" for run in mine)
            print(f"{label:18} {ends}  {np.median([run['seconds'] for run in mine]):.0f} s")


def plot(runs: list[dict[str, Any]], ground: dict[str, Any]) -> Any:
    figure, (losses, accuracies, plane) = panels(3, 3, 5.0, 4.0)
    shape = tuple(len(axis) for axis in ground["axes"])
    heights = np.array([np.nan if value is None else value for value in ground["loss"]]).reshape(shape)
    best = ground["best"]
    drawn = plane.contourf(*ground["axes"], np.minimum(heights, 2.5).T, levels=20, cmap="Greys")
    figure.colorbar(drawn, ax=plane, label="mean training loss, nats (white: least; cut at 2.5)")
    plane.plot(*best["theta"], marker="*", markersize=12, color="black", linestyle="")
    for index, (method, label) in enumerate(LABELS.items()):
        mine = [run for run in runs if run["method"] == method]
        if not mine:
            continue
        steps = [point[0] for point in mine[0]["curve"]]
        for axis, place in ((losses, 1), (accuracies, 2)):
            values = np.array([[point[place] for point in run["curve"]] for run in mine], dtype=float)
            axis.plot(steps, values.mean(0), color=f"C{index}", label=label)
            axis.fill_between(steps, values.min(0), values.max(0), color=f"C{index}", alpha=0.15, linewidth=0)
        for run in mine:
            path = run["theta"][1:] if method == "random" else run["theta"]
            plane.plot(*zip(*path, strict=True), color=f"C{index}", marker=".", markersize=4, linewidth=1)
            plane.plot(*path[-1], color=f"C{index}", marker="o", markeredgecolor="black")
    for axis, key in ((losses, "loss"), (accuracies, "accuracy")):
        axis.axhline(best[key], color="0.4", linestyle=":", label="best of the grid")
        axis.set_xlabel("inner steps of the search")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=5)
    losses.set(ylabel="mean training loss, nats")
    losses.set_title("training loss; band: all seeds", loc="left", fontsize=11)
    accuracies.set(ylabel="validation accuracy at the end")
    accuracies.set_title("validation accuracy", loc="left", fontsize=11)
    plane.set(xlabel="θ₀, log initial rate", ylabel="θ₁, log power of the decay", xlim=BOX[0], ylim=BOX[1])
    plane.set_title("meta-objective and paths", loc="left", fontsize=11)
    losses.legend(fontsize=8, frameon=False)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
