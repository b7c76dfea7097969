"""What a user feels: seconds until a policy is good, and the return after so many minutes, all steps allowed.

Every side trains on the same cores for --minutes of its own training time; evaluations (8 deterministic episodes, raw
reward, Gymnasium's own environments) take no part in it. The time to a threshold is that of the first evaluation that
reaches it. Ours has the configuration that train.py has, with schedules over minutes as `train.py --minutes` has them;
the peers are as rl-baselines3-zoo trains them. Finished runs are kept in results/natural/wallclock.json by side, task,
seed, minutes, settings and versions, and are not repeated. A quiet machine is needed; the load when a run begins is
kept with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from agents import NPG
from agents.run.evaluation import evaluate
from benchmarks.common import as_json, context, is_same, keep, missing, panels, read, save
from benchmarks.peers import (
    CROSSQ,
    ENDLESS,
    MUJOCO_SAC,
    ZOO_ARS,
    ZOO_PPO,
    ZOO_SAC,
    Learner,
    Ours,
    sb3_ars,
    sb3_ppo,
    sb3_sac,
    sbx_crossq,
)
from envs import make_vec

NAME = "natural/wallclock"
THRESHOLDS = {
    "Hopper-v5": 3000.0,
    "HalfCheetah-v5": 5000.0,
    "Walker2d-v5": 4000.0,
    "Ant-v5": 4000.0,
    "Swimmer-v5": 340.0,
    "Humanoid-v5": 5000.0,
}
EPISODES, EVALUATION_SEED = 8, 1000
FIRST_SECONDS, GROWTH = 2.0, 1.15
"""Training time before the first evaluation, and how much later each next one is."""


SIDES: dict[
    str, tuple[Callable[[str, int, int, dict[str, Any]], Learner], Callable[[str], dict[str, Any] | None], str]
] = {
    "ours": (partial(Ours, NPG), lambda env_id: dataclasses.asdict(NPG.preset(env_id)), "#1f5fa8"),
    "ours, defaults": (partial(Ours, NPG), lambda env_id: dataclasses.asdict(NPG.Config()), "#6f9fd0"),
    "SB3 PPO": (sb3_ppo, ZOO_PPO.__getitem__, "#c0445e"),
    "SB3 SAC": (sb3_sac, lambda env_id: ZOO_SAC.get(env_id, MUJOCO_SAC), "#8e5bb5"),
    "sbx CrossQ": (sbx_crossq, lambda env_id: CROSSQ, "#d08a2f"),
    "sb3-contrib ARS": (sb3_ars, ZOO_ARS.get, "#5a8f4e"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(THRESHOLDS), choices=list(THRESHOLDS))
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--minutes", type=float, default=15.0, help="training time of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=10, help="seeds below 10 chose the presets")
    parser.add_argument("--budget-minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    kept = read(NAME) or {"runs": []}
    keys = [
        {
            "side": side,
            "env_id": env_id,
            "minutes": arguments.minutes,
            "seed": arguments.first_seed + seed,
            "settings": as_json(settings),
        }
        for seed in range(arguments.seeds)
        for env_id in arguments.tasks
        for side in arguments.sides
        if (settings := SIDES[side][1](env_id)) is not None
    ]
    for key in missing(kept["runs"], keys, arguments.budget_minutes):
        found = train(key)
        keep(NAME, kept, found, key)
        print(describe(found), flush=True)
    for (env_id, minutes), sides in by_task(kept["runs"]).items():
        print(f"\n{env_id}, {minutes:g} minutes of training, seconds to {THRESHOLDS[env_id]:g}")
        for side, runs in sides.items():
            listed = " ".join("-" if (x := reached(run)) is None else f"{x:.0f}" for run in runs)
            last = statistics.median(run["curve"][-1][2] for run in runs)
            print(f"  {side:16}{listed:24} return at the end, median {last:.0f}")
    print(plot(kept["runs"]))


def train(key: dict[str, Any]) -> dict[str, Any]:
    """Train for the key's minutes, evaluating on the way: [[seconds, steps, return], ...]."""
    start, _, _ = SIDES[key["side"]]
    limit, load = 60 * key["minutes"], os.getloadavg()[0]
    env = make_vec(key["env_id"], EPISODES, backend="gymnasium", autoreset="disabled")
    begin = time.perf_counter()
    learner = start(key["env_id"], key["seed"], ENDLESS, key["settings"])
    spent = time.perf_counter() - begin
    if isinstance(learner, Ours):
        learner.agent.share_used = lambda: min((spent + time.perf_counter() - resumed) / limit, 1.0)
    curve: list[tuple[float, int, float]] = []
    steps, due = 0, max(FIRST_SECONDS, GROWTH * spent)
    while spent < limit:
        resumed = time.perf_counter()
        while spent + time.perf_counter() - resumed < min(due, limit):
            steps += learner.train(1)
        spent += time.perf_counter() - resumed
        due = GROWTH * max(due, spent)
        result = evaluate(learner, env, EPISODES, EVALUATION_SEED)
        curve.append((round(spent, 2), steps, round(result.mean, 1)))
    env.close()
    learner.close()
    return {**key, **context(), "curve": curve, "load": round(load, 2), "torch_threads": torch.get_num_threads()}


def reached(run: dict[str, Any]) -> float | None:
    """Give the training time of the first evaluation at the task's threshold, in seconds; None if there is none."""
    threshold = THRESHOLDS[run["env_id"]]
    return next((seconds for seconds, _, mean in run["curve"] if mean >= threshold), None)


def describe(run: dict[str, Any]) -> str:
    seconds = reached(run)
    when = "never" if seconds is None else f"after {seconds:.0f} s"
    last = run["curve"][-1]
    return (
        f"{run['env_id']} {run['side']} seed {run['seed']}: {THRESHOLDS[run['env_id']]:g} {when}; "
        f"{last[2]:.0f} after {last[1]:,} steps"
    )


def by_task(runs: list[dict[str, Any]]) -> dict[tuple[str, float], dict[str, list[dict[str, Any]]]]:
    """Group the runs that have their side's present settings."""
    found: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    settings = [as_json(SIDES[run["side"]][1](run["env_id"])) for run in runs]
    runs = [run for run, now in zip(runs, settings, strict=True) if is_same(run, {"settings": now}, versions=False)]
    for run in sorted(runs, key=lambda run: (list(THRESHOLDS).index(run["env_id"]), list(SIDES).index(run["side"]))):
        found.setdefault((run["env_id"], run["minutes"]), {}).setdefault(run["side"], []).append(run)
    return found


def plot(runs: list[dict[str, Any]]) -> Any:
    groups = by_task(runs)
    figure, all_axes = panels(len(groups), min(max(len(groups), 1), 3), 6.0, 4.0)
    for axes, ((env_id, minutes), sides) in zip(all_axes, groups.items(), strict=True):
        for side, rows in sides.items():
            for k, run in enumerate(rows):
                seconds, _, means = zip(*run["curve"], strict=True)
                label = f"{side}, {len(rows)} seed{'s' * (len(rows) > 1)}" if k == 0 else None
                axes.plot(seconds, means, color=SIDES[side][2], alpha=0.7, linewidth=1.4, label=label)
        axes.axhline(THRESHOLDS[env_id], color="#333333", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.set_title(f"{env_id}, {minutes:g} minutes", loc="left", fontsize=11)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("return, deterministic policy")
        axes.legend(frameon=False, fontsize=9)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
