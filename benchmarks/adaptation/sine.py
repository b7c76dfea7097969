"""Sine waves: Reptile and FOMAML beside joint training and no training, and which inner gradients make a meta-step.

Waves a sin(x + b), a ~ U(0.1, 5), b ~ U(0, 2π); a 1-64-64-1 tanh network; 5 inner SGD steps on 10 of 50 points in
[-5, 5] each, at 0.02; Reptile's ε falls linearly from 0.1 to 0 over 30,000 tasks; the test takes 32 SGD steps on 10
points and reports the mean squared error at the 50, over 500 waves (Nichol, Achiam & Schulman 2018, section 3 and
figure 3). FOMAML takes 4 inner steps and its gradient on a tail of 10 other points; joint training is one inner step.

The second table sums inner gradients g1 ... g4 of 4 inner steps, each of 10 points of their own, as the meta-step
(section 6.2); sums of j gradients take the step size 1/j, so that all go equally far. Seeds, and there the sums too,
are rows of one batch.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents import noise
from agents.adaptation.inner_loop import InnerSGD, adapt, gradients_of, linear_anneal, meta_gradients
from agents.policy.batched import BatchedNetwork
from agents.policy.networks import parameter_vector
from benchmarks.common import context, panels, save, write

NAME = "adaptation/sine"

POINTS = torch.linspace(-5, 5, 50)
STEPS = (0, 1, 2, 4, 8, 16, 32)
SHOWN = (0, 1, 8, 32)
INNER = InnerSGD(0.02)
SUMS = ("g1", "g2", "g1+g2", "g3", "g1+g2+g3", "g4", "g1+g2+g3+g4")
Batch = tuple[Tensor, Tensor]

MODULE = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
NETWORK = BatchedNetwork(MODULE, MODULE)


def squares(theta: Tensor, batch: Batch) -> Tensor:
    return (NETWORK(theta, batch[0]) - batch[1]).square().mean((1, 2))


def initial(seed: int) -> Tensor:
    """Return PyTorch's own initialization, [P]."""
    torch.manual_seed(seed)
    for layer in MODULE:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return parameter_vector(MODULE)


def waves(generator: np.random.Generator, n: int) -> Tensor:
    """Draw n waves at all points, [n, 50, 1]."""
    a, b = generator.uniform(0.1, 5, (n, 1)), generator.uniform(0, 2 * np.pi, (n, 1))
    return torch.from_numpy(a * np.sin(POINTS.numpy() + b)).float()[..., None]


class Tasks:
    """One new wave for each row, and its points in an order of chance: rows of one seed see the same."""

    def __init__(self, seeds: list[int], copies: int = 1) -> None:
        self.generators = [noise.stream(seed, "tasks", 0) for seed in seeds]
        self.copies = copies

    def minibatches(self, count: int, size: int = 10) -> list[Batch]:
        y = torch.cat([waves(generator, 1) for generator in self.generators])
        order = torch.from_numpy(np.stack([generator.permutation(50) for generator in self.generators]))
        order, y = order.repeat_interleave(self.copies, 0), y.repeat_interleave(self.copies, 0)
        parts = [order[:, i * size : (i + 1) * size] for i in range(count)]
        return [(POINTS[part][..., None], y.gather(1, part[..., None])) for part in parts]


def train(method: str, seeds: list[int], tasks: int) -> Tensor:
    """Return initial parameters [S, P] after meta-training on a number of tasks, one after the other."""
    phi, source = torch.stack([initial(seed) for seed in seeds]), Tasks(seeds)
    adam = torch.optim.Adam([phi], lr=1e-3)
    for task in range(tasks):
        *head, tail = source.minibatches(5)
        if method == "FOMAML":
            phi.grad = meta_gradients("fomaml", squares, phi, head, tail, INNER)
            adam.param_groups[0]["lr"] = linear_anneal(1e-3, task / tasks)
            adam.step()
        elif method == "Reptile":
            step = meta_gradients("reptile", squares, phi, [*head, tail], None, INNER)
            phi = phi - linear_anneal(0.1, task / tasks) * step
        else:  # one SGD step on all points of the task
            whole = tuple(torch.cat(parts, 1) for parts in zip(*head, tail, strict=True))
            step = meta_gradients("reptile", squares, phi, [whole], None, INNER)
            phi = phi - linear_anneal(1.0, task / tasks) * step
    return phi


def combine(seeds: list[int], tasks: int, inner_lr: float) -> Tensor:
    """Return initial parameters [S * sums, P] after meta-training with each of SUMS as the meta-gradient."""
    phi = torch.stack([initial(seed) for seed in seeds]).repeat_interleave(len(SUMS), 0)
    weights = torch.tensor([[float(f"g{i + 1}" in name.split("+")) for i in range(4)] for name in SUMS])
    weights = (weights / weights.sum(1, keepdim=True)).repeat(len(seeds), 1).T[..., None]
    source, inner = Tasks(seeds, len(SUMS)), InnerSGD(inner_lr)
    for task in range(tasks):
        gradients = adapt(squares, phi, source.minibatches(4), inner).gradients
        phi = phi - linear_anneal(0.02, task / tasks) * (weights * gradients).sum(0)
    return phi


def errors_of(phi: Tensor, seed: int = 1, waves_per_row: int = 500) -> list[list[float]]:
    """Measure mean squared errors after each of STEPS, for each row of phi; all rows meet the same waves."""
    generator = noise.stream(seed, "test", 0)
    y = waves(generator, waves_per_row)
    order = torch.from_numpy(np.stack([generator.permutation(50)[:10] for _ in range(waves_per_row)]))
    batch, whole = (
        (POINTS[order][..., None], y.gather(1, order[..., None])),
        POINTS.expand(waves_per_row, -1)[..., None],
    )
    found = []
    for row in phi:
        theta, errors = row.expand(waves_per_row, -1), []
        for step in range(STEPS[-1] + 1):
            if step in STEPS:
                errors.append(squares(theta, (whole, y)).mean().item())
            theta = theta - INNER.lr * gradients_of(squares, theta, batch)
        found.append(errors)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sum-tasks", type=int, default=20_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(arguments.seeds))
    rows: list[dict[str, Any]] = []
    print("mean squared error after " + " / ".join(map(str, SHOWN)) + " steps")
    for method in ("scratch", "joint training", "Reptile", "FOMAML"):
        begin = time.perf_counter()
        phi = train(method, seeds, 0 if method == "scratch" else arguments.tasks)
        seconds = time.perf_counter() - begin
        add(rows, {"method": method, "seconds_of_all_seeds": round(seconds, 1)}, seeds, errors_of(phi))
        show(method, [row for row in rows if row["method"] == method], seconds)
    sums: list[dict[str, Any]] = []
    begin = time.perf_counter()
    errors = errors_of(combine(seeds, arguments.sum_tasks, INNER.lr))
    seconds = time.perf_counter() - begin
    for k, name in enumerate(SUMS):
        add(sums, {"sum": name}, seeds, errors[k :: len(SUMS)])
        show(name, sums[-len(seeds) :], seconds)
    print(write(NAME, {**context(), "steps": STEPS, "rows": rows, "sums": sums, "settings": vars(arguments)}))
    plot(rows, sums)


def add(rows: list[dict[str, Any]], key: dict[str, Any], seeds: list[int], errors: list[list[float]]) -> None:
    rows += [{**key, "seed": seed, "errors": values} for seed, values in zip(seeds, errors, strict=True)]


def show(name: str, rows: list[dict[str, Any]], seconds: float) -> None:
    cells = []
    for step in SHOWN:
        values = [row["errors"][STEPS.index(step)] for row in rows]
        cells.append(f"{min(values):.2f}-{max(values):.2f}")
    print(f"{name:16}{'  '.join(cells)}  {seconds:.0f} s", flush=True)


def plot(rows: list[dict[str, Any]], sums: list[dict[str, Any]]) -> None:
    figure, axes = panels(2, 2)
    for axis, table, key in ((axes[0], rows, "method"), (axes[1], sums, "sum")):
        for index, name in enumerate(dict.fromkeys(row[key] for row in table)):
            errors = np.array([row["errors"] for row in table if row[key] == name])
            axis.plot(range(len(STEPS)), errors.mean(0), color=f"C{index}", marker="o", markersize=3, label=name)
            axis.fill_between(range(len(STEPS)), errors.min(0), errors.max(0), color=f"C{index}", alpha=0.2)
        axis.set_xticks(range(len(STEPS)), list(map(str, STEPS)))
        axis.set(yscale="log", xlabel="SGD steps on 10 points of a new wave", ylabel="mean squared error")
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_title("Sine waves, mean and range of seeds", loc="left", fontsize=11)
    axes[1].set_title("Inner gradients as meta-step", loc="left", fontsize=11)
    save(figure, NAME)


if __name__ == "__main__":
    main()
