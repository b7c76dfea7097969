import io
import signal

import pytest
from rich.console import Console

from agents.run import progress
from agents.run.progress import Progress
from agents.run.signals import StopRequest

METRICS = {"rollout/ep_rew_mean": 1234.5, "train/kl": 0.02}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_plain_lines_come_every_5_percent_5_seconds_apart(clock: list[float]) -> None:
    console = plain()
    with Progress(console, "npg", 1000, 0, None, StopRequest(), quiet=False) as shows:
        for seconds, steps in [(1, 10), (2, 100), (6, 110), (7, 120), (70, 121), (71, 900)]:
            clock[0] = 100.0 + seconds
            shows.iteration(steps, METRICS)
    lines = [line.split(" steps")[0].strip() for line in shown(console).splitlines()]
    assert lines == ["10", "110", "121"]  # the first; 10 % and 5 s later; 64 s later; 900 follows 1 s later


def test_a_line_says_where_the_run_is(clock: list[float]) -> None:
    console = plain()
    with Progress(console, "npg", 1000, 400, 900.0, StopRequest(), quiet=False) as shows:
        clock[0] = 110.0
        shows.iteration(600, METRICS)
    # 200 steps in 10 s are 20 per second; the 400 left take 20 s.
    expected = "600 steps  60 %  return 1,234.5  evaluated 900.0  KL 0.0200  20 steps/s  0:10, 0:20 left"
    assert shown(console).strip() == expected


def test_what_is_not_known_yet_is_a_dash(clock: list[float]) -> None:
    console = plain()
    clock[0] = 100.0
    shows = Progress(console, "npg", 10_000_000, 0, None, StopRequest(), quiet=False)
    clock[0] = 101.0
    shows.iteration(1000, {})
    assert "return -  evaluated -  1,000 steps/s  0:01, 2:46:39 left" in shown(console)


def test_quiet_shows_nothing() -> None:
    console = plain()
    with Progress(console, "npg", 1000, 0, None, StopRequest(), quiet=True) as shows:
        shows.iteration(500, METRICS)
    assert shown(console) == ""


def test_a_terminal_shows_a_bar_and_a_stop_as_soon_as_it_is_asked_for() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    stop = StopRequest()
    with Progress(console, "npg [x]", 1000, 0, None, stop, quiet=False) as shows:
        shows.iteration(500, METRICS)
        stop.signal = signal.SIGINT
    assert "npg [x]" in shown(console)
    assert "500 / 1,000 steps" in shown(console)
    assert "Ctrl-C again stops at once" in shown(console)
