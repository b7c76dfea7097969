"""Where the time of an NPG iteration goes, stage by stage, with the presets.

Timers are wrapped around the package's functions from here; a stage's time is that of its functions without the stages
inside them, and what no stage covers is "rest". The same iterations are timed without timers too, in turns of one
iteration each, to show what the timers cost. Medians over iterations.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import agents.noise
import agents.npg
import agents.policy.actor_critic
from agents import NPG
from agents.natural.critic_fits import GaussNewton
from agents.natural.curvature import Curvature
from agents.rollout.buffer import Rollout
from agents.rollout.collector import Collector
from benchmarks.common import context, panels, save, write
from envs.mujoco.batch import BatchPhysics, MujocoVectorEnv
from envs.mujoco.physics import ThreadedPhysics

NAME = "natural/iteration"
TASKS = ("Hopper-v5", "HalfCheetah-v5")
STAGES = {
    "physics": "#123f73",
    "observing, rewarding": "#2f6fb0",
    "resets": "#6f9fd0",
    "acting": "#a9cbe8",
    "buffer": "#d3e4f3",
    "advantages": "#1f6b45",
    "capture": "#3f9a5f",
    "conjugate gradients": "#7dbf8e",
    "KL correction": "#bfe0c6",
    "critic": "#d1741f",
    "normalizer": "#edb27a",
    "callbacks, logging": "#8e5bb5",
    "rest": "#bbbbbb",
}
"""Stage -> color; collecting is blue, the policy's update green."""


class Timers:
    """Exclusive seconds per stage of the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.enabled = False
        self._inner = [0.0]

    def wrap(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            if not self.enabled:
                return function(*arguments, **options)
            self._inner.append(0.0)
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                elapsed = time.perf_counter() - begin
                self.seconds[stage] += elapsed - self._inner.pop()
                self._inner[-1] += elapsed

        return run

    def install(self, owner: Any, name: str, stage: str) -> None:
        setattr(owner, name, self.wrap(getattr(owner, name), stage))


POLICY = agents.policy.actor_critic.ActorCriticPolicy
WRAPPED: dict[str, tuple[tuple[Any, tuple[str, ...]], ...]] = {
    "physics": ((BatchPhysics, ("step",)), (ThreadedPhysics, ("step",))),
    "observing, rewarding": ((MujocoVectorEnv, ("step",)),),
    "resets": ((MujocoVectorEnv, ("_begin_episodes",)),),
    "acting": ((POLICY, ("to_environment",)), (agents.noise, ("action_noise",))),
    "buffer": ((Rollout, ("add", "add_final", "clear")),),
    "callbacks, logging": ((Collector, ("_take",)), (NPG, ("_record", "record"))),
    "advantages": ((agents.npg, ("advantages", "standardize")),),
    "capture": ((agents.npg, ("scores",)),),
    "conjugate gradients": ((Curvature, ("direction",)),),
    "KL correction": ((agents.npg, ("match_kl", "report_step")),),
    "critic": ((GaussNewton, ("fit",)),),
    "rest": ((NPG, ("train",)),),
    "normalizer": ((POLICY, ("update_normalizer",)),),
}
"""Stage -> the owners and names of its functions; what the policy's sampler returns is timed as acting besides."""


def install(timers: Timers) -> None:
    for stage, functions in WRAPPED.items():
        for owner, names in functions:
            for name in names:
                timers.install(owner, name, stage)
    make_sampler = POLICY.sampler
    POLICY.sampler = lambda self: timers.wrap(make_sampler(self), "acting")  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--iterations", type=int, default=60, help="timed ones; as many run without timers")
    parser.add_argument("--warm-up", type=int, default=40, help="iterations before, in which the policy learns")
    arguments = parser.parse_args()
    timers = Timers()
    install(timers)
    rows = []
    for env_id in arguments.tasks:
        row = measure(env_id, timers, arguments.iterations, arguments.warm_up)
        rows.append(row)
        print(
            f"\n{env_id}: {1e3 * row['iteration']:.1f} ms per iteration of {row['steps']} steps, "
            f"{row['steps'] / row['iteration']:.0f} steps/s ({1e3 * row['without_timers']:.1f} ms without timers)"
        )
        for stage, seconds in row["stages"].items():
            print(f"  {stage:22}{1e3 * seconds:9.2f} ms {100 * seconds / row['iteration']:6.1f} %")
    print(write(NAME, {**context(), "torch_threads": torch.get_num_threads(), "rows": rows}))
    print(plot(rows))


def measure(env_id: str, timers: Timers, iterations: int, warm_up: int) -> dict[str, Any]:
    """Measure median seconds of an iteration, of each stage in it, and of an iteration without timers."""
    config = NPG.preset(env_id)
    agent = NPG("MlpPolicy", env_id, seed=0, device="cpu", **dataclasses.asdict(config))
    steps = config.num_envs * config.n_steps
    timed: list[dict[str, float]] = []
    plain: list[float] = []
    begin = time.perf_counter()
    for iteration in agent.iterations((warm_up + 2 * iterations) * steps):
        elapsed = time.perf_counter() - begin
        if timers.enabled:
            covered = sum(timers.seconds.values())
            timed.append({**timers.seconds, "rest": timers.seconds["rest"] + elapsed - covered, "all": elapsed})
        elif iteration > warm_up:
            plain.append(elapsed)
        timers.enabled = iteration >= warm_up and not timers.enabled
        timers.seconds = dict.fromkeys(STAGES, 0.0)
        begin = time.perf_counter()
    timers.enabled = False
    agent.env.close()
    return {
        "env_id": env_id,
        "settings": dataclasses.asdict(config),
        "steps": steps,
        "iteration": statistics.median(sample["all"] for sample in timed),
        "without_timers": statistics.median(plain),
        "stages": {stage: statistics.median(sample[stage] for sample in timed) for stage in STAGES},
        "iterations": timed,
    }


def plot(rows: list[dict[str, Any]]) -> Any:
    figure, (axis,) = panels(1, 1, 9.5, 1.3 + 1.0 * len(rows))
    for place, row in enumerate(reversed(rows)):
        whole, left = sum(row["stages"].values()), 0.0
        for stage, color in STAGES.items():
            share = 100 * row["stages"][stage] / whole
            label = stage if place == 0 else None
            axis.barh(place, share, left=left, color=color, height=0.6, label=label, edgecolor="white", linewidth=0.5)
            if share >= 3:
                light = sum(bytes.fromhex(color[1:])) > 3 * 140
                axis.text(
                    left + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=9,
                    color="#222222" if light else "white",
                )  # fmt: skip
            left += share
    labels = [f"{row['env_id']}\n{1e3 * row['iteration']:.0f} ms" for row in reversed(rows)]
    axis.set_yticks(range(len(rows)), labels)
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of an iteration")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False, fontsize=8.5)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
