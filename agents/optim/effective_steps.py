"""AdaBound's step lengths: their bounds at an update, what they would be without, and curves of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Scalar = Any
"""A float, or a tensor where the update is captured, compiled or differentiated."""

AUTO = "auto"
"""The final_lr of a group whose own is yet to be measured."""

QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
"""Of a group's elements, the nearest ranks."""


def scalars_at(step: Scalar, group: Mapping[str, Any]) -> tuple[Scalar, Scalar, Scalar]:
    """Return c = √(1 - β₂ᵗ) / (1 - β₁ᵗ) for t = step, and the bounds of √v + eps between which η is lr c / (√v + eps).

    Clamping the denominator costs less than clamping η.
    """
    beta1, beta2 = group["betas"]
    correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    lower, upper = bounds_at(step, group)
    return correction, correction / upper, correction / lower if group["final_lr"] != AUTO else math.inf


def bounds_at(step: Scalar, group: Mapping[str, Any]) -> tuple[Scalar, Scalar]:
    """Return the bounds of η / lr at update t = step; 0 and infinity while an automatic final_lr is not measured."""
    if group["final_lr"] == AUTO:
        return 0.0, math.inf
    # 1 - 1 / (gamma t + 1), in the form that loses no digits in float32.
    k = group["gamma"] * step / (group["gamma"] * step + 1)
    bound = group["final_lr"] / group["base_lr"]
    return bound * k, bound / k


@torch.no_grad()
def step_lengths(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Any]:
    """Return what the bounds did to the element-wise step lengths of the last update, at each group's current lr.

    Where a group's parameters have had different numbers of updates, each is bounded by its own, and lower and upper
    are those of the most updated.

    Args:
        optimizer: an AdaBound or AMSBound; there is nothing to tell of another.
        names: of its groups.

    Returns:
        Of each group that has had a gradient, over the elements that have: "adam_step_NAME_q05", "..._q50" and
        "..._q95", quantiles before the bounds, which Adam would use; "effective_step_NAME_q05" and so on, after them;
        "effective_step_NAME_raised" and "..._cut", the shares of elements that the bounds raised and cut; and, once
        there are bounds, "effective_step_NAME_lower" and "..._upper". All but these are scalar tensors.
    """
    numbers: dict[str, Any] = {}
    if "final_lr" not in optimizer.defaults:
        return numbers
    for name, group in zip(names, optimizer.param_groups, strict=True):
        parts = [(steps, bounds_at(t, group)) for t, steps in adam_steps(optimizer, group)]
        if not parts:
            continue
        lr = float(group["lr"])
        adam = lr * torch.cat([steps for steps, _ in parts])
        effective = lr * torch.cat([steps.clamp(lower, upper) for steps, (lower, upper) in parts])
        count = adam.isfinite().sum()
        for kind, steps in (("adam", adam.sort().values), ("effective", effective.sort().values)):
            for key, quantile in QUANTILES.items():
                rank = (quantile * (count - 1).double()).round().clamp(min=0).long()
                numbers[f"{kind}_step_{name}_{key}"] = steps.gather(0, rank[None])[0]
        numbers[f"effective_step_{name}_raised"] = (effective > adam).sum().double() / count
        numbers[f"effective_step_{name}_cut"] = (effective < adam).sum().double() / count
        if group["final_lr"] != AUTO:
            numbers[f"effective_step_{name}_lower"] = lr * max(lower for _, (lower, _) in parts)
            numbers[f"effective_step_{name}_upper"] = lr * min(upper for _, (_, upper) in parts)
    return numbers


def report(optimizer: Optimizer, names: Sequence[str]) -> dict[str, float]:
    """Return what `step_lengths` does, as numbers."""
    return {name: float(value) for name, value in step_lengths(optimizer, names).items()}


def adam_steps(optimizer: Optimizer, group: Mapping[str, Any]) -> Iterator[tuple[float, Tensor]]:
    """Give, per parameter that has been updated, t and η / lr without bounds of its elements, flat; not a number where
    they have had no gradient yet.
    """
    for parameter in group["params"]:
        if state := optimizer.state.get(parameter):
            second = state["max_exp_avg_sq" if group["amsbound"] else "exp_avg_sq"].detach()
            second = torch.view_as_real(second) if second.is_complex() else second
            step = float(state["step"])
            lengths = scalars_at(step, group)[0] / (second.flatten().sqrt() + group["eps"])
            yield step, torch.where(second.flatten() > 0, lengths, torch.nan)


def charts(names: Sequence[str]) -> dict[str, list[str]]:
    """Return title -> curves, for a dashboard of what `report` gives."""
    return {
        f"{name}: {title}": [f"train/{kind}_{name}_{key}" for key in keys]
        for name in names
        for title, kind, keys in (
            ("before the bounds", "adam_step", QUANTILES),
            ("after the bounds", "effective_step", QUANTILES),
            ("bounds", "effective_step", ("lower", "upper")),
            ("share that the bounds raise and cut", "effective_step", ("raised", "cut")),
        )
    }
