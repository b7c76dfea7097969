"""What the rollouts of many tasks say, each with its own policy.

M tasks have R environments each, side by side: environment i belongs to task i // R.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agents.adaptation.shards import over_shards, shards
from agents.policy.actor_critic import ActorPolicy
from agents.policy.batched import BatchedActor
from agents.rollout.buffer import Rollout, gae, standardize

RIDGE = 1e-5
"""Of the linear baseline, relative to the mean of its features' squares."""


class TaskData(NamedTuple):
    """What M tasks' rollouts of R environments and T steps say; n = R T, environment by environment."""

    s: Tensor
    """Normalized observations, [M, n, O]."""
    a: Tensor
    """Actions, [M, n, *A]."""
    advantages: Tensor
    """[M, n]; of mean 0 and standard deviation 1 in each task, if they are normalized."""
    log_old: Tensor
    """log π(a|s) of the policies that acted, [M, n]."""
    begin: Tensor
    """The first step of each step's episode, int64 [M, R, T]."""
    returns: Tensor
    """The undiscounted return of each environment's first episode, float64 [M, R]."""

    def tasks(self, rows: slice) -> TaskData:
        """Return some tasks' share."""
        return TaskData(*(x[rows] for x in self))

    @property
    def shards(self) -> list[slice]:
        """The tasks in groups that are worked on at a time."""
        tasks, n = self.log_old.shape
        return shards(tasks, n, self.log_old.device)


def task_data(
    policy: ActorPolicy,
    actor: BatchedActor,
    theta: Tensor,
    rollout: Rollout,
    gamma: float,
    gae_lambda: float,
    *,
    normalize: bool = True,
) -> TaskData:
    """Work out what the policies theta [M, P] made of a rollout of theirs, [T, M * R].

    Advantages are generalized, around a linear baseline that is fitted to each task's own returns. A rollout is a whole
    horizon: nothing follows its last step.
    """
    tasks, (T, N) = len(theta), rollout["rewards"].shape
    R = N // tasks

    @torch.no_grad()
    def of(which: slice) -> tuple[Tensor, ...]:
        fields = {name: rollout[name][:, which.start * R : which.stop * R] for name in rollout.specs}
        rows = (which.stop - which.start, R * T)
        s = policy.normalize(fields["observations"].transpose(0, 1).flatten(0, 1)).view(*rows, -1)
        a = fields["actions"].transpose(0, 1)
        a = a.reshape(*rows, *a.shape[2:])
        rewards, ended = fields["rewards"], fields["terminated"] | fields["truncated"]
        steps = torch.arange(T, device=s.device)[:, None]
        begun = torch.where(ended, steps + 1, 0).cummax(0).values
        begin = torch.cat((torch.zeros_like(begun[:1]), begun[:-1]))

        ends = ended.clone()
        ends[-1] = True
        zeros = torch.zeros_like(rewards)
        returns, _ = gae(rewards, zeros, zeros, ends, ends, gamma, 1.0)
        values = linear_baseline(s, (steps - begin).T.reshape(rows), returns.T.reshape(rows))
        values = values.view(-1, T).T
        following = torch.cat((values[1:], zeros[:1]))
        advantages, _ = gae(rewards, values, following, ends, ends, gamma, gae_lambda)
        A = advantages.T.reshape(rows)
        A = standardize(A) if normalize else A
        log_old = actor.distribution(theta[which], s).log_prob(a.flatten(0, 1)).view(rows)
        return s, a, A.float(), log_old, begin.T.reshape(-1, R, T)

    parts = over_shards(of, shards(tasks, R * T, theta.device))
    s, a, A, log_old, begin = (torch.cat(part) for part in zip(*parts, strict=True))
    return TaskData(s, a, A, log_old, begin, first_returns(rollout).view(tasks, R))


def linear_baseline(s: Tensor, t: Tensor, returns: Tensor) -> Tensor:
    """Fit least-squares values to each task's own returns: [M, n, O], [M, n] and [M, n] to float64 [M, n].

    Features are s, s², t, t², t³ (t in hundreds of steps) and 1, as in Duan et al. 2016, appendix A.
    """
    s, t = s.double(), t.double()[..., None] / 100
    X = torch.cat((s, s.square(), t, t.square(), t**3, torch.ones_like(t)), dim=-1)
    gram = X.mT @ X / X.shape[1]
    shift = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    weights = torch.linalg.solve(gram + shift * eye, X.mT @ returns[..., None] / X.shape[1])
    return (X @ weights)[..., 0]


def first_returns(rollout: Rollout) -> Tensor:
    """Sum the rewards of each environment's first episode of a rollout, float64 [N]."""
    ended = (rollout["terminated"] | rollout["truncated"]).long()
    alive = ended.cumsum(0) - ended == 0
    return (rollout["rewards"] * alive).sum(0)
