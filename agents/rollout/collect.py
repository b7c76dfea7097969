"""The one loop that fills a rollout buffer from an environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents import noise
from agents.rollout.buffer import FieldSpec, RolloutBuffer
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
    """Of the environments that were stepped, in the order of ids."""
    ids: Tensor | None = None
    """The environments that were stepped, or None for all; the others' rewards are 0, and they did not end."""


def buffer_fields(policy: Any) -> dict[str, FieldSpec]:
    """What is kept of the steps of a policy that samples its actions."""
    head = policy.head
    return {
        "observations": FieldSpec(policy.observation_space.shape or ()),
        "actions": FieldSpec(head.action_shape, head.action_dtype),
        "rewards": FieldSpec(dtype=torch.float64),
        "terminated": FieldSpec(dtype=torch.bool),
        "truncated": FieldSpec(dtype=torch.bool),
    }


def action_noise(policy: Any, seed: int, counter: int, steps: int, num_envs: int) -> Tensor:
    """What a rollout's actions are drawn with, [steps, num_envs, *noise_shape].

    Args:
        policy: one whose actor samples.
        seed: the run's.
        counter: which of the run's rollouts this is.
    """
    head = policy.head
    draw = noise.normal if head.kind == "gaussian" else noise.uniform
    return draw(seed, "action", counter, (steps, num_envs, *head.noise_shape))


def collect(
    env: VectorEnv,
    act: Act,
    buffer: RolloutBuffer,
    observations: Tensor,
    on_step: Callable[[Step], bool] | None = None,
    ids: Tensor | None = None,
) -> Tensor | None:
    """Fill a buffer with T steps of N environments.

    Only the fields that the buffer declares are kept. Where an episode was truncated and another began, the observation
    that it really ended in is kept too, if the buffer keeps observations. Where environments stand still, the fields
    "rewards" and "stepped" hold 0, and what the others hold means nothing.

    Args:
        env: num_envs = N. In SAME_STEP mode, unless ids are given.
        act: chooses actions.
        buffer: is cleared first.
        observations: [N, *O], current in env.
        on_step: called after each step; False stops collecting.
        ids: the environments to step, int64 [k] in ascending order, in DISABLED mode; each of them stands still once it
            has ended, and collecting ends when all have.

    Returns:
        The observations to go on from, or None if on_step stopped it.
    """
    buffer.clear()
    keeps = buffer.specs.keys()
    if ids is not None:
        for name in keeps & {"rewards", "stepped"}:
            buffer[name].zero_()
    for t in range(buffer.n_steps):
        actions, environment_actions = act(t, observations)
        # Before the step, which may reuse the observations' memory.
        before = {"observations": observations, "actions": actions}
        buffer.add(t, **{name: value for name, value in before.items() if name in keeps})
        step = _step(env, t, environment_actions, observations, ids)
        observations, truncated = step.observations, step.truncated
        after = {"rewards": step.rewards, "terminated": step.terminated, "truncated": truncated}
        buffer.add(t, **{name: value for name, value in after.items() if name in keeps})
        if "stepped" in keeps:
            _mark(buffer["stepped"][t], ids)
        if "observations" in keeps and ids is None and truncated.any():
            ended = truncated.nonzero()[:, 0]
            buffer.add_final(t, ended, step.info["final_obs"][ended])
        if on_step is not None and not on_step(step):
            return None
        if ids is not None:
            over = step.terminated | truncated
            if over.any():
                ids = ids[~over[ids]]
                if not len(ids):
                    break
    return observations


def _mark(stepped: Tensor, ids: Tensor | None) -> None:
    """Set stepped [N] where environments were."""
    if ids is None:
        stepped.fill_(True)
    else:
        stepped.index_fill_(0, ids, True)


def _step(env: VectorEnv, t: int, actions: Tensor, observations: Tensor, ids: Tensor | None) -> Step:
    """Step the environments ids, and say what became of all."""
    if ids is None or len(ids) == env.num_envs:
        observation, reward, terminated, truncated, info = env.step(actions)
        return Step(t, actions, observation, reward, terminated, truncated, info, ids)
    observation, reward, terminated, truncated, info = env.step(actions[ids], ids)

    def whole(values: Tensor) -> Tensor:
        return values.new_zeros(env.num_envs).index_copy_(0, ids, values)

    observations = observations.index_copy(0, ids, observation)
    return Step(t, actions, observations, whole(reward), whole(terminated), whole(truncated), info, ids)
