"""Gymnasium's MuJoCo -v5 tasks on batched physics."""

from envs.mujoco.batch import MujocoVectorEnv
from envs.mujoco.tasks import TASKS, Task

__all__ = ["TASKS", "MujocoVectorEnv", "Task"]
