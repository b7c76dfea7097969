"""What comparisons of whole trainings share: the peers' settings, learners in turns, full runs, and the drawing."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from agents.base import Agent
from agents.run.evaluation import evaluate
from benchmarks.common import context
from envs import make_vec

EPISODES = 16
EVALUATION_SEED = 1000
ENDLESS = 10**9
"""Environment steps of a training that is stopped by the clock."""

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
# https://github.com/DLR-RM/rl-baselines3-zoo hyperparams/trpo.yml: the tasks' -v4 ("tuned"), with "normalize: true",
# which is VecNormalize of observations and rewards.
ZOO_TRPO: dict[str, dict[str, Any]] = {
    "Hopper-v5": TRPO_SETTINGS,
    "HalfCheetah-v5": {**TRPO_SETTINGS, "target_kl": 0.04},
    "Walker2d-v5": TRPO_SETTINGS,
    "Ant-v5": TRPO_SETTINGS,
    "Swimmer-v5": {**TRPO_SETTINGS, "gamma": 0.9999},
}
PPO_POLICY = {"log_std_init": -2, "ortho_init": False, "activation_fn": "relu", "net_arch": [256, 256]}
PPO_DEFAULTS: dict[str, Any] = {"n_envs": 1, "n_steps": 2048, "batch_size": 64, "gamma": 0.99, "learning_rate": 3e-4}
"""Stable-Baselines3's."""
# The same, hyperparams/ppo.yml: the tasks' -v4 ("tuned"; Ant's are the library's defaults).
ZOO_PPO: dict[str, dict[str, Any]] = {
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
    "Walker2d-v5": {
        "n_envs": 1,
        "n_steps": 512,
        "batch_size": 32,
        "gamma": 0.99,
        "learning_rate": 5.05041e-05,
        "ent_coef": 0.000585045,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.95,
        "max_grad_norm": 1,
        "vf_coef": 0.871923,
    },
    "Ant-v5": PPO_DEFAULTS,
    "Swimmer-v5": {
        "n_envs": 4,
        "n_steps": 1024,
        "batch_size": 256,
        "gamma": 0.9999,
        "learning_rate": 6e-4,
        "gae_lambda": 0.98,
    },
    "Humanoid-v5": {
        "n_envs": 1,
        "n_steps": 512,
        "batch_size": 256,
        "gamma": 0.95,
        "learning_rate": 3.56987e-05,
        "ent_coef": 0.00238306,
        "clip_range": 0.3,
        "n_epochs": 5,
        "gae_lambda": 0.9,
        "max_grad_norm": 2,
        "vf_coef": 0.431892,
        "policy_kwargs": PPO_POLICY,
    },
}
# The same, hyperparams/sac.yml: its MuJoCo defaults, which are those of Stable-Baselines3, and Swimmer-v3.
MUJOCO_SAC = {"n_envs": 1, "learning_starts": 10_000, "gamma": 0.99, "normalize": False}
ZOO_SAC: dict[str, dict[str, Any]] = {"Swimmer-v5": {**MUJOCO_SAC, "gamma": 0.9999}}
# The same, hyperparams/crossq.yml, which has no MuJoCo task but Swimmer: the library's defaults, as the paper's.
CROSSQ = {"n_envs": 1, "learning_starts": 5_000, "gamma": 0.99, "normalize": False}
# The same, hyperparams/ars.yml: the tasks' -v3, from Mania et al. 2018.
ZOO_ARS: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": {"n_delta": 32, "n_top": 4, "learning_rate": 0.02, "delta_std": 0.03},
    "Hopper-v5": {"n_delta": 8, "n_top": 4, "learning_rate": 0.01, "delta_std": 0.025, "alive_bonus_offset": -1},
    "Walker2d-v5": {"n_delta": 40, "n_top": 30, "learning_rate": 0.03, "delta_std": 0.025, "alive_bonus_offset": -1},
}


def parse(
    description: str | None, tasks: Iterable[str], sides: Iterable[str], seconds: float, seeds: int
) -> argparse.Namespace:
    """Read the options that comparisons of trainings take: rates in turns, full runs, or the figure alone."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--seconds", type=float, default=seconds, help="rates only: seconds of every side's turn")
    mode.add_argument("--steps", type=int, help="full runs of so many environment steps")
    mode.add_argument("--plot", action="store_true", help="only the table and the figure of what is kept")
    parser.add_argument("--tasks", nargs="*", default=list(tasks), choices=list(tasks))
    parser.add_argument("--sides", nargs="*", default=list(sides), choices=list(sides))
    parser.add_argument("--turns", type=int, default=7, help="with --seconds")
    parser.add_argument("--seeds", type=int, default=seeds, help="with --steps")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="with --steps")
    return parser.parse_args()


class Learner(Protocol):
    """A side at work."""

    def train(self, steps: int) -> int:
        """Go on training for at least so many environment steps; returns how many it took."""
        ...

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Map raw observations [n, O] to actions [n, A] within their bounds."""
        ...

    def close(self) -> None: ...


class Ours:
    """An agent of this package through its Python API."""

    def __init__(self, algorithm: type[Agent], env_id: str, seed: int, total: int, settings: dict[str, Any]) -> None:
        self.agent = algorithm("MlpPolicy", env_id, seed=seed, device="cpu", **settings)
        self.act = self.agent.act
        self.training = self.agent.iterations(total)

    def train(self, steps: int) -> int:
        """Go on as one call of learn does, so that a hand-over keeps its place."""
        before = self.agent.num_timesteps
        while self.agent.num_timesteps < before + steps:
            next(self.training)
        return self.agent.num_timesteps - before

    def close(self) -> None:
        self.training.close()
        self.agent.env.close()


class StableBaselines:
    """A Stable-Baselines3 algorithm as rl-baselines3-zoo trains it: monitored DummyVecEnv, within VecNormalize unless
    the settings say otherwise.
    """

    ACTIVATIONS: ClassVar = {"relu": nn.ReLU}

    def __init__(
        self, algorithm: type[BaseAlgorithm], env_id: str, seed: int, total: int, settings: dict[str, Any]
    ) -> None:
        values = dict(settings)
        policy_kwargs = dict(values.pop("policy_kwargs", {}))
        if "activation_fn" in policy_kwargs:
            policy_kwargs["activation_fn"] = self.ACTIVATIONS[policy_kwargs["activation_fn"]]
        policy, norm_reward = values.pop("policy", "MlpPolicy"), values.pop("norm_reward", True)
        env = make_vec_env(env_id, n_envs=values.pop("n_envs"), seed=seed)
        scaled = {"norm_reward": norm_reward, "gamma": values.get("gamma", 0.99)}
        self.normalized = VecNormalize(env, **scaled) if values.pop("normalize", True) else None
        self.env = self.normalized or env
        self.model = algorithm(policy, self.env, seed=seed, device="cpu", policy_kwargs=policy_kwargs or None, **values)

    def train(self, steps: int) -> int:
        before = self.model.num_timesteps
        self.model.learn(steps, reset_num_timesteps=False)
        return self.model.num_timesteps - before

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        inputs = obs.numpy() if self.normalized is None else self.normalized.normalize_obs(obs.numpy())
        actions, _ = self.model.predict(inputs, deterministic=deterministic)
        return torch.as_tensor(actions)

    def close(self) -> None:
        self.env.close()


def sb3_ppo(*arguments: Any) -> Learner:
    from stable_baselines3 import PPO

    return StableBaselines(PPO, *arguments)


def sb3_sac(*arguments: Any) -> Learner:
    from stable_baselines3 import SAC

    return StableBaselines(SAC, *arguments)


def sb3_trpo(*arguments: Any) -> Learner:
    from sb3_contrib import TRPO

    return StableBaselines(TRPO, *arguments)


def sbx_crossq(*arguments: Any) -> Learner:
    from sbx import CrossQ

    return StableBaselines(CrossQ, *arguments)


def sb3_ars(env_id: str, seed: int, total: int, settings: dict[str, Any]) -> Learner:
    """Make a search of linear policies; rewards are as they are, and one environment is stepped."""
    from sb3_contrib import ARS

    asked = {"n_envs": 1, "policy": "LinearPolicy", "norm_reward": False, "zero_policy": True, **settings}
    return StableBaselines(ARS, env_id, seed, total, asked)


def in_turns(
    learners: dict[str, Learner],
    turns: int,
    seconds: float,
    before: Callable[[str], object],
    together: tuple[str, ...] = (),
) -> dict[str, list[float]]:
    """Measure environment steps per second of each learner in every turn; closes the learners.

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


def full_run(start: Callable[[], Learner], key: dict[str, Any]) -> dict[str, Any]:
    """Return what a learner that starts now makes of the key's task and steps, and the seconds that both take."""
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


def draw_rates(axis: Any, title: str, rates: dict[str, list[float]], colors: dict[str, str]) -> None:
    """Draw a bar for the median of each side's rates."""
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
    """Draw each side's returns as dots, one per seed, and their median."""
    names = list(returns)[::-1]
    for place, name in enumerate(names):
        means = returns[name]
        axis.plot(means, [place] * len(means), "o", color=colors[name], alpha=0.55, markersize=6)
        axis.plot(statistics.median(means), place, "|", color=colors[name], markersize=22, markeredgewidth=2.5)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel("return, deterministic policy; dots: seeds, bars: medians")
    axis.set_title(title, loc="left", fontsize=11)
