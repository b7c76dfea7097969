"""Policies on environments as an `Unroll`: what evolution strategies search over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from agents import noise
from agents.evolution.policies import DeterministicPolicy
from agents.evolution.unroll import State
from agents.policy.normalizer import Moments
from agents.rollout.buffer import FieldSpec, Rollout
from agents.rollout.collector import Step, collect_some
from envs.vector import VectorEnv


class StopAsked(Exception):  # noqa: N818, as Python's StopIteration
    """A callback asked to stop within a window."""


class PolicySearch:
    """Policies on environments as an `Unroll`: a particle's parameters are its policy, its score the rewards.

    Particle k plays in environment k, and stays in its episode from window to window. An environment that has ended is
    stepped no more until it begins anew. Each particle keeps the observation statistics of its episode's beginning:
    other ones would change what its parameters mean.

    With a shared state three rows come from one particle k. They play in environments 3k to 3k + 2, after the first two
    have been put into the state of the third, which the particle lives in.

    Args:
        vector: with autoreset disabled.
        policy: what the parameters are those of; lives where the environments do.
        buffer: for windows of all environments, with `fields`.
        shared: whether rows share states.
        products: whether moments hold products of different observations.
        gamma: discount per environment step.
        offset: added to the reward of every step.
    """

    observations: Tensor
    """Current in the environments, [N, *O]."""
    on_step: Callable[[Step], bool] | None = None
    """Called after each step; False stops the window, which raises `StopAsked`."""

    def __init__(
        self,
        vector: VectorEnv,
        policy: DeterministicPolicy,
        buffer: Rollout,
        *,
        shared: bool = False,
        products: bool = False,
        gamma: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        self.vector, self.policy, self.buffer = vector, policy, buffer
        self.shared, self.products, self.gamma, self.offset = shared, products, gamma, offset
        n, size = vector.num_envs, len(policy.normalizer.mean)
        parameters = sum(parameter.numel() for parameter in policy.actor.parameters())
        self._theta = torch.zeros(n, parameters, device=vector.device)
        self._shift = torch.zeros(n, size, device=vector.device)
        self._scale = torch.ones(n, size, device=vector.device)

    @staticmethod
    def fields(observation_shape: tuple[int, ...], normalize: bool) -> dict[str, FieldSpec]:
        """What the buffer keeps of each step."""
        kept = {
            "rewards": FieldSpec(dtype=torch.float64),
            "terminated": FieldSpec(dtype=torch.bool),
            "truncated": FieldSpec(dtype=torch.bool),
            "stepped": FieldSpec(dtype=torch.bool),
        }
        return {**kept, "observations": FieldSpec(observation_shape)} if normalize else kept

    def init(self, keys: Tensor, slots: Tensor) -> State:
        ids = 3 * slots + 2 if self.shared else slots
        first, _ = self.vector.reset(seed=keys.cpu().numpy(), ids=ids)
        self.observations[ids] = first
        self.began(ids)
        normalizer, n = self.policy.normalizer, len(slots)
        return {
            "steps": torch.zeros_like(slots),
            "slots": slots,
            "shift": normalizer.shift.expand(n, -1).clone(),
            "scale": normalizer.scale.expand(n, -1).clone(),
        }

    def began(self, ids: Tensor) -> None:
        """Called where environments begin an episode."""

    def branched(self, source: Tensor, target: Tensor) -> None:
        """Called where environments go on with other ones' episodes."""

    def unroll(self, theta: Tensor, state: State, window: int) -> tuple[State, Tensor, Tensor]:
        ids = self._share(state["slots"]) if self.shared else state["slots"]
        self._theta[ids], self._shift[ids], self._scale[ids] = theta, state["shift"], state["scale"]
        going: Tensor | None = None
        choose: Callable[[Tensor], Tensor]

        def act(t: int, observations: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal going, choose
            if rows is not going:
                chosen = (x.index_select(0, rows) for x in (self._theta, self._shift, self._scale))
                choose = self.policy.particles(*chosen)
                going = rows
            actions = choose(observations)
            return actions, actions

        # Callbacks, where there are any, see ordinary tensors.
        with torch.inference_mode(self.on_step is None):
            observations = collect_some(self.vector, act, self.buffer, self.observations, ids, self.on_step)
        if observations is None:
            raise StopAsked
        self.observations = observations.clone()

        stepped, rewards = self.buffer["stepped"][:, ids], self.buffer["rewards"][:, ids]
        if self.offset:
            rewards = rewards + self.offset * stepped
        if self.gamma != 1.0:
            age = state["steps"] + torch.arange(window, device=ids.device)[:, None]
            rewards = rewards * self.gamma ** age.double()
        ended = (self.buffer["terminated"] | self.buffer["truncated"])[:, ids].any(0)
        # A running sum: sum adds up in an order that depends on the number of columns.
        scores = rewards.cumsum(0)[-1]
        return {**state, "steps": state["steps"] + stepped.sum(0)}, scores, ended

    def moments(self) -> list[Moments]:
        """Of the last window's observations, for each shard of `noise.SHARD` pairs; to be merged in this order."""
        width = noise.SHARD * (3 if self.shared else 2)
        observations, stepped = self.buffer["observations"], self.buffer["stepped"]
        # Chosen rows: most rows of a window hold nothing where episodes end early.
        return [
            Moments.of(observations[:, shard][stepped[:, shard]].flatten(1), self.products)
            for shard in (slice(first, first + width) for first in range(0, self.buffer.num_envs, width))
        ]

    @property
    def terminations(self) -> int:
        """Episodes that ended in the last window, other than by a time limit."""
        return int(self.buffer["terminated"].sum())

    def _share(self, slots: Tensor) -> Tensor:
        """The environments of triples of rows, each put into the state of its third."""
        ids = 3 * slots + torch.arange(3, device=slots.device).repeat(len(slots) // 3)
        source = ids[2::3]
        snapshot = self.vector.snapshot(source)
        for twin in (0, 1):
            target = ids[twin::3]
            self.vector.restore(snapshot, target)
            self.observations[target] = self.observations[source]
            self.branched(source, target)
        return ids
