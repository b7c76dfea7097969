"""Persistent evolution strategies and their kin: policy search on truncated episodes (Vicol et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from agents import checkpoint as saving
from agents.base import Agent
from agents.config import CommonConfig, near
from agents.evolution.engine import (
    Estimate,
    Particles,
    Scheme,
    centered_ranks,
    estimate,
    log_ranks,
    start,
    top_pairs,
    weighted,
)
from agents.evolution.policies import DeterministicPolicy, LinearPolicy, MlpPolicy
from agents.evolution.policy_search import PolicySearch, StopAsked
from agents.evolution.trials import SearchState, Trials
from agents.optim.adabound import AUTO, handover_gamma
from agents.optim.registry import load_optimizer_tensors, make_optimizer, optimizer_tensors
from agents.policy.networks import parameter_vector
from agents.policy.normalizer import Moments, whitening
from agents.rollout.buffer import FieldSpec
from envs.sb3 import SB3View
from envs.vector import SnapshotError, VectorEnv

ESTIMATORS = ("pes", "nres", "gpes", "es", "truncated_es")
OPTIMIZERS = ("sgd", "adam", "clipup", "adabound")
REWARD_SCALINGS = ("std", "ranks", "log_ranks", "none")
MOST_SURPRISE = 3.0
"""Most that a window's standard deviation of scores counts, in units of the averaged one."""
ONLY_TENSORBOARD = ("stdout", "log", "json", "csv")


@dataclass(frozen=True, kw_only=True)
class PESConfig(CommonConfig):
    """Hyperparameters of PES. An episode is the horizon T, in environment steps."""

    num_envs: int = 20
    """N, particles: two to a pair, and a third one for truncated_es, which follows the mean parameters."""
    n_steps: int = 100
    """K, the window: environment steps per particle and update."""
    gamma: float = 1.0
    """Discount per environment step since the episode's beginning."""
    estimator: str = "pes"
    """pes, nres, gpes, es (whole episodes: n_steps is the horizon) or truncated_es (biased, for comparison)."""
    horizon: int | None = None
    """T, environment steps after which a pair begins anew, a multiple of n_steps; None: the environment's time limit,
    or no limit where it has none."""
    resample_every: int | None = None
    """M, windows between new perturbations; for gpes only (Li et al. 2023)."""
    staggered: bool = True
    """Whether the pairs' first episodes are cut short, so that their phases spread evenly over the horizon."""
    sigma: float = 0.1
    """Standard deviation of a perturbation, in units of a parameter."""
    sigma_end: float | None = None
    """The same at the end of training, reached linearly; None keeps it."""
    learning_rate: float = 0.02
    """Step size. The update is learning_rate times the mean over pairs of (u+ - u-) σ ξ, with scores u in standard
    deviations: for es that is Mania et al.'s α. adam, adabound and clipup take it in units of a parameter."""
    learning_rate_end: float | None = None
    """The same at the end of training, reached linearly; None keeps it."""
    optimizer: str = "sgd"
    """sgd, adam, clipup (Toklu et al. 2020) or adabound (Luo et al. 2019)."""
    momentum: float | None = None
    """Share of the last direction that is left after an episode, also Adam's β₁; None is 0 for sgd, 0.9 for others. An
    update of K steps takes the power K/T of it."""
    beta2: float = 0.99
    """Adam's and AdaBound's β₂, per episode too."""
    final_lr: float | None = None
    """AdaBound's step size in the end; None measures it at the hand-over."""
    handover: float = 0.5
    """When AdaBound hands over from Adam to SGD, as a share of the updates that are made if no episode ends early."""
    reward_scaling: str = "std"
    """std (scores divided by their standard deviation), none, or for es only ranks (centered, Salimans et al. 2017) and
    log_ranks (those of NES and CMA-ES, in their standard deviations), which tell the best from the good and no bad from
    worse."""
    reward_memory: float = 1.0
    """Episodes over which the standard deviation is averaged; the highest average of earlier windows counts, which
    cannot re-weight the windows. 0 takes the window's own, as Mania et al. 2018 do."""
    top_directions: int | None = None
    """b, pairs that count, those with the highest scores (Mania et al. 2018); es only. None counts all."""
    alive_bonus_offset: float = 0.0
    """Added to the reward of every step when scores are summed: -1 takes away what survival alone is worth in Hopper-v5
    and Walker2d-v5 (Mania et al. 2018, section 4.3)."""
    whitening_memory: int | None = None
    """Observations over which the products of a search's normalized observations are averaged, exponentially. Once so
    many are seen, its perturbations, and with them its updates, have the inverse of that matrix for a metric: a natural
    gradient in the first layer's weights. None never does that."""
    trials: tuple[int, ...] = ()
    """Searches that are compared first, in each round of successive halving: 8 3 makes eight from the beginning, then
    goes on with the three best of them, then with the best. They are scored by the better half of their last window."""
    trial_steps: tuple[int, ...] = ()
    """Environment steps of a search in each round; schedules begin after the last one."""
    squash_actions: bool = False
    """Whether Box actions go through tanh to their bounds; otherwise they are clipped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("estimator", ESTIMATORS),
            ("optimizer", OPTIMIZERS),
            ("reward_scaling", REWARD_SCALINGS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"There is no {name} {value!r}{near(value, list(known))}")
        for name in ("sigma", "learning_rate"):
            self.require(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name, least in (("sigma_end", "above 0"), ("learning_rate_end", "of at least 0"), ("final_lr", "above 0")):
            end = getattr(self, name)
            holds = end is None or (0 <= end < math.inf if least == "of at least 0" else 0 < end < math.inf)
            self.require(name, holds, f"a number {least}, or None")
        self.require("horizon", self.horizon is None or self.horizon >= 1, "an integer of at least 1, or None")
        if self.horizon is not None and self.horizon % self.n_steps:
            raise ValueError(
                f"n_steps is {self.n_steps}, which does not divide the horizon, {self.horizon}; give a divisor."
            )
        self.require("momentum", self.momentum is None or 0 <= self.momentum < 1, "a number from 0 to below 1, or None")
        self.require("beta2", 0 <= self.beta2 < 1, "a number from 0 to below 1")
        self.require("handover", 0 < self.handover <= 1, "a share of the updates, above 0 and up to 1")
        self.require("reward_memory", self.reward_memory >= 0, "a number of at least 0")
        if (self.estimator == "gpes") != (self.resample_every is not None):
            raise ValueError(
                f"resample_every is {self.resample_every} for {self.estimator}; gpes needs it, and gpes alone."
            )
        every = self.resample_every
        self.require("resample_every", every is None or every >= 1, "an integer of at least 1")
        top = self.top_directions
        self.require("top_directions", top is None or top >= 1, "an integer of at least 1, or None")
        ranked = self.reward_scaling in ("ranks", "log_ranks")
        if self.estimator != "es" and (top is not None or ranked):
            raise ValueError(
                f"estimator is {self.estimator!r}, whose windows are parts of episodes: ranks and top_directions "
                "compare whole ones; give estimator='es', or reward_scaling='std' and top_directions=None."
            )
        if top is not None and ranked:
            raise ValueError(
                f"reward_scaling is {self.reward_scaling!r}, of all pairs; with top_directions give 'std' or 'none'."
            )
        memory = self.whitening_memory
        self.require("whitening_memory", memory is None or memory >= 1, "a number of observations, 1 or more, or None")
        if memory is not None and not self.normalize_observations:
            raise ValueError(
                f"whitening_memory is {memory}, but normalize_observations is False; only normalized observations "
                "are whitened: give whitening_memory=None, or normalize."
            )
        falling = all(more > fewer for more, fewer in pairwise((*self.trials, 0)))
        self.require("trials", falling, "ever fewer searches, 1 or more in each round, or nothing")
        self.require("trial_steps", all(steps >= 1 for steps in self.trial_steps), "integers of at least 1")
        if len(self.trials) != len(self.trial_steps):
            raise ValueError(
                f"trials has {len(self.trials)} rounds and trial_steps {len(self.trial_steps)}; give as many of each."
            )


class PES(Agent):
    """Persistent evolution strategies: θ ← θ + α/(2N σ_R) Σ (R⁺ - R⁻) σ ξ, an update after every window of K steps.

    R± are the rewards that antithetic particles θ ± ε have in the window, ξ the sum of ε/σ² since their episode began,
    σ_R the scores' standard deviation. Other estimators, optimizers and scores: see `PESConfig`. ARS is
    estimator="es" with reward_memory=0 (V2 with normalize_observations, V2-t with top_directions too); OpenAI-ES is
    estimator="es" with reward_scaling="ranks" and optimizer="adam".

    With whitening_memory perturbations σ S z have the metric of the policy's first layer, and updates are α S Sᵀ times
    the gradient: a natural one, for Gaussian actions (S: `agents.policy.normalizer.whitening`). With trials several
    searches are compared before the best goes on (`agents.evolution.trials`).

    Arguments: see `Agent` and `PESConfig`. env: num_envs particles, with autoreset disabled. Policies: "LinearPolicy"
    or "MlpPolicy", deterministic.

    Source: Vicol, Metz & Sohl-Dickstein 2021, algorithm 2, https://arxiv.org/abs/2112.13835; see
    `agents.evolution.engine` for the other estimators and their sources.

    Differs from the paper: twins that end score 0 until their pair begins anew, which is when both have ended;
    scores are divided by their standard deviation; observations are normalized inside the policy, by statistics that
    stay as they are for a pair's episode.

    Raises:
        ValueError: num_envs is no multiple of two (truncated_es: three), n_steps and the horizon do not fit, the
            environments cannot be put back where truncated_es must, or the policy is no `DeterministicPolicy`.
    """

    name: ClassVar[str] = "pes"
    Config = PESConfig
    autoreset = AutoresetMode.DISABLED
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"LinearPolicy": LinearPolicy, "MlpPolicy": MlpPolicy}
    config: PESConfig
    policy: DeterministicPolicy

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, DeterministicPolicy):
            raise ValueError(
                f"policy is {self.policy_class.__name__}; PES evaluates the policies of all particles at once, which "
                "needs one without noise or state: a subclass of agents.evolution.policies.DeterministicPolicy."
            )
        self.particles: Particles | None = None
        self.reward_variance: float | None = None
        self.highest_variance: float | None = None
        self.steps_with_mean_parameters = 0
        super()._setup_model()
        c, size = self.config, self.policy.observation_size
        self.observed = Moments(*(torch.zeros(shape, dtype=torch.float64) for shape in ((), (size,), (size, size))))
        settings: dict[str, Any] = {"lr": c.learning_rate}
        if c.optimizer == "adabound":
            settings["final_lr"] = AUTO if c.final_lr is None else c.final_lr
        self.optimizer = make_optimizer(c.optimizer, self.policy.actor.parameters(), **settings)
        self.trials = Trials(c.trials, c.trial_steps, self._search())

    def _connect(self, env: SB3View) -> None:
        self.scheme = self._scheme(env.vector)
        if self.scheme.shared:
            _require_snapshots(env.vector)
        super()._connect(env)
        c = self.config
        self.task = PolicySearch(
            env.vector,
            self._acting,
            self.buffer,
            shared=self.scheme.shared,
            products=c.whitening_memory is not None,
            gamma=c.gamma,
            offset=c.alive_bonus_offset,
        )
        self.task.began = lambda ids: self.running_episodes.restart(ids)  # type: ignore[method-assign]
        self.task.branched = self._branched  # type: ignore[method-assign]

    def _scheme(self, vector: VectorEnv) -> Scheme:
        c, n = self.config, vector.num_envs
        width = 3 if c.estimator == "truncated_es" else 2
        if n % width:
            third = " and a third one for truncated_es, with the mean parameters" if width == 3 else ""
            raise ValueError(f"num_envs is {n}; give a multiple of {width}: particles come in antithetic pairs{third}.")
        pairs, limit, horizon = n // width, _time_limit(vector), c.horizon
        if horizon is None and limit is not None:
            horizon = -(-limit // c.n_steps) * c.n_steps
        elif horizon is not None and limit is not None and horizon > limit:
            raise ValueError(
                f"horizon is {horizon}, but the environment's episodes end after {limit} steps; give None."
            )
        if c.estimator == "es" and horizon != c.n_steps:
            whole = "which have no limit: give horizon too" if horizon is None else f"give n_steps={limit or horizon}"
            raise ValueError(f"es unrolls whole episodes, but n_steps is {c.n_steps}; {whole}.")
        if c.top_directions is not None and c.top_directions > pairs:
            raise ValueError(f"top_directions is {c.top_directions}; there are {pairs} pairs.")
        return Scheme.of(
            c.estimator,
            particles=2 * pairs,
            window=c.n_steps,
            horizon=horizon,
            resample_every=c.resample_every,
            staggered=c.staggered,
        )

    def _buffer_fields(self) -> dict[str, FieldSpec]:
        return PolicySearch.fields(self.observation_space.shape or (), self.policy.normalize_observations)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        total, listener = super()._setup_learn(*args, **kwargs)
        steps = self.trials.total_steps
        if self.trials.pending and total < steps:
            warnings.warn(
                f"The trials take {steps:,} environment steps and training ends after {total:,}, with the policy of an "
                "unfinished comparison; give more steps, or trials=().",
                stacklevel=3,
            )
        return total, listener

    def _begin_episodes(self, vector: VectorEnv) -> None:
        super()._begin_episodes(vector)
        self._begin_pairs(self.iteration)

    def _begin_pairs(self, iteration: int) -> None:
        theta = parameter_vector(self._acting.actor)
        self.particles = dataclasses.replace(start(self.scheme, theta, self.stream_seed), iteration=iteration)

    def _branched(self, source: Tensor, target: Tensor) -> None:
        running = self.running_episodes
        running.returns[target], running.lengths[target] = running.returns[source], running.lengths[source]

    # Learning --------------------------------------------------------------------------------------------------------

    @property
    def sigma(self) -> float:
        """The standard deviation of a perturbation now."""
        return self._scheduled(self.config.sigma, self.config.sigma_end)

    @property
    def step_size(self) -> float:
        """The learning rate now."""
        return self._scheduled(self.config.learning_rate, self.config.learning_rate_end)

    def _scheduled(self, first: float, last: float | None) -> float:
        if last is None:
            return first
        before = self.trials.total_steps
        share = (self.num_timesteps - before) / max(self._total_timesteps - before, 1)
        return first + (last - first) * min(max(share, 0.0), 1.0)

    @property
    def updates_per_episode(self) -> float:
        """T / K; 1 where episodes have no limit."""
        return 1.0 if self.scheme.horizon is None else self.scheme.horizon / self.scheme.window

    def _collect(self, listener: BaseCallback, listens: bool, total_timesteps: int) -> bool:
        """Unroll all pairs by one window; False if a callback asked to stop."""
        assert self.observations is not None
        assert self.particles is not None
        self.task.observations = self.observations
        self.task.on_step = self._on_step(listener, total_timesteps) if listens else None
        self.window_sigma = self.sigma
        theta = parameter_vector(self._acting.actor)
        listener.on_rollout_start()
        try:
            self.found, self.particles = estimate(
                self.task, self.scheme, theta, self.window_sigma, self.particles, self._shape()
            )
        except StopAsked:
            self.observations = None  # the pairs stand somewhere within a window
            return False
        self.observations = self.task.observations
        if not listens:
            self._count_rollout()
        listener.on_rollout_end()
        return True

    def _shape(self) -> Callable[[Tensor], Tensor] | None:
        """How perturbations are shaped in the next window."""
        memory, normalizer = self.config.whitening_memory, self.policy.normalizer
        if memory is None or normalizer.count < memory:
            return None
        C = self.observed.products(normalizer.shift.cpu().double(), normalizer.scale.cpu().double())
        M = whitening(C).to(self._acting.device, torch.float32)
        return lambda noise: self._acting.whitened(noise, M)

    @torch.no_grad()
    def train(self) -> None:
        found = self.found
        assert self.particles is not None
        u, counted = self._utilities(found.scores)
        # The mean over pairs of (u⁺ - u⁻) σ ξ; an engine's estimate is ξ (u⁺ - u⁻) / 2.
        g = 2 * self.window_sigma * weighted(self.particles, u).sum(0) / counted
        self._ascend(g.to(self.device))
        if self.policy.normalize_observations:
            self._observe(self.task.moments())
        if self.scheme.shared:
            self.steps_with_mean_parameters += int(self.buffer["stepped"][:, 2::3].sum())
        self._record_update(found, g)
        better_half = found.scores.topk(len(found.scores) // 2).values.mean().item()
        if chosen := self.trials.compare(self.num_timesteps, better_half, self._search):
            self._load_search(chosen)
            self._begin_pairs(self.iteration + 1)

    def _observe(self, shards: list[Moments]) -> None:
        """Take the moments of a window's observations into the statistics."""
        if memory := self.config.whitening_memory:
            seen = sum(moments.n.item() for moments in shards)
            self.observed = self.observed.faded(math.exp(-seen / memory))
        for moments in shards:
            self.policy.normalizer.merge(Moments(*(part.to(self.device) for part in moments.columns())))
            if memory:
                self.observed = self.observed.merge(Moments(*(part.cpu() for part in moments)))

    def _utilities(self, scores: Tensor) -> tuple[Tensor, int]:
        """What scores [2n] count, and how many pairs do."""
        c = self.config
        if c.reward_scaling == "ranks":
            return centered_ranks(scores), len(scores) // 2
        if c.reward_scaling == "log_ranks":
            utilities = log_ranks(scores)
            return utilities / utilities.std(correction=0), len(scores) // 2
        counts = torch.ones(len(scores) // 2, dtype=torch.bool, device=scores.device)
        if c.top_directions is not None:
            counts = top_pairs(scores, c.top_directions)
        twins = counts.repeat_interleave(2)
        scale = self._reward_scale(scores[twins]) if c.reward_scaling == "std" else 1.0
        # Only differences matter, and they keep their digits where scores are near 0.
        return torch.where(twins, (scores - scores[twins].mean()) / scale, 0.0), int(counts.sum())

    def _reward_scale(self, scores: Tensor) -> float:
        """σ_R: the standard deviation of scores, averaged over earlier windows, at its highest; 1 where all are equal.

        An average that fell while all twins did equally well would make the next difference a huge step: the rare,
        large gradients of Reddi et al. 2018, https://arxiv.org/abs/1904.09237, who take the maximum too. It is of
        earlier windows alone, so the direction keeps its mean. Where they had next to no differences,
        `MOST_SURPRISE` bounds the first.
        """
        own, average, highest = float(scores.var(correction=0)), self.reward_variance, self.highest_variance
        memory = self.config.reward_memory * self.updates_per_episode
        kept = math.exp(-1 / memory) if memory > 0 else 0.0
        self.reward_variance = own if average is None else kept * average + (1 - kept) * own
        self.highest_variance = max(self.reward_variance, highest or 0.0)
        if own == 0.0:
            return 1.0
        return math.sqrt(own if highest is None or memory == 0 else max(highest, own / MOST_SURPRISE**2))

    def _ascend(self, g: Tensor) -> None:
        """One step of the optimizer along g [P]."""
        if not g.isfinite().all():
            raise FloatingPointError(
                "the search direction is not finite; this window changed nothing. Look for huge rewards, or give a "
                "smaller sigma."
            )
        c, share = self.config, 1 / self.updates_per_episode
        momentum = (0.9 if c.optimizer != "sgd" else 0.0) if c.momentum is None else c.momentum
        (group,) = self.optimizer.param_groups
        group["lr"] = self.step_size
        if "betas" in group:
            group["betas"] = (momentum**share, c.beta2**share)
        else:
            group["momentum"] = momentum**share if momentum else 0.0
        if c.optimizer == "adabound":
            planned = -(-self._total_timesteps // (c.n_steps * self.n_envs))
            group["gamma"] = handover_gamma(c.handover, planned)
        parameters = group["params"]
        parts = (-g).split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        if group["lr"] > 0:
            self.optimizer.step()

    def _record_update(self, found: Estimate, g: Tensor) -> None:
        record = self.logger.record
        record("train/sigma", self.window_sigma)
        record("train/learning_rate", self.step_size)
        record("train/gradient_norm", g.norm().item())
        record("train/gradient_signal_to_noise", found.signal_to_noise.item())
        record("train/score_mean", found.scores.mean().item())
        record("train/score_std", found.scores.std(correction=0).item())
        record("search/twin_deaths", self.task.terminations)
        record("search/live_twins", int((found.steps > 0).sum()))
        record("search/xi_norm", found.xi_norm.mean().item())
        record("search/phases", found.phase.cpu(), exclude=ONLY_TENSORBOARD)
        for age, norm in enumerate(found.xi_by_phase.tolist()):
            if not math.isnan(norm):
                record(f"search/xi_norm_at_age_{age:02}", norm, exclude=ONLY_TENSORBOARD)
        if self.config.trials:
            record("search/trial_round", self.trials.round)
        record("steps/perturbed", self.num_timesteps - self.steps_with_mean_parameters)
        record("steps/mean_parameters", self.steps_with_mean_parameters)

    # Acting ----------------------------------------------------------------------------------------------------------

    def act(self, observations: Tensor, deterministic: bool = True, noise: Tensor | None = None) -> Tensor:
        """Actions [n, *A] as the environment takes them; they are deterministic whatever is asked for."""
        return super().act(observations, deterministic=True)

    # Saving ----------------------------------------------------------------------------------------------------------

    def _search(self) -> SearchState:
        """What a search goes on from, apart from the pairs' episodes."""
        tensors = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self._optimizer_tensors().items()}
        return tensors | self._statistics()

    def _load_search(self, tensors: SearchState) -> None:
        self.policy.load_state_dict(saving.with_prefix(tensors, "policy."))
        self._load_optimizer_tensors(saving.with_prefix(tensors, "optimizer."))
        self._load_statistics(tensors)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.config.optimizer, self.optimizer)

    def _load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        load_optimizer_tensors(self.config.optimizer, self.optimizer, tensors)

    def _statistics(self) -> dict[str, Tensor]:
        """Those of scores, and of observations where perturbations are whitened."""
        tensors: dict[str, Tensor] = {}
        if self.reward_variance is not None:
            variances = [self.reward_variance, self.highest_variance]
            tensors["reward_variances"] = torch.tensor(variances, dtype=torch.float64)
        if self.config.whitening_memory is not None:
            tensors |= {f"observed.{name}": value for name, value in self.observed._asdict().items()}
        return tensors

    def _load_statistics(self, tensors: dict[str, Tensor]) -> None:
        self.reward_variance = self.highest_variance = None
        if "reward_variances" in tensors:
            self.reward_variance, self.highest_variance = tensors["reward_variances"].tolist()
        if held := saving.with_prefix(tensors, "observed."):
            self.observed = Moments(**held)

    def own_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, the particles, statistics, and what trials are compared with."""
        tensors = self._optimizer_tensors() | self._statistics()
        tensors["steps_with_mean_parameters"] = torch.tensor(self.steps_with_mean_parameters)
        tensors |= {f"trials.{name}": value for name, value in self.trials.tensors().items()}
        if self.particles is not None:
            values = {field.name: getattr(self.particles, field.name) for field in dataclasses.fields(Particles)}
            held = {name: value for name, value in values.items() if isinstance(value, Tensor)}
            tensors |= {f"particles.{name}": value for name, value in held.items()}
            tensors |= {f"particles.state.{name}": value for name, value in self.particles.state.items()}
        return tensors

    def load_own_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._load_optimizer_tensors(tensors)
        self._load_statistics(tensors)
        self.steps_with_mean_parameters = int(tensors["steps_with_mean_parameters"])
        self.trials.load(saving.with_prefix(tensors, "trials."))
        if held := saving.with_prefix(tensors, "particles."):
            state = saving.with_prefix(held, "state.")
            own = {name: value for name, value in held.items() if not name.startswith("state.")}
            self.particles = Particles(
                seed=self.stream_seed, iteration=self.iteration, first_pair=0, state=state, **own
            )


def _time_limit(vector: VectorEnv) -> int | None:
    """Environment steps after which episodes are truncated, where that is known."""
    limit = getattr(vector, "max_episode_steps", None)
    return limit if limit is not None else getattr(vector.spec, "max_episode_steps", None)


def _require_snapshots(vector: VectorEnv) -> None:
    """Raise ValueError unless the environments can be put into each other's state."""
    vector.reset()
    try:
        vector.restore(vector.snapshot())
    except SnapshotError as error:
        raise ValueError(
            f"estimator is 'truncated_es', which puts environments into one state, but {error} Give another estimator."
        ) from error
