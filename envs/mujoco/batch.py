"""The MuJoCo tasks as a VectorEnv: physics on all CPU cores, tasks in NumPy, tensors that share its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.mujoco.mujoco_env import expand_model_path
from gymnasium.vector import AutoresetMode
from torch import Tensor

from envs.mujoco.noise import ResetNoise
from envs.mujoco.physics import BatchPhysics, Physics, ThreadedPhysics, skip_idle_work
from envs.mujoco.tasks import TASKS, Task
from envs.vector import Ids, Seeds, SnapshotError, VectorEnv, seeds_per_env

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


class MujocoVectorEnv(VectorEnv):
    """One of Gymnasium's MuJoCo -v5 tasks, num_envs at a time.

    For the same reset states and actions it equals Gymnasium's own environment bit for bit.

    Args:
        env_id: one of `envs.mujoco.TASKS`.
        num_envs: number of simulations.
        autoreset: see `VectorEnv`.
        seed: fixes the episodes of a first reset that is given no seed.
        num_threads: physics threads; 0 means every core. Results do not depend on it.
        max_episode_steps: time limit in environment steps; None takes Gymnasium's for this id.
        **kwargs: the Gymnasium environment's own keyword arguments.
    """

    task_types: ClassVar[Mapping[str, Callable[..., Task]]] = TASKS

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
        self.task, self._render_kwargs = make_task(self.task_types[env_id], env_id, kwargs)
        self.spec = gymnasium.spec(env_id)
        self.max_episode_steps: int = max_episode_steps or self.spec.max_episode_steps or 1000
        self.model = self._load_model()
        self._physics = self._make_physics(num_envs, num_threads)
        self._period = self.model.opt.timestep * self.task.frame_skip
        self._init_qpos, self._init_qvel = self.model.qpos0.copy(), np.zeros(self.model.nv)

        everyone = np.arange(num_envs)
        self._physics.set_state(everyone, *(np.tile(x, (num_envs, 1)) for x in (self._init_qpos, self._init_qvel)))
        self._observation = self.task.observe(np, self._state(), self.model)
        self._position = self.task.position(np, self._state(), self.model)
        low, high = self.model.actuator_ctrlrange.astype(np.float32).T
        super().__init__(
            num_envs,
            spaces.Box(-np.inf, np.inf, self._observation.shape[1:], np.float64),
            spaces.Box(low, high, dtype=np.float32),
            autoreset=autoreset,
        )
        self.render_mode = self._render_kwargs.get("render_mode")
        self._renderer: gymnasium.Env | None = None

        # Counters of each simulation. Episodes number from -1, so that the first reset begins episode 0.
        entropy = np.random.SeedSequence(seed).generate_state(1, np.uint32)[0] if seed is None else seed
        self._seed = int(entropy) + everyone.astype(np.int64)
        self._episode = np.full(num_envs, -1, dtype=np.int64)
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.ones(num_envs, dtype=bool)

    def _load_model(self) -> mujoco.MjModel:
        return load_model(self.task.xml_file)

    def _make_physics(self, num_envs: int, num_threads: int) -> Physics:
        fields = self.task.fields()
        physics_type = ThreadedPhysics if "cfrc_ext" in fields else BatchPhysics
        return physics_type(self.model, num_envs, fields, num_threads)

    def _state(self, ids: np.ndarray | None = None) -> Any:
        """What the task reads of the simulations ids."""
        return self._physics.read(ids)

    def _controls(self, actions: np.ndarray) -> np.ndarray:
        """Actions [n, A] as the physics takes them."""
        return actions

    @property
    def dt(self) -> float:
        """Seconds of simulated time per step."""
        return float(self._period)

    def reset(
        self, *, seed: Seeds = None, ids: Ids = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        index = self._reset_ids(ids, options)
        rows = np.arange(self.num_envs) if index is None else index
        seeds = seeds_per_env(seed, len(rows), self.num_envs, index)
        if seeds is not None:
            self._seed[rows] = seeds
            self._episode[rows] = -1
        self._begin_episodes(rows)
        return torch.from_numpy(self._observation[rows]), {}

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
        self._place(rows, qpos, qvel)
        return torch.from_numpy(self._observation[rows])

    def _begin_episodes(self, rows: np.ndarray) -> None:
        self._episode[rows] += 1
        noise = ResetNoise(self._seed[rows], self._episode[rows])
        self._place(rows, *self.task.initial_state(np, noise, self._init_qpos, self._init_qvel))

    def _place(self, rows: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        self._physics.set_state(rows, qpos, qvel)
        state = self._state(rows)
        self._observation[rows] = self.task.observe(np, state, self.model)
        if self._position is not None:
            self._position[rows] = self.task.position(np, state, self.model)
        self._elapsed[rows] = 0
        self._ended[rows] = False

    def step(self, actions: Any, ids: Ids = None) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        index = self._select(ids)
        rows = slice(None) if index is None else index
        actions = self._check_actions(actions, self.num_envs if index is None else len(index))
        if self._ended[rows].any():
            raise ValueError(
                f"environments {np.flatnonzero(self._ended).tolist()} have ended or never begun; reset them first."
            )

        diverged = self._physics.step(self._controls(actions), self.task.frame_skip, index)
        state = self._state(index)
        observation = self.task.observe(np, state, self.model)
        velocity = None
        if self._position is not None:
            position = self.task.position(np, state, self.model)
            velocity = (position - self._position[rows]) / self._period
            self._position[rows] = position
        reward, terminated, info = self.task.reward(np, state, self.model, actions, velocity)
        if terminated is None:
            terminated = np.zeros(len(reward), dtype=bool)
        if diverged is not None:
            # MuJoCo has put a diverged simulation back to its default state, which is no successor of anything: the
            # episode ends where it last stood, as a termination without reward.
            self.blowups += int(diverged.sum())
            observation[diverged] = self._observation[rows][diverged]
            reward[diverged] = 0.0
            terminated = terminated | diverged
            info["diverged"] = diverged
        self._elapsed[rows] += 1
        truncated = self._elapsed[rows] >= self.max_episode_steps
        ended = terminated | truncated
        self._observation[rows] = observation
        if ended.any():
            self._ended[rows] = ended
            if self.autoreset is AutoresetMode.SAME_STEP:
                info["final_obs"], info["_final_obs"] = torch.from_numpy(observation), torch.from_numpy(ended)
                self._begin_episodes(np.flatnonzero(ended) if index is None else index[ended])
                observation = self._observation[rows].copy()
        tensors = (torch.from_numpy(x) for x in (observation, reward, terminated, truncated))
        return (*tensors, info)  # type: ignore[return-value]

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
        if set(snapshot) != {*counters, "physics"} or len(snapshot["physics"]) != len(rows):
            raise SnapshotError(
                f"This snapshot does not fit {len(rows)} environments of {self.task.env_id}; "
                "restore it to as many environments of the task that it was taken from."
            )
        for name, array in counters.items():
            array[rows] = snapshot[name].numpy()
        self._physics.set_integration_state(rows, snapshot["physics"].numpy())
        return torch.from_numpy(self._observation[rows])

    def _counters(self) -> dict[str, np.ndarray]:
        """Everything that a snapshot holds beside the physics, as the live arrays [num_envs, ...]."""
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
        """One frame per environment, drawn by Gymnasium's own renderer."""
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


def make_task(task_type: Callable[..., Task], env_id: str, kwargs: dict[str, Any]) -> tuple[Task, dict[str, Any]]:
    """The task and the keyword arguments that concern rendering only."""
    names = {field.name for field in dataclasses.fields(task_type)}  # type: ignore[arg-type]
    unknown = kwargs.keys() - names - _RENDER_KWARGS
    if unknown:
        raise ValueError(
            f"{env_id} takes no argument {sorted(unknown)[0]!r}; it takes {', '.join(sorted(names))}, "
            "max_episode_steps, num_threads and Gymnasium's rendering arguments."
        )
    rendering = {name: value for name, value in kwargs.items() if name in _RENDER_KWARGS}
    return task_type(**{name: value for name, value in kwargs.items() if name in names}), rendering


def load_model(xml_file: str) -> mujoco.MjModel:
    with _silent_warnings():
        model = mujoco.MjModel.from_xml_path(expand_model_path(xml_file))
    skip_idle_work(model)
    return model


@contextmanager
def _silent_warnings() -> Iterator[None]:
    """Keeps MuJoCo from writing a log file into the working directory for its remarks on Gymnasium's models."""
    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(previous)
