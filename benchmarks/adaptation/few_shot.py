"""Reptile and FOMAML on few-shot digits: how much each choice of the inner and outer loop matters.

scikit-learn's digits (8 x 8), each rotated by 0, 90, 180 and 270 degrees: 24 classes of the digits 0-5 to train on,
16 of the digits 6-9 held out. A task is 5 classes in an order of chance, 2 images of each to learn from and 10 to be
tested on; a 64-64-5 tanh network adapts by SGD. One choice at a time is changed from the base; reported is the accuracy
on held-out tasks after 5 steps on all 10 images, with the range of seeds. Nichol et al. 2018, sections 6.2 and 6.3.

--parts sums: the inner gradients g1 ... g4 of 4 inner steps, each on 10 images of its own, and their sums as the
meta-step; sums of j gradients take the step size 1/j, so that all go equally far (section 6.2).

--parts transduction: a network that normalizes its hidden units over a batch, as the papers' networks do. In a batch of
the 50 test images those units say something of the other test images; one at a time, each beside the 10 images to learn
from, they do not (section 6.1).

shared tail: FOMAML's last minibatch is drawn from the images of the inner steps, as Reptile's are; separate tail: from
the task's other images. cycling: minibatches go through the images before any comes again; replacement: each is drawn
anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from agents import noise
from agents.adaptation.inner_loop import RULES, InnerSGD, adapt, adapted, linear_anneal, meta_gradients
from agents.policy.batched import BatchedNetwork
from agents.policy.networks import parameter_vector
from benchmarks.common import context, panels, read, save, write

NAME = "adaptation/few_shot"

WAYS, SHOTS, TESTS, TEST_STEPS = 5, 2, 10, 5


class BatchNorm(nn.Module):
    """Units [N, B, K] of mean 0 and standard deviation 1 in each task's batch; nothing is learned."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()


MODULE = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, WAYS))
NETWORKS = {
    "plain": BatchedNetwork(MODULE, MODULE),
    "batch norm": BatchedNetwork(MODULE, nn.Sequential(MODULE[0], BatchNorm(), MODULE[1], MODULE[2])),
}
SUMS = ("g1", "g2", "g1+g2", "g3", "g1+g2+g3", "g4", "g1+g2+g3+g4")
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


def cross_entropy(theta: Tensor, batch: tuple[Tensor, Tensor], network: str = "plain") -> Tensor:
    logits, labels = NETWORKS[network](theta, batch[0]), batch[1]
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


def initial(seed: int) -> Tensor:
    """Return PyTorch's own initialization, [P]."""
    torch.manual_seed(seed)
    for layer in (MODULE[0], MODULE[2]):
        layer.reset_parameters()
    return parameter_vector(MODULE)


def train(settings: dict[str, Any], seed: int, iterations: int, network: str = "plain") -> Tensor:
    """Return φ [P] after meta-training."""
    phi, generator, pool = initial(seed), noise.stream(seed, "tasks", 0), classes(range(6))
    loss = partial(cross_entropy, network=network)
    inner = InnerSGD(settings["inner_lr"])
    for iteration in range(iterations):
        x, y, x_test, y_test = draw(pool, generator, settings["tasks"])
        batches = minibatches(x, y, settings, settings["inner_steps"], generator)
        theta = phi.expand(settings["tasks"], -1)
        tail = None
        if settings["rule"] != "reptile":
            source = (x, y) if settings["tail"] == "shared" else (x_test, y_test)
            tail = minibatches(*source, settings, 1, generator)[0]
        step = meta_gradients(settings["rule"], loss, theta, batches, tail, inner).mean(0)
        # FOMAML's and MAML's gradients are one inner gradient long, Reptile's difference α times a sum of k.
        scale = 1.0 if tail is None else settings["inner_lr"] * settings["inner_steps"]
        phi = phi - linear_anneal(settings["outer"], iteration / iterations) * scale * step
    return phi


def combine(outer: float, seed: int, iterations: int) -> Tensor:
    """Return φ of each of SUMS [S, P] after meta-training with it as the meta-gradient; all see the same images."""
    phi, generator, pool = initial(seed).repeat(len(SUMS), 1), noise.stream(seed, "tasks", 0), classes(range(6))
    weights = torch.tensor([[float(f"g{i + 1}" in name.split("+")) for i in range(4)] for name in SUMS])
    weights = (weights / weights.sum(1, keepdim=True)).T[..., None, None]
    tasks, labels = BASE["tasks"], torch.arange(WAYS).repeat_interleave(SHOTS).expand(len(SUMS) * BASE["tasks"], -1)
    for iteration in range(iterations):
        images = draw(pool, generator, tasks)[2].view(tasks, WAYS, TESTS, 64)
        parts = images[:, :, : 4 * SHOTS].unflatten(2, (4, SHOTS)).permute(2, 0, 1, 3, 4).reshape(4, tasks, -1, 64)
        batches = [(part.repeat(len(SUMS), 1, 1), labels) for part in parts]
        theta = phi.repeat_interleave(tasks, 0)
        gradients = adapt(cross_entropy, theta, batches, InnerSGD(BASE["inner_lr"])).gradients
        step = (weights * gradients.unflatten(1, (len(SUMS), tasks))).sum(0).mean(1)
        phi = phi - linear_anneal(outer, iteration / iterations) * step
    return phi


def accuracy(
    phi: Tensor, seed: int = 1, tasks: int = 300, network: str = "plain", one_at_a_time: bool = False
) -> float:
    """Return the share of right answers on held-out tasks after adaptation."""
    x, y, x_test, y_test = draw(classes(range(6, 10)), noise.stream(seed, "test", 0), tasks)
    loss = partial(cross_entropy, network=network)
    theta = adapted(loss, phi.expand(tasks, -1), [(x, y)] * TEST_STEPS, InnerSGD(BASE["inner_lr"]))
    if one_at_a_time:
        beside = (torch.cat((x, image[:, None]), 1) for image in x_test.unbind(1))
        logits = torch.stack([NETWORKS[network](theta, batch)[:, -1] for batch in beside], 1)
    else:
        logits = NETWORKS[network](theta, x_test)
    return (logits.argmax(-1) == y_test).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", action="store_true", help="only the figure of what is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = read(NAME) or {}
    for part in [] if arguments.plot else arguments.parts:
        begin = time.perf_counter()
        found = PARTS[part](arguments.iterations, arguments.seeds)
        print(f"{time.perf_counter() - begin:.0f} s")
        settings = {"iterations": arguments.iterations, "seeds": arguments.seeds}
        kept[part] = {**context(), "settings": settings, **found}
        write(NAME, kept)
    plot(kept)


def choices(iterations: int, seeds: int) -> dict[str, Any]:
    rows = []
    untrained = [accuracy(train(BASE, seed, 0)) for seed in range(seeds)]
    print(f"no meta-training  {min(untrained):.3f}-{max(untrained):.3f}")
    for rule in ("reptile", "fomaml"):
        for choice, values in VARIED.items():
            if choice == "tail" and rule == "reptile":
                continue
            for value in values:
                settings = {**BASE, "rule": rule, choice: value}
                found = [accuracy(train(settings, seed, iterations)) for seed in range(seeds)]
                rows.append({"rule": rule, "choice": choice, "value": value, "accuracies": found})
                print(f"{rule:8} {choice:12} {value!s:12} {min(found):.3f}-{max(found):.3f}", flush=True)
    return {"base": BASE, "untrained": untrained, "rows": rows}


def sums(iterations: int, seeds: int) -> dict[str, Any]:
    rows = []
    untrained = [accuracy(initial(seed)) for seed in range(seeds)]
    for outer in (0.1, 0.3, 1.0):
        of_seeds = [[accuracy(phi) for phi in combine(outer, seed, iterations)] for seed in range(seeds)]
        for name, found in zip(SUMS, zip(*of_seeds, strict=True), strict=True):
            rows.append({"sum": name, "outer": outer, "accuracies": found})
            print(f"{name:12} outer {outer}  {min(found):.3f}-{max(found):.3f}", flush=True)
    return {"untrained": untrained, "rows": rows}


def transduction(iterations: int, seeds: int) -> dict[str, Any]:
    rows = []
    for network in NETWORKS:
        for rule in (None, *RULES):
            # The outer step at which FOMAML is best in the choices; a tail of other images, as the papers have it.
            settings = {**BASE, "rule": rule, "outer": 0.3 if rule == "reptile" else 0.1, "tail": "separate"}
            for seed in range(seeds):
                phi = initial(seed) if rule is None else train(settings, seed, iterations, network)
                at_once, alone = (accuracy(phi, network=network, one_at_a_time=one) for one in (False, True))
                rows.append({"network": network, "rule": rule, "seed": seed, "at_once": at_once, "alone": alone})
            found = [row for row in rows if (row["network"], row["rule"]) == (network, rule)]
            print(
                f"{network:10} {rule or 'untrained':9}",
                "  ".join(
                    f"{label} {min(row[key] for row in found):.3f}-{max(row[key] for row in found):.3f}"
                    for key, label in (("at_once", "all at once"), ("alone", "one at a time"))
                ),
                flush=True,
            )
    return {"rows": rows}


PARTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "choices": choices,
    "sums": sums,
    "transduction": transduction,
}


def plot(kept: dict[str, Any]) -> None:
    """Draw what is kept of each part in one figure."""
    panel = {"choices": len(VARIED), "sums": 1, "transduction": len(NETWORKS)}
    drawn = [part for part in PARTS if part in kept]
    figure, axes = panels(sum(panel[part] for part in drawn), 3, width=4.4, height=3.2)
    for part in drawn:
        mine, axes = axes[: panel[part]], axes[panel[part] :]
        PLOTS[part](mine, kept[part])
        for axis in mine:
            axis.set_ylabel("accuracy, held-out classes")
    save(figure, NAME)


def errors(found: list[list[float]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return means [n], and how far the least and the greatest are from them."""
    means = np.mean(found, 1)
    return means, [means - np.min(found, 1), np.max(found, 1) - means]


def plot_choices(axes: list[Any], results: dict[str, Any]) -> None:
    for axis, (choice, values) in zip(axes, VARIED.items(), strict=True):
        for index, rule in enumerate(("reptile", "fomaml")):
            mine = [row["accuracies"] for row in results["rows"] if (row["rule"], row["choice"]) == (rule, choice)]
            if mine:
                options: dict[str, Any] = {"marker": "o", "capsize": 3, "label": rule, "color": f"C{index}"}
                axis.errorbar(range(len(values)), *errors(mine), **options)
        axis.axhline(np.mean(results["untrained"]), color="grey", linestyle=":", label="no meta-training")
        axis.set_xticks(range(len(values)), list(map(str, values)))
        axis.set_xlabel(choice.replace("_", " "))
    axes[0].legend(fontsize=8, frameon=False)


def plot_sums(axes: list[Any], results: dict[str, Any]) -> None:
    (axis,) = axes
    for index, outer in enumerate(dict.fromkeys(row["outer"] for row in results["rows"])):
        found = [row["accuracies"] for row in results["rows"] if row["outer"] == outer]
        places = np.arange(len(SUMS)) + 0.15 * (index - 1)
        axis.errorbar(places, *errors(found), marker="o", linestyle="", capsize=3, label=f"outer step {outer:g}")
    axis.axhline(np.mean(results["untrained"]), color="grey", linestyle=":", label="no meta-training")
    axis.set_xticks(range(len(SUMS)), [name.replace("+", "\n+") for name in SUMS], fontsize=8)
    axis.set_xlabel("inner gradients as meta-step")
    axis.legend(fontsize=7, frameon=False)


def plot_transduction(axes: list[Any], results: dict[str, Any]) -> None:
    for axis, network in zip(axes, NETWORKS, strict=True):
        for index, (key, label) in enumerate((("at_once", "all test images at once"), ("alone", "one at a time"))):
            for place, rule in enumerate((None, *RULES)):
                mine = [row[key] for row in results["rows"] if (row["network"], row["rule"]) == (network, rule)]
                at = place + 0.24 * (index - 0.5)
                axis.plot([at] * len(mine), mine, "o", color=f"C{index}", label=label if place == 0 else None)
        axis.set_xticks(range(1 + len(RULES)), ["no meta-\ntraining", *RULES])
        axis.set(ylim=(0.7, 0.95))
        axis.set_title(f"network: {network}", loc="left", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)


PLOTS: dict[str, Callable[[list[Any], dict[str, Any]], None]] = {
    "choices": plot_choices,
    "sums": plot_sums,
    "transduction": plot_transduction,
}


if __name__ == "__main__":
    main()
