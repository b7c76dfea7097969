"""What the campaign's command does with its options."""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import arg

from agents import REGISTRY
from agents.run.folder import file_name
from benchmarks.common import context
from tests.campaign import endurance, faults, files, kills, watch, words


@dataclass(frozen=True)
class Campaign:
    """Kill runs, damage files, mistype words, fill disks, and say what did not stand it."""

    algorithms: tuple[str, ...] = tuple(REGISTRY)
    """Whose runs are killed, and trained for minutes."""
    kills: int = 0
    """SIGKILLs, over all algorithms."""
    files: int = 0
    """Checkpoints that are damaged or made to harm."""
    words: int = 0
    """Configurations and command lines that are malformed."""
    environments: int = 0
    """Times that an environment misbehaves in each way."""
    disks: int = 0
    """Times that a disk of 5 MB fills."""
    minutes: float = 0
    """That each algorithm trains while its memory and its saving are measured."""
    together: int = 1
    """Algorithms that train at once for that."""
    seed: int = 0
    """Decides all that is random, but for what the clock does to kills."""
    result: Annotated[str, arg(metavar="FILE")] = "tests/campaign/results.json"
    """Where the figures go; those of parts that did not run stay."""


class Results:
    """The figures, kept in a file from each part on.

    Args:
        file: where they go; what it has of other parts stays.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.faults = file, 0
        self.about = {"date": time.strftime("%Y-%m-%d"), **context()}

    def keep(self, name: str, part: dict[str, Any]) -> None:
        """Write a part's figures."""
        kept = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.file.write_text(json.dumps(kept | {name: self.about | part}, indent=1) + "\n")

    def end(self, name: str, part: dict[str, Any]) -> None:
        """Write a part's last figures, and show them."""
        self.keep(name, part)
        self.faults += len(part.get("faults", ()))
        print(name, json.dumps(part, indent=1), flush=True)


def kill_runs(
    most: int, algorithms: tuple[str, ...], chance: random.Random, scratch: Path, results: Results
) -> dict[str, Any]:
    """Kill runs of all cases in turn."""
    loops: list[kills.Loop] = []
    first = f"train {kills.CASES['npg, CartPole']} --run-dir {scratch / 'warm'}".split()
    kills.warm_up([[*first, *kills.COMMON]], scratch)
    for name in [name for name, typed in kills.CASES.items() if typed.split()[0] in algorithms]:
        folder = scratch / file_name(name)
        folder.mkdir()
        loops.append(kills.Loop(name, folder, chance))
        print(
            f"{name}: {loops[-1].seconds:.1f} s of processor time undisturbed, {loops[-1].writes} checkpoints",
            flush=True,
        )
    record: dict[str, Any] = {"all": {}}
    while record["all"].get("kills", 0) < most:
        for loop in loops:
            loop.trial()
            for fault in loop.faults[loop.said :]:
                print(fault, flush=True)
            loop.said = len(loop.faults)
        record = {
            "all": dict(sum((loop.counts for loop in loops), Counter[str]())),
            "cases": {loop.name: dict(loop.counts) for loop in loops},
            "faults": [fault for loop in loops for fault in loop.faults],
        }
        results.keep("kills", record)
        print(time.strftime("%H:%M:%S"), record["all"], flush=True)
    return record


RUNS = {
    "npg": "npg --env CartPole-v1 --num-envs 2 --n-steps 8 --steps 32",
    "ppo": "ppo --env Hopper-v5 --num-envs 2 --n-steps 8 --batch-size 8 --steps 32",
    "pes": "pes --env InvertedPendulum-v5 --num-envs 4 --estimator pes --n-steps 8 --steps 32",
    "fomaml": "fomaml --env families/Point-v0 --env-kwargs horizon=5 --num-envs 4 --meta-batch-size 2 --n-steps 5 "
    "--steps 40",
}
"""Whose checkpoints are damaged."""


def short_runs(algorithms: tuple[str, ...], scratch: Path) -> dict[str, Path]:
    """Train the runs whose files are damaged, and import what commands need."""
    runs = {}
    for name, asked in [(name, asked) for name, asked in RUNS.items() if name in algorithms] or RUNS.items():
        runs[name] = scratch / name
        typed = f"train {asked} --net-arch 4 --eval-episodes 1 --threads 1 --device cpu --seed 3 --run-dir {runs[name]}"
        kills.warm_up([typed.split()], scratch)
        config = runs[name] / "config.yaml"  # there is something left to do
        config.write_text(re.sub(r"\bsteps: (32|40)\b", "steps: 64", config.read_text()))
    run = str(next(iter(runs.values())))
    commands = [["evaluate", run, "--episodes", "1"], ["export", run, str(scratch / "x.safetensors")], ["compare", run]]
    commands += [["adapt", str(runs["fomaml"]), "--tasks", "2"]] if "fomaml" in runs else []
    kills.warm_up([*commands, ["runs", str(scratch)]], scratch)
    return runs


def refuse(name: str, cases: list[watch.Case], scratch: Path, results: Results) -> None:
    """Have commands refuse what they are given."""
    tally = watch.run_all(cases, scratch, lambda tally: results.keep(name, tally.record()))
    for case, said in tally.accepted.items():
        print("possible after all:", case, *said)
    results.end(name, tally.record())


def main() -> int:
    """Do what is typed; returns the exit code, 1 if something did not stand it."""
    asked = tyro.cli(Campaign, description=Campaign.__doc__)
    torch.set_num_threads(1)
    chance, results = random.Random(asked.seed), Results(Path(asked.result))
    scratch = Path(tempfile.mkdtemp(prefix="campaign-"))
    print(f"what fails stays in {scratch}", flush=True)
    if asked.kills:
        results.end("kills", kill_runs(asked.kills, asked.algorithms, chance, scratch, results))
    runs = short_runs(asked.algorithms, scratch) if asked.files or asked.words else {}
    if asked.files:
        refuse("files", files.cases(asked.files, chance, runs, scratch / "here"), scratch, results)
    if asked.words:
        odd = words.cases(asked.words, chance, runs, scratch / "here")
        refuse("configurations and command lines", odd, scratch, results)
    parts = (("environments", asked.environments, faults.environments), ("disks", asked.disks, faults.disks))
    for name, many, act in parts:
        if many:
            (scratch / name).mkdir()
            results.end(name, act(many, chance, scratch / name))
    if asked.minutes:
        (scratch / "endurance").mkdir()
        for run in endurance.train_all(asked.algorithms, asked.minutes, asked.together, scratch / "endurance"):
            run.add_rows(results.file.with_name("memory.csv"))
            results.end(f"minutes of {run.algorithm}", run.record())
    return int(results.faults > 0)
