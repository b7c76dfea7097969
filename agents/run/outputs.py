"""Files that a command writes: refused before the work if they cannot be, and complete or absent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from agents.run.errors import UsageError

PLOTS = (".png", ".pdf", ".svg")
"""What figures may be."""


def check_output(option: str, name: str | None, endings: Collection[str] = ()) -> None:
    """Raise UsageError for the name of a new file that has another ending, is there already, or has no folder."""
    if name is None:
        return
    if endings and Path(name).suffix.lower() not in endings:
        raise UsageError(f"{option} is {name}; give a name that ends in {' or '.join(endings)}.")
    if Path(name).exists():
        raise UsageError(f"{option} is {name}, which exists and is not overwritten; remove it or name another file.")
    if not Path(name).absolute().parent.is_dir():
        raise UsageError(f"{option} is {name}; there is no folder {Path(name).parent}, make it first.")


@contextlib.contextmanager
def complete(file: Path) -> Iterator[Path]:
    """Give a name beside file, of the same ending, to write to: it takes file's place if nothing goes wrong."""
    unfinished = file.with_name(f".{file.stem}.{os.getpid()}.tmp{file.suffix}")
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
