"""Whole training beside sb3-contrib's TRPO, tianshou's NPG and Stable-Baselines3's PPO: steps per second and returns.

--seconds S: all sides train in turn in one process, S seconds each time; medians over turns. Within its turn each
iteration of our preset is followed by the environment layer alone, which repeats the iteration's steps. --steps N: full
runs, then 16 deterministic episodes in Gymnasium's own environments (seeds 1000, 1001, ...; raw reward; each side's
observation statistics frozen). Finished runs are kept in results/training_peers.json by side, task, seed, steps,
settings and versions, and are not repeated.

Every peer runs as its library recommends for these tasks; SETTINGS names the sources. EnvPool comes with
pip install -c constraints.txt -e ".[peers]". tianshou 2.0 asks for a virtualenv that conflicts with the pinned
filelock, and does not import it; so it is installed without its dependencies, then those that it does import:

    pip install --no-deps tianshou==2.0.1
    pip install -c constraints.txt h5py numba "overrides<8" "pandas<3" pettingzoo "deepdiff<8" sensai-utils
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol

import gymnasium
import numpy as np
import torch
from common import context, installed, keep, missing, panels, read, save, write
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from agents import NPG
from agents.run.evaluation import evaluate
from envs import make_vec

NAME = "training_peers"
TASKS = ("Hopper-v5", "HalfCheetah-v5")
EPISODES = 16
EVALUATION_SEED = 1000
PRESET, LAYER = "ours, preset", "environment layer alone"

TRPO_SETTINGS = {
    "n_envs": 2,
    "n_steps": 1024,
    "batch_size": 128,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "sub_sampling_factor": 1,
    "cg_max_steps": 25,
    "cg_damping": 0.1,
    "n_critic_updates": 20,
    "learning_rate": 1e-3,
}
PPO_POLICY = {"log_std_init": -2, "ortho_init": False, "activation_fn": "relu", "net_arch": [256, 256]}
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
    # https://github.com/DLR-RM/rl-baselines3-zoo hyperparams/trpo.yml: Hopper-v4 and HalfCheetah-v4 ("tuned"), with
    # "normalize: true", which is VecNormalize of observations and rewards.
    "sb3-contrib TRPO": {"Hopper-v5": TRPO_SETTINGS, "HalfCheetah-v5": {**TRPO_SETTINGS, "target_kl": 0.04}},
    # The same, hyperparams/ppo.yml: Hopper-v3 and HalfCheetah-v3 ("tuned").
    "SB3 PPO": {
        "Hopper-v5": {
            "n_envs": 1,
            "n_steps": 512,
            "batch_size": 32,
            "gamma": 0.999,
            "learning_rate": 9.80828e-05,
            "ent_coef": 0.00229519,
            "clip_range": 0.2,
            "n_epochs": 5,
            "gae_lambda": 0.99,
            "max_grad_norm": 0.7,
            "vf_coef": 0.835671,
            "policy_kwargs": PPO_POLICY,
        },
        "HalfCheetah-v5": {
            "n_envs": 1,
            "n_steps": 512,
            "batch_size": 64,
            "gamma": 0.98,
            "learning_rate": 2.0633e-05,
            "ent_coef": 0.000401762,
            "clip_range": 0.1,
            "n_epochs": 20,
            "gae_lambda": 0.92,
            "max_grad_norm": 0.8,
            "vf_coef": 0.58096,
            "policy_kwargs": PPO_POLICY,
        },
    },
    # https://github.com/thu-ml/tianshou examples/mujoco/mujoco_npg.py: its defaults, one set for all tasks; 16
    # environments in ShmemVectorEnv, or in EnvPool where that is installed (examples/mujoco/mujoco_env.py).
    "tianshou NPG": {env_id: {**TIANSHOU_SETTINGS, "environments": "ShmemVectorEnv"} for env_id in TASKS},
    "tianshou NPG, EnvPool": {env_id: {**TIANSHOU_SETTINGS, "environments": "EnvPool"} for env_id in TASKS},
    PRESET: {env_id: dataclasses.asdict(NPG.preset(env_id)) for env_id in TASKS},
    "ours, default": {env_id: dataclasses.asdict(NPG.Config()) for env_id in TASKS},
}


class Learner(Protocol):
    """A side at work."""

    def train(self, steps: int) -> int:
        """Go on training for at least so many environment steps; how many it took."""
        ...

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Raw observations [n, O] to actions [n, A] within their bounds."""
        ...

    def close(self) -> None: ...


class Ours:
    """NPG through the Python API."""

    def __init__(self, env_id: str, seed: int, total: int, settings: dict[str, Any]) -> None:
        self.agent = NPG("MlpPolicy", env_id, seed=seed, device="cpu", **settings)
        self.act = self.agent.act

    def train(self, steps: int) -> int:
        before = self.agent.num_timesteps
        self.agent.learn(steps, reset_num_timesteps=False)
        return self.agent.num_timesteps - before

    def close(self) -> None:
        self.agent.env.close()


class StableBaselines:
    """A Stable-Baselines3 algorithm as rl-baselines3-zoo trains it: monitored DummyVecEnv within VecNormalize."""

    ACTIVATIONS: ClassVar = {"relu": nn.ReLU}

    def __init__(
        self, algorithm: type[OnPolicyAlgorithm], env_id: str, seed: int, total: int, settings: dict[str, Any]
    ) -> None:
        values = dict(settings)
        policy_kwargs = dict(values.pop("policy_kwargs", {}))
        if "activation_fn" in policy_kwargs:
            policy_kwargs["activation_fn"] = self.ACTIVATIONS[policy_kwargs["activation_fn"]]
        self.env = VecNormalize(make_vec_env(env_id, n_envs=values.pop("n_envs"), seed=seed), gamma=values["gamma"])
        self.model = algorithm(
            "MlpPolicy", self.env, seed=seed, device="cpu", policy_kwargs=policy_kwargs or None, **values
        )

    def train(self, steps: int) -> int:
        before = self.model.num_timesteps
        self.model.learn(steps, reset_num_timesteps=False)
        return self.model.num_timesteps - before

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        actions, _ = self.model.predict(self.env.normalize_obs(obs.numpy()), deterministic=deterministic)
        return torch.as_tensor(actions)

    def close(self) -> None:
        self.env.close()


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
        """Before the learner's iteration: the states that it begins in."""
        agent = self.learner.agent
        assert agent.env is not None
        if agent.num_timesteps == 0:
            self.learner.train(1)
        self.kept = agent.env.vector.snapshot()

    def follow(self) -> None:
        """After it: the actions that it took."""
        agent = self.learner.agent
        self.actions = [agent.policy.to_environment(actions) for actions in agent.buffer["actions"]]
        self.env.restore(self.kept)

    def train(self, steps: int) -> int:
        return sum(len(self.env.step(actions)[1]) for actions in self.actions)

    def close(self) -> None:
        self.env.close()


def sb3_ppo(*arguments: Any) -> Learner:
    from stable_baselines3 import PPO

    return StableBaselines(PPO, *arguments)


def sb3_trpo(*arguments: Any) -> Learner:
    from sb3_contrib import TRPO

    return StableBaselines(TRPO, *arguments)


@dataclasses.dataclass(frozen=True)
class Side:
    """How a side starts, from (task, seed, total steps, settings), and the packages that it needs."""

    start: Callable[[str, int, int, dict[str, Any]], Learner]
    packages: tuple[str, ...]
    color: str


SIDES = {
    PRESET: Side(Ours, (), "#1f5fa8"),
    "ours, default": Side(Ours, (), "#6f9fd0"),
    "sb3-contrib TRPO": Side(sb3_trpo, ("sb3-contrib",), "#8e5bb5"),
    "SB3 PPO": Side(sb3_ppo, (), "#c0445e"),
    "tianshou NPG": Side(Tianshou, ("tianshou",), "#3f9a5f"),
    "tianshou NPG, EnvPool": Side(Tianshou, ("tianshou", "envpool"), "#93c47d"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--seconds", type=float, default=3.0, help="throughput only: seconds of every side's turn")
    mode.add_argument("--steps", type=int, help="full runs of so many environment steps")
    mode.add_argument("--plot", action="store_true", help="only the table and the figure of what is kept")
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--turns", type=int, default=7, help="with --seconds")
    parser.add_argument("--seeds", type=int, default=5, help="with --steps")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="with --steps")
    arguments = parser.parse_args()
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
    """Each side's rate in every turn, in environment steps per second; turn k of all sides ran one after the other."""
    started = {name: SIDES[name].start(env_id, 0, 1_000_000, SETTINGS[name][env_id]) for name in sides}
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


def in_turns(
    learners: dict[str, Learner],
    turns: int,
    seconds: float,
    before: Callable[[str], object],
    together: tuple[str, ...] = (),
) -> dict[str, list[float]]:
    """Environment steps per second of each learner in every turn. Closes the learners.

    Args:
        seconds: that a learner's turn takes at least.
        before: is told whose iteration is next, and is not timed.
        together: learners that share a turn and take its iterations one by one, because the machine's speed drifts
            within seconds.
    """
    groups = [together, *((name,) for name in learners if name not in together)]
    rates: dict[str, list[float]] = {name: [] for name in learners}
    for turn in range(turns + 1):
        for names in filter(None, groups):
            taken, spent = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
            while min(spent.values()) < seconds:
                for name in names:
                    before(name)
                    begin = time.perf_counter()
                    taken[name] += learners[name].train(1)  # one iteration
                    spent[name] += time.perf_counter() - begin
                if turn == 0:  # the first one warms up
                    break
            if turn > 0:
                for name in names:
                    rates[name].append(round(taken[name] / spent[name], 1))
    for learner in learners.values():
        learner.close()
    return rates


def run_all(
    kept: dict[str, Any], tasks: list[str], sides: list[str], steps: int, seeds: int, budget_minutes: float
) -> None:
    """Full runs, seeds outermost, so that every side has about as many when the minutes are spent."""
    keys = [
        {
            "side": name,
            "env_id": env_id,
            "steps": steps,
            "seed": seed,
            "settings": json.loads(json.dumps(SETTINGS[name][env_id])),
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


def full_run(start: Callable[[], Learner], key: dict[str, Any]) -> dict[str, Any]:
    """What a learner that starts now makes of the key's task and steps, and the seconds that both take."""
    env_id = key["env_id"]
    begin = time.perf_counter()
    learner = start()
    taken = learner.train(key["steps"])
    seconds = time.perf_counter() - begin
    env = make_vec(env_id, EPISODES, backend="gymnasium", autoreset="disabled")
    result = evaluate(learner, env, EPISODES, EVALUATION_SEED)
    env.close()
    learner.close()
    print(f"{env_id} {key['side']} seed {key['seed']}: {result.mean:.0f} in {seconds:.0f} s", flush=True)
    return {
        **key,
        **context(),
        "mean": round(result.mean, 2),
        "returns": result.returns.round(2).tolist(),
        "training_steps": taken,
        "evaluation_steps": result.steps,
        "seconds": round(seconds, 1),
        "torch_threads": torch.get_num_threads(),
    }


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


def draw_rates(axis: Any, title: str, rates: dict[str, list[float]], colors: dict[str, str]) -> None:
    """A bar for the median of each side's rates."""
    from matplotlib.ticker import EngFormatter

    names = list(rates)[::-1]
    medians = [statistics.median(rates[name]) for name in names]
    bars = axis.barh(names, medians, color=[colors[name] for name in names], height=0.65)
    axis.bar_label(bars, [f" {rate:,.0f}" for rate in medians], fontsize=9)
    axis.set_xlim(0, 1.15 * max(medians))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("environment steps per second, whole training")
    axis.set_title(title, loc="left", fontsize=11)


def draw_returns(axis: Any, title: str, returns: dict[str, list[float]], colors: dict[str, str]) -> None:
    """Each side's returns as dots, one per seed, and their median."""
    names = list(returns)[::-1]
    for place, name in enumerate(names):
        means = returns[name]
        axis.plot(means, [place] * len(means), "o", color=colors[name], alpha=0.55, markersize=6)
        axis.plot(statistics.median(means), place, "|", color=colors[name], markersize=22, markeredgewidth=2.5)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel("return, deterministic policy; dots: seeds, bars: medians")
    axis.set_title(title, loc="left", fontsize=11)


if __name__ == "__main__":
    main()
