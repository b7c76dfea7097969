"""Environments that misbehave, and disks that fill: it is said in words, and the run goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from agents import checkpoint
from agents.run.folder import RunFolder
from tests.campaign.kills import COMMON, PATIENCE, Outcome, ended, forked, kill

ENV = "campaign/Flaky-v0"
WORDS = f"train npg --env {ENV} --num-envs 4 --n-steps 16 --steps 320".split() + list(COMMON)
DISK = 5 * 2**20
FAULT: list[Any] = []
"""What goes wrong, and after how many steps of all environments; a fork has what its parent had."""


def raising(kind: type[BaseException]) -> Callable[..., Any]:
    """Make a fault that raises."""

    def fault(*_: Any) -> Any:
        raise kind(3)

    return fault


def lock_twice(library: ctypes.CDLL) -> None:
    """Wait in C, for ever, for a lock that one holds; no signal ends it."""
    lock = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)


FAULTS: dict[str, Callable[[np.ndarray, float, bool], Any]] = {
    "raises ValueError": raising(ValueError),
    "raises OSError": raising(OSError),
    "raises RuntimeError": raising(RuntimeError),
    "raises KeyError": raising(KeyError),
    "raises its own": raising(type("Broken", (Exception,), {})),
    "raises SystemExit": raising(SystemExit),
    "raises MemoryError": raising(MemoryError),
    "raises RecursionError": raising(RecursionError),
    "observes NaN": lambda s, r, over: (s * np.nan, r, False, over, {}),
    "observes infinity": lambda s, r, over: (s + np.inf, r, False, over, {}),
    "observes another shape": lambda s, r, over: (s[:1], r, False, over, {}),
    "observes None": lambda s, r, over: (None, r, False, over, {}),
    "observes a text": lambda s, r, over: ("x", r, False, over, {}),
    "rewards NaN": lambda s, r, over: (s, np.nan, False, over, {}),
    "rewards infinity": lambda s, r, over: (s, -np.inf, False, over, {}),
    "rewards 1e38": lambda s, r, over: (s, 1e38, False, over, {}),
    "rewards a text": lambda s, r, over: (s, "x", False, over, {}),
    "rewards three": lambda s, r, over: (s, np.ones(3), False, over, {}),
    "gives four values": lambda s, r, over: (s, r, False, {}),
    "gives None": lambda s, r, over: None,
    "gives a list as info": lambda s, r, over: (s, r, False, over, []),
    "hangs": lambda s, r, over: time.sleep(1000),
    "hangs in C": lambda s, r, over: lock_twice(ctypes.CDLL(None)),
    "hangs in C with Python's lock": lambda s, r, over: lock_twice(ctypes.PyDLL(None)),
}
QUIET = {"gives a list as info"}
"""What nobody needs to notice."""
VALID = {"rewards 1e38"}
"""What an evaluation may keep, so that the run is another one."""


class Flaky(gymnasium.Env):
    """A small deterministic task, until something goes wrong."""

    observation_space = spaces.Box(-2, 2, (3,))
    action_space = spaces.Box(-1, 1, (1,))
    made = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        self.age = 0
        return self.state, {}

    def step(self, action: np.ndarray) -> Any:
        Flaky.made += 1
        self.age += 1
        self.state = np.tanh(np.roll(self.state, 1) + 0.5 * action[0]).astype(np.float32)
        reward = -float(np.square(self.state).sum())
        over = self.age >= 20
        if FAULT and Flaky.made > FAULT[1]:
            return FAULTS[FAULT[0]](self.state, reward, over)
        return self.state, reward, False, over, {}


if ENV not in gymnasium.registry:
    gymnasium.register(ENV, Flaky)


def environments(count: int, chance: random.Random, scratch: Path) -> dict[str, Any]:
    """Have environments misbehave, count times in each way, and go on in well-behaved ones."""
    expected, steps = _undisturbed(scratch)
    counts, faults = Counter[str](), []
    for kind in [kind for kind in FAULTS for _ in range(count)]:
        folder = scratch / f"{kind.replace(' ', '-')}-{counts['runs']}"
        FAULT[:] = [kind, chance.randrange(steps)]
        begun = time.monotonic()
        words = [*WORDS, "--run-dir", str(folder), "--step-timeout", "5"]
        code = _run(words, folder)
        FAULT.clear()
        counts["runs"] += 1
        said = folder.with_suffix(".txt").read_text(errors="replace")
        where = f"{kind} after a while: "
        if code is None:
            faults.append(where + "does not end")
        elif code == 0 and kind not in QUIET:
            faults.append(where + "nobody notices")
        elif "Traceback" in said or (code != 0 and "error: " not in said):
            faults.append(where + f"exit {code}, {said[-300:]!r}")
        elif code and "step" not in said.rpartition("error: ")[2]:
            faults.append(where + f"without its step: {said[-300:]!r}")
        else:
            counts["said in words"] += 1
            counts["most seconds"] = max(counts["most seconds"], round(time.monotonic() - begun))
        went_on = _went_on(folder, expected, counts)
        faults += [where + fault for fault in went_on if kind not in VALID]
    return {**counts, "faults": faults}


def disks(count: int, chance: random.Random, scratch: Path) -> dict[str, Any]:
    """Fill a small disk while a run writes to it, which waits or stops, and give it room again."""
    expected, _ = _undisturbed(scratch)
    counts, faults = Counter[str](), []
    with mounted(scratch / "disk") as disk:
        if disk is None:
            return {"not run": "a small disk cannot be mounted here"}
        for number in range(count):
            way, left, folder = ("wait", "stop")[number % 2], chance.randrange(64 * 1024), disk / f"run{number}"
            found = _filled(way, left, folder, scratch / f"disk{number}.txt", counts)
            found += _went_on(folder, expected, counts, scratch / f"disk{number}.txt")
            faults += [f"{way}, {left} bytes left: {fault}" for fault in found]
            shutil.rmtree(folder, ignore_errors=True)
    return {**counts, "faults": faults}


def _filled(way: str, left: int, folder: Path, output: Path, counts: Counter[str]) -> list[str]:
    """Fill the disk of a run when it has a checkpoint, but for so many bytes; give room when it has met that."""
    counts["runs"] += 1
    last, ballast, faults = RunFolder(folder).last, folder.parent / "ballast", []

    def is_full() -> bool:
        return "is full" in output.read_text(errors="replace")

    pid = forked([*WORDS, "--run-dir", str(folder), "--disk-full", way], output)
    code = ended(pid, PATIENCE, last.is_file)
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        file.write(bytes(max(shutil.disk_usage(folder.parent).free - left, 0)))
    code = ended(pid, PATIENCE, is_full, 0.02) if code is None else code
    counts["met a full disk"] += is_full()
    try:
        checkpoint.read_agent(last)
        counts["last checkpoint loads"] += 1
    except checkpoint.CheckpointError as error:
        faults.append(str(error))
    if way == "stop" and is_full():
        code = ended(pid, PATIENCE) if code is None else code
        faults += [] if code == 1 else [f"exit {code} where the run was to stop"]
    ballast.unlink(missing_ok=True)
    if code is None and ended(pid, PATIENCE) is None:
        kill(pid)
        faults.append("does not go on")
    if "Traceback" in (said := output.read_text(errors="replace")):
        faults.append(said[-500:])
    return faults


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[Path | None]:
    """Mount a disk of 5 MB; None where that is not allowed."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def _undisturbed(scratch: Path) -> tuple[Outcome, int]:
    """Train without a fault; gives what came of it, and the steps that its environments made."""
    folder, steps = scratch / "undisturbed", scratch / "steps.txt"
    pid = forked(
        [*WORDS, "--run-dir", str(folder)], folder.with_suffix(".txt"), lambda: steps.write_text(str(Flaky.made))
    )
    assert ended(pid, PATIENCE) == 0, folder.with_suffix(".txt").read_text()
    return Outcome.of(folder), int(steps.read_text())


def _run(words: list[str], folder: Path) -> int | None:
    """Do a command; returns its exit code, None if it had to be killed."""
    pid = forked(words, folder.with_suffix(".txt"))
    code = ended(pid, PATIENCE)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return code


def _went_on(folder: Path, expected: Outcome, counts: Counter[str], output: Path | None = None) -> list[str]:
    """Resume a run until it is finished, or begin it anew if it has no checkpoint, and compare."""
    words = ["resume", str(folder), "--quiet"]
    if not RunFolder(folder).last.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        words = [*WORDS, "--run-dir", str(folder)]
    pid = forked(words, output or folder.with_suffix(".txt"))
    code = ended(pid, PATIENCE)
    if code != 0:
        if code is None:
            kill(pid)
        return [
            f"resume ends with {code}: {(output or folder.with_suffix('.txt')).read_text(errors='replace')[-300:]!r}"
        ]
    differences = Outcome.of(folder).differences(expected)
    counts["ended with the same files"] += not differences
    return [f"{', '.join(differences)} differ after it"] if differences else []
