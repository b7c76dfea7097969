"""The process beside a run that has a --step-timeout: it ends the run where nothing in it can.

Code of C that does not come back and holds Python's lock stops every thread of its process. This one is told each
second what the run is doing, and where it hears nothing for too long it says so and kills it. It is started by its
path, with nothing but the standard library: python -I -S lifeline.py SECONDS.
"""

import os
import select
import signal
import sys
from pathlib import Path

TICK = 0.1


def is_stopped(process: int) -> bool:
    """Say whether a process is stopped from outside, as by Ctrl-Z."""
    file = Path(f"/proc/{process}/stat")
    return file.is_file() and file.read_text().rpartition(")")[2].split()[0] in "Tt"


def watch(run: int, seconds: float) -> None:
    """Listen to a run until it ends, or says nothing for so long."""
    silent, doing = 0.0, ""
    while silent < seconds:
        if select.select([0], [], [], TICK)[0]:
            said = os.read(0, 2**16)
            if not said:
                return
            silent, doing = 0.0, said.decode(errors="replace").splitlines()[-1]
        elif os.getppid() != run:
            return
        elif not is_stopped(run):
            silent += TICK
    where = f"{doing}, or a step soon after it," if doing else "a step of an environment"
    print(
        f"error: {where} has not come back, and has let nothing else in the run go on for {seconds:g} seconds: the run "
        "is killed, and its last checkpoint stays. Mend the environment, or give a longer --step-timeout.",
        file=sys.stderr,
        flush=True,
    )
    os.kill(run, signal.SIGKILL)


if __name__ == "__main__":
    watch(os.getppid(), float(sys.argv[1]))
