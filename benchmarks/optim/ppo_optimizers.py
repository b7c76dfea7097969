"""PPO with SGD, Adam, AMSGrad, AdaBound and AMSBound: what each returns after the same tuning.

Every optimizer has three settings to be tuned among, on each task by itself, on a seed of its own: learning rates, and
for AdaBound and AMSBound the final step size too (None measures policy's and critic's own at the hand-over, which is
in the middle of training; "AdaBound, late" hands over at nine tenths of it). The best one is trained on fresh seeds.
All else is the same for all: BASE, with eps 1e-5 for those that have one, and a momentum of 0.9 for SGD.

A run's score is the mean return of 16 episodes of the final policy without noise. Intervals are 95 % (bootstrap over
seeds, bias-corrected and accelerated); an optimizer is beside Adam where the interval of the difference of means holds
0 or lies above it. Finished runs are kept in results/optim/ppo_optimizers.json by task, optimizer, setting, seed, steps
and versions, and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.optim import SGD, Adam, Optimizer

from agents import PPO
from agents.run.evaluation import evaluate
from benchmarks.common import context, interval, is_same, keep, missing, panels, read, save
from envs import make_vec

NAME = "optim/ppo_optimizers"
TASKS = ("Swimmer-v5", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
TUNING_SEED = 100
EPISODES = 16
EVALUATION_SEED = 1000
BASE: dict[str, Any] = {"num_envs": 32, "n_steps": 64, "batch_size": 256, "n_epochs": 5}
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "Swimmer-v5": {"gamma": 0.9999, "num_envs": 16, "n_steps": 256, "n_epochs": 10},
}
"""In place of BASE: Swimmer does not learn to swim with a shorter horizon."""

RATES = [{"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]
BOUNDED = [{"learning_rate": rate, "final_lr": final} for rate, final in ((1e-3, None), (3e-3, None), (3e-3, 1.0))]
LATE = "AdaBound, late"
"""AdaBound that hands over when nine tenths of the training are done."""
GRID: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"learning_rate": rate} for rate in (0.03, 0.1, 0.3)],
    "Adam": RATES,
    "AMSGrad": RATES,
    "AdaBound": BOUNDED,
    "AMSBound": BOUNDED,
    LATE: [{**settings, "handover": 0.9} for settings in RATES],
}
# What PPO does not make by name itself.
OTHERS: dict[str, Callable[[list[torch.nn.Parameter], float], Optimizer]] = {
    "SGD": lambda params, lr: SGD(params, lr=lr, momentum=0.9),
    "AMSGrad": lambda params, lr: Adam(params, lr=lr, eps=1e-5, amsgrad=True, fused=True),
}
COLORS = {
    "SGD": "#555555",
    "Adam": "#c0445e",
    "AMSGrad": "#e39a3b",
    "AdaBound": "#1f5fa8",
    "AMSBound": "#3f9a5f",
    LATE: "#6f9fd0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--steps", type=int, default=200_000, help="environment steps per run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-minutes", type=float, default=60.0)
    parser.add_argument("--plot", action="store_true", help="only the table and the figure of what is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kept = {"runs": [], **(read(NAME) or {})}
    if not arguments.plot:
        keys = wanted(kept["runs"], arguments.tasks, arguments.steps, arguments.seeds)
        for key in missing(kept["runs"], keys, arguments.budget_minutes):
            found = {**key, **context(), **run(**key)}
            keep(NAME, kept, found, key)
            print(
                f"{key['env_id']} {key['optimizer']} {key['settings']} seed {key['seed']}: {found['score']:.0f} in "
                f"{found['seconds']:.0f} s",
                flush=True,
            )
    rows = table(kept["runs"], arguments.steps)
    print(draw(rows, arguments.steps))


def wanted(runs: list[dict[str, Any]], tasks: Iterable[str], steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield arguments of `run`: first the tuning, then the settings that runs, which grow meanwhile, say are tuned,
    seeds outermost.
    """

    def key(env_id: str, name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        base = {**BASE, **TASK_SETTINGS.get(env_id, {})}
        return {
            "env_id": env_id, "optimizer": name, "settings": settings, "base": base, "seed": seed, "steps": steps
        }  # fmt: skip

    for env_id in tasks:
        for name, grid in GRID.items():
            for settings in grid:
                yield key(env_id, name, settings, TUNING_SEED)
    for seed in range(seeds):
        for env_id in tasks:
            for name in GRID:
                yield key(env_id, name, tuned(runs, env_id, name, steps), seed)


def tuned(runs: list[dict[str, Any]], env_id: str, name: str, steps: int) -> dict[str, Any]:
    """Return the setting with the best score on the tuning seed."""
    place = {"env_id": env_id, "optimizer": name, "seed": TUNING_SEED, "steps": steps}
    best = max((run for run in runs if is_same(run, place, versions=False)), key=lambda run: run["score"])
    return best["settings"]


def run(
    env_id: str, optimizer: str, settings: dict[str, Any], base: dict[str, Any], seed: int, steps: int
) -> dict[str, Any]:
    """Train once; a run that a gradient which is not finite has stopped scores what it had reached."""
    begin = time.perf_counter()
    name = "sgd" if optimizer in OTHERS else optimizer.partition(",")[0].lower()
    agent = PPO("MlpPolicy", env_id, seed=seed, device="cpu", optimizer=name, **({"handover": 0.5} | base | settings))
    if optimizer in OTHERS:
        agent.optimizer = OTHERS[optimizer](agent.flat.groups, settings["learning_rate"])
    curve: list[float] = []
    stopped = None
    try:
        for _ in agent.iterations(steps):
            curve.append(round(agent.last_metrics.get("rollout/ep_rew_mean", 0.0), 1))
    except FloatingPointError as error:
        stopped = str(error)
    final = [group.get("final_lr") for group in agent.optimizer.param_groups]
    agent.env.close()
    held_out = make_vec(env_id, EPISODES, autoreset="disabled")
    result = evaluate(agent, held_out, EPISODES, EVALUATION_SEED)
    held_out.close()
    return {
        "score": round(result.mean, 1),
        "curve": curve,
        "stopped": stopped,
        "final_lr": final,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def table(runs: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """List per task and optimizer the tuned setting, its scores, mean and interval, and the difference to Adam's."""
    rows = []
    for env_id in TASKS:
        scores = {}
        for name in GRID:
            place = {"env_id": env_id, "optimizer": name, "steps": steps}
            mine = [run for run in runs if is_same(run, place, versions=False)]
            if not any(run["seed"] == TUNING_SEED for run in mine):
                continue
            settings = tuned(runs, env_id, name, steps)
            fresh = [run for run in mine if run["seed"] != TUNING_SEED and run["settings"] == settings]
            if len(fresh) < 2:
                continue
            scores[name] = [run["score"] for run in sorted(fresh, key=lambda run: run["seed"])]
            row = {"env_id": env_id, "optimizer": name, "settings": settings, "scores": scores[name]}
            row |= {
                "mean": round(float(np.mean(scores[name])), 1),
                "interval": rounded(interval(np.mean, scores[name])),
            }
            row["curves"] = [run["curve"] for run in fresh]
            rows.append(row)
        for row in (row for row in rows if row["env_id"] == env_id):
            if row["optimizer"] != "Adam" and "Adam" in scores:
                row["beyond_adam"] = rounded(interval(difference, row["scores"], scores["Adam"]))
    for row in rows:
        low, high = row["interval"]
        beyond = "" if "beyond_adam" not in row else " - Adam: {:+.0f} to {:+.0f}".format(*row["beyond_adam"])
        print(
            f"{row['env_id']:15} {row['optimizer']:14} {json.dumps(row['settings']):45} "
            f"{row['mean']:7.0f} ({low:.0f} to {high:.0f}){beyond}"
        )
    return rows


def rounded(ends: tuple[float, float]) -> list[float]:
    return [round(end, 1) for end in ends]


def difference(scores: np.ndarray, others: np.ndarray, axis: int = -1) -> Any:
    return np.mean(scores, axis=axis) - np.mean(others, axis=axis)


def draw(rows: list[dict[str, Any]], steps: int) -> Any:
    figure, axes = panels(len(TASKS), 2)
    for axis, env_id in zip(axes, TASKS, strict=True):
        for row in (row for row in rows if row["env_id"] == env_id):
            curves = np.array(row["curves"])
            curves[curves == 0.0] = np.nan  # before the first episode ended
            x = np.linspace(steps / curves.shape[1], steps, curves.shape[1])
            color = COLORS[row["optimizer"]]
            axis.plot(x, curves.mean(0), color=color, label=row["optimizer"])
            axis.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.12, linewidth=0)
        axis.set_title(env_id, loc="left", fontsize=11)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel("environment steps")
        axis.set_ylabel("return in training; band: all seeds")
    axes[0].legend(frameon=False, fontsize=9)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
