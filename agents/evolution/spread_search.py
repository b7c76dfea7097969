"""Policy search whose pairs play on an executor's workers, in shards of `noise.SHARD` pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.evolution.engine import Estimate, Particles, Scheme, join
from agents.evolution.policy_search import PolicySearch, SearchConfig
from agents.policy.networks import parameter_vector
from agents.rollout.collector import single_thread
from agents.rollout.spread import Acting, Report, Shard, SpreadCollector


@dataclass
class _Search:
    """What a shard keeps."""

    config: SearchConfig
    scheme: Scheme
    products: bool
    particles: Any = None

    def task(self, shard: Shard) -> PolicySearch:
        """Give the shard's environments as an `Unroll`."""
        return PolicySearch(shard.collector, self.config, self.scheme, products=self.products)


class SpreadParticles:
    """`Particles` that are with the shards.

    Attributes:
        counter: windows before the next one.
        returned: what they keep, once they are here again; None: they are not.
    """

    def __init__(self, search: SpreadSearch, counter: int) -> None:
        self.search, self.counter = search, counter
        self.returned: dict[str, Tensor] | None = None
        search.collector.vector.on_return = self._return

    def weighted(self, utilities: Tensor) -> Tensor:
        """Return `Particles.weighted` of all shards, [shards, P]."""
        collector, width = self.search.collector, len(self.search.scheme.signs)
        own = [(utilities[2 * (x.start // width) : 2 * (x.stop // width)],) for x in collector.shards]
        return torch.cat(collector.each(_weighted, own=own, alters=False))

    def tensors(self) -> dict[str, Tensor]:
        """Return `Particles.tensors` of all."""
        if self.returned is not None:
            return self.returned
        parts = self.search.collector.each(_tensors, alters=False)
        moved = [_renumbered(part, first) for part, first in zip(parts, self.search.slots, strict=True)]
        return {name: torch.cat([part[name] for part in moved]) for name in moved[0]}

    def _return(self) -> None:
        self.returned = self.tensors()


class SpreadSearch:
    """Does as `PolicySearch`, with pairs that play and stay on the workers.

    To a shard go in each window the policy, σ and M, then the utilities; noise is drawn there. From it come scores,
    sums over pairs and moments. Perturbations, their sums and the simulations stay.

    Args:
        collector, config, scheme, products: see `PolicySearch`.
    """

    def __init__(self, collector: SpreadCollector, config: SearchConfig, scheme: Scheme, *, products: bool) -> None:
        self.collector, self.scheme = collector, scheme
        self._search = _Search(config, scheme, products)
        self._moments: list[Any] = []
        self._counts: tuple[Any, Any] = 0, 0

    @property
    def slots(self) -> list[int]:
        """Give the number of each shard's first state among all."""
        return [x.start // len(self.scheme.signs) * self.scheme.states for x in self.collector.shards]

    def start(self, theta: Tensor, seed: int, counter: int) -> SpreadParticles:
        """Have all pairs begin anew, at the policy's parameters."""
        self.collector.each(_start, self.collector.acting(), self._search, counter)
        return SpreadParticles(self, counter)

    def estimate(
        self, theta: Tensor, sigma: float, particles: Particles | SpreadParticles, M: Tensor | None
    ) -> tuple[Estimate, SpreadParticles]:
        """Unroll all pairs by one window at the policy's parameters, see `PolicySearch.estimate`."""
        self.collector.refuse_listener()
        if isinstance(particles, Particles) or particles.returned is not None:
            particles = self._send(particles.tensors(), particles.counter)
        found = self.collector.each(_estimate, self.collector.acting(), sigma, M)
        reports, estimates, moments, counts = zip(*found, strict=True)
        self.collector.take(reports)
        self._moments = [one for few in moments for one in few]
        deaths, with_mean = zip(*counts, strict=True)
        self._counts = sum(deaths), sum(with_mean)
        particles.counter += 1
        return join(estimates), particles

    def _send(self, held: dict[str, Tensor], counter: int) -> SpreadParticles:
        """Have the shards go on with particles that are here."""
        width, states = len(self.scheme.signs), self.scheme.states
        own = []
        for shard, slot in zip(self.collector.shards, self.slots, strict=True):
            pairs = slice(shard.start // width, shard.stop // width)
            rows = slice(pairs.start * states, pairs.stop * states)
            part = {name: x[rows if name.startswith("state.") else pairs] for name, x in held.items()}
            own.append((_renumbered(part, -slot),))
        self.collector.each(_load, self._search, counter, own=own)
        return SpreadParticles(self, counter)

    def moments(self) -> list[Any]:
        """Give the last window's, shard by shard."""
        return self._moments

    def counts(self) -> tuple[Tensor, Tensor]:
        """Count, in the last window, twins that terminated and steps with the mean parameters."""
        return self._counts


def _start(shard: Shard, acting: Acting, search: _Search, counter: int) -> None:
    shard.act_as(acting)
    search = _Search(search.config, search.scheme, search.products)
    first, seed = shard.first // len(search.scheme.signs), shard.collector.agent.stream_seed  # type: ignore[attr-defined]
    search.particles = search.task(shard).start(parameter_vector(shard.policy.actor), seed, counter, first)
    shard.inside = search


def _load(shard: Shard, search: _Search, counter: int, tensors: dict[str, Tensor]) -> None:
    first, seed = shard.first // len(search.scheme.signs), shard.collector.agent.stream_seed  # type: ignore[attr-defined]
    shard.inside = _Search(search.config, search.scheme, search.products)
    shard.inside.particles = Particles.of(tensors, seed, counter, first)


def _estimate(
    shard: Shard, acting: Acting, sigma: float, M: Tensor | None
) -> tuple[Report, Estimate, list[Any], tuple[Tensor, Tensor]]:
    shard.act_as(acting)
    search = shard.inside
    task, theta = search.task(shard), parameter_vector(shard.policy.actor)
    with single_thread():
        found, search.particles = task.estimate(theta, sigma, search.particles, M)
        moments = task.moments() if shard.policy.normalize_observations else []
    return shard.collector.report(), found, moments, task.counts()


def _weighted(shard: Shard, utilities: Tensor) -> Tensor:
    with single_thread():
        weighted: Tensor = shard.inside.particles.weighted(utilities)
    return weighted


def _tensors(shard: Shard) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = shard.inside.particles.tensors()
    return tensors


def _renumbered(tensors: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """Count slots, which a shard counts from its own first one, from another."""
    return {name: x + by if name == "state.slots" else x for name, x in tensors.items()}
