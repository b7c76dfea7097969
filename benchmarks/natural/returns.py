"""Returns of train.py as a user runs it: final deterministic policies over seeds, with seconds and memory.

Each run is `python train.py npg --env ID --steps N --seed S`, with --defaults also `--preset none`; its final
evaluation (32 episodes) is what counts. --runs keeps the runs' folders. Finished runs are kept in
results/natural/returns.json by task, settings, steps, seed and versions, and are not repeated, so that a table grows
over several calls; the figure is drawn from all that are kept.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from agents import REGISTRY
from benchmarks.common import ROOT, as_json, context, is_same, keep, panels, read, save, without_silent

NAME = "natural/returns"
MEMORY_SECONDS = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithm", default="npg")
    parser.add_argument("--env", nargs="*", default=["Hopper-v5"], help="tasks; seed by seed")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=10, help="seeds below 10 chose the presets")
    parser.add_argument("--defaults", action="store_true", help="without presets")
    parser.add_argument("--runs", type=Path, help="folder in which to keep what train.py wrote, as TASK/SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--budget-minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    kept = read(NAME) or {"runs": []}
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    kind = REGISTRY[arguments.algorithm]
    keys = [
        {
            "algorithm": arguments.algorithm,
            "env": env,
            "steps": arguments.steps,
            "settings": as_json(dataclasses.asdict(kind.Config() if arguments.defaults else kind.preset(env))),
            "seed": arguments.first_seed + k,
        }
        for k in range(arguments.seeds)
        for env in arguments.env
    ]
    missing = [key for key in keys if not any(is_same(run, key) for run in kept["runs"])]
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.jobs)

    def work(key: dict[str, Any]) -> dict[str, Any] | None:
        return None if time.monotonic() > deadline else {**key, **context(), **train(key, threads, arguments.runs)}

    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {pool.submit(work, key): key for key in missing}
        for future in as_completed(futures):
            key, run = futures[future], future.result()
            if run is None:  # the budget of minutes is spent; the next call goes on
                continue
            keep(NAME, kept, run, set(key))
            print(
                f"{run['env']} seed {run['seed']}: {run['mean']:.0f}, IQM {run['iqm']:.0f}, {run['seconds']:.0f} s",
                flush=True,
            )
    for name, rows in by_task(kept["runs"]).items():
        print(summary(name, rows))
    plot(by_task(kept["runs"]))


def train(key: dict[str, Any], threads: int, runs: Path | None = None) -> dict[str, Any]:
    """Run train.py once: its final evaluation, curve, seconds and resident memory over time, in MiB.

    threads are those of the physics; they change the seconds only.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = (runs or Path(folder)).absolute() / key["env"] / str(key["seed"])
        options = ["--env", key["env"], "--steps", str(key["steps"]), "--seed", str(key["seed"])]
        options += ["--env-kwargs", f"num_threads={threads}", "--run-dir", str(run), "--quiet"]
        if key["settings"] == as_json(dataclasses.asdict(REGISTRY[key["algorithm"]].Config())):
            options += ["--preset", "none"]
        command = [sys.executable, "train.py", key["algorithm"], *options]
        begin = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        memory = []
        while process.poll() is None:
            memory.append(resident(process.pid))
            time.sleep(MEMORY_SECONDS)
        if process.returncode:
            raise RuntimeError(f"{command} ended with {process.returncode}")
        seconds = time.monotonic() - begin
        with (run / "evaluations.csv").open() as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    final = rows[-1]
    curve = [(row["steps"], round(row["mean"], 1)) for row in rows]
    return {
        "mean": final["mean"],
        "iqm": final["iqm"],
        "interval": [final["lower"], final["upper"]],
        "episodes": final["episodes"],
        "best_on_the_way": max(mean for _, mean in curve),
        "seconds": round(seconds, 1),
        "physics_threads": threads,
        "curve": curve,
        "memory_mib": [round(value) for value in memory[:: max(1, len(memory) // 20)]],
    }


def resident(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0.0
    sizes = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    return int(sizes[0]) / 1024 if sizes else 0.0


def by_task(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    tasks: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        kind = REGISTRY[run["algorithm"]]
        known = {"defaults": kind.Config(), "preset": kind.preset(run["env"])}
        of_now = {name: without_silent(as_json(dataclasses.asdict(c))) for name, c in known.items()}
        label = next((x for x, c in of_now.items() if c == without_silent(run["settings"])), "earlier settings")
        name = f"{run['algorithm']} on {run['env']}, {label}, {run['steps']:,} steps"
        tasks.setdefault(name, []).append(run)
    return tasks


def summary(name: str, rows: list[dict[str, Any]]) -> str:
    means = [row["mean"] for row in rows]
    seconds = statistics.median(row["seconds"] for row in rows)
    listed = " ".join(f"{mean:.0f}" for mean in means)
    return f"{name}: median {statistics.median(means):.0f} of {len(rows)} seeds ({listed}), median {seconds:.0f} s"


def plot(tasks: dict[str, list[dict[str, Any]]]) -> None:
    from matplotlib.ticker import EngFormatter

    figure, all_axes = panels(len(tasks), min(len(tasks), 3), 6.5, 4.2)
    for axes, (name, rows) in zip(all_axes, tasks.items(), strict=True):
        for row in rows:
            axes.plot(*zip(*row["curve"], strict=True), color="#1f5fa8", alpha=0.35, linewidth=1)
        steps = [step for step, _ in rows[0]["curve"]]
        shared = [row["curve"] for row in rows if [step for step, _ in row["curve"]] == steps]
        medians = [statistics.median(curve[k][1] for curve in shared) for k in range(len(steps))]
        label = f"median of {len(shared)} seeds" if len(shared) > 1 else "one seed"
        axes.plot(steps, medians, color="#1f5fa8", linewidth=2.2, label=label)
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_xlabel("environment steps")
        axes.set_ylabel("return, deterministic policy")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(frameon=False)
    print(save(figure, NAME))


if __name__ == "__main__":
    main()
