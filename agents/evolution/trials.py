"""Successive halving: several searches that begin alike, of which the better ones go on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor

from agents.config import CommonConfig, at_least

SearchState = dict[str, Tensor]
"""What a search goes on from: parameters, statistics, the optimizer's state."""


@dataclass(frozen=True, kw_only=True)
class TrialsConfig(CommonConfig):
    """Which searches are compared before one goes on."""

    trials: tuple[Annotated[int, at_least(1)], ...] = ()
    """Searches that are compared first, in each round of successive halving: 8 3 makes eight from the beginning, then
    goes on with the three best of them, then with the best. They are scored by the better half of their last window."""
    trial_steps: tuple[Annotated[int, at_least(1)], ...] = ()
    """Environment steps of a search in each round; schedules begin after the last one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        falling = all(more > fewer for more, fewer in pairwise(self.trials))
        self.require("trials", falling, "ever fewer searches, or nothing")
        if len(self.trials) != len(self.trial_steps):
            raise ValueError(
                f"trials has {len(self.trials)} rounds and trial_steps {len(self.trial_steps)}; give as many of each."
            )


class Trials:
    """The searches that a run compares before it goes on with the best of them.

    In the first round counts[0] searches begin alike, each with noise of its own; in the next round the counts[1] best
    of them go on from where they were, and so on. They are made one after the other, steps[r] environment steps each.
    Where a search will end is often decided early: a few short ones cost less than a long one that has gone astray.

    Args:
        counts: searches in each round, ever fewer; none: nothing is compared.
        steps: environment steps of a search in each round.
        first: what all begin from.

    Source: Jamieson & Talwalkar 2016, https://proceedings.mlr.press/v51/jamieson16.html. Differs from it: the counts
    and steps are given, in place of halves and doubles.
    """

    def __init__(self, counts: Sequence[int], steps: Sequence[int], first: Mapping[str, Tensor]) -> None:
        self.counts, self.steps = tuple(counts), tuple(steps)
        self.round = 0
        self.made = 0
        """Searches of this round that are over."""
        self.contenders: list[SearchState] = [copied(first)]
        """What this round's searches begin from, best first; in the first round the one state that all begin from."""
        self.results: list[tuple[float, SearchState]] = []
        """The best of those that are over, best first: score and state."""

    @property
    def pending(self) -> bool:
        """Say whether searches are still compared."""
        return self.round < len(self.counts)

    @property
    def total_steps(self) -> int:
        """Count the environment steps of all rounds."""
        return self._steps_before(len(self.counts))

    def expect(self, total: int) -> None:
        """Warn if training ends among the trials, after total environment steps of the run."""
        if self.pending and total < self.total_steps:
            warnings.warn(
                f"The trials take {self.total_steps:,} environment steps and training ends after {total:,}, with the "
                "policy of an unfinished comparison; give more steps, or trials=().",
                stacklevel=4,
            )

    def compare(self, steps: int, score: float, current: Callable[[], SearchState]) -> SearchState | None:
        """Take the search that runs into the comparison, if its steps have been made.

        Args:
            steps: environment steps of the run so far.
            score: how good its policies are now.
            current: gives its state.

        Returns:
            What to go on from: what the round's next search begins with or, after the last round, the best of all. None
            while the search runs on.
        """
        if not self.pending or steps < self._steps_before(self.round) + (self.made + 1) * self.steps[self.round]:
            return None
        last = self.round + 1 == len(self.counts)
        self.results.append((score, copied(current())))
        self.results.sort(key=lambda result: result[0], reverse=True)
        del self.results[1 if last else self.counts[self.round + 1] :]
        self.made += 1
        if self.made == self.counts[self.round]:
            self.contenders = [state for _, state in self.results]
            self.results, self.round, self.made = [], self.round + 1, 0
        return self.contenders[self.made if self.round else 0]

    def _steps_before(self, round_: int) -> int:
        return sum(count * steps for count, steps in zip(self.counts[:round_], self.steps, strict=False))

    def tensors(self) -> SearchState:
        """Return what a resumed run needs; once nothing is compared any more, that nothing is."""
        held = {"progress": torch.tensor([self.round, self.made])}
        if not self.pending:
            return held
        held["scores"] = torch.tensor([score for score, _ in self.results], dtype=torch.float64)
        for part, states in (("contenders", self.contenders), ("results", [state for _, state in self.results])):
            for index, state in enumerate(states):
                held |= {f"{part}.{index}.{name}": value for name, value in state.items()}
        return held

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        self.round, self.made = tensors["progress"].tolist()
        if self.pending:
            self.contenders = _states("contenders", tensors)
            self.results = list(zip(tensors["scores"].tolist(), _states("results", tensors), strict=True))


def copied(state: Mapping[str, Tensor]) -> SearchState:
    """Copy a state, which later updates leave as it is."""
    return {name: value.clone() for name, value in state.items()}


def _states(part: str, tensors: Mapping[str, Tensor]) -> list[SearchState]:
    found: dict[int, SearchState] = {}
    for name, value in tensors.items():
        if name.startswith(f"{part}."):
            index, _, rest = name.removeprefix(f"{part}.").partition(".")
            found.setdefault(int(index), {})[rest] = value
    return [found[index] for index in sorted(found)]
