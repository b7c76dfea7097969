"""Many tasks' policies, which act in one forward pass and learn from their own rollouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from agents.adaptation.inner_loop import Adaptation, InnerSGD, adapted, gradients_of, inner_loop, inner_products
from agents.adaptation.shards import over_shards
from agents.adaptation.task_data import TaskData, task_data
from agents.config import above, at_least, between
from agents.policy.actor_critic import ActorPolicy
from agents.policy.batched import BatchedActor
from agents.rollout.buffer import AdvantageConfig, Rollout
from agents.rollout.surrogates import dice_surrogate, lvc_surrogate
from envs.vector import TaskVectorEnv, VectorEnv

KL_SAMPLES = 20_000
"""Steps of a rollout that a divergence is the mean of."""
RollOut = Callable[[int, Tensor], Rollout]
"""j and the policies θ_j [M, P] to a rollout of theirs, [T, M * R]."""


@dataclass(frozen=True, kw_only=True)
class InnerConfig(AdvantageConfig):
    """Which tasks an iteration has, and how a policy adapts to each."""

    num_envs: Annotated[int, at_least(1)] = 400
    """Environments stepped together: rollouts per task times meta_batch_size."""
    n_steps: Annotated[int, at_least(1)] = 200
    """Environment steps per rollout; of a task family, its horizon."""
    meta_batch_size: Annotated[int, at_least(1)] = 20
    """Tasks per iteration, with num_envs / meta_batch_size rollouts each. 1 is serial Reptile. An ordinary environment
    is a single task, whatever this says."""
    inner_steps: Annotated[int, at_least(1)] = 1
    """k: inner steps in each task, each from rollouts of its own."""
    inner_lr: Annotated[float, above(0)] = 0.1
    """α: step size of an inner step."""
    inner_lr_later: Annotated[float, above(0)] = 1.0
    """Factor on inner_lr after a task's first step; the command adapt halves it, as Finn et al. 2017 do."""
    gae_lambda: Annotated[float, between(0, 1)] = 1.0
    """Lambda of generalized advantage estimation around each task's own linear baseline."""

    def num_tasks(self, vector: VectorEnv) -> int:
        """Count an iteration's tasks in these environments; ValueError if they cannot be shared out among them."""
        n, tasks = vector.num_envs, self.meta_batch_size if isinstance(vector, TaskVectorEnv) else 1
        if n % tasks:
            raise ValueError(
                f"num_envs is {n}, which meta_batch_size = {tasks} does not divide; give each task as many rollouts, "
                f"such as num_envs {-(-n // tasks) * tasks}."
            )
        if isinstance(vector, TaskVectorEnv) and vector.max_episode_steps != self.n_steps:
            raise ValueError(
                f"n_steps is {self.n_steps}, but the horizon of {vector.made_from.get('env_id', 'the family')} is "
                f"{vector.max_episode_steps}; a rollout is a whole horizon, give both alike."
            )
        return tasks


@dataclass(frozen=True)
class TaskPolicies:
    """M policies of one architecture, each with its own parameters, a row of theta [M, P], and its own task.

    Their layout is that of `parameter_vector(policy.actor)`; the normalizer is the policy's for all.
    """

    policy: ActorPolicy
    inner: InnerSGD
    gamma: float
    """Discount per environment step."""
    gae_lambda: float
    """Lambda of generalized advantage estimation."""
    normalize_advantage: bool
    """Whether advantages are standardized in each task."""
    surrogate: Literal["lvc", "dice"] = "lvc"
    """What the inner step differentiates; see `agents.rollout.surrogates`."""

    @classmethod
    def of(cls, policy: ActorPolicy, c: InnerConfig, surrogate: Literal["lvc", "dice"] = "lvc") -> Self:
        """Make them as a configuration says."""
        inner = InnerSGD(c.inner_lr, c.inner_lr_later)
        return cls(policy, inner, c.gamma, c.gae_lambda, c.normalize_advantage, surrogate)

    @cached_property
    def actor(self) -> BatchedActor:
        """All policies as one."""
        return BatchedActor(self.policy.actor)

    def adapt(self, roll_out: RollOut, theta: Tensor, steps: int, after: int) -> Adaptation:
        """Let the policies theta learn: a rollout, an inner step from what it says, and so on.

        Args:
            roll_out: runs the policies.
            theta: θ_0, [M, P].
            steps: k.
            after: rollouts of the adapted policies.

        Returns:
            Its batches are `TaskData`.
        """

        def next_batch(j: int, theta: Tensor) -> TaskData:
            return self.data(theta, roll_out(j, theta))

        return inner_loop(next_batch, self.gradients, theta, self.inner, steps, after)

    def sampler(self, theta: Tensor, acting: ActorPolicy | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Give actions [M * R, *A] from observations [M * R, *O] and noise [M * R, *noise_shape].

        Args:
            theta: where the environments are.
            acting: the policy's twin there; None: itself.
        """
        sample, normalize = self.actor.sampler(theta), (acting or self.policy).normalize
        return lambda observations, noise: sample(normalize(observations), noise)

    def data(self, theta: Tensor, rollout: Rollout) -> TaskData:
        """Work out what a rollout of the policies theta says."""
        return task_data(
            self.policy, self.actor, theta, rollout, self.gamma, self.gae_lambda, normalize=self.normalize_advantage
        )

    def gradients(self, theta: Tensor, data: TaskData) -> Tensor:
        """Return the gradient that each task's inner step follows downhill, [M, P]."""
        return torch.cat(over_shards(lambda rows: gradients_of(self.loss, theta[rows], data.tasks(rows)), data.shards))

    def loss(self, theta: Tensor, data: TaskData) -> Tensor:
        """Return what the inner step descends: minus the mean surrogate of each task, [M]."""
        log_ratio = self.log_ratio(theta, data)
        if self.surrogate == "lvc":
            return -lvc_surrogate(log_ratio, data.advantages).mean(1)
        shape = data.begin.shape
        return -dice_surrogate(log_ratio.view(shape), data.advantages.view(shape), data.begin).mean((1, 2))

    def log_ratio(self, theta: Tensor, data: TaskData) -> Tensor:
        """Return log π_θ(a|s) - log π_old(a|s), [M, n]."""
        log_prob = self.actor.distribution(theta, data.s).log_prob(data.a.flatten(0, 1))
        return log_prob.view_as(data.log_old) - data.log_old

    def adapted(self, theta: Tensor, batches: list[TaskData]) -> Tensor:
        """Return theta [M, P] after an inner step on each batch, as a function that torch.func can differentiate."""
        return adapted(self.loss, theta, batches, self.inner)

    @torch.no_grad()
    def kl(self, before: Tensor, after: Tensor, data: TaskData) -> Tensor:
        """Average KL(before || after) over the tasks' policies and evenly spaced steps, in nats; a scalar."""
        s = data.s[:, :: -(-data.log_old.numel() // KL_SAMPLES)]
        return self.actor.distribution(before, s).kl(self.actor.distribution(after, s)).mean()

    def report(self, batch: Adaptation, gradients: Tensor) -> dict[str, Tensor]:
        """Say how the policies adapted: returns, lengths of the steps, how far the gradients [k, M, P] agree."""
        report = {f"adapt/return_{j}": data.returns.mean() for j, data in enumerate(batch.batches)}
        steps = zip(batch.thetas, batch.thetas[1:], batch.batches, strict=False)
        report["adapt/inner_kl"] = torch.stack([self.kl(*step) for step in steps]).mean()
        report["adapt/gradient_inner_product"] = inner_products(gradients).mean()
        if self.policy.actor.log_std is not None:
            report["std"] = self.policy.actor.log_std.bias.exp().mean()
        return report
