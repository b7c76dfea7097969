"""Stopping a run from outside: finish the iteration first, or stop at once when asked twice."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import IO, Any, cast

from rich.console import Console


class StopRequest:
    """While entered, notes the first SIGINT, SIGTERM or SIGHUP; a second one raises KeyboardInterrupt.

    A terminal that goes away fails a write, which may note SIGPIPE first, and sends SIGHUP, more than once: so that one
    takes SIGPIPE's place and never interrupts. Where it is ignored, as under nohup, it stays so.

    Signals come to a process's main thread alone: in others none is noted.
    """

    def __init__(self, say: str = "") -> None:
        self.signal: signal.Signals | None = None
        self.say = say
        """Said on stderr when the first one comes."""

    @property
    def exit_code(self) -> int:
        """Return what a shell reports for a process that this signal ended, such as 130 or 143; 0 if none came."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
        if numbers and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGPIPE and number == signal.SIGHUP:
            self.signal = signal.SIGHUP
        elif self.signal is None:
            self.signal = signal.Signals(number)
            if self.say:
                with contextlib.suppress(OSError):
                    os.write(2, f"{self.say}\n".encode())  # a print may be what the signal came into
        elif number != signal.SIGHUP:
            raise KeyboardInterrupt


class Outlet:
    """Takes the place of stdout; once that cannot be written, it asks for a stop, as SIGPIPE, and drops the rest."""

    def __init__(self, file: IO[str], stop: StopRequest) -> None:
        self._file, self._stop, self.is_lost = file, stop, False

    def write(self, text: str) -> int:
        """Write, or lose it."""
        try:
            return self._file.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        """Flush, or lose what is left."""
        try:
            self._file.flush()
        except OSError:
            self._lose()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _lose(self) -> None:
        self.is_lost = True
        self._stop.signal = self._stop.signal or signal.SIGPIPE
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._file.fileno())  # what is in buffers goes nowhere, without another error
        os.close(null)


def stdout_console(stop: StopRequest) -> Console:
    """Make a console on stdout that asks for a stop when nobody reads it any more."""
    outlet = None if sys.stdout is None else cast("IO[str]", Outlet(sys.stdout, stop))
    return Console(file=outlet, highlight=False, markup=False)
