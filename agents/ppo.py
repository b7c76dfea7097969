"""Proximal policy optimization with a clipped surrogate (Schulman et al. 2017)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from agents import noise
from agents.base import Agent
from agents.config import AgentConfig
from agents.devices import sent
from agents.optim.effective_steps import charts, step_lengths
from agents.optim.flat import check_norm
from agents.optim.registry import (
    HANDOVER_STEPS,
    OptimizerConfig,
    OptimizerState,
    make_flat_optimizer,
    plan_handover,
)
from agents.policy.actor_critic import POLICIES, ActorCriticPolicy
from agents.rollout.buffer import MinibatchConfig, Rollout, advantages, explained_variance
from agents.rollout.surrogates import CURVES, ClippedConfig, Losses, approximate_kl, clipped_surrogate, report_losses
from agents.saving import Stateful
from envs.sb3 import SB3View

PARTS = ("policy", "critic")
"""What has a group of its own in AdaBound and AMSBound."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OptimizerConfig, ClippedConfig, MinibatchConfig, AgentConfig):
    """Hyperparameters of PPO, each declared beside what it is for.

    Names and defaults are those of Stable-Baselines3's PPO, but for the optimizer, and for its rollout of 2048 steps of
    one environment, which are 128 of 16 here.
    """

    normalize_returns: bool = True
    """Whether the critic learns value targets of mean 0 and variance 1 (PopArt, van Hasselt et al. 2016)."""


class Minibatch(NamedTuple):
    """m samples, of normalized observations s [m, O], and actions a [m, *A]."""

    s: Tensor
    a: Tensor
    A: Tensor
    """Advantages, [m]; of mean 0 and standard deviation 1 if they are normalized."""
    z: Tensor
    """Normalized value targets, [m]."""
    v: Tensor
    """Normalized values as they were, [m]; targets where values are not clipped."""
    log_old: Tensor
    """log π_old(a|s), [m]."""


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
    dashboard = CURVES | {"step lengths of AdaBound and AMSBound": charts(PARTS)}
    Config = PPOConfig
    config: PPOConfig
    optimizer: Optimizer
    policy: ActorCriticPolicy

    # An iteration ----------------------------------------------------------------------------------------------------

    def train(self, batch: Rollout) -> None:
        """Take minibatch steps on the losses of equation 9, for n_epochs or up to target_kl (algorithm 1)."""
        c, policy = self.current, self.policy
        observations, a = batch["observations"].flatten(0, 1), batch["actions"].flatten(0, 1)
        s = policy.normalize(observations)
        with torch.no_grad():
            A, returns = advantages(batch, policy.critic(s), policy, c.gamma, c.gae_lambda)  # Â, equation 11
            old = copy.deepcopy(policy.actor.shared_std(s))  # whose standard deviation stays
            log_old = old.log_prob(a)
        z = policy.critic.update_scale(returns) if c.normalize_returns else returns
        v = z if c.clip_range_vf is None else policy.critic.normalized(s).detach()
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate
        explained = explained_variance(returns, returns - A)

        history: list[Losses] = []
        norms: list[Tensor] = []
        for minibatch in self._minibatches(Minibatch(s, a, A, z, v, log_old)):
            losses = self._losses(minibatch)
            history.append(Losses(*(value.detach() for value in losses)))
            if c.target_kl is not None and approximate_kl(history[-1].log_ratio) > 1.5 * c.target_kl:
                break
            self.flat.differentiate(losses.loss)
            norms.append(self.flat.clip(c.max_grad_norm))
            self.optimizer.step()

        metrics = report_losses(history, self.minibatches, policy.actor, s, old, c.clip_range)
        metrics |= step_lengths(self.optimizer, PARTS) | {"explained_variance": explained}
        if norms:
            metrics["gradient_norm"] = torch.stack(norms).amax()
        policy.update_normalizer(observations)
        check_norm(self.record(metrics, final=True).get("gradient_norm", 0.0))

    def _minibatches(self, rollout: Minibatch) -> Iterator[Minibatch]:
        """Go n_epochs times through all n samples, in a new order each time."""
        c, n = self.config, len(rollout.A)
        for epoch in range(c.n_epochs):
            rows = noise.permutation(self.stream_seed, "minibatch", self.counter, n, epoch)
            rows = sent(rows, self.device)
            shuffled = Minibatch(*(x[rows] for x in rollout))
            if c.normalize_advantage:  # with n - 1 and 1e-8, as SB3 does
                A = shuffled.A.view(-1, c.batch_size)
                A = (A - A.mean(1, keepdim=True)) / (A.std(1, keepdim=True) + 1e-8)
                shuffled = shuffled._replace(A=A.flatten())
            yield from map(Minibatch, *(x.split(c.batch_size) for x in shuffled))

    def _losses(self, minibatch: Minibatch) -> Losses:
        """Evaluate equation 9, and how far the policy has gone."""
        c, (s, a, A, z, v, log_old) = self.current, minibatch
        pi = self.policy.actor.shared_std(s)
        log_ratio = pi.log_prob(a) - log_old  # log r(θ)

        policy_gradient_loss = -clipped_surrogate(log_ratio.exp(), A, c.clip_range)  # -L^CLIP, equation 7
        values = self.policy.critic.normalized(s)
        if c.clip_range_vf is not None:
            values = v + (values - v).clamp(-c.clip_range_vf, c.clip_range_vf)
        value_loss = mse_loss(values, z)  # L^VF
        entropy_loss = -pi.entropy().mean()  # -S
        loss = policy_gradient_loss + c.vf_coef * value_loss
        if c.ent_coef:
            loss = loss + c.ent_coef * entropy_loss
        return Losses(loss, policy_gradient_loss, value_loss, entropy_loss, log_ratio)

    # Set-up and state ------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        super()._setup_model()
        self.flat, self.optimizer = make_flat_optimizer(self.config, [self.policy.actor, self.policy.critic])

    def _connect(self, env: SB3View) -> None:
        self.minibatches = self.config.minibatches(env.num_envs)
        super()._connect(env)

    def _plan(self) -> None:
        """Tell AdaBound when to hand over: a share of the training is known only once the training's length is."""
        c, steps, updates = self.config, self.steps_per_iteration, self.config.n_epochs * self.minibatches
        handover = max(HANDOVER_STEPS / steps * updates, 2.0) if c.handover is None else c.handover
        plan_handover(self.optimizer, handover, -(-self._total_timesteps // steps) * updates)

    def parts(self) -> dict[str, Stateful]:
        return {"optimizer": OptimizerState(self.config.optimizer, self.optimizer)}
