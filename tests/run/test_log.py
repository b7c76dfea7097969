"""What a run logs, when it goes on."""

from pathlib import Path

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
