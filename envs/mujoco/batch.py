"""The MuJoCo tasks as a VectorEnv: physics on all CPU cores, tasks in NumPy, tensors that share its memory."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from mujoco.batch import Batch
from torch import Tensor

from envs.infos import LazyInfo, step_info, with_masks
from envs.mujoco.arguments import check_arguments
from envs.mujoco.model import load_model
from envs.mujoco.newton import NEWTON_TASKS
from envs.mujoco.physics import DIVERGED, SILENT, Physics, ThreadedPhysics
from envs.mujoco.spatial import SPATIAL_TASKS
from envs.mujoco.tasks import PLANAR_TASKS, RandomStreams, Task
from envs.vector import Ids, SeededVectorEnv, SnapshotError

TASKS: dict[str, Callable[..., Task]] = {task.env_id: task for task in (*PLANAR_TASKS, *SPATIAL_TASKS)}
"""Gymnasium id -> the class of its task."""

RENDER_MODES = ["human", "rgb_array", "depth_array", "rgbd_tuple"]
"""Gymnasium's renderer's."""
_RENDER_KWARGS = frozenset(
    {
        "render_mode",
        "width",
        "height",
        "camera_id",
        "camera_name",
        "default_camera_config",
        "max_geom",
        "visual_options",
    }
)


class MujocoVectorEnv(SeededVectorEnv):
    """One of Gymnasium's MuJoCo -v5 tasks, num_envs at a time.

    For the same reset states and actions it equals Gymnasium's own environment bit for bit.

    Args:
        env_id: one of `envs.mujoco.TASKS`, or of `envs.mujoco.newton`.
        num_envs: number of simulations.
        autoreset: see `VectorEnv`.
        seed: fixes the episodes of a first reset that is given no seed.
        num_threads: physics threads; 0 means every core. Results do not depend on it.
        max_episode_steps: time limit in environment steps; None takes Gymnasium's for this id.
        **kwargs: the Gymnasium environment's own keyword arguments.
    """

    task_types: ClassVar[Mapping[str, Callable[..., Task]]] = TASKS | {task.env_id: task for task in NEWTON_TASKS}
    tells_of_episodes = False
    _made_with: tuple[tuple[Any, ...], dict[str, Any]]
    _action_scale: float = 1.0
    """Factor between actions, which are paid for, and controls."""

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        autoreset: AutoresetMode | str = AutoresetMode.SAME_STEP,
        seed: int | None = None,
        num_threads: int = 0,
        max_episode_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        own = {"num_threads": num_threads, "max_episode_steps": max_episode_steps}
        self.task, self._render_kwargs = make_task(self.task_types[env_id], env_id, kwargs, own)
        self.spec = gymnasium.spec(env_id)
        self.max_episode_steps = max_episode_steps or default_limit(self.task, self.spec)
        self.model = self._load_model()
        self._physics = self._make_physics(num_envs, num_threads)
        self._period = self.model.opt.timestep * self.task.frame_skip
        self._rest = self.model.qpos0.copy(), np.zeros(self.model.nv)

        self._physics.set_state(np.arange(num_envs), *(np.tile(x, (num_envs, 1)) for x in self._rest))
        state = SimpleNamespace(**self._physics.fields)
        observation = self.task.observe(np, state, self.model)
        self._position = self.task.position(np, state, self.model)
        super().__init__(num_envs, *spaces_of(self.model, observation), autoreset=autoreset, seed=seed)
        self._observation[:] = observation
        self.metadata |= {"render_modes": RENDER_MODES, "render_fps": round(1.0 / self.dt)}
        self.render_mode = self._render_kwargs.get("render_mode")
        self._renderer: gymnasium.Env | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        self._made_with = args, kwargs
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as the arguments that made it and a snapshot: simulations live outside of Python's reach."""
        args, kwargs = self._made_with
        kept = {"snapshot": self.snapshot(), "blowups": self.blowups, "made_from": self.made_from}
        return partial(type(self), *args, **kwargs), (), kept

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.restore(kept["snapshot"])
        self.blowups, self.made_from = kept["blowups"], kept["made_from"]

    def _load_model(self) -> mujoco.MjModel:
        return load_model(self.task.xml_file, self.task.solver)

    def _make_physics(self, num_envs: int, num_threads: int) -> Physics:
        fields = self.task.fields()
        physics_type = ThreadedPhysics if "cfrc_ext" in fields else BatchPhysics
        return physics_type(self.model, num_envs, fields, num_threads)

    @property
    def dt(self) -> float:
        """Give the seconds of simulated time per step."""
        return float(self._period)

    def step(self, actions: Any, ids: Ids = None) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        index = None if ids is None else self._select(ids)
        rows: Any = slice(None) if index is None else index
        actions = actions.detach().cpu().numpy() if isinstance(actions, Tensor) else np.asarray(actions)
        n = self.num_envs if index is None else len(index)
        if actions.shape != (n, self.model.nu) or actions.dtype != np.float32 or not np.isfinite(actions).all():
            actions = self._check_actions(actions, n)
        if self._ended[rows].any():
            raise ValueError(
                f"environments {np.flatnonzero(self._ended).tolist()} have ended or never begun; reset them first."
            )

        controls = actions if self._action_scale == 1.0 else actions * np.float32(self._action_scale)
        diverged = self._physics.step(controls, self.task.frame_skip, index)
        state = SimpleNamespace(**{name: field[rows] for name, field in self._physics.fields.items()})
        observation = self.task.observe(np, state, self.model)
        velocity = None
        if self._position is not None:
            position = self.task.position(np, state, self.model)
            velocity = (position - self._position[rows]) / self._period
            self._position[rows] = position
        reward, terminated, terms = self.task.reward(np, state, self.model, actions, velocity)
        if terminated is None:
            terminated = np.zeros(n, dtype=bool)
        if diverged is not None:
            # MuJoCo has put a diverged simulation back to its default state, which is no successor of anything: the
            # episode ends where it last stood, as a termination without reward.
            self.blowups += int(diverged.sum())
            observation[diverged] = self._observation[rows][diverged]
            reward[diverged] = 0.0
            terminated = terminated | diverged
            terms["diverged"] = diverged
        # Copies, where the fields are the physics' own: they move on.
        told = state if index is not None else SimpleNamespace(**{x: getattr(state, x).copy() for x in self.task.tells})
        where = partial(self.task.where, np, told, self.model)

        self._elapsed[rows] += 1
        truncated = self._elapsed[rows] >= self.max_episode_steps
        ended = terminated | truncated
        self._observation[rows] = observation
        final, began = {}, None
        if ended.any():
            self._ended[rows] = ended
            if self.autoreset is AutoresetMode.SAME_STEP:
                final = {"final_obs": torch.from_numpy(observation), "_final_obs": torch.from_numpy(ended)}
                began = self._begin_episodes(np.flatnonzero(ended) if index is None else index[ended])
                observation = self._observation[rows].copy()
        tensors = (torch.from_numpy(x) for x in (observation, reward, terminated, truncated))
        info = LazyInfo(final)
        info.make = partial(step_info, where, terms, ended, began)
        return (*tensors, info)  # type: ignore[return-value]

    def _begin_episodes(
        self,
        rows: np.ndarray,
        options: dict[str, Any] | None = None,
        start: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> dict[str, Any]:
        """Begin the next episodes of the simulations rows, or episodes that start at qpos [n, nq] and qvel [n, nv]."""
        if start is None:
            self._episode[rows] += 1
            random = RandomStreams(self._seed[rows], self._episode[rows])
            start = self.task.initial_state(np, random, *self._rest)
        self._physics.set_state(rows, *start)
        state = SimpleNamespace(**{name: field[rows] for name, field in self._physics.fields.items()})
        self._observation[rows] = self.task.observe(np, state, self.model)
        if self._position is not None:
            self._position[rows] = self.task.position(np, state, self.model)
        self._elapsed[rows] = 0
        self._ended[rows] = False
        info = LazyInfo()
        info.make = lambda: with_masks(self.task.where(np, state, self.model), np.ones(len(rows), dtype=bool))
        return info

    def set_state(self, qpos: Any, qvel: Any, ids: Ids = None) -> Tensor:
        """Begin an episode of the environments ids at a given state, as Gymnasium's `set_state` after a reset.

        Args:
            qpos: [n, nq].
            qvel: [n, nv].
            ids: [n] distinct indices, or None for all.

        Returns:
            Observations [n, O].
        """
        index = self._select(ids)
        rows = np.arange(self.num_envs) if index is None else index
        qpos, qvel = np.asarray(qpos, dtype=np.float64), np.asarray(qvel, dtype=np.float64)
        expected = (len(rows), self.model.nq), (len(rows), self.model.nv)
        if (qpos.shape, qvel.shape) != expected:
            raise ValueError(
                f"qpos and qvel have shapes {qpos.shape} and {qvel.shape}; give {expected[0]}, {expected[1]}."
            )
        self._begin_episodes(rows, start=(qpos, qvel))
        return torch.from_numpy(self._observation[rows])

    def snapshot(self, ids: Ids = None) -> dict[str, Tensor]:
        index = self._select(ids)
        rows = np.arange(self.num_envs) if index is None else index
        arrays = {name: array[rows] for name, array in self._counters().items()}
        arrays["physics"] = self._physics.integration_state(rows)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def restore(self, snapshot: dict[str, Tensor], ids: Ids = None) -> Tensor:
        index = self._select(ids)
        rows = np.arange(self.num_envs) if index is None else index
        counters = self._counters()
        own = counters | {"physics": self._physics.integration_state(rows[:0])}
        expected = {name: (len(rows), *array.shape[1:]) for name, array in own.items()}
        if {name: tuple(x.shape) for name, x in snapshot.items()} != expected:
            raise SnapshotError(
                f"This snapshot does not fit {len(rows)} environments of {self.task.env_id}; "
                "restore it to as many environments of the task that it was taken from."
            )
        for name, array in counters.items():
            array[rows] = snapshot[name].numpy()
        self._physics.set_integration_state(rows, snapshot["physics"].numpy())
        return torch.from_numpy(self._observation[rows])

    def part(self, first: int, count: int, num_threads: int = 0) -> MujocoVectorEnv:
        part = type(self)(**self._made_as(num_envs=count, num_threads=num_threads))
        part.restore(self.snapshot(range(first, first + count)))
        return part

    def _made_as(self, **changed: Any) -> dict[str, Any]:
        """Give the arguments that made it, but for some."""
        args, kwargs = self._made_with
        bound = inspect.signature(type(self).__init__).bind(self, *args, **kwargs).arguments
        del bound["self"]
        return bound.pop("kwargs", {}) | bound | changed

    def _counters(self) -> dict[str, np.ndarray]:
        """Name everything that a snapshot holds beside the physics: the live arrays [num_envs, ...]."""
        arrays = {
            "seed": self._seed,
            "episode": self._episode,
            "elapsed": self._elapsed,
            "ended": self._ended,
            "observation": self._observation,
        }
        # Rewards compare with a position that was cached a substep before the state: the state cannot give it back.
        return arrays if self._position is None else {**arrays, "position": self._position}

    def render(self) -> tuple[Any, ...] | None:
        """Draw one frame per environment with Gymnasium's own renderer."""
        if self._renderer is None:
            self._renderer = gymnasium.make(
                self.task.env_id, **dataclasses.asdict(self.task), **self._render_kwargs
            ).unwrapped
            self._renderer.reset()
        frames = []
        for row in self._physics.integration_state(np.arange(self.num_envs)):
            data = self._renderer.data  # type: ignore[attr-defined]
            mujoco.mj_setState(self.model, data, row, mujoco.mjtState.mjSTATE_INTEGRATION)
            mujoco.mj_forward(self.model, data)
            frames.append(self._renderer.render())
        return tuple(frames)

    def close_extras(self, **kwargs: Any) -> None:
        self._physics.close()
        if self._renderer is not None:
            self._renderer.close()


class BatchPhysics(Physics):
    """Physics on mujoco.batch.Batch, which reaches the rate of a loop in C."""

    def __init__(self, model: mujoco.MjModel, num: int, fields: Sequence[str], num_threads: int = 0) -> None:
        super().__init__(model, num, fields, num_threads)
        self.batch = Batch(model, num, self.num_threads)
        self._default = self.batch.state[0].copy()
        self.fields = {name: self.batch.bind(name) for name in fields}
        self._qpos, self._qvel, self._ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self._diverged = self.batch.warning[:, DIVERGED, 1]
        self._diverged[:] = SILENT

    def step(self, controls: np.ndarray, substeps: int, ids: np.ndarray | None = None) -> np.ndarray | None:
        if ids is None:
            self._ctrl[:] = controls
            self.batch.step(nstep=substeps)
        else:
            self._ctrl[ids] = controls
            self.batch.step(np.sort(ids), nstep=substeps)
        found = self._diverged != SILENT
        if not found.any():
            return None
        diverged: np.ndarray = np.logical_or.reduce(found, axis=1)
        self._diverged[:] = SILENT
        return diverged if ids is None else diverged[ids]

    def set_state(self, ids: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        # A row is all of a simulation's state: writing the default one is a reset, at a third of batch.reset's cost.
        self.batch.state[ids] = self._default
        self._qpos[ids] = qpos
        self._qvel[ids] = qvel
        self.batch.forward(np.sort(ids))  # mujoco.batch takes sorted ids only

    def set_parameters(self, ids: np.ndarray, parameters: Mapping[str, np.ndarray]) -> None:
        """Give the simulations ids their own model parameters, and the constants that mj_setConst derives from them.

        Args:
            ids: [k].
            parameters: MjModel field -> values [k, ...].
        """
        for name, values in parameters.items():
            self.batch.expand(name)[ids] = values
        self.batch.set_const(np.sort(ids))

    def integration_state(self, ids: np.ndarray) -> np.ndarray:
        return self.batch.state[ids]

    def set_integration_state(self, ids: np.ndarray, state: np.ndarray) -> None:
        self.batch.state[ids] = state


def make_task(
    task_type: Callable[..., Task], env_id: str, kwargs: dict[str, Any], own: Mapping[str, int | None] | None = None
) -> tuple[Task, dict[str, Any]]:
    """Make the task, and give the keyword arguments that concern rendering only; own: whole numbers, or None, that an
    environment takes beside Gymnasium's, which are checked too.
    """
    own = own or {}
    check_arguments(env_id, dict.fromkeys(own, int), {name: x for name, x in own.items() if x is not None})
    names = {field.name for field in dataclasses.fields(task_type)}  # type: ignore[arg-type]
    unknown = kwargs.keys() - names - _RENDER_KWARGS
    if unknown:
        raise ValueError(
            f"{env_id} takes no argument {sorted(unknown)[0]!r}; it takes {', '.join(sorted(names))}, "
            "max_episode_steps, num_threads and Gymnasium's rendering arguments."
        )
    check_arguments(env_id, typing.get_type_hints(task_type), kwargs)
    rendering = {name: value for name, value in kwargs.items() if name in _RENDER_KWARGS}
    return task_type(**{name: value for name, value in kwargs.items() if name in names}), rendering


def default_limit(task: Task, spec: Any) -> int:
    """Give a task's time limit in environment steps: its own horizon, or what Gymnasium has for its id."""
    return getattr(task, "horizon", None) or spec.max_episode_steps or 1000


def spaces_of(model: mujoco.MjModel, observation: Any) -> tuple[spaces.Box, spaces.Box]:
    """Give the spaces of one environment's observations, [N, ...] of which are given, and of its actions."""
    low, high = model.actuator_ctrlrange.astype(np.float32).T
    shape = tuple(observation.shape[1:])
    return spaces.Box(-np.inf, np.inf, shape, np.float64), spaces.Box(low, high, dtype=np.float32)
