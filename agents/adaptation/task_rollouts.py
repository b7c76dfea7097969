"""An iteration's tasks, and the policies that adapt to them in its rollouts: here, or on an executor's workers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.adaptation.inner_loop import Adaptation
from agents.adaptation.task_data import TaskData
from agents.adaptation.task_policies import TaskPolicies
from agents.policy.base import Moments
from agents.rollout.buffer import Rollout
from agents.rollout.collector import Collector, single_thread
from agents.rollout.spread import Acting, Report, Shard, SpreadCollector
from envs.vector import TaskVectorEnv


class StopCollecting(Exception):  # noqa: N818 - like StopIteration it is no error
    """A callback asked to stop amid the inner loop."""


def adapt_here(
    collector: Collector, tasks: TaskPolicies, phi: Tensor, counter: int, numbers: np.ndarray, steps: int, after: int
) -> tuple[Adaptation, list[Moments]]:
    """Let a policy adapt to each task: θ_0 = φ, and θ_{j+1} = θ_j - α ∇L_j(θ_j) from a rollout of θ_j.

    Environments of a task family begin the tasks, and every rollout is a whole horizon; ordinary ones go on.

    Args:
        collector: of R environments to a task.
        tasks: the policies.
        phi: φ [P].
        counter: which of the run's iterations this is.
        numbers: of the tasks, [M].
        steps: k.
        after: rollouts of the adapted policies.

    Returns:
        What they went through, and the moments of the last rollout's observations.

    Raises:
        StopCollecting: a callback asked to stop.
    """
    vector, rollouts = collector.vector, steps + after
    family = vector if isinstance(vector, TaskVectorEnv) else None
    if family is not None:
        drawn = family.draw_tasks(numbers, "train")
        family.set_tasks(np.repeat(drawn, vector.num_envs // len(numbers), axis=0))
    last: Rollout | None = None

    def roll_out(j: int, theta: Tensor) -> Rollout:
        nonlocal last
        if family is not None:
            collector.begin(family.reset()[0])
        sample = tasks.sampler(theta.to(vector.device), collector.policy)
        last = collector.fill(counter * rollouts + j, sample)
        if last is None:
            raise StopCollecting
        return last

    found = tasks.adapt(roll_out, phi.expand(len(numbers), -1), steps, after)
    assert last is not None
    policy = tasks.policy
    with single_thread():
        observed = Moments.of(policy.flatten(last["observations"].flatten(0, 1)))
    return found, [observed]


def adapt_spread(
    collector: SpreadCollector,
    tasks: TaskPolicies,
    phi: Tensor,
    counter: int,
    numbers: np.ndarray,
    steps: int,
    after: int,
) -> tuple[Adaptation, list[Moments]]:
    """Do as `adapt_here`, each shard's tasks on the worker that has it: φ goes there, what the tasks say comes back."""
    collector.refuse_listener()
    R = collector.vector.num_envs // len(numbers)
    own = [(numbers[shard.start // R : shard.stop // R],) for shard in collector.shards]
    plain = dataclasses.replace(tasks, policy=None)  # type: ignore[arg-type]  # there is one there
    found = collector.each(_adapt, collector.acting(), plain, phi.cpu(), counter, steps, after, own=own)
    reports, parts, observed = zip(*found, strict=True)
    collector.take(reports)
    device = phi.device
    thetas, batches, gradients = zip(*parts, strict=True)
    return Adaptation(
        [phi.expand(len(numbers), -1), *(torch.cat(x).to(device) for x in zip(*thetas, strict=True))],
        [TaskData(*(torch.cat(x).to(device) for x in zip(*data, strict=True))) for data in zip(*batches, strict=True)],
        torch.cat(gradients, dim=1).to(device),
    ), [moments.to(device) for few in observed for moments in few]


def _adapt(
    shard: Shard, acting: Acting, tasks: TaskPolicies, phi: Tensor, counter: int, steps: int, after: int, numbers: Any
) -> tuple[Report, tuple[list[Tensor], list[TaskData], Tensor], list[Moments]]:
    shard.act_as(acting)
    here = dataclasses.replace(tasks, policy=shard.policy)
    found, observed = adapt_here(shard.collector, here, phi, counter, numbers, steps, after)
    return shard.collector.report(), (found.thetas[1:], found.batches, found.gradients), observed
