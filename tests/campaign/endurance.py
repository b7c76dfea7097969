"""Memory over minutes, and what saving takes of them, for every algorithm with its defaults."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from agents import REGISTRY, saving
from agents.run.options import RunOptions
from tests.campaign.kills import ended, forked, kill

SAMPLE_SECONDS = 1.0
FLAT = 10.0
"""MiB that the memory may grow by from the second quarter to the last: one evaluation more, not a leak's minutes."""
SHARE = 0.01
"""Of the time that saving may take."""


def train(algorithm: str, minutes: float, scratch: Path) -> dict[str, Any]:
    """Train so long; gives the memory on the way and the share of saving."""
    folder, spent = scratch / algorithm, scratch / f"{algorithm}.json"
    env = "families/Point-v0" if hasattr(REGISTRY[algorithm].Config, "meta_batch_size") else "Hopper-v5"
    words = (
        f"train {algorithm} --env {env} --minutes {minutes} --threads 1 --device cpu --quiet --run-dir {folder}".split()
    )
    saves: list[float] = []
    save = saving.Saved.save

    def timed(*arguments: Any, **named: Any) -> None:
        begun = time.perf_counter()
        save(*arguments, **named)
        saves.append(time.perf_counter() - begun)

    saving.Saved.save = timed  # type: ignore[method-assign]
    pid = forked(words, scratch / f"{algorithm}.txt", lambda: spent.write_text(json.dumps(saves)))
    saving.Saved.save = save  # type: ignore[method-assign]
    memory, code, most = [], None, time.monotonic() + 120 * minutes + 120
    while code is None:
        memory.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        code = ended(pid, SAMPLE_SECONDS, pause=0.1)
        if code is None and time.monotonic() > most:
            code = kill(pid) or -9
    said = (scratch / f"{algorithm}.txt").read_text(errors="replace")
    if code != 0:
        return {"fault": f"exit {code}: {said[-300:]}"}
    state = json.loads((folder / "state.json").read_text())
    times = json.loads(spent.read_text())
    within = memory[: int(60 * minutes / SAMPLE_SECONDS)]  # the final evaluation and the curve come after
    quarter = len(within) // 4
    first, last = median(within[quarter : 2 * quarter]), median(within[3 * quarter :])
    share = sum(times) / state["seconds"]  # a short run's best checkpoints among them, up to 20
    share_of_one = sum(times) / max(len(times), 1) / RunOptions(env).checkpoint_every
    return {
        "minutes": minutes,
        "environment": env,
        "steps": state["steps"],
        "MiB in the second quarter": round(first, 1),
        "MiB in the last": round(last, 1),
        "flat": last - first <= FLAT,
        "saves": len(times),
        "milliseconds of one": round(1e3 * sum(times) / max(len(times), 1), 1),
        "share of saving": round(share, 5),
        "share of one each 30 s": round(share_of_one, 5),
        "below 1 %": share_of_one < SHARE,
    }


def train_all(algorithms: Sequence[str], minutes: float, scratch: Path) -> dict[str, Any]:
    """Train algorithms, one after the other."""
    found = {}
    for name in algorithms:
        found[name] = train(name, minutes, scratch)
        print(name, found[name], flush=True)
    return found
