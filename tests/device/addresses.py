"""Which memory a piece of work reads that it has not made itself: what a recorded graph of it would read for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sim_device as sim
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Addresses(TorchDispatchMode):
    """Lists, operation by operation, the memory that is read and was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[str, int]] = []
        self._made: set[int] = set()
        self._alive: list[Tensor] = []  # so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.read += [(func.name(), x) for x in given if x not in self._made]
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and place(x) not in given:
                self._made.add(place(x))
                self._alive.append(x)
        return found


def place(x: Tensor) -> int:
    return sim.to_host(x).untyped_storage().data_ptr()


def reads(work: Callable[[], object]) -> list[tuple[str, int]]:
    """Do a piece of work, and list what it read of what was there before."""
    with Addresses() as seen:
        work()
    return seen.read


def replays(work: Callable[[], object]) -> bool:
    """Say whether a graph of the work, recorded at its next call, would do at the following ones what the work does."""
    first, *others = [reads(work) for _ in range(3)]
    return bool(first) and all(other == first for other in others)
