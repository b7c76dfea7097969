"""Files that a command writes: refused before the work if they cannot be, complete or absent, and patient."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from agents.run.errors import RunError, UsageError
from agents.run.process import typed
from agents.run.signals import StopRequest

PLOTS = (".png", ".pdf", ".svg")
"""What figures may be."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk, or somebody's share of it, is full."""
RETRY_SECONDS = 2.0


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
    unfinished.unlink(missing_ok=True)  # it may be a link, which would be followed
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def append(file: Path, data: bytes) -> None:
    """Add data to a file, whole or not at all, and never through a link."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        before, left = os.fstat(descriptor).st_size, memoryview(data)
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


class Room:
    """Does what writes, and where the disk is full says so and waits until there is room, or stops.

    Args:
        folder: on the disk.
        wait: whether it waits.
        stop: ends the waiting.
        say: shows a sentence.
    """

    def __init__(self, folder: Path, wait: bool, stop: StopRequest, say: Callable[[str], object]) -> None:
        self.folder, self.wait, self.stop, self.say = folder, wait, stop, say

    def __call__(self, write: Callable[[], object]) -> None:
        """Write; what is written is the same when it is tried again.

        Raises:
            RunError: the disk is full, and the run does not wait, or shall stop.
        """
        said = False
        while True:
            try:
                write()
            except OSError as error:
                if error.errno not in FULL:
                    raise
                full = self._full()
                if not self.wait or self.stop.signal is not None:
                    raise RunError(f"{full} The run has stopped; what it saved last stays.") from error
                if not said:
                    self.say(f"{full} The run waits for that and goes on by itself; Ctrl-C ends it.")
                said = True
                self._sleep()
            else:
                if said:
                    self.say("There is room again; the run goes on.")
                return

    def _full(self) -> str:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.folder).free
            return (
                f"The disk of {self.folder} is full, with {free / 2**20:,.1f} MiB left: free some, such as what "
                f"{typed('runs')} --remove takes away."
            )
        return f"The disk of {self.folder} is full: free some."

    def _sleep(self) -> None:
        until = time.monotonic() + RETRY_SECONDS
        while time.monotonic() < until and self.stop.signal is None:
            time.sleep(0.05)
