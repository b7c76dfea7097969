"""What every benchmark records, and where its results go."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from agents.checkpoint import versions

RESULTS = Path(__file__).parent / "results"


def context() -> dict[str, Any]:
    """Command, commit, versions and hardware of this run."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_since_commit": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "agents", "envs")),
        "versions": versions(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
    }


def read(name: str) -> dict[str, Any] | None:
    """Results kept under a name, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write(name: str, results: dict[str, Any]) -> Path:
    """Keep results under a name; they replace earlier ones at once or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
