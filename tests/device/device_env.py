"""Environments on a device, with environments of the CPU behind them, whose own work is not counted.

They stand for physics on a GPU: what a training does to such environments is what it would do to those.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.device import DeviceVectorEnv, Transition
from envs.vector import Ids, TaskVectorEnv, VectorEnv


class DeviceEnv(DeviceVectorEnv):
    """Environments seen from a device.

    Args:
        inner: the environments, with autoreset disabled.
        autoreset: what those on the device do.
        device: where tensors live.
        unseen: in which the environments work.
    """

    def __init__(
        self,
        inner: VectorEnv,
        autoreset: Any,
        device: torch.device | str,
        unseen: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.inner, self._unseen = inner, unseen
        spaces = inner.single_observation_space, inner.single_action_space
        super().__init__(inner.num_envs, *spaces, autoreset=autoreset, device=device)
        self.spec, self.made_from = inner.spec, inner.made_from
        if (limit := getattr(inner, "max_episode_steps", None)) is not None:
            self.max_episode_steps = limit
        self._over = np.ones(self.num_envs, dtype=bool)
        self._observations = torch.zeros(self.observation_space.shape, dtype=torch.float64)

    def begin(self, mask: Tensor, seeds: Tensor | None = None) -> Tensor:
        with self._unseen():
            rows = np.flatnonzero(mask.cpu())
            if len(rows):
                given = None if seeds is None else seeds.cpu().numpy()[rows]
                self._observations[rows] = self.inner.reset(seed=given, ids=rows)[0].double()
                self._over[rows] = False
            return self._observations.clone().to(self.device)

    def advance(self, actions: Tensor) -> Transition:
        with self._unseen():
            rows = np.flatnonzero(~self._over)
            rewards = torch.full((self.num_envs,), 7.0, dtype=torch.float64)  # of those that are over, to be masked
            terminated, truncated = (torch.ones(self.num_envs, dtype=torch.bool) for _ in range(2))
            if len(rows):
                given = actions.detach().cpu()[rows]
                observations, rewards[rows], terminated[rows], truncated[rows], _ = self.inner.step(given, rows)
                self._observations[rows] = observations.double()
                self._over = (terminated | truncated).numpy()
            parts = self._observations, rewards, terminated, truncated
            return Transition(*(x.clone().to(self.device) for x in parts))

    def snapshot(self, ids: Ids = None) -> dict[str, Tensor]:
        with self._unseen():
            return {name: x.clone().to(self.device) for name, x in self.inner.snapshot(_in(ids)).items()}

    def restore(self, snapshot: dict[str, Tensor], ids: Ids = None) -> Tensor:
        with self._unseen():
            rows = np.arange(self.num_envs) if ids is None else np.asarray(_in(ids))
            found = self.inner.restore({name: _in(value) for name, value in snapshot.items()}, rows)
            self._observations[rows], over = found.double(), _in(snapshot["ended"])
            self._over[rows] = over
            self.ended = self.ended.index_copy(0, torch.as_tensor(rows).to(self.device), over.to(self.device))
            return found.clone().to(self.device)

    @property
    def blowups(self) -> int:  # type: ignore[override]
        return self.inner.blowups

    @blowups.setter
    def blowups(self, value: int) -> None:
        self.inner.blowups = value

    def close_extras(self, **kwargs: Any) -> None:
        self.inner.close()


class DeviceTaskEnv(DeviceEnv, TaskVectorEnv):
    """The same of a family of tasks."""

    def draw_tasks(self, numbers: Any, split: Any = None) -> Any:
        return self.inner.draw_tasks(numbers, split)  # type: ignore[attr-defined]

    def set_tasks(self, tasks: Any, ids: Ids = None) -> None:
        assert ids is None
        self.inner.set_tasks(tasks)  # type: ignore[attr-defined]
        self._over[:] = True


def _in(x: Any) -> Any:
    return x.detach().cpu() if isinstance(x, Tensor) else x
