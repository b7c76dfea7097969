"""The loops that fill a rollout: all environments, those that still run, or all of them behind masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.rollout.buffer import Rollout
from envs.vector import VectorEnv

Act = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Step t and observations [N, *O] to the actions that the rollout keeps and those that the environment takes."""
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


def collect(
    env: VectorEnv,
    act: Act,
    rollout: Rollout,
    observations: Tensor,
    on_step: Callable[[Step], bool] | None = None,
    on_end: Callable[[Tensor, dict[str, Any]], None] | None = None,
) -> tuple[Tensor, bool]:
    """Fill a rollout with T steps of N environments.

    Only the fields that the rollout declares are kept. Where an episode was truncated and another began, the
    observation that it really ended in is kept too, if the rollout keeps observations.

    Args:
        env: num_envs = N, in SAME_STEP mode.
        act: chooses actions.
        rollout: begins anew.
        observations: [N, *O], current in env.
        on_step: called after each step; False stops collecting.
        on_end: called before it with the mask of the environments that ended, if any did, and the info.

    Returns:
        The observations to go on from, valid until the next step, and whether all T steps were made.
    """
    keeps = rollout.specs.keys()
    for t in range(rollout.n_steps):
        actions, environment_actions = act(t, observations)
        # Before the step, which may reuse the observations' memory.
        before = {"observations": observations, "actions": actions}
        rollout.add(t, **{name: value for name, value in before.items() if name in keeps})
        observations, reward, terminated, truncated, info = env.step(environment_actions)
        after = {"rewards": reward, "terminated": terminated, "truncated": truncated}
        rollout.add(t, **{name: value for name, value in after.items() if name in keeps})
        if "final_observations" in keeps:
            rollout.add(t, final_observations=info["final_obs"])
        elif "observations" in keeps and truncated.any():
            ended = truncated.nonzero()[:, 0]
            rollout.add_final(t, ended, info["final_obs"][ended])
        if on_end is not None and bool((ended := terminated | truncated).any()):
            on_end(ended, info)
        if on_step is not None and not on_step(Step(t, actions, observations, reward, terminated, truncated, info)):
            return observations, False
    return observations, True


def collect_some(
    env: VectorEnv,
    act: ActSome,
    rollout: Rollout,
    observations: Tensor,
    ids: Tensor,
    on_step: Callable[[Step], bool] | None = None,
    on_end: Callable[[Tensor, dict[str, Any]], None] | None = None,
) -> tuple[Tensor, bool]:
    """Fill a rollout with steps of some environments, each of which stands still once it has ended.

    A step costs what the environments that go on cost: only their rows are worked on. Where environments stand still,
    the fields "rewards", "terminated", "truncated" and "stepped" hold 0, and what the others hold means nothing.
    Collecting ends after T steps, or when all have ended.

    Args:
        env: N environments in DISABLED mode.
        act: chooses the actions of those that go on.
        rollout: is cleared first.
        observations: [N, *O], current in env.
        ids: the environments to step, int64 [k] in ascending order.
        on_step: called after each step; False stops collecting.
        on_end: called before it with the mask of the environments that ended, if any did, and the info.

    Returns:
        The observations to go on from [N, *O], and whether on_step let all steps be made.
    """
    rollout.clear()
    keeps = rollout.specs.keys()
    for name in keeps & {"rewards", "terminated", "truncated"}:
        rollout[name].zero_()

    def keep(name: str, t: int, values: Tensor) -> None:
        if name in keeps:
            rollout.put(name, t, ids, values)

    def whole(values: Tensor) -> Tensor:
        return values.new_zeros(env.num_envs, *values.shape[1:]).index_copy_(0, ids, values)

    observations = observations.clone()
    current = observations[ids]
    lengths = torch.zeros(env.num_envs, dtype=torch.int64, device=ids.device)
    # Cast once a step: between two steps of the physics every operation finds cold caches.
    observed = rollout["observations"].dtype if "observations" in keeps else current.dtype
    for t in range(rollout.n_steps):
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
            if on_end is not None:
                on_end(terminated | truncated, info)
        if on_step is not None:
            shown = observations.index_copy(0, ids, current)
            rewards, terminations, truncations = (whole(x) for x in (reward, terminated, truncated))
            if not on_step(Step(t, whole(actions), shown, rewards, terminations, truncations, info, ids)):
                return shown, False
        if ends:
            # Of all, those that go on too: what these reach later replaces it.
            observations.index_copy_(0, ids, current)
            lengths.index_fill_(0, ids, t + 1)
            going = (~(terminated | truncated)).nonzero()[:, 0]
            ids, current = ids.index_select(0, going), current.index_select(0, going)
            if not len(ids):
                break
    observations.index_copy_(0, ids, current)
    lengths.index_fill_(0, ids, rollout.n_steps)
    if "stepped" in keeps:
        steps = torch.arange(rollout.n_steps, device=ids.device)
        torch.lt(steps[:, None], lengths, out=rollout["stepped"])
    return observations, True


def collect_masked(
    env: VectorEnv,
    act: ActSome,
    rollout: Rollout,
    observations: Tensor,
    ids: Tensor,
    on_step: Callable[[Step], bool] | None = None,
) -> tuple[Tensor, bool]:
    """Do as `collect_some` without asking who has ended: all environments are stepped, always T times, and masked.

    Args: as of `collect_some`; env is `masked`, and environments that are not in ids have ended.
    """
    rollout.clear()
    keeps, everyone = rollout.specs.keys(), torch.arange(env.num_envs, device=env.device)
    going = torch.zeros_like(everyone, dtype=torch.bool).index_fill_(0, ids, True)
    for t in range(rollout.n_steps):
        actions, environment_actions = act(t, observations, everyone)
        current, rewards, terminated, truncated, info = env.step(environment_actions)
        kept = {"observations": observations, "actions": actions, "rewards": rewards, "stepped": going}
        kept |= {"terminated": terminated, "truncated": truncated}
        rollout.add(t, **{name: value for name, value in kept.items() if name in keeps})
        seen = going.view(-1, *(1,) * (current.ndim - 1))
        observations = torch.where(seen, current, observations)
        if on_step is not None:
            stepped = going.nonzero()[:, 0]
            if not on_step(Step(t, actions, observations, rewards, terminated, truncated, info, stepped)):
                return observations, False
        going = going & ~(terminated | truncated)
    return observations, True
