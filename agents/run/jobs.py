"""Several runs: a process for each, on cores of its own, one table of them all, and what became of them."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Annotated

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tyro.conf import arg

from agents.run import process
from agents.run.errors import UsageError
from agents.run.evaluation import bootstrap_interval
from agents.run.folder import RunFolder, RunState, made, new_path
from agents.run.options import RunOptions, check_least
from agents.run.process import typed
from agents.run.progress import clock, figure
from agents.run.signals import StopRequest, stdout_console
from envs.cores import usable_cores

POLL_SECONDS = 0.5
PATIENCE = 60.0
"""Seconds that runs have to end in when they are told to stop at once."""
STYLES = {"running": "green", "finished": "bold", "failed": "red", "waiting": "dim", "stopped": "yellow"}


@dataclass(frozen=True)
class Several:
    """How many runs, and how many of them at once."""

    seeds: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Train so many runs, with the seeds from --seed on, each in a process and on cores of its own."""
    jobs: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: one per core)")] = None
    """Runs at once; each has its share of the cores."""

    def check(self) -> None:
        """Raise UsageError for a value that is not possible."""
        check_least(self, {"seeds": 1, "jobs": 1})


@dataclass
class Job:
    """One of several runs."""

    label: str
    words: list[str]
    """The command, as `cli.main` takes it."""
    folder: RunFolder
    """Of a new run it is made, under this name or a like one, when the run begins."""
    new: bool = False
    state: str = "waiting"
    process: BaseProcess | None = None
    cores: list[int] = field(default_factory=list)
    error: str = ""

    def where(self) -> RunState | None:
        """Read how far it is."""
        return self.folder.read_state()


def train_seeds(
    algorithm: str, run: RunOptions, several: Several, arguments: Sequence[str], again: Callable[[int, int], str]
) -> int:
    """Train several seeds; returns the exit code.

    Args:
        arguments: what was typed after the algorithm's name, without seeds, jobs and the runs' own options.
        again: says how one types the training of so many seeds from one on.

    Raises:
        UsageError: an option is not possible.
    """
    run.check()
    several.check()
    assert several.seeds is not None
    if run.run_dir is not None:
        raise UsageError("--run-dir is the folder of one run; with --seeds give --runs and --name.")
    jobs = [
        Job(f"seed {seed}", ["train", algorithm, *arguments, "--seed", str(seed)], RunFolder(path), new=True)
        for seed, path in ((seed, new_path(algorithm, run, seed)) for seed in range(run.seed, run.seed + several.seeds))
    ]
    code = work_off(jobs, several.jobs, f"{algorithm} on {run.env}", run.quiet)
    left = [job for job in jobs if job.state == "waiting"]
    if left:
        first = run.seed + several.seeds - len(left)
        print(f"Not begun: {', '.join(job.label for job in left)}. Begin so:\n  {again(first, len(left))}")
    return code


def work_off(jobs: list[Job], at_once: int | None, title: str, quiet: bool) -> int:
    """Run jobs, so many at once, show them, and say what became of them; returns the exit code.

    The first SIGINT or SIGTERM has all that run save themselves and begins none, the second one stops at once. One that
    fails does not end the others, except that one which was refused as it was typed keeps those after it from
    beginning.
    """
    stop = StopRequest()
    console = stdout_console(stop)
    slots = _slots(min(at_once or usable_cores(), len(jobs)))
    begun = time.monotonic()
    told = refused = False

    def table() -> Group:
        asked = "; all are saving themselves, Ctrl-C again stops at once" if stop.signal else ""
        return Group(_table(jobs, title), Text(_summary(jobs, time.monotonic() - begun) + asked, style="dim"))

    is_live = console.is_terminal and not quiet
    with stop:
        live = Live(get_renderable=table, console=console, refresh_per_second=2, transient=True)
        if is_live:
            live.start()
        try:
            while True:
                running = [job for job in jobs if job.state == "running"]
                for job in [job for job in jobs if job.state == "waiting"][: len(slots)]:
                    if stop.signal is None and not refused:
                        _begin(job, slots.pop())
                        running.append(job)
                if not running:
                    break
                if stop.signal is not None and not told:
                    _tell(running)
                    told = True
                wait([job.process.sentinel for job in running if job.process], timeout=POLL_SECONDS)
                for job in running:
                    if job.process is not None and job.process.exitcode is not None:
                        slots.append(job.cores)
                        refused |= _end(job, job.process.exitcode)
                        if not is_live and not quiet:
                            console.print(_line(job), soft_wrap=True)
        except KeyboardInterrupt:
            _tell([job for job in jobs if job.state == "running"])
            _wait_for(jobs)
            raise
        finally:
            if is_live:
                live.stop()
    _print_end(console, jobs, title, time.monotonic() - begun)
    return stop.exit_code or int(any(job.state == "failed" for job in jobs)) * (2 if refused else 1)


def _slots(count: int) -> list[list[int]]:
    """Share out the cores: count sets of them, which overlap only where there are fewer cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    n = len(cores)
    if n < count:
        return [cores[k % n : k % n + 1] if n else [] for k in range(count)]
    return [cores[k * n // count : (k + 1) * n // count] for k in range(count)]


def _begin(job: Job, cores: list[int]) -> None:
    words = job.words
    if job.new:
        job.folder = RunFolder(made(job.folder.path, only=False))
        words = [*words, "--run-dir", str(job.folder.path)]
    output = str(job.folder.output)
    context = multiprocessing.get_context("spawn")  # a process of its own, as one that is typed
    job.process = context.Process(target=process.work, args=(words, output, cores), name=job.label)
    job.process.start()
    job.state, job.cores = "running", cores


def _end(job: Job, code: int) -> bool:
    """Note what became of a job; True if it was refused as it was typed."""
    where, words = job.where(), job.folder.output.read_text(errors="replace").strip().splitlines()
    job.state = {0: "finished", **dict.fromkeys((129, 130, 143, -signal.SIGTERM), "stopped")}.get(code, "failed")
    if job.state == "failed":
        job.error = (where.error if where is not None else "") or (words[-1] if words else f"it ended with {code}")
    if not job.folder.config.exists() and (job.state == "stopped" or code == 2):
        job.folder.output.unlink()
        job.folder.path.rmdir()
        job.state = "waiting" if job.state == "stopped" else job.state
    return code == 2


def _tell(jobs: Sequence[Job]) -> None:
    """Have jobs save themselves and end; those that were told before end at once."""
    for job in jobs:
        if job.process is not None and job.process.is_alive():
            job.process.terminate()


def _wait_for(jobs: Sequence[Job]) -> None:
    deadline = time.monotonic() + PATIENCE
    for job in jobs:
        if job.process is not None:
            job.process.join(max(0.0, deadline - time.monotonic()))
            if job.process.is_alive():
                job.process.kill()


def _table(jobs: Sequence[Job], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("run", header_style="dim")
    table.add_column("state", header_style="dim")
    for heading in ("done", "steps", "return", "evaluated", "time"):
        table.add_column(heading, justify="right", header_style="dim")
    for job in jobs:
        where = job.where()
        cells = ["", "", "", "", ""]
        if where is not None:
            returns = (figure(value, ",.1f") for value in (where.training, where.evaluated))
            cells = [f"{100 * where.share:.0f} %", f"{where.steps:,}", *returns, clock(where.seconds)]
        table.add_row(job.label, Text(job.state, style=STYLES[job.state]), *cells)
    return table


def _summary(jobs: Sequence[Job], elapsed: float) -> str:
    """Say how many runs there are, and how long the rest will take at the pace so far."""
    states = [job.state for job in jobs]
    counts = [f"{states.count(state)} {state}" for state in STYLES if state in states]
    done = sum(where.share for job in jobs if (where := job.where()) is not None)
    left = f", {clock(elapsed * (len(jobs) - done) / done)} left" if done and "running" in states else ""
    return f"{', '.join(counts)}; {clock(elapsed)}{left}"


def _line(job: Job) -> str:
    where = job.where()
    if job.state == "failed" or where is None:
        return f"{job.label} {job.state}{f': {job.error}' if job.error else ''}"
    evaluated = figure(where.evaluated, ",.1f")
    return f"{job.label} {job.state} after {where.steps:,} steps, {clock(where.seconds)}, evaluated {evaluated}"


def _print_end(console: Console, jobs: Sequence[Job], title: str, elapsed: float) -> None:
    def show(text: str = "") -> None:
        console.print(text, soft_wrap=True)

    console.print(_table(jobs, title))
    show(_summary(jobs, elapsed))
    finished = [job for job in jobs if job.state == "finished"]
    values = [where.evaluated for job in finished if (where := job.where()) is not None and where.evaluated is not None]
    if len(values) > 1:
        import numpy as np

        low, high = bootstrap_interval(np.array(values))
        mean = f"{np.mean(values):,.1f}, 95 % interval {low:,.1f} to {high:,.1f}"
        show(f"mean return of {len(values)} final policies: {mean}")
    if finished:
        alike = os.path.commonprefix([str(job.folder.path) for job in finished])  # noqa: RUF071, of names
        show(f"folders: {alike}*")
    for job in jobs:
        if job.state == "failed":
            kept = f" (all that it said: {job.folder.output})" if job.folder.output.is_file() else ""
            show(f"{job.label} failed: {job.error}{kept}")
    stopped = [job.folder for job in jobs if job.state == "stopped"]
    if stopped:
        consent = max(folder.read_config().run.consent for folder in stopped)
        show("Stopped runs are saved. Go on:")
        show(f"  {typed('resume')} {' '.join(shlex.quote(str(folder.path)) for folder in stopped)}{consent}")
