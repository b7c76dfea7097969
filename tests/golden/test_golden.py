"""Moves and refactorings change no bits: short trainings end where they ended before."""

from __future__ import annotations

import pytest
from cases import CASES, kept, processor, run


@pytest.fixture(scope="session", name="digests")
def _digests() -> dict[str, str]:
    found = kept().get(processor())
    if found is None:
        pytest.skip(
            "no digests are kept for this processor and these versions; `python tests/golden/cases.py` makes them"
        )
    return found


@pytest.mark.parametrize("name", CASES)
def test_training_has_the_bits_that_it_had(name: str, digests: dict[str, str]) -> None:
    if name not in digests:
        pytest.skip("no digest is kept of this case for this processor; `python tests/golden/cases.py` makes it")
    assert run(name) == digests[name]
