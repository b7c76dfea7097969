"""Step lengths of each element over a training: Adam, AMSGrad, AdaBound and AMSBound on a small residual network.

Scikit-learn's digits (8 x 8), a ResNet of three blocks with batch normalization, minibatches of 64. Drawn are the
quantiles 5, 50 and 95 % of lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) / (√v + eps) after the bounds, over the elements of the kernels,
of the biases, and of batch normalization's scales, with the bounds. AdaBound and AMSBound hand over at a tenth of the
updates; Adam and AMSGrad are the same code with bounds that never close.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from agents.optim.adabound import AdaBound, handover_gamma
from agents.optim.effective_steps import report
from benchmarks.common import context, panels, read, save, write
from benchmarks.digits import digits

NAME = "optim/effective_steps"
LR, FINAL_LR, HANDOVER, BATCH = 1e-3, 0.1, 0.1, 64
NEVER = 1e-12
"""A gamma with which the bounds stay open."""
OPTIMIZERS = {
    "Adam": {"amsbound": False, "bounded": False},
    "AMSGrad": {"amsbound": True, "bounded": False},
    "AdaBound": {"amsbound": False, "bounded": True},
    "AMSBound": {"amsbound": True, "bounded": True},
}
GROUPS = ("kernels", "biases", "scales")


class Block(nn.Module):
    """relu(x' + two convolutions of x), x' a convolution of one pixel where the size changes."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(wider), nn.BatchNorm2d(wider)])
        same = stride == 1 and wider == channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels, wider, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norms[1](self.second(relu(self.norms[0](self.first(x)))))
        return relu(inner + self.skip(x))


def resnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8, 8, 1),
        Block(8, 16, 2),
        Block(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def groups(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort the parameters by what they are in their modules."""
    found: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            found["scales" if isinstance(module, nn.BatchNorm2d) else "kernels"].append(module.weight)
            if module.bias is not None:
                found["biases"].append(module.bias)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--plot", action="store_true", help="only the figure of what is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = read(NAME) if arguments.plot else None
    if kept is None:
        runs = {name: train(arguments.updates, **options) for name, options in OPTIMIZERS.items()}
        parameters = {name: sum(p.numel() for p in group) for name, group in groups(resnet()).items()}
        kept = {**context(), "settings": vars(arguments), "parameters": parameters, "runs": runs}
        write(NAME, kept)
    for name, run in kept["runs"].items():
        print(f"{name:9} loss {run['loss']:.4f}  held-out accuracy {run['accuracy']:.4f}  {run['seconds']:.0f} s")
    print(draw(kept["runs"]))


def train(updates: int, amsbound: bool, bounded: bool) -> dict[str, Any]:
    """Train once: curves of the step lengths, the loss over the last tenth and the held-out accuracy."""
    begin = time.perf_counter()
    torch.manual_seed(0)
    inputs, labels = digits()
    images, n = inputs.view(-1, 1, 8, 8), len(labels) * 4 // 5
    network = resnet()
    gamma = handover_gamma(HANDOVER, updates) if bounded else NEVER
    parts = [{"params": group} for group in groups(network).values()]
    optimizer = AdaBound(parts, lr=LR, final_lr=FINAL_LR, gamma=gamma, amsbound=amsbound)
    looked_at = set(np.geomspace(1, updates, 50).round().astype(int).tolist())
    curves: list[dict[str, float]] = []
    losses = []
    for update in range(1, updates + 1):
        rows = torch.randint(n, (BATCH,))
        optimizer.zero_grad()
        loss = cross_entropy(network(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if update in looked_at:
            curves.append({"update": update, **rounded(report(optimizer, GROUPS))})
    network.eval()
    with torch.no_grad():
        right = network(images[n:]).argmax(1) == labels[n:]
    return {
        "curves": curves,
        "loss": round(float(np.mean(losses[-updates // 10 :])), 5),
        "accuracy": round(right.float().mean().item(), 4),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def draw(runs: dict[str, dict[str, Any]]) -> Any:
    figure, axes = panels(len(runs) * len(GROUPS), len(GROUPS), 4.2, 2.9)
    for line, (name, run) in zip(np.reshape(axes, (len(runs), -1)), runs.items(), strict=True):
        x = [point["update"] for point in run["curves"]]
        for index, (axis, group) in enumerate(zip(line, GROUPS, strict=True)):
            of: Callable[[str], list[float]] = lambda key, run=run, group=group: [  # noqa: E731
                point[f"effective_step_{group}_{key}"] for point in run["curves"]
            ]
            axis.fill_between(x, of("q05"), of("q95"), color=f"C{index}", alpha=0.3, linewidth=0, label="5 to 95 %")
            axis.plot(x, of("q50"), color=f"C{index}", label="median")
            if OPTIMIZERS[name]["bounded"]:
                axis.plot(x, of("lower"), color="0.4", linestyle=":", label="bounds")
                axis.plot(x, of("upper"), color="0.4", linestyle=":")
            axis.set(xscale="log", yscale="log", ylim=(1e-3, 1e2), xlabel="update", ylabel="step length")
            axis.set_title(f"{name}: {group}", loc="left", fontsize=10)
            axis.legend(fontsize=7, frameon=False, loc="upper right")
    return save(figure, NAME)


if __name__ == "__main__":
    main()
