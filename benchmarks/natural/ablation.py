"""NPG's estimates, solvers and critics beside each other: returns at equal environment steps and at equal seconds.

Each variant differs from the task's preset with sampled scores in the values shown. A run trains in this process on
one core, and is evaluated at equal shares of the steps. Its seconds are the core's (CPU time, without the
evaluations), so that other work on the machine counts less; with the physics on one core an update weighs less in
them than on many. "At equal seconds" reads each run's curve at the time that the preset's run with sampled scores and
that seed took. Finished runs are kept by variant, task, seed, steps and versions, so that the table grows over
several calls. Returns: 16 deterministic episodes, means over seeds with bootstrap intervals.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
import torch

from agents import NPG
from agents.run.evaluation import evaluate
from benchmarks.common import context, interval, keep, missing, panels, read, save
from envs import make_vec

NAME = "natural/ablation"
TASKS = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5")
BASE = "sampled scores, CG"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "CG + K-FAC, 4 and 6": {"cg_preconditioner": "kfac", "cg_max_steps": 4, "critic_cg_max_steps": 6},
    "CG + K-FAC, to 0.01": {"cg_preconditioner": "kfac", "cg_max_steps": 200, "cg_tolerance": 0.01},
    "CG, warm start": {"cg_warm_start": True},
    "a quarter of the samples": {"curvature_samples": 512},
    "analytic": {"fisher": "analytic"},
    "K-FAC": {"fisher": "kfac"},
    "E-KFAC": {"fisher": "ekfac"},
    "diagonal": {"fisher": "diagonal"},
    "adaptive": {"fisher": "adaptive"},
    "empirical (no Fisher matrix)": {"fisher": "empirical"},
    "line search (TRPO)": {"line_search": True},
    "critic: Adam": {"critic": "adam"},
    "critic: AdaBound": {"critic": "adabound"},
    "critic: ridge, quadratic": {"critic": "ridge", "value_network": "quadratic"},
    "critic: ridge, RBF": {"critic": "ridge", "value_network": "rbf"},
}
POINTS = 5
EPISODES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--budget-minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = read(NAME) or {"runs": []}
    # All variants of a seed before the next seed: a table that is cut short compares equal seeds.
    keys = [
        {"env": env, "variant": variant, "seed": seed, "steps": arguments.steps, "changed": VARIANTS[variant]}
        for seed in range(arguments.seeds)
        for env in arguments.tasks
        for variant in arguments.variants
    ]
    for key in missing(kept["runs"], keys, arguments.budget_minutes):
        run = {**key, **context(), **train(key["env"], key["changed"], key["seed"], key["steps"])}
        keep(NAME, kept, run, key)
        last = run["curve"][-1][2]
        print(
            f"{key['env']:15} {key['variant']:30} seed {key['seed']}  {last:7.0f}  {run['seconds']:.0f} s", flush=True
        )
    table = summary(kept["runs"], arguments.steps)
    for row in table:
        print(
            f"{row['env']:15} {row['variant']:30} {row['seeds']} seeds  equal steps {row['at_steps'][0]:7.0f} "
            f"[{row['at_steps'][1]:.0f}, {row['at_steps'][2]:.0f}]  equal seconds {row['at_seconds'][0]:7.0f}  "
            f"update {1e3 * row['update_seconds']:.1f} ms"
        )
    print(plot(table))


def train(env_id: str, changed: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """Train once: (steps, CPU seconds of training, mean return) on the way, and the median update's seconds."""
    settings = dataclasses.asdict(NPG.preset(env_id)) | {"fisher": "compatible"} | changed
    env = make_vec(env_id, settings["num_envs"], num_threads=1, seed=seed)
    agent = NPG("MlpPolicy", env, seed=seed, device="cpu", **settings)
    judge = make_vec(env_id, EPISODES, autoreset="disabled", num_threads=1)
    curve: list[tuple[int, float, float]] = []
    updates: list[float] = []
    seconds = 0.0
    stopped = None
    begin = time.process_time()
    try:
        for _ in agent.iterations(steps):
            seconds += time.process_time() - begin
            updates.append(agent.last_metrics["time/train_seconds"])
            if agent.num_timesteps * POINTS >= steps * (len(curve) + 1) or agent.num_timesteps >= steps:
                curve.append((agent.num_timesteps, round(seconds, 3), evaluate(agent, judge, EPISODES, 10_000).mean))
            begin = time.process_time()
    except FloatingPointError as error:
        stopped = str(error)
        curve.append((agent.num_timesteps, round(seconds, 3), evaluate(agent, judge, EPISODES, 10_000).mean))
    env.close()
    judge.close()
    return {
        "seconds": seconds,
        "curve": curve,
        "update_seconds": float(np.median(updates)),
        "rejected": agent.rejections.updates,
        "stopped": stopped,
    }


def summary(runs: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """List per task and variant: mean and interval over seeds at the end, and at the preset's seconds."""
    runs = [run for run in runs if run["steps"] == steps]
    preset = {(run["env"], run["seed"]): run["seconds"] for run in runs if run["variant"] == BASE}
    table = []
    for env, variant in dict.fromkeys((run["env"], run["variant"]) for run in runs):
        mine = [run for run in runs if (run["env"], run["variant"]) == (env, variant)]
        finals = np.array([run["curve"][-1][2] for run in mine])
        timed = [
            np.interp(preset[env, run["seed"]], *zip(*((t, r) for _, t, r in run["curve"]), strict=True))
            for run in mine
            if (env, run["seed"]) in preset
        ]
        table.append(
            {
                "env": env,
                "variant": variant,
                "seeds": len(mine),
                "at_steps": with_interval(finals),
                "at_seconds": with_interval(np.array(timed)),
                "update_seconds": float(np.median([run["update_seconds"] for run in mine])),
            }
        )
    return table


def with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean and its 95 % bootstrap interval; the mean alone of fewer than two values."""
    mean = float(values.mean()) if len(values) else float("nan")
    return (mean, *interval(np.mean, values)) if len(values) > 1 else (mean, mean, mean)


def plot(table: list[dict[str, Any]]) -> Any:
    tasks = list(dict.fromkeys(row["env"] for row in table))
    figure, axes = panels(len(tasks), len(tasks), 5.0, 6.0)
    for axis, task in zip(axes, tasks, strict=True):
        rows = [row for row in table if row["env"] == task][::-1]
        for name, color, shift in (("at_steps", "#1f5fa8", 0.15), ("at_seconds", "#d1741f", -0.15)):
            means, low, high = np.array([row[name] for row in rows]).T
            places = np.arange(len(rows)) + shift
            axis.errorbar(
                means, places, xerr=(means - low, high - means), fmt="o", color=color, label=name.replace("_", " ")
            )
        axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axis.set_title(task, loc="left", fontsize=11)
        axis.set_xlabel("return, deterministic policy")
    axes[0].legend(frameon=False, fontsize=9)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
