"""Learning to adapt to new tasks in a few policy-gradient steps: Reptile, FOMAML and MAML."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from agents import noise
from agents.adaptation.inner_loop import Adaptation, gradients_after, linear_anneal
from agents.adaptation.shards import over_shards
from agents.adaptation.task_data import TaskData
from agents.adaptation.task_policies import InnerConfig, TaskPolicies
from agents.adaptation.task_rollouts import StopCollecting, adapt_here, adapt_spread
from agents.base import Agent
from agents.config import SCHEDULED, above, at_least
from agents.optim.registry import OptimizerName, OptimizerState, make_optimizer
from agents.policy.actor_critic import ActorPolicy
from agents.policy.networks import assign_parameters, parameter_vector
from agents.rollout.collector import single_thread
from agents.rollout.spread import SpreadCollector
from agents.rollout.surrogates import clipped_surrogate
from agents.saving import Stateful
from envs.sb3 import SB3View
from envs.vector import TaskVectorEnv, VectorEnv


@dataclass(frozen=True, kw_only=True)
class MetaConfig(InnerConfig):
    """Hyperparameters that Reptile, FOMAML and MAML share, those of the inner loop beside it."""

    log_std_init: float = 0.0
    """Initial log standard deviation of Gaussian actions, in units of their bounds' half width."""
    log_std_min: float | None = None
    """Floor of φ's log standard deviation of Gaussian actions, in units of their bounds' half width, or None."""
    outer_optimizer: OptimizerName = "adam"
    """What follows the meta-gradient."""
    learning_rate: Annotated[float, above(0), SCHEDULED] = 1e-3
    """β: the outer optimizer's step size."""
    anneal: bool = False
    """Whether learning_rate falls linearly to 0 over the training."""


@dataclass(frozen=True, kw_only=True)
class ReptileConfig(MetaConfig):
    """Hyperparameters of Reptile."""

    inner_steps: Annotated[int, at_least(1)] = 2
    """k: inner steps in each task, each from rollouts of its own; with k = 1 Reptile is joint training."""
    outer_optimizer: OptimizerName = "sgd"
    """What follows φ - φ~, which stands for the meta-gradient."""
    learning_rate: Annotated[float, above(0), SCHEDULED] = 0.5
    """The outer optimizer's step size; with sgd, Reptile's ε."""


@dataclass(frozen=True, kw_only=True)
class FOMAMLConfig(MetaConfig):
    """Hyperparameters of FOMAML."""

    outer_losses: Literal["last", "each"] = "last"
    """last: the adapted policies' loss after the last inner step. each: the mean of those after each inner step, whose
    rollouts are there anyway (Antoniou et al. 2019, section 4, the multi-step loss)."""
    n_epochs: Annotated[int, at_least(1)] = 5
    """Steps on the clipped surrogate per iteration, each on all rollouts."""
    clip_range: Annotated[float, above(0), SCHEDULED] = 0.3
    """ε: how far a probability ratio may go from 1 before its sample gives no more gradient."""


@dataclass(frozen=True, kw_only=True)
class MAMLConfig(FOMAMLConfig):
    """Hyperparameters of MAML."""

    inner_surrogate: Literal["lvc", "dice"] = "lvc"
    """What the inner step differentiates, and MAML through it: dice has unbiased second derivatives; lvc leaves out the
    products between steps of an episode, which varies less."""


class MetaAgent(Agent):
    """What Reptile, FOMAML and MAML share: the tasks of an iteration and the inner loop.

    An iteration takes meta_batch_size new tasks of the family, all stepped in one batch. Each task's policy begins at φ
    and takes an inner step from each of its rollouts; all policies act in one forward pass. On an environment that is
    no task family there is one task.

    The policy that is saved, evaluated and acts is φ, before adaptation. Policies have no critic: advantages are taken
    around a linear baseline in each task.

    A family is a TaskVectorEnv, or an environment with `set_task` and `sample_tasks` that `make_vec` makes.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": ActorPolicy}
    policy_base = ActorPolicy
    rollouts_after: ClassVar[int]
    """Rollouts after the last inner step."""
    config: MetaConfig

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        super()._setup_model()
        c = self.config
        self.tasks = TaskPolicies.of(self.policy, c, c.inner_surrogate if isinstance(c, MAMLConfig) else "lvc")
        self.phi = parameter_vector(self.policy.actor)
        self.optimizer = make_optimizer(c.outer_optimizer, [self.phi], lr=c.learning_rate)

    def _connect(self, env: SB3View) -> None:
        self.num_tasks = self.config.num_tasks(env.vector)
        if not isinstance(env.vector, TaskVectorEnv):
            self._check_that_it_is_meant(env.vector)
        super()._connect(env)

    def _check_that_it_is_meant(self, vector: VectorEnv) -> None:
        """Warn of an environment that is no task family; ValueError if it has tasks all the same."""
        family = "families/HalfCheetahVel-v0 or a TaskVectorEnv of your own (docs/own-environment.md)"
        singles = getattr(vector, "envs", None) or getattr(getattr(vector, "env", None), "envs", None) or ()
        if any(env.has_wrapper_attr("set_task") for env in singles):
            raise ValueError(
                f"env has set_task, which {type(self).__name__} calls where it has sample_tasks(n) too, from which "
                f"tasks come, and is made by make_vec: give it both and make_vec(lambda: ..., num_envs), or {family}."
            )
        warnings.warn(
            f"env is no family of tasks: {type(self).__name__} adapts to it as to a single task, and takes a rollout's "
            f"end, after n_steps={self.config.n_steps}, as an episode's. To learn to adapt, give {family}.",
            stacklevel=6,
        )

    def shard_width(self, vector: VectorEnv) -> int:
        return math.lcm(noise.SHARD, vector.num_envs // self.num_tasks)  # whole tasks

    @property
    def steps_per_iteration(self) -> int:
        return super().steps_per_iteration * (self.config.inner_steps + self.rollouts_after)

    def parts(self) -> dict[str, Stateful]:
        return {"optimizer": OptimizerState(self.config.outer_optimizer, self.optimizer)}

    # The inner loop --------------------------------------------------------------------------------------------------

    def collect(self) -> Adaptation | None:
        """Let a policy adapt to each task: θ_0 = φ, and θ_{j+1} = θ_j - α ∇L_j(θ_j) from a rollout of θ_j."""
        phi, k, M = parameter_vector(self.policy.actor), self.config.inner_steps, self.num_tasks
        self.phi.copy_(phi)  # what was set from outside counts
        spread = isinstance(self.collector, SpreadCollector)
        adapt: Any = adapt_spread if spread else adapt_here
        numbers = self.counter * M + np.arange(M)
        try:
            batch, self.observed = adapt(self.collector, self.tasks, phi, self.counter, numbers, k, self.rollouts_after)
        except StopCollecting:
            return None
        return batch

    # The outer loop --------------------------------------------------------------------------------------------------

    def _descend(self, gradient: Tensor) -> None:
        """Move φ one step of the outer optimizer against a meta-gradient [P]."""
        if not gradient.isfinite().all():
            raise FloatingPointError(
                "the meta-gradient is not finite; this iteration changed nothing. Give a smaller inner_lr or "
                "learning_rate."
            )
        done = 1 - self._current_progress_remaining if self.config.anneal else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = linear_anneal(self.current.learning_rate, done)
        self.phi.grad = gradient
        self.optimizer.step()

    def _finish(self, batch: Adaptation, meta_gradient: Tensor, gradients: Tensor) -> None:
        """Take φ into the policy, and the last rollout into the normalizer: all rollouts of an iteration have to be
        normalized alike. Record what happened; gradients [k, M, P] are the inner steps', and the last loss's.
        """
        if self.tasks.actor.log_std is not None and self.config.log_std_min is not None:
            self.phi[self.tasks.actor.log_std].clamp_(min=self.policy.actor.log_unit + self.config.log_std_min)
        assign_parameters(self.policy.actor, self.phi)
        if self.policy.normalize_observations:
            for moments in self.observed:
                self.policy.normalizer.merge(moments)
        self.record(self.tasks.report(batch, gradients) | {"meta_gradient_norm": meta_gradient.norm()})


class Reptile(MetaAgent):
    """Reptile: φ moves towards the tasks' policies after k inner steps.

    Arguments: see `Agent` and `ReptileConfig`.

    Source: Nichol, Achiam & Schulman 2018, algorithms 1 and 2, https://arxiv.org/abs/1803.02999. The authors report
    that it did not beat joint training in reinforcement learning.
    """

    name: ClassVar[str] = "reptile"
    Config = ReptileConfig
    config: ReptileConfig
    rollouts_after = 0

    @single_thread()
    def train(self, batch: Adaptation) -> None:
        """φ ← φ + ε (mean of φ~ - φ), with φ~ = U^k(φ)."""
        difference = self.phi - batch.thetas[-1].mean(0)
        self._descend(difference)
        self._finish(batch, difference, batch.gradients)


class FOMAML(MetaAgent):
    """First-order MAML: policy improvement of the adapted policies, applied to φ as if U^k had the Jacobian I.

    Arguments: see `Agent` and `FOMAMLConfig`.

    Source: Finn, Abbeel & Levine 2017, section 5.2, https://arxiv.org/abs/1703.03400.

    Differs from the paper: the outer step is that of a clipped surrogate, not a trust region's.
    """

    name: ClassVar[str] = "fomaml"
    Config = FOMAMLConfig
    config: FOMAMLConfig
    rollouts_after = 1

    @single_thread()
    def train(self, batch: Adaptation) -> None:
        """φ ← φ - β mean of Jᵀ ∇L(U^k(φ)), n_epochs times on the same rollouts, with J = dU^k/dφ as the rule has it."""
        first, tail = self._meta_gradient(batch)
        self._descend(first)
        for _ in range(self.config.n_epochs - 1):
            self._descend(self._meta_gradient(batch)[0])
        after = self._adapted(self.phi, batch, self.config.inner_steps)
        self.record({"kl": self.tasks.kl(batch.thetas[-1], after, batch.batches[-1]).item()})
        self._finish(batch, first, torch.cat((batch.gradients, tail[None])))

    def _meta_gradient(self, batch: Adaptation) -> tuple[Tensor, Tensor]:
        """Average the losses' gradients in φ, [P]; the last loss's at each task's adapted parameters too, [M, P]."""
        k = self.config.inner_steps
        found = [self._gradient_after(batch, j) for j in range(1 if self.config.outer_losses == "each" else k, k + 1)]
        return torch.stack([through for through, _ in found]).mean(0), found[-1][1]

    def _gradient_after(self, batch: Adaptation, steps: int) -> tuple[Tensor, Tensor]:
        """Average Jᵀ g, [P], of the loss's gradients g after inner steps, [M, P].

        Tasks are taken a few at a time: each has its own share of both.
        """
        data = batch.batches[steps]

        def of(rows: slice) -> tuple[Tensor, Tensor]:
            return gradients_after(
                lambda phi: self._adapted(phi, batch, steps, rows), self._loss, self.phi, data.tasks(rows)
            )

        through, gradients = zip(*over_shards(of, data.shards), strict=True)
        return torch.stack(through).sum(0) / self.num_tasks, torch.cat(gradients)

    def _loss(self, theta: Tensor, data: TaskData) -> Tensor:
        """Return minus the clipped surrogate of each adapted policy, [M]."""
        ratio = self.tasks.log_ratio(theta, data).exp()
        return -clipped_surrogate(ratio, data.advantages, self.current.clip_range)

    def _adapted(self, phi: Tensor, batch: Adaptation, steps: int, rows: slice = slice(None)) -> Tensor:
        """Return some tasks' parameters after inner steps as a function of φ, [m, P], which moves them along: J = I."""
        return phi + (batch.thetas[steps] - batch.thetas[0])[rows]


class MAML(FOMAML):
    """MAML: policy improvement of the adapted policies, differentiated through the inner steps.

    Arguments: see `Agent` and `MAMLConfig`.

    Source: Finn, Abbeel & Levine 2017, algorithm 3, https://arxiv.org/abs/1703.03400, with the inner surrogates of
    Rothfuss et al. 2019 and Foerster et al. 2018, without which the second derivative is not that of the returns.

    Differs from the papers: how φ changes which rollouts the inner step sees is left out, as it is by Finn et al.
    """

    name: ClassVar[str] = "maml"
    Config = MAMLConfig
    config: MAMLConfig

    def _adapted(self, phi: Tensor, batch: Adaptation, steps: int, rows: slice = slice(None)) -> Tensor:
        """Return some tasks' parameters after inner steps as a function of φ, [m, P], with the exact J."""
        batches = [data.tasks(rows) for data in batch.batches[:steps]]
        return self.tasks.adapted(phi.expand(len(batches[0].s), -1), batches)
