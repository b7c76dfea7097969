"""What AdaBound and AMSBound refuse: options out of their range, and states of another optimizer or network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from agents.optim.effective_steps import AUTO

NONFINITE = ("raise", "skip", "ignore")
"""What a gradient that is not finite may do."""

PUBLIC_OPTIONS = ("lr", "betas", "final_lr", "gamma", "eps", "weight_decay", "amsbound")
"""What a group of the public code holds."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse a group's options that are out of their range, or that exclude each other."""
    lr, final_lr, gamma, betas = (options[name] for name in ("lr", "final_lr", "gamma", "betas"))
    capturable, foreach = options["capturable"], options["foreach"]
    for conflict, remedy in (
        (foreach and options["differentiable"], "foreach=True cannot be differentiated; leave it out"),
        (
            isinstance(lr, Tensor) and (lr.dim() > 0 or (foreach and not capturable)),
            "a tensor lr needs the shape () and, with foreach=True, capturable=True; give a float",
        ),
        (
            capturable and final_lr == AUTO,
            "final_lr='auto' is measured on the host, which capturable=True rules out; give final_lr as a number",
        ),
        (
            capturable and options["nonfinite"] != "ignore",
            "gradients are looked at on the host, which capturable=True rules out; give nonfinite='ignore'",
        ),
        (
            final_lr == AUTO and options["eps"] == 0,
            "final_lr='auto' begins as Adam, which divides by eps where there is no gradient; give a positive eps",
        ),
    ):
        if conflict:
            raise ValueError(f"{remedy}.")
    for name, allowed, remedy in (
        ("lr", 0 < lr < math.inf, "a positive number; a schedule may take it to 0 later"),
        ("base_lr", 0 < options.get("base_lr", 1.0) < math.inf, "a positive number, the lr at which α* is final_lr"),
        ("final_lr", final_lr == AUTO or _is_positive(final_lr), f"a positive number, SGD's step size, or {AUTO!r}"),
        ("gamma", _is_positive(gamma), "a positive number per update, or handover_gamma(fraction, updates)"),
        ("betas", len(betas) == 2 and all(_is_fraction(beta) for beta in betas), "two numbers in [0, 1)"),
        ("eps", 0 <= options["eps"] < math.inf, "a number of at least 0"),
        ("weight_decay", 0 <= options["weight_decay"] < math.inf, "a number of at least 0"),
        ("nonfinite", options["nonfinite"] in NONFINITE, " or ".join(map(repr, NONFINITE))),
    ):
        if not allowed:
            raise ValueError(f"{name} is {options[name]!r}; give {remedy}.")


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def check_layout(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Refuse groups without AdaBound's options and states that fit no parameter; torch checks how many there are."""
    kind = type(optimizer).__name__
    for index, (saved, group) in enumerate(zip(state_dict["param_groups"], optimizer.param_groups, strict=False)):
        if missing := [option for option in PUBLIC_OPTIONS if option not in saved]:
            raise ValueError(
                f"the state is not {kind}'s: its group {index} lacks {', '.join(missing)}; load one that {kind} saved."
            )
        if saved["amsbound"] != group["amsbound"]:
            raise ValueError(
                f"the state's group {index} has amsbound={saved['amsbound']}, this optimizer's has "
                f"{group['amsbound']}; load it into {'AMSBound' if saved['amsbound'] else 'AdaBound'}."
            )
        for i, (key, parameter) in enumerate(zip(saved["params"], group["params"], strict=False)):
            for entry, value in state_dict["state"].get(key, {}).items():
                if entry != "step" and value.shape != parameter.shape:
                    raise ValueError(
                        f"the state's {entry} for {parameter_name(group, index, i)} has the shape "
                        f"{list(value.shape)}, the parameter has {list(parameter.shape)}; load a state of the same "
                        "network."
                    )


def parameter_name(group: Mapping[str, Any], index: int, i: int) -> str:
    """Name the i-th parameter of a group for an error: as it was named, or by place and shape."""
    if "param_names" in group:
        return repr(group["param_names"][i])
    return f"parameter {i} of group {index}, of shape {list(group['params'][i].shape)},"
