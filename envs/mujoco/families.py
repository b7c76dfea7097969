"""Families of tasks for meta-learning: one body, and a goal or a set of model parameters that differs between tasks.

Each simulation of a `FamilyVectorEnv` has its own task, so many tasks step in one batch. Velocity is the change of the
torso's position per second. Importing this module registers the families with Gymnasium as "families/<name>-v0".

Sources: Finn, Abbeel & Levine 2017, section 5.3, https://arxiv.org/abs/1703.03400 (variant "finn"); Rothfuss et al.
2019, https://arxiv.org/abs/1810.06784 (variant "promp").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import gymnasium
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode
from torch import Tensor

from envs.mujoco.batch import MujocoVectorEnv, make_task
from envs.mujoco.noise import ResetNoise
from envs.mujoco.physics import BatchPhysics, Physics
from envs.mujoco.tasks import Ant, Array, HalfCheetah, Hopper, Noise, State, Task, Walker2d
from envs.vector import Ids, Seeds, SnapshotError, TaskVectorEnv

Split = Literal["train", "held_out"]
SPLITS = ("train", "held_out")
VARIANTS = ("finn", "promp")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tasks that share a body: what a family adds to a `Task`.

    A task is a row of G numbers, the goal; what they mean is each family's own.
    """

    env_id: ClassVar[str]

    variant: Literal["finn", "promp"] = "finn"
    """Whose distribution of tasks; they are the same where a family does not say otherwise."""
    horizon: int = 200
    """Environment steps per episode."""
    action_scale: float = 1.0
    """Factor between actions, which are paid for, and controls."""
    observe_task: bool = False
    """Whether observations end with the task, as an oracle's do."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; use 'finn' or 'promp'.")
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}; give at least 1 environment step.")
        if not self.action_scale > 0:
            raise ValueError(f"action_scale is {self.action_scale}; give a number above 0.")

    @property
    def choices(self) -> np.ndarray | None:
        """All tasks [K, G] of a family that has only a few, or None."""
        return None

    def draw(self, noise: Noise, model: mujoco.MjModel) -> np.ndarray:
        """One task [G] from each of n random streams, [n, G]."""
        raise NotImplementedError

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        """Whether each of the tasks [n, G] is in the family's range, [n], and that range in words."""
        raise NotImplementedError

    def parameters(self, tasks: np.ndarray, model: mujoco.MjModel) -> Mapping[str, np.ndarray]:
        """The model parameters [n, ...] of tasks [n, G], under MjModel's names; none if all share the model's."""
        return {}

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        observation = super().observe(xp, s, model)  # type: ignore[misc]
        return xp.concat((observation, s.goal), axis=1) if self.observe_task else observation


class _Interval(Family):
    """Tasks that are one number, uniform in an interval."""

    interval: ClassVar[dict[str, tuple[float, float]]]
    """Variant -> lowest and highest."""

    def draw(self, noise: Noise, model: mujoco.MjModel) -> np.ndarray:
        return noise.uniform(*self.interval[self.variant], 1)

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        low, high = self.interval[self.variant]
        inside = tasks.shape[1:] == (1,) and (low <= tasks[:, 0]) & (tasks[:, 0] <= high)
        return np.broadcast_to(inside, len(tasks)), f"one number from {low:g} to {high:g}"


class _Choices(Family):
    """A few tasks, all of them for training: task k is the k-th, from the front again after the last."""

    @property
    def choices(self) -> np.ndarray:
        return np.array([[1.0], [-1.0]])

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        words = f"one of {self.choices.tolist()}"
        if tasks.shape[1:] != self.choices.shape[1:]:
            return np.zeros(len(tasks), dtype=bool), words
        return (tasks[:, None] == self.choices).all(-1).any(-1), words


@dataclass(frozen=True, kw_only=True)
class HalfCheetahDir(_Choices, HalfCheetah):
    """Run forward (1) or backward (-1): reward d v - 0.05 |a|²."""

    env_id = "families/HalfCheetahDir-v0"
    ctrl_cost_weight: float = 0.05

    def forward(self, xp: Any, s: State, velocity: Array) -> Array:
        return self.forward_reward_weight * (s.goal[:, 0] * velocity)


@dataclass(frozen=True, kw_only=True)
class HalfCheetahVel(_Interval, HalfCheetah):
    """Run at the velocity v*, from 0 to 2 m/s ("finn") or 3 m/s ("promp"): reward -|v - v*| - 0.05 |a|²."""

    env_id = "families/HalfCheetahVel-v0"
    interval = {"finn": (0.0, 2.0), "promp": (0.0, 3.0)}  # noqa: RUF012
    ctrl_cost_weight: float = 0.05

    def forward(self, xp: Any, s: State, velocity: Array) -> Array:
        return -self.forward_reward_weight * xp.abs(velocity - s.goal[:, 0])


@dataclass(frozen=True, kw_only=True)
class _AntFamily(Family, Ant):
    """Costs, the reward 1 for health, and the ends of episodes are Ant-v5's; contact forces are not observed."""

    include_cfrc_ext_in_observation: bool = False


@dataclass(frozen=True, kw_only=True)
class AntDir(_AntFamily):
    """Run in the direction d, a unit vector: reward d·v - 0.5 |a|² - 0.0005 |clip(cfrc)|² + 1.

    "finn": forward or backward; "promp": any direction in the plane.
    """

    env_id = "families/AntDir-v0"

    @property
    def choices(self) -> np.ndarray | None:
        return np.array([[1.0, 0.0], [-1.0, 0.0]]) if self.variant == "finn" else None

    def draw(self, noise: Noise, model: mujoco.MjModel) -> np.ndarray:
        angle = noise.uniform(0.0, 2 * np.pi, 1)
        return np.concatenate((np.cos(angle), np.sin(angle)), axis=1)

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        if self.choices is not None:
            return _Choices.allowed(self, tasks, model)  # type: ignore[arg-type]
        unit = tasks.shape[1:] == (2,) and np.abs(np.linalg.norm(tasks, axis=1) - 1) < 1e-6
        return np.broadcast_to(unit, len(tasks)), "a vector (x, y) of length 1"

    def forward(self, xp: Any, s: State, velocity: Array) -> Array:
        return self.forward_reward_weight * xp.sum(s.goal * velocity, axis=1)


@dataclass(frozen=True, kw_only=True)
class AntVel(_Interval, _AntFamily):
    """Run at the velocity v* along x, from 0 to 3 m/s: AntDir's reward with -|v - v*| in place of d·v."""

    env_id = "families/AntVel-v0"
    interval = {"finn": (0.0, 3.0), "promp": (0.0, 3.0)}  # noqa: RUF012

    def forward(self, xp: Any, s: State, velocity: Array) -> Array:
        return -self.forward_reward_weight * xp.abs(velocity[:, 0] - s.goal[:, 0])


@dataclass(frozen=True, kw_only=True)
class AntGoal(_AntFamily):
    """Reach the goal (x, y) in the disc of 3 m around the start: AntDir's reward with -|x - x*|₁ in place of d·v."""

    env_id = "families/AntGoal-v0"
    exclude_current_positions_from_observation: bool = False

    def draw(self, noise: Noise, model: mujoco.MjModel) -> np.ndarray:
        radius, angle = 3.0 * np.sqrt(noise.uniform(0.0, 1.0, 1)), noise.uniform(0.0, 2 * np.pi, 1)
        return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1)

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        inside = tasks.shape[1:] == (2,) and np.linalg.norm(tasks, axis=1) <= 3.0
        return np.broadcast_to(inside, len(tasks)), "a point (x, y) at most 3 from the origin"

    def forward(self, xp: Any, s: State, velocity: Array) -> Array:
        return -self.forward_reward_weight * xp.sum(xp.abs(s.qpos[:, :2] - s.goal), axis=1)


@dataclass(frozen=True, kw_only=True)
class WalkerDir(_Choices, Walker2d):
    """Walk forward (1) or backward (-1): reward d v - 0.001 |a|² + 1."""

    env_id = "families/WalkerDir-v0"

    def forward(self, xp: Any, s: State, velocity: Array) -> Array:
        return self.forward_reward_weight * (s.goal[:, 0] * velocity)


class _RandParams(Family):
    """A body whose masses, inertias, frictions and dampings are multiplied, each element by its own factor.

    A task is the factors' exponents, each uniform in -3 to 3: the bases are 1.5, and 1.3 for dampings.
    """

    BASES: ClassVar[dict[str, float]] = {
        "body_mass": 1.5,
        "body_inertia": 1.5,
        "geom_friction": 1.5,
        "dof_damping": 1.3,
    }
    LIMIT: ClassVar[float] = 3.0

    def _size(self, model: mujoco.MjModel) -> int:
        return sum(getattr(model, name).size for name in self.BASES)

    def draw(self, noise: Noise, model: mujoco.MjModel) -> np.ndarray:
        return noise.uniform(-self.LIMIT, self.LIMIT, self._size(model))

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        size = self._size(model)
        inside = tasks.shape[1:] == (size,) and (np.abs(tasks) <= self.LIMIT).all(1)
        return np.broadcast_to(inside, len(tasks)), f"{size} exponents from {-self.LIMIT:g} to {self.LIMIT:g}"

    def parameters(self, tasks: np.ndarray, model: mujoco.MjModel) -> Mapping[str, np.ndarray]:
        found, first = {}, 0
        for name, base in self.BASES.items():
            original = getattr(model, name)
            exponents = tasks[:, first : first + original.size].reshape(-1, *original.shape)
            found[name] = original * base**exponents
            first += original.size
        return found


@dataclass(frozen=True, kw_only=True)
class HopperRandParams(_RandParams, Hopper):
    """Hopper-v5 with other masses, inertias, frictions and dampings."""

    env_id = "families/HopperRandParams-v0"


@dataclass(frozen=True, kw_only=True)
class WalkerRandParams(_RandParams, Walker2d):
    """Walker2d-v5 with other masses, inertias, frictions and dampings."""

    env_id = "families/WalkerRandParams-v0"


@dataclass(frozen=True, kw_only=True)
class Point(Family, Task):
    """A point that moves by 0.1 a, |a| <= 1 in each coordinate, to a goal in the unit square: reward -distance.

    It starts at the square's center and sees its position. Differs from Finn et al.: an episode does not end where the
    point is within 0.01 of the goal.
    """

    env_id = "families/Point-v0"
    reads = ("qpos",)
    xml_file: str = ""
    frame_skip: int = 1
    horizon: int = 100
    action_scale: float = 0.1

    def draw(self, noise: Noise, model: mujoco.MjModel) -> np.ndarray:
        return noise.uniform(-0.5, 0.5, 2)

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        inside = tasks.shape[1:] == (2,) and (np.abs(tasks) <= 0.5).all(1)
        return np.broadcast_to(inside, len(tasks)), "a point (x, y) with both from -0.5 to 0.5"

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        return xp.concat((s.qpos, s.goal), axis=1) if self.observe_task else s.qpos.copy()

    def reward(
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        distance = xp.sqrt(xp.sum(xp.square(s.qpos - s.goal), axis=1))
        return -distance, None, {"distance": distance}

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        n = len(noise.uniform(0.0, 1.0, 1))
        return xp.tile(qpos, (n, 1)), xp.tile(qvel, (n, 1))


_POINT = """<mujoco>
  <worldbody>
    <body>
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
      <geom size="0.02"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" ctrlrange="-1 1"/>
    <motor joint="y" ctrlrange="-1 1"/>
  </actuator>
</mujoco>"""


class PointPhysics(Physics):
    """A point's position is the sum of its controls, each of which is bounded as a control is."""

    def __init__(self, model: mujoco.MjModel, num: int, scale: float) -> None:
        super().__init__(model, num, ("qpos",), 1)
        self._qpos = np.zeros((num, model.nq))
        self._arrays = {"qpos": self._qpos}
        self._bound = scale

    def set_state(self, ids: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        self._qpos[ids] = qpos

    def step(self, actions: np.ndarray, substeps: int, ids: np.ndarray | None = None) -> np.ndarray | None:
        self._qpos[slice(None) if ids is None else ids] += substeps * np.clip(actions, -self._bound, self._bound)
        return None

    def integration_state(self, ids: np.ndarray) -> np.ndarray:
        return self._qpos[ids]

    def set_integration_state(self, ids: np.ndarray, state: np.ndarray) -> None:
        self._qpos[ids] = state


FAMILIES: dict[str, Callable[..., Any]] = {
    family.env_id: family
    for family in (
        Point,
        HalfCheetahDir,
        HalfCheetahVel,
        AntDir,
        AntVel,
        AntGoal,
        WalkerDir,
        HopperRandParams,
        WalkerRandParams,
    )
}
"""Gymnasium id -> the class of its family."""


class FamilyVectorEnv(MujocoVectorEnv, TaskVectorEnv):
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
        autoreset: AutoresetMode | str = AutoresetMode.SAME_STEP,
        seed: int | None = None,
        num_threads: int = 0,
        **kwargs: Any,
    ) -> None:
        if "max_episode_steps" in kwargs:
            raise ValueError(f"max_episode_steps is not {env_id}'s own time limit; give horizon.")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; use 'train' or 'held_out'.")
        if task_seed < 0:
            raise ValueError(f"task_seed is {task_seed}; give 0 or more.")
        if num_tasks is not None and (num_tasks < 1 or redraw):
            raise ValueError(f"num_tasks is {num_tasks}; give at least 1, or None with redraw.")
        self.task, _ = make_task(FAMILIES[env_id], env_id, kwargs)
        self.model = self._load_model()
        self.split, self.task_seed, self.redraw = split, task_seed, redraw
        numbers = np.arange(num_envs)
        self._goals = self.draw_tasks(numbers if num_tasks is None else numbers % num_tasks)
        super().__init__(
            env_id,
            num_envs,
            autoreset=autoreset,
            seed=seed,
            num_threads=num_threads,
            max_episode_steps=self.task.horizon,
            **kwargs,
        )
        self._apply(numbers)

    @property
    def tasks(self) -> np.ndarray:
        """Each simulation's task, [num_envs, G]."""
        return self._goals.copy()

    def draw_tasks(self, numbers: Any, split: Split | None = None) -> np.ndarray:
        """The tasks of these numbers in a split (this environment's own: None), [n, G].

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
        return self.task.draw(ResetNoise(seeds, numbers), self.model)

    def set_tasks(self, tasks: Any, ids: Ids = None) -> None:
        """Give the simulations ids other tasks; their episodes end here, so reset them next.

        Args:
            tasks: [n, G].
            ids: [n] distinct indices, or None for all.

        Raises:
            ValueError: there are not n tasks, or one is outside the family's range.
        """
        index = self._select(ids)
        rows = np.arange(self.num_envs) if index is None else index
        tasks = np.asarray(tasks, dtype=np.float64)
        if tasks.ndim != 2 or len(tasks) != len(rows):
            raise ValueError(f"tasks has shape {tasks.shape}; give one row for each of {len(rows)} simulations.")
        inside, words = self.task.allowed(tasks, self.model)
        if not inside.all():
            first = tasks[np.flatnonzero(~inside)[0]]
            shown = first.tolist() if first.size <= 4 else f"a row of {first.size} numbers"
            raise ValueError(f"{shown} is no task of {self.task.env_id}; give {words}.")
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

    def _apply(self, rows: np.ndarray) -> None:
        """Bring the tasks' model parameters into the physics."""
        parameters = self.task.parameters(self._goals[rows], self.model)
        if parameters and len(rows):
            assert isinstance(self._physics, BatchPhysics)
            self._physics.set_parameters(rows, parameters)

    def _begin_episodes(self, rows: np.ndarray) -> None:
        if self.redraw:
            # The episode's number goes up by 1 in super.
            self._goals[rows] = self.draw_tasks(rows + (self._episode[rows] + 1) * self.num_envs)
            self._apply(rows)
        super()._begin_episodes(rows)

    def _load_model(self) -> mujoco.MjModel:
        return mujoco.MjModel.from_xml_string(_POINT) if isinstance(self.task, Point) else super()._load_model()

    def _make_physics(self, num_envs: int, num_threads: int) -> Physics:
        if isinstance(self.task, Point):
            return PointPhysics(self.model, num_envs, self.task.action_scale)
        return super()._make_physics(num_envs, num_threads)

    def _state(self, ids: np.ndarray | None = None) -> Any:
        state = super()._state(ids)
        state.goal = self._goals if ids is None else self._goals[ids]
        return state

    def _controls(self, actions: np.ndarray) -> np.ndarray:
        return actions if self.task.action_scale == 1.0 else actions * np.float32(self.task.action_scale)

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
        observation, _ = self._vector.reset(seed=seed)
        return observation[0].numpy(), {"task": self._vector.tasks[0]}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self._vector.step(np.asarray(action)[None])
        return (
            observation[0].numpy().copy(),
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            {name: values[0] for name, values in info.items()},
        )

    def close(self) -> None:
        self._vector.close()


for _env_id in FAMILIES:
    gymnasium.register(_env_id, entry_point="envs.mujoco.families:FamilyEnv", kwargs={"env_id": _env_id})
