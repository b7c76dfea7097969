"""Going on with runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from agents.run import training
from agents.run.errors import UsageError
from agents.run.folder import RunFolder
from agents.run.jobs import Job, work_off
from agents.run.options import ALLOW_IMPORT, Flag, check_least
from agents.run.process import typed


@dataclass(frozen=True)
class Resume:
    """Go on with runs from their last checkpoints."""

    run: Positional[Annotated[tuple[str, ...], arg(metavar="RUN", help_behavior_hint="")]] = ()
    """The run's folder; of several, each goes on in a process of its own."""
    jobs: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: one per core)")] = None
    """Of several runs: how many at once; each has its share of the cores."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as the run had)")] = None
    """Environment steps in total, counted from the run's beginning."""
    minutes: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: as the run had)")] = None
    """Minutes in total, those that the run has used included; in place of steps."""
    device: Annotated[str | None, arg(metavar="STR", help_behavior_hint="(default: as the run had)")] = None
    """Where networks live from now on: auto, cpu, cuda or cuda:1."""
    threads: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as the run had)")] = None
    """Threads of PyTorch on the CPU from now on; another number than the run's may round otherwise."""
    executor: Annotated[Literal["serial", "ray"] | None, arg(help_behavior_hint="(default: as the run had)")] = None
    """Of a run that has one: where its shards are worked on from now on, to the same bits."""
    workers: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as the run had)")] = None
    """Workers of ray from now on."""
    ray_address: Annotated[str | None, arg(metavar="HOST:PORT", help_behavior_hint="(default: as the run had)")] = None
    """The Ray cluster's head from now on."""
    allow_import: Flag = False
    """Import the module that the run's environment names (module:Id-v0); it runs code, so trust it first."""
    quiet: Flag = False
    """Print the final summary only."""
    debug: Flag = False
    """Show the traceback of an error."""


def resume(asked: Resume, command: str) -> int:
    """Go on with runs as asked; returns the exit code.

    Raises:
        UsageError: no run is named, or a change is not possible.
        RunError: there is no such run.
    """
    check_least(asked, {"jobs": 1})
    if not asked.run:
        raise UsageError(f"resume needs RUN, the folder of a run; {typed('runs')} lists them.")
    names = ("steps", "minutes", "device", "threads", "executor", "workers", "ray_address")
    changes = {name: getattr(asked, name) for name in names}
    changed = {name: value for name, value in changes.items() if value is not None}
    if len(asked.run) == 1:
        return training.resume(asked.run[0], changed, asked.quiet, command, asked.allow_import)
    allowed = [f"--{ALLOW_IMPORT}"] if asked.allow_import else []
    options = allowed + [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    folders = [RunFolder.open(name) for name in dict.fromkeys(asked.run)]
    jobs = [Job(str(folder.path), ["resume", str(folder.path), *options], folder) for folder in folders]
    return work_off(jobs, asked.jobs, f"{len(jobs)} runs", asked.quiet)
