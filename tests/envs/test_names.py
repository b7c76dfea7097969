"""The one hint about an unknown name."""

from __future__ import annotations

import pytest

from envs.names import LISTED, near


@pytest.mark.parametrize(
    ("name", "known", "end"),
    [
        ("adabond", ["adabound", "adam"], "; did you mean 'adabound'?"),
        ("ada", ["adam", "adan", "sgd"], "; did you mean 'adan' or 'adam'?"),
        ("x", ["adam", "sgd"], "; give one of adam, sgd."),
        ("x", iter({"adam": 1, "sgd": 2}), "; give one of adam, sgd."),
        ("", ["adam"], "; give one of adam."),
        ("x", [f"name{i}" for i in range(LISTED + 1)], "."),
        ("x", [], "."),
    ],
)
def test_a_sentence_ends_with_the_near_names_or_with_those_that_are_known(name: str, known: list, end: str) -> None:
    assert near(name, known) == end
