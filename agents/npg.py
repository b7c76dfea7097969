"""Natural policy gradient with compatible-feature Fisher estimation (Kakade 2002), and with a line search TRPO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from agents import noise
from agents.base import Agent
from agents.config import at_least, between
from agents.devices import Recorded, memory, sent
from agents.natural import check_size, is_steady, make_natural
from agents.natural.critic_fits import CriticFitConfig
from agents.natural.scores import scores
from agents.natural.step import (
    CURVES,
    DETAILS_EVERY,
    Line,
    Rejections,
    StepConfig,
    ceiling,
    line_search,
    match_kl,
    report_step,
    step_size,
)
from agents.policy.actor_critic import POLICIES, ActorCriticPolicy
from agents.rollout.buffer import (
    AdvantageConfig,
    Rollout,
    advantages,
    explained_variance,
    importance_weights,
    standardize,
)
from agents.rollout.reuse import RecentRollouts, ReuseConfig, side_by_side
from agents.saving import Stateful
from envs.sb3 import SB3View

AT_ONCE = "cpu"
"""The type of device where eigenvectors are those of an update's own factors. For another the host finds those of the
update before, while the device is at work on the next rollout."""

CERTAIN = 1e-6
"""Entropy in nats below which discrete actions are as good as certain: there is no step that changes what is done."""


@dataclass(frozen=True, kw_only=True)
class NPGConfig(StepConfig, CriticFitConfig, ReuseConfig, AdvantageConfig):
    """Hyperparameters of NPG, each declared beside what it is for. The defaults are updates from 2048 samples, of which
    at first a fourth is new and later all, and were chosen together (docs/results/natural.md)."""

    n_steps: Annotated[int, at_least(1)] = 32
    """Environment steps per environment of a rollout, of which an iteration makes one, and more as reuse fades."""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """Discount per environment step, at first; see gamma_end."""
    gamma_end: Annotated[float, between(0, 1)] | None = 0.995
    """Discount at the end of training, to which gamma rises in equal steps: what is near is learned first, what looks
    far ahead last. None, or less than gamma, keeps gamma throughout."""
    cg_damping: Annotated[float, at_least(0)] = 0.03
    """Damping of the Fisher matrix, in units of its mean eigenvalue tr(F) / p, once reuse has faded."""
    curvature_memory: Annotated[float, at_least(0)] | None = None
    """Samples over which kfac and ekfac average their factors from update to update: one that is so many samples old
    weighs 1/e; 0 takes this update's alone. None: 25,600 while rollouts are reused, and 0 where none are."""
    critic: Literal["gauss_newton", "ridge", "adam", "adabound"] = "adam"
    """How the critic is fitted: gauss_newton, ridge (closed form; needs a value_network linear in features), adam or
    adabound."""
    critic_epochs: Annotated[int, at_least(1)] = 5
    """Passes of adam and adabound over the samples per iteration."""
    log_std_init: float = -1.0
    """Initial log standard deviation of Gaussian actions, in units of their bounds' half width."""


class NPG(Agent):
    """Natural policy gradient: θ ← θ + β w with w = (F + λ I)⁻¹ g and β the step of target_kl.

    w is also the weight vector of Kakade's compatible value function: the least-squares fit of the advantages by the
    scores ψ = ∇ log π(a|s). F is estimated from the scores of the sampled actions, which is unbiased for the policy's
    Fisher matrix. Arguments: see `Agent` and `NPGConfig`.

    Source: Kakade 2002, "A natural policy gradient", section 3; Rajeswaran et al. 2017, equation 5,
    https://arxiv.org/abs/1703.02660.

    Differs from the papers: the step is corrected to the true KL; samples of the last few policies count once more, by
    importance, until that fades; the critic is fitted to standardised returns by Adam; observations are normalised
    inside the policy.

    Raises:
        ValueError: the estimate or the solver does not fit the policy or its size; the message names those that do.
        FloatingPointError: no direction was usable for max_rejected_updates iterations in a row.
    """

    name: ClassVar[str] = "npg"
    policy_aliases = POLICIES
    dashboard = CURVES
    Config = NPGConfig
    config: NPGConfig
    policy: ActorCriticPolicy
    recent: RecentRollouts
    recorded: Recorded
    told: dict[str, Any]
    """What has come to the host of the last update."""

    # Learning --------------------------------------------------------------------------------------------------------

    def collect(self) -> Rollout | None:
        """Collect as many rollouts as are due, see `ReuseConfig.stage`, and give them side by side."""
        self.stage = self.config.stage(min(self.num_timesteps / self._total_timesteps, 1.0))
        if self.recent.most != self.stage.kept:
            self.recent = RecentRollouts(self.stage.kept)
        if self.stage.kept == 1 and self.config.curvature_memory is None:
            self.curvature.forget()
        n_steps = self.config.n_steps * self.stage.new
        if self.collector.rollout.n_steps != n_steps:
            self.collector.lengthen(n_steps)
        long = super().collect()
        return None if long is None else side_by_side(long, self.config.n_steps)

    @torch.no_grad()
    def train(self, batch: Rollout) -> None:
        """Make an `update`. A device is asked for nothing before it is over, and a GPU is told its work only once."""
        c, on_host, details = self.config, self.device.type == "cpu", self.counter % DETAILS_EVERY == 0
        joined = self.joined(batch)
        few, n = c.curvature_samples, joined.n_steps * joined.num_envs
        rows = None if few is None else noise.few(self.stream_seed, "curvature", self.counter, n, few, self.device)
        told, self.told = self.told, {}
        if self.curvature.late:
            self.curvature.prepare(told)
        self.curvature.damping = c.cg_damping / self.stage.caution
        target, log_std_max = self.stage.caution * self.target_kl, self._now(c.log_std_init, c.log_std_end)
        moves = not is_steady(c, self.stage.kept > 1) or (joined is not batch and not self.recent.is_full)
        if on_host or c.line_search or details or moves or batch is not self.collector.rollout:
            metrics, beta, searched = self.update(batch, joined, rows, self.discount, target, log_std_max, details)
        else:
            numbers = sent(torch.tensor([self.discount, target, log_std_max], dtype=torch.float64), self.device)
            metrics, beta, searched = self.recorded(rows, *numbers, joined.last_observations)
        asked = {"beta": beta} | ({} if on_host else self.curvature.asks())
        self.told = told = self.record(metrics, asked, final=True)
        is_certain = self.policy.actor.log_std is None and told["entropy"] < CERTAIN
        self.stop_reason = self.rejections.count(told["beta"], is_certain or told["gradient_norm"] == 0, searched)
        rejected = {"rejected_updates": self.rejections.updates, "rejected_steps": self.rejections.steps}
        self.record(rejected | {"discount": self.discount})
        self.recent.trusted = True

    def joined(self, batch: Rollout) -> Rollout:
        """Give a rollout beside those before it that are learned from once more; alone where there are none."""
        if self.stage.kept == 1:
            return batch
        s = self.policy.normalize(batch["observations"].flatten(0, 1))
        return self.recent.take_in(batch, self.policy.actor(s).log_prob(batch["actions"].flatten(0, 1)))

    def update(
        self,
        new: Rollout,
        batch: Rollout,
        rows: Tensor | None,
        gamma: Any,
        target: Any,
        log_std_max: Any,
        details: bool = False,
    ) -> tuple[dict[str, Any], Any, bool]:
        """Fit the critic; then θ ← θ + β w with w = (F + λ I)⁻¹ g (Kakade 2002, section 3) and the β of the KL target.

        Args:
            new: what the policy has just collected, where it trains.
            batch: what is learned from: `joined` of it.
            rows: the samples that curvature is estimated from; None takes all.
            gamma: discount per environment step, a number, or a tensor on the device.
            target: nats, likewise.
            log_std_max: ceiling of the log standard deviation, likewise; without log_std_end it has no part in it.
            details: whether to measure what costs time of its own.

        Returns:
            Metrics, β, and whether a line search looked for it.
        """
        c, policy = self.config, self.policy
        s, a = policy.normalize(batch["observations"].flatten(0, 1)), batch["actions"].flatten(0, 1)

        Psi, old = scores(policy.actor, s, a)  # Ψ = ∇ log π(a|s), [n, p]
        rho = None if batch is new else importance_weights(Psi.values, batch)  # min(1, π / μ), [n]
        V = policy.critic(s)
        A, returns = advantages(batch, V, policy, gamma, c.gae_lambda, rho)  # Schulman et al. 2016, (16)
        explained = explained_variance(returns, V)
        self.critic_fit.fit(policy.critic, s, policy.critic.update_scale(returns), rows)  # |V - z|² / n
        if c.advantages_after_fit:
            A, _ = advantages(batch, policy.critic(s), policy, gamma, c.gae_lambda, rho)
        A = standardize(A, rho) if c.normalize_advantage else A
        A = A if rho is None else rho * A

        step = self.curvature.direction(Psi, A, rows)  # (Ψᵀ Ψ / n + λ I) w = Ψᵀ A / n

        top = None if c.log_std_end is None else ceiling(policy.actor, log_std_max, target)
        line = Line(policy.actor, step.direction, old, s, c.log_std_min, top)
        beta: float | Tensor = 0.0
        unread = s.device.type != "cpu" and not c.line_search
        quadratic = math.nan if unread else step.quadratic.item()
        if unread:
            beta = line.match(step.quadratic, target)
        elif 0 < quadratic < math.inf:
            first = step_size(quadratic, target)
            if c.line_search:  # Schulman et al. 2015, appendix C
                gain = lambda: (torch.expm1(line.new.log_prob(a) - Psi.values) * A).mean().item()  # noqa: E731
                beta, _ = line_search(lambda beta: (line.kl(beta), gain()), first, target)
            else:
                beta, _ = match_kl(line.kl, first, target)  # mean KL(old || new) = target_kl
        if not unread and beta == 0:
            line.back()
        metrics = report_step(line, beta, step, Psi, a, A, explained, self.curvature.damping if details else None)
        policy.update_normalizer(new["observations"].flatten(0, 1))
        return metrics, beta, c.line_search and 0 < quadratic < math.inf

    @property
    def discount(self) -> float:
        """γ now, per environment step."""
        first, last = self.config.gamma, self.config.gamma_end
        return self._now(first, None if last is None else max(first, last))

    @property
    def target_kl(self) -> float:
        """The step size now, in nats."""
        return self._now(self.config.target_kl, self.config.target_kl_end)

    def _now(self, first: float, last: float | None) -> float:
        """Give what goes in a line from first to last with the training; without a last it stays."""
        return first if last is None else last + (first - last) * max(self._current_progress_remaining, 0.0)

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        super()._setup_model()
        self.rejections = Rejections(self.config.max_rejected_updates)
        self.curvature, self.critic_fit = make_natural(self.config, self.policy, self.stream_seed)
        self.curvature.late, self.told = self.device.type != AT_ONCE, {}
        self.stage = self.config.stage(0.0)
        self.recent = RecentRollouts(self.stage.kept)
        self.recorded = Recorded(self._update_again, self._memory)

    def _connect(self, env: SB3View) -> None:
        check_size(self.config, self.policy.actor, env.num_envs * (1 + self.config.reused_rollouts))
        super()._connect(env)

    def _update_again(
        self, rows: Tensor | None, gamma: Tensor, target: Tensor, log_std_max: Tensor, last_observations: Tensor
    ) -> Any:
        """Update from what lies where it did in the last update."""
        new = self.collector.rollout
        batch = self.recent.rollout or new
        batch.last_observations = last_observations
        return self.update(new, batch, rows, gamma, target, log_std_max)

    def _memory(self) -> list[Tensor]:
        """List the tensors on the device that an update reads."""
        new, kept = self.collector.rollout, self.curvature.tensors().values()
        rollouts = [new] if self.recent.rollout is None else [new, self.recent.rollout]
        fields = [rollout[name] for rollout in rollouts for name in rollout.specs]
        return [*memory(self.policy), *fields, *(x for x in kept if x.device.type != "cpu")]

    def parts(self) -> dict[str, Stateful]:
        return {
            "rejections": self.rejections,
            "curvature": self.curvature,
            "critic": self.critic_fit,
            "recent": self.recent,
        }


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(NPGConfig):
    """Hyperparameters of TRPO: NPG's, with the line search on."""

    line_search: bool = True
    """Whether steps are cut back until the KL is at most target_kl and the surrogate gains."""


class TRPO(NPG):
    """Trust region policy optimization: NPG whose steps a line search cuts back (Schulman et al. 2015).

    It stands beside NPG because it is NPG with another default: algorithms do not import each other.

    Source: Schulman et al. 2015, https://arxiv.org/abs/1502.05477, appendix C. Differs from the paper as NPG does from
    its sources; the gain must be above 0, as in Schulman's code, and not a share of the predicted one.
    """

    name: ClassVar[str] = "trpo"
    Config = TRPOConfig
    config: TRPOConfig
