"""What a GPU reaches on MuJoCo Warp, against the number of worlds: physics, environments, acting, and whole training.

Four rates in environment steps per second, each beside the one before it in the same process:
    physics    frame_skip substeps of all worlds
    task       the environments' step: physics, observations, rewards, ends, and resets
    policy     rollouts: the same with a policy of two layers of 64 that samples actions, kept in the buffer
    npg, ppo, pes   whole iterations
With them the memory at its peak, and how often the host waited in an iteration, by CUDA's own count. Rates are medians
of turns; on a GPU the first turns record graphs and do not count. On the CPU it runs too, on Warp's single core: it
shows then that it works, and no more.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from agents import NPG, PES, PPO, Agent
from benchmarks.common import context, installed, write
from envs import make_vec

NAME = "envs/gpu"
WARM_UP = 3
"""Turns that do not count."""
AGENTS: dict[str, tuple[type[Agent], Callable[[int], dict[str, Any]]]] = {
    "npg": (NPG, lambda n: {"n_steps": 32}),
    "ppo": (PPO, lambda n: {"n_steps": 32, "batch_size": 32 * n // 8, "n_epochs": 4}),
    "pes": (PES, lambda n: {"n_steps": 20}),
}
"""Name -> algorithm and its settings for n worlds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worlds", type=int, nargs="*", help="default: 256 to 16384 on a GPU, 64 on the CPU")
    parser.add_argument("--tasks", nargs="*", default=["HalfCheetah-v5", "Hopper-v5", "Ant-v5"])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each rate")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no other number of worlds begins")
    parser.add_argument("--trace", help="file for a timeline of one NPG iteration's kernels, to open in Perfetto")
    arguments = parser.parse_args()
    device, deadline, rows = torch.device(arguments.device), time.monotonic() + 60 * arguments.minutes, []
    worlds_asked = arguments.worlds or ([256, 1024, 4096, 8192, 16384] if device.type == "cuda" else [64])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for env_id in arguments.tasks:
        for worlds in worlds_asked:
            if time.monotonic() > deadline:
                print("the minutes are spent; --minutes gives more")
                break
            row = {"env": env_id, "worlds": worlds, **measure(env_id, worlds, device, arguments.seconds)}
            rows.append(row)
            shown = (f"{key} {value:,.4g}" for key, value in row.items() if isinstance(value, float))
            print(f"{env_id} {worlds}:", "  ".join(shown), flush=True)
            results = {**context(), **installed("mujoco-warp", "warp-lang"), "device": name, "rows": rows}
            write(NAME if device.type == "cuda" else f"{NAME}_{device.type}", results)
    if arguments.trace:
        trace(arguments.tasks[0], worlds_asked[0], device, arguments.trace)


def measure(env_id: str, worlds: int, device: torch.device, seconds: float) -> dict[str, float]:
    """Measure one task with so many worlds."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    env = make_vec(env_id, worlds, backend="warp", device=device, seed=0)
    env.reset()
    actions = torch.rand(worlds, *env.single_action_space.shape, device=device) * 2 - 1  # type: ignore[misc]
    row = {
        "physics": worlds * rate(env._substeps, device, seconds),  # type: ignore[attr-defined]
        "task": worlds * rate(lambda: env.step(actions), device, seconds),
    }
    for name, (kind, settings) in AGENTS.items():
        agent = agent_of(env_id, worlds, device, kind, settings(worlds))
        iterations = agent.iterations(10**12)
        next(iterations)
        if name == "npg":
            count = iter(range(1, 10**9))
            row["policy"] = (
                worlds * 32 * rate(lambda agent=agent, k=count: agent.collector.fill(next(k)), device, seconds)
            )
        before, turns = agent.num_timesteps, Turns()
        per_second = rate(lambda it=iterations, t=turns: t.count(next(it)), device, seconds)
        row[name] = (agent.num_timesteps - before) / turns.made * per_second
        if name == "npg":
            row["npg/physics"] = row["npg"] / row["physics"]
        if device.type == "cuda":
            row[f"{name} waits"] = float(waits(lambda it=iterations: next(it)))
    if device.type == "cuda":
        row["GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


class Turns:
    """Counts what was done."""

    made = 0

    def count(self, done: object) -> None:
        self.made += 1


def agent_of(env_id: str, worlds: int, device: torch.device, kind: type[Agent], settings: dict[str, Any]) -> Agent:
    env = make_vec(env_id, worlds, backend="warp", device=device, seed=0, autoreset=kind.autoreset)
    return kind("MlpPolicy", env, seed=0, device=device, net_arch=(64, 64), **settings)


def rate(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Give how often a second work is done: the median of turns in so many seconds."""
    found = [spent for _, spent in zip(range(WARM_UP), turns(work, device), strict=False)]
    begin = time.perf_counter()
    for spent in turns(work, device):
        found.append(spent)
        if time.perf_counter() - begin > seconds and len(found) > WARM_UP:
            break
    return 1 / median(found[WARM_UP:])


def turns(work: Callable[[], object], device: torch.device) -> Iterator[float]:
    """Do work again and again; give the seconds of each turn, the device's included."""
    while True:
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield time.perf_counter() - begin


def waits(work: Callable[[], object]) -> int:
    """Count how often the host waits for the GPU in a turn."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def trace(env_id: str, worlds: int, device: torch.device, path: str) -> None:
    """Write a timeline of one NPG iteration."""
    from torch.profiler import ProfilerActivity, profile

    iterations = agent_of(env_id, worlds, device, NPG, {"n_steps": 32}).iterations(10**12)
    for _ in range(WARM_UP):
        next(iterations)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as profiler:
        next(iterations)
    profiler.export_chrome_trace(path)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=20))


if __name__ == "__main__":
    main()
