"""Whether policies learn in MuJoCo Warp as they do in MuJoCo: the same settings and seeds on both backends.

Each run trains on one core and is evaluated in MuJoCo itself at equal shares of its steps (16 deterministic episodes),
whichever backend it trains on. Beside the curves stands what actions drawn uniformly at random return. Finished runs
are kept by task, algorithm, backend, seed and versions, so that the table grows over several calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
import torch

from agents import NPG, PES, PPO, Agent
from agents.run.evaluation import evaluate
from benchmarks.common import as_json, context, installed, keep, missing, panels, read, save
from envs import make_vec

NAME = "envs/warp_learning"
ALGORITHMS: dict[str, type[Agent]] = {"npg": NPG, "ppo": PPO, "pes": PES}
POLICIES = {"pes": "LinearPolicy"}
RUNS: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {
    ("InvertedPendulum-v5", "npg"): (120_000, {"num_envs": 64}),
    ("InvertedPendulum-v5", "ppo"): (120_000, {"num_envs": 64, "n_steps": 64, "batch_size": 512}),
    ("InvertedPendulum-v5", "pes"): (120_000, {}),
    ("HalfCheetah-v5", "npg"): (400_000, {}),
    ("HalfCheetah-v5", "ppo"): (400_000, {}),
    ("HalfCheetah-v5", "pes"): (640_000, {}),
}
"""Task and algorithm -> environment steps, and what differs from the preset."""
BACKENDS = ("mujoco", "warp")
COLORS = {"mujoco": "#555555", "warp": "#1f5fa8"}
POINTS = 10
EPISODES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=sorted({task for task, _ in RUNS}))
    parser.add_argument("--algorithms", nargs="*", default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--device", default="cpu", help="of Warp's worlds and their policies")
    parser.add_argument("--budget-minutes", type=float, default=30.0, help="after which no other run begins")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kind = torch.device(arguments.device).type
    place = NAME if kind == "cpu" else f"{NAME}_{kind}"
    kept = read(place) or {"runs": []}
    keys = [
        as_json({"env": env, "algorithm": name, "backend": backend, "seed": arguments.first_seed + k, "steps": steps})
        | {"settings": settings_of(env, name)}
        for k in range(arguments.seeds)
        for (env, name), (steps, _) in RUNS.items()
        if env in arguments.tasks and name in arguments.algorithms
        for backend in BACKENDS
    ]
    for key in missing(kept["runs"], keys, arguments.budget_minutes):
        run = {**key, **context(), **installed("mujoco-warp", "warp-lang"), **train(key, arguments.device)}
        keep(place, kept, run, key)
        print(told(run), flush=True)
    for run in sorted(kept["runs"], key=lambda run: (run["env"], run["algorithm"], run["seed"], run["backend"])):
        print(told(run))
    if kept["runs"]:
        print(plot(kept["runs"], place))


def settings_of(env_id: str, name: str) -> dict[str, Any]:
    """Give the hyperparameters of an algorithm for a task, as they are read from a file."""
    _, own = RUNS[env_id, name]
    return as_json(dataclasses.asdict(dataclasses.replace(ALGORITHMS[name].preset(env_id), **own)))


def train(key: dict[str, Any], device: str) -> dict[str, Any]:
    """Train once: (steps, mean return in MuJoCo) on the way, and what random actions return."""
    algorithm, settings = ALGORITHMS[key["algorithm"]], dict(key["settings"])
    where = {"device": device} if key["backend"] == "warp" else {}
    env = make_vec(
        key["env"],
        settings.pop("num_envs"),
        backend=key["backend"],
        seed=key["seed"],
        autoreset=algorithm.autoreset,
        **where,
    )
    policy = POLICIES.get(key["algorithm"], "MlpPolicy")
    agent = algorithm(policy, env, seed=key["seed"], device=where.get("device", "cpu"), **settings)
    judge = make_vec(key["env"], EPISODES, autoreset="disabled", num_threads=1)
    space = judge.single_action_space
    space.seed(key["seed"])
    random = evaluate(Random(space), judge, EPISODES, 10_000).mean
    curve: list[tuple[int, float]] = []
    begin, judged = time.process_time(), 0.0
    for _ in agent.iterations(key["steps"]):
        if agent.num_timesteps * POINTS >= key["steps"] * (len(curve) + 1) or agent.num_timesteps >= key["steps"]:
            paused = time.process_time()
            curve.append((agent.num_timesteps, round(evaluate(agent, judge, EPISODES, 10_000).mean, 1)))
            judged += time.process_time() - paused
    seconds = time.process_time() - begin - judged
    env.close()
    judge.close()
    return {"curve": curve, "random": round(random, 1), "steps_per_cpu_second": round(agent.num_timesteps / seconds)}


class Random:
    """Acts uniformly at random."""

    def __init__(self, space: Any) -> None:
        self.space = space

    def act(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        return torch.as_tensor(np.stack([self.space.sample() for _ in obs]))


def told(run: dict[str, Any]) -> str:
    curve = " ".join(f"{value:.0f}" for _, value in run["curve"])
    who = f"{run['env']:20} {run['algorithm']:4} {run['backend']:7} seed {run['seed']}"
    return f"{who}  random {run['random']:.0f}  {curve}  ({run['steps_per_cpu_second']:,} steps/s)"


def plot(runs: list[dict[str, Any]], place: str) -> Any:
    from matplotlib.ticker import EngFormatter

    shown = [key for key in RUNS if any((run["env"], run["algorithm"]) == key for run in runs)]
    figure, axes = panels(len(shown), 3, 3.6, 2.9)
    for axis, (env, name) in zip(axes, shown, strict=True):
        for run in runs:
            if (run["env"], run["algorithm"]) == (env, name):
                steps, returns = zip(*run["curve"], strict=True)
                axis.plot(steps, returns, color=COLORS[run["backend"]], linewidth=1.3, alpha=0.85)
        random = np.mean([run["random"] for run in runs if run["env"] == env])
        axis.axhline(random, color="#999999", linewidth=0.9, linestyle=":")
        axis.set(title=f"{env}, {name.upper()}", xlabel="environment steps", ylabel="return in MuJoCo")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    names = {"mujoco": "trained in MuJoCo", "warp": "trained in MuJoCo Warp"}
    lines = [axes[0].plot([], [], color=COLORS[backend], label=name)[0] for backend, name in names.items()]
    lines += axes[0].plot([], [], color="#999999", linestyle=":", label="random actions")
    figure.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False)
    return save(figure, place)


if __name__ == "__main__":
    main()
