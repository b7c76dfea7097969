"""What every registered algorithm does: learns the probes, repeats itself, saves, resumes, and meets every environment.

An algorithm that comes new adds its settings for these small problems to SETTINGS, and nothing else.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RescaleAction
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import agents
from agents import REGISTRY, Agent, CheckpointError, checkpoint, noise
from agents.failures import Failures
from agents.optim.adabound import handover_gamma
from agents.policy.actor_critic import ActorPolicy
from envs import GymVectorEnv, SnapshotError, VectorEnv, make_vec
from envs.sb3 import SB3View

SETTINGS: dict[str, dict[str, Any]] = {
    "pes": {"n_steps": 16, "num_envs": 8, "net_arch": (16,), "sigma": 0.1, "learning_rate": 0.01},
    **{
        name: {
            "n_steps": 16,
            "num_envs": 8,
            "net_arch": (16,),
            "target_kl": 0.05,
            "gamma": 0.9,
            # Forty batches of 128 samples are too few for Adam; tests/agents/test_npg.py has every critic.
            "critic": "gauss_newton",
            # These follow the training, of which parts here are taken for the whole.
            "reused_rollouts": 0,
            "gamma_end": None,
        }
        for name in ("npg", "trpo")
    },
    "copos": {
        "n_steps": 16,
        "num_envs": 8,
        "net_arch": (16,),
        "target_kl": 0.05,
        "gamma": 0.9,
        "entropy_decrease": 0.1,
    },
    "ppo": {
        "n_steps": 16,
        "num_envs": 8,
        "net_arch": (16,),
        "gamma": 0.9,
        "batch_size": 16,
        "n_epochs": 4,
        "learning_rate": 1e-2,
        "handover": 5000.0,
        "log_std_init": -1.0,
        "ent_coef": 0.005,
        # Normalized ones would drive the standard deviation to 0 where rewards have no noise.
        "normalize_advantage": False,
    },
    # An iteration has two rollouts, so it makes as many steps as those above.
    **{
        name: {
            "n_steps": 8,
            "num_envs": 8,
            "net_arch": (16,),
            "gamma": 0.9,
            "normalize_advantage": False,
            "log_std_init": -1.0,
            **own,
        }
        for name, own in {
            "reptile": {"inner_lr": 0.5, "learning_rate": 1.0},
            "fomaml": {"learning_rate": 1e-2, "n_epochs": 3},
            "maml": {"learning_rate": 1e-2, "n_epochs": 3},
        }.items()
    },
}
VALUES = {
    "OneStepReward": {0.0: 1.0},
    "ObservationReward": {-1.0: -1.0, 1.0: 1.0},
    "TwoStepReward": {0.0: 0.9, 1.0: 1.0},
    "Endless": {0.0: 10.0},
}
BEST_ACTIONS: dict[str, tuple[float, Any, float]] = {
    "DiscreteAction": (0.0, 1, 0.0),
    "ContinuousAction": (0.0, 0.5, 0.1),
    "ObservationAction": (-1.0, -0.5, 0.1),
    "Survival": (0.3, 1, 0.0),
    "MultiDiscreteBandit": (0.0, (2, 1), 0.0),
    "MultiBinaryBandit": (0.0, (1, 0, 1), 0.0),
}


@pytest.fixture(params=REGISTRY, name="algorithm")
def _algorithm(request: pytest.FixtureRequest) -> type[Agent]:
    return REGISTRY[request.param]


def make(algorithm: type[Agent], env: Any, seed: int | None = 0, policy: str = "MlpPolicy", **changed: Any) -> Agent:
    settings = SETTINGS[algorithm.name] | changed
    if not isinstance(env, str):
        settings.pop("num_envs")
    return algorithm(policy, env, seed=seed, device="cpu", **settings)


def vector(algorithm: type[Agent], env_id: Any, num_envs: int) -> VectorEnv:
    """Environments as the algorithm trains in them."""
    return make_vec(env_id, num_envs, autoreset=algorithm.autoreset)


def parameters(agent: Agent) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in agent.policy.state_dict().values()])


@pytest.mark.parametrize("probe", VALUES)
def test_the_critic_learns_known_values(algorithm: type[Agent], probe: str) -> None:
    agent = make(algorithm, f"probes/{probe}-v0")
    if not hasattr(agent.policy, "critic"):
        pytest.skip("this algorithm's policies have no critic")
    agent.learn(16 * 8 * 40)
    for observation, value in VALUES[probe].items():
        s = agent.policy.normalize(torch.tensor([[observation]]))
        assert agent.policy.critic(s).item() == pytest.approx(value, abs=0.05)


@pytest.mark.parametrize("probe", BEST_ACTIONS)
def test_the_policy_learns_the_best_action(algorithm: type[Agent], probe: str) -> None:
    agent = make(algorithm, f"probes/{probe}-v0").learn(16 * 8 * 80)
    observation, action, tolerance = BEST_ACTIONS[probe]
    found, _ = agent.predict(np.array([observation], dtype=np.float32), deterministic=True)
    np.testing.assert_allclose(found.squeeze(), action, atol=tolerance)


def test_equal_seeds_agree_bit_for_bit_and_unequal_ones_diverge(algorithm: type[Agent]) -> None:
    first, second, other = (make(algorithm, "InvertedPendulum-v5", seed).learn(512) for seed in (3, 3, 4))
    assert torch.equal(parameters(first), parameters(second))
    assert first.episode_returns == second.episode_returns
    assert not torch.equal(parameters(first), parameters(other))


def test_runs_of_neighbouring_seeds_share_no_episode(algorithm: type[Agent]) -> None:
    class First(BaseCallback):
        def _on_rollout_start(self) -> None:
            self.observations = self.model.collector.observations.clone()

        def _on_step(self) -> bool:
            return False

    starts = []
    for seed in (0, 1):
        first = First()
        make(algorithm, "InvertedPendulum-v5", seed).learn(1, callback=first)
        starts.append(first.observations)
    assert len(torch.cat(starts).unique(dim=0)) == 16


@pytest.mark.parametrize("env_id", ["Hopper-v5", "CartPole-v1"])
def test_resuming_is_exact(algorithm: type[Agent], env_id: str, tmp_path: Path) -> None:
    # What falls over a training falls anew in each call of learn.
    fixed = {"target_kl_end": None} if "target_kl_end" in algorithm.Config.names() else {}
    whole = make(algorithm, env_id, **fixed).learn(128 * 6)
    half = make(algorithm, env_id, **fixed).learn(128 * 3)
    half.save(tmp_path / "half")
    resumed = algorithm.load(tmp_path / "half.zip", vector(algorithm, env_id, 8), device="cpu")
    assert (resumed.num_timesteps, resumed.iteration) == (half.num_timesteps, half.iteration)
    rest = 128 * 6 - half.num_timesteps
    assert 0 < rest <= 128 * 3
    resumed.learn(rest, reset_num_timesteps=False)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert resumed.num_timesteps == whole.num_timesteps
    assert resumed.episode_returns == whole.episode_returns
    half.learn(rest, reset_num_timesteps=False)
    assert torch.equal(parameters(half), parameters(whole))


def test_iterations_can_be_left_at_any_point(algorithm: type[Agent]) -> None:
    whole = make(algorithm, "InvertedPendulum-v5").learn(128 * 4)
    agent = make(algorithm, "InvertedPendulum-v5")
    for iteration in agent.iterations(128 * 4):
        if iteration == 2:
            break
    agent.learn(128 * 4 - agent.num_timesteps, reset_num_timesteps=False)
    assert torch.equal(parameters(agent), parameters(whole))


def test_a_saved_agent_predicts_the_same_without_an_environment(algorithm: type[Agent], tmp_path: Path) -> None:
    agent = make(algorithm, "InvertedPendulum-v5", policy_kwargs={"activation_fn": torch.nn.ReLU}).learn(256)
    agent.save(tmp_path / "agent.zip")
    for loaded in (algorithm.load(tmp_path / "agent.zip"), agents.load(tmp_path / "agent.zip", device="cpu")):
        observations = np.random.default_rng(0).normal(size=(5, 4))
        np.testing.assert_array_equal(
            loaded.predict(observations, deterministic=True)[0], agent.predict(observations, deterministic=True)[0]
        )
        assert loaded.config == agent.config
        with pytest.raises(ValueError, match="set_env"):
            loaded.learn(10)


@pytest.mark.parametrize("policy", ["LinearPolicy", "RBFPolicy"])
def test_other_policies_learn_resume_exactly_and_predict(algorithm: type[Agent], policy: str, tmp_path: Path) -> None:
    if policy not in algorithm.policy_aliases:
        pytest.skip(f"{algorithm.name} has no {policy}")
    features = {"rbf_features": 4} if policy == "RBFPolicy" else {}
    agent = make(algorithm, "probes/ObservationAction-v0", policy=policy, **features).learn(16 * 8 * 80)
    found, _ = agent.predict(np.array([[-1.0], [1.0]], dtype=np.float32), deterministic=True)
    np.testing.assert_allclose(found.squeeze(), [-0.5, 0.5], atol=0.1)
    half = make(algorithm, "InvertedPendulum-v5", policy=policy).learn(128 * 2)
    half.save(tmp_path / "half")
    resumed = algorithm.load(tmp_path / "half.zip", vector(algorithm, "InvertedPendulum-v5", 8), device="cpu")
    for part in (half, resumed):
        part.learn(128 * 2, reset_num_timesteps=False)
    assert torch.equal(parameters(half), parameters(resumed))
    assert type(resumed.policy) is type(half.policy)


def test_loading_into_more_environments_begins_new_episodes(algorithm: type[Agent], tmp_path: Path) -> None:
    make(algorithm, "InvertedPendulum-v5").learn(256).save(tmp_path / "agent.zip")
    agent = algorithm.load(tmp_path / "agent.zip", vector(algorithm, "InvertedPendulum-v5", 4))
    before, rollout = agent.num_timesteps, 16 * 4
    agent.learn(rollout, reset_num_timesteps=False)
    assert rollout <= agent.num_timesteps - before < 2 * rollout


class OwnRandomness(gymnasium.ObservationWrapper):
    """Draws on randomness that reset(seed) does not set."""

    random = np.random.default_rng(0)

    def observation(self, observation: Any) -> Any:
        return observation + self.random.uniform(0, 0.01)


ELSEWHERE = {
    "randomness of its own": (
        lambda algorithm: vector(algorithm, lambda: OwnRandomness(gymnasium.make("InvertedPendulum-v5")), 2),
        "gave another observation",
    ),
    "another backend": (
        lambda algorithm: make_vec("InvertedPendulum-v5", 2, backend="gymnasium", autoreset=algorithm.autoreset),
        "does not fit",
    ),
    "another number": (lambda algorithm: vector(algorithm, "InvertedPendulum-v5", 4), "of 2 environments"),
    "a DummyVecEnv": (
        lambda algorithm: DummyVecEnv([lambda: gymnasium.make("InvertedPendulum-v5")] * 2),
        "cannot be restored|does not fit",
    ),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_where_environments_cannot_be_put_back_new_episodes_begin(
    algorithm: type[Agent], kind: str, tmp_path: Path
) -> None:
    env, reason = ELSEWHERE[kind]
    first = env(algorithm) if kind == "randomness of its own" else vector(algorithm, "InvertedPendulum-v5", 2)
    agent = make(algorithm, first).learn(64)
    agent.save(tmp_path / "agent")
    with pytest.warns(UserWarning, match=f"New episodes begin: .*({reason})"):
        loaded = algorithm.load(tmp_path / "agent", env(algorithm), device="cpu")
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps > agent.num_timesteps
    assert not torch.equal(parameters(loaded), parameters(agent))


@pytest.mark.parametrize("backend", ["mujoco", pytest.param("gymnasium", marks=pytest.mark.slow)])
def test_what_a_callback_saved_within_an_iteration_goes_on_exactly(
    algorithm: type[Agent], backend: str, tmp_path: Path
) -> None:
    def env() -> VectorEnv:
        return make_vec("InvertedPendulum-v5", 4, backend=backend, autoreset=algorithm.autoreset)

    whole = make(algorithm, env()).learn(96 * 4, callback=CheckpointCallback(37, str(tmp_path), "amid"))
    files = sorted(tmp_path.glob("*.zip"), key=lambda file: int(re.findall(r"\d+", file.name)[0]))
    for file in (files[0], files[-1]):
        assert checkpoint.read_manifest(file)["env_snapshot"] == "exact"
        agent = algorithm.load(file, env(), device="cpu")
        assert agent.num_timesteps < whole.num_timesteps
        agent.learn(whole.num_timesteps - agent.num_timesteps, reset_num_timesteps=False)
        assert agent.num_timesteps == whole.num_timesteps
        assert torch.equal(parameters(agent), parameters(whole))
        assert agent.episode_returns == whole.episode_returns


def test_what_is_saved_before_it_learned_learns_the_same(algorithm: type[Agent], tmp_path: Path) -> None:
    agent = make(algorithm, "InvertedPendulum-v5", num_envs=4)
    agent.save(tmp_path / "new")
    loaded = algorithm.load(tmp_path / "new", vector(algorithm, "InvertedPendulum-v5", 4), device="cpu")
    assert torch.equal(parameters(agent.learn(128)), parameters(loaded.learn(128)))


def test_what_an_error_ended_is_saved_as_the_iteration_began(algorithm: type[Agent], tmp_path: Path) -> None:
    agent = make(algorithm, "InvertedPendulum-v5", num_envs=4)
    agent.keeps_beginnings = True
    iterations = agent.iterations(10_000)
    next(iterations)
    agent.save(tmp_path / "before")
    step, calls = agent.collector.vector.step, []

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise RuntimeError("broken")
        return step(*args, **kwargs)

    agent.collector.vector.step = breaks  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        next(iterations)
    agent.save(tmp_path / "after")
    before, after = (checkpoint.read_manifest(tmp_path / f"{name}.zip") for name in ("before", "after"))
    assert before["sha256"] == after["sha256"]
    assert before["num_timesteps"] == after["num_timesteps"]


@pytest.mark.parametrize("kind", [pytest.param("error", marks=pytest.mark.slow), "parameter"])
def test_updates_that_are_not_finite_are_undone_counted_and_end_training(
    algorithm: type[Agent], kind: str, tmp_path: Path
) -> None:
    agent, fail = make(algorithm, "InvertedPendulum-v5", num_envs=4), [3, 5, 6, 7, 8, 9]
    train, before = agent.train, []

    def fails(batch: Any) -> None:
        if agent.iteration + 1 not in fail:
            return train(batch)
        before.append(parameters(agent).clone())
        next(iter(agent.policy.parameters())).data.fill_(0.0 if kind == "error" else float("nan"))
        if kind == "error":
            raise FloatingPointError("A direction is not finite.")

    agent.train = fails  # type: ignore[method-assign]
    iterations = agent.iterations(10_000)
    for iteration in range(1, 10):
        next(iterations)
        if iteration in fail:
            assert torch.equal(parameters(agent), before[-1])
            assert agent.last_metrics["train/failed_updates"] == agent.failures.updates
    with pytest.raises(FloatingPointError, match=r"not finite.*This was the 5th update in a row that failed"):
        next(iterations)
    assert agent.failures == Failures(updates=6, in_a_row=5)
    agent.save(tmp_path / "agent")
    loaded = algorithm.load(tmp_path / "agent")
    assert loaded.failures == agent.failures
    assert torch.equal(parameters(loaded), before[-1])


def test_what_an_error_ended_within_an_update_is_not_called_exact(algorithm: type[Agent], tmp_path: Path) -> None:
    agent = make(algorithm, "InvertedPendulum-v5", num_envs=4)

    def breaks(_: Any) -> None:
        raise RuntimeError("broken")

    agent.train, agent.keeps_beginnings = breaks, True  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        agent.learn(64)
    with pytest.warns(UserWarning, match="is not exact: .*within an iteration"):
        agent.save(tmp_path / "agent")
    with pytest.warns(UserWarning, match="New episodes begin: .*within an iteration"):
        algorithm.load(tmp_path / "agent", vector(algorithm, "InvertedPendulum-v5", 4))


def test_environments_that_cannot_be_put_back_are_saved_without(algorithm: type[Agent], tmp_path: Path) -> None:
    env = Unrestorable([gymnasium.make("CartPole-v1") for _ in range(2)], autoreset=algorithm.autoreset)
    agent = make(algorithm, env).learn(64)
    with pytest.warns(UserWarning, match="What goes on from .*agent.zip is not exact: its state is out of reach"):
        agent.save(tmp_path / "agent.zip")
    manifest, _ = checkpoint.read(tmp_path / "agent.zip")
    assert manifest["env_snapshot"] == "its state is out of reach"
    algorithm.load(tmp_path / "agent.zip", env).learn(32, reset_num_timesteps=False)


@pytest.mark.parametrize("kind", ["DummyVecEnv", pytest.param("gymnasium.make_vec", marks=pytest.mark.slow)])
def test_environments_out_of_reach_are_said_to_be_inexact(algorithm: type[Agent], kind: str, tmp_path: Path) -> None:
    if algorithm.name == "pes":
        pytest.skip("steps the single environments, whose states are in reach")
    same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    env: Any = (
        DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
        if kind == "DummyVecEnv"
        else gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync", vector_kwargs=same_step)
    )
    agent = make(algorithm, env).learn(32)
    with pytest.warns(UserWarning, match=r"What goes on from .*agent\.zip is not exact: .*cannot be snapshot"):
        agent.save(tmp_path / "agent")
    assert "out of reach" in checkpoint.read_manifest(tmp_path / "agent.zip")["env_snapshot"]
    with pytest.warns(UserWarning, match="New episodes begin: .*cannot be snapshot"):
        algorithm.load(tmp_path / "agent", env)


class Unrestorable(GymVectorEnv):
    def snapshot(self, ids: Any = None) -> dict[str, torch.Tensor]:
        raise SnapshotError("its state is out of reach")


ACCEPTED = {
    "id": lambda algorithm: "CartPole-v1",
    "VectorEnv": lambda algorithm: vector(algorithm, "CartPole-v1", 4),
    "view": lambda algorithm: SB3View(vector(algorithm, "CartPole-v1", 4)),
    "callable": lambda algorithm: vector(algorithm, lambda: gymnasium.make("Pendulum-v1"), 2),
    "flattened dict": lambda algorithm: vector(algorithm, lambda: gymnasium.wrappers.FlattenObservation(DictEnv()), 2),
}
THEIRS = {
    "gymnasium environment": lambda: gymnasium.make("CartPole-v1"),
    "wrapped environment": lambda: Monitor(gymnasium.make("Pendulum-v1", max_episode_steps=20)),
    "same-step vector environment": lambda: gymnasium.make_vec(
        "CartPole-v1",
        2,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
    ),
    "SB3 VecEnv": lambda: DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 2),
}
TOGETHER = {
    "VecNormalize of rewards": (
        lambda: VecNormalize(DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 2), norm_obs=False),
        "VecNormalize steps and resets all",
    ),
    "odd number": (lambda: make_vec("CartPole-v1", 3), r"make_vec\(..., autoreset='disabled'\)"),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_every_kind_of_environment_trains(algorithm: type[Agent], kind: str) -> None:
    agent = make(algorithm, ACCEPTED[kind](algorithm)).learn(33)
    assert agent.num_timesteps >= 33
    assert agent.iteration >= 1
    assert isinstance(agent.env, SB3View)


@pytest.mark.parametrize("kind", THEIRS)
def test_other_peoples_environments_train(algorithm: type[Agent], kind: str) -> None:
    agent = make(algorithm, THEIRS[kind]()).learn(65)
    assert agent.num_timesteps >= 65
    agent.set_env(THEIRS[kind]())
    assert agent.learn(33, reset_num_timesteps=False).num_timesteps >= 98


@pytest.mark.parametrize("kind", TOGETHER)
def test_environments_that_step_together_train_or_are_refused(algorithm: type[Agent], kind: str) -> None:
    env, remedy = TOGETHER[kind]
    if algorithm.autoreset is AutoresetMode.SAME_STEP:
        assert make(algorithm, env()).learn(33).num_timesteps >= 33
    else:
        with pytest.raises(ValueError, match=remedy):
            make(algorithm, env())


class DictEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict(
        {"x": gymnasium.spaces.Box(-1, 1, (2,)), "k": gymnasium.spaces.Discrete(3)}
    )
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return {"x": np.zeros(2, dtype=np.float32), "k": 1}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return {"x": np.zeros(2, dtype=np.float32), "k": 1}, 1.0, True, False, {}


class Goal(gymnasium.Wrapper):
    """Every second episode is a success, and each says its number."""

    episode = -1

    def reset(self, **kwargs: Any) -> Any:
        self.episode += 1
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        return *rest, info | {"is_success": bool(self.episode % 2), "number": self.episode}


def monitored() -> Monitor:
    return Monitor(Goal(gymnasium.make("CartPole-v1", max_episode_steps=4)), info_keywords=("number", "is_success"))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("kind", ["ours", "SB3 VecEnv"])
def test_success_and_a_monitors_words_are_counted(
    algorithm: type[Agent], kind: str, watched: bool, tmp_path: Path
) -> None:
    env = vector(algorithm, monitored, 2) if kind == "ours" else DummyVecEnv([monitored] * 2)
    agent = make(algorithm, env).learn(100, callback=Patient() if watched else None)
    numbers = [episode["number"] for episode in agent.ep_info_buffer]
    assert agent.episode_lengths == [4] * len(numbers)
    assert len(set(numbers)) > 2
    assert list(agent.ep_success_buffer) == [bool(number % 2) for number in numbers]
    assert agent.last_metrics["rollout/success_rate"] == np.mean(agent.ep_success_buffer)
    agent.save(tmp_path / "agent")
    loaded = algorithm.load(tmp_path / "agent")
    assert loaded.ep_success_buffer == agent.ep_success_buffer
    assert loaded.ep_info_buffer == agent.ep_info_buffer


class Patient(BaseCallback):
    def _on_step(self) -> bool:
        return True


class Odd(gymnasium.Env):
    """Accepts the actions of its space and no others, of which the last is rewarded; sees what is of a shape, or of a
    space.
    """

    def __init__(self, action_space: gymnasium.Space, seen: tuple[int, ...] | gymnasium.Space = (2,)) -> None:
        self.action_space = action_space
        self.observation_space = gymnasium.spaces.Box(-1, 1, seen) if isinstance(seen, tuple) else seen

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if isinstance(self.observation_space, gymnasium.spaces.Box):
            return np.zeros(self.observation_space.shape, dtype=np.float32), {}
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype))
        best = np.all(action == -1) if isinstance(self.action_space, gymnasium.spaces.Discrete) else np.sum(action)
        return self.reset()[0], float(best), False, False, {}


ODD = {
    "unbounded actions": lambda: Odd(gymnasium.spaces.Box(-np.inf, np.inf, (2,))),
    "actions bounded on one side": lambda: Odd(
        gymnasium.spaces.Box(np.float32([-1, -np.inf]), np.float32([np.inf, 1]))
    ),
    "wrapped in ClipAction": lambda: gymnasium.wrappers.ClipAction(gymnasium.make("Pendulum-v1")),
    "one action without a shape": lambda: Odd(gymnasium.spaces.Box(-1, 1, ())),
    "choices counted from -1": lambda: Odd(gymnasium.spaces.Discrete(2, start=-1)),
    "several choices from elsewhere": lambda: Odd(gymnasium.spaces.MultiDiscrete([2, 3], start=[4, -5])),
    "observations without a shape": lambda: Odd(gymnasium.spaces.Discrete(2), ()),
    "observations of three axes": lambda: Odd(gymnasium.spaces.Discrete(2), (2, 1, 3)),
    **{
        f"observations of {space}": lambda space=space: Odd(gymnasium.spaces.Discrete(2), space)
        for space in (
            gymnasium.spaces.Discrete(5, start=-2),
            gymnasium.spaces.MultiDiscrete([2, 3], start=[4, -5]),
            gymnasium.spaces.MultiBinary((2, 3)),
        )
    },
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_spaces_train_save_and_predict(algorithm: type[Agent], kind: str, tmp_path: Path) -> None:
    agent = make(algorithm, vector(algorithm, ODD[kind], 2)).learn(33)
    agent.save(tmp_path / "agent")
    loaded = algorithm.load(tmp_path / "agent", device="cpu")
    observations = np.stack([agent.observation_space.sample() for _ in range(3)])
    actions, _ = loaded.predict(observations, deterministic=True)
    np.testing.assert_array_equal(actions, agent.predict(observations, deterministic=True)[0])
    assert all(agent.action_space.contains(np.asarray(x, agent.action_space.dtype)) for x in actions)
    one, _ = loaded.predict(observations[0], deterministic=True)
    # One observation and several go different ways through a product of matrices, and may be rounded differently.
    np.testing.assert_allclose(one, actions[0], rtol=1e-5, atol=1e-6)
    acted = agent.act(torch.as_tensor(observations), deterministic=True)
    np.testing.assert_array_equal(acted, actions)


def test_the_best_of_choices_counted_from_elsewhere_is_found(algorithm: type[Agent]) -> None:
    agent = make(algorithm, vector(algorithm, ODD["choices counted from -1"], 8)).learn(16 * 8 * 20)
    assert agent.predict(np.zeros(2, np.float32), deterministic=True)[0] == -1


class Context(gymnasium.Env):
    """One of four numbers is seen, and action 1 rewarded at the outer two alone: nothing that grows with them."""

    observation_space, action_space = gymnasium.spaces.Discrete(4, start=3), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.seen = int(self.np_random.integers(3, 7))
        return self.seen, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return self.seen, float(action == (self.seen in (3, 6))), True, False, {}


def test_observations_that_are_choices_are_seen_one_hot(algorithm: type[Agent]) -> None:
    agent = make(algorithm, vector(algorithm, Context, 8)).learn(16 * 8 * 60)
    assert agent.predict(np.arange(3, 7), deterministic=True)[0].tolist() == [1, 0, 0, 1]
    assert agent.policy.normalize(torch.tensor([3, 6])).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


class Gives(gymnasium.Env):
    """Ten ordinary steps, then an observation and a reward of one's choice, then ordinary steps again."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, observation: float = 0.0, reward: float = 1.0, discrete: bool = True) -> None:
        self.action_space = gymnasium.spaces.Discrete(2) if discrete else gymnasium.spaces.Box(-1, 1, (2,))
        self.given, self.steps = (observation, reward), 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        observation, reward = self.given if self.steps == 10 else (0.0, 1.0)
        return np.full(1, observation, dtype=np.float32), reward, False, False, {}


class Unchecked(GymVectorEnv):
    """Hands on what environments give, as those of others do."""

    def _check_finite(self, *args: Any) -> None: ...


OTHER = {
    AutoresetMode.SAME_STEP: AutoresetMode.DISABLED,
    AutoresetMode.DISABLED: AutoresetMode.SAME_STEP,
}
REFUSED = {
    "next-step autoreset": (
        lambda _: RescaleAction(
            gymnasium.make_vec("Pendulum-v1", 2, vectorization_mode="sync"), np.float32(-1), np.float32(1)
        ),
        r"SAME_STEP|steps and resets all",
    ),
    "dict observations": (lambda _: DictEnv(), "FlattenObservation"),
    "choices on two axes": (
        lambda _: Odd(gymnasium.spaces.Discrete(2), gymnasium.spaces.MultiDiscrete([[2, 3], [4, 2]])),
        "FlattenObservation",
    ),
    "too many values": (
        lambda _: Odd(gymnasium.spaces.Discrete(2), gymnasium.spaces.Discrete(10**12)),
        "at most 100,000.*ObservationWrapper",
    ),
    "normalized observations": (
        lambda _: VecNormalize(DummyVecEnv([lambda: gymnasium.make("CartPole-v1")])),
        "norm_obs=False",
    ),
    "another autoreset": (
        lambda algorithm: make_vec("CartPole-v1", 2, autoreset=OTHER[algorithm.autoreset]),
        r"trains with make_vec\(..., autoreset",
    ),
    "unknown id": (lambda _: "Hoper-v5", "Hopper-v5"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_trained_on_is_refused_with_a_remedy(algorithm: type[Agent], kind: str) -> None:
    env, remedy = REFUSED[kind]
    with pytest.raises(ValueError, match=remedy):
        make(algorithm, env(algorithm))


@pytest.mark.parametrize("callback", [None, lambda *_: True])
@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize(
    "given",
    [{"reward": np.nan}, {"reward": -np.inf}, {"reward": 1e38}, {"observation": np.nan}, {"observation": np.inf}],
    ids=str,
)
def test_what_nothing_can_be_learned_from_stops_training_and_is_named(
    algorithm: type[Agent], given: dict[str, float], discrete: bool, callback: Any
) -> None:
    env = Unchecked([Gives(discrete=discrete), Gives(**given, discrete=discrete)], autoreset=algorithm.autoreset)
    agent = make(algorithm, env, **({"n_steps": 16} if "n_steps" in SETTINGS[algorithm.name] else {}))
    before = parameters(agent)
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=re.escape(f"environment 1 gave the {name} {value} at step 10 of this ")):
        agent.learn(100, callback)
    assert torch.equal(parameters(agent), before)
    agent.learn(32, callback, reset_num_timesteps=False)  # in new episodes
    assert parameters(agent).isfinite().all()


@pytest.mark.parametrize("step", [16, 32])
def test_the_last_observation_of_a_rollout_is_looked_at(algorithm: type[Agent], step: int) -> None:
    env = Gives(observation=np.nan)
    env.steps = 10 - step
    agent = make(algorithm, Unchecked([env, Gives()], autoreset=algorithm.autoreset), n_steps=16)
    with pytest.raises(ValueError, match="environment 0 gave the observation nan at step 16"):
        agent.learn(100)


def test_frozen_parameters_are_refused_whenever_they_are_frozen(algorithm: type[Agent]) -> None:
    for when in ("before", "within"):
        agent = make(algorithm, "CartPole-v1")
        before = parameters(agent)
        name, parameter = next(agent.policy.named_parameters())
        if when == "before":
            parameter.requires_grad_(False)
        with pytest.raises(ValueError, match=rf"policy\.{name} is frozen.*requires_grad_\(True\)"):
            agent.learn(1000, lambda *_: not parameter.requires_grad_(False).requires_grad)  # noqa: B023
        assert torch.equal(parameters(agent), before)


@pytest.mark.parametrize(("low", "high"), [(50, 100), (-0.01, 0.01), (-1000, 1000), ([-1, -3], [1, -2])], ids=str)
def test_policies_begin_in_the_units_of_actions_or_warn(algorithm: type[Agent], low: Any, high: Any) -> None:
    space = gymnasium.spaces.Box(np.full(2, low, np.float32), np.full(2, high, np.float32))
    if algorithm.name == "pes":
        with pytest.warns(UserWarning, match=r"RescaleAction\(env, -1, 1\)"):
            make(algorithm, vector(algorithm, lambda: Odd(space), 2))
        space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*RescaleAction")
        agent = make(algorithm, vector(algorithm, lambda: Odd(space), 2))
    if algorithm.name != "pes":
        middle, half = (space.low + space.high) / 2, (space.high - space.low) / 2
        first = agent.policy.distribution(torch.zeros(1, *agent.observation_space.shape))
        assert torch.allclose((first.mean - torch.as_tensor(middle)) / torch.as_tensor(half), torch.zeros(1), atol=0.1)
        std = np.exp(agent.config.log_std_init) * half
        np.testing.assert_allclose(first.log_std.exp().detach().numpy().squeeze(), std, rtol=1e-5)


def test_bad_hyperparameters_are_named(algorithm: type[Agent]) -> None:
    with pytest.raises(ValueError, match=r"gama.*did you mean 'gamma'"):
        algorithm("MlpPolicy", "CartPole-v1", gama=0.9)
    with pytest.raises(ValueError, match="n_steps is 0"):
        algorithm("MlpPolicy", "CartPole-v1", n_steps=0)
    with pytest.raises(ValueError, match="gamma is 'high'"):
        algorithm("MlpPolicy", "CartPole-v1", gamma="high")
    with pytest.raises(ValueError, match="num_envs is 3 but env holds 2"):
        algorithm("MlpPolicy", vector(algorithm, "CartPole-v1", 2), num_envs=3)
    with pytest.raises(ValueError, match="There is no policy 'MlpPolcy'"):
        algorithm("MlpPolcy", "CartPole-v1")
    with pytest.raises(ValueError, match="policy_kwargs has no 'net_arc'"):
        algorithm("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arc": [8]})
    with pytest.raises(ValueError, match="seed is -1"):
        algorithm("MlpPolicy", "CartPole-v1", seed=-1)


def test_the_signature_names_every_hyperparameter(algorithm: type[Agent]) -> None:
    names = inspect.signature(algorithm).parameters
    assert set(algorithm.Config.names()) <= set(names)
    assert {"policy", "env", "seed", "device", "tensorboard_log", "policy_kwargs"} <= set(names)


def test_another_files_agents_are_refused(algorithm: type[Agent], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        algorithm.load(tmp_path / "missing.zip")
    (tmp_path / "noise.zip").write_bytes(b"noise")
    with pytest.raises(CheckpointError, match=r"noise\.zip"):
        algorithm.load(tmp_path / "noise.zip")


class Recorder(BaseCallback):
    """Keeps what a callback sees, and stops after some steps."""

    def __init__(self, stop_after: int) -> None:
        super().__init__()
        self.stop_after = stop_after
        self.seen: list[tuple[int, int, list[dict]]] = []
        self.step_of_rollout: list[int] = []

    def _on_step(self) -> bool:
        infos = [info for info in self.locals["infos"] if "episode" in info]
        assert self.locals["rewards"].shape == self.locals["dones"].shape == (self.training_env.num_envs,)
        assert self.locals["total_timesteps"] == 1000
        self.step_of_rollout.append(self.locals["n_steps"])
        self.seen.append((self.num_timesteps, int(self.locals["dones"].sum()), infos))
        return self.num_timesteps < self.stop_after


def test_callbacks_see_what_they_see_in_sb3_and_can_stop(algorithm: type[Agent]) -> None:
    recorder = Recorder(stop_after=400)
    agent = make(algorithm, "InvertedPendulum-v5").learn(1000, callback=recorder)
    counts = np.diff([0] + [steps for steps, _, _ in recorder.seen])
    if algorithm.autoreset is AutoresetMode.SAME_STEP:
        assert (counts == 8).all()
    else:
        # Those that have ended stand still until the next rollout.
        assert counts[0] == counts.max() == 8
        ended = [ended for _, ended, _ in recorder.seen]
        steps = recorder.step_of_rollout
        within = [k for k in range(1, len(counts)) if steps[k] > 1]
        assert all(steps[k] == steps[k - 1] + 1 and counts[k] == counts[k - 1] - ended[k - 1] for k in within)
    assert 400 <= agent.num_timesteps < 408
    episodes = [info["episode"] for _, _, infos in recorder.seen for info in infos]
    assert len(episodes) == sum(ended for _, ended, _ in recorder.seen) > 0
    # InvertedPendulum rewards every step but the one that ends an episode.
    assert all(episode["r"] == episode["l"] - 1 for episode in episodes)
    assert agent.episode_returns == [episode["r"] for episode in episodes]


def test_learning_goes_on_where_a_callback_stopped_it(algorithm: type[Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make(algorithm, "InvertedPendulum-v5").learn(1000, callback=Recorder(stop_after=400))
    if algorithm.autoreset is AutoresetMode.SAME_STEP:  # pairs begin anew elsewhere
        vector = agent.collector.vector
        assert torch.equal(agent.collector.observations, vector.snapshot()["observation"])
        monkeypatch.setattr(vector, "reset", None)
    agent.learn(128, reset_num_timesteps=False)
    assert agent.num_timesteps >= 528


def test_calls_of_learn_never_draw_the_same_numbers_again(
    algorithm: type[Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Any, ...]] = []
    stream = noise.stream
    monkeypatch.setattr(noise, "stream", lambda *key: drawn.append(key) or stream(*key))
    agent = make(algorithm, "InvertedPendulum-v5")
    for _ in range(3):
        agent.learn(128)
    assert agent.counter >= 3
    assert len(drawn) >= 3
    assert len(set(drawn)) == len(drawn)


def test_each_iteration_has_one_rollout_for_callbacks(algorithm: type[Agent]) -> None:
    told: list[str] = []

    class Ends(BaseCallback):
        def _on_rollout_start(self) -> None:
            told.append("start")

        def _on_rollout_end(self) -> None:
            told.append("end")

        def _on_step(self) -> bool:
            return True

    agent = make(algorithm, "InvertedPendulum-v5").learn(256, callback=Ends())
    assert told == ["start", "end"] * agent.iteration


def test_evaluation_and_checkpoint_callbacks_of_sb3_work(algorithm: type[Agent], tmp_path: Path) -> None:
    evaluate = EvalCallback(
        SB3View(make_vec("InvertedPendulum-v5", 2)),
        eval_freq=16,
        n_eval_episodes=2,
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    keep = CheckpointCallback(16, str(tmp_path), name_prefix="kept")
    agent = make(algorithm, "InvertedPendulum-v5").learn(512, callback=[evaluate, keep])
    assert evaluate.best_mean_reward > 0
    best = algorithm.load(tmp_path / "best_model.zip")  # within an iteration it is the iteration's beginning
    assert best.num_timesteps <= agent.num_timesteps
    assert evaluate_policy(best, SB3View(make_vec("InvertedPendulum-v5", 2)), n_eval_episodes=2)[0] > 0
    assert list(tmp_path.glob("kept_*_steps.zip"))
    mean, _ = evaluate_policy(agent, SB3View(make_vec("InvertedPendulum-v5", 2)), n_eval_episodes=4)
    assert mean > 0


def test_metrics_are_logged_under_sb3_keys(algorithm: type[Agent]) -> None:
    agent = make(algorithm, "InvertedPendulum-v5").learn(512)
    keys = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "time/total_timesteps", "time/iterations"}
    assert keys <= agent.last_metrics.keys()
    assert agent.last_metrics["time/total_timesteps"] == agent.num_timesteps >= 512
    assert agent.last_metrics["rollout/ep_rew_mean"] == pytest.approx(np.mean(agent.episode_returns))


def test_act_is_predict_on_tensors(algorithm: type[Agent]) -> None:
    agent = make(algorithm, "Hopper-v5").learn(128)
    observations = torch.randn(6, 11, dtype=torch.float64)
    actions = agent.act(observations, deterministic=True)
    assert actions.shape == (6, 3)
    np.testing.assert_array_equal(actions.numpy(), agent.predict(observations.numpy(), deterministic=True)[0])
    sampled = agent.act(torch.zeros(500, 11))
    assert sampled.abs().max() <= 1.0
    if isinstance(agent.policy, ActorPolicy):
        assert sampled.std() > 0.1
    else:
        torch.testing.assert_close(sampled, sampled[:1].expand(500, 3))


def test_set_env_goes_on_elsewhere(algorithm: type[Agent]) -> None:
    agent = make(algorithm, "CartPole-v1").learn(128)
    before = agent.num_timesteps
    agent.set_env(vector(algorithm, "CartPole-v1", 2))
    agent.learn(32, reset_num_timesteps=False)
    assert 32 <= agent.num_timesteps - before < 64
    with pytest.raises(ValueError, match="spaces do not match"):
        agent.set_env(vector(algorithm, "Pendulum-v1", 2))


def test_parameters_can_be_set_from_a_file_or_a_dict(algorithm: type[Agent], tmp_path: Path) -> None:
    source, target = (make(algorithm, "InvertedPendulum-v5", seed) for seed in (1, 2))
    source.learn(128).save(tmp_path / "source.zip")
    target.set_parameters(tmp_path / "source.zip")
    assert torch.equal(parameters(source), parameters(target))
    other = make(algorithm, "InvertedPendulum-v5", 3)
    other.set_parameters(source.get_parameters())
    assert torch.equal(parameters(source), parameters(other))


def test_a_wrapper_that_scales_rewards_is_found_and_its_statistics_are_kept(
    algorithm: type[Agent], tmp_path: Path
) -> None:
    if algorithm.autoreset is not AutoresetMode.SAME_STEP:
        pytest.skip("this algorithm takes no environments of Stable-Baselines3")

    def env() -> VecNormalize:
        return VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")] * 2), norm_obs=False)

    agent = make(algorithm, env()).learn(64)
    found = agent.get_vec_normalize_env()
    assert isinstance(found, VecNormalize)
    assert found.ret_rms.count > 60
    agent.save(tmp_path / "agent")
    loaded = algorithm.load(tmp_path / "agent", env(), device="cpu").get_vec_normalize_env()
    assert (loaded.ret_rms.mean, loaded.ret_rms.var, loaded.ret_rms.count) == (
        found.ret_rms.mean,
        found.ret_rms.var,
        found.ret_rms.count,
    )
    assert make(algorithm, "CartPole-v1").get_vec_normalize_env() is None


def test_evaluating_elsewhere_warns_of_nothing(algorithm: type[Agent], recwarn: pytest.WarningsRecorder) -> None:
    ordinary = DummyVecEnv([lambda: Monitor(gymnasium.make("CartPole-v1"))])
    make(algorithm, "CartPole-v1").learn(64, callback=EvalCallback(ordinary, eval_freq=8, n_eval_episodes=1, verbose=0))
    assert [str(warning.message) for warning in recwarn if "same type" in str(warning.message)] == []


FOLLOW_THE_SHARE: dict[str, tuple[dict[str, Any], Callable[[Any], float], list[float]]] = {
    "npg": (
        {"target_kl": 0.01, "target_kl_end": 0.002, "reused_rollouts": 0},
        lambda agent: agent.target_kl,
        [0.008, 0.006, 0.004],
    ),
    # Four updates of 32 steps are expected after each of three, so a fourth of H0 may be lost in one.
    "copos": ({}, lambda agent: agent.entropy_decrease, [math.log(2) / 4] * 3),
    "ppo": (
        {"batch_size": 16, "n_epochs": 1, "optimizer": "adabound", "handover": 0.5},
        lambda agent: agent.optimizer.param_groups[0]["gamma"],
        [handover_gamma(0.5, 8)] * 3,
    ),
    # What it collects with is said by the share before it.
    "pes": ({"sigma": 0.1, "sigma_end": 0.02}, lambda agent: agent.sigma, [0.1, 0.08, 0.06]),
}


@pytest.mark.parametrize("name", FOLLOW_THE_SHARE)
def test_a_clock_may_say_how_far_training_is(name: str) -> None:
    settings, value, expected = FOLLOW_THE_SHARE[name]
    algorithm, shares = REGISTRY[name], iter((0.25, 0.5, 0.75))
    policy = next(iter(algorithm.policy_aliases))
    agent = algorithm(policy, "CartPole-v1", seed=0, num_envs=2, n_steps=16, **settings)
    agent.share_used = lambda: next(shares)
    seen = [value(agent) for _ in zip(range(3), agent.iterations(10**15), strict=False)]
    assert seen == pytest.approx(expected)
