"""Learning to adapt to new tasks in a few policy-gradient steps: Reptile, FOMAML and MAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from agents import checkpoint as saving
from agents.adaptation.inner_loop import (
    InnerOptimizer,
    State,
    adapt,
    check_rule,
    gradients_of,
    inner_products,
    linear_anneal,
)
from agents.adaptation.task_data import (
    INNER_STEPS,
    SURROGATES,
    InnerStep,
    TaskData,
    first_returns,
    task_data,
    task_sampler,
)
from agents.base import Agent
from agents.config import CommonConfig, near
from agents.natural.curvature import conjugate_gradient
from agents.natural.step import step_size
from agents.optim.registry import OPTIMIZERS, make_optimizer
from agents.policy.batched import BatchedActor
from agents.policy.networks import assign_parameters, parameter_vector
from agents.rollout.surrogates import clipped_surrogate
from agents.rollout.threads import over_shards, single_thread
from envs.sb3 import SB3View
from envs.vector import EpisodeStatistics, TaskVectorEnv

OUTER_LOSSES = ("last", "each")
OUTER_STEPS = ("clipped", "trust_region")
BACKTRACKS = 10
"""Halvings of a trust-region step before it is given up."""
KL_SAMPLES = 20_000
"""Steps of a rollout that the recorded divergences are the mean of."""


@dataclass(frozen=True, kw_only=True)
class MetaConfig(CommonConfig):
    """Hyperparameters that Reptile, FOMAML and MAML share."""

    num_envs: int = 400
    """Environments stepped together: rollouts per task times meta_batch_size."""
    n_steps: int = 200
    """Environment steps per rollout; of a task family, its horizon."""
    log_std_init: float = 0.0
    """Initial log standard deviation of Gaussian actions."""
    meta_batch_size: int = 20
    """Tasks per iteration, with num_envs / meta_batch_size rollouts each. 1 is serial Reptile. An ordinary environment
    is a single task, whatever this says."""
    inner_steps: int = 1
    """k: inner steps in each task, each from rollouts of its own."""
    inner_step: str = "policy_gradient"
    """policy_gradient, or natural_gradient of length inner_target_kl."""
    inner_lr: float = 0.1
    """α: step size of a policy-gradient inner step."""
    inner_lr_later: float = 1.0
    """Factor on inner_lr after a task's first step; `evaluate.py --adapt` halves it, as Finn et al. 2017 do."""
    inner_optimizer: str = "sgd"
    """sgd or adam: what takes the policy-gradient inner steps."""
    inner_state: str = "reset"
    """What becomes of inner Adam's moments between tasks: reset, or persist (the mean of the last tasks')."""
    inner_target_kl: float = 0.01
    """Length of a natural-gradient inner step, in nats."""
    log_std_min: float | None = None
    """Floor of φ's log standard deviation of Gaussian actions, or None."""
    gae_lambda: float = 1.0
    """Lambda of generalized advantage estimation around each task's own linear baseline."""
    normalize_advantage: bool = True
    """Whether advantages are shifted to mean 0 and scaled to standard deviation 1 in each task's rollouts."""
    outer_optimizer: str = "adam"
    """adabound, adam, adamw, amsbound, rmsprop or sgd."""
    learning_rate: float = 1e-3
    """The outer optimizer's step size."""
    anneal: bool = False
    """Whether learning_rate falls linearly to 0 over the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("meta_batch_size", self.meta_batch_size >= 1, "an integer of at least 1")
        check_rule("reptile", InnerOptimizer(), self.inner_steps)
        for name, allowed in self.allowed().items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"There is no {name} {getattr(self, name)!r}{near(getattr(self, name), [*allowed])}")
        self.require("inner_lr", self.inner_lr > 0, "a number above 0")
        self.require("inner_lr_later", self.inner_lr_later > 0, "a number above 0")
        self.require("inner_target_kl", self.inner_target_kl > 0, "a number above 0")
        self.require("gae_lambda", 0 <= self.gae_lambda <= 1, "a number from 0 to 1")
        self.require("learning_rate", self.learning_rate > 0, "a number above 0")

    @classmethod
    def allowed(cls) -> dict[str, tuple[str, ...]]:
        """Field -> its possible names."""
        return {
            "inner_step": INNER_STEPS,
            "inner_optimizer": ("sgd", "adam"),
            "inner_state": ("reset", "persist"),
            "outer_optimizer": tuple(OPTIMIZERS),
        }

    @property
    def inner(self) -> InnerOptimizer:
        return InnerOptimizer(
            self.inner_optimizer,  # type: ignore[arg-type]
            self.inner_lr,
            later=self.inner_lr_later,
            state=self.inner_state,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class ReptileConfig(MetaConfig):
    """Hyperparameters of Reptile."""

    inner_steps: int = 2
    """k: inner steps in each task, each from rollouts of its own; with k = 1 Reptile is joint training."""
    outer_optimizer: str = "sgd"
    """adabound, adam, adamw, amsbound, rmsprop or sgd; its gradient is phi - phi~."""
    learning_rate: float = 0.5
    """The outer optimizer's step size; with sgd, Reptile's ε."""


@dataclass(frozen=True, kw_only=True)
class PostConfig(MetaConfig):
    """Hyperparameters of the rules that take rollouts after adaptation."""

    outer_losses: str = "last"
    """last: the adapted policies' loss after the last inner step. each: the mean of those after each inner step, whose
    rollouts are there anyway (Antoniou et al. 2019, section 4, the multi-step loss)."""
    outer_step: str = "clipped"
    """clipped: n_epochs steps of the outer optimizer on the clipped surrogate. trust_region: one step of length
    target_kl along the natural gradient."""
    n_epochs: int = 5
    """Steps on the clipped surrogate per iteration, each on all rollouts."""
    clip_range: float = 0.3
    """ε: how far a probability ratio may go from 1 before its sample gives no more gradient."""
    target_kl: float = 0.01
    """Trust region: mean KL of the adapted policies, old || new, in nats."""
    cg_max_steps: int = 10
    """Trust region: most conjugate-gradient iterations."""
    cg_damping: float = 1e-3
    """Trust region: damping of the Fisher matrix, in units of the gradient's own Rayleigh quotient."""
    curvature_samples: int = 20_000
    """Trust region: most samples, evenly spaced, that the Fisher matrix is estimated from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("n_epochs", self.n_epochs >= 1, "an integer of at least 1")
        self.require("clip_range", self.clip_range > 0, "a number above 0")
        self.require("target_kl", self.target_kl > 0, "a number above 0")
        self.require("cg_max_steps", self.cg_max_steps >= 1, "an integer of at least 1")
        self.require("cg_damping", self.cg_damping >= 0, "a number of at least 0")
        self.require("curvature_samples", self.curvature_samples >= 1, "an integer of at least 1")
        if self.outer_losses == "each" and self.outer_step == "trust_region":
            raise ValueError("outer_losses is 'each', which the trust region does not take; give outer_step='clipped'.")

    @classmethod
    def allowed(cls) -> dict[str, tuple[str, ...]]:
        return {**super().allowed(), "outer_losses": OUTER_LOSSES, "outer_step": OUTER_STEPS}


@dataclass(frozen=True, kw_only=True)
class MAMLConfig(PostConfig):
    """Hyperparameters of MAML."""

    inner_surrogate: str = "lvc"
    """What the inner step differentiates, and MAML through it: dice has unbiased second derivatives; lvc leaves out the
    products between steps of an episode, which varies less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule("maml", self.inner, self.inner_steps)
        if self.inner_step != "policy_gradient":
            raise ValueError(
                f"inner_step is {self.inner_step!r}; maml differentiates through the inner step, and a natural-gradient"
                " step is no differentiable function here: use 'policy_gradient', or fomaml."
            )

    @classmethod
    def allowed(cls) -> dict[str, tuple[str, ...]]:
        return {**super().allowed(), "inner_surrogate": SURROGATES}


class MetaAgent(Agent):
    """What Reptile, FOMAML and MAML share: the tasks of an iteration and the inner loop.

    An iteration takes meta_batch_size new tasks of the family, all stepped in one batch. Each task's policy begins at φ
    and takes an inner step from each of its rollouts; all policies act in one forward pass. On an environment that is
    no task family there is one task.

    The policy that is saved, evaluated and acts is φ, before adaptation. Policies have no critic: advantages are taken
    around a linear baseline in each task.
    """

    rollouts_after: ClassVar[int]
    """Rollouts after the last inner step."""
    config: MetaConfig

    def _setup_model(self) -> None:
        super()._setup_model()
        c = self.config
        self.actor = BatchedActor(self.policy.actor)
        self.inner = InnerStep(self.actor, c.inner, c.inner_step, self._surrogate, c.inner_target_kl)
        self.inner_state: State = {}
        self.phi = parameter_vector(self.policy.actor)
        self.optimizer = make_optimizer(c.outer_optimizer, [self.phi], lr=c.learning_rate)

    @property
    def _surrogate(self) -> str:
        return "lvc"

    def _connect(self, env: SB3View) -> None:
        c, vector = self.config, env.vector
        self.num_tasks = c.meta_batch_size if isinstance(vector, TaskVectorEnv) else 1
        if env.num_envs % self.num_tasks:
            raise ValueError(
                f"num_envs is {env.num_envs}, which meta_batch_size = {self.num_tasks} does not divide; give each task "
                f"as many rollouts, such as num_envs {-(-env.num_envs // self.num_tasks) * self.num_tasks}."
            )
        if isinstance(vector, TaskVectorEnv) and vector.max_episode_steps != c.n_steps:
            raise ValueError(
                f"n_steps is {c.n_steps}, but the horizon of {vector.made_from.get('env_id', 'the family')} is "
                f"{vector.max_episode_steps}; a rollout is a whole horizon, give both alike."
            )
        super()._connect(env)

    def _collect(self, listener: BaseCallback, listens: bool, total_timesteps: int) -> bool:
        """The inner loop: rollouts of φ in new tasks, a step of each task's policy, and rollouts of these."""
        c = self.config
        self._begin_tasks()
        # What was set from outside counts: the policy's parameters are φ.
        self.phi.copy_(parameter_vector(self.policy.actor))
        theta = self.phi.expand(self.num_tasks, -1)
        state = c.inner.begin(theta, self.inner_state)
        self.data: list[TaskData] = []
        self.thetas: list[Tensor] = []
        self.returns: list[Tensor] = []
        gradients, divergences, rollouts = [], [], c.inner_steps + self.rollouts_after
        listener.on_rollout_start()
        for j in range(rollouts):
            if j > 0:
                self._reset_environments()
            sample = task_sampler(self._acting, self.actor, theta.to(self.buffer.device))
            if not self._fill(sample, self.iteration * rollouts + j, listener, listens, total_timesteps):
                return False
            buffer = self.buffer.to(self.device)
            self.returns.append(first_returns(buffer))
            data = task_data(
                self.policy, self.actor, theta, buffer, c.gamma, c.gae_lambda, normalize=c.normalize_advantage
            )
            self.data.append(data)
            if j < c.inner_steps:
                before = theta
                theta, g, state = self.inner(theta, data, state, first=j == 0)
                self.thetas.append(theta)
                gradients.append(g)
                divergences.append(self._kl(before, theta, data))
        listener.on_rollout_end()
        self.adapted, self.inner_state = theta, state
        self.gradients, self.inner_kl = torch.stack(gradients), torch.stack(divergences).mean()
        return True

    def _begin_tasks(self) -> None:
        """Give the environments this iteration's tasks, if they are of a family."""
        assert self.env is not None
        vector = self.env.vector
        if isinstance(vector, TaskVectorEnv):
            M = self.num_tasks
            tasks = vector.draw_tasks(self.iteration * M + np.arange(M), "train")
            vector.set_tasks(np.repeat(tasks, vector.num_envs // M, axis=0))
            self._reset_environments()

    def _reset_environments(self) -> None:
        """Start all episodes anew, where rollouts are whole horizons; an ordinary environment goes on."""
        assert self.env is not None
        vector = self.env.vector
        if isinstance(vector, TaskVectorEnv):
            self.observations = vector.reset()[0]
            self.running_episodes = EpisodeStatistics(vector.num_envs, vector.device)

    @torch.no_grad()
    def _kl(self, before: Tensor, after: Tensor, data: TaskData) -> Tensor:
        """The mean KL(before || after) of the tasks' policies, in nats, over evenly spaced steps."""
        s = data.thinned(KL_SAMPLES).s
        return self.actor.distribution(before, s).kl(self.actor.distribution(after, s)).mean()

    def _step(self, gradient: Tensor) -> None:
        """One step of the outer optimizer."""
        if not gradient.isfinite().all():
            raise FloatingPointError(
                "the meta-gradient is not finite; this iteration changed nothing. Give a smaller inner_lr or "
                "learning_rate."
            )
        if self.config.anneal:
            for group in self.optimizer.param_groups:
                done = 1 - self._current_progress_remaining
                group["lr"] = linear_anneal(self.config.learning_rate, done)
        self.phi.grad = gradient
        self.optimizer.step()

    def _finish(self, gradient: Tensor, gradients: Tensor) -> None:
        """Take φ into the policy and record the iteration."""
        record, actor = self.logger.record, self.policy.actor
        if self.actor.log_std is not None and self.config.log_std_min is not None:
            self.phi[self.actor.log_std].clamp_(min=self.config.log_std_min)
        assign_parameters(actor, self.phi)
        for j, returns in enumerate(self.returns):
            record(f"adapt/return_{j}", returns.mean().item())
        record("adapt/inner_kl", self.inner_kl.item())
        record("adapt/gradient_inner_product", inner_products(gradients).mean().item())
        record("train/meta_gradient_norm", gradient.norm().item())
        if actor.log_std is not None:
            record("train/std", actor.log_std.bias.exp().mean().item())
        # Of the last rollout: all rollouts of an iteration have to be normalized alike.
        self.policy.update_normalizer(self.buffer.to(self.device).flat("observations"))

    def own_tensors(self) -> dict[str, Tensor]:
        """The optimizers' states; another outer optimizer that goes on from here begins anew."""
        outer = self.optimizer.state_dict()["state"].get(0, {})
        tensors = {f"{self.config.outer_optimizer}.{key}": torch.as_tensor(value) for key, value in outer.items()}
        return tensors | {f"inner.{key}": value for key, value in self.inner_state.items()}

    def load_own_tensors(self, tensors: dict[str, Tensor]) -> None:
        state = self.optimizer.state_dict()
        outer = saving.with_prefix(tensors, f"{self.config.outer_optimizer}.")
        self.optimizer.load_state_dict({**state, "state": {0: outer} if outer else {}})
        self.inner_state = {k: v.to(self.device) for k, v in saving.with_prefix(tensors, "inner.").items()}


class Reptile(MetaAgent):
    """Reptile: φ ← φ + ε (mean of φ~ - φ), where φ~ is a task's policy after k inner steps.

    Arguments: see `Agent` and `ReptileConfig`.

    Source: Nichol, Achiam & Schulman 2018, algorithms 1 and 2, https://arxiv.org/abs/1803.02999. The authors report
    that it did not beat joint training in reinforcement learning.
    """

    name: ClassVar[str] = "reptile"
    Config = ReptileConfig
    config: ReptileConfig
    rollouts_after = 0

    @single_thread()
    def train(self) -> None:
        difference = self.phi - self.adapted.mean(0)
        self._step(difference)
        self._finish(difference, self.gradients)


class FOMAML(MetaAgent):
    """First-order MAML: policy improvement of the adapted policies, applied to φ as if U^k had the Jacobian I.

    Arguments: see `Agent` and `PostConfig`.

    Source: Finn, Abbeel & Levine 2017, section 5.2, https://arxiv.org/abs/1703.03400.

    Differs from the paper: the outer step is a clipped surrogate's unless it is asked to be a trust region's.
    """

    name: ClassVar[str] = "fomaml"
    Config = PostConfig
    config: PostConfig
    rollouts_after = 1

    @single_thread()
    def train(self) -> None:
        c, data = self.config, self.data[-1]
        self.displacements = [theta - self.phi for theta in self.thetas]
        first, tail = self._meta_gradient()
        if c.outer_step == "clipped":
            self._step(first)
            for _ in range(c.n_epochs - 1):
                self._step(self._meta_gradient()[0])
        else:
            self._trust_region(data, first)
        with torch.no_grad():
            self.logger.record("train/kl", self._post_kl(self.phi, data.thinned(KL_SAMPLES)).item())
        self._finish(first, torch.cat((self.gradients, tail[None])))

    def _post(self, phi: Tensor, steps: int, rows: slice = slice(None)) -> Tensor:
        """Some tasks' parameters after inner steps, [m, P], as a function of φ, differentiated as the rule says."""
        return phi + self.displacements[steps - 1][rows]

    def _loss(self, theta: Tensor, data: TaskData) -> Tensor:
        """Minus the surrogate of each adapted policy, [M]."""
        ratio = self.inner.log_ratio(theta, data).exp()
        if self.config.outer_step == "trust_region":
            return -(ratio * data.advantages).mean(1)
        return -clipped_surrogate(ratio, data.advantages, self.config.clip_range)

    def _meta_gradient(self) -> tuple[Tensor, Tensor]:
        """The mean of the losses' gradients in φ, [P]; the last loss's at each task's adapted parameters, [M, P]."""
        k = self.config.inner_steps
        found = [self._gradient_after(j) for j in range(1 if self.config.outer_losses == "each" else k, k + 1)]
        return torch.stack([through for through, _ in found]).mean(0), found[-1][1]

    def _gradient_after(self, steps: int) -> tuple[Tensor, Tensor]:
        """J's product with each task's gradient after inner steps, averaged, [P]; and these gradients, [M, P].

        J is the Jacobian of `_post`. Tasks are taken a few at a time: each has its own share of both.
        """
        data = self.data[steps]

        def of(rows: slice) -> tuple[Tensor, Tensor]:
            theta, pullback = torch.func.vjp(lambda phi: self._post(phi, steps, rows), self.phi)  # type: ignore[misc]
            g = gradients_of(self._loss, theta, data.tasks(rows))
            return pullback(g)[0], g

        through, gradients = zip(*over_shards(of, data.shards), strict=True)
        return torch.stack(through).sum(0) / self.num_tasks, torch.cat(gradients)

    def _post_kl(self, phi: Tensor, data: TaskData) -> Tensor:
        """The mean KL(old || new) of the adapted policies, in nats."""
        with torch.no_grad():
            old = self.actor.distribution(self.adapted, data.s)
        return old.kl(self.actor.distribution(self._post(phi, self.config.inner_steps), data.s)).mean()

    def _trust_region(self, data: TaskData, g: Tensor) -> None:
        """One step of at most target_kl along (F + λ I)⁻¹ g, halved until the surrogate improves.

        Source: Schulman et al. 2015, appendix C, https://arxiv.org/abs/1502.05477.
        """
        c, phi = self.config, self.phi.clone()
        few = data.thinned(c.curvature_samples)

        def fisher(v: Tensor) -> Tensor:
            kl = lambda x: self._post_kl(x, few)  # noqa: E731
            product: Tensor = torch.func.grad(lambda x: torch.func.grad(kl)(x) @ v)(phi)
            return product

        if not g.norm() > 0:
            return
        shift = c.cg_damping * (g @ fisher(g)) / (g @ g)
        solution = conjugate_gradient(lambda v: fisher(v) + shift * v, g, max_iterations=c.cg_max_steps, tolerance=1e-5)
        quadratic = float(solution.direction @ fisher(solution.direction))
        if not 0 < quadratic < float("inf"):
            return
        step = step_size(quadratic, c.target_kl) * solution.direction
        with torch.no_grad():
            objective = lambda x: self._loss(self._post(x, c.inner_steps), data).mean()  # noqa: E731
            before = objective(phi)
            for _ in range(BACKTRACKS):
                new = phi - step
                if objective(new) < before and self._post_kl(new, data) <= 1.5 * c.target_kl:
                    self.phi.copy_(new)
                    return
                step = step / 2


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

    @property
    def _surrogate(self) -> str:
        return self.config.inner_surrogate

    def _post(self, phi: Tensor, steps: int, rows: slice = slice(None)) -> Tensor:
        batches = [data.tasks(rows) for data in self.data[:steps]]
        return adapt(self.inner.loss, phi.expand(len(batches[0].s), -1), batches, self.config.inner).theta
