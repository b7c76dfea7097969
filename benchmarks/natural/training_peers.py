"""Whole training beside sb3-contrib's TRPO, tianshou's NPG and Stable-Baselines3's PPO: steps per second and returns.

--seconds S: all sides train in turn in one process, S seconds each time; medians over turns. Within its turn each
iteration of our preset is followed by the environment layer alone, which repeats the iteration's steps. --steps N: full
runs, then 16 deterministic episodes in Gymnasium's own environments (seeds 1000, 1001, ...; raw reward; each side's
observation statistics frozen). Finished runs are kept in results/natural/training_peers.json by side, task, seed,
steps, settings and versions, and are not repeated.

Every peer runs as its library recommends for these tasks; SETTINGS and benchmarks/peers.py name the sources.
EnvPool comes with pip install -c constraints.txt -e ".[peers]". tianshou 2.0 asks for a virtualenv that conflicts with
the pinned filelock, and does not import it; so it is installed without its dependencies, then those that it does
import:

    pip install --no-deps tianshou==2.0.1
    pip install -c constraints.txt h5py numba "overrides<8" "pandas<3" pettingzoo "deepdiff<8" sensai-utils
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents import NPG
from benchmarks.common import as_json, context, installed, keep, missing, panels, read, save, write
from benchmarks.peers import (
    ENDLESS,
    EPISODES,
    ZOO_PPO,
    ZOO_TRPO,
    Learner,
    Ours,
    draw_rates,
    draw_returns,
    full_run,
    in_turns,
    parse,
    sb3_ppo,
    sb3_trpo,
)
from envs import make_vec

NAME = "natural/training_peers"
TASKS = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5", "Swimmer-v5")
PRESET, LAYER = "ours, preset", "environment layer alone"

TIANSHOU_SETTINGS = {
    "hidden_sizes": [64, 64],
    "sigma_init": -0.5,
    "lr": 1e-3,
    "lr_decay": "linear",
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "n_envs": 16,
    "buffer_size": 4096,
    "epoch_num_steps": 30_000,
    "collection_step_num_env_steps": 1024,
    "return_scaling": True,
    "advantage_normalization": True,
    "optim_critic_iters": 20,
    "trust_region_size": 0.1,
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "sb3-contrib TRPO": ZOO_TRPO,
    "SB3 PPO": ZOO_PPO,
    # https://github.com/thu-ml/tianshou examples/mujoco/mujoco_npg.py: its defaults, one set for all tasks; 16
    # environments in ShmemVectorEnv, or in EnvPool where that is installed (examples/mujoco/mujoco_env.py).
    "tianshou NPG": {env_id: {**TIANSHOU_SETTINGS, "environments": "ShmemVectorEnv"} for env_id in TASKS},
    "tianshou NPG, EnvPool": {env_id: {**TIANSHOU_SETTINGS, "environments": "EnvPool"} for env_id in TASKS},
    PRESET: {env_id: dataclasses.asdict(NPG.preset(env_id)) for env_id in TASKS},
    "ours, default": {env_id: dataclasses.asdict(NPG.Config()) for env_id in TASKS},
}


class Tianshou:
    """tianshou's NPG as its example builds it; no test episodes during training."""

    def __init__(self, env_id: str, seed: int, total: int, settings: dict[str, Any]) -> None:
        from tianshou import algorithm as algorithms
        from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
        from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
        from tianshou.data import Batch, Collector, VectorReplayBuffer
        from tianshou.env import VectorEnvNormObs
        from tianshou.trainer import OnPolicyTrainer, OnPolicyTrainerParams
        from tianshou.utils.net.common import Net
        from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic

        self.batch = Batch
        single = gymnasium.make(env_id)
        shape, space = single.observation_space.shape, single.action_space
        assert isinstance(space, spaces.Box)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.env = VectorEnvNormObs(self._environments(env_id, seed, settings))
        hidden = settings["hidden_sizes"]
        body = Net(state_shape=shape, hidden_sizes=hidden, activation=nn.Tanh)
        actor = ContinuousActorProbabilistic(preprocess_net=body, action_shape=space.shape, unbounded=True)
        critic = ContinuousCritic(preprocess_net=Net(state_shape=shape, hidden_sizes=hidden, activation=nn.Tanh))
        nn.init.constant_(actor.sigma_param, settings["sigma_init"])
        for layer in [*actor.modules(), *critic.modules()]:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
                nn.init.zeros_(layer.bias)
        for layer in actor.mu.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data.mul_(0.01)
        collection, epoch = settings["collection_step_num_env_steps"], settings["epoch_num_steps"]
        decay = LRSchedulerFactoryLinear(math.ceil(total / epoch), epoch, collection)
        self.policy = ProbabilisticActorPolicy(
            actor=actor,
            dist_fn=lambda mean_std: torch.distributions.Independent(torch.distributions.Normal(*mean_std), 1),
            action_space=space,
            action_scaling=True,
            action_bound_method="clip",
            deterministic_eval=True,
        )
        self.algorithm = algorithms.NPG(
            policy=self.policy,
            critic=critic,
            optim=AdamOptimizerFactory(lr=settings["lr"]).with_lr_scheduler_factory(decay),
            **{
                name: settings[name]
                for name in (
                    "gamma",
                    "gae_lambda",
                    "return_scaling",
                    "advantage_normalization",
                    "optim_critic_iters",
                    "trust_region_size",
                )
            },
        )
        buffer = VectorReplayBuffer(settings["buffer_size"], settings["n_envs"])
        self.collector = Collector(self.algorithm, self.env, buffer, exploration_noise=True)
        # An epoch of one collection, so that training can pause after any; without a test collector an epoch's end
        # does nothing.
        self.trainer = OnPolicyTrainer(
            self.algorithm,
            OnPolicyTrainerParams(
                training_collector=self.collector,
                epoch_num_steps=collection,
                collection_step_num_env_steps=collection,
                batch_size=None,
                show_progress=False,
                verbose=False,
            ),
        )
        self.trainer.reset()

    @staticmethod
    def _environments(env_id: str, seed: int, settings: dict[str, Any]) -> Any:
        if settings["environments"] == "EnvPool":
            import envpool

            return envpool.make_gymnasium(env_id, num_envs=settings["n_envs"], seed=seed)
        from tianshou.env import ShmemVectorEnv

        environments = ShmemVectorEnv([partial(gymnasium.make, env_id)] * settings["n_envs"])
        environments.seed(seed)
        return environments

    def train(self, steps: int) -> int:
        before = self.collector.collect_step
        while self.collector.collect_step < before + steps:
            self.trainer.execute_epoch()
        return self.collector.collect_step - before

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        normalized = self.env.get_obs_rms().norm(obs.numpy())
        with torch.no_grad():
            actions = self.policy(self.batch(obs=normalized, info={})).act
        return torch.as_tensor(self.policy.map_action(actions))

    def close(self) -> None:
        self.env.close()


class EnvironmentLayer:
    """No learner: our environments alone, which repeat a learner's iteration from its first states with its actions."""

    def __init__(self, env_id: str, learner: Ours) -> None:
        self.learner = learner
        self.env = make_vec(env_id, learner.agent.n_envs, seed=0)

    def remember(self) -> None:
        """Remember, before the learner's iteration, the states that it begins in."""
        agent = self.learner.agent
        assert agent.env is not None
        if agent.num_timesteps == 0:
            self.learner.train(1)
        self.kept = agent.env.vector.snapshot()

    def follow(self) -> None:
        """Take, after it, the actions that it took, and go back to its first states."""
        agent = self.learner.agent
        self.actions = [agent.policy.to_environment(actions) for actions in agent.collector.rollout["actions"]]
        self.env.restore(self.kept)

    def train(self, steps: int) -> int:
        return sum(len(self.env.step(actions)[1]) for actions in self.actions)

    def close(self) -> None:
        self.env.close()


@dataclasses.dataclass(frozen=True)
class Side:
    """How a side starts, from (task, seed, total steps, settings), and the packages that it needs."""

    start: Callable[[str, int, int, dict[str, Any]], Learner]
    packages: tuple[str, ...]
    color: str


SIDES = {
    PRESET: Side(partial(Ours, NPG), (), "#1f5fa8"),
    "ours, default": Side(partial(Ours, NPG), (), "#6f9fd0"),
    "sb3-contrib TRPO": Side(sb3_trpo, ("sb3-contrib",), "#8e5bb5"),
    "SB3 PPO": Side(sb3_ppo, (), "#c0445e"),
    "tianshou NPG": Side(Tianshou, ("tianshou",), "#3f9a5f"),
    "tianshou NPG, EnvPool": Side(Tianshou, ("tianshou", "envpool"), "#93c47d"),
}


def main() -> None:
    arguments = parse(__doc__, TASKS, SIDES, seconds=3.0, seeds=5)
    warnings.simplefilter("ignore")
    kept = {"throughput": {}, "runs": [], **(read(NAME) or {})}
    sides = [name for name in arguments.sides if available(name)]
    if arguments.steps is not None:
        run_all(kept, arguments.tasks, sides, arguments.steps, arguments.seeds, arguments.budget_minutes)
    elif not arguments.plot:
        for env_id in arguments.tasks:
            timed_sides = sides if PRESET in sides else [PRESET, *sides]
            kept["throughput"][env_id] = throughput(env_id, timed_sides, arguments.turns, arguments.seconds)
            write(NAME, kept)
    for env_id, row in kept["throughput"].items():
        print_throughput(env_id, row)
    print_returns(kept["runs"])
    print(plot(kept))


def available(name: str) -> bool:
    absent = [package for package, found in installed(*SIDES[name].packages).items() if found is None]
    if absent:
        print(f"{name} is left out: {', '.join(absent)} not installed; --help says how to install")
    return not absent


def throughput(env_id: str, sides: list[str], turns: int, seconds: float) -> dict[str, Any]:
    """Measure each side's rate in every turn, in environment steps per second; turn k of all sides runs one after the
    other.
    """
    started = {name: SIDES[name].start(env_id, 0, ENDLESS, SETTINGS[name][env_id]) for name in sides}
    layer = EnvironmentLayer(env_id, started[PRESET])
    learners: dict[str, Any] = {PRESET: started[PRESET], LAYER: layer, **started}

    def prepare(name: str) -> None:
        if name == PRESET:
            layer.remember()
        elif name == LAYER:
            layer.follow()

    rates = in_turns(learners, turns, seconds, prepare, together=(PRESET, LAYER))
    return {
        **context(),
        "packages": installed(*{package for name in sides for package in SIDES[name].packages}),
        "torch_threads": torch.get_num_threads(),
        "settings": {name: SETTINGS[name][env_id] for name in sides},
        "seconds": seconds,
        "rates": rates,
    }


def run_all(
    kept: dict[str, Any], tasks: list[str], sides: list[str], steps: int, seeds: int, budget_minutes: float
) -> None:
    """Make full runs, seeds outermost, so that every side has about as many when the minutes are spent."""
    keys = [
        {
            "side": name,
            "env_id": env_id,
            "steps": steps,
            "seed": seed,
            "settings": as_json(SETTINGS[name][env_id]),
            "packages": installed(*SIDES[name].packages),
        }
        for seed in range(seeds)
        for env_id in tasks
        for name in sides
    ]
    for key in missing(kept["runs"], keys, budget_minutes):
        name, env_id = key["side"], key["env_id"]
        start = partial(SIDES[name].start, env_id, key["seed"], steps, SETTINGS[name][env_id])
        keep(NAME, kept, full_run(start, key), ("side", "env_id", "steps", "seed"))


def print_throughput(env_id: str, row: dict[str, Any]) -> None:
    rates = row["rates"]
    ours, layer = rates[PRESET], rates[LAYER]
    print(f"\n{env_id}: environment steps per second in training, medians of turns")
    for name, values in rates.items():
        ratio = f"  ours, preset / this {statistics.median(np.divide(ours, values)):6.2f}"
        share = statistics.median(np.divide(values, layer))
        print(f"  {name:26}{statistics.median(values):8.0f}{ratio}  this / environment layer {share:5.2f}")


def print_returns(runs: list[dict[str, Any]]) -> None:
    for (env_id, steps), sides in by_task(runs).items():
        print(f"\n{env_id} after {steps:,} steps: mean return of {EPISODES} deterministic episodes, per seed")
        for name, rows in sides.items():
            means = [row["mean"] for row in rows]
            listed = " ".join(f"{mean:.0f}" for mean in means)
            seconds = statistics.median(row["seconds"] for row in rows)
            print(f"  {name:26}median {statistics.median(means):7.0f}  ({listed})  median {seconds:.0f} s")


def by_task(runs: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, list[dict[str, Any]]]]:
    found: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for run in sorted(runs, key=lambda run: (TASKS.index(run["env_id"]), list(SIDES).index(run["side"]), run["seed"])):
        found.setdefault((run["env_id"], run["steps"]), {}).setdefault(run["side"], []).append(run)
    return found


def plot(kept: dict[str, Any]) -> Any:
    groups = by_task(kept["runs"])
    colors = {name: side.color for name, side in SIDES.items()}
    figure, axes = panels(len(kept["throughput"]) + len(groups), 2, 6.4, 3.4)
    free = iter(axes)
    for env_id, row in kept["throughput"].items():
        axis = next(free)
        draw_rates(axis, env_id, {name: row["rates"][name] for name in SIDES if name in row["rates"]}, colors)
        layer = statistics.median(row["rates"][LAYER])
        axis.axvline(layer, color="#333333", linestyle="--", linewidth=1.2, label=LAYER)
        axis.set_xlim(0, max(axis.get_xlim()[1], 1.15 * layer))
        axis.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    for (env_id, steps), sides in groups.items():
        returns = {name: [row["mean"] for row in rows] for name, rows in sides.items()}
        draw_returns(next(free), f"{env_id}, {steps:,} steps", returns, colors)
    return save(figure, NAME)


if __name__ == "__main__":
    main()
