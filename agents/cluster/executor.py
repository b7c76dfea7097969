"""Where the shards of a run are worked on: in this process, one after the other, or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Work = Callable[..., Any]
"""What is done to a shard, shared arguments and its own ones to a result; a function of a module, so that workers find
it by its name."""


class Held(Protocol):
    """A shard where it is worked on: its work changes it, and depends on nothing else than it and the arguments."""

    def state(self) -> Any:
        """Give all that its future depends on."""
        ...

    def restore(self, state: Any) -> None:
        """Take back what `state` gave; what follows repeats bit for bit."""
        ...


Maker = Callable[[], Held]


@dataclass(frozen=True)
class Unknown:
    """In place of the state of a shard that cannot be put back exactly."""

    why: Exception


def state_of(held: Held) -> Any:
    """Give a shard's state, or why there is none; a work like others."""
    try:
        return held.state()
    except Exception as error:  # whatever the shards' code raises
        return Unknown(error)


def known(state: Any) -> Any:
    """Give a state that there is; raises where there is none."""
    if isinstance(state, Unknown):
        raise state.why
    return state


class Executor(Protocol):
    """Works on shards: results depend on the shards alone, never on who works on them, or how often anew."""

    threads: int
    """Threads that physics may step with on a shard; 0: every core."""

    def start(self, makers: Sequence[Maker]) -> None:
        """Begin with these shards, in place of those before."""
        ...

    def each(
        self, work: Work, *shared: Any, own: Sequence[tuple[Any, ...]] | None = None, alters: bool = True
    ) -> list[Any]:
        """Do work on every shard; gives the results in the shards' order.

        Args:
            work: called with the shard, the shared arguments and its own.
            own: a tuple for each shard.
            alters: whether the shard is another one afterwards.
        """
        ...

    def mark(self) -> Callable[[], None]:
        """Give a function that later, if it has to, puts all shards back to where they are now."""
        ...

    def metrics(self) -> dict[str, float]:
        """Say what happened to the workers so far, by names for a log."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class Serial:
    """One shard after the other, in this process: what every other executor has to equal."""

    threads = 0

    def __init__(self) -> None:
        self._held: list[Held] = []

    def start(self, makers: Sequence[Maker]) -> None:
        self._held = [make() for make in makers]

    def each(
        self, work: Work, *shared: Any, own: Sequence[tuple[Any, ...]] | None = None, alters: bool = True
    ) -> list[Any]:
        mine = own or [()] * len(self._held)
        return [work(held, *shared, *few) for held, few in zip(self._held, mine, strict=True)]

    def mark(self) -> Callable[[], None]:
        states = [state_of(held) for held in self._held]

        def back() -> None:
            for held, state in zip(self._held, states, strict=True):
                held.restore(known(state))

        return back

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._held = []
