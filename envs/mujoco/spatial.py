"""Gymnasium's -v5 tasks of bodies in space and of arms; see `envs.mujoco.tasks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from envs.mujoco.tasks import Array, NearRest, PhysicsState, RandomStreams, Range, Task, in_plane, norm

PUSHER_TRIES = 32
"""Points that the cylinder's is drawn from."""


def rows(xp: Any, array: Array) -> Array:
    """Reshape [n, bodies, k] to [n, bodies * k]."""
    return xp.reshape(array, (array.shape[0], array.shape[1] * array.shape[2]))


@dataclass(frozen=True, kw_only=True)
class Ant(NearRest):
    env_id = "Ant-v5"
    tells = ("qpos",)
    normal_velocities = True
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

    def position(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        return xp.asarray(s.xpos[:, model.body(self.main_body).id, :2], copy=True)

    def forward(self, xp: Any, s: PhysicsState, velocity: Array) -> Array:
        """Give what the velocity [n, 2] earns, [n]."""
        return velocity[:, 0] * self.forward_reward_weight

    def where(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> dict[str, Array]:
        return in_plane(xp, s)

    def _contact_forces(self, xp: Any, s: PhysicsState) -> Array:
        return xp.clip(s.cfrc_ext, *self.contact_force_range)

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        parts = [s.qpos[:, 2:] if self.exclude_current_positions_from_observation else s.qpos, s.qvel]
        if self.include_cfrc_ext_in_observation:
            parts.append(rows(xp, self._contact_forces(xp, s)[:, 1:]))
        return xp.concat(parts, axis=1)

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        low, high = self.healthy_z_range
        z = s.qpos[:, 2]
        healthy = xp.all(xp.isfinite(s.qpos), axis=1) & xp.all(xp.isfinite(s.qvel), axis=1) & (low <= z) & (z <= high)
        forward = self.forward(xp, s, velocity)
        survive = healthy * self.healthy_reward
        costs = control = -self.ctrl_cost_weight * xp.sum(xp.square(action), axis=-1)
        contact = xp.zeros_like(survive)
        if self.contact_cost_weight != 0:
            forces = rows(xp, self._contact_forces(xp, s))
            contact = -self.contact_cost_weight * xp.sum(xp.square(forces), axis=-1)
            costs = control + contact
        terms = {
            "x_velocity": velocity[:, 0],
            "y_velocity": velocity[:, 1],
            "reward_forward": forward,
            "reward_survive": survive,
            "reward_ctrl": control,
            "reward_contact": contact,
        }
        return (forward + survive) + costs, ~healthy if self.terminate_when_unhealthy else None, terms


@dataclass(frozen=True, kw_only=True)
class _HumanoidBody(NearRest):
    """The body that Humanoid and HumanoidStandup share, and what they observe of it."""

    tells = ("qpos", "ten_length", "ten_velocity")

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
        read = ("qpos", "qvel", "ctrl", "cfrc_ext", "ten_length", "ten_velocity")
        return (*read, *(name for name, included in optional.items() if included))

    def where(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> dict[str, Array]:
        return in_plane(xp, s) | {"tendon_length": s.ten_length, "tendon_velocity": s.ten_velocity}

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        parts = [s.qpos[:, 2:] if self.exclude_current_positions_from_observation else s.qpos, s.qvel]
        if self.include_cinert_in_observation:
            parts.append(rows(xp, s.cinert[:, 1:]))
        if self.include_cvel_in_observation:
            parts.append(rows(xp, s.cvel[:, 1:]))
        if self.include_qfrc_actuator_in_observation:
            parts.append(s.qfrc_actuator[:, 6:])
        if self.include_cfrc_ext_in_observation:
            parts.append(rows(xp, s.cfrc_ext[:, 1:]))
        return xp.concat(parts, axis=1)

    def _impact(self, xp: Any, s: PhysicsState, weight: float, cost_range: Range) -> Array:
        """Give the reward of contact forces, minus a cost in a range."""
        return -xp.clip(weight * xp.sum(xp.square(rows(xp, s.cfrc_ext)), axis=-1), *cost_range)


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

    def position(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        """Give the center of mass, x and y."""
        return xp.einsum("b,nbj->nj", model.body_mass, s.xipos)[:, :2] / model.body_mass.sum()

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        low, high = self.healthy_z_range
        z = s.qpos[:, 2]
        healthy = (low < z) & (z < high)
        forward = self.forward_reward_weight * velocity[:, 0]
        survive = healthy * self.healthy_reward
        control = -self.ctrl_cost_weight * xp.sum(xp.square(s.ctrl), axis=-1)
        contact = self._impact(xp, s, self.contact_cost_weight, self.contact_cost_range)
        terms = {
            "x_velocity": velocity[:, 0],
            "y_velocity": velocity[:, 1],
            "reward_forward": forward,
            "reward_survive": survive,
            "reward_ctrl": control,
            "reward_contact": contact,
        }
        return (forward + survive) + (control + contact), ~healthy if self.terminate_when_unhealthy else None, terms


@dataclass(frozen=True, kw_only=True)
class HumanoidStandup(_HumanoidBody):
    env_id = "HumanoidStandup-v5"
    xml_file: str = "humanoidstandup.xml"
    uph_cost_weight: float = 1.0
    impact_cost_weight: float = 5e-7
    impact_cost_range: Range = (-float("inf"), 10.0)

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        # Gymnasium takes uph_cost_weight and does not use it; so it is here.
        upward = (s.qpos[:, 2] - 0.0) / model.opt.timestep
        control = -self.ctrl_cost_weight * xp.sum(xp.square(s.ctrl), axis=-1)
        impact = self._impact(xp, s, self.impact_cost_weight, self.impact_cost_range)
        terms = {"reward_linup": upward, "reward_quadctrl": control, "reward_impact": impact}
        return upward + control + impact + 1, None, terms

    def where(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> dict[str, Array]:
        told = super().where(xp, s, model) | {"z_distance_from_origin": s.qpos[:, 2] - model.qpos0[2]}
        del told["distance_from_origin"]
        return told


@dataclass(frozen=True, kw_only=True)
class Reacher(Task):
    env_id = "Reacher-v5"
    reads = ("qpos", "qvel", "xpos")
    xml_file: str = "reacher.xml"
    frame_skip: int = 2
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 1.0

    def _to_target(self, s: PhysicsState, model: mujoco.MjModel) -> Array:
        return s.xpos[:, model.body("fingertip").id] - s.xpos[:, model.body("target").id]

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        angles = s.qpos[:, :2]
        to_target = self._to_target(s, model)[:, :2]
        return xp.concat((xp.cos(angles), xp.sin(angles), s.qpos[:, 2:], s.qvel[:, :2], to_target), axis=1)

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        distance = norm(xp, self._to_target(s, model)) * -self.reward_dist_weight
        control = -self.reward_control_weight * xp.sum(xp.square(action), axis=-1)
        return distance + control, None, {"reward_dist": distance, "reward_ctrl": control}

    def initial_state(self, xp: Any, random: RandomStreams, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        positions = random.uniform(-0.1, 0.1, qpos.shape[0]) + qpos
        # Uniform in the disc of radius 0.2, where Gymnasium rejects points of the square.
        radius = 0.2 * xp.sqrt(random.uniform(0.0, 1.0, 1))
        angle = random.uniform(0.0, 2 * np.pi, 1)
        velocities = qvel + random.uniform(-0.005, 0.005, qvel.shape[0])
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

    def _points(self, s: PhysicsState, model: mujoco.MjModel) -> list[Array]:
        return [s.xpos[:, model.body(name).id] for name in ("tips_arm", "object", "goal")]

    def observe(self, xp: Any, s: PhysicsState, model: mujoco.MjModel) -> Array:
        return xp.concat((s.qpos[:, :7], s.qvel[:, :7], *self._points(s, model)), axis=1)

    def reward(
        self, xp: Any, s: PhysicsState, model: mujoco.MjModel, action: Array, velocity: Array
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        tip, cylinder, goal = self._points(s, model)
        near = norm(xp, cylinder - tip) * -self.reward_near_weight
        distance = norm(xp, cylinder - goal) * -self.reward_dist_weight
        control = -self.reward_control_weight * xp.sum(xp.square(action), axis=-1)
        terms = {"reward_near": near, "reward_dist": distance, "reward_ctrl": control}
        return distance + control + near, None, terms

    def initial_state(self, xp: Any, random: RandomStreams, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        velocities = qvel + random.uniform(-0.005, 0.005, qvel.shape[0])
        velocities[:, -4:] = 0.0
        positions = xp.zeros_like(velocities[:, :1]) + qpos
        positions[:, -4:] = 0.0  # the goal stays at the origin
        # The first of many points that is not too near to the goal; a third of them are.
        tries = xp.reshape(random.uniform(0.0, 1.0, 2 * PUSHER_TRIES), (-1, PUSHER_TRIES, 2))
        points = xp.stack((-0.3 + 0.3 * tries[..., 0], -0.2 + 0.4 * tries[..., 1]), axis=-1)
        far = xp.astype(norm(xp, points) > 0.17, xp.int32)
        first = xp.argmax(far, axis=1)
        positions[:, -4:-2] = points[xp.arange(first.shape[0], device=first.device), first]
        return positions, velocities


SPATIAL_TASKS = (Ant, Humanoid, HumanoidStandup, Pusher, Reacher)
