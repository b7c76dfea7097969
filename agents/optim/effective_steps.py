"""What AdaBound's bounds do to the step lengths, for curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.optim.adabound import AdaBound, bounds_at, denominators_of


@dataclass(frozen=True)
class EffectiveSteps:
    """A group's element-wise factors η on m in the last update, over the elements that have had a gradient.

    The tensors are on the parameters' device.
    """

    unbounded: Tensor
    """Quantiles [Q] of lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) / (√v + eps), which Adam would use."""
    bounded: Tensor
    """Quantiles [Q] of η."""
    lower: float
    """The lower bound; 0 before an automatic final_lr is measured."""
    upper: float
    """The upper bound; infinite before an automatic final_lr is measured."""
    raised: Tensor
    """Share of the elements that the lower bound raised, shape ()."""
    cut: Tensor
    """Share of the elements that the upper bound cut, shape ()."""


@torch.no_grad()
def effective_steps(
    optimizer: AdaBound, quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)
) -> list[EffectiveSteps | None]:
    """What the bounds do to each group, at the group's current lr; None for a group that has had no gradient.

    Where the parameters of a group have had different numbers of updates, each is bounded by its own, and lower and
    upper are those of the most updated.

    Args:
        optimizer: an AdaBound or AMSBound.
        quantiles: [Q] in [0, 1]; the nearest rank is taken.
    """
    return [_of_group(optimizer, group, quantiles) for group in optimizer.param_groups]


def _of_group(optimizer: AdaBound, group: Mapping[str, Any], quantiles: Sequence[float]) -> EffectiveSteps | None:
    parts = [
        (correction / denominators, bounds_at(step, group))
        for correction, denominators, step in denominators_of(optimizer, group)
    ]
    if not any(len(steps) for steps, _ in parts):
        return None
    lr = float(group["lr"])
    unbounded = lr * torch.cat([steps for steps, _ in parts])
    bounded = lr * torch.cat([steps.clamp(lower, upper) for steps, (lower, upper) in parts])
    lower, upper = max(lower for _, (lower, _) in parts), min(upper for _, (_, upper) in parts)
    ranks = [round(quantile * (len(unbounded) - 1)) for quantile in quantiles]
    return EffectiveSteps(
        unbounded.sort().values[ranks],
        bounded.sort().values[ranks],
        lr * lower,
        lr * upper,
        (bounded > unbounded).double().mean(),
        (bounded < unbounded).double().mean(),
    )
