"""What an evolution strategy knows of the computation that it differentiates."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

ParticleState = dict[str, Tensor]
"""Of n particles: tensors whose first dimension is n. "steps", int64 [n], counts the steps since init."""


class Unroll(Protocol):
    """Many copies of one unrolled computation, each with its own parameters.

    A particle's result depends on its own row alone, and neither call changes the tensors that it is given: what a
    computation keeps elsewhere (a simulator, stepped by ids) it finds again by the slots that it stored in the state.
    """

    def init(self, keys: Tensor, slots: Tensor) -> ParticleState:
        """Begin n new episodes and return their first state.

        Args:
            keys: int64 [n] in [0, 2^31), the seeds of the episodes; equal keys give equal episodes.
            slots: int64 [n], distinct: the particles that begin anew, as rows among those that are unrolled together.
        """
        ...

    def unroll(self, theta: Tensor, state: ParticleState, window: int) -> tuple[ParticleState, Tensor, Tensor]:
        """Advance n particles by up to window steps.

        Args:
            theta: parameters [n, P].
            state: of n particles that have not ended; any subset of those that were begun.
            window: steps, at least 1.

        Returns:
            The state; the score [n] of the window's steps, which is to be maximized; and whether the episode ended
            [n], boolean. A particle that ends within the window makes no further steps and scores nothing for them.
        """
        ...
