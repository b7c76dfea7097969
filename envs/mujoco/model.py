"""MuJoCo's models, loaded without a log file in the working directory and without work that they have no use for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import mujoco
from gymnasium.envs.mujoco.mujoco_env import expand_model_path


def load_model(xml_file: str, solver: mujoco.mjtSolver | None = None) -> mujoco.MjModel:
    """Load one of Gymnasium's model files, or a file of one's own, with another solver than its own if one is given.

    Raises:
        ValueError: MuJoCo does not read it.
    """
    try:
        with _silent_warnings():
            model = mujoco.MjModel.from_xml_path(expand_model_path(xml_file))
    except ValueError as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"xml_file={xml_file} is no model that MuJoCo reads ({said}); correct or replace it."
        ) from error
    if solver is not None:
        model.opt.solver = solver
    skip_idle_work(model)
    return model


def constants(model: mujoco.MjModel, as_array: Callable[[Any], Any]) -> Any:
    """Give what tasks compute with of a model, under its names, with arrays of another library or on a device."""
    arrays = {name: as_array(getattr(model, name)) for name in ("qpos0", "body_mass")}
    return SimpleNamespace(opt=model.opt, body=model.body, **arrays)


@contextmanager
def _silent_warnings() -> Iterator[None]:
    """Keep MuJoCo from writing a log file into the working directory for its remarks on Gymnasium's models."""
    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(previous)


def say_warnings_once() -> None:
    """Have MuJoCo's warnings come once of each kind, as Python's, unless somebody has another way: it writes them to
    stderr and to a log file in the working directory, one for each simulation and episode.
    """
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_say_once)


def _say_once(message: str) -> None:
    kind = message.split(" at ")[0]
    if kind not in _said:
        _said.add(kind)
        warnings.warn(f"MuJoCo: {message} Further warnings of this kind are not shown.", RuntimeWarning, stacklevel=2)


_said: set[str] = set()


def skip_idle_work(model: mujoco.MjModel) -> None:
    """Switch off the parts of MuJoCo's pipeline that have nothing to do in this model: results keep their bits.

    These are collisions where no two geoms may touch, a fifth of the time of a step of InvertedDoublePendulum-v5; and
    constraint islands where all joints are of one tree, and so of one island, 7 % on Hopper-v5. The collisions'
    midphase stays: without it contacts come in another order, which Humanoid-v5's bits show.
    """
    bits = mujoco.mjtDisableBit
    takes, gives, body = model.geom_contype[:, None], model.geom_conaffinity, model.geom_bodyid
    may_touch = (takes & gives).astype(bool) & (body[:, None] != body)
    if not may_touch.any() and model.npair == 0 and model.nflex == 0:
        model.opt.disableflags |= bits.mjDSBL_CONTACT
    if model.ntree <= 1 and model.nflex == 0:
        model.opt.disableflags |= bits.mjDSBL_ISLAND
