"""The environment layer's rate beside raw physics, on all cores: what observing, rewarding and resetting cost.

Raw physics is mujoco.batch.Batch.step with the same simulations, states, actions and substeps; for the tasks that read
contact forces it is mj_step and mj_rnePostConstraint in C (raw_physics.c, compiled here). The two sides take turns in
one process, starting each turn from the same states. Actions are uniform over their range. Under them the pendulums
fall every few steps, and a reset costs physics of its own (mj_forward) that the raw side does not do; so they are
measured a second time with the actions of a policy that NPG trains here and that keeps them up. A third side, "raw
with resets", does the mj_forward of each reset as well (mujoco.batch only).
"""

from __future__ import annotations

import argparse
import ctypes
import random
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import mujoco
import numpy as np
from torch import Tensor

from agents import NPG
from benchmarks.common import context, timed, write
from envs.mujoco import TASKS, MujocoVectorEnv
from envs.mujoco.physics import ThreadedPhysics

NAME = "envs/raw_physics"

STEPS = 8
"""Environment steps per turn."""

WARM_UP = 5
"""Turns that do not count."""

BALANCED = {"InvertedPendulum-v5": 150_000, "InvertedDoublePendulum-v5": 400_000}
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
                f"ratio {row['layer/raw']:.3f}  resets per step {row['resets_per_step']:.3f}"
                + (f", ratio with them {row['layer/raw_with_resets']:.3f}" if "raw_with_resets" in row else ""),
                flush=True,
            )
    print(write(NAME, {**context(), "num_envs": arguments.num_envs, "rows": rows}))


def compare(env_id: str, num_envs: int, turns: int, policy: str) -> dict:
    """Measure median rates of both sides, in environment steps per second, and the median of the turns' ratios."""
    env = MujocoVectorEnv(env_id, num_envs)
    observations, _ = env.reset(seed=0)
    choose = balancing(env_id) if policy == "balancing" else at_random(env)
    set_states, raw_step, raw_forward = raw_physics(env)
    random.seed(0)
    sides: dict[str, Callable[[np.ndarray, np.ndarray], object]] = {
        "raw": lambda action, ended: raw_step(action),
        "layer": lambda action, ended: env.step(action),
    }
    if raw_forward is not None:
        sides["raw_with_resets"] = lambda action, ended: (raw_step(action), raw_forward(ended))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    resets = 0
    for turn in range(WARM_UP + turns):
        # What the turn's actions are, and who ends, is found first, untimed; then the sides repeat it.
        kept, chosen = env.snapshot(), []
        for _ in range(STEPS):
            actions = choose(observations)
            observations, _, terminated, truncated, _ = env.step(actions)
            chosen.append((actions, np.flatnonzero(terminated | truncated)))
        resets += sum(len(ended) for _, ended in chosen) if turn >= WARM_UP else 0
        for name in random.sample(list(sides), len(sides)):
            env.restore(kept)
            set_states(kept["physics"].numpy())
            seconds[name].append(timed(lambda step=sides[name], work=chosen: [step(*arguments) for arguments in work]))
    env.close()
    counted = {name: np.array(times[WARM_UP:]) for name, times in seconds.items()}
    return {
        "env_id": env_id,
        "actions": policy,
        **{name: num_envs * STEPS / float(np.median(times)) for name, times in counted.items()},
        **{f"layer/{name}": float(np.median(counted[name] / counted["layer"])) for name in counted if name != "layer"},
        "resets_per_step": resets / (turns * STEPS * num_envs),
        "raw_is": "C" if isinstance(env._physics, ThreadedPhysics) else "mujoco.batch",
    }


def at_random(env: MujocoVectorEnv) -> Callable[[Tensor], np.ndarray]:
    space, draw = env.single_action_space, np.random.default_rng(0).uniform
    return lambda observations: draw(space.low, space.high, (env.num_envs, *space.shape)).astype(np.float32)


def balancing(env_id: str) -> Callable[[Tensor], np.ndarray]:
    agent = NPG("MlpPolicy", env_id, seed=0, device="cpu").learn(BALANCED[env_id])
    return lambda observations: agent.act(observations, deterministic=True).numpy()


SetStates = Callable[[np.ndarray], None]
Step = Callable[[np.ndarray], None]
Forward = Callable[[np.ndarray], None]


def raw_physics(env: MujocoVectorEnv) -> tuple[SetStates, Step, Forward | None]:
    """Return functions that set all simulations' integration states, step them with actions, mj_forward some."""
    if isinstance(env._physics, ThreadedPhysics):
        return *raw_in_c(env), None
    batch = mujoco.batch.Batch(env.model, env.num_envs)
    ctrl = batch.bind("ctrl")

    def set_states(states: np.ndarray) -> None:
        batch.state[:] = states

    def step(action: np.ndarray) -> None:
        ctrl[:] = action
        batch.step(nstep=env.task.frame_skip)

    return set_states, step, lambda ids: batch.forward(ids) if len(ids) else None


def raw_in_c(env: MujocoVectorEnv) -> tuple[SetStates, Step]:
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
