"""What every benchmark records, where its results go, and how its figures look."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.checkpoint import versions as current_versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CODE = ("agents", "envs", ":(glob)benchmarks/**/*.py")
"""What a result depends on, as git names it."""
SILENT: dict[str, Any] = {
    "fisher_rate": 0.1,
    "fisher_rows": 64,
    "fisher_first_order": False,
    "rbf_bandwidth": None,
    "advantages_after_fit": False,
    "log_std_end": None,
    "gamma_end": None,
    "reused_rollouts": 0,
    "reuse_until": None,
}
"""Hyperparameters that some kept runs name and others do not, since the code then or now has no such option -> the
value at which training does what it does without them."""
OF_DESCENT = ("critic_learning_rate", "critic_epochs", "critic_batch_size")
"""What only a critic that an optimizer fits has a use for."""


def context() -> dict[str, Any]:
    """Return command, commit, versions and hardware of this run."""
    return {
        "command": _command(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_since_commit": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *CODE)),
        "versions": current_versions(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
    }


def code_version() -> str:
    """Name the code that learning depends on: a digest of agents/ and envs/, as committed and as changed since."""
    folders = ("agents", "envs")
    state = _git("rev-parse", *(f"HEAD:{folder}" for folder in folders)) + _git("diff", "HEAD", "--", *folders)
    return hashlib.sha256(state.encode()).hexdigest()[:10]


def read(name: str) -> dict[str, Any] | None:
    """Return the results kept under a name, subject/script, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write(name: str, results: dict[str, Any]) -> Path:
    """Keep results under a name; they replace earlier ones at once or not at all."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)
    return path


def is_same(run: dict[str, Any], key: dict[str, Any], versions: bool = True) -> bool:
    """Tell whether a kept run answers the key, with the packages that are installed now."""
    same = all(without_silent(run[name]) == without_silent(value) for name, value in key.items())
    return same and (not versions or run["versions"] == current_versions())


def missing(runs: list[dict[str, Any]], keys: Iterable[dict[str, Any]], minutes: float) -> Iterator[dict[str, Any]]:
    """Give the keys that no kept run answers, until so many minutes are spent; a word when they are."""
    deadline = time.monotonic() + 60 * minutes
    for key in keys:
        if any(is_same(run, key) for run in runs):
            continue
        if time.monotonic() > deadline:
            print("the budget of minutes is spent; call again to go on")
            return
        yield key


def keep(name: str, kept: dict[str, Any], run: dict[str, Any], place: Iterable[str]) -> None:
    """Write a run among those kept under a name, instead of earlier ones with the same values of place's names.

    Runs that another process has written meanwhile stay, and are taken into kept.
    """
    where = {field: run[field] for field in place}
    others = (read(name) or kept)["runs"]
    kept["runs"][:] = [other for other in others if not is_same(other, where, versions=False)] + [run]
    write(name, kept)


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as they are read from a file in which they were kept: tuples are lists."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def installed(*packages: str) -> dict[str, str | None]:
    """Return the versions of packages, None for those that are not installed."""
    return {package: _version(package) for package in packages}


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that work takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def interval(statistic: Callable[..., Any], *samples: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval (bias-corrected and accelerated) of a statistic of independent samples."""
    from scipy.stats import bootstrap

    found = bootstrap(samples, statistic, rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def panels(count: int, columns: int, width: float = 5.0, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Return a figure with count panels in rows of columns; inches per panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-count // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[:count]


def save(figure: Figure, name: str) -> Path:
    """Keep a figure beside the results of that name."""
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=130)
    return path


def without_silent(value: Any) -> Any:
    """Leave out hyperparameters that do nothing: at the values of SILENT, OF_DESCENT for another critic, or of a reuse
    that there is not."""
    if not isinstance(value, dict):
        return value
    unused = OF_DESCENT if value.get("critic") in ("gauss_newton", "ridge") else ()
    unused += () if value.get("reused_rollouts") else ("reuse_until",)
    value = {name: entry for name, entry in value.items() if name not in unused}
    return {name: entry for name, entry in value.items() if name not in SILENT or entry != SILENT[name]}


def _command() -> str:
    """Return the command line that runs this again, without the place of the files."""
    specification = sys.modules["__main__"].__spec__
    script = ["-m", specification.name] if specification else [Path(sys.argv[0]).name]
    return shlex.join(["python", *script, *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
