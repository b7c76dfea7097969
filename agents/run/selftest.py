"""A test on the user's own machine: short runs that are killed and resumed end as undisturbed ones do, to the bit."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from agents import REGISTRY, checkpoint
from agents.checkpoint import StrPath
from agents.config import near
from agents.run import process
from agents.run.errors import RunError, UsageError
from agents.run.folder import RunFolder, read_rows
from agents.run.log import STEPS
from agents.run.options import Flag, check_device, check_least

STEPS_OF_A_RUN = 32_768
PATIENCE = 300.0
"""Seconds that a process has to end in."""
KILLED_AFTER = (0.3, 0.7)
"""Share of the steps."""


@dataclass(frozen=True)
class Selftest:
    """Train short runs, kill them in their midst, resume them, and compare them with undisturbed ones."""

    algorithms: Positional[Annotated[tuple[str, ...], arg(metavar="ALGORITHM")]] = ("npg", "ppo", "pes")
    """Which, one after the other."""
    env: Annotated[str, arg(metavar="ID")] = "Hopper-v5"
    """Environment to train in."""
    steps: int = STEPS_OF_A_RUN
    """Environment steps of a run."""
    device: str = "auto"
    """Where networks live: auto, cpu, cuda or cuda:1; auto takes the GPU if there is one."""
    threads: int = 1
    """Threads of PyTorch on the CPU for the updates."""
    keep: Flag = False
    """Keep the folders of the runs, and say where they are."""
    debug: Flag = False
    """Show the traceback of an error."""

    def check(self) -> None:
        """Raise UsageError for a value that is not possible."""
        check_least(self, {"steps": 1, "threads": 1})
        check_device(self.device)
        for name in self.algorithms:
            if name not in REGISTRY:
                raise UsageError(f"There is no algorithm {name!r}{near(name, REGISTRY)}")


@dataclass(frozen=True)
class Trial:
    """How a run ended that was killed, and the one that was not."""

    killed_at: int
    """Environment steps of the checkpoint that it went on from."""
    undisturbed: str
    """SHA-256 over all tensors of the last checkpoint."""
    resumed: str
    same_rows: bool
    """Whether progress.csv has the same rows, none lost or twice."""

    @property
    def same(self) -> bool:
        """Say whether they ended alike."""
        return self.undisturbed == self.resumed and self.same_rows


def selftest(asked: Selftest, command: str) -> int:
    """Test as asked and show what came of it; returns the exit code, 1 after a difference.

    Raises:
        UsageError: an option is not possible.
        RunError: a run does not end as it should; its folder stays.
    """
    asked.check()
    console, begun = Console(highlight=False, markup=False), time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="geodesic-rl-selftest-"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading, side in (("algorithm", "left"), ("steps", "right"), ("killed after", "right")):
        table.add_column(heading, justify="right" if side == "right" else "left")
    for heading in ("undisturbed", "resumed", ""):
        table.add_column(heading)
    trials = {}
    with console.status("") as status:
        for name in asked.algorithms:
            status.update(f"{name}: trains, is killed and goes on")
            trials[name] = trial = tried(asked, name, scratch / name)
            digests = (trial.undisturbed[:16], trial.resumed[:16])
            verdict = "the same" if trial.same else "not the same" if digests[0] != digests[1] else "rows differ"
            table.add_row(name, f"{asked.steps:,}", f"{trial.killed_at:,}", *digests, verdict)
    console.print(table)
    console.print("SHA-256 over all tensors of the last checkpoints, the first 16 digits", style="dim")
    odd = [name for name, trial in trials.items() if not trial.same]
    took = f"{time.monotonic() - begun:.0f} s"
    if odd:
        console.print(
            f"{', '.join(odd)} did not end as undisturbed ({took}). The folders stay in {scratch}: please report them "
            f"with what versions.json there says.",
            soft_wrap=True,
        )
        return 1
    if asked.keep:
        console.print(f"folders: {scratch}", soft_wrap=True)
    else:
        shutil.rmtree(scratch)
    console.print(f"Killed runs go on exactly on this machine ({took}).")
    return 0


def tried(asked: Selftest, name: str, scratch: Path) -> Trial:
    """Train twice, once with a kill; the folders are in scratch."""
    scratch.mkdir()
    options = f"--env {asked.env} --steps {asked.steps} --device {asked.device} --threads {asked.threads}".split()
    options += ["--checkpoint-every", "0", "--eval-every", str(asked.steps), "--eval-episodes", "1", "--quiet"]
    folders = [RunFolder(scratch / kind) for kind in ("undisturbed", "killed")]
    for folder in folders:
        words = ["train", name, *options, "--run-dir", str(folder.path)]
        working = begin(words, scratch / f"{folder.path.name}.txt")
        try:
            if folder is folders[0]:
                end(working, scratch / "undisturbed.txt")
            else:
                kill(working, folder, random.uniform(*KILLED_AFTER) * asked.steps, scratch / "killed.txt")
        finally:
            working.kill()
            working.join()
    undisturbed, killed = folders
    killed_at = steps_of(killed)
    resumed = begin(["resume", str(killed.path), "--quiet"], scratch / "killed.txt")
    end(resumed, scratch / "killed.txt")
    rows = [[row[STEPS] for row in read_rows(folder.progress)] for folder in folders]
    return Trial(killed_at, digest_of(undisturbed.last), digest_of(killed.last), rows[0] == rows[1])


def begin(words: list[str], output: Path) -> BaseProcess:
    """Start a process that does a command, as one that is typed."""
    context = multiprocessing.get_context("spawn")
    working = context.Process(target=process.work, args=(words, str(output), []))
    working.start()
    return working


def end(working: BaseProcess, output: Path) -> None:
    """Wait for a process to end; RunError if it ends otherwise than well."""
    working.join(PATIENCE)
    code, said = working.exitcode, output.read_text(errors="replace").strip().splitlines()[-1:]
    if code != 0:
        working.kill()
        raise RunError(f"A run ended with {code} ({' '.join(said)}); all that it said is in {output}.")


def kill(working: BaseProcess, folder: RunFolder, steps: float, output: Path) -> None:
    """Kill a process some moments after its run has a checkpoint of so many steps."""
    while working.is_alive() and steps_of(folder) < steps:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.05))
    working.kill()
    working.join()
    if working.exitcode != -signal.SIGKILL:
        end(working, output)
        raise RunError(f"The run ended before it could be killed; give more --steps than {steps_of(folder):,}.")


def steps_of(folder: RunFolder) -> int:
    """Give the environment steps of a run's last checkpoint; 0 if there is none yet."""
    return int(checkpoint.read_manifest(folder.last)["num_timesteps"]) if folder.last.is_file() else 0


def digest_of(file: StrPath) -> str:
    """Give the SHA-256 over all tensors of a checkpoint and their names."""
    manifest, _ = checkpoint.read(file)
    return hashlib.sha256(json.dumps(manifest["sha256"], sort_keys=True).encode()).hexdigest()
