"""How many environments and steps NPG's presets take: returns and rates of the settings around a preset.

Returns: full runs, `--jobs` at a time in processes of one thread each, then 16 deterministic episodes. Rates
(--rates): iterations of all settings in turn in one process, beside the environment layer of the same N alone. Finished
runs are kept in results/natural/rollout_size.json by task, configuration, seed and versions, and are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from benchmarks.common import as_json, context, is_same, keep, read, write

NAME = "natural/rollout_size"
EPISODES = 16
EVALUATION_SEED = 1000
GRID: dict[str, list[dict[str, Any]]] = {
    env: [{"num_envs": n, "n_steps": t} for n, t in pairs]
    for env, pairs in {
        "Hopper-v5": ((64, 128), (96, 128), (128, 64), (128, 96), (128, 128)),
        "HalfCheetah-v5": ((64, 64), (64, 128), (128, 32), (128, 64), (256, 32)),
    }.items()
}
"""What differs from the preset, which is among them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="Hopper-v5", choices=GRID)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--budget-minutes", type=float, default=30.0)
    parser.add_argument("--rates", action="store_true", help="measure rates, not returns")
    arguments = parser.parse_args()
    kept = {"runs": [], "rates": {}, **(read(NAME) or {})}
    if arguments.rates:
        kept["rates"][arguments.env] = {**context(), "rows": rates(arguments.env)}
        write(NAME, kept)
    else:
        collect_returns(kept, arguments)
    table(kept, arguments.env)


def config_of(env: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the preset's values but for the settings, as JSON values."""
    from agents import NPG

    return as_json({**dataclasses.asdict(NPG.preset(env)), **settings})


def collect_returns(kept: dict[str, Any], arguments: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    keys = [
        {"env": arguments.env, "steps": arguments.steps, "config": config_of(arguments.env, settings), "seed": seed}
        for seed in range(arguments.seeds)
        for settings in GRID[arguments.env]
    ]
    missing = [key for key in keys if not any(is_same(run, key) for run in kept["runs"])]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        futures = {pool.submit(run, deadline=deadline, **key): key for key in missing}
        for future in as_completed(futures):
            found = future.result()
            if found is not None:
                keep(NAME, kept, {**futures[future], **context(), **found}, futures[future])


def run(env: str, steps: int, config: dict[str, Any], seed: int, deadline: float) -> dict[str, Any] | None:
    """Make one full run; None after the deadline."""
    if time.monotonic() > deadline:
        return None
    import torch

    from agents import NPG
    from agents.run.evaluation import evaluate
    from envs import make_vec

    torch.set_num_threads(1)
    training = make_vec(env, config["num_envs"], num_threads=1, seed=seed)
    agent = NPG("MlpPolicy", training, seed=seed, device="cpu", **config).learn(steps)
    held_out = make_vec(env, EPISODES, autoreset="disabled", num_threads=1)
    result = evaluate(agent, held_out, EPISODES, EVALUATION_SEED)
    return {"mean": round(result.mean, 1)}


def rates(env: str, turns: int = 5, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Measure environment steps per second of training with each setting, medians over turns."""
    from agents import NPG
    from envs import make_vec

    agents = [NPG("MlpPolicy", env, seed=0, device="cpu", **config_of(env, settings)) for settings in GRID[env]]
    layers = {settings["num_envs"]: make_vec(env, settings["num_envs"], seed=0) for settings in GRID[env]}
    for layer in layers.values():
        layer.reset()
    found: dict[Any, list[float]] = {}
    for turn in range(turns + 1):
        for place, agent in enumerate(agents):
            begin, before = time.perf_counter(), agent.num_timesteps
            while time.perf_counter() - begin < seconds:
                agent.learn(1, reset_num_timesteps=False)
            if turn:
                found.setdefault(place, []).append((agent.num_timesteps - before) / (time.perf_counter() - begin))
        for count, layer in layers.items():
            actions = [layer.action_space.sample() for _ in range(16)]
            begin, steps = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                for action in actions:
                    layer.step(action)
                steps += 16 * count
            if turn:
                found.setdefault(("layer", count), []).append(steps / (time.perf_counter() - begin))
    medians = {name: round(statistics.median(values)) for name, values in found.items()}
    return [
        {"settings": settings, "rate": medians[place], "layer": medians["layer", settings["num_envs"]]}
        for place, settings in enumerate(GRID[env])
    ]


def table(kept: dict[str, Any], env: str) -> None:
    measured = {str(row["settings"]): row for row in kept["rates"].get(env, {}).get("rows", [])}
    for settings in GRID[env]:
        config = config_of(env, settings)
        means = [run["mean"] for run in kept["runs"] if is_same(run, {"env": env, "config": config}, versions=False)]
        row = measured.get(str(settings))
        rate = f"{row['rate']:7,} steps/s, {row['rate'] / row['layer']:.2f} of the layer" if row else ""
        values = " ".join(f"{mean:.0f}" for mean in sorted(means))
        median = f"{statistics.median(means):6.0f}" if means else "     -"
        print(f"{settings!s:38} median {median}  ({values})  {rate}")


if __name__ == "__main__":
    main()
