"""A `VectorEnv` whose tensors live on a device, with environments of the CPU behind it, whose own work is not counted.

It stands for physics on a GPU: what a training does to such environments is what it would do to those.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from envs.vector import Ids, Seeds, TaskVectorEnv, VectorEnv


class DeviceEnv(VectorEnv):
    """Environments seen from a device: actions and ids may be tensors there, and results are.

    Args:
        inner: the environments.
        device: where tensors live.
        unseen: in which the environments work.
    """

    tells_of_episodes = False

    def __init__(
        self, inner: VectorEnv, device: torch.device | str, unseen: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.inner, self._unseen = inner, unseen
        spaces = inner.single_observation_space, inner.single_action_space
        super().__init__(inner.num_envs, *spaces, autoreset=inner.autoreset, device=device)
        self.spec, self.made_from = inner.spec, inner.made_from
        if (limit := getattr(inner, "max_episode_steps", None)) is not None:
            self.max_episode_steps = limit

    def _out(self, x: Any) -> Any:
        """Give tensors on the device, in dicts too."""
        if isinstance(x, dict):
            return {name: self._out(value) for name, value in x.items()}
        return x.clone().to(self.device) if isinstance(x, Tensor) else x

    def reset(
        self, *, seed: Seeds = None, ids: Ids = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        with self._unseen():
            observations, _ = self.inner.reset(seed=_in(seed), ids=_in(ids), options=options)
            return self._out(observations), {}

    def step(self, actions: Any, ids: Ids = None) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        with self._unseen():
            *tensors, info = self.inner.step(_in(actions), _in(ids))
            final = {name: self._out(info[name]) for name in ("final_obs", "_final_obs") if name in info}
            return (*(self._out(x) for x in tensors), final)  # type: ignore[return-value]

    def snapshot(self, ids: Ids = None) -> dict[str, Tensor]:
        with self._unseen():
            return self._out(self.inner.snapshot(_in(ids)))

    def restore(self, snapshot: dict[str, Tensor], ids: Ids = None) -> Tensor:
        with self._unseen():
            return self._out(self.inner.restore({name: _in(value) for name, value in snapshot.items()}, _in(ids)))

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
        self.inner.set_tasks(tasks, _in(ids))  # type: ignore[attr-defined]


def _in(x: Any) -> Any:
    return x.detach().cpu() if isinstance(x, Tensor) else x
