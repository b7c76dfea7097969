"""Environments whose physics lives on a device, and which answer without the host's waiting for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from envs.vector import Ids, Seeds, VectorEnv

ROOM = {"nconmax": "contacts", "njmax": "rows of constraints"}
"""Arguments of MuJoCo Warp: what each world has room for, in words."""


class Transition(NamedTuple):
    """What one step of all N environments led to, before any of them begins anew."""

    observations: Tensor
    """[N, *O]."""
    rewards: Tensor
    """[N]."""
    terminated: Tensor
    """Boolean, [N]."""
    truncated: Tensor
    """Boolean, [N]."""


class DeviceVectorEnv(VectorEnv):
    """Environments on a device, of which all N are stepped always: who takes part is said by masks, not by indices.

    No result's shape depends on data, and no number comes to the host. A subclass has the physics: `begin` and
    `advance`. What it keeps from step to step it changes in place, so that a step can be recorded as a graph; what it
    gives are tensors of their own.

    Differs from other environments: `step` takes no ids. Its info always holds "final_obs" [N, *O], what the step led
    to, and "_final_obs" [N], which environments ended. Under DISABLED, those that have ended go on unseen: they have
    the reward 0 and end no more until they are reset. Actions are not looked at; what they make infinite is found with
    the rollout.
    """

    masked = True
    tells_of_episodes = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ended = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        """Which environments have ended or never begun, [N]."""

    def begin(self, mask: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Begin the next episodes of the environments in a mask [N].

        Args:
            mask: boolean.
            seeds: of new streams of episodes, int64 [N], where the mask is; one below 0, or None in place of all:
                environments go on with their own.

        Returns:
            The current observations of all, [N, *O].
        """
        raise NotImplementedError

    def advance(self, actions: Tensor) -> Transition:
        """Step all environments by actions [N, *A]."""
        raise NotImplementedError

    def reset(
        self, *, seed: Seeds = None, ids: Ids = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        if options:
            raise ValueError(f"options is {options!r}; environments on a device take none, and ids in place of a mask.")
        rows = self._rows_of(ids)
        mask = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device).index_fill_(0, rows, True)
        seeds = None
        if seed is not None:
            seeds = torch.zeros_like(self.ended, dtype=torch.int64).index_copy_(0, rows, self._seeds(seed, rows))
        observations = self.begin(mask, seeds)
        self.ended &= ~mask
        return (observations if ids is None else observations.index_select(0, rows)), {}

    def step(self, actions: Any, ids: Ids = None) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        if ids is not None:
            raise ValueError("ids is given, but environments on a device are stepped together; leave ids out.")
        over, actions = self.ended, torch.as_tensor(actions, device=self.device)
        if tuple(actions.shape) != (expected := (self.num_envs, *(self.single_action_space.shape or ()))):
            raise ValueError(f"actions have shape {tuple(actions.shape)}; these environments take {expected}.")
        led_to, rewards, terminated, truncated = self.advance(actions)
        rewards = rewards.masked_fill(over, 0.0)
        terminated, truncated = terminated & ~over, truncated & ~over
        ended = terminated | truncated
        observations = led_to
        if self.autoreset is AutoresetMode.SAME_STEP:
            observations = self.begin(ended)
        else:
            self.ended |= ended
        return observations, rewards, terminated, truncated, {"final_obs": led_to, "_final_obs": ended}

    def _rows_of(self, ids: Ids) -> Tensor:
        """Give ids on the device; those of the host are checked, those of a device are not looked at."""
        if ids is None:
            return torch.arange(self.num_envs, device=self.device)
        index = ids if isinstance(ids, Tensor) else self._rows(ids)
        return torch.as_tensor(index, dtype=torch.int64).to(self.device)

    def _seeds(self, seed: Seeds, rows: Tensor) -> Tensor:
        """Give the seeds of rows [k], below 0 where one is None."""
        if isinstance(seed, Tensor):
            return seed.to(self.device, torch.int64)
        one = isinstance(seed, (int, np.integer))
        seeds = np.asarray([seed] if one else [-1 if s is None else s for s in seed])  # type: ignore[union-attr]
        given = seeds if one else seeds[[s is not None for s in seed]]  # type: ignore[union-attr]
        if (not one and seeds.shape != tuple(rows.shape)) or (given < 0).any():
            raise ValueError(f"seed is {seed!r}; give one int of at least 0, or one for each of {len(rows)}.")
        return rows + int(seeds[0]) if one else torch.as_tensor(seeds, dtype=torch.int64).to(self.device)
