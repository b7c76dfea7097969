"""ClipUp: steps of a set length, with momentum and a speed limit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class ClipUp(Optimizer):
    """Steps of a set length with momentum and a speed limit: v ← m v + lr g / |g|; |v| ≤ max_speed; θ ← θ - v.

    The norms are over all parameters of a group. A gradient of zero adds nothing.

    Args:
        params: parameters or groups of them.
        lr: length of a step, in units of a parameter.
        momentum: m, from 0 to 1.
        max_speed: longest v, in steps (units of lr).

    Source: Toklu, Liskowski and Srivastava 2020, algorithm 1, https://arxiv.org/abs/2008.02387; max_speed = 2 is its
    rule of thumb.
    """

    def __init__(self, params: ParamsT, lr: float = 0.1, momentum: float = 0.9, max_speed: float = 2.0) -> None:
        for name, holds, value, allowed in (
            ("lr", 0 < lr < math.inf, lr, "a positive number"),
            ("momentum", 0 <= momentum < 1, momentum, "a number from 0 to below 1"),
            ("max_speed", max_speed > 0, max_speed, "a number above 0"),
        ):
            if not holds:
                raise ValueError(f"{name} is {value}; give {allowed}.")
        super().__init__(params, {"lr": lr, "momentum": momentum, "max_speed": max_speed})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient; returns the loss of closure, which evaluates it anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            velocities = [self.state[p].setdefault("velocity", torch.zeros_like(p)) for p in moved]
            length = _norm([p.grad for p in moved])
            for velocity, parameter in zip(velocities, moved, strict=True):
                velocity.mul_(group["momentum"])
                if length > 0:
                    velocity.add_(parameter.grad, alpha=group["lr"] / length)
            speed, limit = _norm(velocities), group["max_speed"] * group["lr"]
            for velocity, parameter in zip(velocities, moved, strict=True):
                if speed > limit:
                    velocity.mul_(limit / speed)
                parameter.sub_(velocity)
        return loss


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))
