import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents.run import watchdog
from agents.run.folder import RunFolder
from agents.run.selftest import digest_of
from agents.run.watchdog import Watchdog
from tests.campaign.faults import lock_twice

STUCK = "environment 1 of Stuck-v0, in step 3 of episode 0"


def left(library: type[ctypes.CDLL], output: Path) -> int:
    """Have a process of its own be stuck in code of C, and a watchdog end it; returns its exit code."""
    pid = os.fork()
    if not pid:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        signal.alarm(20)  # kills it, if nothing else does
        with Watchdog(0.3, lambda: STUCK, lambda sentence: output.with_suffix(".saved").touch()):
            time.sleep(0.2)  # it has been told what runs
            lock_twice(library(None))
        os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE", 0.3)


def test_code_of_c_that_does_not_come_back_is_left_and_saved(tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert left(ctypes.CDLL, output) == 1
    assert f"error: {STUCK}, has not come back for 0.3 seconds; the run has stopped." in output.read_text()
    assert output.with_suffix(".saved").exists()


def test_code_of_c_that_lets_no_thread_go_on_is_killed_in_words(tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert left(ctypes.PyDLL, output) == -signal.SIGKILL  # it holds Python's lock
    assert f"error: {STUCK}, or a step soon after it, has not come back, and has let nothing" in output.read_text()
    assert not output.with_suffix(".saved").exists()


def test_what_is_stopped_as_by_ctrl_z_is_not_hung() -> None:
    begun = time.monotonic()
    pid = os.fork()
    if not pid:
        try:
            with Watchdog(2.0, lambda: STUCK if time.monotonic() - begun < 3.5 else None, lambda sentence: None):
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(1.0)
            os._exit(0)
        except BaseException:
            os._exit(70)
    os.waitpid(pid, os.WUNTRACED)
    time.sleep(3.0)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


PROGRAM = """
import ctypes, sys
import gymnasium, numpy as np
from gymnasium import spaces
from agents.run import cli, watchdog
from tests.campaign.faults import lock_twice

watchdog.GRACE = 2.0

class Stuck(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Box(-1, 1, (1,))
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.age += 1
        Stuck.steps += 1
        if Stuck.steps == int(sys.argv[2]):
            lock_twice(getattr(ctypes, sys.argv[3])(None))
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), float(action[0]), False, self.age == 5, {}

gymnasium.register("Stuck-v0", Stuck)
sizes = "--num-envs 2 --n-steps 8 --net-arch 4 --eval-episodes 2 --checkpoint-every 0 --steps 96 --threads 1"
words = ["npg", "--env", "Stuck-v0", *sizes.split(), "--run-dir", sys.argv[1], "--step-timeout", "2"]
sys.exit(cli.train(["resume", sys.argv[1]] if sys.argv[2] == "0" else words))
"""


@pytest.mark.slow
def test_a_run_stuck_in_code_of_c_is_ended_and_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def run(path: Path, stuck_at: int, library: str = "") -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", PROGRAM, path, stuck_at, library]
        return subprocess.run(list(map(str, words)), cwd=Path(__file__).parents[2], capture_output=True, text=True)

    assert run(tmp_path / "whole", -1).returncode == 0
    for library, code, state in (("CDLL", 1, "failed"), ("PyDLL", -signal.SIGKILL, "running")):
        folder = RunFolder(tmp_path / library)
        done = run(folder.path, 85, library)
        assert done.returncode == code, done.stderr
        assert re.search(r"error: environment \d of Stuck-v0, in step \d|error: a step of an env", done.stderr)
        left = folder.read_state()
        assert left is not None
        assert left.state == state
        assert run(folder.path, 0).returncode == 0
        assert digest_of(folder.last) == digest_of(RunFolder(tmp_path / "whole").last)
