"""Gymnasium's MuJoCo -v5 tasks, and families of tasks for meta-learning, on batched physics."""

from envs.mujoco.batch import TASKS, MujocoVectorEnv
from envs.mujoco.families import FAMILIES, Family
from envs.mujoco.family_env import FamilyVectorEnv
from envs.mujoco.tasks import Task

__all__ = ["FAMILIES", "TASKS", "Family", "FamilyVectorEnv", "MujocoVectorEnv", "Task"]
