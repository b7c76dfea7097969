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
from agents.evolution.unroll import Unroll

METHODS = {"pes": "PES", "nres": "NRES", "truncated_es": "truncated ES"}
"""Those that searches for optimizers compare -> what figures call them."""
KEYS = (2**31, 2**31 + 777)
"""Of episodes that no search sees."""


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
    """Follow an ascent from θ: the losses [(update, loss)] there and after every so many updates, the θ of each."""
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
    """Return minus the score of one long window at θ, the mean over episodes."""
    seeds = torch.tensor(list(keys))
    state = task.init(seeds, torch.arange(len(seeds)))
    return -task.unroll(theta.expand(len(seeds), -1), state, steps)[1].mean().item()


def mean_loss(task: Unroll, horizon: int, theta: Tensor) -> float:
    """Return the loss of a step (nats per example) at θ, the mean over an episode and two keys."""
    return loss_of(task, theta, horizon, KEYS) / horizon


def finite(value: float) -> float | None:
    """Return the value, or None (JSON's null) where it diverged."""
    return value if math.isfinite(value) else None
