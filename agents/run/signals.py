"""Stopping a run from outside: finish the iteration first, or stop at once when asked twice."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import IO, Any, cast

from rich.console import Console

from agents.run.errors import StepTimeout

GRACE = 5.0
"""Seconds in which a step that is interrupted has to end: what is not Python does not look at signals."""


class StopRequest:
    """While entered, notes the first SIGINT, SIGTERM or SIGHUP; a second one raises KeyboardInterrupt.

    A terminal that goes away sends SIGHUP more than once, so that one never does; where it is ignored, as under nohup,
    it stays so.

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
        if self.signal is None:
            self.signal = signal.Signals(number)
            if self.say:
                with contextlib.suppress(OSError):
                    os.write(2, f"{self.say}\n".encode())  # a print may be what the signal came into
        elif number != signal.SIGHUP:
            raise KeyboardInterrupt


class Watchdog:
    """While entered, ends a step of somebody else's environment that takes too long: the main thread raises
    StepTimeout, and where that does not come out of the step either, the process saves itself and exits.

    Args:
        seconds: how long a step may take; None does nothing.
        doing: says which step runs; see `VectorEnv.doing`.
        save: what there is, from a thread of its own.
    """

    NUMBER = signal.SIGURG  # which nobody sends, and which is ignored by default

    def __init__(self, seconds: float | None, doing: Callable[[], str | None], save: Callable[[], object]) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        self.seconds = seconds if is_main else None
        self.doing, self.save, self._over, self._sentence = doing, save, threading.Event(), ""

    def __enter__(self) -> None:
        if self.seconds is not None:
            self._before = signal.signal(self.NUMBER, self._raise)
            self._thread = threading.Thread(target=self._watch, args=(self.seconds,), daemon=True)
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.seconds is not None:
            self._over.set()
            self._thread.join()
            signal.signal(self.NUMBER, self._before)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._sentence:  # others may send it too
            raise StepTimeout(self._sentence)

    def _watch(self, seconds: float) -> None:
        seen, since, told = None, time.monotonic(), False
        while not self._over.wait(min(seconds / 10, 1.0)):
            now, doing = time.monotonic(), self.doing()
            if doing is None or doing != seen:
                seen, since, told, self._sentence = doing, now, False, ""
            elif now - since >= seconds and not told:
                self._sentence = (
                    f"{doing}, has not come back for {seconds:g} seconds; the run has stopped. Mend the environment, "
                    "or give a longer --step-timeout."
                )
                told = True
                signal.pthread_kill(threading.main_thread().ident or 0, self.NUMBER)
            elif told and now - since >= seconds + GRACE:
                self.save()
                with contextlib.suppress(OSError):
                    os.write(2, f"error: {self._sentence}\n".encode())
                os._exit(1)


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
