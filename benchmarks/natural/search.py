"""One default for all tasks: configurations of NPG beside each other on many tasks, over growing budgets of steps.

Successive halving: every configuration runs to the first budget on every task and seed, the better half of them goes
on to the next, and so on; a run that goes on continues where it stood. A configuration's score is the mean over tasks
of its last evaluation, where 0 is a random policy and 1 the best published return of an on-policy method
(`PUBLISHED`). Budgets are parts of one run of the last one's length: step sizes that fall with time fall over that.

Seeds from 60 on choose. With --confirm the best configuration runs to the end on seeds from 70 on, which chose
nothing, beside those named by --keep.

Each run takes one core. Its seconds are the core's (CPU time, without the evaluations), so that other work on the
machine counts less. Results are appended to results/natural/search.jsonl as they come, a line for each budget that a
run reached, by the whole configuration and the code's version, and are not repeated: the table grows over many calls,
and a call that is ended loses only what was running. Scores: means, with 95 % bootstrap intervals over seeds, drawn
within each task, from two seeds on (Agarwal et al. 2021, section 4.1).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import NPG
from agents.run.evaluation import evaluate
from benchmarks.common import RESULTS, ROOT, SILENT, as_json, code_version, context, panels, save, without_silent
from envs import make_vec

NAME = "natural/search"
LINES = RESULTS / f"{NAME}.jsonl"
TABLE = RESULTS / f"{NAME}.md"
CHECKPOINTS = ROOT / "build" / "search"
"""Runs that may go on, until they have reached the last budget."""
BUDGETS = (100_000, 300_000, 1_000_000)
"""Environment steps of training."""
CHOOSING, CONFIRMING = 60, 70
"""The first seeds of either kind."""
POINTS = 20
"""Evaluations on the way to the last budget."""
EPISODES, FINAL_EPISODES = 8, 32

PUBLISHED: dict[str, tuple[float, float, str]] = {
    "Ant-v5": (-55.9, 3485, "A2C, tianshou, v3"),
    "HalfCheetah-v5": (-283.0, 5784, "PPO, tianshou, v3"),
    "Hopper-v5": (15.5, 3609, "PPO at 1.1M, FlashSAC's baselines, v4"),
    "Walker2d-v5": (1.3, 3827, "TRPO, tianshou, v3"),
    "Swimmer-v5": (-1.2, 359, "TRPO, sb3-contrib's documents, v3"),
    "Humanoid-v5": (111.6, 1726, "A2C, tianshou, v3"),
    "HumanoidStandup-v5": (33514, 150105, "PPO at 4M, v5"),
    "InvertedDoublePendulum-v5": (47.6, 9258, "A2C, tianshou, v2"),
    "InvertedPendulum-v5": (5.2, 1000, "several; the most there is"),
    "Reacher-v5": (-42.8, -4.1, "PPO, tianshou, v2"),
    "Pusher-v5": (-148.7, -40.4, "PPO, v4"),
}
"""Task -> the return of uniformly random actions (128 episodes, measured here), the best return known of an on-policy
method after 1M steps over several seeds, and whose it is. Observations and physics differ between a task's versions."""

FLAT = {"gamma_end": None}
"""The defaults before the discount rose."""
SINGLE = FLAT | {"num_envs": 64, "reused_rollouts": 0, "cg_damping": 0.03, "curvature_memory": 0.0}
"""The defaults of December 1st, 2026, before reuse that fades: 2048 samples, each learned from once."""
REUSED = FLAT | {"reuse_until": None, "gamma": 0.995, "target_kl": 0.005, "cg_damping": 1.0, "critic": "gauss_newton"}
"""The defaults of November 2026: small batches, each learned from four times."""
ONCE = SINGLE | {"num_envs": 16, "gae_lambda": 0.95, "critic": "gauss_newton"}
"""Each sample is learned from once, and the rest is as it was then."""
SMALL = ONCE | {
    "target_kl": 0.005,
    "cg_damping": 0.1,
    "curvature_memory": 25_600.0,
    "critic_steps": 4,
    "critic_cg_max_steps": 8,
}
"""Small batches, whose curvature is remembered."""
LARGE = ONCE | {
    "fisher": "compatible",
    "n_steps": 128,
    "target_kl": 0.02,
    "target_kl_end": None,
    "log_std_init": 0.0,
    "log_std_min": None,
    "cg_damping": 0.1,
    "curvature_memory": 0.0,
    "critic_steps": 1,
    "critic_cg_max_steps": 8,
}
"""The defaults before those."""
CANDIDATES: dict[str, dict[str, Any] | None] = {
    "default": {},
    "preset": None,
    "2048, fresh curvature": LARGE,
    "512": SMALL,
    "512, no memory": SMALL | {"curvature_memory": 0},
    "512, two critic steps": SMALL | {"critic_steps": 2},
    "512, two critic steps, KL 0.01": SMALL | {"critic_steps": 2, "target_kl": 0.01},
    "512 of 32 x 16, renewed every 4": SMALL | {"num_envs": 32, "n_steps": 16, "curvature_renewal": 4},
    "1024 of 64 x 16, KL 0.01": SMALL | {"num_envs": 64, "n_steps": 16, "target_kl": 0.01},
    "512, short critic steps": SMALL | {"critic_cg_max_steps": 2},
    "512, short critic steps, KL 0.01": SMALL | {"critic_cg_max_steps": 2, "target_kl": 0.01},
    "512, short critic steps, KL 0.02": SMALL | {"critic_cg_max_steps": 2, "target_kl": 0.02},
    "512, each four times": REUSED,
    "512, each four times, damping 10": REUSED | {"cg_damping": 10.0},
    "512, each four times, λ 0.9": REUSED | {"gae_lambda": 0.9},
    "512, each eight times, KL 0.003": REUSED | {"reused_rollouts": 7, "target_kl": 0.003},
    "2048": SINGLE,
    "2048, damping 0.1": SINGLE | {"cg_damping": 0.1},
    "2048, damping 1": SINGLE | {"cg_damping": 1.0},
    "2048, λ 0.9": SINGLE | {"gae_lambda": 0.9},
    "1024": SINGLE | {"num_envs": 32},
    "8192, KL 0.08": SINGLE | {"num_envs": 128, "n_steps": 64, "target_kl": 0.08},
    "2048, critic by Gauss-Newton": SINGLE | {"critic": "gauss_newton", "critic_cg_max_steps": 8},
    "reuse that fades from eight times 256": {"n_steps": 16, "reused_rollouts": 7, "reuse_until": 0.36},
    "a floor of e^-1.2": {"log_std_min": -1.2},
    "a ceiling that falls to e^-1.6": {"log_std_end": -1.6},
}
"""Name -> what differs from the defaults, on every task; None is each task's preset."""

Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--candidates", nargs="*", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--keep", nargs="*", default=[], choices=list(CANDIDATES), help="go on whatever their score")
    parser.add_argument("--seeds", type=int, default=1, help=f"how many choose, from {CHOOSING} on; at most 10")
    parser.add_argument("--confirm", type=int, default=0, help=f"how many confirm the best, from {CONFIRMING} on")
    parser.add_argument("--budgets", type=int, nargs="*", default=BUDGETS, help="environment steps, rising")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one core each")
    parser.add_argument("--budget-minutes", type=float, default=30.0)
    parser.add_argument("--code", nargs="*", default=[], help="earlier versions whose results count too")
    arguments = parser.parse_args()
    if not 1 <= arguments.seeds <= CONFIRMING - CHOOSING:
        parser.error(f"--seeds is {arguments.seeds}; give 1 to {CONFIRMING - CHOOSING}.")
    budgets, tasks = list(arguments.budgets), arguments.tasks
    if budgets != sorted(set(budgets)):
        parser.error(f"--budgets are {budgets}; give rising numbers.")
    codes = {code_version(), *arguments.code}
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    seeds = range(CHOOSING, CHOOSING + arguments.seeds)
    alive = list(arguments.candidates)
    for place, budget in enumerate(budgets):
        keys = [key_of(name, task, seed, budgets[-1]) for seed in seeds for task in tasks for name in alive]
        if not run_all(keys, budget, codes, arguments.jobs, deadline):
            break
        alive = better_half(alive, arguments.keep, known(codes, budgets[-1]), tasks, seeds, budget)
        print(f"after {budget:,} steps: {', '.join(alive)}", flush=True)
        if place == len(budgets) - 1 and arguments.confirm:
            seeds = range(CONFIRMING, CONFIRMING + arguments.confirm)
            names = list(dict.fromkeys([alive[0], *arguments.keep]))
            keys = [key_of(name, task, seed, budgets[-1]) for seed in seeds for task in tasks for name in names]
            run_all(keys, budget, codes, arguments.jobs, deadline)
    lines = known(codes, budgets[-1])
    TABLE.write_text(report(lines, budgets))
    print(TABLE.read_text())
    print(plot(lines))


# Runs ----------------------------------------------------------------------------------------------------------------


@cache
def settings_of(name: str, task: str) -> dict[str, Any]:
    """Return a candidate's whole configuration for a task, as it is read from a file."""
    changed = CANDIDATES[name]
    config = NPG.preset(task) if changed is None else NPG.Config.of(changed)
    return completed(as_json(dataclasses.asdict(config)))


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Put options that are newer than settings, or do nothing in them, where they do nothing, or else at their
    defaults.
    """
    defaults = as_json(dataclasses.asdict(NPG.Config()))
    defaults |= {name: value for name, value in SILENT.items() if name in defaults}
    return defaults | without_silent(settings)


def key_of(name: str, task: str, seed: int, horizon: int) -> Line:
    """Return what a run is known by; horizon is its length in environment steps."""
    return {"env": task, "seed": seed, "horizon": horizon, "settings": settings_of(name, task)}


def run_all(keys: Sequence[Line], budget: int, codes: set[str], jobs: int, deadline: float) -> bool:
    """Run what is missing up to a budget of steps, until the deadline; whether all is there."""
    tasks: Iterator[tuple[Line, Line | None]] = iter(todo(keys, budget, codes))
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    at_work: set[Future[Line]] = set()
    complete = True
    with pool:
        while True:
            while len(at_work) < jobs and (task := next(tasks, None)) is not None:
                if time.monotonic() > deadline:
                    print("the budget of minutes is spent; call again to go on")
                    tasks, complete = iter(()), False
                    break
                at_work.add(pool.submit(train, *task, budget))
            if not at_work:
                return complete
            done, at_work = wait(at_work, return_when=FIRST_COMPLETED)
            for future in done:
                append(line := future.result())
                print(
                    f"{line['env']:26} {label(line):32} seed {line['seed']} {line['budget']:>9,} "
                    f"{line['curve'][-1][2]:8.1f}  {line['seconds']:.0f} s",
                    flush=True,
                )


def todo(keys: Sequence[Line], budget: int, codes: set[str]) -> list[tuple[Line, Line | None]]:
    """List the keys without a result at this budget, each with its last result before it, of this very code."""
    lines, here = read_lines(), code_version()
    found: list[tuple[Line, Line | None]] = []
    for key in (key for place, key in enumerate(keys) if key not in keys[:place]):
        mine = [line for line in lines if all(line[name] == value for name, value in key.items())]
        if any(line["code"] in codes and line["budget"] == budget for line in mine):
            continue
        before = [line for line in mine if line["code"] == here and line["budget"] < budget]
        found.append((key, max(before, key=lambda line: line["budget"], default=None)))
    return found


def train(key: Line, before: Line | None, budget: int) -> Line:
    """Train one run up to a budget of steps, from where an earlier result left it, if its checkpoint is there."""
    settings, horizon, code = key["settings"], key["horizon"], code_version()
    path = CHECKPOINTS / f"{hashlib.sha256(json.dumps([key, code]).encode()).hexdigest()[:16]}.zip"
    env = make_vec(key["env"], settings["num_envs"], num_threads=1, seed=key["seed"])
    agent, curve, seconds, stopped = None, [], 0.0, None
    if before is not None and path.is_file():
        agent = NPG.load(path, env, device="cpu")
        curve, seconds = before["curve"], before["seconds"]
    if agent is None or agent.num_timesteps != curve[-1][0]:
        agent = NPG("MlpPolicy", env, seed=key["seed"], device="cpu", **settings)
        curve, seconds = [], 0.0
    judge = make_vec(key["env"], EPISODES, autoreset="disabled", num_threads=1)
    fresh = agent.num_timesteps == 0
    begin = time.process_time()
    try:
        with contextlib.closing(
            agent.iterations(horizon - agent.num_timesteps, reset_num_timesteps=fresh)  # type: ignore[type-var]
        ) as iterations:
            for _ in iterations:
                reached = agent.num_timesteps
                due = reached * POINTS // horizon > (curve[-1][0] if curve else 0) * POINTS // horizon
                if due or reached >= budget:
                    seconds += time.process_time() - begin
                    mean = evaluate(agent, judge, EPISODES, 10_000).mean
                    curve.append([reached, round(seconds, 2), round(mean, 2)])
                    begin = time.process_time()
                if reached >= budget:
                    break
    except FloatingPointError as error:
        stopped = str(error)
        curve.append([agent.num_timesteps, round(seconds, 2), evaluate(agent, judge, EPISODES, 10_000).mean])
    final = None
    if budget >= horizon or stopped:
        final = [round(x, 2) for x in evaluate(agent, judge, FINAL_EPISODES, 20_000).returns.tolist()]
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        agent.save(path)
    env.close()
    judge.close()
    return {
        **key,
        "code": code,
        "budget": budget,
        "curve": curve,
        "seconds": round(seconds, 2),
        "final": final,
        "rejected": agent.rejections.updates,
        "stopped": stopped,
        **context(),
    }


# Results -------------------------------------------------------------------------------------------------------------


def append(line: Line) -> None:
    """Add a result at once: a line is written whole or, where the machine stops, is the last and left out."""
    LINES.parent.mkdir(parents=True, exist_ok=True)
    text = LINES.read_text() if LINES.is_file() else ""
    start = "" if text.endswith("\n") or not text else "\n"
    with LINES.open("a") as file:
        file.write(start + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines() -> list[Line]:
    """Read all results, their settings `completed`; lines that were cut short are left out."""
    found = []
    for text in LINES.read_text().splitlines() if LINES.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            found.append(line | {"settings": completed(line["settings"])})
    return found


def known(codes: set[str], horizon: int) -> list[Line]:
    """Read the results that count, each with the names of its candidates."""
    return [line for line in read_lines() if line["code"] in codes and line["horizon"] == horizon]


def names_of(line: Line) -> list[str]:
    """Name the candidates that a result belongs to: a task without a preset has the default for one."""
    return [name for name in CANDIDATES if settings_of(name, line["env"]) == line["settings"]]


def label(line: Line) -> str:
    return ", ".join(names_of(line)) or "of another search"


def normalized(task: str, value: float) -> float:
    """Return 0 for a random policy's return and 1 for the best published one."""
    random, best, _ = PUBLISHED[task]
    return (value - random) / (best - random)


def returns(lines: Iterable[Line], name: str, seeds: Iterable[int], budget: int) -> dict[str, list[float]]:
    """List a candidate's last evaluations at a budget by task: of 32 episodes at the end, of 8 on the way."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line["budget"] == budget and line["seed"] in seeds and name in names_of(line):
            value = line["curve"][-1][2] if line["final"] is None else float(np.mean(line["final"]))
            found.setdefault(line["env"], []).append(value)
    return found


def score(by_task: Mapping[str, Sequence[float]]) -> tuple[float, float, float]:
    """Return the mean over tasks of the mean normalized return, and its interval over seeds; not a number, if few."""
    values = [np.array([normalized(task, x) for x in found]) for task, found in by_task.items()]
    mean = float(np.mean([x.mean() for x in values])) if values else float("nan")
    if not values or min(map(len, values)) < 2:
        return mean, float("nan"), float("nan")
    draws = np.random.default_rng(0)
    resampled = np.mean([draws.choice(x, (5000, len(x))).mean(1) for x in values], axis=0)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return mean, float(low), float(high)


def better_half(
    alive: Sequence[str],
    keep: Sequence[str],
    lines: Sequence[Line],
    tasks: Sequence[str],
    seeds: Sequence[int],
    budget: int,
) -> list[str]:
    """Return the better half, the best first, and after them those that are kept whatever their score."""
    scores = {name: score(_of(tasks, returns(lines, name, seeds, budget)))[0] for name in alive}
    ranked = sorted(alive, key=lambda name: -scores[name])
    best = ranked[: -(-len(ranked) // 2)]
    return best + [name for name in ranked if name in keep and name not in best]


def _of(tasks: Sequence[str], by_task: dict[str, list[float]]) -> dict[str, list[float]]:
    return {task: found for task, found in by_task.items() if task in tasks}


def report(lines: Sequence[Line], budgets: Sequence[int]) -> str:
    """Write a table for each budget and kind of seeds: returns by task, scores, and seconds of one core."""
    text = [
        "# One default for all tasks",
        "",
        "Written by `python -m benchmarks.natural.search`, whose first lines say what is measured. Means over seeds of",
        "the deterministic return, in parentheses how many seeds; the score is the mean over tasks, 0 a random policy",
        "and 1 the best published on-policy return after 1M steps. A score over fewer tasks than others is not to be",
        "compared.",
        f"Code: {', '.join(sorted({line['code'] for line in lines}))}.",
        "",
    ]
    for kind, seeds in (("choosing", range(CHOOSING, CONFIRMING)), ("confirming", range(CONFIRMING, 10**9))):
        for budget in budgets:
            text += _table(lines, seeds, budget, f"## {budget:,} steps, {kind} seeds")
    text += ["## What 0 and 1 are", "", "| task | 0: random | 1: published | whose |", "|---|---:|---:|---|"]
    text += [f"| {task} | {random:g} | {best:g} | {source} |" for task, (random, best, source) in PUBLISHED.items()]
    return "\n".join(text) + "\n"


def _table(lines: Sequence[Line], seeds: Iterable[int], budget: int, title: str) -> list[str]:
    found = {name: returns(lines, name, seeds, budget) for name in CANDIDATES}
    found = {name: by_task for name, by_task in found.items() if by_task}
    tasks = [task for task in PUBLISHED if any(task in by_task for by_task in found.values())]
    if not found:
        return []
    head = ["candidate", *(task.removesuffix("-v5") for task in tasks), "score", "tasks", "s / 1M steps"]
    rows = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, by_task in sorted(found.items(), key=lambda item: (-len(item[1]), -score(item[1])[0])):
        mean, low, high = score(by_task)
        cells = [f"{np.mean(x):.0f} ({len(x)})" if (x := by_task.get(task)) else "" for task in tasks]
        interval = "" if np.isnan(low) else f" ({low:.2f} to {high:.2f})"
        mine = [line for line in lines if line["budget"] == budget and line["seed"] in seeds and name in names_of(line)]
        rate = np.mean([1e6 * line["seconds"] / line["curve"][-1][0] for line in mine])
        rows.append(f"| {' | '.join([name, *cells, f'{mean:.2f}{interval}', str(len(by_task)), f'{rate:.0f}'])} |")
    return [title, "", *rows, ""]


def plot(lines: Sequence[Line]) -> Path:
    """Draw each task's returns over steps, the mean over seeds of each candidate; dotted: the best published."""
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    tasks = [task for task in PUBLISHED if any(line["env"] == task for line in lines)]
    figure, axes = panels(len(tasks), min(len(tasks), 3) or 1)
    colors = dict(zip(CANDIDATES, colormaps["tab20"].colors, strict=False))
    # Of each run the longest that is known.
    longest = {json.dumps([line["env"], line["seed"], line["settings"]]): line for line in by_budget(lines)}
    for axis, task in zip(axes, tasks, strict=True):
        for name in CANDIDATES:
            mine = [x["curve"] for x in longest.values() if x["env"] == task and name in names_of(x)]
            for curve in mine:
                steps, _, values = zip(*curve, strict=True)
                axis.plot(steps, values, color=colors[name], alpha=0.35 if len(mine) > 1 else 0.9, linewidth=1)
            if len(mine) > 1:
                steps = np.array([point[0] for point in max(mine, key=len)])
                inner = steps[steps <= min(curve[-1][0] for curve in mine)]
                means = np.mean([np.interp(inner, *zip(*((s, r) for s, _, r in x), strict=True)) for x in mine], axis=0)
                axis.plot(inner, means, color=colors[name], linewidth=2.2)
        axis.axhline(PUBLISHED[task][1], color="gray", linestyle=":", linewidth=1)
        axis.set_title(task, loc="left", fontsize=11)
        axis.set_xlabel("environment steps")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    shown = [name for name in CANDIDATES if any(name in names_of(line) for line in longest.values())]
    for name in shown:
        axes[0].plot([], [], color=colors[name], label=name)
    if axes:
        axes[0].set_ylabel("return, deterministic policy")
        axes[0].legend(frameon=False, fontsize=7)
    return save(figure, NAME)


def by_budget(lines: Iterable[Line]) -> list[Line]:
    """Sort results so that a run's longest comes last."""
    return sorted(lines, key=lambda line: line["budget"])


if __name__ == "__main__":
    main()
