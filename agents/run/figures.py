"""Figures of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agents.run import statistics
from agents.run.report import axes_of, steps_formatter
from agents.run.statistics import Scored

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 101
"""Of a curve."""


def plot_comparison(runs: Sequence[Scored], scores: Mapping[str, Mapping[str, np.ndarray]], file: Path) -> None:
    """Draw learning curves over steps and seconds, a row for each environment, then IQMs and performance profiles."""
    envs = list(dict.fromkeys(run.env for run in runs if len(run.curve.get("steps", ())) > 1))
    colors = {group: f"C{k % 10}" for k, group in enumerate(scores)}
    figure, axes = axes_of(2 * len(envs) + 2, columns=2)
    for row, env in enumerate(envs):
        here = [run for run in runs if run.env == env and len(run.curve.get("steps", ())) > 1]
        for axis, over in zip(axes[2 * row :], ("steps", "seconds"), strict=False):
            _curves(axis, here, over, colors)
            axis.set_title(f"{env}: IQM over seeds, 95 % band", loc="left", fontsize=10)
    unit = "return" if len({run.env for run in runs}) == 1 else "normalized score"
    _intervals(axes[-2], scores, unit, colors)
    _profiles(axes[-1], scores, unit, colors)
    lines = axes[-1].get_lines()
    figure.legend(lines, [str(x.get_label()) for x in lines], loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=150)


def _curves(axis: Axes, runs: Sequence[Scored], over: str, colors: Mapping[str, str]) -> None:
    """Draw each group's IQM over seeds and its interval, as far as all its runs went; a run alone is a line."""
    for group in dict.fromkeys(run.group for run in runs):
        curves = [run.curve for run in runs if run.group == group]
        grid = np.linspace(max(c[over][0] for c in curves), min(c[over][-1] for c in curves), POINTS)
        values = np.array([np.interp(grid, c[over], c["mean"]) for c in curves])
        axis.plot(grid, statistics.iqm(values, axis=0), color=colors[group], linewidth=1.6)
        low, high = statistics.stratified_interval(statistics.iqm, values)
        if np.ndim(low):
            axis.fill_between(grid, low, high, color=colors[group], alpha=0.2, linewidth=0)
    axis.set_xlabel("environment steps" if over == "steps" else "seconds, evaluations included")
    axis.set_ylabel("return of an evaluation")
    axis.set_xlim(left=0)
    if over == "steps":
        axis.xaxis.set_major_formatter(steps_formatter())


def _intervals(
    axis: Axes, scores: Mapping[str, Mapping[str, np.ndarray]], unit: str, colors: Mapping[str, str]
) -> None:
    """Draw each group's IQM, its interval as a bar, and every run as a tick."""
    groups = list(scores)
    axis.use_sticky_edges = False  # bars may end at the best score, which is not the figure's edge
    for row, group in enumerate(reversed(groups)):
        strata = list(scores[group].values())
        values = np.concatenate(strata)
        low, high = statistics.stratified_interval(statistics.iqm, *strata)
        if not np.isnan(low):
            axis.barh(row, high - low, left=low, height=0.5, color=colors[group], alpha=0.35)
        axis.plot([statistics.iqm(values)] * 2, [row - 0.25, row + 0.25], color=colors[group], linewidth=2.5)
        axis.plot(values, [row] * len(values), "|", color="black", markersize=8, alpha=0.6)
    axis.set_yticks(range(len(groups)), [_wrapped(group) for group in reversed(groups)], fontsize=8)
    axis.set_ylim(-0.6, len(groups) - 0.4)
    axis.set_xlabel(f"{unit} of the final policy: IQM, 95 % interval, runs")
    axis.set_title("interquartile means", loc="left", fontsize=10)


def _profiles(axis: Axes, scores: Mapping[str, Mapping[str, np.ndarray]], unit: str, colors: Mapping[str, str]) -> None:
    """Draw the share of each group's runs that end above a score, over the score, with bands."""
    everything = np.concatenate([x for own in scores.values() for x in own.values()])
    margin = 0.03 * (np.ptp(everything) or 1.0)
    grid = np.linspace(everything.min() - margin, everything.max() + margin, POINTS)
    for group, own in scores.items():
        above = [(x[:, None] > grid).astype(float) for x in own.values()]
        axis.plot(grid, np.concatenate(above).mean(0), color=colors[group], linewidth=1.6, label=group)
        low, high = statistics.stratified_interval(np.mean, *above)
        if np.ndim(low):
            axis.fill_between(grid, low, high, color=colors[group], alpha=0.2, linewidth=0)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel(f"{unit} x")
    axis.set_ylabel("share of runs above x")
    axis.set_title("performance profiles", loc="left", fontsize=10)


def _wrapped(label: str) -> str:
    return label.replace(" ", "\n", 1)
