"""What the scores of a window count: their ranks, the best pairs', or divided by a standard deviation that they had."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from agents.config import CommonConfig, at_least

MOST_SURPRISE = 3.0
"""Most that a window's standard deviation of scores counts, in units of the averaged one."""


@dataclass(frozen=True, kw_only=True)
class UtilityConfig(CommonConfig):
    """What scores count."""

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
        """Whether scores count by their ranks."""
        return self.reward_scaling in ("ranks", "log_ranks")


class RewardScale:
    """σ_R: the standard deviation of scores, averaged over earlier windows, at its highest; 1 where all are equal.

    An average that fell while all twins did equally well would make the next difference a huge step: the rare, large
    gradients of Reddi et al. 2018, https://arxiv.org/abs/1904.09237, who take the maximum too. It is of earlier windows
    alone, so the direction keeps its mean. Where they had next to no differences, `MOST_SURPRISE` bounds the first.
    """

    def __init__(self) -> None:
        self.variance: float | None = None
        """The scores' variance, averaged over the windows so far."""
        self.highest: float | None = None
        """The highest that this average has been."""

    def update(self, scores: Tensor, memory: float) -> float:
        """Take a window's scores [k] in and return σ_R for them.

        Args:
            memory: windows over which the variance is averaged, exponentially; 0: σ_R is the window's own.
        """
        own, average, highest = float(scores.var(correction=0)), self.variance, self.highest
        kept = math.exp(-1 / memory) if memory > 0 else 0.0
        self.variance = own if average is None else kept * average + (1 - kept) * own
        self.highest = max(self.variance, highest or 0.0)
        if own == 0.0:
            return 1.0
        return math.sqrt(own if highest is None or memory == 0 else max(highest, own / MOST_SURPRISE**2))

    def tensors(self) -> dict[str, Tensor]:
        """Return its state; nothing before the first window."""
        if self.variance is None:
            return {}
        return {"reward_variances": torch.tensor([self.variance, self.highest], dtype=torch.float64)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        held = tensors.get("reward_variances")
        self.variance, self.highest = (None, None) if held is None else held.tolist()


def centered_ranks(scores: Tensor) -> Tensor:
    """Rank scores [n] from -1/2 for the lowest to 1/2 for the highest; equal scores share their mean rank.

    Source: Salimans et al. 2017, section 2, https://arxiv.org/abs/1703.03864. A monotone rescaling of scores changes
    nothing; what is maximized is not the mean score.
    """
    n = len(scores)
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    # As many are below a score as are in earlier places, and above it as many as are in later ones.
    upto = counts.cumsum(0)
    below_less_above = (upto - counts) - (n - upto)
    return below_less_above[place].double() / max(2 * (n - 1), 1)


def log_ranks(scores: Tensor) -> Tensor:
    """Give utilities of scores [n] that fall with the logarithm of the rank, alike for the lower half; their sum is 0.

    Source: Wierstra et al. 2014, section 3.1, https://jmlr.org/papers/v15/wierstra14a.html; the weights are those of
    Hansen & Ostermeier 2001. Of equal scores the first ranks highest.
    """
    n = len(scores)
    ranks = torch.empty_like(scores, dtype=torch.float64)
    order = scores.argsort(descending=True, stable=True)
    ranks[order] = torch.arange(1, n + 1, dtype=torch.float64, device=scores.device)
    weights = (math.log(n / 2 + 1) - ranks.log()).clamp(min=0)
    return weights / weights.sum() - 1 / n


def top_pairs(scores: Tensor, count: int) -> Tensor:
    """Choose the count of n pairs with the highest better twin, by their scores [2n]: boolean [n].

    Source: Mania et al. 2018, algorithm 2, line 7, https://arxiv.org/abs/1803.07055. Of equal pairs the first are kept.
    """
    best = scores.view(-1, 2).amax(1)
    order = best.argsort(descending=True, stable=True)
    return torch.zeros_like(best, dtype=torch.bool).index_fill(0, order[:count], True)
