"""What runs there are: listed newest first, chosen by what they are, and removed."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from agents.run.errors import RunError, UsageError
from agents.run.folder import RunConfig, RunFolder, file_name, read_rows
from agents.run.jobs import STYLES
from agents.run.options import Flag, check_least
from agents.run.progress import figure

STAMP = re.compile(r"\d{8}-\d{6}")


@dataclass(frozen=True)
class Runs:
    """List runs, newest first: task, algorithm, seed, steps, return and state. With --remove, remove those."""

    where: Positional[Annotated[tuple[str, ...], arg(metavar="FOLDER")]] = ("runs",)
    """Folders of runs, or runs themselves."""
    env: Annotated[str | None, arg(metavar="PATTERN", help_behavior_hint="")] = None
    """Only those in environments of this name, such as Hopper-v5 or 'families/*'."""
    algorithm: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Only those of this algorithm."""
    seed: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Only those with this seed."""
    state: Literal["running", "finished", "stopped", "failed", "killed"] | None = None
    """Only those in this state; killed are those whose process is gone without a word."""
    last: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Only so many, the newest ones."""
    paths: Flag = False
    """Print their folders alone, one a line, for other commands."""
    remove: Flag = False
    """Remove the runs that are listed, after asking; never one that is running."""
    yes: Flag = False
    """With --remove: do not ask."""
    debug: Flag = False
    """Show the traceback of an error."""

    @property
    def is_choice(self) -> bool:
        """Say whether some runs are meant and not all."""
        return self.where != ("runs",) or any(
            value is not None for value in (self.env, self.algorithm, self.seed, self.state, self.last)
        )


@dataclass(frozen=True)
class Found:
    """A run, as it is listed."""

    folder: RunFolder
    root: Path
    """Where it was looked for."""
    settings: RunConfig
    begun: str
    """As in its name, 20261129-181417."""
    state: str
    share: float
    steps: int
    evaluated: float | None
    """Mean return of its last evaluation, which of a finished run is the final policy's."""


def list_runs(asked: Runs, command: str) -> int:
    """List runs, or remove them; returns the exit code.

    Raises:
        UsageError: there is no such folder, or nothing says which runs to remove.
        RunError: a run that is to be removed is running.
    """
    check_least(asked, {"last": 1, "seed": 0})
    found = [run for run in find(asked.where) if _matches(run, asked)][: asked.last]
    if asked.paths and not asked.remove:
        for run in found:
            print(run.folder.path)
        return 0
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # tables in files and pipes are cut nowhere
    if found:
        console.print(_table(found))
    counts = Counter(run.state for run in found)
    said = "no runs" if not found else f"{len(found)} {'run' if len(found) == 1 else 'runs'}: "
    console.print(said + ", ".join(f"{count} {state}" for state, count in counts.items()), style="dim")
    return _remove(found, asked) if asked.remove and found else 0


def find(where: Sequence[str]) -> list[Found]:
    """Find the runs in folders, newest first; what cannot be read is told on stderr.

    Raises:
        UsageError: there is no such folder.
    """
    found: dict[Path, Found] = {}
    for name in where:
        root = Path(name)
        if not root.is_dir():
            raise UsageError(f"There is no folder {name}; give one that holds runs, or a run's own.")
        for config in sorted(root.rglob("config.yaml")):
            try:
                found.setdefault(config.parent.resolve(), _found(RunFolder(config.parent), root))
            except RunError as error:
                print(error, file=sys.stderr)
    return sorted(found.values(), key=lambda run: (run.begun, str(run.folder.path)), reverse=True)


def _found(folder: RunFolder, root: Path) -> Found:
    settings, where = folder.read_config(), folder.read_state()
    stamp = STAMP.match(folder.path.name)
    begun = stamp[0] if stamp else time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.path.stat().st_ctime))
    if where is not None:
        state = "killed" if where.state == "running" and not folder.is_locked() else where.state
        return Found(folder, root, settings, begun, state, where.share, where.steps, where.evaluated)
    # One that has just begun, or of the first versions, which said nothing of their state.
    rows = read_rows(folder.evaluations)
    steps, evaluated = (int(rows[-1]["steps"]), float(rows[-1]["mean"])) if rows else (0, None)
    share = min(settings.run.share(steps, float(rows[-1]["seconds"])), 1.0) if rows else 0.0
    state = "running" if folder.is_locked() else "finished" if share == 1.0 else "killed"
    return Found(folder, root, settings, begun, state, share, steps, evaluated)


def _matches(run: Found, asked: Runs) -> bool:
    own = run.settings
    return (
        (asked.env is None or fnmatch(own.run.env, asked.env))
        and asked.algorithm in (None, own.algorithm)
        and asked.seed in (None, own.run.seed)
        and asked.state in (None, run.state)
    )


def _table(found: Sequence[Found]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("task", overflow="fold")
    table.add_column("algorithm")
    for heading in ("seed", "steps", "return"):
        table.add_column(heading, justify="right")
    table.add_column("state")
    table.add_column("run", overflow="fold")
    for run in found:
        own = run.settings
        done = f" {100 * run.share:.0f} %" if run.state != "finished" else ""
        table.add_row(
            own.run.env,
            own.algorithm,
            str(own.run.seed),
            f"{run.steps:,}",
            figure(run.evaluated, ",.1f"),
            Text(run.state + done, style=STYLES.get(run.state, "red")),
            "/".join(_shown(run)),
        )
    return table


def _shown(run: Found) -> Iterator[str]:
    """Give the parts of a run's folder that its row does not say anyway."""
    parts = run.folder.path.relative_to(run.root).parts
    usual = (file_name(run.settings.run.env), run.settings.algorithm)
    return iter(parts[2:] if parts[:2] == usual else parts or (str(run.folder.path),))


def _remove(found: Sequence[Found], asked: Runs) -> int:
    if not asked.is_choice:
        raise UsageError("--remove needs to know which runs: name them, or give --env, --algorithm, --state or --last.")
    if not asked.yes:
        if not sys.stdin.isatty():
            raise UsageError("--remove asks before it removes, and there is no terminal to ask at; give --yes.")
        if input(f"Remove {'this run' if len(found) == 1 else f'these {len(found)} runs'}? [y/N] ").lower() != "y":
            return 0
    for run in found:
        with run.folder.lock():
            shutil.rmtree(run.folder.path)
        for parent in run.folder.path.relative_to(run.root).parents:
            folder = run.root / parent
            if folder == run.root or any(folder.iterdir()):
                break
            folder.rmdir()
    print(f"removed {len(found)}")
    return 0
