"""Natural policy gradient with compatible-feature Fisher estimation (Kakade 2002), and with a line search TRPO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from agents import noise
from agents.base import Agent
from agents.checkpoint import with_prefix
from agents.config import AgentConfig, above, at_least, between
from agents.natural import CURVATURES
from agents.natural.critic_fits import CRITIC_FITS, FitStatistics
from agents.natural.curvature import MATRIX_BYTES, NaturalGradient, check_solver
from agents.natural.kronecker import PRECONDITIONERS, effective_dimension
from agents.natural.scores import FactoredScores, Scores, is_factored, scores
from agents.natural.step import Line, StepReport, line_search, match_kl, report_step, step_size
from agents.policy.actor_critic import POLICIES, ActorCriticPolicy
from agents.rollout.buffer import Rollout, advantages, explained_variance, standardize
from envs.sb3 import SB3View

DETAILS_EVERY = 10
"""Iterations between measurements that cost time of their own."""


@dataclass(frozen=True, kw_only=True)
class NPGConfig(AgentConfig):
    """Hyperparameters of NPG."""

    target_kl: Annotated[float, above(0)] = 0.02
    """Step size: mean KL(old || new) of an update, in nats."""
    target_kl_end: Annotated[float, above(0)] | None = None
    """Step size at the end of training, in nats, reached in equal steps; None keeps target_kl throughout."""
    gae_lambda: Annotated[float, between(0, 1)] = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2016)."""
    normalize_advantage: bool = True
    """Whether advantages are shifted to mean 0 and scaled to standard deviation 1 in each batch."""
    line_search: bool = False
    """Whether steps are cut back until the KL is at most target_kl and the surrogate gains, as in TRPO; otherwise they
    are corrected to have the KL target_kl."""
    fisher: Literal["compatible", "analytic", "kfac", "ekfac", "diagonal", "empirical", "adaptive"] = "compatible"
    """Estimate of the Fisher matrix: compatible (the sampled actions' scores), analytic (their mean over actions),
    kfac, ekfac, diagonal, adaptive (a running inverse), or empirical (the loss's gradients: no Fisher matrix, there to
    be compared)."""
    solver: Literal["auto", "cholesky", "gram", "cg"] = "auto"
    """Of estimates without a closed inverse: cholesky (p x p), gram (n x n), cg, or auto by size."""
    cg_preconditioner: Literal["none", "diagonal", "kfac", "ekfac", "gram"] = "none"
    """Of conjugate gradients, for the direction and the Gauss-Newton critic: none, diagonal, kfac, ekfac
    or gram (the inverse of a few samples' matrix)."""
    cg_warm_start: bool = False
    """Whether conjugate gradients begin at the last update's direction."""
    cg_max_steps: Annotated[int, at_least(1)] = 10
    """Most conjugate-gradient iterations per direction."""
    cg_tolerance: Annotated[float, above(0)] = 1e-3
    """Relative residual at which conjugate gradients stop."""
    curvature_samples: Annotated[int, at_least(1)] | None = None
    """Samples, drawn anew for each update, that the Fisher matrix and the critic's Gauss-Newton matrix are estimated
    from; None takes all. Gradients always take all."""
    cg_damping: Annotated[float, at_least(0)] = 0.1
    """Damping of the Fisher matrix, in units of its mean eigenvalue tr(F) / p."""
    log_std_min: float | None = None
    """Floor of the log standard deviation of Gaussian actions, or None."""
    max_rejected_updates: Annotated[int, at_least(1)] = 5
    """Updates in a row without a usable direction or step after which training stops."""
    critic: Literal["gauss_newton", "ridge", "adam", "adabound"] = "gauss_newton"
    """How the critic is fitted: gauss_newton, ridge (closed form; needs a value_network linear in features), adam or
    adabound."""
    critic_learning_rate: Annotated[float, above(0)] = 1e-3
    """Step size of adam and adabound."""
    critic_epochs: Annotated[int, at_least(1)] = 10
    """Passes of adam and adabound over the rollout per iteration."""
    critic_batch_size: Annotated[int, at_least(1)] = 256
    """Samples of one of their steps, at most."""
    critic_steps: Annotated[int, at_least(1)] = 1
    """Gauss-Newton steps of the critic per iteration."""
    critic_cg_max_steps: Annotated[int, at_least(1)] = 8
    """Most conjugate-gradient iterations per Gauss-Newton step."""
    critic_damping: Annotated[float, at_least(0)] = 0.03
    """Damping of the Gauss-Newton matrix, in units of its mean eigenvalue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver != "auto" and self.fisher in ("kfac", "ekfac", "diagonal", "adaptive"):
            raise ValueError(
                f"solver is {self.solver!r}, but fisher={self.fisher!r} has an inverse of its own; give solver='auto', "
                "or fisher='compatible' or 'analytic'."
            )
        if self.critic == "ridge" and self.value_network == "mlp":
            raise ValueError("critic is 'ridge' with value_network='mlp'; give value_network='quadratic' or 'rbf'.")
        if self.solver == "gram" and self.cg_damping == 0:
            raise ValueError(
                "cg_damping is 0.0 with solver='gram'; give damping above 0, or solver='cholesky' or 'cg'."
            )
        if self.cg_preconditioner == "gram" and min(self.cg_damping, self.critic_damping) == 0:
            raise ValueError(
                "cg_preconditioner is 'gram' with cg_damping or critic_damping 0.0; give both above 0, or another "
                "preconditioner."
            )


class NPG(Agent):
    """Natural policy gradient: θ ← θ + β w with w = (F + λ I)⁻¹ g and β the step of target_kl.

    w is also the weight vector of Kakade's compatible value function: the least-squares fit of the advantages by the
    scores ψ = ∇ log π(a|s). F is estimated from the scores of the sampled actions, which is unbiased for the policy's
    Fisher matrix. Arguments: see `Agent` and `NPGConfig`.

    Source: Kakade 2002, "A natural policy gradient", section 3; Rajeswaran et al. 2017, equation 5,
    https://arxiv.org/abs/1703.02660.

    Differs from the papers: the step is corrected to the true KL; the critic is fitted after the policy by
    Gauss-Newton on standardised returns; observations are normalised inside the policy.

    Raises:
        ValueError: the estimate or the solver does not fit the policy or its size; the message names those that do.
        FloatingPointError: no direction was usable for max_rejected_updates iterations in a row.
    """

    name: ClassVar[str] = "npg"
    policy_aliases = POLICIES
    dashboard: ClassVar[dict[str, dict[str, list[str]]]] = {
        "does the quadratic model hold": {
            "KL, nats: true, quadratic, reverse": ["train/kl", "train/kl_quadratic", "train/kl_reverse"],
            "gain: actual, predicted": ["train/gain", "train/predicted_gain"],
            "effective samples, of 1": ["train/effective_samples"],
            "rejected updates and steps": ["train/rejected_updates", "train/rejected_steps"],
        },
        "is the direction good": {
            "residual": ["train/cg_residual"],
            "iterations": ["train/cg_iterations"],
            "cosine of gradient and direction": ["train/cosine"],
            "effective dimension": ["train/effective_dimension"],
        },
        "do the fits explain": {
            "critic: explained variance": ["train/explained_variance"],
            "compatible R²": ["train/compatible_r2"],
        },
        "does it learn": {
            "return": ["rollout/ep_rew_mean", "eval/mean_reward"],
            "entropy, nats": ["train/entropy"],
            "standard deviation": ["train/std"],
        },
        "where the seconds go": {"collecting and training": ["time/collect_seconds", "time/train_seconds"]},
    }
    Config = NPGConfig
    config: NPGConfig
    policy: ActorCriticPolicy
    _rejected_in_a_row: int

    # Learning --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self, batch: Rollout) -> None:
        """θ ← θ + β w with w = (F + λ I)⁻¹ g (Kakade 2002, section 3) and the β of target_kl; then fit the critic."""
        c, policy, target = self.config, self.policy, self.target_kl
        observations, a = batch["observations"].flatten(0, 1), batch["actions"].flatten(0, 1)
        s = policy.normalize(observations)
        A, returns = advantages(batch, policy.critic(s), policy, c.gamma, c.gae_lambda)  # Schulman et al. 2016, (16)
        explained = explained_variance(returns, returns - A)
        A = standardize(A) if c.normalize_advantage else A
        Psi, old = scores(policy.actor, s, a)  # Ψ = ∇ log π(a|s), [n, p]
        few = c.curvature_samples
        rows = None if few is None else noise.few(self.stream_seed, "curvature", self.counter, len(s), few)
        step = self.curvature.direction(Psi, A, rows)  # (Ψᵀ Ψ / n + λ I) w = Ψᵀ A / n

        line, beta = Line(policy.actor, step.direction, old, s, c.log_std_min), 0.0
        if 0 < step.quadratic < math.inf:
            first = step_size(step.quadratic, target)
            if c.line_search:  # Schulman et al. 2015, appendix C
                gain = lambda: (torch.expm1(line.new.log_prob(a) - Psi.values) * A).mean().item()  # noqa: E731
                beta, _ = line_search(lambda beta: (line.kl(beta), gain()), first, target)
            else:
                beta, _ = match_kl(line.kl, first, target)  # mean KL(old || new) = target_kl
        if beta == 0:
            line.back()
        report = report_step(line, beta, step, Psi, a, A)

        z = policy.critic.update_scale(returns)
        fit = self.critic_fit.fit(policy.critic, s, z, rows)  # |V - z|² / n
        self._count_rejection(beta, step)
        self._record_update(Psi, step, report, line.new, explained, fit)
        policy.update_normalizer(observations)

    @property
    def target_kl(self) -> float:
        """The step size now, in nats."""
        first, last = self.config.target_kl, self.config.target_kl_end
        return first if last is None else last + (first - last) * max(self._current_progress_remaining, 0.0)

    # Checks and logging ----------------------------------------------------------------------------------------------

    def _count_rejection(self, beta: float, step: NaturalGradient) -> None:
        """Count updates that changed nothing, and stop after max_rejected_updates in a row.

        Without advantages there is nothing to learn from; anything else is a failed solve, step or line search.
        """
        searched = self.config.line_search and bool(0 < step.quadratic < math.inf)
        rejected = beta == 0 and step.solution.status != "zero_rhs"
        self.rejected_steps += rejected and searched
        self.rejected_updates += rejected and not searched
        self._rejected_in_a_row = self._rejected_in_a_row + 1 if rejected else 0
        if self._rejected_in_a_row >= self.config.max_rejected_updates:
            found = "step within target_kl gained anything" if searched else "direction was usable"
            self.stop_reason = (
                f"In {self._rejected_in_a_row} updates in a row no {found}; the policy is as it was before them. Look "
                "for rewards or observations that are not finite, or give more cg_damping or more samples."
            )
            self._rejected_in_a_row = 0

    def _record_update(
        self, Psi: Scores, step: NaturalGradient, report: StepReport, new: Any, explained: Tensor, fit: FitStatistics
    ) -> None:
        record, actor, c = self.logger.record, self.policy.actor, self.config
        values = {
            **vars(report),
            "entropy": new.entropy().mean(),
            "gradient_norm": step.gradient.norm(),
            "cosine": torch.cosine_similarity(step.gradient, step.direction, dim=0),
            "compatible_r2": step.compatible_r2,
            "explained_variance": explained,
        }
        if actor.log_std is not None:
            values["std"] = actor.log_std.bias.exp().mean()
        if self.counter % DETAILS_EVERY == 0 and isinstance(Psi, FactoredScores):
            values["effective_dimension"] = effective_dimension(Psi, c.cg_damping)
        for name, value in zip(values, torch.stack([x.double() for x in values.values()]).tolist(), strict=True):
            record(f"train/{name}", value)
        record("train/cg_iterations", step.solution.iterations)
        if math.isfinite(step.solution.residual):
            record("train/cg_residual", step.solution.residual)
        record("train/rejected_updates", self.rejected_updates)
        if c.line_search:
            record("train/rejected_steps", self.rejected_steps)
        record("train/critic_step", fit.step)

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        super()._setup_model()
        c, actor = self.config, self.policy.actor
        self.rejected_updates = self.rejected_steps = 0
        self._rejected_in_a_row = 0
        if not is_factored(actor):
            self._check_unfactored()
        p = sum(x.numel() for x in actor.parameters())
        if c.fisher == "adaptive" and 4 * p * p > MATRIX_BYTES:
            raise ValueError(
                f"fisher is 'adaptive', whose inverse for p = {p} parameters takes {4 * p * p / 2**30:.1f} GiB of at "
                f"most {MATRIX_BYTES / 2**30:.0f}; give one of {', '.join(x for x in CURVATURES if x != 'adaptive')}."
            )
        precondition = PRECONDITIONERS[c.cg_preconditioner]
        self.curvature = CURVATURES[c.fisher](c, precondition, self.stream_seed)
        self.critic_fit = CRITIC_FITS[c.critic](c, self.policy.critic, precondition, self.stream_seed)

    def _connect(self, env: SB3View) -> None:
        n, p = self.config.n_steps * env.num_envs, sum(x.numel() for x in self.policy.actor.parameters())
        check_solver(self.config.solver, min(self.config.curvature_samples or n, n), p)
        super()._connect(env)

    def _check_unfactored(self) -> None:
        """Raise ValueError for what needs factored scores, where the actor has layers that do not factor."""
        c, net = self.config, type(self.policy.actor.net).__name__
        fits = [name for name in CURVATURES if name not in ("analytic", "kfac", "ekfac")]
        if c.fisher not in fits:
            raise ValueError(
                f"fisher is {c.fisher!r}, but {net} has layers whose scores are no outer products; give one of "
                f"{', '.join(fits)}."
            )
        if c.cg_preconditioner in ("kfac", "ekfac"):
            raise ValueError(
                f"cg_preconditioner is {c.cg_preconditioner!r}, but the policy has layers whose scores are no outer "
                "products; give none, diagonal or gram."
            )

    # State for files -------------------------------------------------------------------------------------------------

    def own_tensors(self) -> dict[str, Tensor]:
        """Give the counts, and what curvature and the critic's fit keep."""
        counts = (self.rejected_updates, self._rejected_in_a_row, self.rejected_steps)
        tensors = {"rejected": torch.tensor(counts)}
        tensors |= {f"curvature.{name}": value for name, value in self.curvature.tensors().items()}
        return tensors | {f"critic.{name}": value for name, value in self.critic_fit.tensors().items()}

    def load_own_tensors(self, tensors: dict[str, Tensor]) -> None:
        if "rejected" in tensors:
            self.rejected_updates, self._rejected_in_a_row, self.rejected_steps = tensors["rejected"].tolist()
        here = {name: value.to(self.device) for name, value in tensors.items()}
        self.curvature.load(with_prefix(here, "curvature."))
        self.critic_fit.load(with_prefix(here, "critic."))


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
