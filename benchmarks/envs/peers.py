"""Environment steps per second of make_vec beside Gymnasium, Stable-Baselines3 and EnvPool.

All sides of one task and number of environments take turns in one process, with the same uniform actions over their
whole range; medians over turns. Steps that only reset an environment are not counted (EnvPool has them; the others
reset within the step). EnvPool brings its own MuJoCo (3.6.0 in EnvPool 1.2) and draws its own reset states, so its
episodes are similar, not equal. Measured groups are kept in results/envs/peers.json by task, number of
environments and versions, and are not repeated; the table and the figure show all that are kept.

EnvPool is optional: pip install -c constraints.txt -e ".[peers]"
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from benchmarks.common import context, installed, keep, missing, panels, read, save
from envs import make_vec
from envs.mujoco import TASKS

NAME = "envs/peers"
OURS = "geodesic-rl"
NUM_ENVS = (1, 8, 32, 128, 512, 1024)
ACTIONS = 64
"""Rows of actions that are drawn once and used in turn."""

Step = Callable[[np.ndarray], int]
"""Actions [N, A] to the number of environment steps that were taken."""


@contextmanager
def geodesic(env_id: str, num_envs: int) -> Iterator[Step]:
    env = make_vec(env_id, num_envs, backend="mujoco", seed=0)
    env.reset()
    yield lambda actions: len(env.step(actions)[1])
    env.close()


@contextmanager
def gymnasium_single(env_id: str, num_envs: int) -> Iterator[Step]:
    env = gymnasium.make(env_id)
    env.reset(seed=0)

    def step(actions: np.ndarray) -> int:
        _, _, terminated, truncated, _ = env.step(actions[0])
        if terminated or truncated:
            env.reset()
        return 1

    yield step
    env.close()


@contextmanager
def gymnasium_sync(env_id: str, num_envs: int) -> Iterator[Step]:
    makers = [partial(gymnasium.make, env_id)] * num_envs
    env = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    env.reset(seed=0)
    yield lambda actions: len(env.step(actions)[1])
    env.close()


@contextmanager
def stable_baselines(kind: type[VecEnv], env_id: str, num_envs: int) -> Iterator[Step]:
    env = kind([partial(gymnasium.make, env_id)] * num_envs)  # type: ignore[call-arg]
    env.seed(0)
    env.reset()
    yield lambda actions: len(env.step(actions)[1])
    env.close()


@contextmanager
def envpool_sync(env_id: str, num_envs: int) -> Iterator[Step]:
    import envpool

    cores = context()["cores"]
    env = envpool.make(env_id, env_type="gymnasium", num_envs=num_envs, num_threads=min(num_envs, cores), seed=0)
    env.reset()
    ended = 0

    def step(actions: np.ndarray) -> int:
        nonlocal ended
        _, _, terminated, truncated, _ = env.step(actions.astype(np.float64))
        # An environment that has ended spends its next step on a reset.
        resets, ended = ended, int((terminated | truncated).sum())
        return num_envs - resets

    yield step
    env.close()


@dataclass(frozen=True)
class Side:
    """One way to step environments, and the lowest and highest number of environments that it is measured with."""

    start: Callable[[str, int], AbstractContextManager[Step]]
    fewest: int
    most: int
    color: str


SIDES = {
    OURS: Side(geodesic, 1, 1024, "#1f5fa8"),
    "EnvPool": Side(envpool_sync, 1, 1024, "#d1741f"),
    "Gymnasium, one": Side(gymnasium_single, 1, 1, "#555555"),
    "Gymnasium SyncVectorEnv": Side(gymnasium_sync, 8, 128, "#3f9a5f"),
    "SB3 DummyVecEnv": Side(partial(stable_baselines, DummyVecEnv), 8, 128, "#8e5bb5"),
    "SB3 SubprocVecEnv": Side(partial(stable_baselines, SubprocVecEnv), 8, 32, "#c0445e"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--num-envs", nargs="*", type=int, default=NUM_ENVS)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--turn-seconds", type=float, default=0.25)
    parser.add_argument("--budget-minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    packages = installed("envpool")
    if packages["envpool"] is None:
        print('EnvPool is left out; to have it: pip install -c constraints.txt -e ".[peers]"')
        del SIDES["EnvPool"]
    kept = read(NAME) or {"runs": []}
    keys = [
        {"env_id": env_id, "num_envs": num_envs, "packages": packages}
        for env_id, num_envs in product(arguments.tasks, arguments.num_envs)
    ]
    for key in missing(kept["runs"], keys, arguments.budget_minutes):
        rates = measure(key["env_id"], key["num_envs"], arguments.turns, arguments.turn_seconds)
        group = {**key, **context(), "turn_seconds": arguments.turn_seconds, "rates": rates}
        keep(NAME, kept, group, ("env_id", "num_envs"))
        print(line(group), flush=True)
    print_table(kept["runs"])
    print(plot(kept["runs"]))


def measure(env_id: str, num_envs: int, turns: int, seconds: float) -> dict[str, list[float]]:
    """Measure each side's rate in every turn, in environment steps per second; turn k of all sides runs one after the
    other.
    """
    space = gymnasium.make(env_id).action_space
    draw = np.random.default_rng(0).uniform
    actions = draw(space.low, space.high, (ACTIONS, num_envs, *space.shape)).astype(np.float32)
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(side.start(env_id, num_envs))
            for name, side in SIDES.items()
            if side.fewest <= num_envs <= side.most
        }
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(turns + 1):
            for name, step in steps.items():
                rate = run(step, actions, seconds)
                if turn > 0:  # the first one warms up
                    rates[name].append(round(rate, 1))
    return rates


def run(step: Step, actions: np.ndarray, seconds: float) -> float:
    """Return environment steps per second, over whole steps of at least so many seconds."""
    taken, k, begin = 0, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        taken += step(actions[k % len(actions)])
        k += 1
    return taken / elapsed


def line(group: dict[str, Any]) -> str:
    rates = {name: statistics.median(values) for name, values in group["rates"].items()}
    listed = "  ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items())
    return f"{group['env_id']:26} N = {group['num_envs']:4}  {listed}"


def print_table(groups: list[dict[str, Any]]) -> None:
    """Print the best rate of every side at any number of environments, and the median ratio to ours at equal N."""
    print(f"\n{'best environment steps per second':26}" + "".join(f"{name:>25}" for name in SIDES))
    for env_id in TASKS:
        cells = []
        for name in SIDES:
            found = [
                (statistics.median(group["rates"][name]), group["num_envs"])
                for group in groups
                if group["env_id"] == env_id and name in group["rates"]
            ]
            cells.append("{:.0f} (N = {})".format(*max(found)) if found else "-")
        if any(cell != "-" for cell in cells):
            print(f"{env_id:33}" + "".join(f"{cell:>25}" for cell in cells))
    counts = sorted({group["num_envs"] for group in groups})
    print("\nour rate / theirs at equal N, median of the turns' ratios: median over tasks (lowest)")
    print(f"{'':26}" + "".join(f"{f'N = {num_envs}':>16}" for num_envs in counts))
    for name in [name for name in SIDES if name != OURS]:
        cells = []
        for num_envs in counts:
            ratios = [
                statistics.median(np.divide(group["rates"][OURS], group["rates"][name]))
                for group in groups
                if group["num_envs"] == num_envs and name in group["rates"]
            ]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f})" if ratios else "-")
        print(f"{name:26}" + "".join(f"{cell:>16}" for cell in cells))


def plot(groups: list[dict[str, Any]]) -> Any:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    tasks = [env_id for env_id in TASKS if any(group["env_id"] == env_id for group in groups)]
    columns = min(4, len(tasks))
    figure, axes = panels(len(tasks), columns, 3.9, 3.0)
    for axis, env_id in zip(axes, tasks, strict=True):
        own = sorted((group for group in groups if group["env_id"] == env_id), key=lambda group: group["num_envs"])
        for name, side in SIDES.items():
            points = [
                (group["num_envs"], statistics.median(group["rates"][name])) for group in own if name in group["rates"]
            ]
            if side.most == 1:
                for _, rate in points:
                    axis.axhline(rate, color=side.color, linestyle="--", linewidth=1.2, label=name)
            elif points:
                axis.plot(*zip(*points, strict=True), "o-", color=side.color, markersize=4, linewidth=1.6, label=name)
        axis.set_title(env_id, loc="left", fontsize=11)
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(NUM_ENVS, ["" if n == 512 else str(n) for n in NUM_ENVS])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_minor_locator(NullLocator())
    figure.supxlabel("environments", fontsize=10)
    figure.supylabel("environment steps per second", fontsize=10)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2 * columns, frameon=False)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
