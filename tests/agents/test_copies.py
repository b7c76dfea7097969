"""Copies of agents, by deepcopy or pickle: they go on as the original would, which does not notice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import REGISTRY, Agent
from envs import make_vec

PPO = {"algorithm": "ppo", "n_steps": 32, "net_arch": (8,), "batch_size": 32, "n_epochs": 8}
CASES: dict[str, dict[str, Any]] = {
    # 32 optimizer steps an iteration: AdaBound measures its final_lr in the second.
    "ppo": {**PPO, "handover": 40.0},
    "ppo adam": {**PPO, "optimizer": "adam"},
    "npg": {"algorithm": "npg", "n_steps": 32, "net_arch": (8,), "fisher": "adaptive", "critic": "adam"},
    "trpo": {
        "algorithm": "trpo",
        "n_steps": 32,
        "net_arch": (8,),
        "fisher": "compatible",
        "solver": "cg",
        "cg_warm_start": True,
    },
    "pes": {"algorithm": "pes", "n_steps": 32, "whitening_memory": 100, "optimizer": "adam"},
    "fomaml": {"algorithm": "fomaml", "n_steps": 16, "net_arch": (8,)},
    "reptile": {"algorithm": "reptile", "n_steps": 16, "net_arch": (8,)},
    "maml": {"algorithm": "maml", "n_steps": 16, "net_arch": (8,)},
}
"""Settings with iterations of 128 steps of 4 environments."""


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def made(algorithm: type[Agent]) -> Any:
    return make_vec("CartPole-v1", 4, autoreset=algorithm.autoreset)


def dummy(algorithm: type[Agent]) -> Any:
    return DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 4)


def batched(algorithm: type[Agent]) -> Any:
    return make_vec("InvertedPendulum-v5", 4, autoreset=algorithm.autoreset, num_threads=1)


def made_anew(algorithm: type[Agent]) -> Any:
    """Gymnasium's own MuJoCo environments are copied by being made anew, and know nothing of their episodes then."""
    return make_vec("InvertedPendulum-v5", 4, backend="gymnasium", autoreset=algorithm.autoreset)


@pytest.fixture(params=CASES)
def make(request: pytest.FixtureRequest) -> Callable[..., Agent]:
    """Makes the case's agent in environments of a kind."""
    settings = dict(CASES[request.param])
    algorithm = REGISTRY[settings.pop("algorithm")]
    policy = next(iter(algorithm.policy_aliases))
    return lambda env: algorithm(policy, env(algorithm), seed=0, device="cpu", **settings)


def state(agent: Agent) -> dict[str, torch.Tensor]:
    """Everything that learns, copied."""
    tensors = {**agent.policy.state_dict(), **agent.own_tensors()}
    tensors["steps"] = torch.tensor([agent.num_timesteps, agent.counter])
    tensors["episodes"] = torch.tensor(agent.episode_returns)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("env", [made, dummy, batched, made_anew])
@pytest.mark.parametrize("learned", [0, 256])
def test_a_copy_goes_on_as_the_original_which_does_not_notice(
    make: Callable[..., Agent], env: Callable[[type[Agent]], Any], copied: Callable[[Any], Any], learned: int
) -> None:
    try:
        original, alone = make(env), make(env)
    except ValueError as error:
        assert env is dummy
        pytest.skip(f"this algorithm does not take them: {error}")
    for agent in (original, alone):
        if learned:
            agent.learn(learned)
    twin, before = copied(original), state(original)
    assert equal(state(twin), before)

    twin.learn(256, reset_num_timesteps=False)
    assert equal(state(original), before)
    for agent in (original, alone):
        agent.learn(256, reset_num_timesteps=False)
    assert equal(state(original), state(alone))
    assert equal(state(twin), state(alone))
    changed = state(alone)
    assert not all(torch.equal(changed[name], before[name]) for name, _ in twin.policy.actor.named_parameters("actor"))


def test_a_copy_of_a_copy_learns(make: Callable[..., Agent]) -> None:
    """As in population training: the better agent replaces the worse one again and again."""
    agent, alone = (make(made) for _ in range(2))
    for _ in range(3):
        agent = pickled(copy.deepcopy(agent))
        for each in (agent, alone):
            each.learn(128, reset_num_timesteps=False)
    assert equal(state(agent), state(alone))


def test_an_actor_that_was_converted_and_back_goes_on(make: Callable[..., Agent]) -> None:
    agent, alone = (make(made).learn(128) for _ in range(2))
    agent.policy.actor.double().float()
    for each in (agent, alone):
        each.learn(256, reset_num_timesteps=False)
    assert equal(state(agent), state(alone))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_an_agent_that_logs_is_copied_without_its_files(copied: Callable[[Any], Any], tmp_path: Any) -> None:
    agent = REGISTRY["npg"](
        "MlpPolicy", "CartPole-v1", verbose=1, tensorboard_log=str(tmp_path), n_steps=16, num_envs=2, reused_rollouts=0
    )
    agent.learn(32)
    twin = copied(agent)
    assert twin.learn(64, reset_num_timesteps=False).num_timesteps == 96
