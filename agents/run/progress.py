"""Where a run is: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from agents.run.signals import StopRequest

LINE_SECONDS = 5.0
LINE_PERCENT = 5.0
LINE_SECONDS_MOST = 60.0


class Progress:
    """Shows a run on a console while entered.

    Args:
        title: what runs.
        total: environment steps to reach; None where minutes decide.
        done: environment steps made before, by the run that this one goes on from.
        evaluation: mean return of its last evaluation, or None.
        stop: is shown as soon as it is asked for.
        quiet: show nothing.
        minutes: how long the run may take in place of total, and used, how much of it was used before, in seconds.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        total: int | None,
        done: int,
        evaluation: float | None,
        stop: StopRequest,
        quiet: bool,
        minutes: float | None = None,
        used: float = 0.0,
    ) -> None:
        self.console, self.title, self.total, self.quiet, self.stop = console, title, total, quiet, stop
        self.minutes, self.used = minutes, used
        self.steps = self._first = done
        self._metrics: Mapping[str, float] = {}
        self._evaluation = evaluation
        self._begun = time.monotonic()
        self._printed_at, self._printed_percent, self._lines = self._begun, self.percent, 0
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f} %"),
            TextColumn("{task.fields[steps]} steps"),
            expand=True,
        )
        self._task = self._bar.add_task(title, total=100.0, steps=self._count())
        self._bar.update(self._task, completed=self.percent)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
        self._is_live = console.is_terminal and not quiet

    def __enter__(self) -> Progress:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()

    def iteration(self, steps: int, metrics: Mapping[str, float]) -> None:
        """Take what an iteration that led to steps logged."""
        self.steps, self._metrics = steps, metrics
        self._bar.update(self._task, completed=self.percent, steps=self._count())
        if not self._is_live and not self.quiet and self._line_is_due():
            self._printed_at, self._printed_percent, self._lines = time.monotonic(), self.percent, self._lines + 1
            self.console.print(f"{steps:>11,} steps {self.percent:3.0f} %  {self._figures()}", soft_wrap=True)

    def evaluation(self, mean: float) -> None:
        """Take the mean return of an evaluation."""
        self._evaluation = mean

    @property
    def percent(self) -> float:
        if self.total is not None:
            return min(100.0, 100.0 * self.steps / self.total)
        assert self.minutes is not None
        return min(100.0, 100.0 * (self.used + self.elapsed) / (60 * self.minutes))

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begun

    def _count(self) -> str:
        return f"{self.steps:,}" if self.total is None else f"{min(self.steps, self.total):,} / {self.total:,}"

    def _line_is_due(self) -> bool:
        """Ask for a line every 5 %, but at least 5 s apart and at most 60 s; and for the first iteration's."""
        seconds = time.monotonic() - self._printed_at
        percent = self.percent - self._printed_percent
        return not self._lines or seconds >= LINE_SECONDS_MOST or (seconds >= LINE_SECONDS and percent >= LINE_PERCENT)

    def _figures(self) -> str:
        elapsed = self.elapsed
        rate = (self.steps - self._first) / elapsed if elapsed else 0.0
        if self.total is not None:
            left = max(0, self.total - self.steps) / rate if rate else None
        else:
            left = (100.0 - self.percent) * 0.6 * self.minutes if self.minutes else None
        kl = self._metrics.get("train/kl")
        figures = [
            f"return {figure(self._metrics.get('rollout/ep_rew_mean'), ',.1f')}",
            f"evaluated {figure(self._evaluation, ',.1f')}",
            *([] if kl is None else [f"KL {kl:.4f}"]),
            f"{rate:,.0f} steps/s",
            f"{clock(elapsed)}, {'?' if left is None else clock(left)} left",
        ]
        return "  ".join(figures)

    def _render(self) -> Group:
        asked = "finishing this iteration; Ctrl-C again stops at once" if self.stop.signal else self._figures()
        return Group(self._bar, Text(asked, style="yellow" if self.stop.signal else "dim"))


def figure(value: float | None, form: str) -> str:
    """Write a number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def clock(seconds: float) -> str:
    """Write a time as 1:02 or 1:02:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
