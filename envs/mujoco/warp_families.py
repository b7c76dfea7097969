"""Families of tasks on MuJoCo Warp: each world with its own task, and where a family has them its own body."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import mujoco_warp
import torch
import warp
from torch import Tensor

from envs.mujoco.families import FAMILIES, Point
from envs.mujoco.family_env import FamilyTasks
from envs.mujoco.warp import WarpVectorEnv
from envs.mujoco.warp_streams import in_order
from envs.vector import Ids

DERIVED = ("body_subtreemass", "body_invweight0", "dof_invweight0", "actuator_acc0")
"""What MuJoCo derives from masses and inertias."""


class WarpFamilyEnv(FamilyTasks, WarpVectorEnv):
    """A family of tasks on MuJoCo Warp, num_envs worlds at a time; world i begins with task i.

    Tasks are those of `envs.mujoco.family_env.FamilyVectorEnv`. Where they change masses, inertias, frictions and
    dampings, each world has its own, with what MuJoCo derives from them.

    Args:
        env_id: one of `envs.mujoco.families.FAMILIES`, but for the point's, which has no physics.
        num_envs: number of worlds.
        split, task_seed, num_tasks: see `FamilyVectorEnv`.
        **kwargs: the family's own keyword arguments, and those of `WarpVectorEnv`.

    Raises:
        ValueError: an argument is not possible, or the family has no held-out tasks.
    """

    task_types: ClassVar[Mapping[str, Callable[..., Any]]] = {
        name: family for name, family in FAMILIES.items() if family is not Point
    }

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        split: Any = "train",
        task_seed: int = 0,
        num_tasks: int | None = None,
        redraw: bool = False,
        **kwargs: Any,
    ) -> None:
        if redraw:
            raise ValueError("redraw is True, but tasks are drawn on the CPU; leave out redraw, or backend='warp'.")
        own = {name: kwargs[name] for name in kwargs.keys() - {"autoreset", "seed", "device", "nconmax", "njmax"}}
        self._take_family(env_id, num_envs, split, task_seed, num_tasks, redraw, 0, None, own)
        self._action_scale = self.task.action_scale
        self._tasks: Tensor
        super().__init__(env_id, num_envs, **kwargs)
        self._apply()

    def set_tasks(self, tasks: Any, ids: Ids = None) -> None:
        """Give the worlds ids other tasks; see `TaskVectorEnv.set_tasks`."""
        rows, tasks = self._checked_tasks(tasks, None if ids is None else self._rows(ids))
        self._goals[rows] = tasks
        self._tasks.copy_(torch.as_tensor(self._goals))
        self.ended[torch.as_tensor(rows, device=self.device)] = True
        self._apply()

    def restore(self, snapshot: dict[str, Tensor], ids: Ids = None) -> Tensor:
        observation = super().restore(snapshot, ids)
        self._goals = self._tasks.cpu().numpy().copy()
        self._apply()
        return observation

    def _kept(self) -> dict[str, Tensor]:
        return super()._kept() | {"_tasks": self._tasks}

    def _own_parameters(self) -> tuple[str, ...]:
        changed = self.task.parameters(self._goals[:1], self.model)
        return (*changed, *DERIVED) if changed else ()

    def _told(self, there: Callable[..., Tensor]) -> dict[str, Tensor]:
        self._tasks = there(self._goals, torch.float64)
        return {"goal": there(self._goals)}

    def _apply(self) -> None:
        """Bring the worlds' tasks where tasks are computed, and their parameters into the physics."""
        self._state.goal.copy_(self._tasks)
        if not (parameters := self.task.parameters(self._goals, self.model)):
            return
        for name, values in parameters.items():
            field = warp.to_torch(getattr(self._model, name))
            field.copy_(torch.as_tensor(values).reshape(field.shape))
        with in_order(self._warp):
            mujoco_warp.set_const(self._model, self._data)
