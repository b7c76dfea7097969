"""PPO with SGD, Adam, AdaBound, Muon, SOAP and others, and natural gradients: what each returns after the same tuning.

Every optimizer has three settings to be tuned among, on each task by itself, on a seed of its own: learning rates, and
for AdaBound and AMSBound the final step size too (None measures policy's and critic's own at the hand-over, which is
in the middle of training; "AdaBound, late" hands over at nine tenths of it). The best one is trained on fresh seeds.
All else is the same for all: BASE, with eps 1e-5 for those that have one, and a momentum of 0.9 for SGD.

In local time an optimizer's t begins anew with each rollout (Ellis et al. 2024): Adam's corrections, and AdaBound's
bounds too, which close within a rollout on a step size that is measured in each. Muon (torch.optim) moves matrices,
Adam with the same rate the rest; SOAP is pytorch-optimizer's, without weight decay (pip install -c constraints.txt -e
".[peers]"; left out where it is not installed). K-FAC and E-KFAC are `NPG` with that Fisher matrix on rollouts of the
same size, with PPO's discount and λ and NPG's own defaults for all else, the critic among it, and a KL that is tuned.

A run's score is the mean return of 16 episodes of the final policy without noise. Intervals are 95 % (bootstrap over
seeds, bias-corrected and accelerated); an optimizer is beside Adam where the interval of the difference of means holds
0 or lies above it. Finished runs are kept in results/optim/ppo_optimizers.json by task, optimizer, setting, seed, steps
and versions, and are not repeated; each says of which code it is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam, Muon, Optimizer

from agents import NPG, PPO
from agents.base import Agent
from agents.optim.adabound import AdaBound
from agents.run.evaluation import evaluate
from benchmarks.common import code_version, context, installed, interval, is_same, keep, missing, panels, read, save
from envs import make_vec

NAME = "optim/ppo_optimizers"
TASKS = ("Swimmer-v5", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
TUNING_SEED = 100
EPISODES = 16
EVALUATION_SEED = 1000
BASE: dict[str, Any] = {"num_envs": 32, "n_steps": 64, "batch_size": 256, "n_epochs": 5}
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "Swimmer-v5": {"gamma": 0.9999, "num_envs": 16, "n_steps": 256, "n_epochs": 10},
}
"""In place of BASE: Swimmer does not learn to swim with a shorter horizon."""

RATES = [{"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]
BOUNDED = [{"learning_rate": rate, "final_lr": final} for rate, final in ((1e-3, None), (3e-3, None), (3e-3, 1.0))]
LATE = "AdaBound, late"
"""AdaBound that hands over when nine tenths of the training are done."""
GRID: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"learning_rate": rate} for rate in (0.03, 0.1, 0.3)],
    "Adam": RATES,
    "AMSGrad": RATES,
    "AdaBound": BOUNDED,
    "AMSBound": BOUNDED,
    LATE: [{**settings, "handover": 0.9} for settings in RATES],
    # In local time Adam's corrections make steps about a fifth as long.
    "Adam, local time": [{"learning_rate": rate} for rate in (3e-3, 1e-2, 3e-2)],
    "AdaBound, local time": [
        {"learning_rate": rate, "handover": share} for rate, share in ((3e-3, 0.5), (1e-2, 0.5), (1e-2, 1.0))
    ],
    "Muon": RATES,
    "SOAP": RATES,
    "K-FAC": [{"target_kl": kl} for kl in (0.01, 0.02, 0.04)],
    "E-KFAC": [{"target_kl": kl} for kl in (0.01, 0.02, 0.04)],
}
"""Of AdaBound in local time the hand-over is a share of a rollout's updates."""
NATURAL = {"K-FAC": "kfac", "E-KFAC": "ekfac"}
"""Name -> NPG's fisher."""
AS_PPO: dict[str, Any] = {"gamma": 0.99, "gae_lambda": 0.95, "reused_rollouts": 0}
"""Settings of NPG that are not its defaults but PPO's, so that both learn from the same."""
# What PPO does not make by name itself.
OTHERS: dict[str, Callable[[list[nn.Parameter], float], Optimizer]] = {
    "SGD": lambda params, lr: SGD(params, lr=lr, momentum=0.9),
    "AMSGrad": lambda params, lr: Adam(params, lr=lr, eps=1e-5, amsgrad=True, fused=True),
}
# What knows matrices: over the layers' own parameters.
BY_LAYER: dict[str, Callable[[list[nn.Parameter], float], list[Optimizer]]] = {
    "Muon": lambda params, lr: [
        Muon([p for p in params if p.ndim == 2], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        Adam([p for p in params if p.ndim != 2], lr=lr, eps=1e-5),
    ],
    "SOAP": lambda params, lr: [soap(params, lr)],
}
COLORS = {
    "SGD": "#555555",
    "Adam": "#c0445e",
    "AMSGrad": "#e39a3b",
    "AdaBound": "#1f5fa8",
    "AMSBound": "#3f9a5f",
    LATE: "#6f9fd0",
    "Adam, local time": "#e08a9a",
    "AdaBound, local time": "#12355f",
    "Muon": "#7a4fa3",
    "SOAP": "#b48ad6",
    "K-FAC": "#8c5a2b",
    "E-KFAC": "#c79a5b",
}


def soap(params: list[nn.Parameter], lr: float) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(params, lr=lr, weight_decay=0.0, eps=1e-5)


class Layers:
    """Optimizers over the layers' own parameters, in the place of one over the flat vectors that they are views of."""

    defaults: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, agent: PPO, make: Callable[[list[nn.Parameter], float], list[Optimizer]], lr: float) -> None:
        self.flat = agent.flat
        self.params = [*agent.policy.actor.parameters(), *agent.policy.critic.parameters()]
        self.optimizers = make(self.params, lr)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        grads = self.flat.grad.split([p.numel() for p in self.params])
        for parameter, grad in zip(self.params, grads, strict=True):
            parameter.grad = grad.view_as(parameter)
        for optimizer in self.optimizers:
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--optimizers", nargs="*", default=list(GRID), choices=list(GRID))
    parser.add_argument("--steps", type=int, default=200_000, help="environment steps per run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-minutes", type=float, default=60.0)
    parser.add_argument("--plot", action="store_true", help="only the table and the figure of what is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kept = {"runs": [], **(read(NAME) or {})}
    if not arguments.plot:
        names = [
            name
            for name in arguments.optimizers
            if name != "SOAP" or installed("pytorch-optimizer")["pytorch-optimizer"]
        ]
        keys = wanted(kept["runs"], arguments.tasks, names, arguments.steps, arguments.seeds)
        for key in missing(kept["runs"], keys, arguments.budget_minutes):
            found = {**key, **context(), "code": code_version(), **run(**key)}
            keep(NAME, kept, found, key)
            print(
                f"{key['env_id']} {key['optimizer']} {key['settings']} seed {key['seed']}: {found['score']:.0f} in "
                f"{found['seconds']:.0f} s",
                flush=True,
            )
    rows = table(kept["runs"], arguments.steps)
    print(draw(rows))


def wanted(
    runs: list[dict[str, Any]], tasks: Iterable[str], names: Iterable[str], steps: int, seeds: int
) -> Iterator[dict[str, Any]]:
    """Yield arguments of `run`: first the tuning, then the settings that runs, which grow meanwhile, say are tuned,
    seeds outermost.
    """

    def key(env_id: str, name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        base = {**BASE, **TASK_SETTINGS.get(env_id, {})}
        return {
            "env_id": env_id, "optimizer": name, "settings": settings, "base": base, "seed": seed, "steps": steps
        }  # fmt: skip

    for env_id in tasks:
        for name in names:
            for settings in GRID[name]:
                yield key(env_id, name, settings, TUNING_SEED)
    for seed in range(seeds):
        for env_id in tasks:
            for name in names:
                yield key(env_id, name, tuned(runs, env_id, name, steps), seed)


def tuned(runs: list[dict[str, Any]], env_id: str, name: str, steps: int) -> dict[str, Any]:
    """Return the setting with the best score on the tuning seed."""
    place = {"env_id": env_id, "optimizer": name, "seed": TUNING_SEED, "steps": steps}
    best = max((run for run in runs if is_same(run, place, versions=False)), key=lambda run: run["score"])
    return best["settings"]


def run(
    env_id: str, optimizer: str, settings: dict[str, Any], base: dict[str, Any], seed: int, steps: int
) -> dict[str, Any]:
    """Train once; a run that a gradient which is not finite has stopped scores what it had reached."""
    begin = time.perf_counter()
    agent = made(env_id, optimizer, {**base, **settings}, seed)
    curve: list[float] = []
    stopped = None
    try:
        for _ in agent.iterations(steps):
            curve.append(round(agent.last_metrics.get("rollout/ep_rew_mean", 0.0), 1))
            if "local time" in optimizer:
                begin_local_time(agent.optimizer)
    except FloatingPointError as error:
        stopped = str(error)
    final = [group.get("final_lr") for group in agent.optimizer.param_groups] if isinstance(agent, PPO) else []
    agent.env.close()
    held_out = make_vec(env_id, EPISODES, autoreset="disabled")
    result = evaluate(agent, held_out, EPISODES, EVALUATION_SEED)
    held_out.close()
    return {
        "score": round(result.mean, 1),
        "curve": curve,
        "stopped": stopped,
        "final_lr": final,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def made(env_id: str, optimizer: str, options: dict[str, Any], seed: int) -> Agent:
    """Make the agent that a row of the table trains."""
    if optimizer in NATURAL:
        options = {name: value for name, value in options.items() if name not in ("batch_size", "n_epochs")}
        return NPG("MlpPolicy", env_id, seed=seed, device="cpu", fisher=NATURAL[optimizer], **AS_PPO | options)
    handover = options.pop("handover", 0.5)
    if "local time" in optimizer:
        # From a share of a rollout's updates to a number of them.
        updates = options["num_envs"] * options["n_steps"] // options["batch_size"] * options["n_epochs"]
        handover = handover * updates
    name = "sgd" if optimizer in OTHERS or optimizer in BY_LAYER else optimizer.partition(",")[0].lower()
    agent = PPO("MlpPolicy", env_id, seed=seed, device="cpu", optimizer=name, handover=handover, **options)
    if optimizer in OTHERS:
        agent.optimizer = OTHERS[optimizer](agent.flat.groups, options["learning_rate"])
    if optimizer in BY_LAYER:
        agent.optimizer = Layers(agent, BY_LAYER[optimizer], options["learning_rate"])  # type: ignore[assignment]
    return agent


def begin_local_time(optimizer: Optimizer) -> None:
    if isinstance(optimizer, AdaBound):
        optimizer.begin_local_time(measure_final_lr=True)
    else:
        for state in optimizer.state.values():
            state["step"].zero_()


def table(runs: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """List per task and optimizer the tuned setting, its scores, mean and interval, and the difference to Adam's."""
    rows = []
    for env_id in TASKS:
        scores = {}
        for name in GRID:
            place = {"env_id": env_id, "optimizer": name, "steps": steps}
            mine = [run for run in runs if is_same(run, place, versions=False)]
            if not any(run["seed"] == TUNING_SEED for run in mine):
                continue
            settings = tuned(runs, env_id, name, steps)
            fresh = [run for run in mine if run["seed"] != TUNING_SEED and run["settings"] == settings]
            if len(fresh) < 2:
                continue
            scores[name] = [run["score"] for run in sorted(fresh, key=lambda run: run["seed"])]
            row = {"env_id": env_id, "optimizer": name, "settings": settings, "scores": scores[name]}
            row |= {
                "mean": round(float(np.mean(scores[name])), 1),
                "interval": rounded(interval(np.mean, scores[name])),
            }
            rows.append(row)
        for row in (row for row in rows if row["env_id"] == env_id):
            if row["optimizer"] != "Adam" and "Adam" in scores:
                row["beyond_adam"] = rounded(interval(difference, row["scores"], scores["Adam"]))
    for row in rows:
        low, high = row["interval"]
        beyond = "" if "beyond_adam" not in row else " - Adam: {:+.0f} to {:+.0f}".format(*row["beyond_adam"])
        print(
            f"{row['env_id']:15} {row['optimizer']:14} {json.dumps(row['settings']):45} "
            f"{row['mean']:7.0f} ({low:.0f} to {high:.0f}){beyond}"
        )
    return rows


def rounded(ends: tuple[float, float]) -> list[float]:
    return [round(end, 1) for end in ends]


def difference(scores: np.ndarray, others: np.ndarray, axis: int = -1) -> Any:
    return np.mean(scores, axis=axis) - np.mean(others, axis=axis)


def draw(rows: list[dict[str, Any]]) -> Any:
    """Draw each task's means and intervals, and all seeds, an optimizer a line."""
    figure, axes = panels(len(TASKS), len(TASKS), 4.2, 4.6)
    places = {name: -k for k, name in enumerate(GRID)}
    for axis, env_id in zip(axes, TASKS, strict=True):
        for row in (row for row in rows if row["env_id"] == env_id):
            y, color = places[row["optimizer"]], COLORS[row["optimizer"]]
            axis.plot(row["interval"], [y, y], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axis.plot(row["scores"], [y] * len(row["scores"]), ".", color=color, markersize=5)
            axis.plot(row["mean"], y, "D", color=color, markersize=6)
            if row["optimizer"] == "Adam":
                axis.axvline(row["mean"], color=color, linewidth=0.9, linestyle=":")
        axis.set_yticks(list(places.values()), list(places) if axis is axes[0] else [""] * len(places))
        axis.set_title(env_id, loc="left", fontsize=11)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel("final return: mean, interval, seeds")
    return save(figure, NAME)


if __name__ == "__main__":
    main()
