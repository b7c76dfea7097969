"""How much of an update is signal: what directions from one batch gain per square root of KL, at a policy on its way.

NPG trains with its defaults for some steps and is then held fixed while it collects batches of the same size. Of every
batch a direction w is made for each damping and each λ of generalized advantage estimation. Its worth is

    ḡᵀ w / √(wᵀ F w),

the first-order gain of a step of KL ½, in standard deviations of an advantage: ḡ is the mean gradient of all other
batches with λ = 0.98, F is estimated from two of them. A step whose batch is noise is worth 0, whatever its KL.

What it does not say: ḡ takes the critic's word for what comes after a rollout's end, so that what a small λ wins here
may be the critic's error; and a direction that gains most now need not lead furthest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import NPG
from agents.natural.curvature import relative_damping
from agents.natural.kronecker import EigenKronecker, KroneckerCurvature
from agents.natural.scores import FactoredScores, scores
from agents.rollout.buffer import Rollout, advantages
from benchmarks.common import context, keep, panels, read, save
from envs import make_vec

NAME = "natural/signal"
TASKS = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5")
LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
DAMPINGS = (0.1, 1.0, 10.0, 100.0)
TRUTH = 0.98


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", nargs="*", default=TASKS)
    parser.add_argument("--steps", type=int, default=100_000, help="of training, in a schedule of a million")
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = read(NAME) or {"runs": []}
    for env in arguments.env:
        key = {"env": env, "steps": arguments.steps, "batches": arguments.batches, "seed": arguments.seed}
        run = {**key, **context(), "worth": measure(**key)}
        keep(NAME, kept, run, set(key))
        print(table(run), flush=True)
    print(plot(kept["runs"]))


def measure(env: str, steps: int, batches: int, seed: int) -> list[dict[str, float]]:
    """Give the mean worth of directions and its standard error, by λ and damping."""
    agent = NPG("MlpPolicy", make_vec(env, NPG.Config().num_envs, num_threads=1, seed=seed), seed=seed, device="cpu")
    rollouts = collect(agent, steps, batches)
    policy = agent.policy
    assert isinstance(agent.curvature, KroneckerCurvature)
    assert agent.curvature.running is not None
    bases = agent.curvature.running.bases
    with torch.no_grad():
        Psi = [scores(policy.actor, s, a)[0] for s, a, _ in rollouts]
        gradients: dict[float, Tensor] = {}
        for lam in LAMBDAS:
            A = torch.cat([estimates[lam] for _, _, estimates in rollouts])
            parts = ((A - A.mean()) / A.std()).split(len(rollouts[0][1]))
            gradients[lam] = torch.stack([x.gradient(part.float()) for x, part in zip(Psi, parts, strict=True)])
        total, found = gradients[TRUTH].sum(0), []
        for damping, lam in itertools.product(DAMPINGS, LAMBDAS):
            worth = []
            for k, x in enumerate(Psi):
                assert isinstance(x, FactoredScores)
                w = EigenKronecker(x, relative_damping(x, damping), bases).solve(gradients[lam][k])
                others = [Psi[(k + offset) % batches].matvec(w).square().mean().item() for offset in (7, 23)]
                rest = (total - gradients[TRUTH][k]) / (batches - 1)
                worth.append((rest @ w).item() / math.sqrt(sum(others) / len(others)))
            error = float(np.std(worth, ddof=1) / math.sqrt(batches))
            found.append({"lambda": lam, "damping": damping, "worth": float(np.mean(worth)), "error": error})
    return found


def collect(agent: NPG, steps: int, batches: int) -> list[tuple[Tensor, Tensor, dict[float, Tensor]]]:
    """Train for some steps; then give batches of the policy that there is.

    Returns:
        Normalized observations [n, O], actions [n, A] and advantages [n] by λ, of each batch.
    """
    found: list[tuple[Tensor, Tensor, dict[float, Tensor]]] = []
    update = agent.train

    @torch.no_grad()
    def train(batch: Rollout) -> None:
        if agent.num_timesteps < steps:
            return update(batch)
        s = agent.policy.normalize(batch["observations"].flatten(0, 1))
        values, gamma = agent.policy.critic(s), agent.config.gamma
        estimates = {lam: advantages(batch, values, agent.policy, gamma, lam)[0] for lam in LAMBDAS}
        return found.append((s.clone(), batch["actions"].flatten(0, 1).clone(), estimates))

    agent.train = train  # type: ignore[method-assign]
    with contextlib.closing(agent.iterations(1_000_000)) as iterations:  # type: ignore[type-var]
        for _ in iterations:
            if len(found) == batches:
                break
    return found


def table(run: dict[str, Any]) -> str:
    lines = [f"{run['env']} after {run['steps']:,} steps: worth by λ (across) and damping"]
    lines.append("         " + " ".join(f"{lam:>7}" for lam in LAMBDAS))
    for damping in DAMPINGS:
        row = {x["lambda"]: x for x in run["worth"] if x["damping"] == damping}
        lines.append(f"{damping:>8} " + " ".join(f"{row[lam]['worth']:7.4f}" for lam in LAMBDAS))
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]]) -> str:
    figure, all_axes = panels(len(runs), len(runs), 4.2, 3.6)
    for axes, run in zip(all_axes, runs, strict=True):
        for damping in DAMPINGS:
            row = [x for x in run["worth"] if x["damping"] == damping]
            axes.errorbar(
                [x["lambda"] for x in row], [x["worth"] for x in row], [x["error"] for x in row], label=f"{damping:g}"
            )
        axes.set_title(f"{run['env']} after {run['steps'] // 1000}k", loc="left", fontsize=11)
        axes.set_xlabel("λ of the advantages")
        axes.set_ylabel("gain per √KL")
        axes.legend(title="damping", frameon=False)
    return str(save(figure, NAME))


if __name__ == "__main__":
    main()
