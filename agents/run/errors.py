"""Errors that people see: one sentence that names the value, what is allowed and what to do."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable

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


LONGEST_WORD, LONGEST_SENTENCE = 300, 1200
"""That an error shows."""
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
        return refuse(program, "stopped at once.", _notes(error), 128 + signal.SIGINT)
    except StepTimeout as error:
        return refuse(program, f"error: {error}", _notes(error))
    except Exception as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        code = error.exit_code if isinstance(error, RunError) else 1
        if where := getattr(error, "raised_in", None):
            said = f"{where}: {type(error).__name__}: {error}{_place(error)}"
        elif isinstance(error, OSError) and error.filename is not None:
            said = f"{error.filename} cannot be read or written ({error.strerror})."
        elif isinstance(error, ModuleNotFoundError):
            said = lacks(error)
        elif isinstance(error, EXPECTED):
            said = str(error)
        elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
            less = "take fewer environments, fewer steps per iteration or smaller networks"
            said = f"There is not enough memory for this; {less}."
        else:
            raise
        return refuse(program, f"error: {said}", _notes(error), code)


def lacks(error: ModuleNotFoundError) -> str:
    """Say what a module is missing for, where Python says its name alone."""
    return f"{error}, which the environment needs; install it, or correct the id." if error.name else str(error)


def one_line(error: BaseException) -> str:
    """Give what an error says, of YAML for instance, on one line and no longer than one reads."""
    return " ".join(str(error).split())[:500]


def refuse(program: str, sentence: str, notes: Iterable[str] = (), code: int = 1) -> int:
    """Say why a program does not go on; returns the exit code.

    The sentence is one line, whatever it repeats of what was typed or of a file: nothing that a terminal would obey,
    and no word longer than one reads.
    """
    line = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in " ".join(sentence.split()))
    line = shortened(" ".join(shortened(word, LONGEST_WORD) for word in line.split(" ")), LONGEST_SENTENCE)
    with contextlib.suppress(OSError):  # it may be a terminal that is gone
        print("\n".join([f"{program}: {line}", *notes]), file=sys.stderr, flush=True)
    return code


def shortened(text: str, most: int) -> str:
    """Give a text of at most so many letters, the middle of a longer one left out."""
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[1 - most // 2 :]}"


def _place(error: BaseException) -> str:
    """Say which line of somebody else's code raised an error."""
    first = error.__cause__ if isinstance(error.__cause__, SystemExit) else error
    frame = traceback.extract_tb(first.__traceback__)[-1]
    return f" ({frame.filename}, line {frame.lineno}, in {frame.name}; --debug shows how it came there)"


def _notes(error: BaseException) -> list[str]:
    return [note for note in getattr(error, "__notes__", []) if not note.startswith("Raised in ")]
