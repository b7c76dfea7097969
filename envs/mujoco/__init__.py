"""Gymnasium's MuJoCo -v5 tasks, and families of tasks for meta-learning, on batched physics."""

from envs.mujoco.batch import MujocoVectorEnv
from envs.mujoco.families import FAMILIES, Family, FamilyVectorEnv
from envs.mujoco.tasks import TASKS, Task

__all__ = ["FAMILIES", "TASKS", "Family", "FamilyVectorEnv", "MujocoVectorEnv", "Task"]
