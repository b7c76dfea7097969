"""Errors that people see: one sentence that names the value, what is allowed and what to do."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable

import gymnasium

from agents.checkpoint import CheckpointError
from envs.vector import SnapshotError


class RunError(Exception):
    """A run cannot start or go on; the message says why and what to do."""

    exit_code = 1


class UsageError(RunError):
    """What was typed cannot be run."""

    exit_code = 2


EXPECTED = (
    RunError,
    CheckpointError,
    SnapshotError,
    ValueError,
    FloatingPointError,
    OSError,
    ModuleNotFoundError,  # of an environment's id, as in package:Id-v0
    gymnasium.error.Error,
)


def unless_nobody_reads(action: Callable[[], int]) -> int:
    """Return action's exit code, or that of a process whose reader went away, as in `train.py --help | head`."""
    try:
        code = action()
        if sys.stdout is not None:  # it is where it was closed
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still to be written at the end has nobody to go to either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def guarded(program: str, debug: bool, action: Callable[[], int]) -> int:
    """Return action's exit code; an expected error is its sentence on stderr unless debug asks for the traceback."""
    try:
        return action()
    except KeyboardInterrupt as error:
        _print(f"{program}: stopped at once.", error)
        return 130
    except EXPECTED as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        _print(f"{program}: error: {error}", error)
        return error.exit_code if isinstance(error, RunError) else 1
    except (MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError) or re.search(r"allocate memory|out of memory", str(error))
        if debug or not short:
            raise
        less = "take fewer environments, fewer steps per iteration or smaller networks"
        _print(f"{program}: error: There is not enough memory for this; {less}.", error)
        return 1


def _print(sentence: str, error: BaseException) -> None:
    with contextlib.suppress(OSError):  # it may be a terminal that is gone
        print("\n".join([sentence, *getattr(error, "__notes__", [])]), file=sys.stderr)
