"""What a run logs, when it goes on."""

import itertools
import os
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.run.folder import RunFolder
from agents.run.log import ONLY_TENSORBOARD, STEPS, run_logger


def test_what_only_tensorboard_shows_of_the_last_iteration_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    logger = run_logger(folder, 0)
    for steps in (10, 20):
        logger.record("time/iterations", steps // 10)
        logger.record("shown/age_00", steps + 0.5, exclude=ONLY_TENSORBOARD)
        logger.record(STEPS, steps)
        metrics = dict(logger.name_to_value)
        logger.dump(steps)
    logger.close()
    run_logger(folder, 20, metrics=metrics).close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    for tag, values in (("shown/age_00", [10.5, 20.5]), ("time/iterations", [1, 2]), (STEPS, [10, 20])):
        assert [(event.step, event.value) for event in shown.Scalars(tag)] == list(zip((10, 20), values, strict=True))


def test_a_run_that_goes_on_within_the_second_is_shown_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    monkeypatch.setattr(time, "time_ns", itertools.count(1_700_000_000_000_000_098).__next__)
    for steps, process in ((10, 9998), (20, 10003), (30, 305)):  # ids get a digit more, and begin anew
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        logger = run_logger(folder, steps - 10)
        logger.record("shown", steps + 0.5)
        logger.record(STEPS, steps)
        logger.dump(steps)
        logger.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("shown")] == [(10, 10.5), (20, 20.5), (30, 30.5)]
