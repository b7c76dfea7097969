"""What the MuJoCo tasks observe, reward and end at, each written once for a whole batch; here those in a plane.

Gymnasium's -v5 tasks of bodies in space and of arms are in `envs.mujoco.spatial`.

The functions are written against the array API and take its namespace as `xp`: NumPy on the CPU, where every sum has
the order of Gymnasium's own and results equal it bit for bit. Actions arrive in float32 and are squared in float32, as
Gymnasium does. Parameters have Gymnasium's names, meanings and defaults
(https://gymnasium.farama.org/environments/mujoco/).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import mujoco
import numpy as np

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FACTORS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
"""64 bits as int64, which every array library multiplies modulo 2^64."""

Array = Any
Range = tuple[float, float]


class PhysicsState(Protocol):
    """The physics' fields of n simulations, as attributes [n, ...] under MjData's names."""

    qpos: Array
    qvel: Array
    ctrl: Array
    xpos: Array
    xipos: Array
    site_xpos: Array
    qfrc_constraint: Array
    qfrc_actuator: Array
    cinert: Array
    cvel: Array
    cfrc_ext: Array
    ten_length: Array
    ten_velocity: Array
    goal: Array
    """Each simulation's own task, [n, G]; of task families only."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. A field of a subclass is a keyword argument of the Gymnasium environment of that name."""

    env_id: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("qpos", "qvel")
    tells: ClassVar[tuple[str, ...]] = ()
    """The physics fields that `where` reads."""
    solver: ClassVar[mujoco.mjtSolver | None] = None
    """In place of the model's own."""

    xml_file: str
    frame_skip: int

    def fields(self) -> tuple[str, ...]:
        """Name the physics fields that this task reads, as MjData does."""
        return self.reads

    def position(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array | None:
        """Give what the next step's reward compares with, [n, ...]; None if it compares with nothing."""
        return None

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        """Give the observations [n, O]."""
        raise NotImplementedError

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        """Give the rewards [n], terminated [n] (None: this task never terminates) and the info's entries of a step.

        action is [n, A]; velocity is the change of `position` per second, [n, ...] (None where that is None).
        """
        raise NotImplementedError

    def where(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> dict[str, Array]:
        """Give the entries [n, ...] of infos that Gymnasium tells after a step and a reset; called only if read."""
        return {}

    def initial_state(self, xp: Any, random: RandomStreams, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        """Draw reset states [n, nq] and [n, nv] around the model's own qpos [nq] and qvel [nv]."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NearRest(Task):
    """A task whose episodes begin near the model's own state."""

    normal_velocities: ClassVar[bool] = False
    """Whether velocities are normal, as Gymnasium draws them for some bodies; all else is uniform."""

    reset_noise_scale: float

    def initial_state(self, xp: Any, random: RandomStreams, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        scale = self.reset_noise_scale
        positions = qpos + random.uniform(-scale, scale, qpos.shape[0])
        if self.normal_velocities:
            return positions, qvel + scale * random.normal(qvel.shape[0])
        return positions, qvel + random.uniform(-scale, scale, qvel.shape[0])


@dataclass(frozen=True, kw_only=True)
class _Runner(NearRest):
    """Rewards the velocity of the root; observes positions (the root's left out by default) and velocities."""

    root: ClassVar[int] = 1
    """Leading coordinates of qpos that move with the root."""
    tells = ("qpos",)

    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 0.1
    exclude_current_positions_from_observation: bool = True

    def position(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        return xp.asarray(s.qpos[:, 0], copy=True)

    def where(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> dict[str, Array]:
        return {"x_position": s.qpos[:, 0]}

    def forward(self, xp: Any, s: PhysicsState, velocity: Array) -> Array:
        """Give what the velocity [n] earns, [n]."""
        return self.forward_reward_weight * velocity

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        skip = self.root if self.exclude_current_positions_from_observation else 0
        return xp.concat((s.qpos[:, skip:], s.qvel), axis=1)

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        forward = self.forward(xp, s, velocity)
        control = -self.ctrl_cost_weight * xp.sum(xp.square(action), axis=-1)
        return forward + control, None, {"x_velocity": velocity, "reward_forward": forward, "reward_ctrl": control}


@dataclass(frozen=True, kw_only=True)
class HalfCheetah(_Runner):
    env_id = "HalfCheetah-v5"
    normal_velocities = True
    xml_file: str = "half_cheetah.xml"
    frame_skip: int = 5


@dataclass(frozen=True, kw_only=True)
class Swimmer(_Runner):
    env_id = "Swimmer-v5"
    root = 2
    xml_file: str = "swimmer.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-4

    def position(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        return xp.asarray(s.qpos[:, :2], copy=True)

    def where(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> dict[str, Array]:
        return in_plane(xp, s)

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        reward, terminated, terms = super().reward(xp, s, model, action, velocity[:, 0])
        return reward, terminated, terms | {"y_velocity": velocity[:, 1]}


@dataclass(frozen=True, kw_only=True)
class _PlanarLegged(_Runner):
    """A runner in a plane that ends when it falls: when it leaves one of its open ranges."""

    healthy_state_range: ClassVar[Range | None] = None
    """Of all coordinates but x and the height, where a task has such a range."""

    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range
    healthy_angle_range: Range
    reset_noise_scale: float = 5e-3

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        skip = self.root if self.exclude_current_positions_from_observation else 0
        return xp.concat((s.qpos[:, skip:], xp.clip(s.qvel, -10.0, 10.0)), axis=1)

    def where(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> dict[str, Array]:
        return {"x_position": s.qpos[:, 0], "z_distance_from_origin": s.qpos[:, 1] - model.qpos0[1]}

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        (low_z, high_z), (low_angle, high_angle) = self.healthy_z_range, self.healthy_angle_range
        z, angle = s.qpos[:, 1], s.qpos[:, 2]
        healthy = (low_z < z) & (z < high_z) & (low_angle < angle) & (angle < high_angle)
        if self.healthy_state_range is not None:
            low, high = self.healthy_state_range
            state = xp.concat((s.qpos[:, 2:], s.qvel), axis=1)
            healthy &= xp.all((low < state) & (state < high), axis=1)
        forward = self.forward(xp, s, velocity)
        survive = healthy * self.healthy_reward
        control = -self.ctrl_cost_weight * xp.sum(xp.square(action), axis=-1)
        terms = {
            "x_velocity": velocity,
            "reward_forward": forward,
            "reward_survive": survive,
            "reward_ctrl": control,
        }
        return forward + survive + control, ~healthy if self.terminate_when_unhealthy else None, terms


@dataclass(frozen=True, kw_only=True)
class Hopper(_PlanarLegged):
    env_id = "Hopper-v5"
    xml_file: str = "hopper.xml"
    healthy_state_range: Range = (-100.0, 100.0)  # type: ignore[misc]
    healthy_z_range: Range = (0.7, float("inf"))
    healthy_angle_range: Range = (-0.2, 0.2)


@dataclass(frozen=True, kw_only=True)
class Walker2d(_PlanarLegged):
    env_id = "Walker2d-v5"
    xml_file: str = "walker2d_v5.xml"
    healthy_z_range: Range = (0.8, 2.0)
    healthy_angle_range: Range = (-1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class InvertedPendulum(NearRest):
    env_id = "InvertedPendulum-v5"
    xml_file: str = "inverted_pendulum.xml"
    frame_skip: int = 2
    reset_noise_scale: float = 0.01

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        return xp.concat((s.qpos, s.qvel), axis=1)

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        finite = xp.all(xp.isfinite(s.qpos), axis=1) & xp.all(xp.isfinite(s.qvel), axis=1)
        upright = finite & (xp.abs(s.qpos[:, 1]) <= 0.2)
        reward = xp.astype(upright, s.qpos.dtype)
        return reward, ~upright, {"reward_survive": reward}


@dataclass(frozen=True, kw_only=True)
class InvertedDoublePendulum(NearRest):
    env_id = "InvertedDoublePendulum-v5"
    normal_velocities = True
    reads = ("qpos", "qvel", "site_xpos", "qfrc_constraint")
    xml_file: str = "inverted_double_pendulum.xml"
    frame_skip: int = 5
    healthy_reward: float = 10.0
    reset_noise_scale: float = 0.1

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        angles = s.qpos[:, 1:]
        return xp.concat(
            (
                s.qpos[:, :1],
                xp.sin(angles),
                xp.cos(angles),
                xp.clip(s.qvel, -10.0, 10.0),
                xp.clip(s.qfrc_constraint[:, :1], -10.0, 10.0),
            ),
            axis=1,
        )

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        x, y = s.site_xpos[:, 0, 0], s.site_xpos[:, 0, 2]
        v1, v2 = s.qvel[:, 1], s.qvel[:, 2]
        fallen = y <= 1
        # Gymnasium squares numbers here, by the C library's pow, which rounds another way than x * x now and then.
        distance = -0.01 * xp.float_power(x, 2) - xp.float_power(y - 2, 2)
        speed = -1e-3 * xp.float_power(v1, 2) - 5e-3 * xp.float_power(v2, 2)
        survive = self.healthy_reward * ~fallen
        terms = {"reward_survive": survive, "distance_penalty": distance, "velocity_penalty": speed}
        return survive + distance + speed, fallen, terms


def norm(xp: Any, vector: Array) -> Array:
    """Give the Euclidean length of vectors [n, k], [n]."""
    return xp.sqrt(xp.vecdot(vector, vector))


def in_plane(xp: Any, s: PhysicsState) -> dict[str, Array]:
    """Give what Gymnasium's infos say of a body that moves in two directions."""
    x, y = s.qpos[:, 0], s.qpos[:, 1]
    return {"x_position": x, "y_position": y, "distance_from_origin": norm(xp, s.qpos[:, :2])}


class RandomStreams:
    """n independent random streams, each fixed by two numbers: those of an episode by its seed and its number.

    Counter-based: a number is a hash of (seed, episode, position), so n streams are drawn from together, and uniform
    numbers are the same on every device.

    Args:
        seed: [n] int64, not negative.
        episode: [n] int64, not negative.
        purpose: what they are for, of which each has streams of its own; "" is the beginnings of episodes.
        xp: the array namespace of seed and episode.
    """

    def __init__(self, seed: Array, episode: Array, purpose: str = "", xp: Any = np) -> None:
        keys = _mix(_mix(seed + GOLDEN) + episode * GOLDEN)
        if purpose:
            keys = _mix(keys ^ zlib.crc32(purpose.encode()))
        self._keys, self._xp = keys[:, None], xp
        self._position = 1

    def uniform(self, low: float | Array, high: float | Array, size: int) -> Array:
        """Draw [n, size], uniform in [low, high), 53 bits each."""
        xp, first, keys = self._xp, self._position, self._keys
        self._position += size
        counter = xp.arange(first, self._position, dtype=keys.dtype, device=keys.device)
        unit = xp.astype(_mix(keys + counter * GOLDEN) >> 11 & 2**53 - 1, xp.float64) * 2.0**-53
        return low + (high - low) * unit

    def normal(self, size: int) -> Array:
        """Draw [n, size], standard normal (Box and Muller 1958)."""
        xp = self._xp
        radius = xp.sqrt(-2.0 * xp.log1p(-self.uniform(0.0, 1.0, size)))
        return radius * xp.cos(2.0 * np.pi * self.uniform(0.0, 1.0, size))


def _mix(z: Array) -> Array:
    """Scramble 64 bits: SplitMix64's finalizer (Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195)."""
    # The masks shift zeros in, where int64 would shift its sign.
    z = (z ^ (z >> 30 & 2**34 - 1)) * FACTORS[0]
    z = (z ^ (z >> 27 & 2**37 - 1)) * FACTORS[1]
    return z ^ (z >> 31 & 2**33 - 1)


PLANAR_TASKS = (HalfCheetah, Hopper, InvertedDoublePendulum, InvertedPendulum, Swimmer, Walker2d)
