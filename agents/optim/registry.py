"""Optimizers by name, as configurations and checkpoints say them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import Optimizer, ParamsT

from agents.config import SCHEDULED, CommonConfig, above, near
from agents.optim.adabound import AUTO, AdaBound, AMSBound, handover_gamma
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


HANDOVER_STEPS = 500_000
"""Environment steps before a hand-over by default: half of a training of the usual million."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(CommonConfig):
    """What steps policy and critic, on gradients of all their parameters together."""

    optimizer: OptimizerName = "adabound"
    """What steps policy and critic."""
    learning_rate: Annotated[float, above(0), SCHEDULED] = 3e-4
    """The optimizer's step size."""
    eps: Annotated[float, above(0)] = 1e-5
    """Added to the root of the second moment, by every optimizer that divides by it. 1e-5 is what Stable-Baselines3
    gives Adam."""
    final_lr: Annotated[float, above(0)] | None = None
    """AdaBound's and AMSBound's step size in the end, for policy and critic; None measures each one's own at the
    hand-over, because their gradients differ in size: Adam's steps on Hopper-v5 have medians near 12 and 0.3."""
    handover: Annotated[float, above(0)] | None = None
    """When AdaBound and AMSBound hand over from Adam to SGD: above 1, a number of optimizer steps; up to 1, a share of
    those that a call of `learn` plans, as SB3's schedules are; None after 500,000 environment steps, however training
    is cut into calls. AdaBound's own gamma = 1e-3, which is 1000, would do so within a few iterations. Where Adam's
    steps differ much between elements, the KL rises at the hand-over: target_kl bounds it."""
    max_grad_norm: Annotated[float, above(0)] = 0.5
    """Longest gradient, over all parameters of policy and critic together."""


def make_optimizer(name: str, params: ParamsT, **settings: Any) -> Optimizer:
    """Make the optimizer of that name over params, with its own settings.

    Raises:
        ValueError: no optimizer has that name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"there is no optimizer {name!r}{near(name, OPTIMIZERS)}")
    return OPTIMIZERS[name](params, **settings)


def make_flat_optimizer(c: OptimizerConfig, modules: Sequence[nn.Module]) -> tuple[FlatParameters, Optimizer]:
    """Make the modules' parameters one vector, and the optimizer that c says over it, with a group per module.

    Gradients are not looked at: whoever clips them knows their norm.

    Args:
        c: its options. A `FUSED` optimizer has one group for all modules, since what it does to one has nothing to do
            with the others.
        modules: without parameters in common and on one device.
    """
    settings: dict[str, Any] = {"lr": c.learning_rate} | ({} if c.optimizer in WITHOUT_EPS else {"eps": c.eps})
    if issubclass(OPTIMIZERS[c.optimizer], AdaBound):
        settings |= {"final_lr": AUTO if c.final_lr is None else c.final_lr, "nonfinite": "ignore"}
    if c.optimizer in FUSED:
        settings["fused"] = True
        modules = [nn.ModuleList(modules)]
    flat = FlatParameters(modules)
    return flat, make_optimizer(c.optimizer, [{"params": [group]} for group in flat.groups], **settings)


def plan_handover(optimizer: Optimizer, handover: float, updates: int) -> None:
    """Tell AdaBound and AMSBound when to hand over to SGD; others have nothing to.

    Args:
        handover: up to 1, a share of the updates; above 1, a number of them.
        updates: optimizer steps planned.
    """
    for group in optimizer.param_groups:
        if "gamma" in group:
            group["gamma"] = 1 / handover if handover > 1 else handover_gamma(handover, updates)


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps between updates, under its name: another one that goes on from here begins anew."""

    name: str
    """Key of `OPTIMIZERS`."""
    optimizer: Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Give its state, and the final_lr that it has measured or was given."""
        state = self.optimizer.state_dict()
        tensors = {
            f"{self.name}.{index}.{key}": value
            for index, entries in state["state"].items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }
        measured = {
            f"{self.name}.final_lr.{index}": torch.tensor(group["final_lr"], dtype=torch.float64)
            for index, group in enumerate(state["param_groups"])
            if group.get("final_lr", AUTO) != AUTO
        }
        return tensors | measured

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave, with a final_lr that was measured, or that is yet to be."""
        groups = self.optimizer.state_dict()["param_groups"]
        if self.optimizer.defaults.get("final_lr") == AUTO:
            for index, group in enumerate(groups):
                measured = tensors.get(f"{self.name}.final_lr.{index}")
                group["final_lr"] = AUTO if measured is None else measured.item()
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            first, _, last = key.removeprefix(f"{self.name}.").partition(".")
            if key.startswith(f"{self.name}.") and first != "final_lr":
                # Steps are counted on the host; the optimizer brings them where it counts otherwise.
                state.setdefault(int(first), {})[last] = value.cpu() if last == "step" else value
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
