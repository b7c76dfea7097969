"""Proximal policy optimization with a clipped surrogate (Schulman et al. 2017)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from agents import noise
from agents.base import Agent
from agents.config import AgentConfig, above, at_least, between
from agents.optim.adabound import handover_gamma
from agents.optim.effective_steps import charts, report
from agents.optim.registry import OptimizerName, load_optimizer_tensors, make_flat_optimizer, optimizer_tensors
from agents.policy.actor_critic import POLICIES, ActorCriticPolicy
from agents.policy.distributions import Distribution
from agents.rollout.buffer import Rollout, advantages, explained_variance
from agents.rollout.surrogates import clipped_surrogate
from envs.sb3 import SB3View

PARTS = ("policy", "critic")
"""What has a group of its own in AdaBound and AMSBound."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(AgentConfig):
    """Hyperparameters of PPO; names and defaults are those of Stable-Baselines3's PPO, the optimizer apart."""

    batch_size: Annotated[int, at_least(1)] = 64
    """Samples per minibatch; divides n_steps * num_envs. At least 2 where advantages are normalized."""
    n_epochs: Annotated[int, at_least(1)] = 10
    """Passes over the rollout per iteration."""
    clip_range: Annotated[float, above(0)] = 0.2
    """ε: how far a probability ratio may go from 1 before its sample gives no more gradient."""
    target_kl: Annotated[float, above(0)] | None = None
    """Mean KL(old || new), in nats: a minibatch with an estimate above 1.5 times it ends the iteration's updates; None
    never does."""
    gae_lambda: Annotated[float, between(0, 1)] = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2016)."""
    normalize_advantage: bool = True
    """Whether advantages are shifted to mean 0 and scaled to standard deviation 1 in each minibatch."""
    normalize_returns: bool = True
    """Whether the critic learns value targets of mean 0 and variance 1 (PopArt, van Hasselt et al. 2016)."""
    ent_coef: Annotated[float, at_least(0)] = 0.0
    """c₂: weight of the entropy bonus."""
    vf_coef: Annotated[float, at_least(0)] = 0.5
    """c₁: weight of the value loss."""
    max_grad_norm: Annotated[float, above(0)] = 0.5
    """Longest gradient, over all parameters of policy and critic together."""
    optimizer: OptimizerName = "adabound"
    """What steps policy and critic."""
    learning_rate: Annotated[float, above(0)] = 3e-4
    """The optimizer's step size, constant throughout."""
    eps: Annotated[float, above(0)] = 1e-5
    """Added to the root of the second moment, by every optimizer that divides by it. 1e-5 is what Stable-Baselines3
    gives Adam."""
    final_lr: Annotated[float, above(0)] | None = None
    """AdaBound's and AMSBound's step size in the end, for policy and critic; None measures each one's own at the
    hand-over, because their gradients differ in size: Adam's steps on Hopper-v5 have medians near 12 and 0.3."""
    handover: Annotated[float, above(0)] = 0.5
    """When AdaBound and AMSBound hand over from Adam to SGD: up to 1, a share of the optimizer steps that are planned;
    above 1, a number of them. AdaBound's own gamma = 1e-3, which is 1000, would do so within a few iterations. Where
    Adam's steps differ much between elements, the KL rises at the hand-over: target_kl bounds it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.batch_size == 1 and self.normalize_advantage
        self.require("batch_size", not alone, "an integer of at least 2, or normalize_advantage=False")


class Minibatch(NamedTuple):
    """m samples, of normalized observations s [m, O], and actions a [m, *A]."""

    s: Tensor
    a: Tensor
    A: Tensor
    """Advantages, [m]; of mean 0 and standard deviation 1 if they are normalized."""
    z: Tensor
    """Normalized value targets, [m]."""
    log_old: Tensor
    """log π_old(a|s), [m]."""


class Losses(NamedTuple):
    """What a minibatch says, each of shape () but the last."""

    loss: Tensor
    """All together."""
    policy_gradient_loss: Tensor
    value_loss: Tensor
    entropy_loss: Tensor
    log_ratio: Tensor
    """log π(a|s) - log π_old(a|s), [m]."""


class PPO(Agent):
    """Proximal policy optimization: several epochs of minibatch steps on L = -L^CLIP + c₁ L^VF - c₂ S.

    Arguments: see `Agent` and `PPOConfig`.

    Source: Schulman et al. 2017, algorithm 1 and equation 9, https://arxiv.org/abs/1707.06347.

    Differs from the paper: as in Stable-Baselines3, policy and critic share no layers, advantages are normalized in
    each minibatch, and the gradient's norm is bounded. Differs from both: observations and returns are normalized
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
        "step lengths of AdaBound and AMSBound": charts(PARTS),
    }
    Config = PPOConfig
    config: PPOConfig
    policy: ActorCriticPolicy

    # An iteration ----------------------------------------------------------------------------------------------------

    def train(self, batch: Rollout) -> None:
        """Take minibatch steps on the losses of equation 9, for n_epochs or up to target_kl (algorithm 1)."""
        c, policy = self.config, self.policy
        observations, a = batch["observations"].flatten(0, 1), batch["actions"].flatten(0, 1)
        s = policy.normalize(observations)
        with torch.no_grad():
            A, returns = advantages(batch, policy.critic(s), policy, c.gamma, c.gae_lambda)  # Â, equation 11
            old = copy.deepcopy(policy.actor.shared_std(s))  # whose standard deviation stays
            log_old = old.log_prob(a)
        z = policy.critic.update_scale(returns) if c.normalize_returns else returns
        explained = explained_variance(returns, returns - A)

        history: list[Losses] = []
        for minibatch in self._minibatches(Minibatch(s, a, A, z, log_old)):
            losses = self._losses(minibatch)
            history.append(Losses(*(value.detach() for value in losses)))
            if c.target_kl is not None and approximate_kl(history[-1].log_ratio) > 1.5 * c.target_kl:
                break
            self.flat.differentiate(losses.loss, c.max_grad_norm)
            self.optimizer.step()

        metrics = report(self.optimizer, PARTS) | {"explained_variance": explained.item()}
        self._record_update(metrics, history, s, old)
        policy.update_normalizer(observations)

    def _minibatches(self, rollout: Minibatch) -> Iterator[Minibatch]:
        """Go n_epochs times through all n samples, in a new order each time."""
        c, n = self.config, len(rollout.A)
        for epoch in range(c.n_epochs):
            rows = noise.permutation(self.stream_seed, "minibatch", self.counter, n, epoch).to(self.device)
            shuffled = Minibatch(*(x[rows] for x in rollout))
            if c.normalize_advantage:  # with n - 1 and 1e-8, as SB3 does
                A = shuffled.A.view(-1, c.batch_size)
                A = (A - A.mean(1, keepdim=True)) / (A.std(1, keepdim=True) + 1e-8)
                shuffled = shuffled._replace(A=A.flatten())
            yield from map(Minibatch, *(x.split(c.batch_size) for x in shuffled))

    def _losses(self, minibatch: Minibatch) -> Losses:
        """Evaluate equation 9, and how far the policy has gone."""
        c, (s, a, A, z, log_old) = self.config, minibatch
        pi = self.policy.actor.shared_std(s)
        log_ratio = pi.log_prob(a) - log_old  # log r(θ)

        policy_gradient_loss = -clipped_surrogate(log_ratio.exp(), A, c.clip_range)  # -L^CLIP, equation 7
        value_loss = mse_loss(self.policy.critic.normalized(s), z)  # L^VF
        entropy_loss = -pi.entropy().mean()  # -S
        loss = policy_gradient_loss + c.vf_coef * value_loss
        if c.ent_coef:
            loss = loss + c.ent_coef * entropy_loss
        return Losses(loss, policy_gradient_loss, value_loss, entropy_loss, log_ratio)

    @torch.no_grad()
    def _record_update(self, metrics: dict[str, float], history: list[Losses], s: Tensor, old: Distribution) -> None:
        """Log metrics and, as SB3 does, the last minibatch's loss, the last epoch's KL, and means of all else."""
        c, new = self.config, self.policy.actor.shared_std(s)
        loss, *others, log_ratio = map(torch.stack, zip(*history, strict=True))
        last_epoch = (len(history) - 1) % (len(s) // c.batch_size) + 1
        values = dict(zip(Losses._fields, (loss[-1], *(other.mean() for other in others)), strict=False))
        values["approx_kl"] = approximate_kl(log_ratio[-last_epoch:])
        values["clip_fraction"] = ((log_ratio.exp() - 1).abs() > c.clip_range).float().mean()
        values |= {"kl": old.kl(new).mean(), "entropy": new.entropy().mean()}
        if self.policy.actor.log_std is not None:
            values["std"] = self.policy.actor.log_std.bias.exp().mean()
        metrics |= dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        for name, value in metrics.items():
            self.logger.record(f"train/{name}", value)

    # Set-up and state ------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        super()._setup_model()
        c, modules = self.config, [self.policy.actor, self.policy.critic]
        self.flat, self.optimizer = make_flat_optimizer(
            c.optimizer, modules, lr=c.learning_rate, eps=c.eps, final_lr=c.final_lr
        )

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

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        """Tell AdaBound when to hand over, which is known only once the training's length is."""
        result = super()._setup_learn(*args, **kwargs)
        c, rollout = self.config, self.config.n_steps * self.n_envs
        updates = -(-self._total_timesteps // rollout) * c.n_epochs * (rollout // c.batch_size)
        for group in self.optimizer.param_groups:
            if "gamma" in group:
                group["gamma"] = 1 / c.handover if c.handover > 1 else handover_gamma(c.handover, updates)
        return result

    def own_tensors(self) -> dict[str, Tensor]:
        """Give the optimizer's state, under its name: another optimizer that goes on from here begins anew."""
        return optimizer_tensors(self.config.optimizer, self.optimizer)

    def load_own_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `own_tensors` gave."""
        load_optimizer_tensors(self.config.optimizer, self.optimizer, tensors)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Estimate KL(old || new) in nats from log π(a|s) - log π_old(a|s), [...]; shape ().

    Source: http://joschu.net/blog/kl-approx.html, the estimator that varies less.
    """
    return (log_ratio.exp() - 1 - log_ratio).mean()
