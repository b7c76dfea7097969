"""What the MuJoCo tasks observe, reward and end at: Gymnasium's eleven -v5 tasks, each written once for a whole batch.

The functions are written against the array API and take its namespace as `xp`: NumPy on the CPU, where every sum has
the order of Gymnasium's own and results equal it bit for bit. Actions arrive in float32 and are squared in float32, as
Gymnasium does. Parameters have Gymnasium's names, meanings and defaults
(https://gymnasium.farama.org/environments/mujoco/).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import mujoco
import numpy as np

Array = Any
Range = tuple[float, float]


class State(Protocol):
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
    goal: Array
    """Each simulation's own task, [n, G]; of task families only."""


class Noise(Protocol):
    """Random numbers for the reset of n simulations, one independent stream for each."""

    def uniform(self, low: float, high: float, size: int) -> Array: ...
    def normal(self, size: int) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. A field of a subclass is a keyword argument of the Gymnasium environment of that name."""

    env_id: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("qpos", "qvel")

    xml_file: str
    frame_skip: int

    def fields(self) -> tuple[str, ...]:
        """The physics fields that this task reads, under MjData's names."""
        return self.reads

    def position(self, xp: Any, s: State, model: mujoco.MjModel) -> Array | None:
        """What the next step's reward compares with, [n, ...]; None if it compares with nothing."""
        return None

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        """Observations [n, O]."""
        raise NotImplementedError

    def reward(
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        """Rewards [n], terminated [n] (None: this task never terminates) and the reward's terms.

        action is [n, A]; velocity is the change of `position` per second, [n, ...] (None where that is None).
        """
        raise NotImplementedError

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        """Reset states [n, nq] and [n, nv] around the model's own qpos [nq] and qvel [nv]."""
        raise NotImplementedError


def _uniform_around(noise: Noise, qpos: Array, qvel: Array, scale: float) -> tuple[Array, Array]:
    drawn = noise.uniform(-scale, scale, qpos.shape[0] + qvel.shape[0])
    return qpos + drawn[:, : qpos.shape[0]], qvel + drawn[:, qpos.shape[0] :]


def _uniform_then_normal(noise: Noise, qpos: Array, qvel: Array, scale: float) -> tuple[Array, Array]:
    return qpos + noise.uniform(-scale, scale, qpos.shape[0]), qvel + scale * noise.normal(qvel.shape[0])


def _control_cost(xp: Any, weight: float, action: Array) -> Array:
    return weight * xp.sum(xp.square(action), axis=-1)


def _rows(xp: Any, array: Array) -> Array:
    """[n, bodies, k] as [n, bodies * k]."""
    return xp.reshape(array, (array.shape[0], array.shape[1] * array.shape[2]))


def _norm(xp: Any, vector: Array) -> Array:
    return xp.sqrt(xp.vecdot(vector, vector))


@dataclass(frozen=True, kw_only=True)
class _Runner(Task):
    """Rewards the velocity of the root; observes positions (the root's left out by default) and velocities."""

    root: ClassVar[int] = 1
    """Leading coordinates of qpos that move with the root."""

    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 0.1
    exclude_current_positions_from_observation: bool = True

    def position(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        return s.qpos[:, 0].copy()

    def forward(self, xp: Any, s: State, velocity: Array) -> Array:
        """What the velocity [n] earns, [n]."""
        return self.forward_reward_weight * velocity

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        skip = self.root if self.exclude_current_positions_from_observation else 0
        return xp.concat((s.qpos[:, skip:], s.qvel), axis=1)

    def reward(
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        forward = self.forward(xp, s, velocity)
        control = _control_cost(xp, self.ctrl_cost_weight, action)
        return forward - control, None, {"x_velocity": velocity, "reward_forward": forward, "control_cost": control}

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        return _uniform_then_normal(noise, qpos, qvel, self.reset_noise_scale)


@dataclass(frozen=True, kw_only=True)
class HalfCheetah(_Runner):
    env_id = "HalfCheetah-v5"
    xml_file: str = "half_cheetah.xml"
    frame_skip: int = 5


@dataclass(frozen=True, kw_only=True)
class Swimmer(_Runner):
    env_id = "Swimmer-v5"
    root = 2
    xml_file: str = "swimmer.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-4

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        return _uniform_around(noise, qpos, qvel, self.reset_noise_scale)


@dataclass(frozen=True, kw_only=True)
class _PlanarLegged(_Runner):
    """A runner in a plane that ends when it falls."""

    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range
    healthy_angle_range: Range
    reset_noise_scale: float = 5e-3

    def healthy(self, xp: Any, s: State) -> Array:
        """[n], whether height and torso angle are in their open ranges."""
        (low_z, high_z), (low_angle, high_angle) = self.healthy_z_range, self.healthy_angle_range
        z, angle = s.qpos[:, 1], s.qpos[:, 2]
        return (low_z < z) & (z < high_z) & (low_angle < angle) & (angle < high_angle)

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        skip = self.root if self.exclude_current_positions_from_observation else 0
        return xp.concat((s.qpos[:, skip:], xp.clip(s.qvel, -10.0, 10.0)), axis=1)

    def reward(
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        healthy = self.healthy(xp, s)
        forward = self.forward(xp, s, velocity)
        survive = healthy * self.healthy_reward
        control = _control_cost(xp, self.ctrl_cost_weight, action)
        terms = {
            "x_velocity": velocity,
            "reward_forward": forward,
            "reward_survive": survive,
            "control_cost": control,
        }
        return forward + survive - control, ~healthy if self.terminate_when_unhealthy else None, terms

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        return _uniform_around(noise, qpos, qvel, self.reset_noise_scale)


@dataclass(frozen=True, kw_only=True)
class Hopper(_PlanarLegged):
    env_id = "Hopper-v5"
    xml_file: str = "hopper.xml"
    healthy_state_range: Range = (-100.0, 100.0)
    healthy_z_range: Range = (0.7, float("inf"))
    healthy_angle_range: Range = (-0.2, 0.2)

    def healthy(self, xp: Any, s: State) -> Array:
        low, high = self.healthy_state_range
        state = xp.concat((s.qpos[:, 2:], s.qvel), axis=1)
        return xp.all((low < state) & (state < high), axis=1) & super().healthy(xp, s)


@dataclass(frozen=True, kw_only=True)
class Walker2d(_PlanarLegged):
    env_id = "Walker2d-v5"
    xml_file: str = "walker2d_v5.xml"
    healthy_z_range: Range = (0.8, 2.0)
    healthy_angle_range: Range = (-1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Ant(Task):
    env_id = "Ant-v5"
    xml_file: str = "ant.xml"
    frame_skip: int = 5
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    healthy_reward: float = 1.0
    main_body: int | str = 1
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range = (0.2, 1.0)
    contact_force_range: Range = (-1.0, 1.0)
    reset_noise_scale: float = 0.1
    exclude_current_positions_from_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    def fields(self) -> tuple[str, ...]:
        # Contact forces cost a pass of their own: read them only where they count.
        forces = self.include_cfrc_ext_in_observation or self.contact_cost_weight != 0
        return ("qpos", "qvel", "xpos", "cfrc_ext") if forces else ("qpos", "qvel", "xpos")

    def position(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        return s.xpos[:, model.body(self.main_body).id, :2].copy()

    def forward(self, xp: Any, s: State, velocity: Array) -> Array:
        """What the velocity [n, 2] earns, [n]."""
        return velocity[:, 0] * self.forward_reward_weight

    def _contact_forces(self, xp: Any, s: State) -> Array:
        return xp.clip(s.cfrc_ext, *self.contact_force_range)

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        parts = [s.qpos[:, 2:] if self.exclude_current_positions_from_observation else s.qpos, s.qvel]
        if self.include_cfrc_ext_in_observation:
            parts.append(_rows(xp, self._contact_forces(xp, s)[:, 1:]))
        return xp.concat(parts, axis=1)

    def reward(
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        low, high = self.healthy_z_range
        z = s.qpos[:, 2]
        healthy = xp.all(xp.isfinite(s.qpos), axis=1) & xp.all(xp.isfinite(s.qvel), axis=1) & (low <= z) & (z <= high)
        forward = self.forward(xp, s, velocity)
        survive = healthy * self.healthy_reward
        costs = control = _control_cost(xp, self.ctrl_cost_weight, action)
        terms = {
            "x_velocity": velocity[:, 0],
            "reward_forward": forward,
            "reward_survive": survive,
            "control_cost": control,
        }
        if self.contact_cost_weight != 0:
            forces = _rows(xp, self._contact_forces(xp, s))
            terms["contact_cost"] = self.contact_cost_weight * xp.sum(xp.square(forces), axis=-1)
            costs = control + terms["contact_cost"]
        return (forward + survive) - costs, ~healthy if self.terminate_when_unhealthy else None, terms

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        return _uniform_then_normal(noise, qpos, qvel, self.reset_noise_scale)


@dataclass(frozen=True, kw_only=True)
class _HumanoidBody(Task):
    """The body that Humanoid and HumanoidStandup share, and what they observe of it."""

    frame_skip: int = 5
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 1e-2
    exclude_current_positions_from_observation: bool = True
    include_cinert_in_observation: bool = True
    include_cvel_in_observation: bool = True
    include_qfrc_actuator_in_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    def fields(self) -> tuple[str, ...]:
        optional = {
            "cinert": self.include_cinert_in_observation,
            "cvel": self.include_cvel_in_observation,
            "qfrc_actuator": self.include_qfrc_actuator_in_observation,
        }
        return ("qpos", "qvel", "ctrl", "cfrc_ext", *(name for name, included in optional.items() if included))

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        parts = [s.qpos[:, 2:] if self.exclude_current_positions_from_observation else s.qpos, s.qvel]
        if self.include_cinert_in_observation:
            parts.append(_rows(xp, s.cinert[:, 1:]))
        if self.include_cvel_in_observation:
            parts.append(_rows(xp, s.cvel[:, 1:]))
        if self.include_qfrc_actuator_in_observation:
            parts.append(s.qfrc_actuator[:, 6:])
        if self.include_cfrc_ext_in_observation:
            parts.append(_rows(xp, s.cfrc_ext[:, 1:]))
        return xp.concat(parts, axis=1)

    def _impact_cost(self, xp: Any, s: State, weight: float, cost_range: Range) -> Array:
        return xp.clip(weight * xp.sum(xp.square(_rows(xp, s.cfrc_ext)), axis=-1), *cost_range)

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        return _uniform_around(noise, qpos, qvel, self.reset_noise_scale)


@dataclass(frozen=True, kw_only=True)
class Humanoid(_HumanoidBody):
    env_id = "Humanoid-v5"
    xml_file: str = "humanoid.xml"
    forward_reward_weight: float = 1.25
    contact_cost_weight: float = 5e-7
    contact_cost_range: Range = (-float("inf"), 10.0)
    healthy_reward: float = 5.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range = (1.0, 2.0)

    def fields(self) -> tuple[str, ...]:
        return (*super().fields(), "xipos")

    def position(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        """The center of mass, x and y."""
        return xp.einsum("b,nbj->nj", model.body_mass, s.xipos)[:, :2] / model.body_mass.sum()

    def reward(
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        low, high = self.healthy_z_range
        z = s.qpos[:, 2]
        healthy = (low < z) & (z < high)
        forward = self.forward_reward_weight * velocity[:, 0]
        survive = healthy * self.healthy_reward
        control = _control_cost(xp, self.ctrl_cost_weight, s.ctrl)
        contact = self._impact_cost(xp, s, self.contact_cost_weight, self.contact_cost_range)
        terms = {
            "x_velocity": velocity[:, 0],
            "reward_forward": forward,
            "reward_survive": survive,
            "control_cost": control,
            "contact_cost": contact,
        }
        return (forward + survive) - (control + contact), ~healthy if self.terminate_when_unhealthy else None, terms


@dataclass(frozen=True, kw_only=True)
class HumanoidStandup(_HumanoidBody):
    env_id = "HumanoidStandup-v5"
    xml_file: str = "humanoidstandup.xml"
    uph_cost_weight: float = 1.0
    impact_cost_weight: float = 5e-7
    impact_cost_range: Range = (-float("inf"), 10.0)

    def reward(
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        # Gymnasium takes uph_cost_weight and does not use it; so it is here.
        upward = (s.qpos[:, 2] - 0.0) / model.opt.timestep
        control = _control_cost(xp, self.ctrl_cost_weight, s.ctrl)
        impact = self._impact_cost(xp, s, self.impact_cost_weight, self.impact_cost_range)
        terms = {"reward_linup": upward, "control_cost": control, "impact_cost": impact}
        return upward - control - impact + 1, None, terms


@dataclass(frozen=True, kw_only=True)
class InvertedPendulum(Task):
    env_id = "InvertedPendulum-v5"
    xml_file: str = "inverted_pendulum.xml"
    frame_skip: int = 2
    reset_noise_scale: float = 0.01

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        return xp.concat((s.qpos, s.qvel), axis=1)

    def reward(
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        finite = xp.all(xp.isfinite(s.qpos), axis=1) & xp.all(xp.isfinite(s.qvel), axis=1)
        upright = finite & (xp.abs(s.qpos[:, 1]) <= 0.2)
        reward = xp.astype(upright, s.qpos.dtype)
        return reward, ~upright, {"reward_survive": reward}

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        return _uniform_around(noise, qpos, qvel, self.reset_noise_scale)


@dataclass(frozen=True, kw_only=True)
class InvertedDoublePendulum(Task):
    env_id = "InvertedDoublePendulum-v5"
    reads = ("qpos", "qvel", "site_xpos", "qfrc_constraint")
    xml_file: str = "inverted_double_pendulum.xml"
    frame_skip: int = 5
    healthy_reward: float = 10.0
    reset_noise_scale: float = 0.1

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
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
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        x, y = s.site_xpos[:, 0, 0], s.site_xpos[:, 0, 2]
        v1, v2 = s.qvel[:, 1], s.qvel[:, 2]
        fallen = y <= 1
        distance = 0.01 * xp.square(x) + xp.square(y - 2)
        speed = 1e-3 * xp.square(v1) + 5e-3 * xp.square(v2)
        survive = self.healthy_reward * ~fallen
        terms = {"reward_survive": survive, "distance_cost": distance, "velocity_cost": speed}
        return survive - distance - speed, fallen, terms

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        return _uniform_then_normal(noise, qpos, qvel, self.reset_noise_scale)


@dataclass(frozen=True, kw_only=True)
class Reacher(Task):
    env_id = "Reacher-v5"
    reads = ("qpos", "qvel", "xpos")
    xml_file: str = "reacher.xml"
    frame_skip: int = 2
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 1.0

    def _to_target(self, s: State, model: mujoco.MjModel) -> Array:
        return s.xpos[:, model.body("fingertip").id] - s.xpos[:, model.body("target").id]

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        angles = s.qpos[:, :2]
        to_target = self._to_target(s, model)[:, :2]
        return xp.concat((xp.cos(angles), xp.sin(angles), s.qpos[:, 2:], s.qvel[:, :2], to_target), axis=1)

    def reward(
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        distance = _norm(xp, self._to_target(s, model)) * self.reward_dist_weight
        control = _control_cost(xp, self.reward_control_weight, action)
        return -distance - control, None, {"distance_cost": distance, "control_cost": control}

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        positions = noise.uniform(-0.1, 0.1, qpos.shape[0]) + qpos
        # Uniform in the disc of radius 0.2, where Gymnasium rejects points of the square.
        radius = 0.2 * xp.sqrt(noise.uniform(0.0, 1.0, 1))
        angle = noise.uniform(0.0, 2 * np.pi, 1)
        velocities = qvel + noise.uniform(-0.005, 0.005, qvel.shape[0])
        velocities[:, -2:] = 0.0
        return xp.concat((positions[:, :-2], radius * xp.cos(angle), radius * xp.sin(angle)), axis=1), velocities


@dataclass(frozen=True, kw_only=True)
class Pusher(Task):
    env_id = "Pusher-v5"
    reads = ("qpos", "qvel", "xpos")
    xml_file: str = "pusher_v5.xml"
    frame_skip: int = 5
    reward_near_weight: float = 0.5
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 0.1

    def _points(self, s: State, model: mujoco.MjModel) -> list[Array]:
        return [s.xpos[:, model.body(name).id] for name in ("tips_arm", "object", "goal")]

    def observe(self, xp: Any, s: State, model: mujoco.MjModel) -> Array:
        return xp.concat((s.qpos[:, :7], s.qvel[:, :7], *self._points(s, model)), axis=1)

    def reward(
        self, xp: Any, s: State, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        tip, cylinder, goal = self._points(s, model)
        near = _norm(xp, cylinder - tip) * self.reward_near_weight
        distance = _norm(xp, cylinder - goal) * self.reward_dist_weight
        control = _control_cost(xp, self.reward_control_weight, action)
        terms = {"near_cost": near, "distance_cost": distance, "control_cost": control}
        return -distance - control - near, None, terms

    def initial_state(self, xp: Any, noise: Noise, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        velocities = qvel + noise.uniform(-0.005, 0.005, qvel.shape[0])
        velocities[:, -4:] = 0.0
        positions = xp.zeros_like(velocities[:, :1]) + qpos
        positions[:, -4:] = 0.0  # the cylinder, drawn below, and the goal, which stays at the origin
        near = xp.ones(positions.shape[0], dtype=xp.bool)
        while xp.any(near):
            drawn = xp.concat((noise.uniform(-0.3, 0.0, 1), noise.uniform(-0.2, 0.2, 1)), axis=1)
            positions[near, -4:-2] = drawn[near]
            near = _norm(xp, positions[:, -4:-2]) <= 0.17
        return positions, velocities


TASKS: dict[str, Callable[..., Task]] = {
    task.env_id: task
    for task in (
        Ant,
        HalfCheetah,
        Hopper,
        Humanoid,
        HumanoidStandup,
        InvertedDoublePendulum,
        InvertedPendulum,
        Pusher,
        Reacher,
        Swimmer,
        Walker2d,
    )
}
"""Gymnasium id -> the class of its task."""
