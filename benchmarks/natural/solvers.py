"""What each solver of the damped Fisher system costs against n and p, and where `auto` changes from one to another.

Every solver answers the same system, (F + λ I) w = g, for policies with two hidden layers of equal size, or none, on
observations of HalfCheetah-v5's size. Conjugate gradients are timed for 10 products without and for 4 with a K-FAC
preconditioner, and until the residual is 1e-3. Float32, one thread; medians; solves with an n x n or p x p matrix that
would take too long are left out. Crossings are measured at the sizes that were timed, and interpolated.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from typing import Any

import torch

from agents.natural.curvature import choose_solver
from agents.natural.scores import capture
from benchmarks.common import context, panels, save, timed, write
from benchmarks.problems import DAMPING, Problem, solve

NAME = "natural/solvers"
TASK = "HalfCheetah-v5"
HIDDEN = ((), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64))
SAMPLES = (32, 64, 128, 256, 512, 1024, 2048, 8192)
WAYS: dict[str, dict[str, Any]] = {
    "cholesky": {"solver": "cholesky"},
    "gram": {"solver": "gram"},
    "cg, 10": {"solver": "cg", "cg_max_steps": 10},
    "cg + K-FAC, 4": {"solver": "cg", "cg_max_steps": 4, "cg_preconditioner": "kfac"},
    "cg + K-FAC, to 1e-3": {
        "solver": "cg", "cg_max_steps": 1000, "cg_tolerance": 1e-3, "cg_preconditioner": "kfac",
    },
}  # fmt: skip
COLORS = ("#d1741f", "#8e5bb5", "#9cc3e6", "#2f6fb0", "#123f73")
MOST_NUMBERS = 4096
"""The largest side of a matrix that is factored."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", nargs="*", type=int, default=SAMPLES)
    parser.add_argument("--turns", type=int, default=9, help="of each case, at most")
    parser.add_argument("--case-seconds", type=float, default=1.0, help="no further turn after so long")
    parser.add_argument("--budget-minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    rows: list[dict[str, Any]] = []
    for hidden, n in itertools.product(HIDDEN, arguments.samples):
        if time.monotonic() > deadline:
            print("the budget of minutes is spent")
            break
        problem = Problem(TASK, n, hidden)
        rows += [measure(problem, way, arguments.turns, arguments.case_seconds) for way in WAYS]
        seconds = "  ".join(f"{row['way']} {milliseconds(row['seconds'])}" for row in rows[-len(WAYS) :])
        print(f"p {rows[-1]['p']:5} n {n:5}  ms: {seconds}", flush=True)
        write(NAME, {**context(), "damping": DAMPING, "rows": rows, "crossings": crossings(rows)})
    for line in crossings(rows):
        print(line)
    print(plot(rows))


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


@torch.no_grad()
def measure(problem: Problem, way: str, turns: int, limit: float) -> dict[str, Any]:
    """Measure median seconds of a solve, capture not counted; None where a matrix would be too large."""
    scores = capture(problem.actor, problem.log_prob)
    row = {"way": way, "n": scores.n, "p": scores.p, "auto": choose_solver(scores.n, scores.p)}
    side = {"cholesky": scores.p, "gram": scores.n}.get(way, 0)
    if side > MOST_NUMBERS:
        return row | {"seconds": None, "residual": None, "iterations": None}
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < turns and (not times or time.perf_counter() - begin < limit):
        fresh = scores.of(torch.arange(scores.n))  # nothing is laid out from an earlier solve
        found: list[Any] = []
        times.append(timed(lambda: found.append(solve(fresh, problem.A, **WAYS[way]))))  # noqa: B023
    solution = found[0]
    return row | {
        "seconds": statistics.median(times),
        "residual": solution.residual,
        "iterations": solution.iterations,
    }


def crossings(rows: list[dict[str, Any]]) -> list[str]:
    """Find the p up to which Cholesky, and the n up to which Gram, is quicker than 10 products of CG."""
    found = []
    for direct, along, across in (("cholesky", "p", "n"), ("gram", "n", "p")):
        for fixed in sorted({row[across] for row in rows}):
            points = sorted(
                (row[along], math.log(row["seconds"] / other["seconds"]))
                for row in rows
                for other in rows
                if row["way"] == direct and other["way"] == "cg, 10" and row["seconds"] is not None
                if row[across] == fixed == other[across] and row[along] == other[along]
            )
            for (a, low), (b, high) in itertools.pairwise(points):
                if low <= 0 < high:
                    at = a * (b / a) ** (-low / (high - low))
                    found.append(f"{across} = {fixed}: {direct} is quicker than 10 products up to {along} = {at:.0f}")
                    break
    return found


def plot(rows: list[dict[str, Any]]) -> Any:
    sizes = sorted({row["n"] for row in rows})
    chosen = [n for n in (128, 2048, 8192) if n in sizes] or sizes[-1:]
    widths = sorted({row["p"] for row in rows})
    figure, axes = panels(len(chosen) + 1, 2)
    cases = [("p", "n", n) for n in chosen] + [("n", "p", widths[-1])]
    for axis, (along, across, fixed) in zip(axes, cases, strict=True):
        for way, color in zip(WAYS, COLORS, strict=True):
            points = sorted(
                (row[along], 1e3 * row["seconds"])
                for row in rows
                if row["way"] == way and row[across] == fixed and row["seconds"] is not None
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=color, linewidth=1.8, markersize=4, label=way)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"{across} = {fixed:,}", loc="left", fontsize=10.5)
        axis.set_xlabel(f"{'parameters' if along == 'p' else 'samples'} {along}")
        axis.set_ylabel("ms of a solve")
    axes[0].legend(frameon=False, fontsize=8.5)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
