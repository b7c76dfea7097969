"""The PPO agent: its update against Stable-Baselines3's, its clipping by hand, its optimizers and their state."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.logger import Logger
from torch import nn

from agents import PPO, noise
from agents.optim.adabound import AUTO
from agents.optim.effective_steps import report
from agents.optim.registry import OPTIMIZERS
from agents.policy.networks import parameter_vector
from agents.ppo import Minibatch, PPOConfig
from agents.rollout.buffer import Rollout
from agents.rollout.surrogates import clipped_surrogate
from envs import make_vec
from envs.sb3 import SB3View

AS_SB3 = {"normalize_observations": False, "normalize_returns": False, "optimizer": "adam", "eps": 1e-5}
METRICS = (
    "approx_kl",
    "clip_fraction",
    "entropy_loss",
    "value_loss",
    "policy_gradient_loss",
    "loss",
    "explained_variance",
)


def make(env: Any = "InvertedPendulum-v5", **changed: Any) -> PPO:
    """An agent of four environments, 128 steps together, and two minibatches."""
    settings = {"n_steps": 32, "net_arch": (8,), "batch_size": 64, "n_epochs": 3} | changed
    if isinstance(env, str):
        settings = {"num_envs": 4} | settings
    return PPO("MlpPolicy", env, seed=0, device="cpu", **settings)


def collect(agent: PPO) -> Rollout:
    """One iteration's rollout without its update."""
    batches: list[Rollout] = []
    agent.train = batches.append  # type: ignore[method-assign]
    next(agent.iterations(1))
    del agent.train
    return batches[0]


def parameters(agent: PPO) -> torch.Tensor:
    return nn.utils.parameters_to_vector(agent.policy.parameters()).detach().clone()


# The update -----------------------------------------------------------------------------------------------------------


def linear_layers(*modules: nn.Module) -> list[nn.Linear]:
    return [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]


def pairs(agent: PPO, theirs: stable_baselines3.PPO) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our parameters beside Stable-Baselines3's."""
    ours, policy = agent.policy, theirs.policy
    layers = zip(
        linear_layers(ours.actor.net, ours.critic.network),
        linear_layers(
            policy.mlp_extractor.policy_net, policy.action_net, policy.mlp_extractor.value_net, policy.value_net
        ),
        strict=True,
    )
    found = [(getattr(a, name), getattr(b, name)) for a, b in layers for name in ("weight", "bias")]
    return found if ours.actor.log_std is None else [*found, (ours.actor.log_std.bias, policy.log_std)]


def fill(theirs: stable_baselines3.PPO, agent: PPO, rollout: Rollout) -> None:
    """Put the rollout into Stable-Baselines3's buffer, in the way its collect_rollouts does."""
    buffer, policy = theirs.rollout_buffer, theirs.policy
    ended = rollout["terminated"] | rollout["truncated"]
    rewards = rollout["rewards"].clone()
    steps, ids, final = rollout.final_observations()
    with torch.no_grad():
        bootstrap = agent.config.gamma * policy.predict_values(final)[:, 0]
        rewards[steps, ids] += bootstrap.masked_fill(rollout["terminated"][steps, ids], 0.0)
        starts = np.ones(rollout.num_envs, dtype=bool)
        for t in range(rollout.n_steps):
            values, log_prob, _ = policy.evaluate_actions(rollout["observations"][t], rollout["actions"][t])
            observations, actions = rollout["observations"][t].numpy(), rollout["actions"][t].numpy()
            buffer.add(observations, actions, rewards[t].numpy(), starts, values, log_prob)
            starts = ended[t].numpy()
        assert rollout.last_observations is not None
        last_values = policy.predict_values(rollout.last_observations.float())
    buffer.compute_returns_and_advantage(last_values, starts)


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "CartPole-v1"])
@pytest.mark.parametrize(("target_kl", "clip_range_vf"), [(None, None), (3e-5, None), (None, 0.01)])
def test_the_update_is_that_of_sb3(
    env_id: str, target_kl: float | None, clip_range_vf: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ent_coef": 0.01, "learning_rate": 3e-3, "clip_range": 0.05, "max_grad_norm": 0.3, "gae_lambda": 0.9}
    settings["clip_range_vf"] = clip_range_vf
    env = make_vec(env_id, 4, max_episode_steps=15)
    agent = make(env, **AS_SB3, **settings, target_kl=target_kl)
    theirs = stable_baselines3.PPO(
        "MlpPolicy",
        SB3View(make_vec(env_id, 4)),
        n_steps=32,
        batch_size=64,
        n_epochs=3,
        policy_kwargs={"net_arch": [8]},
        device="cpu",
        target_kl=target_kl,
        **settings,
    )
    theirs.set_logger(Logger(None, []))
    # The critic begins at zero, which would hide how values enter.
    torch.nn.init.normal_(agent.policy.critic.network[-1].weight)
    with torch.no_grad():
        for ours, other in pairs(agent, theirs):
            other.copy_(ours)
    batch = collect(agent)
    assert batch["terminated"].any()
    assert batch["truncated"].any()
    fill(theirs, agent, batch)
    before = parameters(agent)

    # A minibatch's rows count environments first there, and steps first here.
    orders = iter(
        (rows % 4 * 32 + rows // 4).numpy()
        for rows in (noise.permutation(agent.stream_seed, "minibatch", agent.counter, 128, e) for e in range(3))
    )
    monkeypatch.setattr(np.random, "permutation", lambda n: next(orders))
    theirs.train()
    agent.train(batch)

    assert (parameters(agent) - before).abs().max() > 1e-3
    for ours, other in pairs(agent, theirs):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=0)
    for name in METRICS:
        key = f"train/{name}"
        assert agent.logger.name_to_value[key] == pytest.approx(theirs.logger.name_to_value[key], rel=1e-3, abs=1e-6)
    assert (next(orders, None) is None) == (target_kl is None)


def test_the_surrogate_is_clipped_where_clipping_makes_it_smaller() -> None:
    """By hand with ε = 0.2: min(1.5 * 2, 1.2 * 2) = 2.4 and min(0.5 * -1, 0.8 * -1) = -0.8, whose mean is 0.8.

    Both samples have gone as far as they may and give no gradient. With the advantages' signs turned, min(1.5 * -2,
    1.2 * -2) = -3 and min(0.5 * 1, 0.8 * 1) = 0.5, whose mean is -1.25: nothing is clipped.
    """
    ratio = torch.tensor([1.5, 0.5], requires_grad=True)
    advantages = torch.tensor([2.0, -1.0])
    clipped, free = (clipped_surrogate(ratio, sign * advantages, clip_range=0.2) for sign in (1, -1))
    assert clipped.item() == pytest.approx(0.8)
    assert free.item() == pytest.approx(-1.25)
    assert torch.autograd.grad(clipped, ratio)[0].tolist() == [0.0, 0.0]
    assert torch.autograd.grad(free, ratio)[0].tolist() == [-1.0, 0.5]


def test_each_epoch_takes_every_sample_once_in_an_order_of_its_own() -> None:
    agent = make()

    def epochs() -> torch.Tensor:
        """The rows that are visited, [epochs, 128]."""
        rows = torch.arange(128)
        minibatches = list(agent._minibatches(Minibatch(rows, rows, rows.float(), rows, rows, rows)))
        assert all(torch.equal(m.s, m.a) and torch.equal(m.s, m.log_old) for m in minibatches)
        return torch.cat([m.s for m in minibatches]).view(3, 128)

    first = epochs()
    assert torch.equal(first.sort().values, torch.arange(128).expand(3, -1))
    assert not torch.equal(first[0], first[1])
    agent.counter += 1
    assert not torch.equal(first[0], epochs()[0])


def test_a_kl_above_its_target_ends_the_updates() -> None:
    free, stopped = make(learning_rate=3e-2), make(learning_rate=3e-2, target_kl=1e-4)
    for agent in (free, stopped):
        agent.learn(128)
    # The first minibatch has no KL to the policy that it starts from.
    assert [updates(agent) for agent in (free, stopped)] == [6, 1]
    assert stopped.last_metrics["train/kl"] < free.last_metrics["train/kl"]


def updates(agent: PPO) -> int:
    return int(next(iter(agent.optimizer.state.values()))["step"])


def test_results_do_not_depend_on_the_units_of_reward() -> None:
    def learned(forward_reward_weight: float, ctrl_cost_weight: float, **changed: Any) -> torch.Tensor:
        weights = {"forward_reward_weight": forward_reward_weight, "ctrl_cost_weight": ctrl_cost_weight}
        agent = make(make_vec("HalfCheetah-v5", 4, **weights), **changed).learn(128 * 4)
        return parameters(agent)

    same, other = learned(1.0, 0.125), learned(64.0, 8.0)
    torch.testing.assert_close(same, other, atol=1e-4, rtol=0)
    assert not torch.allclose(other, learned(64.0, 8.0, normalize_returns=False), atol=1e-3)


def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    agent = make(normalize_returns=False)
    batch = collect(agent)
    batch["rewards"].fill_(float("inf"))
    before = parameters(agent)
    with pytest.raises(FloatingPointError, match="gradient's norm is nan"):
        agent.train(batch)
    assert torch.equal(parameters(agent), before)


# The minibatch size ---------------------------------------------------------------------------------------------------


def test_a_batch_size_that_does_not_divide_the_rollout_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 60, .* 32 \* 4 = 128; give a divisor, such as 64"):
        make(batch_size=60)
    with pytest.raises(ValueError, match=r"batch_size is 256, .* such as 128"):
        make(batch_size=256)
    # The environments that are given count, not num_envs' default.
    assert make(make_vec("InvertedPendulum-v5", 3), batch_size=48).learn(96).iteration == 1
    with pytest.raises(ValueError, match=r"32 \* 3 = 96"):
        make().set_env(make_vec("InvertedPendulum-v5", 3))


# Optimizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_and_goes_on_from_its_saved_state(name: str, tmp_path: Path) -> None:
    settings = {"optimizer": name, "handover": 9.0}
    whole, half = make(**settings).learn(128 * 4), make(**settings).learn(128 * 2)
    half.save(tmp_path / "half.zip")
    assert type(half.optimizer) is OPTIMIZERS[name]
    resumed = PPO.load(tmp_path / "half.zip", make_vec("InvertedPendulum-v5", 4), device="cpu")
    state = half.own_tensors()
    assert state.keys() == resumed.own_tensors().keys()
    assert all(torch.equal(value, resumed.own_tensors()[key]) for key, value in state.items())
    resumed.learn(128 * 2, reset_num_timesteps=False)
    assert torch.equal(parameters(resumed), parameters(whole))
    if name == "sgd":
        assert not state
        return
    forgetful = PPO.load(tmp_path / "half.zip", make_vec("InvertedPendulum-v5", 4), device="cpu")
    forgetful.optimizer.state.clear()
    forgetful.learn(128 * 2, reset_num_timesteps=False)
    assert not torch.equal(parameters(forgetful), parameters(whole))


def test_another_optimizer_begins_anew_from_a_saved_agent(tmp_path: Path) -> None:
    make().learn(128).save(tmp_path / "agent.zip")
    agent = PPO.load(tmp_path / "agent.zip", make_vec("InvertedPendulum-v5", 4), optimizer="rmsprop")
    assert not agent.optimizer.state
    agent.learn(128, reset_num_timesteps=False)


def test_the_handover_is_a_share_of_the_planned_steps_or_a_number_of_steps() -> None:
    """128 * 10 environment steps are 10 iterations of 3 epochs of 2 minibatches: 60 optimizer steps."""
    for handover, steps in ((0.5, 30), (1.0, 60), (12.0, 12)):
        agent = make(handover=handover)
        next(agent.iterations(128 * 10 - 5))
        assert [group["gamma"] for group in agent.optimizer.param_groups] == pytest.approx([1 / steps] * 2)


def test_by_default_the_handover_does_not_depend_on_how_training_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.ppo.HANDOVER_STEPS", 128 * 3)  # of 128 steps and 6 optimizer steps per iteration
    whole, cut, again = make(), make(), make()
    whole.learn(128 * 6)
    for _ in range(6):
        cut.learn(128, reset_num_timesteps=False)
    for _ in range(2):
        again.learn(128 * 3)
    groups = whole.optimizer.param_groups
    assert [group["gamma"] for group in groups] == pytest.approx([1 / 18] * 2)
    assert all(isinstance(group["final_lr"], float) for group in groups)
    assert torch.equal(parameter_vector(whole.policy), parameter_vector(cut.policy))
    for group, same in zip(groups, again.optimizer.param_groups, strict=True):
        assert group["gamma"] == same["gamma"]


def test_policy_and_critic_hand_over_to_step_sizes_of_their_own() -> None:
    agent = make(handover=0.5)
    measured = []
    for _ in agent.iterations(128 * 4):
        measured.append([group["final_lr"] for group in agent.optimizer.param_groups])
    assert measured[0] == [AUTO, AUTO]
    policy, critic = measured[1]
    assert 0 < policy != critic > 0
    assert measured[3] == measured[1]
    given = make(final_lr=0.1)
    assert [group["final_lr"] for group in given.optimizer.param_groups] == [0.1, 0.1]


def test_the_defaults_are_sb3s_but_for_those_that_are_said_to_differ() -> None:
    theirs = inspect.signature(stable_baselines3.PPO.__init__).parameters
    ours = PPOConfig()
    shared = set(theirs) & set(PPOConfig.names())
    assert len(shared) == 13
    assert {name for name in shared if getattr(ours, name) != theirs[name].default} == {"n_steps"}
    assert ours.n_steps * ours.num_envs == theirs["n_steps"].default


def test_settings_reach_the_optimizer() -> None:
    for name in OPTIMIZERS:
        agent = make(optimizer=name, learning_rate=0.02, eps=1e-4)
        for group in agent.optimizer.param_groups:
            assert group["lr"] == 0.02
            assert group.get("eps", 1e-4) == 1e-4
    with pytest.raises(ValueError, match="no optimizer 'adabond'; did you mean 'adabound'"):
        make(optimizer="adabond")


# Metrics --------------------------------------------------------------------------------------------------------------


def test_the_kl_and_the_effective_steps_are_logged() -> None:
    agent = make(handover=4.0, learning_rate=1e-2)
    batch = collect(agent)
    s = agent.policy.normalize(batch["observations"].flatten(0, 1))
    with torch.no_grad():
        old = agent.policy.actor(s)
    agent.train(batch)
    logged = agent.logger.name_to_value
    assert logged["train/kl"] == pytest.approx(old.kl(agent.policy.actor(s)).mean().item())
    assert logged["train/kl"] > 0
    steps = report(agent.optimizer, ("policy", "critic"))
    assert len(steps) == 2 * (3 + 3 + 2 + 2)
    assert steps.items() <= {key.removeprefix("train/"): value for key, value in logged.items()}.items()
    for name in ("policy", "critic"):
        assert steps[f"effective_step_{name}_q05"] > steps[f"adam_step_{name}_q05"]
        assert steps[f"effective_step_{name}_raised"] > 0
    charted = {curve for charts in PPO.dashboard.values() for curves in charts.values() for curve in curves}
    assert {curve for curve in charted if curve.startswith("train/")} <= logged.keys()
    assert not any("step" in key for key in make(optimizer="adam").learn(128).last_metrics if "train" in key)


def test_bounds_are_logged_once_there_are_any() -> None:
    """Before the hand-over, at update 9 of 24, the automatic final step size is not known."""
    agent = make(handover=9.0)
    logged = ["train/effective_step_policy_upper" in agent.last_metrics for _ in agent.iterations(128 * 4)]
    assert logged == [False, True, True, True]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 1),
        ("n_epochs", 0),
        ("clip_range", 0.0),
        ("target_kl", 0.0),
        ("gae_lambda", 1.5),
        ("ent_coef", -1.0),
        ("vf_coef", -1.0),
        ("max_grad_norm", 0.0),
        ("learning_rate", 0.0),
        ("eps", 0.0),
        ("final_lr", 0.0),
        ("handover", 0.0),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*; give"):
        PPOConfig.of({name: value})


def test_a_minibatch_of_one_sample_needs_advantages_as_they_are() -> None:
    assert make(batch_size=1, normalize_advantage=False, n_epochs=1).learn(128).iteration == 1
