"""Commands that must refuse what they are given: run in a process that is watched, one after the other."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from agents.run import cli, evaluation
from agents.run import help as options
from tests.campaign.kills import ended, kill

CANARY = Path("/tmp/campaign-canary")
"""What the code in files would make."""
MEMORY = 200 * 2**20
SECONDS = 20.0
"""Of the processor; by the clock a process hangs after thirty times as many."""
BATCH = 200
"""Cases of one process."""
Prepared = tuple[list[str], Callable[[], bool]]


@dataclass
class Case:
    """Something that a command must refuse.

    Args:
        name: what it is.
        seed: of what is drawn for it.
        prepare: gives the words to type, and a function that says whether to be accepted is right.
    """

    name: str
    seed: int
    prepare: Callable[[Case], Prepared]


@dataclass
class Seen:
    """What a command did."""

    verdict: str
    """refused, accepted, or the kind of fault."""
    words: str = ""
    megabytes: float = 0.0
    """At most, above what the process had before."""
    seconds: float = 0.0


@dataclass
class Tally:
    """What all cases came to."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Kind of fault, with the place of a traceback -> the first cases."""
    accepted: dict[str, list[str]] = field(default_factory=dict)
    """Of cases that were possible after all, what the commands said."""
    megabytes: float = 0.0
    seconds: float = 0.0

    def add(self, case: Case, seen: Seen) -> None:
        """Count one."""
        self.counts["cases"] += 1
        self.counts[seen.verdict if seen.verdict.startswith("accepted") else seen.verdict.partition(":")[0]] += 1
        self.megabytes, self.seconds = max(self.megabytes, seen.megabytes), max(self.seconds, seen.seconds)
        if seen.verdict == "accepted":
            self.accepted.setdefault(case.name, []).append(f"{case.seed} {seen.words[-60:]!r}")
        elif not seen.verdict.startswith(("accepted", "refused")):
            shown = self.faults.setdefault(seen.verdict, [])
            if len(shown) < 3:
                shown.append(f"{case.name}, seed {case.seed}: {seen.words[:400]}")

    def record(self) -> dict[str, Any]:
        """Give the figures as JSON values."""
        return {
            **self.counts,
            "most megabytes above the start": round(self.megabytes, 1),
            "most seconds": round(self.seconds, 1),
            "faults": self.faults,
        }


def run_all(cases: Sequence[Case], scratch: Path, keep: Callable[[Tally], None]) -> Tally:
    """Run cases, in processes of `BATCH` each; one that dies or hangs is a fault of the case that it was at.

    Args:
        keep: is given what came of those so far after each process.
    """
    evaluation.LONGEST = 1000  # where a file's own horizon is of 10^12 steps
    options.declared = cache(options.declared)  # reads sources, which takes a third of a command's time
    tally, done, report = Tally(), 0, scratch / "seen.jsonl"
    while done < len(cases):
        report.write_text("")
        batch = cases[done : done + BATCH]
        pid = os.fork()
        if not pid:
            _work(batch, report)
        code, rows, at = None, 0, time.monotonic()
        while code is None:
            code = ended(pid, 0.2)
            now = report.read_text().count("\n")
            rows, at = (now, time.monotonic()) if now > rows else (rows, at)
            if code is None and time.monotonic() - at > 30 * SECONDS:
                kill(pid)
                code = 99
        found = [Seen(**json.loads(row)) for row in report.read_text().splitlines()]
        if code != 0:
            found.append(Seen("hangs" if code == 99 else f"the process ends: {code}"))
        for case, seen in zip(batch, found, strict=False):
            tally.add(case, seen)
        done += len(found)
        print(f"{time.strftime('%H:%M:%S')} {done} of {len(cases)} {dict(tally.counts)}", flush=True)
        keep(tally)
    return tally


def _work(cases: Sequence[Case], report: Path) -> None:
    """Be the process that runs cases."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(report.parent)  # where what is made in spite of all lies
        with report.open("a") as file:
            for case in cases:
                words, as_good = case.prepare(case)
                file.write(json.dumps(vars(watched(words, as_good))) + "\n")
                file.flush()
        os._exit(0)
    except BaseException:
        report.with_suffix(".err").write_text(traceback.format_exc())
        os._exit(98)


def watched(words: list[str], as_good: Callable[[], bool]) -> Seen:
    """Do what a command does with words, and look at what it says, what it takes and what it leaves."""
    out, err = io.StringIO(), io.StringIO()
    CANARY.unlink(missing_ok=True)
    before, begun = _resident(), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    verdict, parsed = "", True
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            code = cli.main(words)
        except SystemExit as done:
            code, parsed = (done.code if isinstance(done.code, int) else 1), False
        except BaseException as error:
            code, place = 1, traceback.extract_tb(error.__traceback__)
            own = next((x for x in reversed(place) if "/agents/" in x.filename or "/envs/" in x.filename), place[-1])
            err.write(f"{type(error).__name__}: {str(error)[:300]}")
            verdict = f"traceback: {type(error).__name__} in {Path(own.filename).name}, {own.name}"
    took, more = time.process_time() - begun, (_peak() - before) / 2**20
    said = err.getvalue().strip()
    if CANARY.exists() or "planted" in sys.modules:
        verdict = "runs code"
    elif more > MEMORY / 2**20:
        verdict = f"memory: {words[0]}"
    elif took > SECONDS:
        verdict = f"slow: {words[0]}"
    elif not verdict and code == 0:
        verdict = "accepted, since it is as good as before" if as_good() else "accepted"
    elif not verdict:
        verdict = "refused" if _is_a_sentence(said, code, parsed) else "unclear"
    return Seen(verdict, said or out.getvalue()[-300:], round(more, 1), round(took, 2))


def _is_a_sentence(said: str, code: int, parsed: bool) -> bool:
    """Say whether an error is one sentence; options that do not parse are named in a frame, by tyro."""
    if code == 2 and not parsed:
        return "Traceback" not in said and bool(re.match(r"\W*[A-Z][a-z]+ [a-z]+", said))
    lines = [line for line in said.splitlines() if not line.startswith("The last saved state")]
    return len(lines) == 1 and bool(re.search(r"error: \S.{15,}[.?)]$", lines[0])) and len(lines[0]) < 1500


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024
