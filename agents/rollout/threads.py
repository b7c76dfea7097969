"""Which threads compute: torch's while environments step, and ours for what is cut into shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

Shard = TypeVar("Shard")
Result = TypeVar("Result")

_outside: list[int] = []
"""Torch's numbers of threads outside the `single_thread` that run."""


@contextmanager
def single_thread() -> Iterator[None]:
    """Torch on one thread: more would not act faster on small networks, and wait by spinning on the physics' cores."""
    _outside.append(torch.get_num_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_outside.pop())


def over_shards(work: Callable[[Shard], Result], shards: Sequence[Shard]) -> list[Result]:
    """work of each shard, in their order; results do not depend on how many threads share it.

    They are as many as torch has, or had before `single_thread`.

    Each thread computes a whole shard with one thread of torch. Torch's own threads would meet after every operation,
    and where another process holds a core they wait for each other by spinning, up to a hundred times as long.
    """
    threads = min(_outside[0] if _outside else torch.get_num_threads(), len(shards))
    if threads < 2:
        return [work(shard) for shard in shards]
    return list(_pool(threads).map(work, shards))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "shards", initializer=torch.set_num_threads, initargs=(1,))
