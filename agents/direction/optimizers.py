"""Optimizers by name, as configurations and checkpoints say them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim.optimizer import Optimizer, ParamsT

from agents.direction.adabound import AUTO, AdaBound, AMSBound


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


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adabound": AdaBound,
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "amsbound": AMSBound,
    "clipup": ClipUp,
    "rmsprop": optim.RMSprop,
    "sgd": optim.SGD,
}
"""Name -> class. SB3 gives eps = 1e-5 to torch.optim.Adam alone: comparisons set eps themselves."""

FUSED = ("adam", "adamw", "sgd")
"""Those whose step torch computes in one pass over all parameters, where they are asked to."""


def make_optimizer(name: str, params: ParamsT, **settings: Any) -> Optimizer:
    """The optimizer of that name over params, with its own settings.

    Raises:
        ValueError: no optimizer has that name.
    """
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"give one of {', '.join(OPTIMIZERS)}."
        raise ValueError(f"there is no optimizer {name!r}; {hint}")
    return OPTIMIZERS[name](params, **settings)


def optimizer_tensors(name: str, optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's state, named after it: another optimizer that goes on from here begins anew."""
    state = optimizer.state_dict()
    tensors = {
        f"{name}.{index}.{key}": value
        for index, entries in state["state"].items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }
    measured = {
        f"{name}.final_lr.{index}": torch.tensor(group["final_lr"], dtype=torch.float64)
        for index, group in enumerate(state["param_groups"])
        if group.get("final_lr", AUTO) != AUTO
    }
    return tensors | measured


def load_optimizer_tensors(name: str, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take back what `optimizer_tensors` gave."""
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        first, _, last = key.removeprefix(f"{name}.").partition(".")
        if not key.startswith(f"{name}."):
            continue
        if first != "final_lr":
            state.setdefault(int(first), {})[last] = value
        elif groups[int(last)]["final_lr"] == AUTO:
            groups[int(last)]["final_lr"] = value.item()
    optimizer.load_state_dict({"state": state, "param_groups": groups})
