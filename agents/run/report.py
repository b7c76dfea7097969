"""What a run shows of itself: tables for the terminal, plots for the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from agents.run.evaluation import Evaluation
from agents.run.folder import RunFolder, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORIGIN_STYLES = {"default": "dim", "preset": "cyan", "flag": "bold green"}
EVALUATION_COLOR, TRAINING_COLOR = "#1f5fa8", "#9a9a9a"


def hyperparameter_table(config: Mapping[str, Any], origins: Mapping[str, str]) -> Table:
    """Every hyperparameter with its value and origin, in two columns of three."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for _ in range(2):
        table.add_column("hyperparameter")
        table.add_column("value", justify="right", overflow="fold")
        table.add_column("from")
    cells = [(name, _value(value), origins[name]) for name, value in config.items()]
    half = -(-len(cells) // 2)
    for left, right in zip(cells[:half], [*cells[half:], ("", "", "")], strict=False):
        table.add_row(*(f"[{ORIGIN_STYLES.get(cell[2], 'none')}]{text}" for cell in (left, right) for text in cell))
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """The statistics of an evaluation."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("episodes", "mean return", "95 % interval", "IQM", "lowest", "highest", "mean length", "steps"):
        table.add_column(heading, justify="right")
    lower, upper = evaluation.interval
    table.add_row(
        f"{evaluation.episodes}",
        f"{evaluation.mean:,.1f}",
        f"{lower:,.1f} to {upper:,.1f}",
        f"{evaluation.iqm:,.1f}",
        f"{evaluation.returns.min():,.1f}",
        f"{evaluation.returns.max():,.1f}",
        f"{evaluation.lengths.mean():,.1f}",
        f"{evaluation.steps:,}",
    )
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
    axes.xaxis.set_major_formatter(_steps_formatter())
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(folder.curve, dpi=150)


def plot_returns(evaluation: Evaluation, file: Path, title: str) -> None:
    """Draw the histogram of episode returns, every episode as a tick, with the mean and its interval."""
    figure, axes = _axes(title)
    axes.hist(evaluation.returns, bins="auto", color=EVALUATION_COLOR, alpha=0.35, linewidth=0)
    axes.plot(
        evaluation.returns,
        [0.0] * evaluation.episodes,
        "|",
        color=EVALUATION_COLOR,
        markersize=14,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )
    axes.axvspan(*evaluation.interval, color=TRAINING_COLOR, alpha=0.3, linewidth=0, label="95 % interval of the mean")
    axes.axvline(evaluation.mean, color="black", linewidth=1.2, label=f"mean {evaluation.mean:,.1f}")
    axes.axvline(evaluation.iqm, color="black", linewidth=1.2, linestyle=":", label=f"IQM {evaluation.iqm:,.1f}")
    axes.set_xlabel("return of one episode")
    axes.set_ylabel("episodes")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150, format="png")


def _axes(title: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _steps_formatter() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
