"""Environments: `make_vec` is the one door."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AutoresetMode

from envs.gymnasium_backend import GymVectorEnv, gym_vector
from envs.names import near
from envs.vector import SnapshotError, VectorEnv, blame, check_num_envs

__all__ = ["GymVectorEnv", "SnapshotError", "VectorEnv", "make_vec"]

_OWN = {"probes": "envs.probes", "families": "envs.mujoco.family_env", "newton": "envs.mujoco.newton"}
"""Namespace of ids -> the module that registers them."""
BACKENDS = ("auto", "mujoco", "gymnasium", "warp")


def make_vec(
    env_id: str | Callable[..., gymnasium.Env],
    num_envs: int = 1,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    seed: int | None = None,
    autoreset: AutoresetMode | str = AutoresetMode.SAME_STEP,
    **kwargs: Any,
) -> VectorEnv:
    """Make num_envs environments that step together.

    Args:
        env_id: an id registered with Gymnasium, or a callable that returns a new gymnasium.Env at each call.
        num_envs: number of environments, at least 1.
        backend: "mujoco" (batched physics, for the tasks in envs.mujoco.TASKS and FAMILIES), "gymnasium" (one
            environment after the other), "warp" (MuJoCo Warp, on a GPU, for the tasks of "mujoco"; see
            `envs.mujoco.warp.WarpVectorEnv`), or "auto": mujoco where it has the task.
        device: where the environments run: the CPU, or of backend "warp" a GPU.
        seed: fixes the episodes of a first reset that is given no seed.
        autoreset: "same_step" or "disabled", see `VectorEnv`.
        **kwargs: the environment's own arguments, as for gymnasium.make.

    Raises:
        ValueError: an argument is not known or not possible; the message says what is.
    """
    check_num_envs(num_envs)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}{near(backend, BACKENDS)}")
    if torch.device(device).type != "cpu" and backend != "warp":
        raise ValueError(
            f"device is {str(device)!r}; these environments run and act on the CPU. Leave device out here and pass "
            f"device={str(device)!r} to the agent, which trains there; or give backend='warp', which simulates there."
        )
    if not isinstance(env_id, str) and not callable(env_id):
        raise TypeError(f"env_id is {env_id!r}; give an id or a callable that returns a gymnasium.Env.")
    registered = _registered(env_id) if isinstance(env_id, str) else env_id
    if backend == "warp":
        env, kwargs = _on_warp(registered, num_envs, kwargs, device=device, autoreset=autoreset, seed=seed)
    else:
        env = _make_vector(registered, num_envs, backend, autoreset=autoreset, seed=seed, **kwargs)
    if isinstance(env_id, str):
        env.made_from = {"env_id": env_id, "kwargs": kwargs}
    return env


def _make_vector(
    env_id: str | Callable[..., gymnasium.Env],
    num_envs: int,
    backend: str,
    *,
    autoreset: AutoresetMode | str,
    seed: int | None,
    **kwargs: Any,
) -> VectorEnv:
    if isinstance(env_id, str) and backend != "gymnasium":
        from envs.mujoco import FamilyVectorEnv, MujocoVectorEnv

        for kind in (MujocoVectorEnv, FamilyVectorEnv):
            if env_id in kind.task_types:
                try:
                    return kind(env_id, num_envs, autoreset=autoreset, seed=seed, **kwargs)
                except TypeError as error:
                    raise _not_made(env_id, kwargs, error) from error
    if backend == "mujoco":
        raise ValueError(f"backend 'mujoco' does not have {env_id!r}; use backend='auto' or 'gymnasium'.")
    if "num_threads" in kwargs:
        from envs.mujoco import of_one

        kwargs = of_one(env_id, kwargs)
    singles = [_make_env(env_id, kwargs) for _ in range(num_envs)]
    if "mujoco" in sys.modules:
        from envs.mujoco.model import say_warnings_once

        say_warnings_once()
    return gym_vector(singles, autoreset=autoreset, seed=seed)


def _on_warp(
    env_id: str | Callable[..., gymnasium.Env], num_envs: int, kwargs: dict[str, Any], **options: Any
) -> tuple[VectorEnv, dict[str, Any]]:
    """Make environments on MuJoCo Warp; and give those of kwargs that are the task's, not Warp's."""
    try:
        from envs.device import ROOM
        from envs.mujoco.warp import WarpVectorEnv
        from envs.mujoco.warp_families import WarpFamilyEnv
    except ImportError as error:
        raise ValueError(
            f"backend is 'warp', which needs MuJoCo Warp ({error}); install it: pip install 'geodesic-rl[warp]'"
        ) from error
    kinds = {name: kind for kind in (WarpVectorEnv, WarpFamilyEnv) for name in kind.task_types}
    if not isinstance(env_id, str) or env_id not in kinds:
        raise ValueError(f"backend 'warp' does not have {env_id!r}; it has {', '.join(sorted(kinds))}.")
    try:
        env = kinds[env_id](env_id, num_envs, **options, **kwargs)
    except TypeError as error:
        raise _not_made(env_id, kwargs, error) from error
    return env, {name: value for name, value in kwargs.items() if name not in ROOM}


def _make_env(env_id: str | Callable[..., gymnasium.Env], kwargs: dict[str, Any]) -> gymnasium.Env:
    try:
        env = gymnasium.make(env_id, **kwargs) if isinstance(env_id, str) else env_id(**kwargs)
    except TypeError as error:
        if not kwargs:
            raise
        raise _not_made(env_id, kwargs, error) from error
    except gymnasium.error.Error:
        raise
    except (Exception, SystemExit) as error:
        blame(error, f"{env_id}, when it was made")
    if not isinstance(env, gymnasium.Env):
        raise TypeError(f"{env_id} returned a {type(env).__name__}; give a callable that returns a gymnasium.Env.")
    return env


def _not_made(env_id: object, kwargs: dict[str, Any], error: Exception) -> ValueError:
    return ValueError(f"{env_id} was not made with the arguments {sorted(kwargs)}: {error}")


def _registered(env_id: str) -> str:
    """Give the registered id, after importing the package that an id of the form 'package:Id-v0' names."""
    package, _, name = env_id.rpartition(":")
    package = _OWN.get(name.partition("/")[0], package)
    if package and not all(part.isidentifier() for part in package.split(".")):
        raise ValueError(f"env_id is {env_id!r}; before its last colon stands a module's name, as in package:Id-v0.")
    if package:
        importlib.import_module(package)
    if name not in gymnasium.registry:
        raise ValueError(
            f"env_id is {env_id!r}, which Gymnasium does not know{near(name, gymnasium.registry)} "
            "Give one that another package registers as 'package:Id-v0', and in Python an environment without id as a "
            "callable."
        )
    return name
