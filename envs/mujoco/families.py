"""Families of tasks for meta-learning: one body, and a goal or a set of model parameters that differs between tasks.

Each simulation of an `envs.mujoco.family_env.FamilyVectorEnv` has its own task, so many tasks step in one batch.
Velocity is the change of the torso's position per second.

Sources: Finn, Abbeel & Levine 2017, section 5.3, https://arxiv.org/abs/1703.03400 (variant "finn"); Rothfuss et al.
2019, https://arxiv.org/abs/1810.06784 (variant "promp").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import mujoco
import numpy as np

from envs.mujoco.physics import Physics
from envs.mujoco.spatial import Ant
from envs.mujoco.tasks import Array, HalfCheetah, Hopper, PhysicsState, RandomStreams, Task, Walker2d

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
        """Give all tasks [K, G] of a family that has only a few, or None."""
        return None

    def draw(self, random: RandomStreams, model: mujoco.MjModel) -> np.ndarray:
        """Draw one task [G] from each of n random streams, [n, G]."""
        raise NotImplementedError

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        """Say whether each of the tasks [n, G] is in the family's range, [n], and that range in words."""
        raise NotImplementedError

    def parameters(self, tasks: np.ndarray, model: mujoco.MjModel) -> Mapping[str, np.ndarray]:
        """Give the model parameters [n, ...] of tasks [n, G], under MjModel's names; none if all share the model's."""
        return {}

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        observation = super().observe(xp, s, model)  # type: ignore[misc]
        return xp.concat((observation, s.goal), axis=1) if self.observe_task else observation


class _Interval(Family):
    """Tasks that are one number, uniform in an interval."""

    interval: ClassVar[dict[str, tuple[float, float]]]
    """Variant -> lowest and highest."""

    def draw(self, random: RandomStreams, model: mujoco.MjModel) -> np.ndarray:
        return random.uniform(*self.interval[self.variant], 1)

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

    def forward(self, xp: Any, s: PhysicsState, velocity: Array) -> Array:
        return self.forward_reward_weight * (s.goal[:, 0] * velocity)


@dataclass(frozen=True, kw_only=True)
class HalfCheetahVel(_Interval, HalfCheetah):
    """Run at the velocity v*, from 0 to 2 m/s ("finn") or 3 m/s ("promp"): reward -|v - v*| - 0.05 |a|²."""

    env_id = "families/HalfCheetahVel-v0"
    interval = {"finn": (0.0, 2.0), "promp": (0.0, 3.0)}  # noqa: RUF012
    ctrl_cost_weight: float = 0.05

    def forward(self, xp: Any, s: PhysicsState, velocity: Array) -> Array:
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

    def draw(self, random: RandomStreams, model: mujoco.MjModel) -> np.ndarray:
        angle = random.uniform(0.0, 2 * np.pi, 1)
        return np.concatenate((np.cos(angle), np.sin(angle)), axis=1)

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        if self.choices is not None:
            return _Choices.allowed(self, tasks, model)  # type: ignore[arg-type]
        unit = tasks.shape[1:] == (2,) and np.abs(np.linalg.norm(tasks, axis=1) - 1) < 1e-6
        return np.broadcast_to(unit, len(tasks)), "a vector (x, y) of length 1"

    def forward(self, xp: Any, s: PhysicsState, velocity: Array) -> Array:
        return self.forward_reward_weight * xp.sum(s.goal * velocity, axis=1)


@dataclass(frozen=True, kw_only=True)
class AntVel(_Interval, _AntFamily):
    """Run at the velocity v* along x, from 0 to 3 m/s: AntDir's reward with -|v - v*| in place of d·v."""

    env_id = "families/AntVel-v0"
    interval = {"finn": (0.0, 3.0), "promp": (0.0, 3.0)}  # noqa: RUF012

    def forward(self, xp: Any, s: PhysicsState, velocity: Array) -> Array:
        return -self.forward_reward_weight * xp.abs(velocity[:, 0] - s.goal[:, 0])


@dataclass(frozen=True, kw_only=True)
class AntGoal(_AntFamily):
    """Reach the goal (x, y) in the disc of 3 m around the start: AntDir's reward with -|x - x*|₁ in place of d·v."""

    env_id = "families/AntGoal-v0"
    exclude_current_positions_from_observation: bool = False

    def draw(self, random: RandomStreams, model: mujoco.MjModel) -> np.ndarray:
        radius, angle = 3.0 * np.sqrt(random.uniform(0.0, 1.0, 1)), random.uniform(0.0, 2 * np.pi, 1)
        return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1)

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        inside = tasks.shape[1:] == (2,) and np.linalg.norm(tasks, axis=1) <= 3.0
        return np.broadcast_to(inside, len(tasks)), "a point (x, y) at most 3 from the origin"

    def forward(self, xp: Any, s: PhysicsState, velocity: Array) -> Array:
        return -self.forward_reward_weight * xp.sum(xp.abs(s.qpos[:, :2] - s.goal), axis=1)


@dataclass(frozen=True, kw_only=True)
class WalkerDir(_Choices, Walker2d):
    """Walk forward (1) or backward (-1): reward d v - 0.001 |a|² + 1."""

    env_id = "families/WalkerDir-v0"

    def forward(self, xp: Any, s: PhysicsState, velocity: Array) -> Array:
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

    def draw(self, random: RandomStreams, model: mujoco.MjModel) -> np.ndarray:
        return random.uniform(-self.LIMIT, self.LIMIT, self._size(model))

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

    def draw(self, random: RandomStreams, model: mujoco.MjModel) -> np.ndarray:
        return random.uniform(-0.5, 0.5, 2)

    def allowed(self, tasks: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, str]:
        inside = tasks.shape[1:] == (2,) and (np.abs(tasks) <= 0.5).all(1)
        return np.broadcast_to(inside, len(tasks)), "a point (x, y) with both from -0.5 to 0.5"

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        return xp.concat((s.qpos, s.goal), axis=1) if self.observe_task else xp.asarray(s.qpos, copy=True)

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        distance = xp.sqrt(xp.sum(xp.square(s.qpos - s.goal), axis=1))
        return -distance, None, {"distance": distance}

    def initial_state(self, xp: Any, random: RandomStreams, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        n = len(random.uniform(0.0, 1.0, 1))
        return xp.tile(qpos, (n, 1)), xp.tile(qvel, (n, 1))


POINT = """<mujoco>
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
        self.fields = {"qpos": self._qpos}
        self._bound = scale

    def set_state(self, ids: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        self._qpos[ids] = qpos

    def step(self, controls: np.ndarray, substeps: int, ids: np.ndarray | None = None) -> np.ndarray | None:
        self._qpos[slice(None) if ids is None else ids] += substeps * np.clip(controls, -self._bound, self._bound)
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
