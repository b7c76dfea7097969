"""What one step of AdaBound and AMSBound costs beside torch's Adam and AMSGrad.

All optimizers take turns in one process, on a policy network with two hidden layers of 64 and on one with a million
parameters; each turn is one step on gradients that stay as they are. Ratios are medians of the turns' ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from common import context, panels, save, write
from torch import nn
from torch.optim import Adam

from agents.direction.adabound import AdaBound, AMSBound

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
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
    print(write("optimizer_step_time", {**context(), "threads": 1, "turns": arguments.turns, "rows": rows}))
    draw(rows)


def turns(widths: tuple[int, ...], foreach: bool, number: int) -> dict[str, np.ndarray]:
    """Seconds of every step of every side, [number]; the order of the sides within a turn rotates."""
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


def draw(rows: list[dict]) -> None:
    compared = [row for row in rows if "ratio" in row]
    groups = list(dict.fromkeys((row["network"], row["foreach"]) for row in compared))
    sides = list(dict.fromkeys(row["side"] for row in compared))
    figure, (axes,) = panels(1, 1, 8.0, 4.0)
    for i, side in enumerate(sides):
        chosen = [row for row in compared if row["side"] == side]
        ratios = np.array([row["ratio"] for row in chosen])
        quartiles = np.array([row["ratio_quartiles"] for row in chosen]).T
        places = np.arange(len(groups)) + (i - (len(sides) - 1) / 2) * 0.27
        errors = np.abs(quartiles - ratios)
        bars = axes.bar(places, ratios, 0.25, yerr=errors, capsize=3, label=f"{side} / {chosen[0]['against']}")
        axes.bar_label(bars, fmt="%.2f", label_type="center", color="white")
    axes.axhline(1, color="black", linewidth=1)
    axes.axhline(1.2, color="black", linewidth=1, linestyle="--", label="aim: at most 1.2")
    axes.set_xticks(range(len(groups)), [f"{name}\n{'foreach' if foreach else 'single'}" for name, foreach in groups])
    axes.set_ylabel("time of a step, relative (median, quartiles)")
    axes.set_ylim(0, 1.75)
    axes.legend(loc="upper center", ncols=2, frameon=False)
    print(save(figure, "optimizer_step_time"))


if __name__ == "__main__":
    main()
