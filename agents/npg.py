"""Natural policy gradient with compatible-feature Fisher estimation (Kakade 2002)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents import noise
from agents.base import Agent
from agents.config import AgentConfig
from agents.direction.critics import FitStatistics, gauss_newton
from agents.direction.fisher import NaturalGradient, natural_gradient, step_size
from agents.direction.scores import FactoredScores, assign_parameters, capture, parameter_vector
from agents.policy.actor_critic import ActorCriticPolicy
from agents.policy.distributions import Distribution

KL_TOLERANCE = 0.05
"""Relative error of an update's KL that is left as it is."""
MAX_CORRECTIONS = 4
"""How often the step is corrected to the true KL."""


@dataclass(frozen=True, kw_only=True)
class NPGConfig(AgentConfig):
    """Hyperparameters of NPG."""

    target_kl: float = 0.02
    """Step size: mean KL(old || new) of an update, in nats."""
    target_kl_end: float | None = None
    """Step size at the end of training, in nats, reached in equal steps; None keeps target_kl throughout."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2016)."""
    normalize_advantage: bool = True
    """Whether advantages are shifted to mean 0 and scaled to standard deviation 1 in each batch."""
    cg_max_steps: int = 10
    """Most conjugate-gradient iterations per direction."""
    cg_tolerance: float = 1e-3
    """Relative residual at which conjugate gradients stop."""
    curvature_samples: int | None = None
    """Samples, drawn anew for each update, that the Fisher matrix and the critic's Gauss-Newton matrix are estimated
    from; None takes all. Gradients always take all."""
    cg_damping: float = 0.1
    """Damping of the Fisher matrix, in units of its mean eigenvalue tr(F) / p."""
    log_std_min: float | None = None
    """Floor of the log standard deviation of Gaussian actions, or None."""
    critic_steps: int = 1
    """Gauss-Newton steps of the critic per iteration."""
    critic_cg_max_steps: int = 15
    """Most conjugate-gradient iterations per Gauss-Newton step."""
    critic_damping: float = 0.03
    """Damping of the Gauss-Newton matrix, in units of its mean eigenvalue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("target_kl", self.target_kl > 0, "a number above 0")
        self.require("target_kl_end", self.target_kl_end is None or self.target_kl_end > 0, "a number above 0, or None")
        self.require("gae_lambda", 0 <= self.gae_lambda <= 1, "a number from 0 to 1")
        self.require("cg_max_steps", self.cg_max_steps >= 1, "an integer of at least 1")
        self.require("cg_tolerance", self.cg_tolerance > 0, "a number above 0")
        samples = self.curvature_samples
        self.require("curvature_samples", samples is None or samples >= 1, "an integer of at least 1, or None")
        self.require("cg_damping", self.cg_damping >= 0, "a number of at least 0")
        self.require("critic_steps", self.critic_steps >= 1, "an integer of at least 1")
        self.require("critic_cg_max_steps", self.critic_cg_max_steps >= 1, "an integer of at least 1")
        self.require("critic_damping", self.critic_damping >= 0, "a number of at least 0")


def standardize(advantages: Tensor) -> Tensor:
    """Advantages [n] with mean 0 and standard deviation 1; zeros where they are equal."""
    spread = advantages.std(correction=0)
    # Advantages that differ by rounding only say nothing: they are equal.
    differ = spread > 4 * torch.finfo(advantages.dtype).eps * advantages.abs().max()
    return torch.where(differ, (advantages - advantages.mean()) / spread, 0.0)


class NPG(Agent):
    """Natural policy gradient: θ ← θ + β w with w = (F + λ I)⁻¹ g and β the step of target_kl.

    w is also the weight vector of Kakade's compatible value function: the least-squares fit of the advantages by the
    scores ψ = ∇ log π(a|s). F is estimated from the scores of the sampled actions, which is unbiased for the policy's
    Fisher matrix. Arguments: see `Agent` and `NPGConfig`.

    Source: Kakade 2002, "A natural policy gradient", section 3; Rajeswaran et al. 2017, equation 5,
    https://arxiv.org/abs/1703.02660.

    Differs from the papers: the step is corrected to the true KL; the critic is fitted after the policy by
    Gauss-Newton on standardised returns; observations are normalised inside the policy.
    """

    name: ClassVar[str] = "npg"
    Config = NPGConfig
    config: NPGConfig
    policy: ActorCriticPolicy

    def _setup_model(self) -> None:
        super()._setup_model()
        self.rejected_updates = 0

    @torch.no_grad()
    def train(self) -> None:
        c, policy, batch = self.config, self.policy, self.buffer.to(self.device)
        s, a = policy.normalize(batch.flat("observations")), batch.flat("actions")
        A, returns = self._advantages(batch, s, c.gae_lambda)
        if c.normalize_advantage:
            A = standardize(A)

        rows = self._curvature_rows(len(s))

        Psi, old = self._scores(s, a)
        step = natural_gradient(
            Psi,
            A,
            damping=c.cg_damping,
            cg_iterations=c.cg_max_steps,
            cg_tolerance=c.cg_tolerance,
            rows=rows,
        )
        kl, new = self._take(step, s, old)

        policy.critic.update_scale(returns)
        fit = gauss_newton(
            policy.critic,
            s,
            returns,
            steps=c.critic_steps,
            cg_iterations=c.critic_cg_max_steps,
            damping=c.critic_damping,
            rows=rows,
        )
        self._record_update(new, step, kl, fit)
        policy.update_normalizer(batch.flat("observations"))

    @property
    def target_kl(self) -> float:
        """The step size now, in nats."""
        first, last = self.config.target_kl, self.config.target_kl_end
        return first if last is None else last + (first - last) * max(self._current_progress_remaining, 0.0)

    def _curvature_rows(self, n: int) -> Tensor | None:
        """The samples of this update's curvature, int64 [k]; None for all n."""
        k = self.config.curvature_samples
        if k is None or k >= n:
            return None
        return noise.permutation(self.stream_seed, "curvature", self.iteration, n)[:k].to(self.device)

    def _scores(self, s: Tensor, a: Tensor) -> tuple[FactoredScores, Distribution]:
        """Ψ [n, p], and the policy's distributions, which the same forward pass gives."""
        passes: list[Distribution] = []

        def log_prob() -> Tensor:
            passes.append(self.policy.actor(s))
            return passes[0].log_prob(a)

        return capture(self.policy.actor, log_prob), passes[0]

    def _take(self, step: NaturalGradient, s: Tensor, old: Distribution) -> tuple[float, Distribution]:
        """θ ← θ + β w with the β at which the mean KL(old || new) is the target.

        Returns:
            That KL, and the new distributions.

        The quadratic form gives the first β; the KL grows nearly as its square, so a few corrections hit the target.
        Where there is no usable direction, or no finite KL, θ stays and the update counts as rejected.
        """
        actor, target = self.policy.actor, self.target_kl
        if not (0 < step.quadratic < math.inf):
            # Without advantages there is nothing to learn from; anything else is a failed solve.
            self.rejected_updates += step.solution.status != "zero_rhs"
            return 0.0, old
        theta = parameter_vector(actor)
        beta = step_size(step.quadratic, target)
        kl = math.inf
        for _ in range(MAX_CORRECTIONS + 1):
            assign_parameters(actor, theta + beta * step.direction)
            if actor.log_std is not None and self.config.log_std_min is not None:
                actor.log_std.bias.clamp_(min=self.config.log_std_min)
            new = actor(s)
            kl = old.kl(new).mean().item()
            if abs(kl / target - 1) <= KL_TOLERANCE:
                break
            correction = math.sqrt(target / kl) if 0 < kl < math.inf else 0.5
            beta *= min(max(correction, 0.5), 1.5)
        if not kl <= 2 * target:
            assign_parameters(actor, theta)
            self.rejected_updates += 1
            return 0.0, old
        return kl, new

    def _record_update(self, new: Distribution, step: NaturalGradient, kl: float, fit: FitStatistics) -> None:
        record, actor = self.logger.record, self.policy.actor
        record("train/kl", kl)
        record("train/entropy", new.entropy().mean().item())
        if actor.log_std is not None:
            record("train/std", actor.log_std.bias.exp().mean().item())
        record("train/gradient_norm", step.gradient.norm().item())
        record("train/cg_iterations", step.solution.iterations)
        record("train/cg_residual", step.solution.residual)
        record("train/rejected_updates", self.rejected_updates)
        record("train/explained_variance", fit.explained_variance_before)
        record("train/critic_step", fit.step)
