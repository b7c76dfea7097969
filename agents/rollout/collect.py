"""The one loop that fills a rollout buffer from an environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from agents.rollout.buffer import RolloutBuffer
from envs.vector import VectorEnv

Act = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Step t and observations [N, *O] to the actions that the buffer keeps and those that the environment takes."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of all environments gave."""

    t: int
    actions: Tensor
    observations: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    info: dict[str, Any]


def collect(
    env: VectorEnv,
    act: Act,
    buffer: RolloutBuffer,
    observations: Tensor,
    on_step: Callable[[Step], bool] | None = None,
) -> Tensor | None:
    """Fill a buffer with T steps of N environments.

    Only the fields that the buffer declares are kept. Where an episode was truncated, the observation that it really
    ended in is kept too, if the buffer keeps observations.

    Args:
        env: in SAME_STEP mode, num_envs = N.
        act: chooses actions.
        buffer: is cleared first.
        observations: [N, *O], current in env.
        on_step: called after each step; False stops collecting.

    Returns:
        The observations to go on from, or None if on_step stopped it.
    """
    buffer.clear()
    keeps = buffer.specs.keys()
    for t in range(buffer.n_steps):
        actions, environment_actions = act(t, observations)
        # Before the step, which may reuse the observations' memory.
        before = {"observations": observations, "actions": actions}
        buffer.add(t, **{name: value for name, value in before.items() if name in keeps})
        observations, rewards, terminated, truncated, info = env.step(environment_actions)
        after = {"rewards": rewards, "terminated": terminated, "truncated": truncated}
        buffer.add(t, **{name: value for name, value in after.items() if name in keeps})
        if "observations" in keeps and truncated.any():
            ids = truncated.nonzero()[:, 0]
            buffer.add_final(t, ids, info["final_obs"][ids])
        if on_step is not None and not on_step(
            Step(t, environment_actions, observations, rewards, terminated, truncated, info)
        ):
            return None
    return observations
