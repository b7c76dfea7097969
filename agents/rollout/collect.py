"""The loop that fills a rollout buffer from environments, and the one for environments that stop one by one."""

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
ActSome = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""The same for some environments: step t, observations [k, *O] and ids [k], a new tensor whenever they change."""


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
) -> Tensor | None:
    """Fill a buffer with T steps of N environments.

    Only the fields that the buffer declares are kept. Where an episode was truncated and another began, the observation
    that it really ended in is kept too, if the buffer keeps observations.

    Args:
        env: num_envs = N, in SAME_STEP mode.
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
        observations, reward, terminated, truncated, info = env.step(environment_actions)
        after = {"rewards": reward, "terminated": terminated, "truncated": truncated}
        buffer.add(t, **{name: value for name, value in after.items() if name in keeps})
        if "observations" in keeps and truncated.any():
            ended = truncated.nonzero()[:, 0]
            buffer.add_final(t, ended, info["final_obs"][ended])
        if on_step is not None and not on_step(Step(t, actions, observations, reward, terminated, truncated, info)):
            return None
    return observations


def collect_some(
    env: VectorEnv,
    act: ActSome,
    buffer: RolloutBuffer,
    observations: Tensor,
    ids: Tensor,
    on_step: Callable[[Step], bool] | None = None,
) -> Tensor | None:
    """Fill a buffer with steps of some environments, each of which stands still once it has ended.

    A step costs what the environments that go on cost: only their rows are worked on. Where environments stand still,
    the fields "rewards", "terminated", "truncated" and "stepped" hold 0, and what the others hold means nothing.
    Collecting ends after T steps, or when all have ended.

    Args:
        env: N environments in DISABLED mode.
        act: chooses the actions of those that go on.
        buffer: is cleared first.
        observations: [N, *O], current in env.
        ids: the environments to step, int64 [k] in ascending order.
        on_step: called after each step; False stops collecting.

    Returns:
        The observations to go on from [N, *O], or None if on_step stopped it.
    """
    buffer.clear()
    keeps = buffer.specs.keys()
    for name in keeps & {"rewards", "terminated", "truncated"}:
        buffer[name].zero_()

    def keep(name: str, t: int, values: Tensor) -> None:
        if name in keeps:
            buffer.put(name, t, ids, values)

    def whole(values: Tensor) -> Tensor:
        return values.new_zeros(env.num_envs, *values.shape[1:]).index_copy_(0, ids, values)

    observations = observations.clone()
    current = observations[ids]
    lengths = torch.zeros(env.num_envs, dtype=torch.int64, device=ids.device)
    # Cast once a step: between two steps of the physics every operation finds cold caches.
    observed = buffer["observations"].dtype if "observations" in keeps else current.dtype
    for t in range(buffer.n_steps):
        seen = current.to(observed)
        actions, environment_actions = act(t, seen, ids)
        keep("observations", t, seen)
        keep("actions", t, actions)
        everyone = len(ids) == env.num_envs
        current, reward, terminated, truncated, info = env.step(environment_actions, None if everyone else ids)
        keep("rewards", t, reward)
        ends = True in terminated.tolist() or True in truncated.tolist()
        if ends:
            keep("terminated", t, terminated)
            keep("truncated", t, truncated)
        if on_step is not None:
            shown = observations.index_copy(0, ids, current)
            rewards, terminations, truncations = (whole(x) for x in (reward, terminated, truncated))
            if not on_step(Step(t, whole(actions), shown, rewards, terminations, truncations, info, ids)):
                return None
        if ends:
            # Of all, those that go on too: what these reach later replaces it.
            observations.index_copy_(0, ids, current)
            lengths.index_fill_(0, ids, t + 1)
            going = (~(terminated | truncated)).nonzero()[:, 0]
            ids, current = ids.index_select(0, going), current.index_select(0, going)
            if not len(ids):
                break
    observations.index_copy_(0, ids, current)
    lengths.index_fill_(0, ids, buffer.n_steps)
    if "stepped" in keeps:
        steps = torch.arange(buffer.n_steps, device=ids.device)
        torch.lt(steps[:, None], lengths, out=buffer["stepped"])
    return observations
