"""What goes wrong in training without ending it at once: counted, and too much of it ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

MOST = 5


@dataclass
class Failures:
    """Updates that gave numbers which are not finite, and rollouts in which nearly every step diverged."""

    updates: int = 0
    in_a_row: int = 0
    """Of the last updates."""
    diverging: int = 0
    """Of the last rollouts."""

    def undo(self, agent: Any, error: FloatingPointError, before: Sequence[Tensor]) -> None:
        """Put an agent's policy back to its parameters and buffers before an update that failed, and count that."""
        for now, then in zip((*agent.policy.parameters(), *agent.policy.buffers()), before, strict=True):
            now.data.copy_(then)
        self.updates, self.in_a_row = self.updates + 1, self.in_a_row + 1
        agent.record({"failed_updates": self.updates})
        if self.in_a_row >= MOST:
            agent.stop_reason = f"{error} This was the {MOST}th update in a row that failed and was undone."

    def diverge(self, diverged: int, steps: int) -> str | None:
        """Take in how many of a rollout's steps a simulation diverged; give the sentence that ends training."""
        self.diverging = self.diverging + 1 if diverged > 0.9 * steps else 0
        if self.diverging < MOST:
            return None
        return (
            f"In {MOST} rollouts in a row the simulation diverged in over 90 % of the steps; give its model a smaller "
            "timestep or weaker actuators."
        )
