"""MuJoCo Warp's environments beside MuJoCo's: how far a step, and many steps, differ.

Both get the same states and uniformly random actions. "step": before each step Warp's worlds are put where MuJoCo's
are, so that a difference is of one environment step. "free": both go on from the same beginnings by themselves, where
contacts amplify rounding. Episodes end and begin as they do. Differences are of observations, in units of 1 +
|MuJoCo's|.
"""

from __future__ import annotations

import argparse

import mujoco
import numpy as np
import torch

from benchmarks.common import context, installed, read, write
from envs import make_vec
from envs.mujoco import MujocoVectorEnv

NAME = "envs/warp_parity"
FAMILIES = ("families/HopperRandParams-v0", "families/WalkerRandParams-v0")
"""With a body of its own in each world."""
SKIPPED = ("Humanoid-v5", "HumanoidStandup-v5")
"""Of the PGS solver; those with Newton's stand in."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-envs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    tasks = [x for x in MujocoVectorEnv.task_types if x not in SKIPPED]
    parser.add_argument("--tasks", nargs="*", default=tasks + list(FAMILIES))
    arguments = parser.parse_args()
    rows = (read(NAME) or {"rows": {}})["rows"]
    for env_id in arguments.tasks:
        row = rows[env_id] = compare(env_id, arguments.num_envs, arguments.steps, arguments.device)
        print(f"{env_id:26}", "  ".join(f"{name} {value:.2g}" for name, value in row.items()), flush=True)
        print(write(NAME, {**context(), **installed("mujoco-warp", "warp-lang"), "rows": rows}))


def compare(env_id: str, num_envs: int, steps: int, device: str) -> dict[str, float]:
    """Measure the differences of one task."""
    settings = {"num_envs": num_envs, "seed": 0}
    here, there = make_vec(env_id, **settings), make_vec(env_id, backend="warp", device=device, **settings)
    assert isinstance(here, MujocoVectorEnv)
    here.action_space.seed(0)
    actions = [torch.as_tensor(here.action_space.sample()) for _ in range(steps)]

    first = [x.reset()[0].cpu().double() for x in (here, there)]
    row = {"reset": difference(*first)}
    observations, rewards, ends = [], [], 0
    for action in actions:
        put(here, there)
        (expected, found), (reward, found_reward), (end, found_end) = zip(*step(here, there, action), strict=True)
        same = end == found_end
        observations.append(difference(expected[same], found[same]))
        rewards.append(((reward - found_reward).abs() / (1 + reward.abs())).max().item())
        ends += int((~same).sum())
    row |= {"step, median": float(np.median(observations)), "step, most": max(observations)}
    row |= {"reward, most": max(rewards), "ends that differ": ends}

    for env in (here, there):
        env.reset(seed=1)
    free = []
    for action in actions:
        (expected, found), _, _ = zip(*step(here, there, action), strict=True)
        free.append(difference(expected, found))
    return row | {f"free, {n} steps": max(free[:n]) for n in (1, 10, steps)}


def step(here: MujocoVectorEnv, there: object, action: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Step both; give what each saw, before episodes begin anew, earned, and whether it terminated."""
    seen = []
    for env in (here, there):
        observation, reward, terminated, _, info = env.step(action)  # type: ignore[attr-defined]
        last = info.get("final_obs", observation)
        seen.append((last.cpu().double().clone(), reward.cpu().double().clone(), terminated.cpu().clone()))
    return seen


def put(here: MujocoVectorEnv, there: object) -> None:
    """Put Warp's worlds where MuJoCo's simulations are."""
    snapshot, own = here.snapshot(), there.snapshot()  # type: ignore[attr-defined]
    data = mujoco.MjData(here.model)
    for i, row in enumerate(snapshot["physics"].numpy()):
        mujoco.mj_setState(here.model, data, row, mujoco.mjtState.mjSTATE_INTEGRATION)
        for name in ("qpos", "qvel", "qacc_warmstart"):
            own[name][i] = torch.as_tensor(getattr(data, name))
    for name, value in snapshot.items():
        if f"_{name}" in own:
            own[f"_{name}"] = value
    there.restore(own)  # type: ignore[attr-defined]


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Give the largest difference, in units of 1 + |expected|."""
    return float(((found - expected).abs() / (1 + expected.abs())).max()) if expected.numel() else 0.0


if __name__ == "__main__":
    main()
