"""Families of tasks as environments: each simulation with its own task.

Importing this module registers the families with Gymnasium as "families/<name>-v0".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import gymnasium
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode
from torch import Tensor

from envs.infos import row_of
from envs.mujoco.arguments import check_arguments
from envs.mujoco.batch import BatchPhysics, MujocoVectorEnv, make_task
from envs.mujoco.families import FAMILIES, POINT, Point, PointPhysics
from envs.mujoco.model import load_model
from envs.mujoco.physics import Physics
from envs.mujoco.tasks import RandomStreams
from envs.vector import Ids, Seeds, SnapshotError, TaskVectorEnv

Split = Literal["train", "held_out"]
SPLITS = ("train", "held_out")


class FamilyTasks(TaskVectorEnv):
    """Which tasks of a family its simulations have: task k of a split is fixed by (task_seed, split, k)."""

    task: Any
    model: mujoco.MjModel
    _goals: Any

    def _take_family(
        self,
        env_id: str,
        num_envs: int,
        split: Split,
        task_seed: int,
        num_tasks: int | None,
        redraw: bool,
        first: int,
        of: int | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Check the arguments, and draw the simulations' first tasks."""
        if "max_episode_steps" in kwargs:
            raise ValueError(f"max_episode_steps is not {env_id}'s own time limit; give horizon.")
        own = {"split": split, "task_seed": task_seed, "num_tasks": num_tasks, "redraw": redraw}
        check_arguments(env_id, {"split": str, "task_seed": int, "num_tasks": int | None, "redraw": bool}, own)
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; use 'train' or 'held_out'.")
        if task_seed < 0:
            raise ValueError(f"task_seed is {task_seed}; give 0 or more.")
        if num_tasks is not None and (num_tasks < 1 or redraw):
            raise ValueError(f"num_tasks is {num_tasks}; give at least 1, or None with redraw.")
        self.task, _ = make_task(FAMILIES[env_id], env_id, kwargs)
        self.model = family_model(self.task)
        self.split, self.task_seed, self.redraw = split, task_seed, redraw
        self._first, self._of = first, of or num_envs
        numbers = first + np.arange(num_envs)
        self._goals = self.draw_tasks(numbers if num_tasks is None else numbers % num_tasks)

    @property
    def tasks(self) -> np.ndarray:
        """Give each simulation's task, [num_envs, G]."""
        return self._goals.copy()

    def draw_tasks(self, numbers: Any, split: Split | None = None) -> np.ndarray:
        """Give the tasks of these numbers in a split (this environment's own: None), [n, G].

        Raises:
            ValueError: a number is negative, or the family has no held-out tasks.
        """
        split, numbers = split or self.split, np.asarray(numbers, dtype=np.int64)
        if (numbers < 0).any():
            raise ValueError(f"numbers holds {numbers.min()}; tasks are numbered from 0.")
        choices = self.task.choices
        if choices is not None:
            if split == "held_out":
                raise ValueError(
                    f"{self.task.env_id} has {len(choices)} tasks and trains on all of them: there are no held-out "
                    "tasks; ask for split='train'."
                )
            return choices[numbers % len(choices)]
        seeds = np.full(len(numbers), 2 * self.task_seed + SPLITS.index(split))
        return self.task.draw(RandomStreams(seeds, numbers, "task"), self.model)

    def _checked_tasks(self, tasks: Any, index: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Give the simulations that tasks [n, G] are for, and the tasks; all simulations where index is None.

        Raises:
            ValueError: there are not n tasks, or one is outside the family's range.
        """
        rows = np.arange(self.num_envs) if index is None else index
        tasks = np.asarray(tasks, dtype=np.float64)
        if tasks.ndim != 2 or len(tasks) != len(rows):
            raise ValueError(f"tasks has shape {tasks.shape}; give one row for each of {len(rows)} simulations.")
        inside, words = self.task.allowed(tasks, self.model)
        if not inside.all():
            first = tasks[np.flatnonzero(~inside)[0]]
            shown = first.tolist() if first.size <= 4 else f"a row of {first.size} numbers"
            raise ValueError(f"{shown} is no task of {self.task.env_id}; give {words}.")
        return rows, tasks


def family_model(task: Any) -> mujoco.MjModel:
    """Give a family's model, before any of its tasks changes it."""
    if isinstance(task, Point):
        return mujoco.MjModel.from_xml_string(POINT)
    return load_model(task.xml_file, task.solver)


class FamilyVectorEnv(FamilyTasks, MujocoVectorEnv):
    """A family of tasks, num_envs at a time, each simulation with its own task.

    Task k of a split is fixed by (task_seed, split, k). Simulation i begins with task i.

    Args:
        env_id: one of `FAMILIES`.
        num_envs: number of simulations.
        split: "train" or "held_out", which have no task in common.
        task_seed: fixes both splits.
        num_tasks: simulation i has task i modulo num_tasks; None: every simulation another one.
        redraw: whether each episode has a new task, as joint training wants: in its episode e, simulation i has task
            i + e * num_envs.
        first, of: these are the simulations from first on of so many (None: num_envs), by which tasks are numbered.
        autoreset: see `VectorEnv`.
        seed: fixes the episodes of a first reset that is given no seed.
        num_threads: physics threads; 0 means every core. Results do not depend on it.
        **kwargs: the family's own keyword arguments, and those of the body's Gymnasium environment.

    Raises:
        ValueError: an argument is not possible, or the family has no held-out tasks.
    """

    task_types: ClassVar[Mapping[str, Callable[..., Any]]] = FAMILIES
    task: Any

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        split: Split = "train",
        task_seed: int = 0,
        num_tasks: int | None = None,
        redraw: bool = False,
        first: int = 0,
        of: int | None = None,
        autoreset: AutoresetMode | str = AutoresetMode.SAME_STEP,
        seed: int | None = None,
        num_threads: int = 0,
        **kwargs: Any,
    ) -> None:
        self._take_family(env_id, num_envs, split, task_seed, num_tasks, redraw, first, of, kwargs)
        self._action_scale = self.task.action_scale
        super().__init__(
            env_id,
            num_envs,
            autoreset=autoreset,
            seed=seed,
            num_threads=num_threads,
            **kwargs,
        )
        self.metadata["render_modes"] = []
        self._apply(np.arange(num_envs))

    def set_tasks(self, tasks: Any, ids: Ids = None) -> None:
        """Give the simulations ids other tasks; see `FamilyTasks.set_tasks`."""
        rows, tasks = self._checked_tasks(tasks, self._select(ids))
        self._goals[rows] = tasks
        self._ended[rows] = True
        self._apply(rows)

    def restore(self, snapshot: dict[str, Tensor], ids: Ids = None) -> Tensor:
        if "task" in snapshot and snapshot["task"].shape[1:] != self._goals.shape[1:]:
            raise SnapshotError(f"This snapshot's tasks are not {self.task.env_id}'s; restore it to its own family.")
        observation = super().restore(snapshot, ids)
        index = self._select(ids)
        self._apply(np.arange(self.num_envs) if index is None else index)
        return observation

    def part(self, first: int, count: int, num_threads: int = 0) -> FamilyVectorEnv:
        numbered = {"first": self._first + first, "of": self._of}
        part = type(self)(**self._made_as(num_envs=count, num_threads=num_threads, **numbered))
        part.restore(self.snapshot(range(first, first + count)))
        return part

    def _apply(self, rows: np.ndarray) -> None:
        """Bring the tasks' model parameters into the physics."""
        parameters = self.task.parameters(self._goals[rows], self.model)
        if parameters and len(rows):
            assert isinstance(self._physics, BatchPhysics)
            self._physics.set_parameters(rows, parameters)

    def _begin_episodes(
        self,
        rows: np.ndarray,
        options: dict[str, Any] | None = None,
        start: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> dict[str, Any]:
        if self.redraw and start is None:
            # The episode's number goes up by 1 in super.
            self._goals[rows] = self.draw_tasks(self._first + rows + (self._episode[rows] + 1) * self._of)
            self._apply(rows)
        return super()._begin_episodes(rows, options, start)

    def _load_model(self) -> mujoco.MjModel:
        return family_model(self.task)

    def _make_physics(self, num_envs: int, num_threads: int) -> Physics:
        if isinstance(self.task, Point):
            physics: Physics = PointPhysics(self.model, num_envs, self.task.action_scale)
        else:
            physics = super()._make_physics(num_envs, num_threads)
        physics.fields["goal"] = self._goals
        return physics

    def _counters(self) -> dict[str, np.ndarray]:
        return {**super()._counters(), "task": self._goals}

    def render(self) -> tuple[Any, ...] | None:
        raise NotImplementedError(f"{self.task.env_id} is not drawn; watch the body's own environment.")


class FamilyEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One task of a family under Gymnasium's interface: task 0 of the split, so task_seed draws it.

    Arguments: see `FamilyVectorEnv`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Gymnasium declares it

    def __init__(self, env_id: str, **kwargs: Any) -> None:
        kwargs.pop("render_mode", None)
        self._vector = FamilyVectorEnv(env_id, 1, autoreset="disabled", num_threads=1, **kwargs)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def reset(self, *, seed: Seeds = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)  # type: ignore[arg-type]
        observation, info = self._vector.reset(seed=seed)
        return observation[0].numpy(), row_of(info, 0) | {"task": self._vector.tasks[0]}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self._vector.step(np.asarray(action)[None])
        return (
            observation[0].numpy().copy(),
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            row_of(info, 0),
        )

    def close(self) -> None:
        self._vector.close()


for _env_id in FAMILIES:
    gymnasium.register(_env_id, entry_point="envs.mujoco.family_env:FamilyEnv", kwargs={"env_id": _env_id})
