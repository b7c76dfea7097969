"""Errors that people see: one sentence that names the value, what is allowed and what to do."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import traceback
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


class StepTimeout(BaseException):
    """A step of somebody else's environment takes too long; no `except Exception` of theirs takes it."""


NO_MEMORY = re.compile(r"allocate memory|out of memory")
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
    except KeyboardInterrupt:
        print("stopped at once.", file=sys.stderr)
        return 128 + signal.SIGINT
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
    except StepTimeout as error:
        _print(f"{program}: error: {error}", error)
        return 1
    except Exception as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        if where := getattr(error, "raised_in", None):
            _print(f"{program}: error: {where}: {type(error).__name__}: {error}{_place(error)}", error)
        elif isinstance(error, EXPECTED):
            _print(f"{program}: error: {error}", error)
            return error.exit_code if isinstance(error, RunError) else 1
        elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
            less = "take fewer environments, fewer steps per iteration or smaller networks"
            _print(f"{program}: error: There is not enough memory for this; {less}.", error)
        else:
            raise
        return 1


def one_line(error: BaseException) -> str:
    """Give what an error says, of YAML for instance, on one line and no longer than one reads."""
    return " ".join(str(error).split())[:500]


def _place(error: BaseException) -> str:
    """Say which line of somebody else's code raised an error."""
    first = error.__cause__ if isinstance(error.__cause__, SystemExit) else error
    frame = traceback.extract_tb(first.__traceback__)[-1]
    return f" ({frame.filename}, line {frame.lineno}, in {frame.name}; --debug shows how it came there)"


def _print(sentence: str, error: BaseException) -> None:
    notes = [note for note in getattr(error, "__notes__", []) if not note.startswith("Raised in ")]
    with contextlib.suppress(OSError):  # it may be a terminal that is gone
        print("\n".join([sentence, *notes]), file=sys.stderr)
