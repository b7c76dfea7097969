"""Work on many tasks, cut into shards that threads share; results do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

from agents.rollout.collector import outside_threads

Shard = TypeVar("Shard")
Result = TypeVar("Result")

SHARD = 8192
"""Steps that are worked on at a time: few enough that what the layers keep of them stays in a core's cache."""


def shards(tasks: int, n: int, device: torch.device) -> list[slice]:
    """Cut tasks of n steps each into groups of about `SHARD` steps; on an accelerator into one group."""
    size = max(SHARD // n, 1) if device.type == "cpu" else tasks
    return [slice(first, min(first + size, tasks)) for first in range(0, tasks, size)]


def over_shards(work: Callable[[Shard], Result], shards: Sequence[Shard]) -> list[Result]:
    """Do work on each shard and return the results in their order, on as many threads as torch has or had.

    Each thread computes a whole shard with one thread of torch. Torch's own threads would meet after every operation,
    and where another process holds a core they wait for each other by spinning, up to a hundred times as long.
    """
    threads = min(outside_threads(), len(shards))
    if threads < 2:
        return [work(shard) for shard in shards]
    return list(_pool(threads).map(work, shards))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Begin threads, each of which computes with one thread of torch."""
    before, everyone = torch.get_num_threads(), Barrier(threads)

    def begin() -> None:
        torch.get_num_threads()  # a thread that asks for the first time takes the process's number
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "shards", initializer=begin)
    list(pool.map(lambda _: everyone.wait(), range(threads)))
    # What a thread sets is also what every later thread begins with.
    torch.set_num_threads(before)
    return pool
