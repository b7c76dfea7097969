"""Peak memory and time of a meta-gradient against the number of inner steps: Reptile, FOMAML and MAML.

The tasks, images and network are those of few_shot.py, with 100 tasks in a batch. Memory is the most that PyTorch had
allocated at a time beside what was there before, as its profiler tells; times are medians, the rules alternated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from agents import noise
from agents.adaptation.inner_loop import RULES, InnerSGD, meta_gradients
from agents.policy.networks import parameter_vector
from benchmarks.adaptation.few_shot import BASE, MODULE, classes, cross_entropy, draw, minibatches
from benchmarks.common import context, panels, save, timed, write

NAME = "adaptation/memory"
STEPS = (1, 2, 5, 10, 20, 40)
TASKS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    phi = parameter_vector(MODULE)
    generator = noise.stream(0, "tasks", 0)
    x, y, x_test, y_test = draw(classes(range(6)), generator, TASKS)
    tail = minibatches(x_test, y_test, BASE, 1, generator)[0]
    rows: list[dict[str, Any]] = []
    for steps in STEPS:
        batches = minibatches(x, y, BASE, steps, generator)

        def work(rule: str, batches: list[tuple[Tensor, Tensor]] = batches) -> Tensor:
            test = None if rule == "reptile" else tail
            return meta_gradients(rule, cross_entropy, phi.expand(TASKS, -1), batches, test, InnerSGD(BASE["inner_lr"]))

        peaks = {rule: peak(lambda rule=rule: work(rule)) for rule in RULES}
        turns = [{rule: timed(lambda rule=rule: work(rule)) for rule in RULES} for _ in range(arguments.repeats)]
        for rule in RULES:
            seconds = statistics.median(turn[rule] for turn in turns)
            rows.append({"rule": rule, "inner_steps": steps, "bytes": peaks[rule], "seconds": round(seconds, 4)})
            print(f"{rule:8} {steps:3} steps  {peaks[rule] / 2**20:7.1f} MiB  {1e3 * seconds:7.1f} ms", flush=True)
    print(write(NAME, {**context(), "parameters": len(phi), "tasks": TASKS, "rows": rows}))
    plot(rows)


def peak(work: Callable[[], object]) -> int:
    """Return the most bytes that PyTorch holds at a time while it works, beside what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        found.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    held = [event["args"] for event in events if event.get("name") == "[memory]"]
    before = held[0]["Total Allocated"] - held[0]["Bytes"]
    return max(event["Total Allocated"] for event in held) - before


def plot(rows: list[dict[str, Any]]) -> None:
    figure, axes = panels(2, 2)
    for axis, key, unit, label in (
        (axes[0], "bytes", 2**20, "peak memory, MiB"),
        (axes[1], "seconds", 1e-3, "time of a meta-gradient, ms"),
    ):
        for index, rule in enumerate(RULES):
            mine = [row for row in rows if row["rule"] == rule]
            axis.plot(
                [row["inner_steps"] for row in mine],
                [row[key] / unit for row in mine],
                marker="o",
                markersize=4,
                color=f"C{index}",
                label=rule,
            )
        axis.set(xlabel="inner steps", ylabel=label, ylim=(0, None))
    axes[0].legend(fontsize=8, frameon=False)
    axes[0].set_title(f"{TASKS} tasks in a batch", loc="left", fontsize=11)
    save(figure, NAME)


if __name__ == "__main__":
    main()
