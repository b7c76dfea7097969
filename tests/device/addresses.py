"""What a recorded graph of a piece of work would do: the memory that it would read for ever, and the same once more."""

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


class Tape(TorchDispatchMode):
    """Records operations, and does the same again on the same memory, as a GPU's graph does, whatever the host thinks.

    Args:
        memory: lists what the work changes that was there before, to be put back: recording does nothing yet.
    """

    def __init__(self, memory: Callable[[], list[Tensor]]) -> None:
        super().__init__()
        self.memory, self.operations = memory, []

    def __enter__(self) -> Tape:
        self.before, self.watched = [x.clone() for x in self.memory()], sim.record()
        self.log = self.watched.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.watched.__exit__(*error)
        for x, old in zip(self.memory(), self.before, strict=True):
            x.copy_(old)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.log.events:
            raise RuntimeError(f"{func} cannot be recorded, for it is not the device's alone: {self.log.table()}")
        self.operations.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        for func, args, kwargs, found in self.operations:
            again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(x, Tensor) and place(x) != place(y):
                    x.copy_(y)


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
