"""PPO beside Stable-Baselines3's: steps per second in training, and returns.

Three sides: SB3 PPO as rl-baselines3-zoo trains it (benchmarks/peers.py has its settings); ours with the same settings
and the same number of gradient updates per sample, but SAME_ROLLOUT; and ours with its preset.

--seconds S: all sides train in turn in one process, S seconds each time. --steps N: full runs, then 16 deterministic
episodes in Gymnasium's own environments (seeds 1000, 1001, ...; raw reward). Finished runs are kept in
results/optim/ppo_peers.json by side, task, seed, steps, settings and versions, and are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch

from agents import PPO
from benchmarks.common import as_json, context, is_same, keep, missing, panels, read, save, write
from benchmarks.peers import (
    ENDLESS,
    EPISODES,
    ZOO_PPO,
    Learner,
    Ours,
    draw_rates,
    draw_returns,
    full_run,
    in_turns,
    parse,
    sb3_ppo,
)

NAME = "optim/ppo_peers"
TASKS = ("Hopper-v5", "HalfCheetah-v5")
OURS, SAME, SB3 = "ours, preset", "ours, same updates", "SB3 PPO"
SB3_SINGLE = "SB3 PPO, one thread"
"""With one thread of torch, which suits networks of this size better where cores are few; for the rate only."""
COLORS = {OURS: "#1f5fa8", SAME: "#6f9fd0", SB3: "#c0445e", SB3_SINGLE: "#d98a9a"}
SAME_ROLLOUT = {"num_envs": 16, "n_steps": 128}
"""In place of 512 steps of one environment: long enough for advantages with the zoo's lambda of 0.99."""


def same_updates(env_id: str) -> dict[str, Any]:
    """Return the zoo's settings under our names; minibatches and epochs are as many per sample."""
    theirs = {key: value for key, value in ZOO_PPO[env_id].items() if key not in ("n_envs", "n_steps")}
    policy = theirs.pop("policy_kwargs")
    kept = {key: policy[key] for key in ("log_std_init", "net_arch", "activation_fn")}
    return {**theirs, **kept, **SAME_ROLLOUT, "optimizer": "adam"}


SETTINGS = {
    OURS: {env_id: dataclasses.asdict(PPO.preset(env_id)) for env_id in TASKS},
    SAME: {env_id: same_updates(env_id) for env_id in TASKS},
    SB3: ZOO_PPO,
}


def start(side: str, env_id: str, seed: int, total: int) -> Learner:
    make = sb3_ppo if side == SB3 else partial(Ours, PPO)
    return make(env_id, seed, total, SETTINGS[side][env_id])


def main() -> None:
    arguments = parse(__doc__, TASKS, SETTINGS, seconds=2.0, seeds=2)
    warnings.simplefilter("ignore")
    kept = {"throughput": {}, "runs": [], **(read(NAME) or {})}
    if arguments.steps is not None:
        run_all(kept, arguments)
    elif not arguments.plot:
        for env_id in arguments.tasks:
            kept["throughput"][env_id] = throughput(env_id, arguments.turns, arguments.seconds)
            write(NAME, kept)
    show(kept)
    print(plot(kept))


def throughput(env_id: str, turns: int, seconds: float) -> dict[str, Any]:
    """Measure each side's rate in every turn, in environment steps per second; turn k of all sides runs one after the
    other.
    """
    learners = {side: start(side, env_id, 0, ENDLESS) for side in SETTINGS}
    learners[SB3_SINGLE] = start(SB3, env_id, 0, ENDLESS)
    threads = torch.get_num_threads()
    rates = in_turns(learners, turns, seconds, lambda side: torch.set_num_threads(1 if side == SB3_SINGLE else threads))
    settings = {side: SETTINGS[side][env_id] for side in SETTINGS}
    return {**context(), "torch_threads": threads, "settings": settings, "rates": rates}


def run_all(kept: dict[str, Any], arguments: argparse.Namespace) -> None:
    steps = arguments.steps
    keys = [
        {
            "side": side,
            "env_id": env_id,
            "steps": steps,
            "seed": seed,
            "settings": as_json(SETTINGS[side][env_id]),
        }
        for seed in range(arguments.seeds)
        for env_id in arguments.tasks
        for side in arguments.sides
    ]
    for key in missing(kept["runs"], keys, arguments.budget_minutes):
        learner = partial(start, key["side"], key["env_id"], key["seed"], steps)
        keep(NAME, kept, full_run(learner, key), key)


def by_task(runs: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Return mean returns of the present settings, seed by seed: {(task, steps): {side: returns}}."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for env_id in TASKS:
        for side in SETTINGS:
            settings = as_json(SETTINGS[side][env_id])
            mine = [run for run in runs if is_same(run, {"side": side, "env_id": env_id, "settings": settings}, False)]
            for run in sorted(mine, key=lambda run: run["seed"]):
                found.setdefault((env_id, run["steps"]), {}).setdefault(side, []).append(run["mean"])
    return found


def show(kept: dict[str, Any]) -> None:
    for env_id, row in kept["throughput"].items():
        print(f"\n{env_id}: environment steps per second in training, medians of turns")
        for side, rates in row["rates"].items():
            over = [statistics.median(np.divide(rates, row["rates"][other])) for other in (SB3, SB3_SINGLE)]
            print(f"  {side:20}{statistics.median(rates):8.0f}  / {SB3} {over[0]:6.2f}  / {SB3_SINGLE} {over[1]:6.2f}")
    for (env_id, steps), sides in by_task(kept["runs"]).items():
        print(f"\n{env_id} after {steps:,} steps: mean return of {EPISODES} deterministic episodes, per seed")
        for side, means in sides.items():
            listed = " ".join(f"{mean:.0f}" for mean in means)
            print(f"  {side:20}median {statistics.median(means):7.0f}  ({listed})")


def plot(kept: dict[str, Any]) -> Any:
    groups = by_task(kept["runs"])
    figure, axes = panels(len(kept["throughput"]) + len(groups), 2, 6.0, 2.6)
    free = iter(axes)
    for env_id, row in kept["throughput"].items():
        draw_rates(next(free), env_id, row["rates"], COLORS)
    for (env_id, steps), returns in groups.items():
        draw_returns(next(free), f"{env_id}, {steps:,} steps", returns, COLORS)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
