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
        total: environment steps to reach.
        done: environment steps made before, by the run that this one goes on from.
        evaluation: mean return of its last evaluation, or None.
        stop: is shown as soon as it is asked for.
        quiet: show nothing.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        total: int,
        done: int,
        evaluation: float | None,
        stop: StopRequest,
        quiet: bool,
    ) -> None:
        self.console, self.title, self.total, self.quiet, self.stop = console, title, total, quiet, stop
        self.steps = self._first = done
        self._metrics: Mapping[str, float] = {}
        self._evaluation = evaluation
        self._begun = time.monotonic()
        self._printed_at, self._printed_steps = self._begun, done
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f} %"),
            TextColumn("{task.completed:,} / {task.total:,} steps"),
            expand=True,
        )
        self._task = self._bar.add_task(title, total=total, completed=done)
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
        self._bar.update(self._task, completed=min(steps, self.total))
        if not self._is_live and not self.quiet and self._line_is_due():
            self._printed_at, self._printed_steps = time.monotonic(), steps
            self.console.print(f"{steps:>11,} steps {self.percent:3.0f} %  {self._figures()}", soft_wrap=True)

    def evaluation(self, mean: float) -> None:
        """Take the mean return of an evaluation."""
        self._evaluation = mean

    @property
    def percent(self) -> float:
        return min(100.0, 100.0 * self.steps / self.total)

    def _line_is_due(self) -> bool:
        """Ask for a line every 5 %, but at least 5 s apart and at most 60 s; and for the first iteration's."""
        seconds = time.monotonic() - self._printed_at
        percent = 100.0 * (self.steps - self._printed_steps) / self.total
        first = self._printed_steps == self._first
        return first or seconds >= LINE_SECONDS_MOST or (seconds >= LINE_SECONDS and percent >= LINE_PERCENT)

    def _figures(self) -> str:
        elapsed = time.monotonic() - self._begun
        rate = (self.steps - self._first) / elapsed if elapsed else 0.0
        left = max(0, self.total - self.steps) / rate if rate else None
        kl = self._metrics.get("train/kl")
        figures = [
            f"return {_figure(self._metrics.get('rollout/ep_rew_mean'), ',.1f')}",
            f"evaluated {_figure(self._evaluation, ',.1f')}",
            *([] if kl is None else [f"KL {kl:.4f}"]),
            f"{rate:,.0f} steps/s",
            f"{_clock(elapsed)}, {'?' if left is None else _clock(left)} left",
        ]
        return "  ".join(figures)

    def _render(self) -> Group:
        asked = "finishing this iteration; Ctrl-C again stops at once" if self.stop.signal else self._figures()
        return Group(self._bar, Text(asked, style="yellow" if self.stop.signal else "dim"))


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
