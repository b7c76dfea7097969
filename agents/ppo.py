"""Proximal policy optimization with a clipped surrogate (Schulman et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from agents import noise
from agents.base import Agent
from agents.config import AgentConfig, near
from agents.optim.adabound import AUTO, AdaBound, handover_gamma
from agents.optim.effective_steps import effective_steps
from agents.optim.flat import FlatParameters
from agents.optim.registry import FUSED, OPTIMIZERS, load_optimizer_tensors, make_optimizer, optimizer_tensors
from agents.policy.actor_critic import POLICIES, ActorCriticPolicy
from agents.policy.distributions import Distribution
from agents.policy.networks import explained_variance
from agents.rollout.buffer import Rollout, advantages
from agents.rollout.surrogates import clipped_surrogate
from envs.sb3 import SB3View

QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
"""Of the effective steps that are logged."""

PARTS = ("policy", "critic")
"""What has a group of its own in AdaBound and AMSBound."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(AgentConfig):
    """Hyperparameters of PPO; names and defaults are those of Stable-Baselines3's PPO, the optimizer apart."""

    batch_size: int = 64
    """Samples per minibatch; divides n_steps * num_envs."""
    n_epochs: int = 10
    """Passes over the rollout per iteration."""
    clip_range: float = 0.2
    """ε: how far a probability ratio may go from 1 before its sample gives no more gradient."""
    target_kl: float | None = None
    """Mean KL(old || new), in nats: a minibatch with an estimate above 1.5 times it ends the iteration's updates; None
    never does."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2016)."""
    normalize_advantage: bool = True
    """Whether advantages are shifted to mean 0 and scaled to standard deviation 1 in each minibatch."""
    normalize_returns: bool = True
    """Whether the critic learns value targets of mean 0 and variance 1 (PopArt, van Hasselt et al. 2016)."""
    ent_coef: float = 0.0
    """c₂: weight of the entropy bonus."""
    vf_coef: float = 0.5
    """c₁: weight of the value loss."""
    max_grad_norm: float = 0.5
    """Longest gradient, over all parameters of policy and critic together."""
    optimizer: str = "adabound"
    """adabound, adam, adamw, amsbound, clipup, rmsprop or sgd."""
    learning_rate: float = 3e-4
    """The optimizer's step size, constant throughout."""
    eps: float = 1e-5
    """Added to the root of the second moment, by every optimizer that divides by it. 1e-5 is what Stable-Baselines3
    gives Adam."""
    final_lr: float | None = None
    """AdaBound's and AMSBound's step size in the end, for policy and critic; None measures each one's own at the
    hand-over, because their gradients differ in size: Adam's steps on Hopper-v5 have medians near 12 and 0.3."""
    handover: float = 0.5
    """When AdaBound and AMSBound hand over from Adam to SGD: up to 1, a share of the optimizer steps that are planned;
    above 1, a number of them. AdaBound's own gamma = 1e-3, which is 1000, would do so within a few iterations. Where
    Adam's steps differ much between elements, the KL rises at the hand-over: target_kl bounds it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 2 if self.normalize_advantage else 1
        self.require("batch_size", self.batch_size >= least, f"an integer of at least {least}")
        self.require("n_epochs", self.n_epochs >= 1, "an integer of at least 1")
        self.require("clip_range", self.clip_range > 0, "a number above 0")
        self.require("target_kl", self.target_kl is None or self.target_kl > 0, "a number above 0, or None")
        self.require("gae_lambda", 0 <= self.gae_lambda <= 1, "a number from 0 to 1")
        self.require("ent_coef", self.ent_coef >= 0, "a number of at least 0")
        self.require("vf_coef", self.vf_coef >= 0, "a number of at least 0")
        self.require("max_grad_norm", self.max_grad_norm > 0, "a number above 0")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"There is no optimizer {self.optimizer!r}{near(self.optimizer, list(OPTIMIZERS))}")
        self.require("learning_rate", self.learning_rate > 0, "a number above 0")
        self.require("eps", self.eps > 0, "a number above 0")
        self.require("final_lr", self.final_lr is None or self.final_lr > 0, "a number above 0, or None")
        self.require("handover", self.handover > 0, "a share of the steps up to 1, or a number of steps above 1")


class Minibatch(NamedTuple):
    """m samples."""

    s: Tensor
    """Normalised observations, [m, O]."""
    a: Tensor
    """Actions, [m, *A]."""
    A: Tensor
    """Advantages, [m]; of mean 0 and standard deviation 1 if they are normalised."""
    z: Tensor
    """Normalised value targets, [m]."""
    log_old: Tensor
    """log π_old(a|s), [m]."""


class Losses(NamedTuple):
    """What a minibatch of m samples says."""

    loss: Tensor
    """All together, of shape ()."""
    policy_gradient_loss: Tensor
    value_loss: Tensor
    entropy_loss: Tensor
    log_ratio: Tensor
    """log π(a|s) - log π_old(a|s), [m]."""


class PPO(Agent):
    """Proximal policy optimization: several epochs of minibatch steps on L = -L^CLIP + c₁ L^VF - c₂ S.

    Arguments: see `Agent` and `PPOConfig`.

    Source: Schulman et al. 2017, algorithm 1 and equation 9, https://arxiv.org/abs/1707.06347.

    Differs from the paper: as in Stable-Baselines3, policy and critic share no layers, advantages are normalised in
    each minibatch, and the gradient's norm is bounded. Differs from both: observations and returns are normalised
    inside the policy, and the optimizer is AdaBound. With normalize_observations=False, normalize_returns=False and
    optimizer="adam" an update is Stable-Baselines3's.

    Raises:
        ValueError: batch_size does not divide n_steps * num_envs.
    """

    name: ClassVar[str] = "ppo"
    policy_aliases = POLICIES
    dashboard: ClassVar[dict[str, dict[str, list[str]]]] = {
        "does it learn": {
            "return": ["rollout/ep_rew_mean", "eval/mean_reward"],
            "standard deviation": ["train/std"],
            "critic: explained variance": ["train/explained_variance"],
        },
        "how far an update goes": {
            "KL, nats: true, estimated": ["train/kl", "train/approx_kl"],
            "share of samples beyond clip_range": ["train/clip_fraction"],
        },
        "step lengths of AdaBound and AMSBound": {
            f"{part}: {chart}": [f"train/{curve}" for curve in curves]
            for part in PARTS
            for chart, curves in {
                "before the bounds": [f"adam_step_{part}_{key}" for key in QUANTILES],
                "after the bounds": [f"effective_step_{part}_{key}" for key in QUANTILES],
                "bounds": [f"effective_step_{part}_{key}" for key in ("lower", "upper")],
                "share that the bounds raise and cut": [f"effective_step_{part}_{key}" for key in ("raised", "cut")],
            }.items()
        },
    }
    Config = PPOConfig
    config: PPOConfig
    policy: ActorCriticPolicy

    def _setup_model(self) -> None:
        super()._setup_model()
        c, actor, critic = self.config, self.policy.actor, self.policy.critic
        settings: dict[str, Any] = {} if c.optimizer in ("sgd", "clipup") else {"eps": c.eps}
        if issubclass(OPTIMIZERS[c.optimizer], AdaBound):
            # Gradients are looked at before they are clipped.
            settings |= {"final_lr": AUTO if c.final_lr is None else c.final_lr, "nonfinite": "ignore"}
        modules: list[nn.Module] = [actor, critic]
        if c.optimizer in FUSED:
            settings["fused"] = True
            modules = [nn.ModuleList(modules)]  # what such an optimizer does to one has nothing to do with the other
        self.flat = FlatParameters(modules)
        groups = [{"params": [group]} for group in self.flat.groups]
        self.optimizer = make_optimizer(c.optimizer, groups, lr=c.learning_rate, **settings)

    def _connect(self, env: SB3View) -> None:
        c, n = self.config, self.config.n_steps * env.num_envs
        if n % c.batch_size:
            divisors = (size for size in range(2, n + 1) if n % size == 0)
            nearest = min(divisors, key=lambda size: abs(size - c.batch_size), default=n)
            raise ValueError(
                f"batch_size is {c.batch_size}, which does not divide n_steps * num_envs = {c.n_steps} * "
                f"{env.num_envs} = {n}; give a divisor, such as {nearest}."
            )
        super()._connect(env)

    def train(self, batch: Rollout) -> None:
        c, policy = self.config, self.policy
        s, a = policy.normalize(batch.flat("observations")), batch.flat("actions")
        A, returns = advantages(batch, s, policy, c.gamma, c.gae_lambda)
        with torch.no_grad():
            old = policy.actor(s)
            log_old = old.log_prob(a)
        if c.normalize_returns:
            policy.critic.update_scale(returns)
        z = policy.critic.scale.normalize(returns)
        self._plan_handover()

        history: list[Losses] = []
        for minibatch in self._minibatches(s, a, A, z, log_old):
            losses = self._losses(minibatch)
            history.append(Losses(*(value.detach() for value in losses)))
            if c.target_kl is not None and approximate_kl(losses.log_ratio.detach()) > 1.5 * c.target_kl:
                break
            self._step(losses.loss)

        self._record_update(history, s, old, explained_variance(returns, returns - A))
        policy.update_normalizer(batch.flat("observations"))

    def _minibatches(self, *samples: Tensor) -> Iterator[Minibatch]:
        """n_epochs times all samples, [n, ...] in the order of Minibatch's fields, in a new order each time."""
        c, n = self.config, len(samples[0])
        for epoch in range(c.n_epochs):
            rows = noise.permutation(self.stream_seed, "minibatch", self.counter, n, epoch).to(self.device)
            shuffled = Minibatch(*(x[rows] for x in samples))
            if c.normalize_advantage:
                A = shuffled.A.view(-1, c.batch_size)
                A = (A - A.mean(1, keepdim=True)) / (A.std(1, keepdim=True) + 1e-8)
                shuffled = shuffled._replace(A=A.flatten())
            yield from map(Minibatch, *(x.split(c.batch_size) for x in shuffled))

    def _losses(self, minibatch: Minibatch) -> Losses:
        """Equation 9, and what tells how far the policy has gone."""
        c, (s, a, A, z, log_old) = self.config, minibatch
        pi = self.policy.actor.shared_std(s)
        log_ratio = pi.log_prob(a) - log_old

        policy_gradient_loss = -clipped_surrogate(log_ratio.exp(), A, c.clip_range)
        value_loss = mse_loss(self.policy.critic.normalized(s), z)
        entropy_loss = -pi.entropy().mean()
        loss = policy_gradient_loss + c.vf_coef * value_loss
        if c.ent_coef:
            loss = loss + c.ent_coef * entropy_loss
        return Losses(loss, policy_gradient_loss, value_loss, entropy_loss, log_ratio)

    def _step(self, loss: Tensor) -> None:
        self.flat.differentiate(loss)
        norm = self.flat.grad.norm()
        if not norm.isfinite():
            raise FloatingPointError(
                f"the gradient's norm is {norm.item()}; this minibatch changed nothing. Look for huge rewards or "
                "observations, or give a smaller learning_rate."
            )
        self.flat.grad.mul_((self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()

    def _plan_handover(self) -> None:
        """Tell AdaBound when to hand over, which is known only once the training's length is."""
        c, rollout = self.config, len(self.collector.rollout.flat("rewards"))
        updates = -(-self._total_timesteps // rollout) * c.n_epochs * (rollout // c.batch_size)
        gamma = 1 / c.handover if c.handover > 1 else handover_gamma(c.handover, updates)
        if isinstance(self.optimizer, AdaBound):
            for group in self.optimizer.param_groups:
                group["gamma"] = gamma

    def _record_update(self, history: list[Losses], s: Tensor, old: Distribution, explained: Tensor) -> None:
        record, actor, c = self.logger.record, self.policy.actor, self.config
        last_epoch = (len(history) - 1) % (len(s) // c.batch_size) + 1
        losses = Losses(*(torch.stack(values) for values in zip(*history, strict=True)))
        # As in SB3: the loss of the last minibatch, the KL of the last epoch, means of all else.
        shown = {
            "loss": losses.loss[-1],
            "policy_gradient_loss": losses.policy_gradient_loss.mean(),
            "value_loss": losses.value_loss.mean(),
            "entropy_loss": losses.entropy_loss.mean(),
            "approx_kl": approximate_kl(losses.log_ratio[-last_epoch:]),
            "clip_fraction": ((losses.log_ratio.exp() - 1).abs() > c.clip_range).float().mean(),
        }
        for name, value in zip(shown, torch.stack(list(shown.values())).tolist(), strict=True):
            record(f"train/{name}", value)
        with torch.no_grad():
            new = actor(s)
            record("train/kl", old.kl(new).mean().item())
            record("train/entropy", new.entropy().mean().item())
        if actor.log_std is not None:
            record("train/std", actor.log_std.bias.exp().mean().item())
        record("train/explained_variance", explained.item())
        self._record_effective_steps()

    def _record_effective_steps(self) -> None:
        """The element-wise step lengths before and after the bounds, these, and the shares that they raise and cut."""
        if not isinstance(self.optimizer, AdaBound):
            return
        for part, steps in zip(PARTS, effective_steps(self.optimizer, list(QUANTILES.values())), strict=True):
            if steps is None:
                continue
            values = {f"adam_step_{part}_{key}": x for key, x in zip(QUANTILES, steps.unbounded, strict=True)}
            values |= {f"effective_step_{part}_{key}": x for key, x in zip(QUANTILES, steps.bounded, strict=True)}
            values |= {f"effective_step_{part}_{key}": getattr(steps, key) for key in ("raised", "cut")}
            if math.isfinite(steps.upper):
                values |= {f"effective_step_{part}_{key}": getattr(steps, key) for key in ("lower", "upper")}
            for name, value in values.items():
                self.logger.record(f"train/{name}", float(value))

    def own_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, under its name: another optimizer that goes on from here begins anew."""
        return optimizer_tensors(self.config.optimizer, self.optimizer)

    def load_own_tensors(self, tensors: dict[str, Tensor]) -> None:
        load_optimizer_tensors(self.config.optimizer, self.optimizer, tensors)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """An estimate of KL(old || new) in nats from log π(a|s) - log π_old(a|s), [...]; shape ().

    Source: http://joschu.net/blog/kl-approx.html, the estimator that varies less.
    """
    return (log_ratio.exp() - 1 - log_ratio).mean()
