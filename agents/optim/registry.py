"""Optimizers by name, as configurations and checkpoints say them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, optim
from torch.optim.optimizer import Optimizer, ParamsT

from agents.config import near
from agents.optim.adabound import AUTO, AdaBound, AMSBound
from agents.optim.clipup import ClipUp

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
        raise ValueError(f"there is no optimizer {name!r}{near(name, OPTIMIZERS)}")
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
