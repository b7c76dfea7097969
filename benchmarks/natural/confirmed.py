"""How much of the gain that updates foretell the next rollout confirms: the share of an update that is signal.

NPG trains with its defaults. Each update Δθ foretells the gain gᵀ Δθ, with the gradient g of the samples that chose it.
The samples of the next rollout, which did not, tell what the same Δθ gained, to first order: the mean of A ψᵀ Δθ over
them, A less its mean. The sum of the second over a hundred updates, by that of the first, is their share; it would be 1
with samples without end, and is 0 where updates follow noise. Its error is that of the mean of the second alone.

What it does not say: both take the critic's word for what comes later, so that a share may be the critic's error too.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import NPG
from agents.natural.curvature import NaturalGradient
from agents.natural.scores import Scores
from agents.policy.networks import parameter_vector
from benchmarks.common import context, keep, panels, read, save
from envs import make_vec

NAME = "natural/confirmed"
TASKS = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Humanoid-v5", "Ant-v5")
UPDATES = 100
"""In one share."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="*", default=TASKS)
    parser.add_argument("--steps", type=int, default=200_000, help="of a schedule of a million")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = read(NAME) or {"runs": []}
    for env in arguments.env:
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            key = {"env": env, "steps": arguments.steps, "seed": seed}
            run = {**key, **context(), "shares": measure(**key)}
            keep(NAME, kept, run, set(key))
            print(f"{env} seed {seed}: " + " ".join(f"{x['share']:.3f}±{x['error']:.3f}" for x in run["shares"]))
    print(plot(kept["runs"]))


def measure(env: str, steps: int, seed: int) -> list[dict[str, float]]:
    """Train, and give for each UPDATES updates the share confirmed, its standard error, and the return in training."""
    agent = NPG("MlpPolicy", make_vec(env, NPG.Config().num_envs, num_threads=1, seed=seed), seed=seed, device="cpu")
    direction, before = agent.curvature.direction, parameter_vector(agent.policy.actor)
    moved, gains, found = torch.zeros_like(before), [], []

    def watched(Psi: Scores, A: Tensor, rows: Tensor | None) -> NaturalGradient:
        """Weigh Δθ by the newest samples. Of those the importance weight, which is in A already, is 1."""
        T, N = agent.config.n_steps, agent.num_envs * agent.stage.new
        first = (agent.recent.taken - 1) % agent.recent.most * N
        newest = torch.arange(len(A)).view(T, -1)[:, first : first + N].flatten()
        newer = A[newest] - A[newest].mean()
        gains.append((newer * Psi.of(newest).matvec(moved)).mean().item())
        return direction(Psi, A, rows)

    agent.curvature.direction = watched  # type: ignore[method-assign]
    foretold = [0.0]
    with contextlib.closing(agent.iterations(1_000_000)) as iterations:  # type: ignore[type-var]
        for iteration in iterations:
            after = parameter_vector(agent.policy.actor)
            moved, before = after - before, after
            foretold.append(agent.told["predicted_gain"])
            if iteration % UPDATES == 0:
                confirmed, expected = np.array(gains[-UPDATES:]), np.array(foretold[-UPDATES - 1 : -1])
                found.append(
                    {
                        "steps": agent.num_timesteps,
                        "share": float(confirmed.sum() / expected.sum()),
                        "error": float(confirmed.std(ddof=1) / math.sqrt(UPDATES) / expected.mean()),
                        "return": float(
                            np.mean([episode["r"] for episode in agent.ep_info_buffer or ()] or [math.nan])
                        ),
                    }
                )
            if agent.num_timesteps >= steps:
                break
    return found


def plot(runs: list[dict[str, Any]]) -> str:
    figure, (axes,) = panels(1, 1, 6.4, 4.0)
    for color, env in enumerate(dict.fromkeys(run["env"] for run in runs)):
        for k, run in enumerate([run for run in runs if run["env"] == env]):
            steps, shares, errors = ([x[name] for x in run["shares"]] for name in ("steps", "share", "error"))
            label = env if k == 0 else None
            axes.errorbar(steps, shares, errors, label=label, color=f"C{color}", linewidth=1.4, elinewidth=0.7)
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("share of the foretold gain that is confirmed")
    axes.legend(frameon=False)
    return str(save(figure, NAME))


if __name__ == "__main__":
    main()
