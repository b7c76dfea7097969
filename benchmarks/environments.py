"""The environment layer's rate beside raw physics, on all cores: what observing, rewarding and resetting cost.

Raw physics is mujoco.batch.Batch.step with the same simulations, states, actions and substeps; for the tasks that read
contact forces it is mj_step and mj_rnePostConstraint in C (raw_physics.c, compiled here). The two sides take turns in
one process, starting each turn from the same states. Actions are uniform over their range. Under them the pendulums
fall every few steps, and a reset costs physics of its own (mj_forward) that the raw side does not do; so they are
measured a second time with the actions of a policy that NPG trains here and that keeps them up.
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
from torch import Tensor

from agents import NPG
from envs.mujoco import TASKS, MujocoVectorEnv
from envs.mujoco.physics import ThreadedPhysics

STEPS = 8
"""Environment steps per turn."""

WARM_UP = 5
"""Turns that do not count."""

BALANCED = {"InvertedPendulum-v5": 60_000, "InvertedDoublePendulum-v5": 400_000}
"""Tasks that need a policy to go on, and the environment steps to train it for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    arguments = parser.parse_args()
    rows = []
    for env_id in arguments.tasks:
        for actions in ("random", "balancing") if env_id in BALANCED else ("random",):
            row = compare(env_id, arguments.num_envs, arguments.turns, actions)
            rows.append(row)
            print(
                f"{env_id:26} {actions:9} raw {row['raw']:8.0f}/s  layer {row['layer']:8.0f}/s  "
                f"ratio {row['ratio']:.3f}  resets per step {row['resets_per_step']:.3f}",
                flush=True,
            )
    print(write("environments", {**context(), "num_envs": arguments.num_envs, "rows": rows}))


def compare(env_id: str, num_envs: int, turns: int, actions: str) -> dict:
    """Median rates of both sides, in environment steps per second, and the median of the turns' ratios."""
    env = MujocoVectorEnv(env_id, num_envs)
    observations, _ = env.reset(seed=0)
    choose = balancing(env_id) if actions == "balancing" else at_random(env)
    set_states, raw_step = raw_physics(env)
    raw_seconds, layer_seconds, resets = [], [], 0
    for turn in range(WARM_UP + turns):
        # What the turn's actions are is found first, untimed; then both sides repeat it.
        kept, chosen = env.snapshot(), []
        for _ in range(STEPS):
            chosen.append(choose(observations))
            observations = env.step(chosen[-1])[0]
        env.restore(kept)
        set_states(kept["physics"].numpy())
        before = env._episode.sum()
        seconds = timed(lambda work=chosen: [raw_step(action) for action in work])
        layer = timed(lambda work=chosen: [env.step(action) for action in work])
        if turn >= WARM_UP:
            raw_seconds.append(seconds)
            layer_seconds.append(layer)
            resets += int(env._episode.sum() - before)
    env.close()
    raw, layers = np.array(raw_seconds), np.array(layer_seconds)
    return {
        "env_id": env_id,
        "actions": actions,
        "raw": num_envs * STEPS / float(np.median(raw)),
        "layer": num_envs * STEPS / float(np.median(layers)),
        "ratio": float(np.median(raw / layers)),
        "resets_per_step": resets / (turns * STEPS * num_envs),
        "raw_is": "C" if isinstance(env._physics, ThreadedPhysics) else "mujoco.batch",
    }


def at_random(env: MujocoVectorEnv) -> Callable[[Tensor], np.ndarray]:
    space, draw = env.single_action_space, np.random.default_rng(0).uniform
    return lambda observations: draw(space.low, space.high, (env.num_envs, *space.shape)).astype(np.float32)


def balancing(env_id: str) -> Callable[[Tensor], np.ndarray]:
    agent = NPG("MlpPolicy", env_id, seed=0, device="cpu").learn(BALANCED[env_id])
    return lambda observations: agent.act(observations, deterministic=True).numpy()


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
