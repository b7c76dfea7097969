"""The run folder: where each file of a run is, and how it is kept."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import io
import itertools
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import time
import typing
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from torch import Tensor

from agents import checkpoint
from agents.checkpoint import CheckpointError
from agents.config import checked
from agents.run.errors import RunError, UsageError, one_line
from agents.run.options import RunOptions
from agents.run.outputs import append, complete
from agents.run.process import typed
from agents.saving import NewEpisodes, Saved
from envs.cores import usable_cores

CONFIG_BYTES, CONFIG_DEPTH = 2**18, 20
EVALUATION_COLUMNS = ("steps", "mean", "iqm", "lower", "upper", "episodes", "seconds")


@dataclass(frozen=True)
class RunConfig:
    """What config.yaml holds: the resolved values of a run, and where each hyperparameter came from."""

    algorithm: str
    run: RunOptions
    config: dict[str, Any]
    origins: dict[str, str]


@dataclass(frozen=True)
class RunState:
    """Where a run is, as state.json has it."""

    state: str
    """running, stopped, finished or failed."""
    steps: int
    """Environment steps of training."""
    seconds: float
    """Wall-clock seconds, in all processes that went on with it."""
    share: float
    """Of the run that is over."""
    training: float | None
    """Mean return of the last training episodes."""
    evaluated: float | None
    """Mean return of the last evaluation."""
    error: str = ""
    """Why it failed."""


class RunFolder:
    """The files of one run.

    Args:
        path: the run's folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.command = self.path / "command.txt"
        self.versions = self.path / "versions.json"
        self.last = self.path / "checkpoints" / "last.zip"
        self.previous = self.path / "checkpoints" / "previous.zip"
        """The checkpoint before the last one."""
        self.best = self.path / "checkpoints" / "best.zip"
        self.locked = self.path / ".lock"
        self.evaluations = self.path / "evaluations.csv"
        self.progress = self.path / "progress.csv"
        self.curve = self.path / "curve.png"
        self.state = self.path / "state.json"
        self.output = self.path / "output.txt"
        """What the run prints where it is one of several."""

    @classmethod
    def create(cls, config: RunConfig, command: str) -> RunFolder:
        """Make the folder of a new run and write what is known before training.

        Raises:
            RunError: the folder exists or cannot be written.
        """
        own = config.run.run_dir
        path = new_path(config.algorithm, config.run, config.run.seed) if own is None else Path(own)
        try:
            folder = cls(path if own is not None and is_reserved(path) else made(path, only=own is not None))
            folder.last.parent.mkdir()
            folder.write_config(config)
            folder.command.write_text(command + "\n")
            folder.versions.write_text(json.dumps(_versions(), indent=1) + "\n")
        except FileExistsError as error:
            raise RunError(
                f"{path} exists and is not overwritten; choose another --run-dir, or go on with "
                f"{typed('resume')} {path}{config.run.consent}"
            ) from error
        except OSError as error:
            raise RunError(f"{path} cannot be written ({error.strerror}); choose another --runs.") from error
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Find the folder of an earlier run.

        Raises:
            RunError: there is no run with a checkpoint at path.
        """
        folder = cls(path)
        if not folder.path.is_dir():
            raise RunError(f"There is no run folder at {folder.path}.")
        if not folder.config.is_file():
            raise RunError(f"{folder.path} is not a run folder: it holds no {folder.config.name}.")
        if not folder.last.exists() and not folder.previous.is_file():
            raise RunError(f"{folder.path} holds no checkpoint yet; start the run anew.")
        return folder

    def lock(self) -> TextIO:
        """Hold this run until the returned file is closed or the process ends.

        Raises:
            RunError: another process holds it, it cannot be written, or what lies in it is not what a run writes to.
        """
        self._check_files()
        try:
            file = self.locked.open("a")
            for folder in (self.path, self.last.parent):
                checkpoint.sweep(folder)
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written ({error.strerror}), so that nothing goes on in it; copy it to a place "
                "of yours, and go on there."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise RunError(f"Another process is training in {self.path}; stop it first.") from error
        return file

    def _check_files(self) -> None:
        """Raise RunError for a folder or a pipe in a file's place, and for a link that leads out of the run."""
        home = self.path.resolve()
        for place in (self.last.parent, *(x for x in vars(self).values() if isinstance(x, Path) and x != self.path)):
            if not place.resolve().is_relative_to(home):
                raise RunError(
                    f"{place} is a link out of the run's folder, to {place.resolve()}, which nothing is written to; "
                    "remove it, or put what it leads to in its place."
                )
            if not place.exists():
                continue
            wanted = stat.S_ISDIR if place == self.last.parent else stat.S_ISREG
            if not wanted(place.stat().st_mode):
                kind = "a folder" if wanted is stat.S_ISDIR else "a file"
                raise RunError(f"{place} is not {kind}, as a run has it there; remove it or give it another name.")

    def keep(self, agent: Saved) -> None:
        """Save an agent as the last checkpoint; the one before is the previous one from now on."""
        if self.last.is_file():
            with complete(self.previous) as beside:
                try:
                    os.link(self.last, beside)
                except OSError:  # there are file systems without such links
                    shutil.copyfile(self.last, beside)
        save_quietly(agent, self.last)

    def read_last(self) -> tuple[dict[str, Any], dict[str, Tensor], str]:
        """Return the last checkpoint's manifest and tensors, and a sentence if it is the previous one's, since the last
        cannot be read: that one is damaged.zip from then on, and the previous one the last.

        Raises:
            CheckpointError: neither can be read.
        """
        try:
            return *checkpoint.read_agent(self.last), ""
        except CheckpointError as error:
            try:
                manifest, tensors = checkpoint.read_agent(self.previous)
            except CheckpointError:
                raise error from None
            said = f"{error} The run goes on from the one before it, of {manifest['num_timesteps']:,} steps."
        if self.last.is_file():
            self.last.replace(self.last.with_name("damaged.zip"))
        with complete(self.last) as beside:
            shutil.copyfile(self.previous, beside)
        return manifest, tensors, said

    def is_finished(self, done: int) -> bool:
        """Say whether a run of done steps has its final evaluation, its curve, and its end in state.json."""
        rows, state = read_rows(self.evaluations), self.read_state()
        ended = state is None or state.state == "finished"
        return ended and self.curve.is_file() and bool(rows) and rows[-1]["steps"] == str(done)

    def drop_rows(self, done: int, over: bool) -> list[str]:
        """Drop what was logged after the checkpoint of done steps that a run goes on from.

        Args:
            over: only its end is missing: the final evaluation is made again.

        Returns:
            Sentences about logs of which nothing can be kept.
        """
        lost = [keep_rows(self.evaluations, "steps", done - over)]
        evaluated = {row["steps"] for row in read_rows(self.evaluations)}

        def has_its_evaluation(row: dict[str, str]) -> bool:
            return not row.get("eval/mean_reward") or row["time/total_timesteps"] in evaluated

        lost.append(keep_rows(self.progress, "time/total_timesteps", done, has_its_evaluation))
        return [sentence for sentence in lost if sentence]

    def is_locked(self) -> bool:
        """Say whether a process trains in it."""
        try:
            with self.locked.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError) as error:
            return isinstance(error, BlockingIOError)
        return False

    def write_state(self, state: RunState) -> None:
        """Write state.json; unlike a checkpoint it is not worth waiting for the disk."""
        with complete(self.state) as file:
            file.write_text(json.dumps(dataclasses.asdict(state)) + "\n")

    def read_state(self) -> RunState | None:
        """Return where the run is; None before it says so, and of runs of the first versions."""
        try:
            state = RunState(**json.loads(self.state.read_text()))
        except (FileNotFoundError, ValueError, TypeError):  # it is not synced: a computer's end may leave half of it
            return None
        numbers = (state.steps, state.seconds, state.share)
        return state if all(isinstance(number, (int, float)) for number in numbers) else None

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml, over an earlier one only when the new one is complete."""
        text = yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)
        with checkpoint.replaced(self.config) as file:
            file.write(text.encode())

    def read_config(self) -> RunConfig:
        """Return what the run was started with, or last gone on with.

        Raises:
            RunError: config.yaml is not one that this version wrote.
        """
        try:
            if self.config.stat().st_size > CONFIG_BYTES:
                raise ValueError(f"it is longer than {CONFIG_BYTES:,} bytes")
            text = self.config.read_text()
            depth = 0
            for event in yaml.parse(text, yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > CONFIG_DEPTH or isinstance(event, yaml.AliasEvent):
                    raise ValueError("it has aliases, or lists in lists, which may take more memory than there is")
            values = yaml.safe_load(text)
            kinds = typing.get_type_hints(RunOptions)
            run = {name: checked(name, value, kinds[name]) for name, value in values.pop("run").items()}
            config = RunConfig(run=RunOptions(**run), **values)
            for name, kind in {"algorithm": str, "config": dict, "origins": dict}.items():
                if not isinstance(getattr(config, name), kind):
                    raise TypeError(f"{name} is {repr(getattr(config, name))[:60]}")
            return config
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise RunError(f"{self.config} cannot be read as a run's configuration ({one_line(error)}).") from error


def save_quietly(agent: Saved, file: Path) -> None:
    """Save an agent without a warning that it will not go on exactly, which a run has said at its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewEpisodes)
        agent.save(file)


def checkpoint_file(name: str, best: bool) -> Path:
    """Find the checkpoint that a run's folder or a file's name means."""
    target = Path(name)
    if not target.is_dir():
        if best:
            raise UsageError(f"--best needs a run's folder; {target} is none.")
        return checkpoint.find(target)
    folder = RunFolder.open(target)
    return folder.best if best else folder.last


def read_rows(file: Path) -> list[dict[str, str]]:
    """Return the whole rows of a CSV file; none if there is no such file, or its header is not whole."""
    if not file.is_file():
        return []
    try:
        with file.open(newline="", errors="replace") as stream:
            table = csv.DictReader(stream)
            if any(map(is_number, table.fieldnames or ())):  # rows were added to a header that was cut
                return []
            return [row for row in table if None not in row and None not in row.values()]
    except csv.Error:
        return []


def keep_rows(
    file: Path, column: str, most: int, also: Callable[[dict[str, str]], bool] = lambda row: True
) -> str | None:
    """Drop the rows whose column is beyond most: what was logged after the checkpoint that a run goes on from.

    A row that the end of the process cut short is dropped too.

    Args:
        also: what else holds for the rows that stay.

    Returns:
        A sentence, if the file has no whole header, from which nothing can be kept: it has another name now.
    """
    if not file.is_file() or not file.stat().st_size:
        return None
    rows = read_rows(file)
    with file.open("rb") as stream:
        header = stream.readline()
    columns = header.decode(errors="replace").strip().split(",")
    if not header.endswith(b"\n") or column not in columns or any(map(is_number, columns)):
        aside = file.with_name(f"damaged-{file.name}")
        file.replace(aside)
        return f"{file} has no whole header: it is kept as {aside.name}, and rows from here on go to a new file."
    kept = [row for row in rows if is_number(row[column]) and float(row[column]) <= most and also(row)]
    write_rows(file, columns, kept)
    return None


def write_rows(file: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write a CSV file, over an earlier one only when the new one is complete."""
    with checkpoint.replaced(file) as stream:
        stream.write(_line(columns) + b"".join(_line(row[name] for name in columns) for row in rows))


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Add one row to a CSV file, whole or not at all, and its header first if the file is new."""
    new = not file.is_file() or not file.stat().st_size
    append(file, (_line(row) if new else b"") + _line(row.values()))


def _line(values: Iterable[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def is_number(text: str) -> bool:
    """Say whether a text is one."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def new_path(algorithm: str, run: RunOptions, seed: int) -> Path:
    """Name a folder in --runs for a run that begins now."""
    leaf = f"{time.strftime('%Y%m%d-%H%M%S')}-s{seed}" + (f"-{file_name(run.name)}" if run.name else "")
    return Path(run.runs) / file_name(run.env) / algorithm / leaf


def is_reserved(path: Path) -> bool:
    """Say whether there is a folder that waits for its run: with nothing in it, but for what the run prints."""
    return path.is_dir() and {file.name for file in path.iterdir()} <= {"output.txt"}


def made(path: Path, only: bool) -> Path:
    """Make the folder path; unless it is the only one, else path-2, path-3, ...: runs may start in the same second."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if only:
                raise
        else:
            break
    return folder


def file_name(text: str) -> str:
    """Replace the characters (/ and : in some environment ids) that a folder's name cannot have."""
    return re.sub(r"[^\w.-]+", "_", text)


def plain(value: Any) -> Any:
    """Make lists of tuples, so that YAML stays plain."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def _versions() -> dict[str, Any]:
    return {
        "versions": checkpoint.versions(),
        "platform": platform.platform(),
        "cpus": usable_cores(),
        **_git(Path(__file__).parents[2]),
    }


def _git(root: Path) -> dict[str, Any]:
    """Return commit and dirty flag of the checkout at root; nothing if root is none."""
    if not (root / ".git").exists():
        return {}

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}
