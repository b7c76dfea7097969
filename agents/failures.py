"""What goes wrong in training without ending it at once: counted, and too much of it ends it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils import get_total_norm

MOST = 5


@dataclass
class Failures:
    """Updates that gave numbers which are not finite, and rollouts in which nearly every step diverged."""

    updates: int = 0
    in_a_row: int = 0
    """Of the last updates."""
    diverging: int = 0
    """Of the last rollouts."""
    norm: float | None = None
    """Of the parameters after an update, where its metrics have brought it from a device."""

    def asks(self, policy: Any) -> dict[str, Tensor]:
        """Give what shall come from a device with an update's metrics, that it need not be asked once more."""
        return {"norm_of_parameters": get_total_norm([x.detach() for x in policy.parameters()]).double()}

    @contextlib.contextmanager
    def undone(self, agent: Any) -> Iterator[None]:
        """Put an agent's policy back to its parameters and buffers before an update within, and count that, if it ends
        with FloatingPointError or leaves parameters that are not finite.
        """
        policy = agent.policy
        self.norm = None
        before = [x.detach().clone() for x in (*policy.parameters(), *policy.buffers())]
        try:
            yield
            norm = get_total_norm([x.detach() for x in policy.parameters()]) if self.norm is None else self.norm
            if not math.isfinite(norm):
                raise FloatingPointError("Parameters are not finite; lower the learning rates or the rewards.")
            self.in_a_row = 0
        except Exception as error:
            # Or a rollout, which is known on the host only now, was none to learn from.
            if not (failed := isinstance(error, FloatingPointError)) and agent.collector.observations is not None:
                raise
            agent.collector.brought = {}
            for now, then in zip((*policy.parameters(), *policy.buffers()), before, strict=True):
                now.data.copy_(then)
            if not failed:
                raise
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
