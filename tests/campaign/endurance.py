"""Memory over minutes, and what saving takes of them, for every algorithm with its defaults."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from agents import REGISTRY, checkpoint, saving
from tests.campaign.kills import ended, forked, kill

SAMPLE_SECONDS = 1.0
FLAT = 10.0
"""MiB that the memory may grow by from the second quarter to the last: one evaluation more, not a leak's minutes."""
SHARE = 0.01
"""Of the time that saving may take."""


class Trained:
    """A run that trains so long in a process of its own, whose memory is looked at on the way.

    Args:
        algorithm: with its defaults.
        minutes: by the clock.
        scratch: folder for what it writes.
    """

    def __init__(self, algorithm: str, minutes: float, scratch: Path) -> None:
        self.algorithm, self.minutes, self.folder = algorithm, minutes, scratch / algorithm
        self.output, self.spent = scratch / f"{algorithm}.txt", scratch / f"{algorithm}.json"
        families = hasattr(REGISTRY[algorithm].Config, "meta_batch_size")
        self.env = "families/Point-v0" if families else "Hopper-v5"
        words = f"train {algorithm} --env {self.env} --minutes {minutes} --threads 1 --device cpu --quiet --run-dir"
        saves: list[tuple[str, float, float]] = []
        save = saving.Saved.save

        def timed(agent: saving.Saved, path: Any, *arguments: Any, **named: Any) -> None:
            begun, worked = time.perf_counter(), time.process_time()
            save(agent, path, *arguments, **named)
            saves.append((Path(path).stem, time.perf_counter() - begun, time.process_time() - worked))

        def note() -> None:
            self.spent.write_text(json.dumps({"saves": saves, "worked": time.process_time()}))

        saving.Saved.save = timed  # type: ignore[method-assign]
        self.begun = time.monotonic()
        self.pid = forked([*words.split(), str(self.folder)], self.output, note)
        saving.Saved.save = save  # type: ignore[method-assign]
        self.memory: list[tuple[float, float]] = []
        """Seconds since the start, and MiB."""
        self.code: int | None = None

    def look(self) -> bool:
        """Note the memory; says whether the run has ended."""
        self.code = ended(self.pid, 0)
        if self.code is None:
            resident = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.memory.append((time.monotonic() - self.begun, resident / 2**20))
            if self.memory[-1][0] > 120 * self.minutes + 120:
                self.code = kill(self.pid) or -9
        return self.code is not None

    def record(self) -> dict[str, Any]:
        """Give what came of it."""
        if self.code != 0:
            return {"faults": [f"exit {self.code}: {self.output.read_text(errors='replace')[-300:]}"]}
        state = json.loads((self.folder / "state.json").read_text())
        spent = json.loads(self.spent.read_text())
        names, seconds_of, worked = zip(*spent["saves"], strict=True)
        # The final evaluation and the curve come after.
        within = [resident for seconds, resident in self.memory if seconds < 60 * self.minutes]
        quarter = len(within) // 4
        first, last = median(within[quarter : 2 * quarter]), median(within[3 * quarter :])
        share = sum(seconds_of) / state["seconds"]
        faults = ["memory grows"] * (last - first > FLAT) + ["saving takes too long"] * (share >= SHARE)
        return {
            "minutes": self.minutes,
            "environment": self.env,
            "iterations": checkpoint.read_manifest(self.folder / "checkpoints" / "last.zip")["iteration"],
            "steps": state["steps"],
            "MiB in the second quarter": round(first, 1),
            "MiB in the last": round(last, 1),
            "saves": len(names),
            "of these the best so far": names.count("best"),
            "milliseconds of one": round(1e3 * median(seconds_of), 1),
            "share of saving": round(share, 5),
            "seconds of the processor": round(spent["worked"], 1),  # others may have had it for the rest
            "share of saving in these": round(sum(worked) / spent["worked"], 5),
            "faults": faults,
        }

    def add_rows(self, raw: Path) -> None:
        """Add the memory at the end of each minute to a CSV file."""
        # None is left of a process that has just ended.
        minutes = {int(seconds // 60) + 1: resident for seconds, resident in self.memory if resident}
        rows = [(self.algorithm, minute, round(resident, 1)) for minute, resident in minutes.items()]
        header = [] if raw.is_file() else [("algorithm", "minute", "MiB")]
        with raw.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([*header, *rows])


def train_all(algorithms: Sequence[str], minutes: float, together: int, scratch: Path) -> Iterator[Trained]:
    """Train algorithms, some of them at once; gives each as it ends."""
    waiting, running = list(algorithms), list[Trained]()
    while waiting or running:
        while waiting and len(running) < together:
            running.append(Trained(waiting.pop(0), minutes, scratch))
        time.sleep(SAMPLE_SECONDS)
        for trained in [trained for trained in running if trained.look()]:
            running.remove(trained)
            yield trained
