"""The first thing that a command imports, and with it next to nothing: quiet while the rest is imported."""

import os
import signal
from types import TracebackType


class Starting:
    """While entered, Ctrl-C ends the process in a word, where imports would show a page of errors."""

    def __enter__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:  # else it is ignored, as in a shell's background
            signal.signal(signal.SIGINT, self._stop)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _stop(self, *_: object) -> None:
        os.write(2, b"stopped at once.\n")
        os._exit(128 + signal.SIGINT)
