"""Reptile and FOMAML on few-shot digits: how much each choice of the inner and outer loop matters.

scikit-learn's digits (8 x 8), each rotated by 0, 90, 180 and 270 degrees: 24 classes of the digits 0-5 to train on,
16 of the digits 6-9 held out. A task is 5 classes in an order of chance, 2 images of each to learn from and 10 to be
tested on; a 64-64-5 tanh network adapts by SGD. One choice at a time is changed from the base; reported is the accuracy
on held-out tasks after 5 steps on all 10 images, with the range of seeds. Nichol et al. 2018, sections 6.2 and 6.3.

shared tail: FOMAML's last minibatch is drawn from the images of the inner steps, as Reptile's are; separate tail: from
the task's other images. cycling: minibatches go through the images before any comes again; replacement: each is drawn
anew.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from agents import noise
from agents.adaptation.inner_loop import InnerSGD, gradients_of, linear_anneal, meta_gradients
from agents.policy.batched import BatchedNetwork
from agents.policy.networks import parameter_vector
from benchmarks.common import context, panels, save, write

NAME = "adaptation/few_shot"

WAYS, SHOTS, TESTS, TEST_STEPS = 5, 2, 10, 5
MODULE = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, WAYS))
NETWORK = BatchedNetwork(MODULE, MODULE)
BASE: dict[str, Any] = {
    "rule": "reptile",
    "inner_steps": 5,
    "batch_size": 5,
    "outer": 0.3,
    "tail": "shared",
    "sampling": "cycling",
    "inner_lr": 0.2,
    "tasks": 5,
}
VARIED: dict[str, list[Any]] = {
    "inner_steps": [1, 2, 5, 10, 20],
    "batch_size": [1, 2, 5, 10],
    "outer": [0.03, 0.1, 0.3, 1.0],
    "sampling": ["cycling", "replacement"],
    "tail": ["shared", "separate"],
}


def cross_entropy(theta: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits, labels = NETWORK(theta, batch[0]), batch[1]
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(1)


def classes(digits: range) -> list[Tensor]:
    """Return the images [m, 64] of each digit in each of four rotations, in 0 to 1."""
    from sklearn.datasets import load_digits

    images, target = load_digits(return_X_y=True)
    square = images.reshape(-1, 8, 8) / 16
    return [
        torch.from_numpy(np.rot90(square[target == digit], turns, (1, 2)).reshape(-1, 64).copy()).float()
        for digit in digits
        for turns in range(4)
    ]


def draw(pool: list[Tensor], generator: np.random.Generator, tasks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw images to learn from [N, 10, 64] and to be tested on [N, 50, 64], with their labels."""
    learn, test = [], []
    for _ in range(tasks):
        chosen = generator.choice(len(pool), WAYS, replace=False)
        orders = [generator.permutation(len(pool[c]))[: SHOTS + TESTS] for c in chosen]
        learn.append(torch.cat([pool[c][order[:SHOTS]] for c, order in zip(chosen, orders, strict=True)]))
        test.append(torch.cat([pool[c][order[SHOTS:]] for c, order in zip(chosen, orders, strict=True)]))
    labels = torch.arange(WAYS)
    return (
        torch.stack(learn),
        labels.repeat_interleave(SHOTS).expand(tasks, -1),
        torch.stack(test),
        labels.repeat_interleave(TESTS).expand(tasks, -1),
    )


def minibatches(x: Tensor, y: Tensor, settings: dict[str, Any], count: int, generator: np.random.Generator) -> list:
    n, size = x.shape[1], min(settings["batch_size"], x.shape[1])
    if settings["sampling"] == "replacement":
        rows = [generator.integers(n, size=size) for _ in range(count)]
    else:
        stream = np.concatenate([generator.permutation(n) for _ in range(count * size // n + 1)])
        rows = [stream[k * size : (k + 1) * size] for k in range(count)]
    return [(x[:, r], y[:, r]) for r in rows]


def train(settings: dict[str, Any], seed: int, iterations: int) -> Tensor:
    """Return φ [P] after meta-training."""
    torch.manual_seed(seed)
    for layer in (MODULE[0], MODULE[2]):
        layer.reset_parameters()
    phi, generator, pool = parameter_vector(MODULE), noise.stream(seed, "tasks", 0), classes(range(6))
    inner = InnerSGD(settings["inner_lr"])
    for iteration in range(iterations):
        x, y, x_test, y_test = draw(pool, generator, settings["tasks"])
        batches = minibatches(x, y, settings, settings["inner_steps"], generator)
        theta = phi.expand(settings["tasks"], -1)
        tail = None
        if settings["rule"] != "reptile":
            source = (x, y) if settings["tail"] == "shared" else (x_test, y_test)
            tail = minibatches(*source, settings, 1, generator)[0]
        step = meta_gradients(settings["rule"], cross_entropy, theta, batches, tail, inner).mean(0)
        # FOMAML's gradient is one inner gradient long, Reptile's difference α times a sum of k.
        scale = 1.0 if tail is None else settings["inner_lr"] * settings["inner_steps"]
        phi = phi - linear_anneal(settings["outer"], iteration / iterations) * scale * step
    return phi


def accuracy(phi: Tensor, seed: int = 1, tasks: int = 300) -> float:
    x, y, x_test, y_test = draw(classes(range(6, 10)), noise.stream(seed, "test", 0), tasks)
    theta = phi.expand(tasks, -1)
    for _ in range(TEST_STEPS):
        theta = theta - BASE["inner_lr"] * gradients_of(cross_entropy, theta, (x, y))
    return (NETWORK(theta, x_test).argmax(-1) == y_test).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin, rows = time.perf_counter(), []
    untrained = [accuracy(train(BASE, seed, 0)) for seed in range(arguments.seeds)]
    print(f"no meta-training  {min(untrained):.3f}-{max(untrained):.3f}")
    for rule in ("reptile", "fomaml"):
        for choice, values in VARIED.items():
            if choice == "tail" and rule == "reptile":
                continue
            for value in values:
                settings = {**BASE, "rule": rule, choice: value}
                found = [accuracy(train(settings, seed, arguments.iterations)) for seed in range(arguments.seeds)]
                rows.append({"rule": rule, "choice": choice, "value": value, "accuracies": found})
                print(f"{rule:8} {choice:12} {value!s:12} {min(found):.3f}-{max(found):.3f}", flush=True)
    print(f"{time.perf_counter() - begin:.0f} s")
    results = {"base": BASE, "untrained": untrained, "rows": rows, "settings": vars(arguments)}
    print(write(NAME, {**context(), **results}))
    plot(rows, untrained)


def plot(rows: list[dict[str, Any]], untrained: list[float]) -> None:
    figure, axes = panels(len(VARIED), 3, width=4.0, height=3.2)
    for axis, (choice, values) in zip(axes, VARIED.items(), strict=True):
        for index, rule in enumerate(("reptile", "fomaml")):
            found = [row["accuracies"] for row in rows if (row["rule"], row["choice"]) == (rule, choice)]
            if found:
                means = np.mean(found, 1)
                spread = [means - np.min(found, 1), np.max(found, 1) - means]
                axis.errorbar(range(len(values)), means, spread, marker="o", capsize=3, label=rule, color=f"C{index}")
        axis.axhline(np.mean(untrained), color="grey", linestyle=":", label="no meta-training")
        axis.set_xticks(range(len(values)), list(map(str, values)))
        axis.set(xlabel=choice.replace("_", " "), ylabel="accuracy, held-out classes")
    axes[0].legend(fontsize=8, frameon=False)
    save(figure, NAME)


if __name__ == "__main__":
    main()
