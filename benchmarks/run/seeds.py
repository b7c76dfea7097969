"""Several seeds at once beside single runs side by side: environment steps a second of both.

python -m benchmarks.run.seeds

`--seeds 4 --jobs 2` is to train as many steps a second as two runs that are typed side by side, each on one core. Both
sides are whole commands, starts and final evaluations included; the sides alternate, and medians count.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import common

NAME = "run/seeds"
SEEDS, JOBS = 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="npg")
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--steps", type=int, default=100_000, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0))[:JOBS])
    asked = parser.parse_args()
    os.sched_setaffinity(0, asked.cores)
    words = [asked.algorithm, "--env", asked.env, "--steps", str(asked.steps), "--threads", "1", "--quiet"]
    found: dict[str, list[dict[str, float]]] = {"several": [], "side by side": []}
    for _ in range(asked.repeats):
        found["several"].append(measured([[*words, "--seeds", str(SEEDS), "--jobs", str(JOBS)]], []))
        single = [[*words, "--seed", str(seed)] for seed in range(JOBS)]
        found["side by side"].append(measured(single, asked.cores))
    rates = {
        side: {
            kind: statistics.median(runs * asked.steps / one[kind] for one in found[side])
            for kind in ("seconds", "processor_seconds")
        }
        for side, runs in {"several": SEEDS, "side by side": JOBS}.items()
    }
    for side, rate in rates.items():
        print(f"{side:<13} {rate['seconds']:>9,.0f} steps/s {rate['processor_seconds']:>9,.0f} a processor's second")
    ratio = {kind: rates["several"][kind] / rates["side by side"][kind] for kind in rates["several"]}
    print(
        f"several / side by side: {ratio['seconds']:.2f} by the clock, {ratio['processor_seconds']:.2f} by processors"
    )
    task = {"algorithm": asked.algorithm, "env": asked.env, "steps": asked.steps, "cores": asked.cores}
    common.write(NAME, {**common.context(), **task, "found": found, "ratio": ratio})


def measured(commands: list[list[str]], cores: list[int]) -> dict[str, float]:
    """Run commands at once, each on one of the cores, or all on all if none are given: what they took."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "train.py", *words, "--runs", folder],
                cwd=common.ROOT,
                stdout=subprocess.DEVNULL,
                preexec_fn=(lambda core=core: os.sched_setaffinity(0, {core})) if cores else None,
            )
            for words, core in zip(commands, cores or [0], strict=True)
        ]
        codes = [one.wait() for one in started]
    assert not any(codes), codes
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.monotonic() - begun, "processor_seconds": spent}


if __name__ == "__main__":
    main()
