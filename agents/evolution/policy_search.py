"""Policies on environments as an `Unroll`: what evolution strategies search over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from agents import noise
from agents.config import CommonConfig, at_least
from agents.devices import sent
from agents.evolution.engine import Estimate, Particles, Scheme, estimate, start
from agents.evolution.unroll import ParticleState
from agents.evolution.whitening import Products
from agents.policy.base import Moments, flatten
from agents.rollout.buffer import FieldSpec
from agents.rollout.collector import Collector
from agents.rollout.device_steps import DeviceSteps
from envs.vector import SnapshotError, VectorEnv


@dataclass(frozen=True, kw_only=True)
class SearchConfig(CommonConfig):
    """How pairs of policies play. An episode is the horizon T, in environment steps."""

    estimator: Literal["pes", "nres", "gpes", "es", "truncated_es"] = "pes"
    """pes, nres, gpes, es (whole episodes: n_steps is the horizon) or truncated_es (biased, for comparison)."""
    horizon: Annotated[int, at_least(1)] | None = None
    """T, environment steps after which a pair begins anew, a multiple of n_steps; None: the environment's time limit,
    or no limit where it has none."""
    resample_every: Annotated[int, at_least(1)] | None = None
    """M, windows between new perturbations; for gpes only (Li et al. 2023)."""
    staggered: bool = True
    """Whether the pairs' first episodes are cut short, so that their phases spread evenly over the horizon."""
    alive_bonus_offset: float = 0.0
    """Added to the reward of every step when scores are summed: -1 takes away what survival alone is worth in Hopper-v5
    and Walker2d-v5 (Mania et al. 2018, section 4.3)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon is not None and self.horizon % self.n_steps:
            raise ValueError(
                f"n_steps is {self.n_steps}, which does not divide the horizon, {self.horizon}; give a divisor."
            )
        if (self.estimator == "gpes") != (self.resample_every is not None):
            raise ValueError(
                f"resample_every is {self.resample_every} for {self.estimator}; gpes needs it, and gpes alone."
            )

    def scheme(self, vector: VectorEnv) -> Scheme:
        """Say how pairs are perturbed and unrolled in these environments; ValueError if they cannot be."""
        n = vector.num_envs
        width = 3 if self.estimator == "truncated_es" else 2
        if n % width:
            third = " and a third one for truncated_es, with the mean parameters" if width == 3 else ""
            raise ValueError(f"num_envs is {n}; give a multiple of {width}: particles come in antithetic pairs{third}.")
        limit, horizon = _time_limit(vector), self.horizon
        if horizon is None and limit is not None:
            horizon = -(-limit // self.n_steps) * self.n_steps
        elif horizon is not None and limit is not None and horizon > limit:
            raise ValueError(
                f"horizon is {horizon}, but the environment's episodes end after {limit} steps; give None."
            )
        if self.estimator == "es" and horizon != self.n_steps:
            whole = "which have no limit: give horizon too" if horizon is None else f"give n_steps={limit or horizon}"
            raise ValueError(f"es unrolls whole episodes, but n_steps is {self.n_steps}; {whole}.")
        scheme = Scheme.of(
            self.estimator,
            particles=n // width * 2,
            window=self.n_steps,
            horizon=horizon,
            resample_every=self.resample_every,
            staggered=self.staggered,
        )
        if scheme.shared:
            _require_snapshots(vector)
        return scheme


class PolicySearch:
    """Policies on environments as an `Unroll`: a particle's parameters are its policy, its score the rewards.

    Particle k plays in environment k, and stays in its episode from window to window. An environment that has ended is
    stepped no more until it begins anew. Each particle keeps the observation statistics of its episode's beginning:
    other ones would change what its parameters mean.

    With a shared state three rows come from one particle k. They play in environments 3k to 3k + 2, after the first two
    have been put into the state of the third, which the particle lives in.

    Args:
        collector: of environments with autoreset disabled; keeps `fields`. Its policy is what the parameters are of.
        config: says whether rows share states, and what counts of the rewards.
        scheme: how pairs are perturbed; None: as config says.
        products: whether moments hold products of different observations.
    """

    def __init__(
        self, collector: Collector, config: SearchConfig, scheme: Scheme | None = None, *, products: bool = False
    ) -> None:
        self.collector, self.products = collector, products
        self.scheme = config.scheme(collector.vector) if scheme is None else scheme
        self.shared = config.estimator == "truncated_es"
        self.gamma, self.offset = config.gamma, config.alive_bonus_offset
        vector, policy = collector.vector, collector.policy
        n, size = vector.num_envs, len(policy.normalizer.mean)
        parameters = sum(parameter.numel() for parameter in policy.actor.parameters())
        self._theta = torch.zeros(n, parameters, device=vector.device)
        self._shift = torch.zeros(n, size, device=vector.device)
        self._scale = torch.ones(n, size, device=vector.device)
        if vector.masked:  # all act always, by what stays where it is
            choose = policy.particles(self._theta, self._shift, self._scale)
            self.collector.steps = DeviceSteps(
                vector, lambda observations, _: (choose(observations),) * 2, collector.rollout, lambda: [self._theta]
            )

    @staticmethod
    def fields(observation_shape: tuple[int, ...], normalize: bool) -> dict[str, FieldSpec]:
        """Declare what is kept of each step."""
        kept = {
            "rewards": FieldSpec(dtype=torch.float64),
            "terminated": FieldSpec(dtype=torch.bool),
            "truncated": FieldSpec(dtype=torch.bool),
            "stepped": FieldSpec(dtype=torch.bool),
        }
        return {**kept, "observations": FieldSpec(observation_shape)} if normalize else kept

    def start(self, theta: Tensor, seed: int, counter: int, first_pair: int = 0) -> Particles:
        """Make particles for the environments there are; see `engine.start`."""
        pairs = self.collector.vector.num_envs // len(self.scheme.signs)
        return start(self.scheme, theta, seed, counter=counter, first_pair=first_pair, pairs=pairs)

    def estimate(
        self, theta: Tensor, sigma: float, particles: Particles, M: Tensor | None
    ) -> tuple[Estimate, Particles]:
        """Unroll the particles by one window; see `engine.estimate`. M [O, O] shapes perturbations, or None."""
        collector = self.collector
        shape = None if M is None else partial(collector.policy.whitened, M=sent(M, theta.device))
        # An update on the particles' device asks for it all with its own numbers.
        here = theta.device.type == "cpu" or theta.device == collector.device
        return estimate(self, self.scheme, theta, sigma, particles, shape, dict if here else collector.bring)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Count, in the last window, twins that terminated and steps with the mean parameters."""
        rollout = self.collector.rollout
        with_mean = rollout["stepped"][:, 2::3] if self.shared else rollout["stepped"][:, :0]
        return rollout["terminated"].sum(), with_mean.sum()

    def init(self, keys: Tensor, slots: Tensor) -> ParticleState:
        collector, normalizer, n = self.collector, self.collector.policy.normalizer, len(slots)
        ids = 3 * slots + 2 if self.shared else slots
        assert collector.observations is not None
        collector.observations[ids], _ = collector.vector.reset(
            seed=keys if collector.vector.masked else keys.cpu().numpy(), ids=ids
        )
        collector.episodes.restart(ids)
        return {
            "steps": torch.zeros_like(slots),
            "slots": slots,
            "shift": normalizer.shift.expand(n, -1).clone(),
            "scale": normalizer.scale.expand(n, -1).clone(),
        }

    def unroll(self, theta: Tensor, state: ParticleState, window: int) -> tuple[ParticleState, Tensor, Tensor]:
        ids = self._share(state["slots"]) if self.shared else state["slots"]
        self._theta[ids], self._shift[ids], self._scale[ids] = theta, state["shift"], state["scale"]
        going: Tensor | None = None
        choose: Callable[[Tensor], Tensor]

        def act(t: int, observations: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal going, choose
            if rows is not going:
                chosen = (x.index_select(0, rows) for x in (self._theta, self._shift, self._scale))
                choose = self.collector.policy.particles(*chosen)
                going = rows
            actions = choose(observations)
            return actions, actions

        if not self.collector.fill_some(act, ids):
            raise StopAsked
        rollout = self.collector.rollout
        stepped, rewards = rollout["stepped"][:, ids], rollout["rewards"][:, ids]
        if self.offset:
            rewards = rewards + self.offset * stepped
        if self.gamma != 1.0:
            age = state["steps"] + torch.arange(window, device=ids.device)[:, None]
            rewards = rewards * self.gamma ** age.double()
        ended = (rollout["terminated"] | rollout["truncated"])[:, ids].any(0)
        # A running sum: sum adds up in an order that depends on the number of columns.
        scores = rewards.cumsum(0)[-1]
        return {**state, "steps": state["steps"] + stepped.sum(0)}, scores, ended

    def moments(self) -> list[Any]:
        """Sum up the last window's observations, for each shard of `noise.SHARD` pairs; to be merged in this order.

        They are `Products` if these were asked for, else `Moments`.
        """
        width = noise.SHARD * (3 if self.shared else 2)
        observations, stepped = self.collector.rollout["observations"], self.collector.rollout["stepped"]
        kind: type[Moments] = Products if self.products else Moments
        seen = chosen if stepped.device.type == "cpu" else masked
        return [
            kind.of(*seen(observations[:, shard], stepped[:, shard]))
            for shard in (slice(first, first + width) for first in range(0, stepped.shape[1], width))
        ]

    def _share(self, slots: Tensor) -> Tensor:
        """Put each triple of rows into the state of its third, and return their environments."""
        collector = self.collector
        ids = 3 * slots + torch.arange(3, device=slots.device).repeat(len(slots) // 3)
        source = ids[2::3]
        snapshot = collector.vector.snapshot(source)
        assert collector.observations is not None
        for twin in (0, 1):
            target = ids[twin::3]
            collector.vector.restore(snapshot, target)
            for values in (collector.observations, collector.episodes.returns, collector.episodes.lengths):
                values[target] = values[source]
        return ids


def chosen(observations: Tensor, stepped: Tensor) -> tuple[Tensor, None]:
    """Give the rows that were stepped, [k, O]: most of a window hold nothing where episodes end early."""
    return flatten(observations[stepped]), None


def masked(observations: Tensor, stepped: Tensor) -> tuple[Tensor, Tensor]:
    """Give all rows, and the mask of those that were stepped: how many these are, the host would wait to know."""
    return flatten(observations.flatten(0, 1)), stepped.flatten()


class StopAsked(Exception):  # noqa: N818, as Python's StopIteration
    """A callback asked to stop within a window."""


def _time_limit(vector: VectorEnv) -> int | None:
    """Find the environment steps after which episodes are truncated, where that is known."""
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
