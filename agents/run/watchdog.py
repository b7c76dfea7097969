"""Ending steps of somebody else's environments that do not come back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from agents.run.errors import StepTimeout, one_line, refuse

GRACE = 5.0
"""Seconds in which a step that is interrupted has to end: what is not Python does not look at signals."""


class Watchdog:
    """While entered, ends a step of somebody else's environment that takes too long.

    First the main thread raises StepTimeout. Where that does not come out of the step, which is code of C then, the
    process leaves and exits. Where the step holds Python's lock too, so that no thread goes on, a process beside this
    one kills it: see `lifeline`.

    Args:
        seconds: how long a step may take; None does nothing.
        doing: says which step runs; see `VectorEnv.doing`.
        leave: saves what there is, with the sentence that is said, from a thread of its own.
    """

    NUMBER = signal.SIGURG  # which nobody sends, and which is ignored by default

    def __init__(self, seconds: float | None, doing: Callable[[], str | None], leave: Callable[[str], object]) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        self.seconds = seconds if is_main else None
        self.doing, self.leave, self._over, self._sentence = doing, leave, threading.Event(), ""

    def __enter__(self) -> None:
        if self.seconds is None:
            return
        self._before = signal.signal(self.NUMBER, self._raise)
        script, silence = Path(__file__).with_name("lifeline.py"), self.seconds + 2 * GRACE
        self._lifeline = subprocess.Popen(
            [sys.executable, "-I", "-S", script, str(silence)], stdin=subprocess.PIPE, start_new_session=True
        )
        self._thread = threading.Thread(target=self._watch, args=(self.seconds,), daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.seconds is not None:
            self._over.set()
            self._thread.join()
            self._lifeline.communicate()
            signal.signal(self.NUMBER, self._before)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._sentence:  # others may send it too
            raise StepTimeout(self._sentence)

    def _watch(self, seconds: float) -> None:
        pause = min(seconds / 10, 1.0)
        seen, waited, told, before = None, 0.0, False, time.monotonic()
        while not self._over.wait(pause):
            doing, now = self.doing(), time.monotonic()
            self._tell(doing or "")
            # What is stopped as a whole, as by Ctrl-Z, comes back with one pause.
            passed, before = min(now - before, 2 * pause), now
            if doing is None or doing != seen:
                seen, waited, told, self._sentence = doing, 0.0, False, ""
                continue
            waited += passed
            if waited >= seconds and not told:
                self._sentence = (
                    f"{doing}, has not come back for {seconds:g} seconds; the run has stopped. Mend the environment, "
                    "or give a longer --step-timeout."
                )
                told = True
                signal.pthread_kill(threading.main_thread().ident or 0, self.NUMBER)
            elif waited >= seconds + GRACE:
                self._exit()

    def _tell(self, doing: str) -> None:
        assert self._lifeline.stdin is not None
        with contextlib.suppress(OSError):  # it may be dead, or stopped
            os.set_blocking(self._lifeline.stdin.fileno(), False)
            os.write(self._lifeline.stdin.fileno(), f"{doing}\n".encode())

    def _exit(self) -> None:
        """Leave while the main thread is in a step that does not end."""
        notes = []
        try:
            self.leave(self._sentence)
        except Exception as error:  # whatever it is, the process has to end
            notes = [f"It is not saved: {one_line(error)}"]
        os._exit(refuse("error", self._sentence, notes))
