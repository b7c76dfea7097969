"""Rollouts of many tasks with one policy each, and the inner step that each policy takes from its own.

M tasks have R environments each, side by side: environment i belongs to task i // R. All M policies act in one forward
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from agents.adaptation.inner_loop import InnerOptimizer, State, gradients_of
from agents.policy.actor_critic import ActorCriticPolicy
from agents.policy.batched import BatchedActor
from agents.rollout.buffer import Rollout, gae
from agents.rollout.surrogates import dice_surrogate, lvc_surrogate
from agents.rollout.threads import over_shards

RIDGE = 1e-5
"""Of the linear baseline, relative to the mean of its features' squares."""
CG_ITERATIONS = 10
SHARD = 8192
"""Steps that are worked on at a time: few enough that what the layers keep of them stays in a core's cache."""
INNER_STEPS = ("policy_gradient", "natural_gradient")
SURROGATES = ("lvc", "dice")


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

    def tasks(self, rows: slice) -> TaskData:
        """Some tasks' share."""
        s, a, advantages, log_old, begin = (x[rows] for x in self)
        return TaskData(s, a, advantages, log_old, begin)

    def thinned(self, most: int) -> TaskData:
        """Evenly spaced steps of every task, about `most` in all; begin stays that of all."""
        stride = -(-self.log_old.numel() // most)
        s, a, advantages, log_old = (x[:, ::stride] for x in (self.s, self.a, self.advantages, self.log_old))
        return TaskData(s, a, advantages, log_old, self.begin)

    @property
    def shards(self) -> list[slice]:
        tasks, n = self.log_old.shape
        return shards(tasks, n, self.log_old.device)


def shards(tasks: int, n: int, device: torch.device) -> list[slice]:
    """Tasks of n steps each in groups of about `SHARD` steps; on an accelerator in one group."""
    size = max(SHARD // n, 1) if device.type == "cpu" else tasks
    return [slice(first, min(first + size, tasks)) for first in range(0, tasks, size)]


def first_returns(buffer: Rollout) -> Tensor:
    """The undiscounted return of each environment's first episode of a rollout, float64 [N]."""
    ended = (buffer["terminated"] | buffer["truncated"]).long()
    alive = ended.cumsum(0) - ended == 0
    return (buffer["rewards"] * alive).sum(0)


def task_data(
    policy: ActorCriticPolicy,
    actor: BatchedActor,
    theta: Tensor,
    buffer: Rollout,
    gamma: float,
    gae_lambda: float,
    *,
    normalize: bool = True,
) -> TaskData:
    """What the policies theta [M, P] made of the rollout in the buffer, [T, M * R].

    Advantages are generalized, around a linear baseline that is fitted to each task's own returns. A rollout is a whole
    horizon: nothing follows its last step.
    """
    tasks, (T, N) = len(theta), buffer["rewards"].shape
    R = N // tasks

    @torch.no_grad()
    def of(which: slice) -> TaskData:
        fields = {name: buffer[name][:, which.start * R : which.stop * R] for name in buffer.specs}
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
        return TaskData(s, a, A.float(), log_old, begin.T.reshape(-1, R, T))

    parts = over_shards(of, shards(tasks, R * T, theta.device))
    return TaskData(*(torch.cat(part) for part in zip(*parts, strict=True)))


def standardize(A: Tensor) -> Tensor:
    """Rows of A [M, n] with mean 0 and standard deviation 1; zeros where a row's entries are equal but for rounding."""
    spread = A.std(1, keepdim=True, correction=0)
    differ = spread > 1e-9 * A.abs().amax(1, keepdim=True)
    return torch.where(differ, (A - A.mean(1, keepdim=True)) / spread, 0.0)


def linear_baseline(s: Tensor, t: Tensor, returns: Tensor) -> Tensor:
    """Least-squares values of each task's own returns: [M, n, O], [M, n] and [M, n] to float64 [M, n].

    Features are s, s², t, t², t³ (t in hundreds of steps) and 1, as in Duan et al. 2016, appendix A.
    """
    s, t = s.double(), t.double()[..., None] / 100
    X = torch.cat((s, s.square(), t, t.square(), t**3, torch.ones_like(t)), dim=-1)
    gram = X.mT @ X / X.shape[1]
    shift = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    weights = torch.linalg.solve(gram + shift * eye, X.mT @ returns[..., None] / X.shape[1])
    return (X @ weights)[..., 0]


@dataclass(frozen=True)
class InnerStep:
    """How a policy takes one step from its own task's rollouts."""

    actor: BatchedActor
    optimizer: InnerOptimizer
    kind: str = "policy_gradient"
    """One of `INNER_STEPS`."""
    surrogate: str = "lvc"
    """One of `SURROGATES`."""
    target_kl: float = 0.01
    """Of a natural-gradient step, in nats."""
    damping: float = 0.1
    """Of the natural gradient's Fisher matrix, in units of the gradient's own Rayleigh quotient."""

    def log_ratio(self, theta: Tensor, data: TaskData) -> Tensor:
        """log π_θ(a|s) - log π_old(a|s), [M, n]."""
        log_prob = self.actor.distribution(theta, data.s).log_prob(data.a.flatten(0, 1))
        return log_prob.view_as(data.log_old) - data.log_old

    def loss(self, theta: Tensor, data: TaskData) -> Tensor:
        """What the inner step descends: minus the mean surrogate of each task, [M]."""
        log_ratio = self.log_ratio(theta, data)
        if self.surrogate == "lvc":
            return -lvc_surrogate(log_ratio, data.advantages).mean(1)
        shape = data.begin.shape
        return -dice_surrogate(log_ratio.view(shape), data.advantages.view(shape), data.begin).mean((1, 2))

    def __call__(
        self, theta: Tensor, data: TaskData, state: State, *, first: bool = True
    ) -> tuple[Tensor, Tensor, State]:
        """theta [M, P] after one step, the gradients g [M, P] that it was made of, and the optimizer's state.

        Args:
            first: whether it is the tasks' first step.
        """
        natural = self.kind == "natural_gradient"

        def of(rows: slice) -> tuple[Tensor, Tensor]:
            here, theirs = theta[rows], data.tasks(rows)
            g = gradients_of(self.loss, here, theirs)
            return g, self._natural(here, theirs, g) if natural else here

        g, moved = (torch.cat(parts) for parts in zip(*over_shards(of, data.shards), strict=True))
        if not natural:
            moved, state = self.optimizer.step(theta, g, state, first=first)
        return moved, g, state

    def _natural(self, theta: Tensor, data: TaskData, g: Tensor) -> Tensor:
        """θ - β (F + λ I)⁻¹ g for each task, with the β of target_kl to second order; a zero gradient moves nothing."""
        with torch.no_grad():
            old = self.actor.distribution(theta, data.s)

        def kl(rows: Tensor) -> Tensor:
            return old.kl(self.actor.distribution(rows, data.s)).view(data.log_old.shape).mean(1).sum()

        def fisher(v: Tensor) -> Tensor:
            product: Tensor = torch.func.grad(lambda rows: (torch.func.grad(kl)(rows) * v).sum())(theta)
            return product

        tiny = torch.finfo(g.dtype).tiny
        size = g.square().sum(1, keepdim=True)
        shift = self.damping * (g * fisher(g)).sum(1, keepdim=True) / (size + tiny)
        w = conjugate_gradients(lambda v: fisher(v) + shift * v, g, CG_ITERATIONS)
        quadratic = (w * fisher(w)).sum(1, keepdim=True)
        beta = torch.where(quadratic > 0, (2 * self.target_kl / quadratic.clamp_min(tiny)).sqrt(), 0.0)
        return theta - beta * w


def conjugate_gradients(matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Approximate solutions [M, P] of M systems at once, after a number of iterations; a solved row stays.

    Args:
        matvec: [M, P] to [M, P], each row times its own symmetric positive definite matrix.
        b: [M, P].

    Source: Nocedal & Wright 2006, algorithm 5.2; `agents.natural.curvature.conjugate_gradient` solves one system.
    """
    x, r, d = torch.zeros_like(b), b.clone(), b.clone()
    squared = r.square().sum(1, keepdim=True)
    enough = 1e-10 * squared
    for _ in range(iterations):
        product = matvec(d)
        curvature = (d * product).sum(1, keepdim=True)
        goes_on = (squared > enough) & (curvature > 0)
        step = torch.where(goes_on, squared / curvature, 0.0)
        x, r = x + step * d, r - step * product
        following = r.square().sum(1, keepdim=True)
        d = torch.where(goes_on, r + following / squared * d, d)
        squared = torch.where(goes_on, following, squared)
    return x


def task_sampler(policy: ActorCriticPolicy, actor: BatchedActor, theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Actions [N, *A] of the policies theta at observations [N, *O] from noise [N, *noise_shape]."""
    sample = actor.sampler(theta)
    return lambda observations, draws: sample(policy.normalize(observations), draws)
