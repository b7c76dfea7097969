"""Supervised learning with SGD, Adam, AMSGrad, AdaBound and AMSBound: how much their step sizes matter.

Three tasks: scikit-learn's handwritten digits with a multilayer perceptron and with a small convolutional network, and
the next character of sentences that a small grammar makes, with an LSTM. SGD (momentum 0.9), Adam and AMSGrad run on a
grid of learning rates, AdaBound and AMSBound on that times a grid of final step sizes; they hand over at a tenth of the
updates. Kept are the training loss at the end, the held-out accuracy and the held-out perplexity, exp of the mean
cross-entropy; a run whose loss is not finite counts with the accuracy that it has then.

Each optimizer's step sizes are those that are best on seed 0, and the table has them on the other seeds, which run
first; the maps are means over the seeds that there are. Finished runs are kept and not repeated, so that the maps'
seeds grow over several calls.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from agents.optim.adabound import AdaBound, AMSBound, handover_gamma
from benchmarks.common import context, panels, read, save, write
from benchmarks.digits import digits

NAME = "optim/supervised"
RATES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
FINAL_RATES = [1e-2, 1e-1, 1.0, 10.0]
HANDOVER = 0.1
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda params, lr: SGD(params, lr=lr, momentum=0.9),
    "Adam": lambda params, lr: Adam(params, lr=lr),
    "AMSGrad": lambda params, lr: Adam(params, lr=lr, amsgrad=True),
    "AdaBound": lambda params, lr, **bounds: AdaBound(params, lr=lr, nonfinite="ignore", **bounds),
    "AMSBound": lambda params, lr, **bounds: AMSBound(params, lr=lr, nonfinite="ignore", **bounds),
}
BOUNDED = ("AdaBound", "AMSBound")


class Task(NamedTuple):
    """Training and held-out data, [n, ...] each, and a network's beginning."""

    inputs: Tensor
    targets: Tensor
    held_out_inputs: Tensor
    held_out_targets: Tensor
    network: Callable[[], nn.Module]
    """To logits [n, ..., C] of targets [n, ...]."""
    batch_size: int
    updates: int


class CharacterModel(nn.Module):
    """Characters [n, T] to logits [n, T, C] of those that follow."""

    def __init__(self, characters: int, size: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 16)
        self.lstm = nn.LSTM(16, size, batch_first=True)
        self.output = nn.Linear(size, characters)

    def forward(self, text: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(text))
        return self.output(hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--budget-minutes", type=float, default=60.0)
    parser.add_argument("--plot", action="store_true", help="only the table and the figure of what is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept, known = read(NAME), tasks()
    if kept is None or (kept["versions"] != context()["versions"] and not arguments.plot):
        empty = [{"task": name, **cell, "runs": []} for name in known for cell in cells()]
        kept = {**context(), "handover": HANDOVER, "rows": empty}
    deadline = time.monotonic() + 60 * (0 if arguments.plot else arguments.budget_minutes)
    for row, seed in missing(kept["rows"], arguments.seeds):
        if time.monotonic() > deadline:
            break
        row["runs"].append({"seed": seed, "commit": context()["commit"], **train(known[row["task"]], row, seed)})
        write(NAME, kept)
    table(kept["rows"])
    print(draw(kept["rows"]))


def missing(rows: list[dict[str, Any]], seeds: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Give what has not run: seed 0, then the other seeds of the step sizes that it finds best, then the rest."""
    first = [(row, 0) for row in rows]
    yield from (key for key in first if not has(*key))
    of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault((row["task"], row["optimizer"]), []).append(row)
    chosen = [best(mine) for mine in of.values()]
    for some in (chosen, rows):
        yield from ((row, seed) for seed in range(1, seeds) for row in some if not has(row, seed))


def has(row: dict[str, Any], seed: int) -> bool:
    return any(run["seed"] == seed for run in row["runs"])


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the step sizes with the highest accuracy on seed 0, of several the lowest loss."""
    seed = [next(run for run in row["runs"] if run["seed"] == 0) for row in rows]
    places = range(len(rows))
    return rows[max(places, key=lambda i: (seed[i]["accuracy"], -(seed[i]["loss"] or math.inf)))]


def cells() -> list[dict[str, Any]]:
    """List all optimizers with all their step sizes."""
    return [
        {"optimizer": name, "lr": lr, "final_lr": final_lr}
        for name in OPTIMIZERS
        for lr in RATES
        for final_lr in (FINAL_RATES if name in BOUNDED else [None])
    ]


def tasks() -> dict[str, Task]:
    inputs, labels = digits()
    images = inputs.view(-1, 1, 8, 8)
    n = len(labels) * 4 // 5
    data = images[:n], labels[:n], images[n:], labels[n:]
    text, characters = sentences()
    n = len(text) * 9 // 10
    return {
        "digits, MLP": Task(*data, perceptron, 128, 500),
        "digits, CNN": Task(*data, convolutional, 128, 300),
        "characters, LSTM": Task(
            text[:n, :-1], text[:n, 1:], text[n:, :-1], text[n:, 1:], lambda: CharacterModel(characters), 32, 600
        ),
    }


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def sentences(number: int = 1000, length: int = 33) -> tuple[Tensor, int]:
    """Make text of a grammar of ours in pieces of `length` characters, int64 [n, length]; returns it and the number of
    characters.
    """
    draw = random.Random(0)
    adjectives = ["small", "red", "heavy", "quick", "silent", "old"]
    nouns = ["hopper", "walker", "swimmer", "spider", "pendulum", "runner"]
    verbs = ["follows", "lifts", "passes", "carries", "watches"]
    ends = ["in the morning", "on one leg", "without a sound", "twice", "again and again"]

    def phrase() -> str:
        adjective = f"{draw.choice(adjectives)} " if draw.random() < 0.6 else ""
        return f"the {adjective}{draw.choice(nouns)}"

    text = "".join(f"{phrase()} {draw.choice(verbs)} {phrase()} {draw.choice(ends)}. " for _ in range(number))
    known = sorted(set(text))
    codes = torch.tensor([known.index(character) for character in text])
    return codes[: len(codes) // length * length].view(-1, length), len(known)


def train(task: Task, cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train once: the training loss over the last tenth of the updates, and the held-out accuracy."""
    torch.manual_seed(seed)
    network = task.network()
    bounds = {}
    if cell["optimizer"] in BOUNDED:
        bounds = {"final_lr": cell["final_lr"], "gamma": handover_gamma(HANDOVER, task.updates)}
    optimizer = OPTIMIZERS[cell["optimizer"]](list(network.parameters()), cell["lr"], **bounds)
    losses: list[float] = []
    rows = torch.empty(0, dtype=torch.int64)
    for _ in range(task.updates):
        if len(rows) < task.batch_size:
            rows = torch.randperm(len(task.inputs))
        batch, rows = rows[: task.batch_size], rows[task.batch_size :]
        optimizer.zero_grad()
        loss = cross_entropy(network(task.inputs[batch]).flatten(0, -2), task.targets[batch].flatten())
        loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.step()
    last = statistics.mean(losses[-max(task.updates // 10, 1) :])
    with torch.no_grad():
        logits = network(task.held_out_inputs)
        right = (logits.argmax(-1) == task.held_out_targets).float().mean().item()
        perplexity = cross_entropy(logits.flatten(0, -2), task.held_out_targets.flatten()).exp().item()
    return {
        "loss": round(last, 4) if math.isfinite(last) else None,
        "accuracy": round(right, 4),
        "perplexity": round(perplexity, 3) if math.isfinite(perplexity) else None,
    }


def accuracy(row: dict[str, Any]) -> float:
    return statistics.mean(run["accuracy"] for run in row["runs"])


def table(rows: list[dict[str, Any]]) -> None:
    """Print each optimizer on fresh seeds at the step sizes of seed 0, and how much of its grid is near the best."""
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task and row["runs"]]
        top = max(map(accuracy, of_task))
        print(f"\n{task}: held-out accuracy, perplexity and training loss on fresh seeds")
        for name in OPTIMIZERS:
            mine = [row for row in of_task if row["optimizer"] == name]
            chosen = best(mine)
            fresh = [run for run in chosen["runs"] if run["seed"] > 0]
            near = sum(accuracy(row) > top - 0.02 for row in mine)
            ends = {
                key: "/".join(f"{run[key]:.3f}" if run[key] is not None else "-" for run in fresh)
                for key in ("accuracy", "perplexity", "loss")
            }
            print(
                f"  {name:9} {ends['accuracy']}  {ends['perplexity']}  {ends['loss']} at lr {chosen['lr']:g}, final_lr "
                f"{chosen['final_lr']}; within 0.02 of the best: {near} of {len(mine)}"
            )


def draw(rows: list[dict[str, Any]]) -> Any:
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = panels(len(names) * len(OPTIMIZERS), len(OPTIMIZERS), 2.8, 2.9)
    for line, task in zip(np.reshape(axes, (len(names), -1)), names, strict=True):
        for axis, name in zip(line, OPTIMIZERS, strict=True):
            axis.grid(False)
            finals = FINAL_RATES if name in BOUNDED else [None]
            found = {
                (row["final_lr"], row["lr"]): accuracy(row)
                for row in rows
                if (row["task"], row["optimizer"]) == (task, name)
            }
            values = np.array([[found[final, lr] for lr in RATES] for final in finals])
            axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for i, j in np.ndindex(values.shape):
                color = "white" if values[i, j] < 0.6 else "black"
                axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=color, fontsize=8)
            axis.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
            axis.set_title(f"{name}: {task}", fontsize=10)
            axis.set_xlabel("lr")
            axis.set_yticks([])
            if name in BOUNDED:
                axis.set_yticks(range(len(finals)), [f"{final:g}" for final in finals])
                axis.set_ylabel("final_lr")
    return save(figure, NAME)


if __name__ == "__main__":
    main()
