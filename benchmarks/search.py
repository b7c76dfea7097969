"""What the benchmarks of evolution strategies share: the ascent, data, evaluation and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import matplotlib

matplotlib.use("Agg")
import torch
from common import RESULTS
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from agents.direction.evolution import Estimate, Scheme, estimate, start
from agents.direction.unrolls import Classification, Unroll

torch.set_num_threads(1)


def ascend(
    task: Unroll,
    scheme: Scheme,
    theta: Tensor,
    sigma: float,
    optimizer: Callable[[list[Tensor]], Optimizer],
    updates: int,
    seed: int,
) -> Iterator[tuple[int, Tensor, Estimate]]:
    """Raise the score; after each update its number, θ [P] and the estimate that it followed."""
    theta = theta.clone()
    steps = optimizer([theta])
    particles = start(scheme, theta, seed)
    for update in range(1, updates + 1):
        result, particles = estimate(task, scheme, theta, sigma, particles)
        theta.grad = -result.gradient
        steps.step()
        yield update, theta, result


@torch.no_grad()
def loss_of(task: Unroll, theta: Tensor, steps: int, keys: Iterable[int] = (0,)) -> float:
    """Minus the score of one long window at θ, the mean over episodes."""
    seeds = torch.tensor(list(keys))
    state = task.init(seeds, torch.arange(len(seeds)))
    return -task.unroll(theta.expand(len(seeds), -1), state, steps)[1].mean().item()


def finite(value: float) -> float | None:
    """The value, or None (JSON's null) where it diverged."""
    return value if math.isfinite(value) else None


def digits(hidden: tuple[int, ...], batch_size: int) -> Classification:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, shuffled once and standardized as a whole."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(data.data, dtype=torch.float32)[order]
    labels = torch.tensor(data.target, dtype=torch.int64)[order]
    return Classification((inputs - inputs.mean()) / inputs.std(), labels, hidden, batch_size)


def panels(count: int) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(5.2 * count, 4), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, list(axes[0])


def save(figure: Figure, name: str) -> None:
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=130)
    print(path)
