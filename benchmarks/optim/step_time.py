"""What one step of AdaBound and AMSBound costs beside torch's Adam and AMSGrad, and beside public AdaBound packages.

All optimizers take turns in one process, on a policy network with two hidden layers of 64 and on one with a million
parameters; each turn is one step on gradients that stay as they are. Ratios are medians of the turns' ratios. The
public packages have no foreach path and are the same in both groups; those that are not installed are left out:
pip install -c constraints.txt -e ".[peers]".
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.optim import Adam

from agents.optim.adabound import AdaBound, AMSBound
from benchmarks.common import context, installed, panels, save, write

NAME = "optim/step_time"

NETWORKS = {"64x64 policy": (11, 64, 64, 3), "1M parameters": (64, 970, 970, 6)}
WARM_UP = 20
SIDES: dict[str, tuple[Callable, str]] = {
    "Adam": (Adam, ""),
    "AdaBound": (AdaBound, "Adam"),
    "AdaBound, nonfinite='ignore'": (partial(AdaBound, nonfinite="ignore"), "Adam"),
    "AMSGrad": (partial(Adam, amsgrad=True), ""),
    "AMSBound": (AMSBound, "AMSGrad"),
}
"""Name -> how it is made, and what it is compared with."""
PUBLIC = {"adabound": "adabound", "torch-optimizer": "torch_optimizer", "pytorch-optimizer": "pytorch_optimizer"}
"""Package -> the module that has an AdaBound."""
COLORS = ["#1f5fa8", "#6f9fd0", "#3f9a5f", "#8a8a8a", "#a6a6a6", "#c4c4c4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of old packages
    packages = installed(*PUBLIC)
    for package in (package for package, found in packages.items() if found):
        SIDES[package] = (partial(without_foreach, importlib.import_module(PUBLIC[package]).AdaBound), "Adam")
    rows = []
    for network, widths in NETWORKS.items():
        for foreach in (True, False):
            seconds = turns(widths, foreach, arguments.turns)
            for side, (_, against) in SIDES.items():
                row = {
                    "network": network,
                    "foreach": foreach,
                    "side": side,
                    "median_us": 1e6 * np.median(seconds[side]),
                }
                if against:
                    ratios = seconds[side] / seconds[against]
                    row |= {"against": against, "ratio": np.median(ratios)}
                    row |= {"ratio_quartiles": np.quantile(ratios, (0.25, 0.75)).tolist()}
                rows.append(row)
                print(
                    f"{network:14} {'foreach' if foreach else 'single ':8} {side:29} {row['median_us']:8.1f} us"
                    + (f"  {row['ratio']:.3f} x {against}" if against else "")
                )
    results = {"packages": packages, "threads": 1, "turns": arguments.turns, "rows": rows}
    print(write(NAME, {**context(), **results}))
    draw(rows)


def turns(widths: tuple[int, ...], foreach: bool, number: int) -> dict[str, np.ndarray]:
    """Measure seconds of every step of every side, [number]; the order of the sides within a turn rotates."""
    optimizers = {side: made(make, widths, foreach) for side, (make, _) in SIDES.items()}
    names, seconds = list(SIDES), {side: np.empty(number) for side in SIDES}
    for turn in range(-WARM_UP, number):
        shift = turn % len(names)
        for side in names[shift:] + names[:shift]:
            start = time.perf_counter()
            optimizers[side].step()
            if turn >= 0:
                seconds[side][turn] = time.perf_counter() - start
    return seconds


def made(make: Callable, widths: tuple[int, ...], foreach: bool) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    return make(net.parameters(), foreach=foreach)


def without_foreach(make: Callable, parameters: Iterable[nn.Parameter], foreach: bool) -> torch.optim.Optimizer:
    return make(parameters)


def draw(rows: list[dict]) -> None:
    compared = [row for row in rows if "ratio" in row]
    groups = list(dict.fromkeys((row["network"], row["foreach"]) for row in compared))
    sides = list(dict.fromkeys(row["side"] for row in compared))
    figure, (axes,) = panels(1, 1, 11.0, 4.2)
    for i, side in enumerate(sides):
        chosen = [row for row in compared if row["side"] == side]
        ratios = np.array([row["ratio"] for row in chosen])
        quartiles = np.array([row["ratio_quartiles"] for row in chosen]).T
        width = 0.84 / len(sides)
        places = np.arange(len(groups)) + (i - (len(sides) - 1) / 2) * width
        errors = np.abs(quartiles - ratios)
        label = f"{side} / {chosen[0]['against']}"
        bars = axes.bar(places, ratios, 0.93 * width, yerr=errors, capsize=2, color=COLORS[i], label=label)
        axes.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontsize=8)
    axes.axhline(1, color="black", linewidth=1)
    axes.axhline(1.2, color="black", linewidth=1, linestyle="--", label="aim: at most 1.2")
    axes.set_xticks(range(len(groups)), [f"{name}\n{'foreach' if foreach else 'single'}" for name, foreach in groups])
    axes.set_ylabel("time of a step, relative (median, quartiles)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    print(save(figure, NAME))


if __name__ == "__main__":
    main()
