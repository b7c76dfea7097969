"""Going on with runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from agents.run import training
from agents.run.options import Flag


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its last checkpoint."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """The run's folder."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as the run had)")] = None
    """Environment steps in total, counted from the run's beginning."""
    device: Annotated[str | None, arg(metavar="STR", help_behavior_hint="(default: as the run had)")] = None
    """Where networks live from now on: auto, cpu, cuda or cuda:1."""
    threads: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as the run had)")] = None
    """Threads of PyTorch on the CPU from now on; another number than the run's may round otherwise."""
    quiet: Flag = False
    """Print the final summary only."""
    debug: Flag = False
    """Show the traceback of an error."""


def resume(asked: Resume, command: str) -> int:
    """Go on with a run as asked; returns the exit code."""
    changes = {name: getattr(asked, name) for name in ("steps", "device", "threads")}
    typed = {name: value for name, value in changes.items() if value is not None}
    return training.resume(asked.run, typed, asked.quiet, command)
