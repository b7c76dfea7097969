"""On Ray's workers runs have the bits that they have here, whoever works, dies or hangs."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from runs import CASES, bits, made, train

from agents.cluster.executor import Serial
from agents.cluster.ray_executor import Ray

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray"), pytest.mark.filterwarnings("ignore:Worker .* is lost")]
ITERATIONS = 20


@pytest.fixture(scope="module")
def executors(ray: Any) -> Iterator[list[Ray]]:
    found = [Ray(workers) for workers in (1, 2, 4)]
    yield found
    for executor in found:
        executor.close()


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_workers_gives_the_bits_of_the_serial_run(name: str, executors: list[Ray]) -> None:
    expected = bits(train(made(name, Serial()), ITERATIONS))
    for executor in executors:
        assert bits(train(made(name, executor), ITERATIONS)) == expected, executor.metrics()
