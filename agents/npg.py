"""Natural policy gradient with compatible-feature Fisher estimation (Kakade 2002), and with a line search TRPO."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents import noise
from agents.base import Agent
from agents.config import AgentConfig, near
from agents.natural.critic_fits import CRITICS, FitStatistics, descend, gauss_newton, ridge
from agents.natural.curvature import (
    ESTIMATES,
    PRECONDITIONERS,
    AdaptiveInverse,
    NaturalGradient,
    damping_rows,
    effective_dimension,
    natural_gradient,
    relative_damping,
    step_size,
)
from agents.natural.scores import FactoredScores, Scores, capture, dense_scores, is_factored
from agents.natural.solvers import MATRIX_BYTES, SOLVERS, check_solver
from agents.natural.step import StepReport, line_search, matched_step, report_step
from agents.optim.registry import OPTIMIZERS, load_optimizer_tensors, make_optimizer, optimizer_tensors
from agents.policy.actor_critic import POLICIES, ActorCriticPolicy
from agents.policy.distributions import Distribution
from agents.policy.networks import Actor, assign_parameters, parameter_vector
from agents.rollout.buffer import Rollout, advantages, standardize

STAGES = ("advantages", "scores", "direction", "step", "critic")
"""Of an update, as they follow each other."""
DETAILS_EVERY = 10
"""Iterations between measurements that cost time of their own."""


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
    line_search: bool = False
    """Whether steps are cut back until the KL is at most target_kl and the surrogate gains, as in TRPO; otherwise they
    are corrected to have the KL target_kl."""
    fisher: str = "compatible"
    """Estimate of the Fisher matrix: compatible (the sampled actions' scores), analytic (their mean over actions),
    kfac, ekfac, diagonal, adaptive (a running inverse), or empirical (the loss's gradients: no Fisher matrix, there to
    be compared)."""
    fisher_rate: float = 0.1
    """ε of the adaptive estimate: the weight of an update's samples in the running matrix."""
    fisher_rows: int = 64
    """Samples, drawn anew for each update, that the adaptive estimate takes in; its damping takes as many rows."""
    fisher_first_order: bool = False
    """Whether the adaptive inverse is updated to first order in ε, as in the paper, and refuses to go indefinite."""
    solver: str = "auto"
    """Of estimates without a closed inverse: cholesky (p x p), gram (n x n), cg, or auto by size."""
    cg_preconditioner: str = "none"
    """Of conjugate gradients, for the direction and the Gauss-Newton critic: none, diagonal, kfac, ekfac
    or gram (the inverse of a few samples' matrix)."""
    cg_warm_start: bool = False
    """Whether conjugate gradients begin at the last update's direction."""
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
    max_rejected_updates: int = 5
    """Updates in a row without a usable direction after which training stops."""
    critic: str = "gauss_newton"
    """How the critic is fitted: gauss_newton, ridge (closed form; needs a value_network linear in features), adam or
    adabound."""
    critic_learning_rate: float = 1e-3
    """Step size of adam and adabound."""
    critic_epochs: int = 10
    """Passes of adam and adabound over the rollout per iteration."""
    critic_batch_size: int = 256
    """Samples of one of their steps, at most."""
    critic_steps: int = 1
    """Gauss-Newton steps of the critic per iteration."""
    critic_cg_max_steps: int = 8
    """Most conjugate-gradient iterations per Gauss-Newton step."""
    critic_damping: float = 0.03
    """Damping of the Gauss-Newton matrix, in units of its mean eigenvalue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("target_kl", self.target_kl > 0, "a number above 0")
        self.require("target_kl_end", self.target_kl_end is None or self.target_kl_end > 0, "a number above 0, or None")
        self.require("gae_lambda", 0 <= self.gae_lambda <= 1, "a number from 0 to 1")
        for field, known in {
            "fisher": ESTIMATES,
            "solver": SOLVERS,
            "cg_preconditioner": PRECONDITIONERS,
            "critic": CRITICS,
        }.items():
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"There is no {field} {value!r}{near(value, list(known))}")
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
        self.require("fisher_rate", 0 < self.fisher_rate < 1, "a number between 0 and 1")
        self.require("fisher_rows", self.fisher_rows >= 1, "an integer of at least 1")
        self.require("max_rejected_updates", self.max_rejected_updates >= 1, "an integer of at least 1")
        self.require("critic_learning_rate", self.critic_learning_rate > 0, "a number above 0")
        self.require("critic_epochs", self.critic_epochs >= 1, "an integer of at least 1")
        self.require("critic_batch_size", self.critic_batch_size >= 1, "an integer of at least 1")
        self.require("cg_max_steps", self.cg_max_steps >= 1, "an integer of at least 1")
        self.require("cg_tolerance", self.cg_tolerance > 0, "a number above 0")
        samples = self.curvature_samples
        self.require("curvature_samples", samples is None or samples >= 1, "an integer of at least 1, or None")
        self.require("cg_damping", self.cg_damping >= 0, "a number of at least 0")
        self.require("critic_steps", self.critic_steps >= 1, "an integer of at least 1")
        self.require("critic_cg_max_steps", self.critic_cg_max_steps >= 1, "an integer of at least 1")
        self.require("critic_damping", self.critic_damping >= 0, "a number of at least 0")


class Stopwatch:
    """Seconds of stages that follow each other, by the host's clock: work on a GPU counts where it is waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


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
        "where the seconds go": {
            "stages": [f"time/{stage}_seconds" for stage in STAGES],
            "collecting and training": ["time/collect_seconds", "time/train_seconds"],
        },
    }
    Config = NPGConfig
    config: NPGConfig
    policy: ActorCriticPolicy

    def _setup_model(self) -> None:
        super()._setup_model()
        c, actor = self.config, self.policy.actor
        self.rejected_updates = self._rejected_in_a_row = self.rejected_steps = 0
        p = sum(x.numel() for x in actor.parameters())
        n = c.n_steps * c.num_envs
        check_solver(c.solver, min(c.curvature_samples or n, n), p)
        self._factored = is_factored(actor)
        if not self._factored:
            self._check_unfactored(actor)
        if c.fisher == "adaptive" and 4 * p * p > MATRIX_BYTES:
            raise ValueError(
                f"fisher is 'adaptive', whose inverse for p = {p} parameters takes {4 * p * p / 2**30:.1f} GiB of at "
                f"most {MATRIX_BYTES / 2**30:.0f}; give one of {', '.join(ESTIMATES[:-1])}."
            )
        self.inverse: AdaptiveInverse | None = None
        self._last_direction: Tensor | None = None
        self.optimizer = None
        if c.critic in OPTIMIZERS:
            parameters = self.policy.critic.parameters()
            self.optimizer = make_optimizer(c.critic, parameters, lr=c.critic_learning_rate, eps=1e-5)

    @torch.no_grad()
    def train(self, batch: Rollout) -> None:
        c, policy = self.config, self.policy
        s, a = policy.normalize(batch.flat("observations")), batch.flat("actions")
        clock = Stopwatch()
        A, returns = advantages(batch, s, policy, c.gamma, c.gae_lambda)
        if c.normalize_advantage:
            A = standardize(A)
        clock.lap("advantages")

        rows = self._curvature_rows(len(s))
        Psi, old = self._scores(s, a)
        clock.lap("scores")
        step = self._direction(Psi, s, A, rows)
        clock.lap("direction")
        beta, new = self._take(step, s, a, A, Psi.values, old)
        clock.lap("step")

        policy.critic.update_scale(returns)
        fit = self._fit_critic(s, returns, rows)
        clock.lap("critic")
        log_ratio = new.log_prob(a) - Psi.values
        report = report_step(beta, step, log_ratio, A, old.kl(new), new.kl(old))
        self._record_update(Psi, step, report, new, fit, clock)
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
        return noise.permutation(self.stream_seed, "curvature", self.counter, n)[:k].to(self.device)

    def _check_unfactored(self, actor: Actor) -> None:
        """Raise ValueError for what needs factored scores, where actor has layers that do not factor."""
        fits = [name for name in ESTIMATES if name not in ("analytic", "kfac", "ekfac")]
        if self.config.fisher not in fits:
            raise ValueError(
                f"fisher is {self.config.fisher!r}, but {type(actor.net).__name__} has layers whose scores are no "
                f"outer products; give one of {', '.join(fits)}."
            )
        if self.config.cg_preconditioner in ("kfac", "ekfac"):
            raise ValueError(
                f"cg_preconditioner is {self.config.cg_preconditioner!r}, but the policy has layers whose scores are "
                "no outer products; give none, diagonal or gram."
            )

    def _scores(self, s: Tensor, a: Tensor) -> tuple[Scores, Distribution]:
        """Ψ [n, p], and the policy's distributions, which the same forward pass gives."""
        if not self._factored:
            return dense_scores(self.policy.actor, lambda actor, s, a: actor(s).log_prob(a), s, a), self.policy.actor(s)
        passes: list[Distribution] = []

        def log_prob() -> Tensor:
            passes.append(self.policy.actor(s))
            return passes[0].log_prob(a)

        return capture(self.policy.actor, log_prob), passes[0]

    def _direction(self, Psi: Scores, s: Tensor, A: Tensor, rows: Tensor | None) -> NaturalGradient:
        """w, by the configuration's estimate and solver, from advantages A [n]."""
        c = self.config
        roots = None
        if c.fisher == "analytic":
            some = s if rows is None else s[rows]
            roots = capture(self.policy.actor, lambda: self.policy.actor(some).fisher_roots())
        taken_in = c.fisher != "adaptive" or self._take_in(Psi)
        step = natural_gradient(
            Psi,
            A,
            damping=c.cg_damping,
            cg_iterations=c.cg_max_steps,
            cg_tolerance=c.cg_tolerance,
            rows=rows,
            solver=c.solver,
            cg_preconditioner=c.cg_preconditioner,
            x0=self._last_direction if c.cg_warm_start else None,
            estimate=c.fisher,
            roots=roots,
            running=self.inverse,
        )
        self._last_direction = step.direction if c.cg_warm_start else None
        return step if taken_in else step.refused("indefinite")

    def _take_in(self, Psi: Scores) -> bool:
        """Update the running inverse by some of Ψ's rows and of the damping's; False if that would go indefinite."""
        c, p = self.config, Psi.p
        key = (self.stream_seed, "fisher", self.counter)
        rows = noise.permutation(*key, Psi.n)[: c.fisher_rows].to(self.device)
        some = Psi.of(rows)
        shift = relative_damping(Psi, c.cg_damping).item()
        if not math.isfinite(shift):
            return False
        if self.inverse is None:
            # G begins as the mean eigenvalue everywhere.
            start = torch.eye(p, dtype=Psi.dtype, device=self.device) * (p / Psi.trace())
            self.inverse = AdaptiveInverse(start, first_order=c.fisher_first_order)
        places = noise.permutation(*key, p, 1)[: c.fisher_rows].to(self.device)
        damping = damping_rows(p, shift, places).to(Psi.dtype)
        return self.inverse.update(torch.cat((some.dense() / some.n**0.5, damping)), c.fisher_rate)

    def _take(
        self, step: NaturalGradient, s: Tensor, a: Tensor, A: Tensor, log_old: Tensor, old: Distribution
    ) -> tuple[float, Distribution]:
        """θ ← θ + β w with the β at which the mean KL(old || new) is the target, or that a line search accepts.

        Returns:
            β, and the new distributions.

        Where there is no usable direction, or no finite KL, θ stays and the update counts as rejected.
        """
        c, actor, target = self.config, self.policy.actor, self.target_kl
        if not (0 < step.quadratic < math.inf):
            # Without advantages there is nothing to learn from; anything else is a failed solve.
            self._count_rejection(step.solution.status != "zero_rhs")
            return 0.0, old
        theta = parameter_vector(actor)
        new = old

        def try_step(beta: float) -> tuple[float, float]:
            nonlocal new
            assign_parameters(actor, theta + beta * step.direction)
            if actor.log_std is not None and c.log_std_min is not None:
                actor.log_std.bias.clamp_(min=c.log_std_min)
            new = actor(s)
            kl = old.kl(new).mean().item()
            return kl, (torch.expm1(new.log_prob(a) - log_old) * A).mean().item() if c.line_search else 0.0

        first = step_size(step.quadratic, target)
        if c.line_search:
            beta, _ = line_search(try_step, first, target)
        else:
            beta, _ = matched_step(lambda beta: try_step(beta)[0], first, target)
        if beta == 0:
            assign_parameters(actor, theta)
            new = old
        self.rejected_steps += beta == 0 and c.line_search
        self._count_rejection(beta == 0 and not c.line_search)
        return beta, new

    def _count_rejection(self, rejected: bool) -> None:
        self.rejected_updates += rejected
        self._rejected_in_a_row = self._rejected_in_a_row + 1 if rejected else 0
        if self._rejected_in_a_row >= self.config.max_rejected_updates:
            self.stop_reason = (
                f"{self._rejected_in_a_row} updates in a row had no usable direction; the policy is as it was before "
                "them. Look for rewards or observations that are not finite, or give more cg_damping or a smaller "
                "fisher_rate."
            )

    def _fit_critic(self, s: Tensor, returns: Tensor, rows: Tensor | None) -> FitStatistics:
        c, critic = self.config, self.policy.critic
        if c.critic == "ridge":
            return ridge(critic, s, returns, damping=c.critic_damping)
        if self.optimizer is not None:
            return descend(critic, s, returns, self.optimizer, self._minibatches(len(s)))
        return gauss_newton(
            critic,
            s,
            returns,
            steps=c.critic_steps,
            cg_iterations=c.critic_cg_max_steps,
            damping=c.critic_damping,
            rows=rows,
            cg_preconditioner=c.cg_preconditioner,
        )

    def _minibatches(self, n: int) -> Iterator[Tensor]:
        """The samples of each of the critic's steps: critic_epochs times all n, in a new order each time."""
        for epoch in range(self.config.critic_epochs):
            order = noise.permutation(self.stream_seed, "critic", self.counter, n, epoch)
            yield from order.to(self.device).split(self.config.critic_batch_size)

    def _record_update(
        self,
        Psi: Scores,
        step: NaturalGradient,
        report: StepReport,
        new: Distribution,
        fit: FitStatistics,
        clock: Stopwatch,
    ) -> None:
        record, actor, c = self.logger.record, self.policy.actor, self.config
        values = {
            "kl": report.kl,
            "kl_quadratic": report.kl_quadratic,
            "kl_reverse": report.kl_reverse,
            "predicted_gain": report.predicted_gain,
            "gain": report.gain,
            "effective_samples": report.effective_samples,
            "entropy": new.entropy().mean(),
            "gradient_norm": step.gradient.norm(),
            "cosine": torch.cosine_similarity(step.gradient, step.direction, dim=0),
            "compatible_r2": step.compatible_r2,
        }
        if actor.log_std is not None:
            values["std"] = actor.log_std.bias.exp().mean()
        if self.iteration % DETAILS_EVERY == 0 and isinstance(Psi, FactoredScores):
            values["effective_dimension"] = effective_dimension(Psi, c.cg_damping)
        for name, value in zip(values, torch.stack([x.double() for x in values.values()]).tolist(), strict=True):
            record(f"train/{name}", value)
        record("train/cg_iterations", step.solution.iterations)
        record("train/cg_residual", step.solution.residual)
        record("train/rejected_updates", self.rejected_updates)
        if c.line_search:
            record("train/rejected_steps", self.rejected_steps)
        record("train/explained_variance", fit.explained_variance_before)
        record("train/critic_step", fit.step)
        for stage, seconds in clock.seconds.items():
            record(f"time/{stage}_seconds", seconds)

    def own_tensors(self) -> dict[str, Tensor]:
        """Counts, the critic's optimizer, the running inverse and the last direction, where there are such."""
        counts = (self.rejected_updates, self._rejected_in_a_row, self.rejected_steps)
        tensors = {"rejected": torch.tensor(counts)}
        if self.inverse is not None:
            tensors["inverse"] = self.inverse.inverse
        if self._last_direction is not None:
            tensors["last_direction"] = self._last_direction
        return tensors if self.optimizer is None else tensors | optimizer_tensors(self.config.critic, self.optimizer)

    def load_own_tensors(self, tensors: dict[str, Tensor]) -> None:
        if "rejected" in tensors:
            self.rejected_updates, self._rejected_in_a_row, self.rejected_steps = tensors["rejected"].tolist()
        p = sum(x.numel() for x in self.policy.actor.parameters())
        if "inverse" in tensors and self.config.fisher == "adaptive" and len(tensors["inverse"]) == p:
            kept = tensors["inverse"].clone().to(self.device)
            self.inverse = AdaptiveInverse(kept, first_order=self.config.fisher_first_order)
        if "last_direction" in tensors:
            self._last_direction = tensors["last_direction"].to(self.device)
        if self.optimizer is not None:
            load_optimizer_tensors(self.config.critic, self.optimizer, tensors)


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
