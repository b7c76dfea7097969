"""What the benchmarks of evolution strategies share: the ascent, data and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from agents.evolution.engine import Estimate, Scheme, estimate, start
from agents.evolution.learning import Classification
from agents.evolution.unroll import Unroll

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


def follow(
    ascent: Iterator[tuple[int, Tensor, Estimate]], theta: Tensor, every: int, loss: Callable[[Tensor], float]
) -> dict[str, Any]:
    """An ascent from θ with the losses [(update, loss)] there and after every so many updates, and the θ of each."""
    begin, steps, curve, path = time.perf_counter(), 0, [(0, finite(loss(theta)))], [theta.tolist()]
    for update, reached, result in ascent:
        steps += int(result.steps.sum())
        if update % every == 0:
            curve.append((update, finite(loss(reached))))
            path.append(reached.tolist())
    seconds = round(time.perf_counter() - begin, 2)
    return {"seconds": seconds, "inner_steps": steps, "final_loss": curve[-1][1], "curve": curve, "theta": path}


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
