"""Torch on one thread while environments step, and how many threads it has otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_outside: list[int] = []
"""Torch's numbers of threads outside the `single_thread` that run."""


@contextmanager
def single_thread() -> Iterator[None]:
    """Keep torch on one thread: more are no faster on small networks, and wait by spinning on the physics' cores."""
    _outside.append(torch.get_num_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_outside.pop())


def outer_threads() -> int:
    """Return torch's number of threads, or what it was before `single_thread`."""
    return _outside[0] if _outside else torch.get_num_threads()
