"""What a run shows of itself: tables for the terminal, plots for the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from agents.run.evaluation import Evaluation
from agents.run.folder import RunFolder, read_rows
from agents.run.statistics import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORIGIN_STYLES = {"default": "dim", "preset": "cyan", "file": "magenta", "flag": "bold green"}
EVALUATION_COLOR, TRAINING_COLOR = "#1f5fa8", "#9a9a9a"


def hyperparameter_table(config: Mapping[str, Any], origins: Mapping[str, str], width: int) -> Table:
    """List every hyperparameter with its value and origin, side by side in two halves where the width has room."""
    headings = ("hyperparameter", "value", "from")
    cells = [(name, _value(value), origins.get(name, "default")) for name, value in config.items()]
    one = sum(max(map(len, column)) + 2 for column in zip(headings, *cells, strict=True))
    parts = 2 if 2 * one <= width else 1
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for _ in range(parts):
        table.add_column(headings[0])
        table.add_column(headings[1], justify="right")
        table.add_column(headings[2])
    rows = -(-len(cells) // parts)
    for row in zip_longest(*(cells[k * rows : (k + 1) * rows] for k in range(parts)), fillvalue=("", "", "")):
        table.add_row(*(Text(text, style=ORIGIN_STYLES.get(cell[2], "")) for cell in row for text in cell))
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """Show the statistics of an evaluation."""
    lower, upper = evaluation.interval
    columns = {
        "episodes": f"{evaluation.episodes:,}",
        "mean return": f"{evaluation.mean:,.1f}",
        "95 % interval": f"{lower:,.1f} to {upper:,.1f}",
        "IQM": f"{evaluation.iqm:,.1f}",
        "min": f"{evaluation.returns.min():,.1f}",
        "max": f"{evaluation.returns.max():,.1f}",
        "mean length": f"{evaluation.lengths.mean():,.1f}",
    }
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for heading in columns:
        table.add_column(heading, justify="right")
    table.add_row(*columns.values())
    return table


def plot_curve(folder: RunFolder, title: str) -> None:
    """Draw curve.png: evaluations with their interval, and the training return, over environment steps."""
    figure, axes = _axes(title)
    training = [(row["time/total_timesteps"], row.get("rollout/ep_rew_mean")) for row in read_rows(folder.progress)]
    points = [(int(steps), float(value)) for steps, value in training if value]
    if points:
        axes.plot(*zip(*points, strict=True), color=TRAINING_COLOR, linewidth=1.0, label="training, last 100 episodes")
    rows = read_rows(folder.evaluations)
    if rows:
        steps, mean, lower, upper = ([float(row[key]) for row in rows] for key in ("steps", "mean", "lower", "upper"))
        axes.fill_between(steps, lower, upper, color=EVALUATION_COLOR, alpha=0.2, linewidth=0)
        axes.plot(
            steps,
            mean,
            color=EVALUATION_COLOR,
            linewidth=1.8,
            marker="o",
            markersize=3.5,
            label="evaluation, deterministic, mean and 95 % interval",
        )
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(steps_formatter())
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(folder.curve, dpi=150)


def plot_returns(evaluation: Evaluation, file: Path, title: str) -> None:
    """Draw the histogram of episode returns, every episode as a tick, with the mean and its interval."""
    figure, axes = _axes(title)
    alike = evaluation.returns.min() == evaluation.returns.max()
    around = (evaluation.mean - (width := max(1.0, 0.05 * abs(evaluation.mean))), evaluation.mean + width)
    bins = {"bins": 21, "range": around} if alike else {"bins": "auto"}
    axes.hist(evaluation.returns, **bins, color=EVALUATION_COLOR, alpha=0.35, linewidth=0)
    axes.ticklabel_format(axis="x", useOffset=False)
    ticks = [0.03] * evaluation.episodes
    axes.plot(
        evaluation.returns, ticks, "|", color=EVALUATION_COLOR, markersize=10, transform=axes.get_xaxis_transform()
    )
    axes.axvspan(*evaluation.interval, color=TRAINING_COLOR, alpha=0.3, linewidth=0, label="95 % interval of the mean")
    axes.axvline(evaluation.mean, color="black", linewidth=1.2, label=f"mean {evaluation.mean:,.1f}")
    axes.axvline(evaluation.iqm, color="black", linewidth=1.2, linestyle=":", label=f"IQM {evaluation.iqm:,.1f}")
    axes.set_xlabel("return of one episode")
    axes.set_ylabel("episodes")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def plot_study(trials: Sequence[tuple[int, float]], importances: Mapping[str, float], title: str, file: Path) -> None:
    """Draw the returns of a study's trials, (number, return) each, the best so far, and what decided them."""
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = axes_of(2, columns=2)
    numbers, values = np.array(trials, dtype=float).T
    left.plot(numbers, values, "o", color=TRAINING_COLOR, markersize=4, label="trial")
    best = np.maximum.accumulate(values)
    left.step(numbers, best, where="post", color=EVALUATION_COLOR, linewidth=1.6, label="best so far")
    left.set_xlabel("trial (those cut short are left out)")
    left.set_ylabel("return")
    left.set_title(title, loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    names = list(importances)[::-1]
    right.barh(names, [importances[name] for name in names], color=EVALUATION_COLOR, height=0.6)
    right.set_xlim(0, 1)
    right.set_xlabel("share in what decides the best quarter (PED-ANOVA)")
    right.set_title("importance" if names else "importance: too few trials", loc="left", fontsize=10)
    figure.savefig(file, dpi=150)


def adaptation_statistics(values: np.ndarray) -> dict[str, list[Any]]:
    """Return means and intervals over tasks after each update, of returns [updates + 1, M]."""
    return {"mean": values.mean(1).tolist(), "interval": [bootstrap_interval(row) for row in values]}


def adaptation_table(rows: Mapping[str, np.ndarray]) -> Table:
    """Show returns after each update, a row per policy: name -> returns [updates + 1, M]."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("policy", max_width=24)
    for update in range(max(map(len, rows.values()))):
        table.add_column(f"after {update}", justify="right")
    for name, values in rows.items():
        found = adaptation_statistics(values)
        pairs = zip(found["mean"], found["interval"], strict=True)
        table.add_row(name, *(f"{mean:,.1f}\n{low:,.1f} to {high:,.1f}" for mean, (low, high) in pairs))
    return table


def plot_adaptation(rows: Mapping[str, np.ndarray], file: Path, title: str) -> None:
    """Draw returns over updates, with their intervals; a policy that is not adapted is a level line."""
    figure, axes = _axes(title)
    last = max(map(len, rows.values())) - 1
    for index, (name, values) in enumerate(rows.items()):
        found = adaptation_statistics(values)
        means, intervals = found["mean"], found["interval"]
        if len(means) == 1:
            axes.axhline(means[0], color=f"C{index}", linestyle="--", linewidth=1.4, label=name)
            axes.axhspan(*intervals[0], color=f"C{index}", alpha=0.15, linewidth=0)
            continue
        axes.plot(range(len(means)), means, color=f"C{index}", marker="o", markersize=4, label=name)
        low, high = zip(*intervals, strict=True)
        axes.fill_between(range(len(means)), low, high, color=f"C{index}", alpha=0.2, linewidth=0)
    axes.set_xticks(range(last + 1))
    axes.set_xlabel("updates on the task")
    axes.set_ylabel("return")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def axes_of(count: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure with count panels in rows of columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    size = (7.0, 4.2) if count == 1 else (5.0 * columns, 3.2 * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)[:count]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _axes(title: str) -> tuple[Figure, Axes]:
    figure, (axes,) = axes_of(1)
    axes.set_title(title, loc="left", fontsize=11)
    return figure, axes


def steps_formatter() -> Any:
    """Write steps as 200k and 1M."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
