"""A Ray cluster for a session's tests: on this machine, reached from it alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("USAGE_STATS_ENABLED", 0), ("ENABLE_WINDOWS_OR_OSX_CLUSTER", 0), ("worker_niceness", 0)):
            patch.setenv(f"RAY_{name}", str(value))
        # Workers find the package that is tested, not an installed one.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
        found = pytest.importorskip("ray")
        # More CPUs than all executors of a session have workers.
        found.init(num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        yield found
        found.shutdown()
