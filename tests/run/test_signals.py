import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from agents.run.signals import Outlet, StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals, code: int) -> None:
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number
        assert stop.exit_code == code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_get_no_signals_and_ask_for_none() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def inside() -> signal.Signals | None:
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGTERM) == before
            return stop.signal

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() is None


def test_a_terminal_that_goes_away_says_so_twice() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal == signal.SIGHUP


def test_a_terminal_whose_write_fails_first_is_no_reader_gone() -> None:
    with StopRequest() as stop, open(os.devnull) as unwritable:
        outlet = Outlet(unwritable, stop)
        outlet.write("lost")
        assert stop.signal == signal.SIGPIPE
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal == signal.SIGHUP
        outlet.write("lost too")
        assert stop.signal == signal.SIGHUP


def test_a_signal_after_a_reader_is_gone_is_the_second() -> None:
    with StopRequest() as stop, open(os.devnull) as unwritable:
        Outlet(unwritable, stop).write("lost")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGPIPE


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)
