"""Adaptive methods as one method with other averages, and their regret on two online convex problems.

The method (Reddi et al. 2018, algorithm 1, https://arxiv.org/abs/1904.09237) moves by -α φ / √ψ, both of the gradients
so far; `family` has φ and √ψ of each row. The regret is the sum of f_t(x_t) less that of the best fixed point.

The problems: Reddi's theorem 1 (f_t(x) = 3x if t mod 3 = 1, else -x, on [-1, 1], β₁ = 0, β₂ = 0.1), and logistic
regression on examples that come one at a time, most of whose inputs are rare (on [-5, 5]^20, β₂ = 0.99). α falls as
1 / √t, but AdaGrad's, whose ψ grows; x is projected, and each row has the best lr of seven for each problem. AdaBound's
final_lr is SGD's best there, its γ 1e-3.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop

from agents.optim.adabound import AdaBound
from benchmarks.common import context, panels, save, write

NAME = "optim/regret"
Average = Callable[[Tensor], Tensor]
"""Gradients of all steps so far, [t, d], to [d]."""
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


# The family ----------------------------------------------------------------------------------------------------------


def last(g: Tensor) -> Tensor:
    return g[-1]


def one(g: Tensor) -> Tensor:
    return torch.ones_like(g[-1])


def total(g: Tensor, decay: float = 1.0) -> Tensor:
    """Sum with weights decay^(t - i)."""
    return decay ** torch.arange(len(g) - 1, -1, -1, dtype=g.dtype) @ g


def average(g: Tensor, decay: float) -> Tensor:
    """Sum with weights (1 - decay) decay^(t - i) / (1 - decay^t), which are 1 together."""
    return (1 - decay) / (1 - decay ** len(g)) * total(g, decay)


def greatest(g: Tensor, decay: float) -> Tensor:
    """The largest that `total` of squares has been, as of t, scaled as `average`."""
    sums = torch.stack([total(g[: k + 1].square(), decay) for k in range(len(g))])
    return (1 - decay) / (1 - decay ** len(g)) * sums.amax(0)


def family(
    lr: float, beta1: float, beta2: float, eps: float, final_lr: float, gamma: float
) -> dict[str, tuple[Average, Average]]:
    """Give name -> (φ, √ψ); all move by -lr φ / √ψ."""

    def adam(g: Tensor) -> Tensor:
        return average(g.square(), beta2).sqrt() + eps

    def bounded(g: Tensor) -> Tensor:
        t, correction = len(g), math.sqrt(1 - beta2 ** len(g)) / (1 - beta1 ** len(g))
        length = lr * correction / (((1 - beta2) * total(g.square(), beta2)).sqrt() + eps)
        k = gamma * t / (gamma * t + 1)
        return lr / (length.clamp(final_lr * k, final_lr / k) * (1 - beta1**t))

    return {
        "SGD": (last, one),
        "momentum": (partial(total, decay=beta1), one),
        "AdaGrad": (last, lambda g: total(g.square()).sqrt() + eps),
        "RMSProp": (last, lambda g: ((1 - beta2) * total(g.square(), beta2)).sqrt() + eps),
        "Adam": (partial(average, decay=beta1), adam),
        "AMSGrad": (partial(average, decay=beta1), lambda g: greatest(g, beta2).sqrt() + eps),
        "AdaBound": (partial(average, decay=beta1), bounded),
    }


def optimizers(
    lr: float, beta1: float, beta2: float, eps: float, final_lr: float, gamma: float
) -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    """Give the same rows as torch.optim and this package have them."""
    adaptive: dict[str, Any] = {"lr": lr, "betas": (beta1, beta2), "eps": eps}
    return {
        "SGD": partial(SGD, lr=lr),
        "momentum": partial(SGD, lr=lr, momentum=beta1),
        "AdaGrad": partial(Adagrad, lr=lr, eps=eps),
        "RMSProp": partial(RMSprop, lr=lr, alpha=beta2, eps=eps),
        "Adam": partial(Adam, **adaptive),
        "AMSGrad": partial(Adam, amsgrad=True, **adaptive),
        "AdaBound": partial(AdaBound, final_lr=final_lr, gamma=gamma, **adaptive),
    }


# Regret --------------------------------------------------------------------------------------------------------------


class Reddi:
    """f_t(x) = 3x if t mod 3 = 1, else -x."""

    name, bound, size, beta1, beta2 = "Reddi et al., theorem 1", 1.0, 1, 0.0, 0.1

    def __init__(self, steps: int) -> None:
        self.slopes = [3.0 if t % 3 == 1 else -1.0 for t in range(1, steps + 1)]

    def at(self, t: int, x: np.ndarray) -> tuple[float, np.ndarray]:
        return self.slopes[t - 1] * x[0], np.array([self.slopes[t - 1]])

    def best(self, t: int) -> float:
        """The least sum of the first t functions at one point."""
        return -abs(sum(self.slopes[:t]))


class Logistic:
    """f_t(x) = log(1 + exp(-y zᵀ x)) for one example, whose inputs are not zero with probabilities from 1 to 0.01."""

    name, bound, size, beta1, beta2 = "logistic regression, rare inputs", 5.0, 20, 0.9, 0.99

    def __init__(self, steps: int) -> None:
        draw = np.random.default_rng(0)
        often = np.geomspace(1, 0.01, self.size)
        z = draw.normal(size=(steps, self.size)) * (draw.random((steps, self.size)) < often)
        truth = draw.normal(size=self.size) * 2
        y = np.where(draw.random(steps) < 1 / (1 + np.exp(-z @ truth)), 1.0, -1.0)
        self.signed = y[:, None] * z

    def at(self, t: int, x: np.ndarray) -> tuple[float, np.ndarray]:
        row = self.signed[t - 1]
        margin = row @ x
        return float(np.logaddexp(0, -margin)), -row / (1 + np.exp(margin))

    def best(self, t: int) -> float:
        rows = self.signed[:t]

        def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
            margins = rows @ x
            return np.logaddexp(0, -margins).sum(), -rows.T @ (1 / (1 + np.exp(margins)))

        bounds = [(-self.bound, self.bound)] * self.size
        return float(minimize(loss, np.zeros(self.size), jac=True, method="L-BFGS-B", bounds=bounds).fun)


def losses(problem: Any, make: Callable[[list[nn.Parameter]], Optimizer], steps: int) -> np.ndarray:
    """Return the sum of f_t(x_t) up to each step, [steps]."""
    x = nn.Parameter(torch.zeros(problem.size, dtype=torch.float64))
    optimizer = make([x])
    (group,) = optimizer.param_groups
    lr, met = group["lr"], np.empty(steps)
    for t in range(1, steps + 1):
        met[t - 1], slope = problem.at(t, x.detach().numpy())
        x.grad = torch.tensor(slope)
        group["lr"] = lr if isinstance(optimizer, Adagrad) else lr / math.sqrt(t)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-problem.bound, problem.bound)
    return met.cumsum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    times = [t for t in np.unique(np.geomspace(10, steps, 25).astype(int)).tolist() if t <= steps]
    rows = []
    for problem in (Reddi(steps), Logistic(steps)):
        best = {t: problem.best(t) for t in times}
        final_lr = 1.0
        for name in family(1, 0, 0.5, 0, 1, 1):
            tried = {}
            for lr in RATES:
                make = optimizers(lr, problem.beta1, problem.beta2, 1e-8, final_lr, 1e-3)[name]
                tried[lr] = losses(problem, make, steps)
            lr = min(tried, key=lambda lr: tried[lr][-1])
            final_lr = lr if name == "SGD" else final_lr
            regret = [round(float(tried[lr][t - 1] - best[t]), 4) for t in times]
            rows.append({"problem": problem.name, "method": name, "lr": lr, "steps": times, "regret": regret})
            print(f"{problem.name:34} {name:9} lr {lr:<5} regret {regret[-1]:9.2f}", flush=True)
    print(write(NAME, {**context(), "rows": rows}))
    print(plot(rows))


def plot(rows: list[dict[str, Any]]) -> Any:
    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = panels(len(names), len(names), 5.5, 4.2)
    styles = ["-", "--", "-", "--", "-", "-", "-"]
    colors = ["#888888", "#888888", "#3f9a5f", "#8e5bb5", "#d1741f", "#c9a400", "#1f5fa8"]
    for axis, name in zip(axes, names, strict=True):
        for row, style, color in zip((row for row in rows if row["problem"] == name), styles, colors, strict=True):
            mean = np.maximum(np.array(row["regret"]) / row["steps"], 1e-4)
            axis.loglog(row["steps"], mean, style, color=color, linewidth=1.6, label=row["method"])
        axis.loglog(row["steps"], 2 / np.sqrt(row["steps"]), ":", color="black", linewidth=0.8, label="∝ 1 / √T")
        axis.set(title=name, xlabel="steps T", ylabel="regret / T")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
