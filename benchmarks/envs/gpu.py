"""What a GPU reaches on MuJoCo Warp, against the number of worlds: physics, environments, acting, and whole training.

Four rates in environment steps per second, each beside the one before it in the same process:
    physics    frame_skip substeps of all worlds
    task       the environments' step: physics, observations, rewards, ends, and resets
    policy     rollouts: the same with a policy of two layers of 64 that samples actions, kept in the buffer
    npg, ppo, pes   whole iterations
With them the memory at its peak, and how often the host waited in an iteration, by CUDA's own count. Rates are medians
of turns; on a GPU the first turns record graphs and do not count. What fails says so in a line, and the rest goes on.

--ways N measures, for N worlds of the first task, rollouts and NPG's update each way that they may be launched: kernel
by kernel (eager), as graphs, compiled by torch.compile, and compiled within graphs. Of a rollout policy and task are
compiled, of the update what can be. Nothing of the package is compiled otherwise.

On the CPU it runs too, on Warp's single core: it shows then that it works, and no more.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from agents import NPG, PES, PPO, Agent, npg
from agents.devices import Recorded
from agents.natural import masked
from benchmarks.common import context, installed, read, write
from envs import make_vec

NAME = "envs/gpu"
WARM_UP = 3
"""Turns that do not count; of what is compiled, and compiled anew for what it meets, four times as many."""
AGENTS: dict[str, tuple[type[Agent], Callable[[int], dict[str, Any]]]] = {
    "npg": (NPG, lambda n: {"n_steps": 32}),
    "ppo": (PPO, lambda n: {"n_steps": 32, "batch_size": 32 * n // 8, "n_epochs": 4}),
    "pes": (PES, lambda n: {"n_steps": 20}),
}
"""Name -> algorithm and its settings for n worlds."""
COMPILED = ((npg, "advantages"), (npg, "report_step"), (masked, "conjugate_gradient"), (masked, "match_kl"))
"""Functions of an update that torch.compile is tried on; the capture of scores, by hooks, it cannot follow."""
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worlds", type=int, nargs="*", help="default: 256 to 16384 on a GPU, 64 on the CPU")
    parser.add_argument("--tasks", nargs="*", default=["HalfCheetah-v5", "Hopper-v5", "Ant-v5"])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each rate")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no other number of worlds begins")
    parser.add_argument("--ways", type=int, help="measure ways of launching, in place of rates, with so many worlds")
    parser.add_argument("--trace", help="file for a timeline of one NPG iteration's kernels, in place of rates")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    worlds_asked = arguments.worlds or ([4096, 256, 1024, 8192, 16384] if device.type == "cuda" else [64])
    if arguments.trace:
        trace(arguments.tasks[0], worlds_asked[0], device, arguments.trace)
    elif arguments.ways:
        keep(device, "ways", ways(arguments.tasks[0], arguments.ways, device, arguments.seconds))
    else:
        rates(arguments.tasks, worlds_asked, device, arguments.seconds, 60 * arguments.minutes)


def rates(tasks: list[str], worlds_asked: list[int], device: torch.device, seconds: float, budget: float) -> None:
    """Measure tasks with numbers of worlds until so many seconds are spent, and write what there is after each."""
    begin, rows = time.monotonic(), []
    for worlds in worlds_asked:
        for env_id in tasks:
            if time.monotonic() - begin > budget:
                print("the minutes are spent; --minutes gives more")
                return
            row: Row = {"env": env_id, "worlds": worlds}
            with attempt(row, "environments"):
                measure(row, device, seconds)
            rows.append(row)
            print(f"{env_id} {worlds}: {shown(row)}", flush=True)
            keep(device, "rows", rows)


def keep(device: torch.device, part: str, found: Any) -> None:
    """Write a part of the results, beside the others."""
    name = NAME if device.type == "cuda" else f"{NAME}_{device.type}"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {**context(), **installed("mujoco-warp", "warp-lang"), "device": gpu}
    write(name, {**(read(name) or {}), **about, part: found})


def shown(row: Row) -> str:
    return "  ".join(f"{key} {value:,.4g}" for key, value in row.items() if isinstance(value, float))


@contextlib.contextmanager
def attempt(row: Row, name: str) -> Iterator[None]:
    """Go on after an error, which a line and the row tell."""
    try:
        yield
    except Exception as error:  # what a GPU does for the first time may fail in any way
        row[f"{name} failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        print(f"{row.get('env')} {row.get('worlds')} {name} FAILED: {row[f'{name} failed']}", flush=True)


def measure(row: Row, device: torch.device, seconds: float) -> None:
    """Measure one task with so many worlds, into the row."""
    env_id, worlds = row["env"], row["worlds"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    env = make_vec(env_id, worlds, backend="warp", device=device, seed=0)
    env.reset()
    actions = torch.rand(worlds, *env.single_action_space.shape, device=device) * 2 - 1  # type: ignore[misc]
    row["physics"] = worlds * rate(env._substeps, device, seconds)  # type: ignore[attr-defined]
    row["task"] = worlds * rate(lambda: env.step(actions), device, seconds)
    for name, (kind, settings) in AGENTS.items():
        with attempt(row, name):
            agent = agent_of(env_id, worlds, device, kind, settings(worlds))
            iterations = agent.iterations(10**12)
            next(iterations)
            if name == "npg":
                row["policy"] = worlds * 32 * rate(fills(agent), device, seconds)
            before, turns = agent.num_timesteps, Turns()
            per_second = rate(lambda it=iterations, t=turns: t.count(next(it)), device, seconds)
            row[name] = (agent.num_timesteps - before) / turns.made * per_second
            if name == "npg":
                row["npg/physics"] = row["npg"] / row["physics"]
            if device.type == "cuda":
                row[f"{name} waits"] = float(min(waits(lambda it=iterations: next(it)) for _ in range(2)))
    if device.type == "cuda":
        row["GiB"] = torch.cuda.max_memory_allocated(device) / 2**30


def ways(env_id: str, worlds: int, device: torch.device, seconds: float) -> Row:
    """Measure each way to launch a rollout of 32 steps and an update, in rollouts and updates a second."""
    row: Row = {"env": env_id, "worlds": worlds}
    compiles = [False, True]
    if device.type != "cuda" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        print("torch.compile is left out, for there is no C++ compiler here")
        compiles = [False]
    for compiled in compiles:
        agent: Any = agent_of(env_id, worlds, device, NPG, {"n_steps": 32})
        next(agent.iterations(10**12))
        steps, task = agent.collector.steps, agent.collector.vector.task
        parts = [(task, "observe"), (task, "reward"), (steps, "act"), *COMPILED]
        with contextlib.ExitStack() as stack:
            for owner, name in parts if compiled else ():
                stack.enter_context(patch.dict(vars(owner), {name: torch.compile(getattr(owner, name))}))
            for graphs in (False, True) if device.type == "cuda" else (False,):
                way = " in ".join(["compiled"] * compiled + ["graphs"] * graphs) or "eager"
                for name, work in launched(agent, graphs).items():
                    with attempt(row, f"{name}, {way}"):
                        row[f"{name}, {way}"] = rate(work, device, seconds, WARM_UP * (4 if compiled else 1))
                print(shown({name: value for name, value in row.items() if name.endswith(f", {way}")}), flush=True)
    return row


def launched(agent: Any, graphs: bool) -> dict[str, Callable[[], object]]:
    """Give an agent's rollouts and updates as work that is recorded as graphs or launched kernel by kernel."""
    steps, last = agent.collector.steps, agent.collector.rollout.last_observations
    steps.step = Recorded(steps._step, steps._read) if graphs else steps._step
    update = Recorded(agent._update_again, agent._memory) if graphs else agent._update_again
    target = 0.01 if agent.device.type == "cpu" else torch.tensor(0.01, dtype=torch.float64, device=agent.device)
    return {"rollouts/s": fills(agent), "updates/s": torch.no_grad()(lambda: update(None, target, last))}


def fills(agent: Any) -> Callable[[], object]:
    """Give work that collects one rollout after another."""
    count = iter(range(1, 10**9))
    return lambda: agent.collector.fill(next(count))


class Turns:
    """Counts what was done."""

    made = 0

    def count(self, done: object) -> None:
        self.made += 1


def agent_of(env_id: str, worlds: int, device: torch.device, kind: type[Agent], settings: dict[str, Any]) -> Agent:
    env = make_vec(env_id, worlds, backend="warp", device=device, seed=0, autoreset=kind.autoreset)
    return kind("MlpPolicy", env, seed=0, device=device, net_arch=(64, 64), **settings)


def rate(work: Callable[[], object], device: torch.device, seconds: float, warm_up: int = WARM_UP) -> float:
    """Give how often a second work is done: the median of turns in so many seconds."""
    found, goes = [], turns(work, device)
    for _ in range(warm_up):
        next(goes)
    begin = time.perf_counter()
    while not found or time.perf_counter() - begin < seconds:
        found.append(next(goes))
    return 1 / median(found)


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
    for _ in range(WARM_UP + 2):  # by then graphs are recorded
        next(iterations)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as profiler:
        next(iterations)
    profiler.export_chrome_trace(path)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=20))


if __name__ == "__main__":
    main()
