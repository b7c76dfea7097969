"""COPOS beside NPG: seconds of an update, and returns at equal environment steps.

Seconds: medians over iterations of CPU time, the sides alternated in one process, 2048 samples, sampled scores and the
same critic's fit. Returns: each side has NPG's preset for the task; COPOS has its own two constraints in place of NPG's
step. A run trains in this process on one core and is evaluated at equal shares of the steps (16 deterministic
episodes). Finished runs are kept by task, side, seed, steps and versions, so that the table grows over several calls.

A task on which exploration may end too early is MountainCarContinuous-v0: 100 for the goal, which random actions hardly
find, and every action costs. Its sides, all of NPG's defaults, have other remedies for that beside COPOS's:
`--tasks MountainCarContinuous-v0 --steps 100000 --seeds 10`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import COPOS, NPG, Agent
from agents.run.evaluation import evaluate
from benchmarks.common import as_json, context, interval, is_same, keep, missing, panels, read, save, write
from envs import make_vec

NAME = "natural/copos"
TASKS = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5", "Swimmer-v5")
SIDES: dict[str, tuple[type[Agent], dict[str, Any]]] = {
    "NPG": (NPG, {}),
    "COPOS, inequality": (COPOS, {"entropy_constraint": "inequality"}),
    "COPOS, equality": (COPOS, {"entropy_constraint": "equality"}),
}
COLORS = {
    "NPG": "#555555",
    "NPG, no floor": "#b5b5b5",
    "NPG, floor as high as the start": "#2f8f5b",
    "NPG, entropy bonus": "#c0445e",
    "NPG, wide start": "#8c5a2b",
    "COPOS, inequality": "#1f5fa8",
    "COPOS, inequality, b = 0": "#7fb0e0",
    "COPOS, inequality, wide start": "#12355f",
    "COPOS, equality": "#d1741f",
}


class WithBonus(NPG):
    """NPG with PPO's bonus α H(π), whose gradient is that of advantages -α log π(a|s)."""

    alpha = 0.05

    def _setup_model(self) -> None:
        super()._setup_model()
        direction = self.curvature.direction

        def with_bonus(Psi: Any, A: Tensor, rows: Any) -> Any:
            return direction(Psi, A - self.alpha * (Psi.values - Psi.values.mean()), rows)

        self.curvature.direction = with_bonus  # type: ignore[method-assign]


SPARSE = "MountainCarContinuous-v0"
SPARSE_SIDES: dict[str, tuple[type[Agent], dict[str, Any]]] = {
    "NPG, no floor": (NPG, {"log_std_min": None}),
    "NPG": (NPG, {}),
    "NPG, floor as high as the start": (NPG, {"log_std_min": -1.0}),
    "NPG, entropy bonus": (WithBonus, {"log_std_min": None}),
    "NPG, wide start": (NPG, {"log_std_init": 0.0, "log_std_min": None}),
    "COPOS, inequality": (COPOS, {"entropy_constraint": "inequality"}),
    "COPOS, equality": (COPOS, {"entropy_constraint": "equality"}),
    "COPOS, inequality, b = 0": (COPOS, {"entropy_constraint": "inequality", "entropy_decrease": 0.0}),
    "COPOS, inequality, wide start": (COPOS, {"entropy_constraint": "inequality", "log_std_init": 0.0}),
}
GOAL = 90.0
"""Above which a return is one of the goal: SPARSE's own threshold."""
TIMED = {
    "n_steps": 128,
    "fisher": "compatible",
    "cg_damping": 0.1,
    "critic_steps": 1,
    "critic_cg_max_steps": 8,
    "gae_lambda": 0.98,
    "log_std_init": 0.0,
}
POINTS = 10
EPISODES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help="tasks of the returns")
    parser.add_argument("--timed", nargs="*", default=["Hopper-v5", "CartPole-v1"], help="tasks of the seconds")
    parser.add_argument("--iterations", type=int, default=30, help="timed ones of each side; 0 keeps earlier seconds")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--budget-minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = read(NAME) or {"runs": [], "times": []}
    if arguments.iterations:
        kept["times"] = [{**context(), **times(env, arguments.iterations)} for env in arguments.timed]
        write(NAME, kept)
    for row in kept["times"]:
        found = "  ".join(f"{side} {1e3 * seconds:.1f} ms" for side, seconds in row["seconds"].items())
        print(f"{row['env']:15} {found}")
    keys = [
        {"env": env, "side": side, "seed": arguments.first_seed + k, "steps": arguments.steps, "settings": settings}
        for k in range(arguments.seeds)
        for env in arguments.tasks
        for side in sides_of(env)
        for settings in [settings_of(side, env)]
    ]
    for key in missing(kept["runs"], keys, arguments.budget_minutes):
        run = {**key, **context(), **train(key)}
        keep(NAME, kept, run, key)
        print(f"{run['env']:15} {run['side']:18} seed {run['seed']}  {run['curve'][-1][1]:7.0f}", flush=True)
    print_table(kept["runs"])
    if kept["runs"]:
        print(plot(kept["runs"]))
    if any(run["env"] == SPARSE for run in kept["runs"]):
        print(plot_sparse(kept["runs"]))


def times(env_id: str, iterations: int) -> dict[str, Any]:
    """Measure the median CPU seconds of each side's update, in turns of one iteration each."""
    spent: dict[str, list[float]] = {}
    running = []
    for side, (algorithm, own) in SIDES.items():
        step = {"target_kl_end": None, "log_std_min": None} if algorithm is NPG else {}
        agent = algorithm("MlpPolicy", env_id, seed=0, device="cpu", **TIMED, **own, **step)
        spent[side] = []
        clock(agent, spent[side])
        running.append(agent.iterations(agent.steps_per_iteration * (iterations + 5)))
    for _ in range(iterations + 5):
        for iteration in running:
            next(iteration)
    medians = {side: statistics.median(seconds[5:]) for side, seconds in spent.items()}
    return {"env": env_id, "settings": TIMED, "seconds": medians, "updates": spent}


def clock(agent: Agent, spent: list[float]) -> None:
    """Have an agent's updates note their CPU seconds."""
    update = agent.train

    def timed(batch: Any) -> None:
        begin = time.process_time()
        update(batch)
        spent.append(time.process_time() - begin)

    agent.train = timed  # type: ignore[method-assign]


def sides_of(env_id: str) -> dict[str, tuple[type[Agent], dict[str, Any]]]:
    return SPARSE_SIDES if env_id == SPARSE else SIDES


def settings_of(side: str, env_id: str) -> dict[str, Any]:
    """Give a side's hyperparameters for a task, as JSON values: NPG's preset, as far as the side has them."""
    algorithm, own = sides_of(env_id)[side]
    preset = dataclasses.asdict(NPG.preset(env_id))
    return as_json({name: x for name, x in preset.items() if name in algorithm.Config.names()} | own)


def train(key: dict[str, Any]) -> dict[str, Any]:
    """Train once: (steps, mean return, entropy) on the way, and its schedule at the end."""
    algorithm, _ = sides_of(key["env"])[key["side"]]
    threads = {} if key["env"] == SPARSE else {"num_threads": 1}
    env = make_vec(key["env"], key["settings"]["num_envs"], seed=key["seed"], **threads)
    agent = algorithm("MlpPolicy", env, seed=key["seed"], device="cpu", **key["settings"])
    judge = make_vec(key["env"], EPISODES, autoreset="disabled", **threads)
    curve: list[tuple[int, float, float]] = []
    begin = time.process_time()
    for _ in agent.iterations(key["steps"]):
        if agent.num_timesteps * POINTS >= key["steps"] * (len(curve) + 1) or agent.num_timesteps >= key["steps"]:
            found = evaluate(agent, judge, EPISODES, 10_000).mean
            curve.append((agent.num_timesteps, round(found, 1), round(agent.last_metrics["train/entropy"], 3)))
    env.close()
    judge.close()
    return {"curve": curve, "cpu_seconds": round(time.process_time() - begin, 1)}


def grouped(runs: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, list[dict[str, Any]]]]:
    """Give the kept runs by (task, steps) and side: those with the preset of now, or, if there are none, others."""
    groups: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups.setdefault((run["env"], run["steps"]), {}).setdefault(run["side"], []).append(run)
    for (env, _), sides in groups.items():
        for side, rows in sides.items():
            settings = {"settings": settings_of(side, env)}
            sides[side] = [row for row in rows if is_same(row, settings, versions=False)] or rows
    return groups


def print_table(runs: list[dict[str, Any]]) -> None:
    """Print final returns with the interval of their mean; of SPARSE, of the share of seeds that reach the goal."""
    for (env, steps), sides in grouped(runs).items():
        for side, rows in sides.items():
            last = [row["curve"][-1][1] for row in rows]
            found = f"{np.mean(last):7.0f}"
            if env == SPARSE:
                count, low, high = reached(rows)
                found = f"{count} of {len(rows)} [{low:.2f}, {high:.2f}]"
            elif len(last) > 2:
                found += " [{:.0f}, {:.0f}]".format(*interval(np.mean, last))
            listed = " ".join(f"{x:.0f}" for x in last)
            print(f"{env:15} {steps:>9,} {side:32} {found}  {listed}")


def reached(rows: list[dict[str, Any]]) -> tuple[int, float, float]:
    """Count the runs that reach the goal at the end; and Wilson's 95 % interval of their share."""
    from scipy.stats import binomtest

    count = sum(row["curve"][-1][1] > GOAL for row in rows)
    share = binomtest(count, len(rows)).proportion_ci(method="wilson")
    return count, share.low, share.high


def plot(runs: list[dict[str, Any]]) -> Any:
    from matplotlib.ticker import EngFormatter

    groups = {key: sides for key, sides in grouped(runs).items() if key[0] != SPARSE}
    figure, axes = panels(2 * len(groups), 2, 5.0, 3.4)
    for pair, ((env, _), sides) in zip(zip(axes[::2], axes[1::2], strict=True), groups.items(), strict=True):
        for side, rows in sides.items():
            for row in rows:
                steps, returns, entropies = zip(*row["curve"], strict=True)
                label = side if row is rows[0] else None
                for axis, values in zip(pair, (returns, entropies), strict=True):
                    axis.plot(steps, values, color=COLORS[side], linewidth=1.3, alpha=0.8, label=label)
        for axis, name in zip(pair, ("return, deterministic policy", "entropy, nats"), strict=True):
            axis.set(title=env, xlabel="environment steps", ylabel=name)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return save(figure, NAME)


def plot_sparse(runs: list[dict[str, Any]]) -> Any:
    """Draw the share of seeds that reach SPARSE's goal, and the entropy of each."""
    from matplotlib.ticker import EngFormatter

    figure, (shares, entropies) = panels(2, 2, 6.0, 4.0)
    mine = next(sides for (env, _), sides in grouped(runs).items() if env == SPARSE)
    named = {side: mine[side] for side in reversed(SPARSE_SIDES) if side in mine}
    for place, (side, rows) in enumerate(named.items()):
        count, low, high = reached(rows)
        shares.plot([low, high], [place, place], color=COLORS[side], linewidth=2)
        shares.plot(count / len(rows), place, color=COLORS[side], marker="o")
        for row in rows:
            steps, _, entropy = zip(*row["curve"], strict=True)
            entropies.plot(steps, entropy, color=COLORS[side], linewidth=1.0, alpha=0.7)
    shares.set(xlim=(0, 1), xlabel="share of seeds at the goal in the end, 95 % interval")
    shares.set_yticks(range(len(named)), named)
    shares.set_title(SPARSE, loc="left", fontsize=11)
    entropies.set(xlabel="environment steps", ylabel="entropy, nats; each seed")
    entropies.xaxis.set_major_formatter(EngFormatter(sep=""))
    return save(figure, f"{NAME}_sparse")


if __name__ == "__main__":
    main()
