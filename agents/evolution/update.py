"""What an update goes by: its options, and the running scale of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from agents.config import SCHEDULED, CommonConfig, above, at_least, below, between

MOST_SURPRISE = 3.0
"""Most that a window's standard deviation of scores counts, in units of the averaged one."""


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(CommonConfig):
    """How perturbations, scores and the optimizer make a step."""

    sigma: Annotated[float, above(0)] = 0.1
    """Standard deviation of a perturbation, in units of a parameter."""
    sigma_end: Annotated[float, above(0)] | None = None
    """The same at the end of training, reached linearly; None keeps it."""
    learning_rate: Annotated[float, above(0), SCHEDULED] = 0.02
    """Step size. The update is learning_rate times the mean over pairs of (u+ - u-) σ ξ, with scores u in standard
    deviations: for es that is Mania et al.'s α. adam, adabound and clipup take it in units of a parameter."""
    learning_rate_end: Annotated[float, at_least(0)] | None = None
    """The same at the end of training, reached linearly; None keeps it."""
    optimizer: Literal["sgd", "adam", "clipup", "adabound"] = "sgd"
    """sgd, adam, clipup (Toklu et al. 2020) or adabound (Luo et al. 2019)."""
    momentum: Annotated[float, at_least(0), below(1)] | None = None
    """Share of the last direction that is left after an episode, also Adam's β₁; None is 0 for sgd, 0.9 for others. An
    update of K steps takes the power K/T of it."""
    beta2: Annotated[float, at_least(0), below(1)] = 0.99
    """Adam's and AdaBound's β₂, per episode too."""
    final_lr: Annotated[float, above(0)] | None = None
    """AdaBound's step size in the end; None measures it at the hand-over."""
    handover: Annotated[float, above(0), between(0, 1)] = 0.5
    """When AdaBound hands over from Adam to SGD, as a share of the updates that are made if no episode ends early."""
    reward_scaling: Literal["std", "ranks", "log_ranks", "none"] = "std"
    """std (scores divided by their standard deviation), none, or for es only ranks (centered, Salimans et al. 2017) and
    log_ranks (those of NES and CMA-ES, in their standard deviations), which tell the best from the good and no bad from
    worse."""
    reward_memory: Annotated[float, at_least(0)] = 1.0
    """Episodes over which the standard deviation is averaged; the highest average of earlier windows counts, which
    cannot re-weight the windows. 0 takes the window's own, as Mania et al. 2018 do."""
    top_directions: Annotated[int, at_least(1)] | None = None
    """b, pairs that count, those with the highest scores (Mania et al. 2018); es only. None counts all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_directions is not None and self.ranked:
            raise ValueError(
                f"reward_scaling is {self.reward_scaling!r}, of all pairs; with top_directions give 'std' or 'none'."
            )

    @property
    def ranked(self) -> bool:
        """Say whether scores count by their ranks."""
        return self.reward_scaling in ("ranks", "log_ranks")


class RewardScale:
    """σ_R: the standard deviation of scores, averaged over earlier windows, at its highest; 1 where all are equal.

    An average that fell while all twins did equally well would make the next difference a huge step: the rare, large
    gradients of Reddi et al. 2018, https://arxiv.org/abs/1904.09237, who take the maximum too. It is of earlier windows
    alone, so the direction keeps its mean. Where they had next to no differences, `MOST_SURPRISE` bounds the first.
    """

    def __init__(self) -> None:
        self.variance: Tensor | None = None
        """The scores' variance, averaged over the windows so far, of shape (); not a number where none was finite."""
        self.highest: Tensor | None = None
        """The highest that this average has been."""

    def update(self, scores: Tensor, memory: float) -> Tensor:
        """Take a window's scores [k] in and return σ_R for them, of shape (); those that are not finite leave no trace.

        Args:
            memory: windows over which the variance is averaged, exponentially; 0: σ_R is the window's own.
        """
        own, kept = scores.var(correction=0), math.exp(-1 / memory) if memory > 0 else 0.0
        before = self.variance, self.highest
        average, highest = (torch.full_like(own, math.nan) if x is None else x.to(own) for x in before)
        averaged = torch.where(average.isnan(), own, kept * average + (1 - kept) * own)
        self.variance = torch.where(own.isfinite(), averaged, average)
        self.highest = torch.fmax(self.variance, highest)
        square = own
        if memory > 0:
            square = torch.where(highest.isnan(), own, torch.maximum(highest, own / MOST_SURPRISE**2))
        return torch.where(own == 0, 1.0, square.sqrt())

    def tensors(self) -> dict[str, Tensor]:
        """Return its state; nothing before the first window."""
        if self.variance is None or self.highest is None:
            return {}
        return {"reward_variances": torch.stack((self.variance, self.highest)).double()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        held = tensors.get("reward_variances")
        self.variance, self.highest = (None, None) if held is None else held.unbind()
