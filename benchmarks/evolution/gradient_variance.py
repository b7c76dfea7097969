"""The error of a gradient estimate against the window's length and the number of particles.

Left and middle: scores that are linear in θ, T = 32 steps, P = 32; the steps' gradients are one vector (aligned) or
orthogonal to each other (independent). Dots are measured, lines the exact formula: PES wins where gradients align,
NRES where they are independent. Right: influence balancing over 100 steps, windows of one step; the root mean square
error over the true gradient. More particles help until the bias of truncation is what remains.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from agents.evolution.engine import Scheme, estimate, start
from agents.evolution.unroll import State, Unroll
from benchmarks.baselines import Rtrl, rtrl
from benchmarks.common import context, panels, save, write
from benchmarks.toys import InfluenceBalancing

NAME = "evolution/gradient_variance"

STEPS = 32
METHODS = ("pes", "nres", "truncated_es")
LABELS = {"pes": "PES", "nres": "NRES", "truncated_es": "truncated ES"}


class Directions:
    """Step t scores <c_t, θ>, with c [T, P]."""

    def __init__(self, c: Tensor) -> None:
        self.c = c

    def init(self, keys: Tensor, slots: Tensor) -> State:
        return {"steps": torch.zeros_like(keys)}

    def unroll(self, theta: Tensor, state: State, window: int) -> tuple[State, Tensor, Tensor]:
        steps = state["steps"]
        score = sum((self.c[steps + t] * theta).sum(1) for t in range(window))
        return {"steps": steps + window}, score, steps + window >= len(self.c)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8192, help="pairs to measure a variance with")
    parser.add_argument("--repeats", type=int, default=40, help="estimates to measure an error with")
    arguments = parser.parse_args()
    unit = torch.eye(STEPS, dtype=torch.float64)
    cases = {"aligned": unit[:1].expand(STEPS, -1), "independent": unit}
    lengths = []
    for case, c in cases.items():
        for window in (1, 2, 4, 8, 16, 32):
            for method in METHODS:
                scheme = Scheme.of(method, particles=2 * arguments.pairs, window=window, horizon=STEPS, staggered=False)
                samples = episode(Directions(c), scheme, torch.zeros(STEPS, dtype=torch.float64), 1.0, 0) / 32
                measured, exact = 32 * samples.var(0).sum().item(), variance(method, c, window)
                row = {"case": case, "window": window, "method": method, "measured": measured, "exact": exact}
                lengths.append(row)
                print(f"{case:12} K = {window:2}  {method:13} measured {measured:9.1f}  exact {exact:9.1f}", flush=True)
    errors, true = [], true_gradient()
    for pairs in (2, 8, 32, 128, 512):
        for method in METHODS:
            scheme = Scheme.of(method, particles=2 * pairs, window=1, horizon=100, staggered=False)
            task, theta = InfluenceBalancing(), torch.tensor([0.5], dtype=torch.float64)
            found = [episode(task, scheme, theta, 0.1, seed).sum().item() / pairs for seed in range(arguments.repeats)]
            mean_square = sum((value - true) ** 2 for value in found) / len(found)
            errors.append({"particles": 2 * pairs, "method": method, "relative_error": mean_square**0.5 / abs(true)})
            print(f"N = {2 * pairs:4}  {method:13} relative error {errors[-1]['relative_error']:.4f}", flush=True)
    print(write(NAME, {**context(), "lengths": lengths, "true_gradient": true, "errors": errors}))
    plot(lengths, errors)


def episode(task: Unroll, scheme: Scheme, theta: Tensor, sigma: float, seed: int) -> Tensor:
    """Add up the windows' estimates of one episode."""
    particles, total = start(scheme, theta, seed), torch.zeros(())
    for _ in range(scheme.horizon // scheme.window):
        result, particles = estimate(task, scheme, theta, sigma, particles)
        total = total + result.sums
    return total


def variance(method: str, c: Tensor, window: int) -> float:
    """Return the total variance of one pair's estimate for an episode."""
    P, g = c.shape[1], c.unflatten(0, (-1, window)).sum(1)
    if method == "nres":
        return ((P + 1) * g.sum(0).square().sum()).item()
    if method == "truncated_es":
        return ((P + 1) * g.square().sum()).item()
    # θ in window τ matters to that window alone: G[s, τ] = g[τ] for s <= τ, and 0 otherwise.
    earlier = torch.arange(1, len(g) + 1)
    return (P * (earlier * g.square().sum(1)).sum() + g.square().sum()).item()


def true_gradient() -> float:
    task, theta, zero = (
        InfluenceBalancing(),
        torch.tensor([0.5], dtype=torch.float64),
        torch.zeros(1, dtype=torch.int64),
    )
    carried, total = Rtrl.start(task.init(zero, zero), theta), 0.0
    for _ in range(100):
        gradient, _, carried = rtrl(task, theta, carried, 1)
        total += gradient.item()
    return total


def plot(lengths: list[dict], errors: list[dict]) -> None:
    figure, axes = panels(3, 3, 5.2, 4.0)
    for axis, case in zip(axes, ("aligned", "independent"), strict=False):
        for index, method in enumerate(METHODS):
            rows = [row for row in lengths if row["case"] == case and row["method"] == method]
            windows = [row["window"] for row in rows]
            axis.loglog(windows, [row["exact"] for row in rows], color=f"C{index}", label=LABELS[method])
            axis.loglog(windows, [row["measured"] for row in rows], "o", color=f"C{index}")
        axis.set(xlabel="window K, steps", ylabel="variance of one pair", title=f"{case} gradients")
        axis.set_xticks(windows, windows)
        axis.minorticks_off()
        axis.legend(fontsize=8, frameon=False)
    for index, method in enumerate(METHODS):
        rows = [row for row in errors if row["method"] == method]
        particles = [row["particles"] for row in rows]
        axes[2].loglog(
            particles, [row["relative_error"] for row in rows], "o-", color=f"C{index}", label=LABELS[method]
        )
    axes[2].set(xlabel="particles N", ylabel="error / true gradient", title="influence balancing, K = 1")
    axes[2].legend(fontsize=8, frameon=False)
    print(save(figure, NAME))


if __name__ == "__main__":
    main()
