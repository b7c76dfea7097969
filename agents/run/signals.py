"""Stopping a run from outside: finish the iteration first, or stop at once when asked twice."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """While entered, notes the first SIGINT or SIGTERM; the second one raises KeyboardInterrupt.

    Signals come to a process's main thread alone: in others none is noted.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """Return what a shell reports for a process that this signal ended: 130 or 143; 0 if none came."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> StopRequest:
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
