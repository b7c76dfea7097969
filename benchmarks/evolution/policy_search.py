"""Policy search with evolution strategies: estimators on Swimmer, steps and seconds to ARS's thresholds, and the rate.

Six parts, each kept in results/evolution/policy_search.json as soon as a run of it is finished, and not repeated:

- swimmer: PES, NRES, ES and truncated ES with linear policies on Swimmer-v5, equal environment steps, several seeds.
- preset: the presets of `PES` on Swimmer-v5, for seeds 10 to 19, and InvertedPendulum-v5, 10 to 17, which were not
  used to choose them.
- sac: SB3's SAC on Swimmer-v5 for as many steps as the preset, with rl-baselines3-zoo's settings: the level of a method
  that uses derivatives and a replay buffer.
- thresholds: seconds and environment steps until the policy's mean return reaches what Mania et al. 2018 (table 1) ask
  for, ours (the presets of `PES`) against sb3-contrib's ARS with the settings that rl-baselines3-zoo has for them
  (hyperparams/ars.yml, MuJoCo's v3, "closest to original paper"), which are not the presets': HalfCheetah has 32
  directions there, and 8 in the preset. Evaluations are not timed, and their steps are counted apart. With --threads 1
  both sides keep one core busy, and their CPU seconds can be compared whatever else the machine does.
  --budget-minutes ends the part; call again to go on.
- speed: environment steps per second of both sides of that comparison, from their first policies on, alternated in one
  process; medians.
- rate: environment steps per second with 64 particles on Hopper-v5 beside the environment layer, which steps the same
  environments with the same actions; all seconds of both, for the preset's searches from the beginning, in which most
  particles fall at once and few are stepped together, for 200,000 steps after 400,000, and for the first 1,000,000;
  medians of five turns, of which each is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from typing import Any

import numpy as np
import torch

from agents import PES
from agents.config import preset_values
from agents.run.evaluation import evaluate
from benchmarks.common import context, installed, keep, missing, panels, read, save, write
from benchmarks.peers import ZOO_ARS, ZOO_SAC, sb3_ars, sb3_sac
from envs import make_vec

NAME = "evolution/policy_search"
PARTS = ("swimmer", "preset", "sac", "rate", "speed", "thresholds")
EVALUATION_SEED = 1_000_000

SWIMMER: dict[str, dict[str, Any]] = {
    "pes": {"n_steps": 100, "sigma": 0.3, "learning_rate": 0.05},
    "nres": {"estimator": "nres", "n_steps": 100, "sigma": 0.3, "learning_rate": 0.05},
    "es": {"estimator": "es", "n_steps": 1000, "sigma": 0.3, "learning_rate": 0.15},
    "truncated_es": {"estimator": "truncated_es", "n_steps": 100, "sigma": 0.1, "learning_rate": 0.05, "num_envs": 30},
}
"""Ten pairs each, SGD, rewards scaled by each window's own deviation."""
PRESETS = {"Swimmer-v5": (150_000, range(10, 20)), "InvertedPendulum-v5": (100_000, range(10, 18))}
"""Environment steps and seeds of the runs with a preset."""

THRESHOLDS = {"HalfCheetah-v5": 2386, "Hopper-v5": 3403, "Walker2d-v5": 3830}
PUBLISHED_STEPS = {"HalfCheetah-v5": 5.9e5, "Hopper-v5": 2.0e6, "Walker2d-v5": 8.1e6}
MOST_STEPS = {"HalfCheetah-v5": 6_000_000, "Hopper-v5": 10_000_000, "Walker2d-v5": 20_000_000}
RATE_SPANS = ((0, 200_000), (400_000, 600_000), (0, 1_000_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["swimmer", "preset", "rate"], choices=PARTS)
    parser.add_argument("--seeds", type=int, default=5, help="how many, of swimmer, sac and thresholds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250_000, help="environment steps of a Swimmer run")
    parser.add_argument("--tasks", nargs="*", default=list(THRESHOLDS), choices=THRESHOLDS)
    parser.add_argument("--sides", nargs="*", default=["ours", "sb3-contrib"], choices=["ours", "sb3-contrib"])
    parser.add_argument("--most-steps", type=int, help="give a threshold up after these steps")
    parser.add_argument("--every", type=int, default=50_000, help="steps between evaluations on the way to a threshold")
    parser.add_argument("--threads", type=int, default=0, help="of the physics; 0 takes every core")
    parser.add_argument("--budget-minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = read(NAME) or {"runs": [], "rates": []}

    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    keys: list[dict[str, Any]] = []
    if "swimmer" in arguments.parts:
        common = {"part": "swimmer", "env": "Swimmer-v5", "steps": arguments.steps}
        keys += [{**common, "side": side, "seed": seed} for seed in seeds for side in SWIMMER]
    if "preset" in arguments.parts:
        for env, (steps, chosen) in PRESETS.items():
            common = {"part": "preset", "env": env, "steps": steps, "side": "preset"}
            keys += [{**common, "seed": seed} for seed in chosen]
    if "sac" in arguments.parts:
        common = {"part": "sac", "env": "Swimmer-v5", "steps": PRESETS["Swimmer-v5"][0], "side": "SB3 SAC"}
        keys += [{**common, "seed": seed} for seed in seeds]
    if "thresholds" in arguments.parts:
        for env in arguments.tasks:
            common = {"part": "thresholds", "env": env, "steps": arguments.most_steps or MOST_STEPS[env]}
            keys += [{**common, "side": side, "seed": s} for s in seeds for side in arguments.sides]
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    for key in missing(kept["runs"], ({**key, "settings": settings_of(key)} for key in keys), arguments.budget_minutes):
        if key["part"] != "thresholds":
            run = curve_of(key, arguments.threads)
        else:
            run = threshold(key, arguments.every, deadline, arguments.threads)
        run = {**key, "physics_threads": arguments.threads, **context(), **installed("sb3-contrib"), **run}
        if key["part"] == "thresholds" and run["out_of_time"]:
            print(f"{key['env']} {key['side']} seed {key['seed']}: out of time, not kept")
            break
        keep(NAME, kept, run, key.keys() - {"settings"})
        print(line(run), flush=True)
    if "speed" in arguments.parts:
        for env in arguments.tasks:
            row = {**context(), **installed("sb3-contrib"), **speed(env, arguments.threads)}
            kept["speeds"] = [other for other in kept.get("speeds", []) if other["env"] != env] + [row]
            write(NAME, kept)
    if "rate" in arguments.parts:
        kept["rates"] = [{**context(), **rate("Hopper-v5", 64, *span)} for span in RATE_SPANS]
        write(NAME, kept)
    for row in kept.get("speeds", []):
        sides = ", ".join(f"{side} {rate:.0f}" for side, rate in row["rates"].items())
        print(f"{row['env']}: {sides} steps/s, {row['ratio']:.1f} times")
    for row in kept["rates"]:
        ratios = " ".join(f"{turn['ratio']:.3f}" for turn in row["turns"])
        print(
            f"{row['env']}, {row['particles']} particles, steps {row['after']:,} to {row['to']:,}: "
            f"{row['rate']:.0f} steps/s, {row['ratio']:.3f} of the layer ({ratios})"
        )
    print(summary(kept["runs"]))
    plot(kept["runs"])


def settings_of(key: dict[str, Any]) -> dict[str, Any]:
    """Return what a run is made with, as JSON values."""
    if key["part"] == "swimmer":
        return {"normalize_observations": False, "reward_memory": 0.0, "num_envs": 20, **SWIMMER[key["side"]]}
    if key["part"] == "sac":
        return ZOO_SAC[key["env"]]
    return ZOO_ARS[key["env"]] if key["side"] == "sb3-contrib" else preset_values("pes", key["env"])


def curve_of(key: dict[str, Any], threads: int) -> dict[str, Any]:
    """Return a run's curve and its last policy's return, mean of 16 episodes on seeds of their own."""
    training = sac(key) if key["part"] == "sac" else ours(key, threads)
    curve: list[tuple[int, float]] = []
    with contextlib.closing(make_vec(key["env"], 16, autoreset="disabled")) as env:
        evaluation_steps, seconds, begin = 0, 0.0, time.perf_counter()
        for steps, act in training:
            if steps >= (len(curve) + 1) * 20_000:
                seconds += time.perf_counter() - begin
                found = evaluate(act, env, 4, EVALUATION_SEED)
                evaluation_steps += found.steps
                curve.append((steps, round(found.mean, 1)))
                begin = time.perf_counter()
        seconds += time.perf_counter() - begin
        final = evaluate(act, env, 16, 2 * EVALUATION_SEED)
    return {
        "final": final.mean,
        "steps_taken": steps,
        "steps_with_mean_parameters": getattr(act, "steps_with_mean_parameters", 0),
        "evaluation_steps": evaluation_steps + final.steps,
        "seconds": round(seconds, 2),
        "curve": curve,
    }


def searching(key: dict[str, Any], threads: int) -> PES:
    """Make an agent with a run's settings."""
    settings = PES.Config.of(settings_of(key))
    env = make_vec(key["env"], settings.num_envs, autoreset="disabled", num_threads=threads)
    return PES("LinearPolicy", env, seed=key["seed"], device="cpu", **settings_of(key))


def threshold(key: dict[str, Any], every: int, deadline: float, threads: int) -> dict[str, Any]:
    """Train until the mean return of 8 episodes reaches the task's threshold, it is given up, or time is out."""
    env_id, goal = key["env"], THRESHOLDS[key["env"]]
    curve: list[tuple[int, float, float]] = []
    evaluation_steps, seconds, cpu_seconds = 0, 0.0, 0.0
    begin, cpu_begin = time.perf_counter(), time.process_time()
    with contextlib.closing(make_vec(env_id, 8, autoreset="disabled")) as env:
        training = ours(key, threads) if key["side"] == "ours" else ars(key)
        for steps, act in training:
            if steps < (len(curve) + 1) * every and steps < key["steps"]:
                continue
            seconds += time.perf_counter() - begin
            cpu_seconds += time.process_time() - cpu_begin
            found = evaluate(act, env, 8, EVALUATION_SEED)
            evaluation_steps += found.steps
            curve.append((steps, round(seconds, 2), round(found.mean, 1)))
            if found.mean >= goal or steps >= key["steps"] or time.monotonic() > deadline:
                break
            begin, cpu_begin = time.perf_counter(), time.process_time()
        training.close()
    steps, seconds, last = curve[-1]
    return {
        "reached": last >= goal,
        "out_of_time": last < goal and steps < key["steps"],
        "steps_taken": steps,
        "seconds": seconds,
        "cpu_seconds": round(cpu_seconds, 2),
        "steps_per_second": round(steps / seconds),
        "evaluation_steps": evaluation_steps,
        "curve": curve,
    }


def ours(key: dict[str, Any], threads: int) -> Any:
    """Make an agent, and yield the steps made so far and it, after each update."""
    agent = searching(key, threads)
    return ((agent.num_timesteps, agent) for _ in agent.iterations(key["steps"]))


def ars(key: dict[str, Any]) -> Any:
    """Yield the same of sb3-contrib's ARS, which steps one environment."""
    with contextlib.closing(sb3_ars(key["env"], key["seed"], key["steps"], settings_of(key))) as learner:
        steps = 0
        while steps < key["steps"]:
            # One update: as many steps as one candidate's episode are asked for, and all candidates are run.
            steps += learner.train(1)
            yield steps, learner


def sac(key: dict[str, Any]) -> Any:
    """Yield the same of SB3's SAC, which learns from every step."""
    with contextlib.closing(sb3_sac(key["env"], key["seed"], key["steps"], settings_of(key))) as learner:
        for steps in range(10_000, key["steps"] + 1, 10_000):
            learner.train(10_000)
            yield steps, learner


def speed(env_id: str, threads: int, turns: int = 9, seconds: float = 2.0) -> dict[str, Any]:
    """Measure environment steps per second of both sides: in each turn whole updates for at least so many seconds."""
    key = {"part": "thresholds", "env": env_id, "steps": 10**9, "seed": 0}
    sides = {"ours": ours({**key, "side": "ours"}, threads), "sb3-contrib": ars({**key, "side": "sb3-contrib"})}
    made = {side: next(training)[0] for side, training in sides.items()}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(turns):
        for side, training in sides.items():
            begin, before = time.perf_counter(), made[side]
            while time.perf_counter() - begin < seconds:
                made[side] = next(training)[0]
            rates[side].append((made[side] - before) / (time.perf_counter() - begin))
    medians = {side: statistics.median(found) for side, found in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["sb3-contrib"], strict=True))
    return {
        "env": env_id,
        "rates": medians,
        "ratio": ratio,
        "turns": rates,
        "settings": {side: settings_of({**key, "side": side}) for side in sides},
    }


def rate(env_id: str, particles: int, after: int, to: int, turns: int = 5) -> dict[str, Any]:
    """Measure steps per second of learning between two numbers of steps, and the share of its seconds that the
    environment layer alone takes for the same resets, actions and ids; of the same training in each turn.
    """
    found = [rate_turn(env_id, particles, after, to) for _ in range(turns)]
    span = {"env": env_id, "particles": particles, "after": after, "to": to}
    return span | {name: statistics.median(turn[name] for turn in found) for name in found[0]} | {"turns": found}


def rate_turn(env_id: str, particles: int, after: int, to: int) -> dict[str, float]:
    """Alternate the two sides: a window is learned on, then its calls are repeated from the same states."""
    env = make_vec(env_id, particles, autoreset="disabled")
    agent = PES("LinearPolicy", env, seed=0, device="cpu", **{**preset_values("pes", env_id), "num_envs": particles})
    calls: list[tuple[str, tuple, dict]] = []
    originals = {name: getattr(env, name) for name in ("step", "reset")}

    def recorded(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            # Actions and ids are new tensors wherever they change: to keep them costs the learning side nothing.
            calls.append((name, args, kwargs))
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(env, name, recorded(name))
    learning, layer = [], []
    training = agent.iterations(10**9)
    next(training)
    while agent.num_timesteps < after:
        next(training)
        calls.clear()
    first = agent.num_timesteps
    while agent.num_timesteps < to:
        calls.clear()
        state = env.snapshot()
        begin = time.perf_counter()
        next(training)
        learning.append(time.perf_counter() - begin)
        reached = env.snapshot()
        env.restore(state)
        begin = time.perf_counter()
        for name, args, kwargs in calls:
            originals[name](*args, **kwargs)
        layer.append(time.perf_counter() - begin)
        env.restore(reached)
    env.close()
    return {"rate": (agent.num_timesteps - first) / sum(learning), "ratio": sum(layer) / sum(learning)}


def line(run: dict[str, Any]) -> str:
    head = f"{run['env']} {run['side']:12} seed {run['seed']}: {run['steps_taken']:,} steps, {run['seconds']:.0f} s"
    if run["part"] != "thresholds":
        return f"{head}, final {run['final']:.0f}"
    return f"{head}, {'reached' if run['reached'] else 'not reached'}, best {max(row[2] for row in run['curve']):.0f}"


def summary(runs: list[dict[str, Any]]) -> str:
    """List medians over seeds, per part, task and side."""
    rows = ["", f"{'task':20}{'side':14}{'seeds':>6}{'median':>10}   all"]
    for group in groups(runs):
        first = group[0]
        if first["part"] != "thresholds":
            finals = [run["final"] for run in group]
            seconds = [run["seconds"] for run in group]
            listed = " ".join(f"{value:.0f}" for value in finals)
            rows.append(
                f"{first['env']:20}{first['side']:14}{len(group):6}{statistics.median(finals):10.0f}   {listed}; "
                f"{statistics.median(seconds):.1f} s"
            )
            continue
        steps = [run["steps_taken"] if run["reached"] else np.inf for run in group]
        seconds = [run["seconds"] if run["reached"] else np.inf for run in group]
        rows.append(
            f"{first['env']:20}{first['side']:14}{len(group):6}{statistics.median(steps):10.3g} steps, "
            f"{statistics.median(seconds):.0f} s, {statistics.median(r['steps_per_second'] for r in group):.0f} steps/s"
            f"   reached by {sum(run['reached'] for run in group)}; published ARS {PUBLISHED_STEPS[first['env']]:.2g}"
        )
    return "\n".join(rows)


def groups(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: dict[tuple, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found.setdefault((run["part"], run["env"], run["side"], run["steps"]), []).append(run)
    return [found[name] for name in sorted(found)]


COLORS = {
    "pes": "#1f5fa8",
    "preset": "#6a4c93",
    "ours": "#1f5fa8",
    "nres": "#2a8c5b",
    "es": "#c77d0a",
    "truncated_es": "#b03a48",
    "sb3-contrib": "#777777",
    "SB3 SAC": "#333333",
}


def plot(runs: list[dict[str, Any]]) -> None:
    tasks = list(dict.fromkeys(run["env"] for run in sorted(runs, key=lambda run: (run["part"], run["env"]))))
    if not tasks:
        return
    figure, all_axes = panels(len(tasks), min(len(tasks), 2))
    for axes, task in zip(all_axes, tasks, strict=True):
        for group in groups([run for run in runs if run["env"] == task]):
            side = group[0]["side"]
            for run in group:
                points = [(point[0], point[-1]) for point in run["curve"]]
                axes.plot(*zip(*points, strict=True), color=COLORS[side], alpha=0.6, linewidth=1.1)
            axes.plot([], [], color=COLORS[side], label=f"{side}, {len(group)} seed{'s' * (len(group) > 1)}")
        if task in THRESHOLDS:
            axes.axhline(THRESHOLDS[task], color="black", linewidth=0.8, linestyle=":")
        axes.set_title(task, loc="left", fontsize=11)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("environment steps, perturbed and mean policies")
        axes.set_ylabel("return, unperturbed policy")
        axes.legend(frameon=False, fontsize=9)
    print(save(figure, NAME))


if __name__ == "__main__":
    main()
