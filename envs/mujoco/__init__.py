"""Gymnasium's MuJoCo -v5 tasks, and families of tasks for meta-learning, on batched physics."""

from typing import Any

from envs.mujoco.batch import TASKS, MujocoVectorEnv
from envs.mujoco.families import FAMILIES, Family
from envs.mujoco.family_env import FamilyVectorEnv
from envs.mujoco.tasks import Task

__all__ = ["FAMILIES", "TASKS", "Family", "FamilyVectorEnv", "MujocoVectorEnv", "Task", "of_one"]


def of_one(env_id: object, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give those arguments of batched physics that Gymnasium's own environment of the same id has: not its threads,
    which change nothing of what comes out.
    """
    batched = env_id in TASKS or env_id in FAMILIES
    return {name: value for name, value in kwargs.items() if not (batched and name == "num_threads")}
