"""What an error says about a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 50
"""A sentence lists at most as many names."""


def near(name: str, known: Iterable[str]) -> str:
    """End a sentence about an unknown name: with the near ones, else with all that are known, if they are few.

    The end brings its own punctuation: "; did you mean 'a' or 'b'?", "; give one of a, b, c." or ".".
    """
    names = list(known)
    matches = difflib.get_close_matches(name, names)
    if matches:
        return f"; did you mean {' or '.join(map(repr, matches))}?"
    return f"; give one of {', '.join(names)}." if 0 < len(names) <= LISTED else "."
