"""The environment layer's rate beside raw physics, on all cores: what observing, rewarding and resetting cost.

Raw physics is mujoco.batch.Batch.step with the same simulations, states, actions and substeps; for the tasks that read
contact forces it is mj_step and mj_rnePostConstraint in C (raw_physics.c, compiled here). The two sides take turns in
one process, starting each turn from the same states. Actions are uniform over a share of their range: at 1 the
simplest tasks end an episode every few steps, so resets count; at 0.1 they seldom do.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import mujoco
import numpy as np
from common import context, timed, write

from envs.mujoco import TASKS, MujocoVectorEnv
from envs.mujoco.physics import ThreadedPhysics

STEPS = 8
"""Environment steps per turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    arguments = parser.parse_args()
    rows = []
    for env_id in arguments.tasks:
        for share in (1.0, 0.1):
            row = compare(env_id, arguments.num_envs, arguments.turns, share)
            rows.append(row)
            print(
                f"{env_id:26} actions x {share:<4} raw {row['raw']:8.0f}/s  layer {row['layer']:8.0f}/s  "
                f"ratio {row['ratio']:.3f}  resets per step {row['resets_per_step']:.3f}",
                flush=True,
            )
    print(write("environments", {**context(), "num_envs": arguments.num_envs, "rows": rows}))


def compare(env_id: str, num_envs: int, turns: int, share: float) -> dict:
    """Median rates of both sides, in environment steps per second, and the median of the turns' ratios."""
    env = MujocoVectorEnv(env_id, num_envs)
    env.reset(seed=0)
    space = env.single_action_space
    draw = np.random.default_rng(0).uniform
    actions = draw(share * space.low, share * space.high, (STEPS, num_envs, *space.shape)).astype(np.float32)
    set_states, raw_step = raw_physics(env)
    rows = np.arange(num_envs)
    for _ in range(5):
        for action in actions:
            env.step(action)
    raw_seconds, layer_seconds, resets = [], [], 0
    for _ in range(turns):
        set_states(env._physics.integration_state(rows))
        raw_seconds.append(timed(lambda: [raw_step(action) for action in actions]))
        before = env._episode.sum()
        layer_seconds.append(timed(lambda: [env.step(action) for action in actions]))
        resets += int(env._episode.sum() - before)
    env.close()
    raw, layer = np.array(raw_seconds), np.array(layer_seconds)
    return {
        "env_id": env_id,
        "action_share": share,
        "raw": num_envs * STEPS / float(np.median(raw)),
        "layer": num_envs * STEPS / float(np.median(layer)),
        "ratio": float(np.median(raw / layer)),
        "resets_per_step": resets / (turns * STEPS * num_envs),
        "raw_is": "C" if isinstance(env._physics, ThreadedPhysics) else "mujoco.batch",
    }


def raw_physics(env: MujocoVectorEnv) -> tuple[Callable[[np.ndarray], None], Callable[[np.ndarray], None]]:
    """Functions that set all simulations' integration states, and that step them with actions."""
    if isinstance(env._physics, ThreadedPhysics):
        return raw_in_c(env)
    batch = mujoco.batch.Batch(env.model, env.num_envs)
    ctrl = batch.bind("ctrl")

    def set_states(states: np.ndarray) -> None:
        batch.state[:] = states

    def step(action: np.ndarray) -> None:
        ctrl[:] = action
        batch.step(nstep=env.task.frame_skip)

    return set_states, step


def raw_in_c(env: MujocoVectorEnv) -> tuple[Callable[[np.ndarray], None], Callable[[np.ndarray], None]]:
    package = Path(mujoco.__file__).parent
    library = next(package.glob("libmujoco.so.*"))
    target = Path(tempfile.mkdtemp()) / "raw_physics.so"
    source = Path(__file__).with_name("raw_physics.c")
    flags = ["-O3", "-shared", "-fPIC", f"-I{package / 'include'}", f"-Wl,-rpath,{package}"]
    subprocess.run(["gcc", *flags, str(source), str(library), "-o", str(target), "-lpthread"], check=True)
    step_all = ctypes.CDLL(str(target)).step_all
    data = [mujoco.MjData(env.model) for _ in range(env.num_envs)]
    pointers = (ctypes.c_void_p * env.num_envs)(*(d._address for d in data))
    model = ctypes.c_void_p(env.model._address)
    specification = int(mujoco.mjtState.mjSTATE_INTEGRATION)

    def set_states(states: np.ndarray) -> None:
        for d, state in zip(data, states, strict=True):
            mujoco.mj_setState(env.model, d, state, specification)

    def step(action: np.ndarray) -> None:
        ctrl = np.ascontiguousarray(action, dtype=np.float64)
        address = ctrl.ctypes.data_as(ctypes.c_void_p)
        step_all(model, pointers, address, env.num_envs, env.task.frame_skip, env._physics.num_threads)

    return set_states, step


if __name__ == "__main__":
    main()
