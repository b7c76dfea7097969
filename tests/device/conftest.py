"""The device of these tests: `pytest tests/device --device cuda` takes a real one."""

from __future__ import annotations

import pytest
import sim_device
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="sim", help="where the tests of tests/device train: sim, or cuda")


def pytest_configure(config: pytest.Config) -> None:
    # Before any test differentiates: from then on autograd takes no device that is new to it.
    if config.getoption("--device", default="sim") == "sim":
        sim_device.install()


@pytest.fixture(name="device", scope="session")
def _device(request: pytest.FixtureRequest) -> str:
    name = request.config.getoption("--device", default="sim")
    if name != "sim" and not (torch.cuda.is_available() and name.startswith("cuda")):
        pytest.skip(f"there is no device {name!r} here")
    return str(name)
