"""Steps of a policy in environments on a device, each a piece of work that a GPU can be told once and for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agents.devices import Recorded, held, memory
from agents.rollout.buffer import Rollout
from envs.vector import VectorEnv

Act = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Observations [N, *O] and noise, if any, to actions as the rollout keeps them and as the environment takes them."""


class DeviceSteps:
    """Fills rollouts by steps that read and write tensors of fixed addresses alone, and ask the device for nothing.

    On CUDA a step is recorded as a graph, of acting, physics, tasks, resets and the rollout's row together. Elsewhere
    the same function runs as it is.

    Args:
        env: its tensors live on a device.
        act: chooses actions there.
        rollout: lives there too.
        read: lists tensors that act reads and that may come to lie elsewhere.
    """

    def __init__(self, env: VectorEnv, act: Act, rollout: Rollout, read: Callable[[], list[Tensor]]) -> None:
        self.env, self.act, self.rollout, self.read = env, act, rollout, read
        self.t = torch.zeros(1, dtype=torch.int64, device=env.device)
        self.observations = torch.empty(0, device=env.device)
        self.noise: Tensor | None = None
        self.going: Tensor | None = None
        self.step = Recorded(self._step, self._read)

    @classmethod
    def of(cls, env: VectorEnv, policy: Any, rollout: Rollout) -> DeviceSteps:
        """Make those of a policy that samples."""

        def act(observations: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
            actions = policy.sampler()(observations, noise)
            return actions, policy.to_environment(actions)

        return cls(env, act, rollout, lambda: memory(policy))

    def fill(self, observations: Tensor, noise: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Make T steps of all environments; gives the observations to go on from.

        Args:
            observations: [N, *O], current in the environments.
            noise: [T, N, ...], of actions.
            ids: of environments that stand still once they have ended, those that go on, int64 [k].
        """
        self.rollout.clear()
        self.observations = held(self.observations, observations)
        if noise is not None:
            self.noise = held(self.noise, noise)
        if ids is not None:
            going = torch.zeros(self.env.num_envs, dtype=torch.bool, device=self.env.device).index_fill_(0, ids, True)
            self.going = held(self.going, going)
        self.t.zero_()
        for _ in range(self.rollout.n_steps):
            self.step()
        return self.observations

    def _step(self) -> None:
        noise, going = self.noise, self.going
        actions, taken = self.act(self.observations, None if noise is None else noise.index_select(0, self.t)[0])
        self._keep(observations=self.observations, actions=actions)
        observations, rewards, terminated, truncated, info = self.env.step(taken)
        self._keep(rewards=rewards, terminated=terminated, truncated=truncated, final_observations=info["final_obs"])
        if going is not None:
            self._keep(stepped=going)
            observations = torch.where(going.view(-1, *(1,) * (observations.ndim - 1)), observations, self.observations)
            going &= ~(terminated | truncated)
        self.observations.copy_(observations)
        self.t += 1

    def _keep(self, **values: Tensor) -> None:
        """Write a step's values into the rollout's row t, as far as it keeps them."""
        for name in values.keys() & self.rollout.specs.keys():
            field = self.rollout[name]
            field.index_copy_(0, self.t, values[name].to(field.dtype).view(1, *field.shape[1:]))

    def _read(self) -> list[Tensor]:
        own = (self.observations, self.noise, self.going)
        return [x for x in own if x is not None] + self.read()
