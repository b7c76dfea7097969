"""SB3's logger into a run folder, appended to when a run goes on."""

from __future__ import annotations

import io
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import HParam, KVWriter, Logger, TensorBoardOutputFormat, filter_excluded_keys
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from agents import REGISTRY
from agents.run.evaluation import Evaluation
from agents.run.folder import RunConfig, RunFolder, append_row, is_number, read_rows, write_rows
from agents.run.outputs import append

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


Writing = Callable[[Callable[[], object]], object]
"""Does what writes; see `outputs.Room`."""


class _CSV(KVWriter):
    """SB3's CSV file: a row is added whole, and a new header takes the earlier one's place with all rows, or not."""

    def __init__(self, file: Path, writing: Writing) -> None:
        self.file, self.writing = file, writing
        rows = read_rows(file)
        self.columns = list(rows[0]) if rows else []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        values = filter_excluded_keys(key_values, key_excluded, "csv")
        new = sorted(values.keys() - self.columns, key=lambda name: (name != STEPS, name))
        self.columns += new
        if new and self.file.is_file():
            rows = [dict.fromkeys(self.columns, "") | row for row in read_rows(self.file)]
            self.writing(lambda: write_rows(self.file, self.columns, rows))
        row = {name: values.get(name, "") for name in self.columns}
        self.writing(lambda: append_row(self.file, row))

    def close(self) -> None:
        pass


class _Events(EventFileWriter):
    """A new file of TensorBoard's events, which go to it when they are flushed: the whole ones, or none."""

    def __init__(self, folder: str, writing: Writing) -> None:
        # TensorBoard reads files in the order of their names, so that nothing but the time may decide it.
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010}.{rest:09}.{socket.gethostname()}.{os.getpid()}"
        self.folder, self.writing, self.buffer = folder, writing, io.BytesIO()
        self.file, self.records = Path(folder) / name, RecordWriter(self.buffer)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        return self.folder

    def add_event(self, event: Event) -> None:
        self.records.write(event.SerializeToString())

    def flush(self) -> None:
        if written := self.buffer.getvalue():
            self.writing(lambda: append(self.file, written))
            self.buffer.seek(0)
            self.buffer.truncate()

    def close(self) -> None:
        self.flush()

    reopen = flush


class _FileWriter(FileWriter):
    def __init__(self, log_dir: str, writing: Writing) -> None:
        self.event_writer = _Events(log_dir, writing)


class _SummaryWriter(SummaryWriter):
    """TensorBoard's writer, without the thread that ends where a disk is full."""

    def __init__(self, log_dir: str, purge_step: int | None, writing: Writing) -> None:
        self.writing = writing
        super().__init__(log_dir, purge_step=purge_step)

    def _get_file_writer(self: Any) -> FileWriter:
        if self.file_writer is None:
            self.file_writer = _FileWriter(self.log_dir, self.writing)
            self.all_writers = {self.log_dir: self.file_writer}
            step, self.purge_step = self.purge_step, None
            if step is not None:
                self.file_writer.add_event(Event(step=step, file_version="brain.Event:2"))
                self.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        return self.file_writer


class _TensorBoard(TensorBoardOutputFormat):
    """SB3's TensorBoard events; earlier ones from purge_step on are not shown."""

    def __init__(self, folder: str, purge_step: int | None, writing: Writing) -> None:
        self.writer = _SummaryWriter(folder, purge_step, writing)
        self._is_closed = False

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Write values, the details among them to groups of their own."""
        excluded = {tag_of(name): formats for name, formats in key_excluded.items()}
        super().write({tag_of(name): value for name, value in key_values.items()}, excluded, step)


def tag_of(name: str) -> str:
    """Say under which tag TensorBoard shows what an agent logs by a name."""
    group, _, rest = name.partition("/")
    return name if rest in FIRST.get(group, (rest,)) else f"verbose_{group}/{rest}"


def run_logger(
    folder: RunFolder,
    steps: int,
    dashboard: dict[str, dict[str, list[str]]] | None = None,
    writing: Writing = lambda write: write(),
    metrics: Mapping[str, Any] = {},
) -> Logger:
    """Open a logger into progress.csv and TensorBoard events for a run that has made steps environment steps.

    TensorBoard has what progress.csv has: what it showed from steps on is replaced by the rows of that file.

    Args:
        dashboard: group -> chart -> curves, for TensorBoard's page of custom scalars.
        writing: does what writes.
        metrics: of the last iteration, those too that progress.csv does not have.
    """
    begun = any(folder.path.glob("events.out.tfevents.*"))
    tensorboard = _TensorBoard(str(folder.path), steps if begun else None, writing)
    if dashboard:
        # TensorBoard reads tags as the beginnings of regular expressions: "train/kl" would show "train/kl_reverse" too.
        layout = {
            group: {
                chart: ["Multiline", [f"{re.escape(tag_of(tag))}$" for tag in tags]] for chart, tags in charts.items()
            }
            for group, charts in dashboard.items()
        }
        tensorboard.writer.add_custom_scalars(layout)
    best = max((float(row["mean"]) for row in read_rows(folder.evaluations)), default=0.0)
    for row in read_rows(folder.progress) if begun else ():
        if float(row[STEPS]) >= steps:
            values = {name: float(text) for name, text in row.items() if is_number(text) and name != STEPS}
            if FINAL in values:
                values[BEST] = best
            elif "time/iterations" in values:
                values[STEPS] = float(row[STEPS])
                if values[STEPS] == steps:
                    values |= {name: x for name, x in metrics.items() if name not in row}
            tensorboard.write(values, dict.fromkeys(values, ()), int(float(row[STEPS])))
    return Logger(str(folder.path), [_CSV(folder.progress, writing), tensorboard])


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
