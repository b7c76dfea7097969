"""Runs that are killed: SIGKILL at random instants, resumed until they are finished, and then compared to the bit.

The parent has imported everything and never computes; each process of a run is a fork of it that does what train.py
does. So one kill costs a fraction of a second, where a new Python takes seconds to import PyTorch.
"""

from __future__ import annotations

import csv
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from agents import checkpoint
from agents.run import cli
from agents.run.folder import RunFolder
from agents.run.selftest import digest_of

COMMON = (
    *("--net-arch", "8", "--checkpoint-every", "0", "--eval-episodes", "2", "--eval-every", "100"),
    *("--threads", "1", "--device", "cpu", "--seed", "3", "--quiet"),
)
POINT = "--env families/Point-v0 --env-kwargs horizon=10 --n-steps 10 --num-envs 8 --meta-batch-size 2 --steps 480"
CASES: dict[str, str] = {
    "npg, Hopper": "npg --env Hopper-v5 --num-envs 4 --n-steps 6 --reused-rollouts 3 --steps 360 --preset {nothing}",
    "npg, CartPole": "npg --env CartPole-v1 --num-envs 4 --n-steps 16 --reused-rollouts 0 --steps 320",
    "trpo, Hopper": "trpo --env Hopper-v5 --num-envs 4 --n-steps 16 --reused-rollouts 3 --reuse-until None --steps 320 "
    "--critic gauss_newton",
    "copos, Hopper": "copos --env Hopper-v5 --num-envs 4 --n-steps 16 --steps 320",
    "ppo, Hopper": "ppo --env Hopper-v5 --num-envs 4 --n-steps 16 --batch-size 32 --steps 320",
    "ppo, CartPole": "ppo --env CartPole-v1 --num-envs 4 --n-steps 16 --batch-size 32 --steps 320 --handover 100",
    "pes, InvertedPendulum": "pes --env InvertedPendulum-v5 --num-envs 8 --n-steps 10 --steps 480 --preset {nothing}",
    "pes es with trials, InvertedPendulum": "pes --env InvertedPendulum-v5 --num-envs 4 --estimator es --n-steps 1000 "
    "--trials 2 --trial-steps 60 --steps 480 --whitening-memory 100 --reward-scaling log_ranks --preset {nothing}",
    "reptile, Point": f"reptile {POINT} --anneal",
    "fomaml, Point": f"fomaml {POINT} --inner-steps 2",
    "maml, Point": f"maml {POINT}",
}
"""What is typed after `train`; every registered algorithm, on batched MuJoCo and on environments of Gymnasium's."""
IN_A_WRITE = 0.4
"""Share of the kills that wait for a checkpoint that is being written."""
KILLS_OF_A_RUN = 16
"""At most; then the run is left to finish."""
PATIENCE = 120.0
"""Seconds after which a process that does not end is a fault."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run left, but for what the clock decides."""

    digest: str
    """SHA-256 over all tensors of last.zip."""
    best: str
    """That of best.zip."""
    counters: dict[str, Any]
    progress: list[dict[str, str]]
    evaluations: list[dict[str, str]]
    events: dict[str, list[str]]
    """TensorBoard's curves."""

    @classmethod
    def of(cls, path: Path) -> Outcome:
        """Read a run's folder."""
        folder = RunFolder(path)
        manifest, _ = checkpoint.read_agent(folder.last)
        timed = {"versions", "sha256", "metrics", "env_kwargs"}
        counters = {name: x for name, x in manifest.items() if name not in timed}
        counters["episode_infos"] = [{name: episode[name] for name in "rl"} for episode in counters["episode_infos"]]
        rows = (timeless(folder.progress), timeless(folder.evaluations))
        return cls(digest_of(folder.last), digest_of(folder.best), counters, *rows, curves(path))

    def differences(self, other: Outcome) -> list[str]:
        """Name what is not the same."""
        return [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(other, name)]


def timeless(file: Path) -> list[dict[str, str]]:
    """Read a CSV file without the columns that hold wall-clock times."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    timed = [name for name in (rows or [{}])[0] if "seconds" in name or name in ("time/fps", "time/time_elapsed")]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def curves(path: Path) -> dict[str, list[str]]:
    """Read TensorBoard's curves as it shows them, without those of wall-clock times."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it says what it does not show, as it should not
    shown = EventAccumulator(str(path), {SCALARS: 0}).Reload()
    tags = [tag for tag in shown.Tags()[SCALARS] if not tag.startswith("time/")]
    return {tag: [f"{event.step}: {event.value}" for event in shown.Scalars(tag)] for tag in tags}


def warm_up(words: Iterable[list[str]], scratch: Path) -> None:
    """Import here what commands import when they run in a fork, so that later forks have it."""
    for number, command in enumerate(words):
        listed = scratch / f"modules{number}.txt"
        os.waitpid(forked(command, scratch / "warm.txt", noting_modules(listed)), 0)
        import_as(listed)


def noting_modules(listed: Path) -> Callable[[], object]:
    """Give what a process does at its end so that others have its modules."""
    return lambda: listed.write_text("\n".join(sys.modules))


def import_as(listed: Path) -> None:
    """Import what another process had."""
    for name in listed.read_text().split():
        if name not in sys.modules and not name.startswith(("__", "tests")):
            try:
                __import__(name)
            except Exception:  # some modules are made, not imported
                continue
    checkpoint.versions()  # is kept
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"the parent has {len(threads)} threads, which forks would lack"


def forked(words: list[str], output: Path, at_end: Callable[[], object] = lambda: None) -> int:
    """Do in a new process what train.py does with words; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = cli.train(words)
        at_end()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float, until: Callable[[], bool] = lambda: False, pause: float = 0.0002) -> int | None:
    """Wait so long for a process, or until something is so; returns its exit code, None if it still runs."""
    most = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        left = most - time.monotonic()
        if left <= 0 or until():
            return None
        time.sleep(min(pause, left))


def cpu_seconds(pid: int) -> float:
    """Give the processor time that a process has had, whose own clock goes on however busy the machine is."""
    return time.clock_gettime((~pid << 3) | 2)  # <linux/posix-timers.h>: CPUCLOCK_SCHED


def kill(pid: int) -> int | None:
    """Kill a process; returns its exit code if it had ended before."""
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == -signal.SIGKILL else code


class Loop:
    """Kills runs of one case, and counts.

    Args:
        name: of `CASES`.
        scratch: a folder for runs; those that end otherwise than the undisturbed one stay in it.
    """

    def __init__(self, name: str, scratch: Path, chance: random.Random) -> None:
        nothing = scratch / "nothing.yaml"
        env_id = CASES[name].split()[2]
        nothing.write_text(f"{env_id}: {{}}\n")
        self.words = ["train", *CASES[name].format(nothing=nothing).split(), *COMMON]
        self.name, self.scratch, self.chance = name, scratch, chance
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.said = 0
        self.seconds = 0.0
        """Of processor time that an undisturbed run takes."""
        self.writes = 0
        self.number = 0
        self.expected = self._undisturbed()

    def _start(self, words: list[str], folder: Path, at_end: Callable[[], object] = lambda: None) -> int:
        return forked(words, folder.with_suffix(".txt"), at_end)

    def _undisturbed(self) -> Outcome:
        folder, before = self.scratch / "undisturbed", _children()
        listed, writing = folder.with_name("modules.txt"), Writing(folder)
        pid = self._start([*self.words, "--run-dir", str(folder)], folder, noting_modules(listed))
        code = ended(pid, PATIENCE, lambda: writing.number() < 0)
        assert code == 0, f"{self.name}: {code}\n{folder.with_suffix('.txt').read_text()[-2000:]}"
        self.seconds, self.writes = _children() - before, max(writing.count, 1)
        import_as(listed)
        return Outcome.of(folder)

    def trial(self) -> None:
        """Start a run, kill and resume it until it is finished, and compare what it left."""
        self.number += 1
        folder = self.scratch / f"run{self.number}"
        anew = [*self.words, "--run-dir", str(folder)]
        words, kills = anew, 0
        while True:
            before = unfinished(folder / "checkpoints")
            pid = self._start(words, folder)
            code = (
                self._killed(pid, folder, self._remaining(folder)) if kills < KILLS_OF_A_RUN else ended(pid, PATIENCE)
            )
            if code is None and kills < KILLS_OF_A_RUN:
                kills += 1
                self.counts["kills"] += 1
                left = unfinished(folder / "checkpoints")
                self.counts["kills in the writing of a checkpoint"] += bool(left - before)
                words = ["resume", str(folder), "--quiet"]
            elif code == 0:
                break
            elif code == 1 and words is not anew and not RunFolder(folder).last.exists():
                self.counts["began anew, with no checkpoint yet"] += 1  # resume has said so
                shutil.rmtree(folder, ignore_errors=True)
                words = anew
            else:
                if code is None:
                    kill(pid)
                return self._fault(folder, f"exit {code}")
        self.counts["finished"] += 1
        found = Outcome.of(folder)
        self.counts["ended with the same tensors"] += found.digest == self.expected.digest
        differences = found.differences(self.expected)
        state = RunFolder(folder).read_state()
        if state is None or state.state != "finished":
            differences.append("state.json")
        if not RunFolder(folder).curve.is_file():
            differences.append("curve.png")
        if differences:
            return self._fault(folder, f"{', '.join(differences)} differ after {kills} kills")
        self.counts["ended with the same files"] += 1
        shutil.rmtree(folder)
        folder.with_suffix(".txt").unlink()

    def _remaining(self, folder: Path) -> float:
        """Give the share of a run that a process has before it, of which its start and its end are a part."""
        last = RunFolder(folder).last
        done = checkpoint.read_manifest(last)["num_timesteps"] if last.is_file() else 0
        return 1 - 0.7 * done / self.expected.counters["num_timesteps"]

    def _killed(self, pid: int, folder: Path, share: float) -> int | None:
        """Kill a run's process; returns its exit code if it ended before that."""
        if self.chance.random() >= IN_A_WRITE:
            instant = self.chance.uniform(0, share * self.seconds)
            code = ended(pid, PATIENCE, lambda: cpu_seconds(pid) >= instant, 0.001)
            return kill(pid) if code is None else code
        which, writing = self.chance.randint(1, max(int(share * self.writes), 1)), Writing(folder)
        code = ended(pid, PATIENCE, lambda: writing.number() == which)
        if code is None:
            code = ended(pid, self.chance.uniform(0, 0.004))
        return kill(pid) if code is None else code

    def _fault(self, folder: Path, words: str) -> None:
        output = folder.with_suffix(".txt")
        said = output.read_text().splitlines()[-1:] if output.is_file() else []
        self.faults.append(f"{self.name}: {folder.name}: {words}; {' '.join(said)}")


def _children() -> float:
    """Give the processor time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Writing:
    """Counts the checkpoints that are begun in a run's folder while one looks on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self._amid = folder / "checkpoints", 0, False
        self.before = unfinished(self.folder)

    def number(self) -> int:
        """Give the number of the checkpoint that is being written now; 0 between two."""
        amid = bool(unfinished(self.folder) - self.before)
        self.count += amid and not self._amid
        self._amid = amid
        return self.count if amid else 0


def unfinished(folder: Path) -> set[str]:
    """Name the checkpoints in a folder that have been begun and not finished."""
    try:
        return {name for name in os.listdir(folder) if name.endswith(".tmp") and ".zip." in name}
    except OSError:
        return set()
