"""SB3's logger into a run folder, appended to when a run goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import CSVOutputFormat, HParam, Logger, TensorBoardOutputFormat
from torch.utils.tensorboard.writer import SummaryWriter

from agents import REGISTRY
from agents.run.evaluation import Evaluation
from agents.run.folder import RunConfig, RunFolder

STEPS = "time/total_timesteps"
NOT_TENSORBOARD = "tensorboard"
FINAL, BEST = "eval/mean_reward", "eval/best_mean_reward"
"""What HPARAMS compares runs by: the last evaluation, which at the end is the final policy's, and the best one."""
ONLY_TENSORBOARD = ("stdout", "log", "json", "csv")
FIRST = {
    "eval": ("mean_reward", "mean_ep_length"),
    "train": (
        *("kl", "approx_kl", "entropy", "std", "sigma", "learning_rate", "explained_variance", "clip_fraction"),
        *("loss", "value_loss", "policy_gradient_loss", "entropy_loss"),
    ),
}
"""What TensorBoard shows first of these groups; the rest of each is a group at the end, such as verbose_train."""


class _Columns(list[str]):
    """Names of columns, to which new ones come in an order: SB3 takes them from a set."""

    def extend(self, names: Iterable[str]) -> None:
        super().extend(sorted(names, key=lambda name: (name != STEPS, name)))


class _AppendingCSV(CSVOutputFormat):
    """SB3's CSV file, opened with the rows that it has."""

    def __init__(self, filename: str) -> None:
        Path(filename).touch()
        self.file = Path(filename).open("r+")  # noqa: SIM115, the logger closes it
        header = self.file.readline().strip()
        self.keys = _Columns(header.split(",") if header else [])
        self.file.seek(0, 2)
        self.separator = ","
        self.quotechar = '"'


class _AppendingTensorBoard(TensorBoardOutputFormat):
    """SB3's TensorBoard events; earlier ones from purge_step on are not shown."""

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.writer = SummaryWriter(log_dir=folder, purge_step=purge_step)
        self._is_closed = False

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Write values, the details among them to groups of their own."""
        excluded = {tag_of(name): formats for name, formats in key_excluded.items()}
        super().write({tag_of(name): value for name, value in key_values.items()}, excluded, step)


def tag_of(name: str) -> str:
    """Say under which tag TensorBoard shows what an agent logs by a name."""
    group, _, rest = name.partition("/")
    return name if rest in FIRST.get(group, (rest,)) else f"verbose_{group}/{rest}"


def run_logger(folder: RunFolder, steps: int, dashboard: dict[str, dict[str, list[str]]] | None = None) -> Logger:
    """Open a logger into progress.csv and TensorBoard events for a run that has made steps environment steps.

    Args:
        dashboard: group -> chart -> curves, for TensorBoard's page of custom scalars.
    """
    purge_step = steps + 1 if steps else None
    tensorboard = _AppendingTensorBoard(str(folder.path), purge_step)
    if dashboard:
        # TensorBoard reads tags as the beginnings of regular expressions: "train/kl" would show "train/kl_reverse" too.
        layout = {
            group: {
                chart: ["Multiline", [f"{re.escape(tag_of(tag))}$" for tag in tags]] for chart, tags in charts.items()
            }
            for group, charts in dashboard.items()
        }
        tensorboard.writer.add_custom_scalars(layout)
    return Logger(str(folder.path), [_AppendingCSV(str(folder.progress)), tensorboard])


def record_hyperparameters(logger: Logger, settings: RunConfig, folder: RunFolder) -> None:
    """Record what a run was started with for TensorBoard's HPARAMS and TEXT pages; the next dump writes them."""
    run = {name: getattr(settings.run, name) for name in ("env", "seed", "policy", "steps")}
    run["policy"] = run["policy"] or next(iter(REGISTRY[settings.algorithm].policy_aliases))
    all_values = {"algorithm": settings.algorithm, **run, **settings.config}
    # TensorBoard shows few columns, in the order of the alphabet: of hyperparameters those that someone chose.
    chosen = {name: x for name, x in all_values.items() if settings.origins.get(name) != "default"}
    numbers = {name for name, x in chosen.items() if isinstance(x, (bool, int, float)) and name != "seed"}  # as 0.0000
    values = {name: x if name in numbers else str(x) for name, x in chosen.items()}
    logger.record("hparams", HParam(values, dict.fromkeys(map(tag_of, (FINAL, BEST)), 0.0)), exclude=ONLY_TENSORBOARD)
    rows = [f"| {name} | {value} | {settings.origins.get(name, '')} |" for name, value in all_values.items()]
    logger.record("settings", "\n".join(["| name | value | from |", "|---|---|---|", *rows]), exclude=ONLY_TENSORBOARD)
    texts = {
        "command": f"`` {folder.command.read_text().strip()} ``",
        "versions": f"```\n{folder.versions.read_text()}\n```",
    }
    for name, text in texts.items():
        logger.record(name, text, exclude=ONLY_TENSORBOARD)


def log_evaluation(logger: Logger, steps: int, evaluation: Evaluation, best: float) -> None:
    """Write an evaluation made after steps training steps; its own steps are counted apart."""
    lower, upper = evaluation.interval
    logger.record(FINAL, evaluation.mean)
    logger.record(BEST, best, exclude=ONLY_TENSORBOARD)
    logger.record("eval/iqm_reward", evaluation.iqm)
    logger.record("eval/lower", lower)
    logger.record("eval/upper", upper)
    logger.record("eval/mean_ep_length", float(evaluation.lengths.mean()))
    logger.record("eval/steps", evaluation.steps)
    logger.record(STEPS, steps, exclude=NOT_TENSORBOARD)
    logger.dump(steps)
