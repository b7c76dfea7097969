"""Persistent evolution strategies and their kin: policy search on truncated episodes (Vicol et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from torch.optim import Optimizer

from agents import noise
from agents.base import Agent
from agents.checkpoint import with_prefix
from agents.config import at_least, between
from agents.devices import sent
from agents.evolution.engine import Estimate, Particles
from agents.evolution.policies import DeterministicLinear, DeterministicMlp, DeterministicPolicy
from agents.evolution.policy_search import PolicySearch, SearchConfig, StopAsked
from agents.evolution.spread_search import SpreadParticles, SpreadSearch
from agents.evolution.trials import SearchState, Trials, TrialsConfig
from agents.evolution.update import RewardScale, UpdateConfig
from agents.evolution.whitening import Whitening, WhiteningConfig
from agents.optim.adabound import AUTO, handover_gamma
from agents.optim.registry import OptimizerState, make_optimizer
from agents.policy.networks import parameter_vector
from agents.rollout.buffer import FieldSpec
from agents.rollout.spread import SpreadCollector
from agents.saving import Stateful, load_parts, tensors_of
from envs.sb3 import SB3View
from envs.vector import VectorEnv

NOT_FINITE = "the search direction is not finite; no step was made. Give a smaller sigma."
ONLY_TENSORBOARD = ("stdout", "log", "json", "csv")


@dataclass(frozen=True, kw_only=True)
class PESConfig(TrialsConfig, WhiteningConfig, UpdateConfig, SearchConfig):
    """Hyperparameters of PES, each declared beside what it is for. An episode is the horizon T."""

    num_envs: Annotated[int, at_least(1)] = 20
    """N, particles: two to a pair, and a third one for truncated_es, which follows the mean parameters."""
    n_steps: Annotated[int, at_least(1)] = 100
    """K, the window: environment steps per particle and update."""
    gamma: Annotated[float, between(0, 1)] = 1.0
    """Discount per environment step since the episode's beginning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator != "es" and (self.top_directions is not None or self.ranked):
            raise ValueError(
                f"estimator is {self.estimator!r}, whose windows are parts of episodes: ranks and top_directions "
                "compare whole ones; give estimator='es', or reward_scaling='std' and top_directions=None."
            )


class PES(Agent):
    """Persistent evolution strategies: θ ← θ + α/(2N σ_R) Σ (R⁺ - R⁻) σ ξ, an update after every window of K steps.

    R± are the rewards that antithetic particles θ ± ε have in the window, ξ the sum of ε/σ² since their episode began,
    σ_R the scores' standard deviation. Other estimators, optimizers and scores: see `PESConfig`. ARS is
    estimator="es" with reward_memory=0 (V2 with normalize_observations, V2-t with top_directions too); OpenAI-ES is
    estimator="es" with reward_scaling="ranks" and optimizer="adam".

    With whitening_memory perturbations σ S z have the metric of the policy's first layer, and updates are α S Sᵀ times
    the gradient: a natural one, for Gaussian actions (S: `agents.evolution.whitening`). With trials several searches
    are compared before the best goes on (`agents.evolution.trials`).

    Arguments: see `Agent` and `PESConfig`. env: num_envs particles, with autoreset disabled; one gymnasium.Env is
    copied, a DummyVecEnv's and SyncVectorEnv's environments are taken out of it. Policies: "LinearPolicy" or
    "MlpPolicy", deterministic.

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
    policy_aliases: ClassVar[dict[str, Any]] = {"LinearPolicy": DeterministicLinear, "MlpPolicy": DeterministicMlp}
    policy_base = DeterministicPolicy
    config: PESConfig
    optimizer: Optimizer
    sigma: float
    trials: Trials
    policy: DeterministicPolicy
    particles: Particles | SpreadParticles | None
    whitening: Whitening | None

    # Learning --------------------------------------------------------------------------------------------------------

    def collect(self) -> Estimate | None:
        """Unroll all pairs θ ± ε by one window of K steps, from the states that the last one left them in."""
        assert self.particles is not None
        self.sigma = self._scheduled(self.config.sigma, self.config.sigma_end)
        theta = parameter_vector(self.collector.policy.actor)
        M = None if self.whitening is None else self.whitening.matrix(self.collector.policy.normalizer)  # for σ M z
        try:
            found, self.particles = self.task.estimate(theta, self.sigma, self.particles, M)
        except StopAsked:
            self.collector.observations = None  # the pairs stand somewhere within a window
            return None
        if self.config.learning_rate_end is not None or self.schedules or self.share_used is not None:
            self.collector.settle()  # a rate goes by the steps that were made
        return found

    @torch.no_grad()
    def train(self, found: Estimate) -> None:
        """θ ← θ + α g, where g is the mean over pairs of (u⁺ - u⁻) σ ξ and u the utilities of the scores R."""
        assert self.particles is not None
        if found.scores.device.type == "cpu" and not found.scores.isfinite().all():
            raise FloatingPointError("a score is not finite; this window changed nothing. Look for huge rewards.")
        u, pairs = self._utilities(found.scores)
        u = sent(u, self.collector.vector.device)
        g = 2 * self.sigma * self.particles.weighted(u).sum(0) / pairs  # weighted: ξ (u⁺ - u⁻) / 2
        finite, norm = g.isfinite().all(), g.norm()
        if g.device.type != "cpu":  # which is asked below
            g = torch.where(finite, g, 0.0)
        elif not finite:
            raise FloatingPointError(NOT_FINITE)
        alpha = self._scheduled(self.current.learning_rate, self.config.learning_rate_end)
        self._ascend(sent(g, self.device), alpha)
        if self.policy.normalize_observations:
            self._observe()
        terminated, with_mean = self.task.counts()
        asked = {"finite": finite, "norm": norm, "terminated": terminated, "with_mean": with_mean}
        asked |= {"signal_to_noise": found.signal_to_noise}
        unread = None if found.scores.device.type == "cpu" else self.particles
        if isinstance(unread, Particles):  # with the numbers comes what the next window goes by
            asked |= {name: getattr(part, name) for part in (found, unread) for name in part.TOLD}
        numbers = self.record({}, asked, final=not self.config.trials)
        if isinstance(unread, Particles):
            found = replace(found, **{name: numbers[name] for name in Estimate.TOLD})
            self.particles = replace(unread, **{name: numbers[name] for name in Particles.TOLD})
        if not numbers["finite"]:
            raise FloatingPointError(NOT_FINITE)
        self.steps_with_mean_parameters += int(numbers["with_mean"])
        metrics = found.metrics() | {
            "train/gradient_signal_to_noise": numbers["signal_to_noise"],
            "train/gradient_norm": numbers["norm"],
            "search/twin_deaths": int(numbers["terminated"]),
            "train/learning_rate": alpha,
        }
        self._record_window(metrics)
        if self.config.trials:
            self._compare(found.scores)

    def _scheduled(self, first: float, last: float | None) -> float:
        """Go linearly from first, where the trials end, to last, where training does; None stays."""
        if last is None:
            return first
        before = self.trials.total_steps
        share = (self.num_timesteps - before) / max(self._total_timesteps - before, 1)
        return first + (last - first) * min(max(share, 0.0), 1.0)

    def _utilities(self, scores: Tensor) -> tuple[Tensor, int]:
        """Say what the scores R [2n] count, and how many pairs do."""
        c, n = self.config, len(scores) // 2
        if c.reward_scaling == "ranks":
            return centered_ranks(scores), n
        if c.reward_scaling == "log_ranks":
            u = log_ranks(scores)
            return u / u.std(correction=0), n
        best = None if c.top_directions is None else top_pairs(scores, c.top_directions)
        counted = scores if best is None else scores[best]
        u = counted - counted.mean()  # only differences matter, and they keep their digits where scores are near 0
        if c.reward_scaling == "std":
            u = u / self.reward_scale.update(counted, c.reward_memory * self.scheme.windows)
        return (u, n) if best is None else (torch.zeros_like(scores).index_copy(0, best, u), len(best) // 2)

    def _ascend(self, g: Tensor, alpha: float) -> None:
        """Let the optimizer make a step of size α along g [P]."""
        c, share = self.config, 1 / self.scheme.windows
        momentum = (0.9 if c.optimizer != "sgd" else 0.0) if c.momentum is None else c.momentum
        (group,) = self.optimizer.param_groups
        group["lr"] = alpha
        # Those of an episode, for the window's share of it.
        if "betas" in group:
            group["betas"] = (momentum**share, c.beta2**share)
        else:
            group["momentum"] = momentum**share if momentum else 0.0
        if c.optimizer == "adabound":
            planned = -(-self._total_timesteps // self.steps_per_iteration)
            group["gamma"] = handover_gamma(c.handover, planned)
        parts = (-g).split([parameter.numel() for parameter in group["params"]])
        for parameter, part in zip(group["params"], parts, strict=True):
            parameter.grad = part.view_as(parameter)
        if alpha > 0:
            self.optimizer.step()

    def _observe(self) -> None:
        """Take the window's observations into the statistics, which new episodes will be normalized by."""
        shards = self.task.moments()
        for moments in shards if self.whitening is None else self.whitening.observe(shards):
            self.policy.normalizer.merge(moments.to(self.device))

    def _compare(self, scores: Tensor) -> None:
        """Score the search that runs by the better half of its policies, and go on with another if it is over."""
        better_half = scores.topk(len(scores) // 2).values.mean().item()
        if chosen := self.trials.compare(self.num_timesteps, better_half, self._search):
            self.policy.load_state_dict(with_prefix(chosen, "policy."))
            load_parts(self._statistics(), chosen)
            self._begin_pairs(self.counter + 1)

    def _begin_pairs(self, counter: int) -> None:
        theta = parameter_vector(self.collector.policy.actor)
        self.particles = self.task.start(theta, self.stream_seed, counter)

    def act(self, observations: Tensor, deterministic: bool = True, noise: Tensor | None = None) -> Tensor:
        """Choose actions [n, *A] as the environment takes them; they are deterministic whatever is asked for."""
        return super().act(observations, deterministic=True)

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self.particles = None
        self.steps_with_mean_parameters = 0
        super()._setup_model()
        c, memory = self.config, self.config.whitening_memory
        settings = {"final_lr": AUTO if c.final_lr is None else c.final_lr} if c.optimizer == "adabound" else {}
        self.optimizer = make_optimizer(c.optimizer, self.policy.actor.parameters(), lr=c.learning_rate, **settings)
        if memory is not None and not self.policy.normalize_observations:
            raise ValueError(
                f"whitening_memory is {memory}, but observations are {self.observation_space}; only normalized ones, "
                "those of a Box, are whitened: give whitening_memory=None."
            )
        self.reward_scale = RewardScale()
        self.whitening = None if memory is None else Whitening(memory, self.policy.observation_size)
        self.trials = Trials(c.trials, c.trial_steps, self._search())

    def _connect(self, env: SB3View) -> None:
        c = self.config
        self.scheme = c.scheme(env.vector)
        if c.top_directions is not None and c.top_directions > (pairs := self.scheme.particles // 2):
            raise ValueError(f"top_directions is {c.top_directions}; there are {pairs} pairs.")
        super()._connect(env)
        if isinstance(self.particles, Particles):  # a file's, which come before the environments
            self.particles = self.particles.to(env.vector.device)
        products = c.whitening_memory is not None
        if isinstance(self.collector, SpreadCollector):
            self.task: Any = SpreadSearch(self.collector, c, self.scheme, products=products)
        else:
            self.task = PolicySearch(self.collector, c, self.scheme, products=products)

    def shard_width(self, vector: VectorEnv) -> int:
        return noise.SHARD * len(self.scheme.signs)

    def _buffer_fields(self) -> dict[str, FieldSpec]:
        return PolicySearch.fields(self.observation_space.shape or (), self.policy.normalize_observations)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        total, listener = super()._setup_learn(*args, **kwargs)
        self.trials.expect(total)
        return total, listener

    def _begin_episodes(self) -> None:
        super()._begin_episodes()
        self._begin_pairs(self.counter)

    # Logging and saving ----------------------------------------------------------------------------------------------

    def _record_window(self, metrics: dict[str, float | Tensor]) -> None:
        metrics |= {
            "train/sigma": self.sigma,
            "steps/perturbed": self.num_timesteps - self.steps_with_mean_parameters,
            "steps/mean_parameters": self.steps_with_mean_parameters,
        }
        if self.config.trials:
            metrics["search/trial_round"] = self.trials.round
        for name, value in metrics.items():
            shown = "_at_age_" not in name and not isinstance(value, Tensor)
            self.logger.record(name, value, exclude=None if shown else ONLY_TENSORBOARD)

    def _search(self) -> SearchState:
        """Give what a search goes on from, apart from the pairs' episodes."""
        policy = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        return policy | tensors_of(self._statistics())

    def _statistics(self) -> dict[str, Stateful]:
        optimizer = OptimizerState(self.config.optimizer, self.optimizer)
        found: dict[str, Stateful] = {"optimizer": optimizer, "reward_scale": self.reward_scale}
        return found if self.whitening is None else found | {"whitening": self.whitening}

    def parts(self) -> dict[str, Stateful]:
        return self._statistics() | {"trials": self.trials}

    def own_tensors(self) -> dict[str, Tensor]:
        """Give what the parts keep, the particles, and their count of steps."""
        tensors = super().own_tensors() | {"mean_parameters.steps": torch.tensor(self.steps_with_mean_parameters)}
        held = {} if self.particles is None else self.particles.tensors()
        return tensors | {f"particles.{name}": value for name, value in held.items()}

    def load_own_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `own_tensors` gave."""
        super().load_own_tensors(tensors)
        self.steps_with_mean_parameters = int(tensors["mean_parameters.steps"])
        if held := with_prefix(tensors, "particles."):
            self.particles = Particles.of(held, self.stream_seed, self.counter)


def centered_ranks(scores: Tensor) -> Tensor:
    """Rank scores [n] from -1/2 for the lowest to 1/2 for the highest; equal scores share their mean rank.

    Source: Salimans et al. 2017, section 2, https://arxiv.org/abs/1703.03864. A monotone rescaling of scores changes
    nothing; what is maximized is not the mean score.
    """
    n, ordered = len(scores), scores.sort().values
    below, upto = torch.searchsorted(ordered, scores), torch.searchsorted(ordered, scores, right=True)
    return (below - (n - upto)).double() / max(2 * (n - 1), 1)


def log_ranks(scores: Tensor) -> Tensor:
    """Give utilities of scores [n] that fall with the logarithm of the rank, alike for the lower half; their sum is 0.

    Source: Wierstra et al. 2014, section 3.1, https://jmlr.org/papers/v15/wierstra14a.html; the weights are those of
    Hansen & Ostermeier 2001. Of equal scores the first ranks highest.
    """
    n = len(scores)
    ranks = torch.empty_like(scores, dtype=torch.float64)
    order = scores.argsort(descending=True, stable=True)
    ranks[order] = torch.arange(1, n + 1, dtype=torch.float64, device=scores.device)
    weights = (math.log(n / 2 + 1) - ranks.log()).clamp(min=0)
    return weights / weights.sum() - 1 / n


def top_pairs(scores: Tensor, count: int) -> Tensor:
    """Choose the count of n pairs with the highest better twin, by their scores [2n]: the twins' rows, [2 count].

    Source: Mania et al. 2018, algorithm 2, line 7, https://arxiv.org/abs/1803.07055. Of equal pairs the first are kept.
    """
    order = scores.view(-1, 2).amax(1).argsort(descending=True, stable=True)
    first = 2 * order[:count].sort().values
    return torch.stack((first, first + 1), dim=1).flatten()
