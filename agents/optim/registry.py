"""Optimizers by name, as configurations and checkpoints say them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import Optimizer, ParamsT

from agents.config import near
from agents.optim.adabound import AUTO, AdaBound, AMSBound
from agents.optim.clipup import ClipUp
from agents.optim.flat import FlatParameters

OptimizerName = Literal["adabound", "adam", "adamw", "amsbound", "clipup", "rmsprop", "sgd"]

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

WITHOUT_EPS = ("clipup", "sgd")
"""Those that do not divide by a root of a second moment."""


def make_optimizer(name: str, params: ParamsT, **settings: Any) -> Optimizer:
    """Make the optimizer of that name over params, with its own settings.

    Raises:
        ValueError: no optimizer has that name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"there is no optimizer {name!r}{near(name, OPTIMIZERS)}")
    return OPTIMIZERS[name](params, **settings)


def make_flat_optimizer(
    name: str, modules: Sequence[nn.Module], *, lr: float, eps: float, final_lr: float | None
) -> tuple[FlatParameters, Optimizer]:
    """Make the modules' parameters one vector, and the optimizer of that name over it, with a group per module.

    Gradients are not looked at: whoever clips them knows their norm.

    Args:
        name: key of `OPTIMIZERS`; a `FUSED` one has one group for all modules, since what it does to one has nothing
            to do with the others.
        modules: without parameters in common and on one device.
        lr: the step size.
        eps: of those that have one.
        final_lr: AdaBound's and AMSBound's; None measures each group's own.
    """
    settings: dict[str, Any] = {"lr": lr} if name in WITHOUT_EPS else {"lr": lr, "eps": eps}
    if issubclass(OPTIMIZERS[name], AdaBound):
        settings |= {"final_lr": AUTO if final_lr is None else final_lr, "nonfinite": "ignore"}
    if name in FUSED:
        settings["fused"] = True
        modules = [nn.ModuleList(modules)]
    flat = FlatParameters(modules)
    return flat, make_optimizer(name, [{"params": [group]} for group in flat.groups], **settings)


def optimizer_tensors(name: str, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state, named after it: another optimizer that goes on from here begins anew."""
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
    """Take back what `optimizer_tensors` gave, with a final_lr that was measured, or that is yet to be."""
    groups = optimizer.state_dict()["param_groups"]
    if optimizer.defaults.get("final_lr") == AUTO:
        for index, group in enumerate(groups):
            measured = tensors.get(f"{name}.final_lr.{index}")
            group["final_lr"] = AUTO if measured is None else measured.item()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        first, _, last = key.removeprefix(f"{name}.").partition(".")
        if key.startswith(f"{name}.") and first != "final_lr":
            state.setdefault(int(first), {})[last] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
