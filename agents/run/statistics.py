"""What several runs say together: interquartile means, intervals over seeds, and who ends above whom.

Everything here is what rliable computes (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264), by SciPy's bootstrap:
seeds are drawn again within each environment, which are the strata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES, MEAN_RESAMPLES = 2000, 9999
LEVELS = 0.025, 0.975
Interval = tuple[Any, Any]
"""Low and high: numbers, or arrays of them."""
UNKNOWN = (np.nan, np.nan)
"""The interval of one run: it takes two to say how runs differ."""


@dataclass(frozen=True)
class Scored:
    """A run and what it is worth."""

    path: str
    env: str
    algorithm: str
    group: str
    seed: int
    steps: int
    seconds: float
    episodes: int
    score: float
    """Mean return of the final policy's episodes."""
    interval: tuple[float, float]
    """Of that mean, over episodes."""
    finished: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What may tell groups of one algorithm apart."""
    curve: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of its evaluations: "steps", "seconds" and "mean", [E] each; {} if there were none."""
    returns: Sequence[float] = ()
    """Of each episode, where they are known."""


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of values [n]; the value itself if they all agree.

    It is SciPy's, whose statistics take a second to import: at every start of a run.
    """
    if np.ptp(values) == 0.0:
        return float(values[0]), float(values[0])
    drawn = np.random.default_rng(0).integers(0, len(values), (MEAN_RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), LEVELS)
    return float(low), float(high)


def iqm(values: np.ndarray, axis: int | None = None) -> Any:
    """Return the interquartile mean: without the lowest and the highest quarter (Agarwal et al. 2021, section 4.3).

    Of fewer than four values it is the mean.
    """
    if axis is None:
        values, axis = np.ravel(values), 0
    n = values.shape[axis]
    ordered = np.partition(values, (n // 4, n - n // 4 - 1), axis)
    return np.take(ordered, range(n // 4, n - n // 4), axis).mean(axis)


def stratified_interval(statistic: Callable[..., Any], *strata: np.ndarray) -> Interval:
    """Return the 95 % percentile bootstrap interval of a statistic of all strata's rows together.

    Args:
        statistic: of values [n, ...] along an axis.
        strata: [n_k, ...] each, whose rows are drawn again within them.
    """

    def together(*parts: np.ndarray, axis: int) -> Any:
        return statistic(np.concatenate(parts, axis=axis), axis=axis)

    return _interval(together, *strata)


def improvement(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[float, Interval]:
    """Return the probability that a run of a ends above one of b, ties being halves, and its 95 % interval.

    Args:
        a, b: scores of each environment's runs, [n_k] and [m_k]; the environments' probabilities are averaged.
    """

    def probability(*samples: np.ndarray, axis: int = -1) -> Any:
        pairs = zip(samples[: len(a)], samples[len(a) :], strict=True)
        wins = [np.sign(x[..., :, None] - y[..., None, :]).mean((-1, -2)) for x, y in pairs]
        return (np.mean(wins, axis=0) + 1) / 2

    return float(probability(*a, *b)), _interval(probability, *a, *b, axis=-1)


def difference(statistic: Callable[..., Any], a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Interval:
    """Return the 95 % interval of statistic(a) - statistic(b), of each one's strata together, [n_k] and [m_k]."""

    def less(*samples: np.ndarray, axis: int) -> Any:
        first, second = (np.concatenate(part, axis=axis) for part in (samples[: len(a)], samples[len(a) :]))
        return statistic(first, axis=axis) - statistic(second, axis=axis)

    return _interval(less, *a, *b)


def _interval(statistic: Callable[..., Any], *samples: np.ndarray, axis: int = 0) -> Interval:
    if min(map(len, samples)) < 2:
        return UNKNOWN
    from scipy.stats import bootstrap

    found = bootstrap(
        samples,
        statistic,
        axis=axis,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return found.low, found.high
