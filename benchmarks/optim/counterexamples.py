"""Two online problems on which Adam goes to the wrong end, with AdaBound and AMSBound beside it.

Reddi et al. 2018, theorem 1 (https://arxiv.org/abs/1904.09237), on [-1, 1]: f_t(x) = 3x if t mod 3 = 1, else -x. The
best x is -1.

Luo et al. 2019, theorem 1 (https://arxiv.org/abs/1902.09843), on [-2, 2]: -100 for x < 0, 0 for x > 1, and between them
f_t(x) = -x if t mod C = 1, 2x if t mod C = 2, else 0. C = 3 and β₂ = 0.04 satisfy its condition
5 β₂^(C - 2) <= (1 - β₂) / (4 - β₂). It is also run as a linear problem (the same slopes for every x): the best x is -2.

As in both papers β₁ = 0, steps fall as 1 / √t and x is projected. SGD's step size and final_lr are 0.1, as is lr.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from agents.optim.adabound import AdaBound, AMSBound
from benchmarks.common import context, panels, save, write

NAME = "optim/counterexamples"

LR = 0.1
REPORTED = (1000, 5000, 20_000)


def reddi(t: int, x: float) -> float:
    return 3.0 if t % 3 == 1 else -1.0


def luo_linear(t: int, x: float) -> float:
    return {1: -1.0, 2: 2.0, 0: 0.0}[t % 3]


def luo(t: int, x: float) -> float:
    return luo_linear(t, x) if 0 <= x <= 1 else 0.0


# Title: slope, β₂, start, bound of x.
PROBLEMS: dict[str, tuple[Callable[[int, float], float], float, float, float]] = {
    "Reddi et al., theorem 1 (best: -1)": (reddi, 0.1, 0.0, 1.0),
    "Luo et al., theorem 1 (best: below 0)": (luo, 0.04, 0.5, 2.0),
    "Luo et al., linear (best: -2)": (luo_linear, 0.04, 0.5, 2.0),
}


def optimizers(beta2: float) -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    adaptive = {"lr": LR, "betas": (0.0, beta2)}
    return {
        "SGD": partial(SGD, lr=LR),
        "Adam": partial(Adam, **adaptive),
        "AMSGrad": partial(Adam, amsgrad=True, **adaptive),
        "AdaBound": partial(AdaBound, final_lr=LR, **adaptive),
        "AdaBound, gamma = 1e-4": partial(AdaBound, final_lr=LR, gamma=1e-4, **adaptive),
        "AMSBound": partial(AMSBound, final_lr=LR, **adaptive),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=REPORTED[-1])
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    paths, rows = {}, []
    for problem, (slope, beta2, start, bound) in PROBLEMS.items():
        for name, make in optimizers(beta2).items():
            paths[problem, name] = path = follow(make, slope, start, bound, steps)
            reported = {t: path[t - 1] for t in REPORTED if t <= steps}
            rows.append({"problem": problem, "optimizer": name, "x": reported})
            print(f"{problem:38} {name:23}", *(f"x({t}) = {x:+.3f} " for t, x in reported.items()), flush=True)
    print(write(NAME, {**context(), "steps": steps, "lr": LR, "rows": rows}))
    draw(paths, steps)


def follow(make: Callable, slope: Callable[[int, float], float], start: float, bound: float, steps: int) -> np.ndarray:
    """Return x after every step, [steps]."""
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = make([x])
    schedule = LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1))
    path = np.empty(steps)
    for t in range(1, steps + 1):
        x.grad = torch.tensor(slope(t, x.item()), dtype=torch.float64)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(-bound, bound)
        path[t - 1] = x.item()
    return path


def draw(paths: dict[tuple[str, str], np.ndarray], steps: int) -> None:
    figure, axes = panels(len(PROBLEMS), len(PROBLEMS), 5.0, 4.5)
    styles = ["-", "-", "-", "-", ":", "--"]
    widths = [1.5, 5, 5, 1.5, 1.5, 1.5]
    colors = ["black", "lightsalmon", "khaki", "tab:blue", "tab:blue", "tab:green"]
    for axis, problem in zip(axes, PROBLEMS, strict=True):
        named = [(name, path) for (of, name), path in paths.items() if of == problem]
        for (name, path), style, width, color in zip(named, styles, widths, colors, strict=True):
            axis.plot(np.arange(1, steps + 1), path, style, linewidth=width, color=color, label=name)
        axis.set(title=problem, xlabel="step t", xscale="log", ylabel="x")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    print(save(figure, NAME))


if __name__ == "__main__":
    main()
