"""What people know from Stable-Baselines3, for every registered algorithm."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, LogEveryNTimesteps
from stable_baselines3.common.policies import ActorCriticPolicy as OfSB3
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from test_agent import SETTINGS, make, parameters, vector

from agents import NPG, PPO, REGISTRY, Agent, checkpoint
from agents.optim.registry import OPTIMIZERS
from agents.policy.networks import parameter_vector

SCHEDULED = {"learning_rate": 1e-2, "clip_range": 0.2}


@pytest.fixture(params=REGISTRY, name="algorithm")
def _algorithm(request: pytest.FixtureRequest) -> type[Agent]:
    return REGISTRY[request.param]


def scheduled(algorithm: type[Agent]) -> dict[str, float]:
    return {name: value for name, value in SCHEDULED.items() if name in algorithm.Config.names()}


# Policies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"net_arch": [64.5]}, r"net_arch is \[64.5\]; give a list of integers of at least 1"),
        ({"net_arch": 64}, "net_arch is 64; give a list"),
        ({"net_arch": [-1]}, r"net_arch is \[-1\]"),
        ({"net_arch": [8, {"pi": [8]}]}, "net_arch is .*; give a list"),
        ({"net_arch": {"pi": [8], "qf": [8]}}, "net_arch is .*give a list, or a dict of pi"),
        ({"activation_fn": torch.nn.Softmax}, "activation is .*; use one of tanh"),
        ({"log_std_init": float("nan")}, "log_std_init is nan|policy_kwargs has no 'log_std_init'"),
        ({"normalize_observations": "no"}, "normalize_observations is 'no'; give True or False"),
        ({"features_extractor_class": None}, "policy_kwargs has no 'features_extractor_class'; give one of"),
    ],
    ids=str,
)
def test_policy_kwargs_are_checked_as_hyperparameters_are(
    algorithm: type[Agent], wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(algorithm, "CartPole-v1", policy_kwargs=wrong)


def test_policy_kwargs_are_what_the_hyperparameters_say(algorithm: type[Agent]) -> None:
    agent = make(algorithm, "CartPole-v1", policy_kwargs={"net_arch": [np.int64(5)], "activation_fn": torch.nn.ReLU})
    assert (agent.config.net_arch, agent.config.activation_fn) == ((5,), "relu")
    assert agent.net_arch == (5,)


def test_actor_and_critic_may_have_sizes_of_their_own(algorithm: type[Agent], tmp_path: Path) -> None:
    has_critic = "value_network" in algorithm.Config.names()
    sizes = {"pi": [5, 4], "vf": [7]} if has_critic else {"pi": [5, 4]}
    agent = make(algorithm, "CartPole-v1", policy_kwargs={"net_arch": sizes}).learn(128)
    agent.save(tmp_path / "agent")
    for made in (agent, algorithm.load(tmp_path / "agent", device="cpu")):
        assert [len(x) for x in made.policy.actor.net.parameters()][::2] == [5, 4, 2]
        if has_critic:
            assert [len(x) for x in made.policy.critic.network.parameters()][::2] == [7, 1]
            assert made.config.net_arch == (5, 4)
    alone = make(algorithm, "CartPole-v1", policy_kwargs={"net_arch": {"pi": [3]}})
    assert alone.policy.actor.net[0].out_features == 3
    if has_critic:
        assert len(alone.policy.critic.network) == 1
    else:
        with pytest.raises(ValueError, match="give a list, or a dict of pi"):
            make(algorithm, "CartPole-v1", policy_kwargs={"net_arch": {"pi": [5], "vf": [7]}})


def test_an_old_list_of_a_dict_of_sizes_is_taken_with_a_warning(algorithm: type[Agent]) -> None:
    with pytest.warns(UserWarning, match=r"give the dict alone, net_arch=\{'pi': \[5\]\}"):
        agent = make(algorithm, "CartPole-v1", policy_kwargs={"net_arch": [{"pi": [5]}]})
    assert agent.policy.actor.net[0].out_features == 5


def test_what_sb3s_policies_have_by_default_changes_nothing(algorithm: type[Agent]) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(OfSB3).parameters.items()
        if parameter.default is not parameter.empty and not name.startswith("optimizer_")
    }
    ours = {"activation_fn", "ortho_init", "log_std_init"}  # which policies have or have not
    given = {name: value for name, value in defaults.items() if name not in ours}
    assert len(given) == 9
    plain, carried = make(algorithm, "CartPole-v1"), make(algorithm, "CartPole-v1", policy_kwargs=given)
    assert torch.equal(parameters(plain), parameters(carried))
    with pytest.raises(ValueError, match="policy_kwargs has no 'squash_output'"):
        make(algorithm, "CartPole-v1", policy_kwargs={"squash_output": True})


def test_weights_may_begin_as_pytorchs_layers_do(algorithm: type[Agent]) -> None:
    if "ortho_init" not in algorithm.policy_aliases["MlpPolicy"].options_of_its_own:
        pytest.skip("this algorithm's policies have no such choice")
    agent = make(algorithm, "CartPole-v1", policy_kwargs={"ortho_init": False}, net_arch=(64,))
    assert agent.policy.actor.net[0].weight.abs().max() <= 0.5  # uniform up to 1 / √4
    assert torch.unique(agent.learn(128).policy.actor.net[0].weight).numel() > 4 * 32


@pytest.mark.parametrize("policy", [OfSB3, object, 3, "CnnPolicy", "MultiInputPolicy"], ids=str)
def test_policies_of_others_are_refused_with_those_that_there_are(algorithm: type[Agent], policy: Any) -> None:
    with pytest.raises(ValueError, match="MlpPolicy"):
        make(algorithm, "CartPole-v1", policy=policy)


def test_an_optimizer_in_policy_kwargs_is_a_hyperparameter() -> None:
    given = {"optimizer_class": torch.optim.RMSprop, "optimizer_kwargs": {"eps": 1e-3}}
    agent = make(PPO, "CartPole-v1", policy_kwargs=given)
    assert (agent.config.optimizer, agent.config.eps) == ("rmsprop", 1e-3)
    assert all(group["eps"] == 1e-3 for group in agent.optimizer.param_groups)
    for kind in (torch.optim.LBFGS, RMSpropTFLike):
        with pytest.raises(ValueError, match=r"There is no optimizer '.*; (give one of|did you mean) "):
            make(PPO, "CartPole-v1", policy_kwargs={"optimizer_class": kind})
    with pytest.raises(ValueError, match="optimizer_kwargs has 'weight_decay'; give eps"):
        make(PPO, "CartPole-v1", policy_kwargs={"optimizer_kwargs": {"weight_decay": 0.1}})
    with pytest.raises(ValueError, match="policy_kwargs has no 'optimizer_"):
        make(NPG, "CartPole-v1", policy_kwargs=given)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "InvertedPendulum-v5", "probes/MultiDiscreteBandit-v0"])
def test_policies_give_values_and_probabilities_as_in_sb3(algorithm: type[Agent], env_id: str) -> None:
    agent = make(algorithm, env_id).learn(128)
    policy = agent.policy
    if not hasattr(policy, "critic"):
        pytest.skip("this algorithm's policies have no critic")
    obs, _ = policy.obs_to_tensor(np.stack([agent.observation_space.sample().clip(-1, 1) for _ in range(5)]))
    with torch.no_grad():
        actions, values, log_prob = policy(obs)
        torch.testing.assert_close(values, policy.predict_values(obs))
        assert actions.shape == (5, *agent.action_space.shape)
        assert values.shape == (5, 1)
        found = policy.evaluate_actions(obs, actions)
        torch.testing.assert_close(found[0], values)
        torch.testing.assert_close(found[1], log_prob)
        distribution = policy.get_distribution(obs)
        torch.testing.assert_close(found[2], distribution.entropy())
        best = policy(obs, deterministic=True)[0]
        assert torch.equal(best.reshape(5, -1), distribution.mode().reshape(5, -1))


# Hyperparameters -----------------------------------------------------------------------------------------------------


def test_hyperparameters_are_attributes_which_are_not_set_in_vain(algorithm: type[Agent]) -> None:
    agent = make(algorithm, "CartPole-v1")
    for name in ("gamma", "n_steps", *scheduled(algorithm)):
        assert getattr(agent, name) == getattr(agent.config, name)
        with pytest.raises(AttributeError, match=rf"{name} is fixed when an agent is made"):
            setattr(agent, name, 0.5)
    if "learning_rate" in algorithm.Config.names():
        assert agent.lr_schedule(0.3) == agent.learning_rate
        with pytest.raises(AttributeError, match="lr_schedule"):
            agent.lr_schedule = lambda left: 0.0
        assert make(algorithm, "CartPole-v1", learning_rate=lambda left: left / 100).lr_schedule(0.5) == 0.005
    else:
        assert not hasattr(agent, "learning_rate")
        assert not hasattr(agent, "lr_schedule")


def test_schedules_are_followed_and_said_not_to_be_kept(algorithm: type[Agent], tmp_path: Path) -> None:
    names = scheduled(algorithm)
    if not names:
        pytest.skip("this algorithm has no hyperparameter with a schedule")
    seen: dict[str, list[float]] = {name: [] for name in names}

    def falling(name: str) -> Any:
        return lambda left: seen[name].append(left) or names[name] * left

    agent = make(algorithm, "CartPole-v1", **{name: falling(name) for name in names})
    used = []
    for _ in agent.iterations(128 * 4):
        used.append(agent.learning_rate)
        if hasattr(agent, "optimizer") and algorithm.name != "pes":
            assert all(group["lr"] == used[-1] for group in agent.optimizer.param_groups)
    assert used == sorted(used, reverse=True)
    assert used[-1] == 0
    assert len(set(used)) == len(used) >= 4
    assert all(min(lefts) == 0 and max(lefts) == 1 for lefts in seen.values())
    agent.save(tmp_path / "agent")
    with pytest.warns(UserWarning, match="learning_rate had a schedule"):
        assert algorithm.load(tmp_path / "agent", device="cpu").learning_rate == names["learning_rate"]
    again = algorithm.load(tmp_path / "agent", custom_objects={name: lambda left: 0.5 * left for name in names})
    assert set(again.schedules) == set(names)


def test_a_schedule_may_begin_at_zero(algorithm: type[Agent]) -> None:
    names = scheduled(algorithm)
    if not names:
        pytest.skip("this algorithm has no hyperparameter with a schedule")
    warming = {name: lambda left, x=x: x * (1 - left) for name, x in names.items()}
    agent = make(algorithm, "CartPole-v1", **warming)
    assert [getattr(agent, name) for name in names] == [0.0] * len(names)
    used = [agent.learning_rate for _ in agent.iterations(128 * 4)]
    assert used == sorted(used)
    assert used[-1] == pytest.approx(names["learning_rate"])


def test_a_constant_schedule_is_the_constant(algorithm: type[Agent]) -> None:
    names = scheduled(algorithm)
    by_schedule = make(algorithm, "CartPole-v1", **{name: lambda _, x=x: np.float64(x) for name, x in names.items()})
    assert torch.equal(
        parameters(by_schedule.learn(256)), parameters(make(algorithm, "CartPole-v1", **names).learn(256))
    )


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_schedule_of_other_numbers_is_refused(value: float) -> None:
    agent = make(PPO, "CartPole-v1", learning_rate=lambda left: 1e-3 if left == 1 else value)
    with pytest.raises(ValueError, match=f"the schedule of learning_rate gives {value} at"):
        agent.learn(1000)
    with pytest.raises(ValueError, match="gamma is <function"):
        make(PPO, "CartPole-v1", gamma=lambda left: left)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpy_scalars_are_numbers(algorithm: type[Agent], kind: Any, tmp_path: Path) -> None:
    own = SETTINGS[algorithm.name]
    agent = make(
        algorithm,
        "CartPole-v1",
        seed=kind(3),
        n_steps=kind(own["n_steps"]),
        gamma=np.float32(0.5),
        normalize_observations=np.bool_(True),
        net_arch=[kind(16)],
        stats_window_size=kind(7),
    ).learn(np.int64(256))
    agent.save(tmp_path / "agent")
    json.dumps(checkpoint.read_manifest(tmp_path / "agent.zip"))
    plain = make(algorithm, "CartPole-v1", seed=3, gamma=0.5, stats_window_size=7).learn(256)
    assert torch.equal(parameters(plain), parameters(agent))
    with pytest.raises(ValueError, match=r"seed is 0\.5"):
        make(algorithm, "CartPole-v1", seed=0.5)


def test_a_standard_deviation_below_its_floor_is_refused(algorithm: type[Agent]) -> None:
    if "log_std_min" not in algorithm.Config.names():
        pytest.skip("this algorithm has no floor")
    for given in ({"log_std_init": -2.0}, {"policy_kwargs": {"log_std_init": -2.0}}):
        with pytest.raises(ValueError, match=r"log_std_init is -2.0, below log_std_min, -1.0"):
            make(algorithm, "Pendulum-v1", log_std_min=-1.0, **given)
    if "log_std_end" in algorithm.Config.names():
        for end in (-1.5, 0.5):
            with pytest.raises(ValueError, match=rf"log_std_end is {end}.*at most that, and at least log_std_min, -1"):
                make(algorithm, "Pendulum-v1", log_std_init=0.0, log_std_min=-1.0, log_std_end=end)


def test_keywords_of_sb3_that_change_nothing_are_taken() -> None:
    make(
        PPO, "CartPole-v1", policy_kwargs={"net_arch": None}, use_sde=False, sde_sample_freq=-1, _init_setup_model=True
    )
    with pytest.raises(ValueError, match="no hyperparameter 'use_sde'"):
        make(PPO, "CartPole-v1", use_sde=True)


# Logging -------------------------------------------------------------------------------------------------------------


class Dumps(BaseCallback):
    """Keeps the steps at which the logger is written."""

    def _on_training_start(self) -> None:
        self.at: list[int] = []
        dump = self.logger.dump
        self.logger.dump = lambda step=0: self.at.append(step) or dump(step)  # type: ignore[method-assign]

    def _on_step(self) -> bool:
        return True


def test_logs_are_written_when_callbacks_ask(algorithm: type[Agent]) -> None:
    dumps = Dumps()
    agent = make(algorithm, "CartPole-v1").learn(512, [dumps, LogEveryNTimesteps(64)], log_interval=None)
    assert len(dumps.at) >= 6
    assert all(later - earlier >= 64 - 8 for earlier, later in zip(dumps.at, dumps.at[1:], strict=False))
    assert agent.last_metrics["time/total_timesteps"] == agent.num_timesteps
    agent.learn(256, dumps, log_interval=None)
    assert dumps.at == []


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_loaded_agent_is_as_talkative_as_it_was_or_as_one_asks(algorithm: type[Agent], tmp_path: Path) -> None:
    agent = make(algorithm, "CartPole-v1", verbose=0, tensorboard_log=tmp_path / "tb", stats_window_size=9)
    agent.verbose = 2
    agent.save(tmp_path / "agent")
    loaded = algorithm.load(tmp_path / "agent", device="cpu")
    assert (loaded.verbose, loaded.tensorboard_log, loaded.seed) == (2, str(tmp_path / "tb"), 0)
    assert (loaded._stats_window_size, loaded.stream_seed) == (9, agent.stream_seed)
    other = algorithm.load(tmp_path / "agent", device="cpu", verbose=0, tensorboard_log=None, seed=5)
    assert (other.verbose, other.tensorboard_log, other.seed, other.stream_seed) == (0, None, 5, 5)
    changed = algorithm.load(tmp_path / "agent", device="cpu", custom_objects={"gamma": 0.5, "verbose": 0})
    assert (changed.gamma, changed.verbose) == (0.5, 0)
    with pytest.raises(ValueError, match="no hyperparameter 'gama'"):
        algorithm.load(tmp_path / "agent", custom_objects={"gama": None})
    only_predicts = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    loaded = algorithm.load(
        tmp_path / "agent", vector(algorithm, "CartPole-v1", 8), device="cpu", custom_objects=only_predicts
    )
    assert [getattr(loaded, name) for name in scheduled(algorithm)] == [0.0] * len(scheduled(algorithm))
    before = parameter_vector(loaded.policy.actor)
    loaded.learn(64)
    moved = not torch.equal(parameter_vector(loaded.policy.actor), before)
    assert moved == ("learning_rate" not in scheduled(algorithm))  # steps of size 0 lead nowhere, as in SB3


@pytest.mark.parametrize("part", ["policy", "actor"])
def test_compiled_policies_train_and_are_saved_as_others_are(algorithm: type[Agent], part: str, tmp_path: Path) -> None:
    agent = make(algorithm, "CartPole-v1")
    if part == "policy":
        agent.policy = torch.compile(agent.policy, backend="eager")
        agent.learn(256)
    else:
        agent.policy.actor.net = torch.compile(agent.policy.actor.net, backend="eager")
    agent.save(tmp_path / "agent")
    loaded = algorithm.load(tmp_path / "agent", vector(algorithm, "CartPole-v1", 8), device="cpu")
    assert torch.equal(parameters(loaded), parameters(agent))
    agent.set_parameters(tmp_path / "agent.zip")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_follows_a_schedule_to_its_end(name: str) -> None:
    agent = make(PPO, "CartPole-v1", optimizer=name, learning_rate=lambda left: 1e-2 * left).learn(512)
    assert parameters(agent).isfinite().all()


def test_nothing_is_left_out_of_a_file_in_vain(algorithm: type[Agent], tmp_path: Path) -> None:
    agent = make(algorithm, "CartPole-v1")
    for given in ({"exclude": ["env"]}, {"include": ["env"]}):
        with pytest.raises(ValueError, match="give neither exclude nor include"):
            agent.save(tmp_path / "agent", **given)


def test_npg_has_no_learning_rate_that_says_nothing() -> None:
    with pytest.raises(ValueError, match="NPGConfig has no hyperparameter 'learning_rate'"):
        make(NPG, "CartPole-v1", learning_rate=1e-3)
