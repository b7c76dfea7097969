"""The natural-gradient direction from the score operator beside one from a double backward pass.

Ours: scores.capture and curvature.Sampled, with F estimated from the sampled actions. The other: the Hessian of the
mean KL divergence by differentiating twice, as sb3-contrib's TRPO does, in the same conjugate gradients, with the
same absolute damping. Both start from observations, actions and advantages and end with the direction: at equal
conjugate-gradient iterations, and at equal relative residuals, each of its own system; there ours is timed with the
K-FAC and the Gram preconditioner too. The matrices agree only in expectation over actions, so the directions differ
too: each case records their cosine. Float32, one BLAS thread; the sides take turns; medians of the turns' ratios.

Made problems have an orthogonal network and independent standard normal observations, which is kind to conjugate
gradients. --trained takes policies and rollouts of NPG after some iterations on the task itself, which is not.

Last, for a small case, how far directions are from the exact solution with per-sample scores in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from agents import NPG
from agents.natural.curvature import Solution, conjugate_gradient
from agents.natural.scores import capture, dense_scores
from agents.policy.distributions import DiagonalGaussian
from agents.rollout.buffer import advantages, standardize
from benchmarks.common import context, panels, save, timed, write
from benchmarks.problems import DAMPING, SIZES, Problem, solve

NAME = "natural/direction"
HIDDEN = ((32, 32), (64, 64), (256, 256))
SAMPLES = (1024, 2048, 8192, 32768)
ITERATIONS = 10
RESIDUALS = (0.1, 0.01)
MOST_ITERATIONS = 300
GOALS = {
    f"{ITERATIONS} iterations": (ITERATIONS, 0.0),
    **{f"residual {residual}": (MOST_ITERATIONS, residual) for residual in RESIDUALS},
}
"""What is equal -> most iterations and the residual to reach."""
PRECONDITIONERS = {"none": "#4a8cc7", "kfac": "#d1741f", "gram": "#1f6b45"}
"""Of ours -> color."""


class Trained(Problem):
    """A policy that NPG has trained for some iterations with its preset, its next rollout and that one's advantages."""

    def __init__(self, task: str, n: int, hidden: Sequence[int], iterations: int = 20) -> None:
        settings = dataclasses.asdict(NPG.preset(task)) | {
            "num_envs": 64,
            "n_steps": n // 64,
            "net_arch": tuple(hidden),
        }
        agent = NPG("MlpPolicy", task, seed=0, device="cpu", **settings)
        agent.learn(n * iterations)
        c, policy, batch = agent.config, agent.policy, agent.collect()
        self.actor, self.a = policy.actor, batch["actions"].flatten(0, 1)
        with torch.no_grad():
            self.s = policy.normalize(batch["observations"].flatten(0, 1))
            values = policy.critic(self.s)
        self.A = standardize(advantages(batch, values, policy, c.gamma, c.gae_lambda)[0])


@torch.no_grad()
def factored(problem: Problem, iterations: int, tolerance: float, preconditioner: str = "none") -> Solution:
    scores = capture(problem.actor, problem.log_prob)
    return solve(scores, problem.A, cg_max_steps=iterations, cg_tolerance=tolerance, cg_preconditioner=preconditioner)


def double_backward(problem: Problem, shift: float, iterations: int, tolerance: float) -> Solution:
    """Do what sb3-contrib's TRPO.train does up to the search direction, with an absolute damping."""
    parameters = list(problem.actor.parameters())
    new: DiagonalGaussian = problem.actor(problem.s)
    old = DiagonalGaussian(new.mean.detach(), new.log_std.detach())
    log_prob = new.log_prob(problem.a)
    surrogate = (torch.exp(log_prob - log_prob.detach()) * problem.A).mean()
    gradient = flat(torch.autograd.grad(surrogate, parameters, retain_graph=True))
    kl_gradient = flat(torch.autograd.grad(old.kl(new).mean(), parameters, create_graph=True))

    def hessian_vector(v: Tensor) -> Tensor:
        return flat(torch.autograd.grad(kl_gradient @ v, parameters, retain_graph=True)).add_(v, alpha=shift)

    return conjugate_gradient(hessian_vector, gradient, max_iterations=iterations, tolerance=tolerance)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--samples", nargs="*", type=int, default=SAMPLES)
    parser.add_argument("--hidden", nargs="*", type=int, default=None, help="of one policy alone")
    parser.add_argument("--trained", action="store_true", help="problems that training poses")
    parser.add_argument("--turns", type=int, default=15, help="turns of both sides per case, at most")
    parser.add_argument(
        "--case-seconds", type=float, default=15.0, help="no further turn after so long, but 3 at least"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    accuracy = distance_from_exact("Hopper-v5", 1024, (32, 32))
    for row in accuracy:
        print(
            "{dtype}, {preconditioner}, {iterations} iterations: relative error of the direction "
            "{relative_error:.1e}".format(**row)
        )
    name = f"{NAME}_trained" if arguments.trained else NAME
    policies = HIDDEN if arguments.hidden is None else (tuple(arguments.hidden),)
    for task, hidden, n in product(arguments.tasks, policies, arguments.samples):
        problem = Trained(task, n, hidden) if arguments.trained else Problem(task, n, hidden)
        for goal, limits in GOALS.items():
            for preconditioner in PRECONDITIONERS if limits[1] else ("none",):
                row = {"task": task, "hidden": list(hidden), "n": n, "goal": goal, "preconditioner": preconditioner}
                row |= compare(problem, *limits, preconditioner, arguments.turns, arguments.case_seconds)
                report(row)
                rows.append(row)
                write(name, {**context(), "damping": DAMPING, "accuracy": accuracy, "rows": rows})
    print(plot(rows, name))


def report(row: dict[str, Any]) -> None:
    print(
        f"{row['task']:15} {row['hidden']!s:11} n = {row['n']:6}  {row['goal']:14} {row['preconditioner']:5} "
        f"ours {1e3 * row['ours_seconds']:8.2f} ms ({row['ours_iterations']:3} iterations)  double backward "
        f"{1e3 * row['other_seconds']:8.2f} ms ({row['other_iterations']:3})  ratio {row['ratio']:5.2f}  "
        f"cosine {row['cosine']:.3f}",
        flush=True,
    )


def compare(
    problem: Problem, iterations: int, tolerance: float, preconditioner: str, turns: int, seconds: float
) -> dict[str, Any]:
    """Measure median seconds of both sides, and the median of the turns' ratios double backward / ours."""
    scores = capture(problem.actor, problem.log_prob)
    shift = DAMPING * scores.trace().item() / scores.p
    sides: list[Callable[[], Solution]] = [
        lambda: factored(problem, iterations, tolerance, preconditioner),
        lambda: double_backward(problem, shift, iterations, tolerance),
    ]
    ours, other = (side() for side in sides)  # warms up too
    times: list[list[float]] = []
    begin = time.perf_counter()
    while len(times) < turns and (len(times) < 3 or time.perf_counter() - begin < seconds):
        times.append([timed(side) for side in sides])
    return {
        "parameters": scores.p,
        "ours_seconds": statistics.median(a for a, _ in times),
        "other_seconds": statistics.median(b for _, b in times),
        "ratio": statistics.median(b / a for a, b in times),
        "seconds": times,
        "ours_iterations": ours.iterations,
        "other_iterations": other.iterations,
        "ours_residual": ours.residual,
        "other_residual": other.residual,
        "cosine": torch.cosine_similarity(ours.direction, other.direction, dim=0).item(),
    }


def distance_from_exact(task: str, n: int, hidden: Sequence[int]) -> list[dict[str, Any]]:
    """Measure |w - w*| / |w*| of our directions; w* solves the same damped system with float64 per-sample scores."""
    exact = Problem(task, n, hidden, torch.float64)
    scores = dense_scores(exact.actor, lambda actor, s, a: actor(s).log_prob(a), exact.s, exact.a)
    fisher = scores.matrix.T @ scores.matrix / n
    fisher.diagonal().add_(DAMPING * scores.trace() / scores.p)
    solution = torch.linalg.solve(fisher, scores.rmatvec(exact.A) / n)
    rows = []
    for dtype, (iterations, tolerance), preconditioner in product(
        (torch.float32, torch.float64),
        ((ITERATIONS, 0.0), (MOST_ITERATIONS, 0.01), (2000, 1e-6)),
        ("none", "kfac", "gram"),
    ):
        found = factored(Problem(task, n, hidden, dtype), iterations, tolerance, preconditioner)
        error = (found.direction.double() - solution).norm() / solution.norm()
        rows.append(
            {
                "task": task,
                "n": n,
                "hidden": list(hidden),
                "preconditioner": preconditioner,
                "dtype": str(dtype).removeprefix("torch."),
                "iterations": found.iterations,
                "residual": found.residual,
                "status": found.status,
                "relative_error": error.item(),
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], name: str) -> Any:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    policies = list(dict.fromkeys(str(row["hidden"])[1:-1] for row in rows))
    figure, axes = panels(len(GOALS) * len(tasks), len(GOALS), 4.6, 3.2)
    for axis, (task, goal) in zip(axes, product(tasks, GOALS), strict=True):
        for (preconditioner, color), (policy, style) in product(
            PRECONDITIONERS.items(), zip(policies, ("o-", "s--", "^:"), strict=False)
        ):
            points = [
                (row["n"], row["ratio"])
                for row in rows
                if (row["task"], row["goal"], row["preconditioner"]) == (task, goal, preconditioner)
                and str(row["hidden"])[1:-1] == policy
            ]
            if points:
                label = f"hidden layers {policy}, our preconditioner: {preconditioner}"
                axis.plot(*zip(*points, strict=True), style, color=color, linewidth=1.8, markersize=4.5, label=label)
        axis.axhline(1, color="#333333", linewidth=1)
        axis.set_xscale("log", base=2)
        samples = sorted({row["n"] for row in rows})
        axis.set_xticks(samples, [f"{n:,}" for n in samples])
        axis.set_ylim(bottom=0)
        axis.set_title(f"{task}, equal {goal}", loc="left", fontsize=10.5)
    labelled = max(axes, key=lambda axis: len(axis.get_lines())).get_legend_handles_labels()
    figure.legend(*labelled, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel("samples n", fontsize=10)
    figure.supylabel("seconds of double backward / ours", fontsize=10)
    return save(figure, name)


if __name__ == "__main__":
    main()
