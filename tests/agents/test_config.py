"""Fields that say their range: what is taken, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from agents.config import CommonConfig, above, allowed, at_least, below, between


@dataclass(frozen=True, kw_only=True)
class Fields(CommonConfig):
    rate: Annotated[float, above(0)] = 0.1
    share: Annotated[float, between(0, 1)] = 0.5
    decay: Annotated[float, at_least(0), below(1)] = 0.9
    size: Annotated[int, at_least(1)] | None = None
    kind: Literal["plain", "fancy"] = "plain"
    final: Annotated[float, above(0)] | Literal["auto"] = "auto"
    sizes: tuple[Annotated[int, at_least(1)], ...] = ()
    on: bool = False


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("rate", 0.0, "rate is 0.0; give a number above 0."),
        ("rate", float("nan"), "rate is nan; give a number above 0."),
        ("rate", float("inf"), "rate is inf; give a number above 0."),
        ("rate", True, "rate is True; give a number above 0."),
        ("rate", "high", "rate is 'high'; give a number above 0."),
        ("share", 1.5, "share is 1.5; give a number from 0 to 1."),
        ("decay", 1.0, "decay is 1.0; give a number of at least 0 and below 1."),
        ("size", 0, "size is 0; give an integer of at least 1, or None."),
        ("size", 2.0, "size is 2.0; give an integer of at least 1, or None."),
        ("kind", "fancier", "There is no kind 'fancier'; did you mean 'fancy'?"),
        ("kind", "other", "There is no kind 'other'; give one of plain, fancy."),
        ("kind", 1, "kind is 1; give 'plain' or 'fancy'."),
        ("final", -1, "final is -1; give a number above 0, or 'auto'."),
        ("final", "atuo", "There is no final 'atuo'; did you mean 'auto'?"),
        ("sizes", (4, 0), "sizes is (4, 0); give a list of integers of at least 1."),
        ("sizes", 4, "sizes is 4; give a list of integers of at least 1."),
        ("on", 1, "on is 1; give True or False."),
    ],
)
def test_what_a_field_refuses_is_said(name: str, value: Any, words: str) -> None:
    for made in (lambda: Fields(**{name: value}), lambda: Fields.of({name: value})):
        with pytest.raises(ValueError, match=r".") as error:
            made()
        assert str(error.value) == words


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("rate", 1, 1.0),
        ("rate", np.float32(0.5), 0.5),
        ("size", np.int64(3), 3),
        ("size", None, None),
        ("share", 1, 1.0),
        ("final", 2, 2.0),
        ("final", "auto", "auto"),
        ("sizes", [1, 2], (1, 2)),
        ("kind", "fancy", "fancy"),
    ],
)
def test_equal_values_are_kept_as_the_declared_type(name: str, value: Any, kept: Any) -> None:
    found = getattr(Fields(**{name: value}), name)
    assert (found, type(found)) == (kept, type(kept))


def test_the_words_of_a_declaration() -> None:
    assert allowed(Fields.annotations()["size"]) == "an integer of at least 1, or None"


def test_a_field_that_only_a_parent_declares_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"gamma is 1\.5; give a number from 0 to 1\."):
        Fields(gamma=1.5)
