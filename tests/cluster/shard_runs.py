"""Short trainings whose environments are spread over an executor, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from agents import REGISTRY
from agents.base import Agent
from agents.cluster.executor import Executor
from agents.rollout.spread import Spread
from envs import make_vec

SMALL = {"n_steps": 8, "net_arch": (8,)}
META = {"meta_batch_size": 16, "num_envs": 128, "n_steps": 10, "net_arch": (8,)}
POINT = {"env": "families/Point-v0", "env_kwargs": {"horizon": 10}}

CASES: dict[str, dict[str, Any]] = {
    "npg": {"num_envs": 100, **SMALL},
    "trpo": {"num_envs": 100, **SMALL},
    "copos": {"num_envs": 100, **SMALL},
    "ppo": {"num_envs": 100, **SMALL, "batch_size": 200, "n_epochs": 2},
    "pes": {"num_envs": 196, "n_steps": 20},
    "pes truncated_es": {"num_envs": 201, "n_steps": 20, "estimator": "truncated_es"},
    "pes es, whitened, trials": {
        "num_envs": 196,
        "n_steps": 50,
        "env": "InvertedPendulum-v5",
        "env_kwargs": {"max_episode_steps": 50},
        "estimator": "es",
        "reward_scaling": "log_ranks",
        "whitening_memory": 100,
        "trials": (2,),
        "trial_steps": (100,),
    },
    "npg any environment": {"num_envs": 70, **SMALL, "env": "CartPole-v1"},
    "reptile": {**META, **POINT},
    "fomaml": {**META, **POINT},
    "maml": {**META, **POINT, "inner_steps": 2},
}


def made(name: str, executor: Executor | None, **changed: Any) -> Agent:
    """The agent of a case, with environments that are spread over an executor, or ordinary ones (None)."""
    settings = {"env": "Hopper-v5", "env_kwargs": {}, **CASES[name], **changed}
    kind = REGISTRY[name.split()[0]]
    kwargs = settings.pop("env_kwargs")
    env = make_vec(settings.pop("env"), settings.pop("num_envs"), seed=5, autoreset=kind.autoreset, **kwargs)
    spread = env if executor is None else Spread(env, executor)
    return kind(next(iter(kind.policy_aliases)), spread, seed=3, device="cpu", **settings)


def train(agent: Agent, iterations: int, before: Callable[[int], None] = lambda i: None) -> Agent:
    """Learn for some iterations, each of which something may happen before."""
    begins = agent.num_timesteps == 0
    before(0)
    for done, _ in enumerate(agent.iterations(10**7, log_interval=None, reset_num_timesteps=begins), 1):
        if done == iterations:
            break
        before(done)
    return agent


def bits(agent: Agent) -> tuple[Any, ...]:
    """All that two equal runs have in common: parameters, statistics, counts and episodes."""
    state = torch.cat([x.flatten().double() for x in agent.policy.state_dict().values()])
    assert state.isfinite().all()
    return state.numpy().tobytes(), agent.num_timesteps, agent.episode_returns, agent.episode_lengths
