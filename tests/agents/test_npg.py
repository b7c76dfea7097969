"""The natural policy gradient agent: its update against the definition, its units, its degenerate cases."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import NPG, TRPO
from agents.natural import CURVATURES
from agents.natural.scores import dense_scores
from agents.natural.step import KL_TOLERANCE
from agents.npg import CERTAIN, NPGConfig
from agents.policy.actor_critic import ActorCriticPolicy
from agents.policy.networks import parameter_vector
from agents.rollout.buffer import Rollout, standardize
from agents.rollout.buffer import advantages as rollout_advantages
from envs import make_vec
from envs.probes import ContinuousAction


def make(env: Any = "InvertedPendulum-v5", **changed: Any) -> NPG:
    """An agent of four environments that learns from each sample once, with one discount."""
    settings = {"n_steps": 32, "num_envs": 4, "net_arch": (8,), "reused_rollouts": 0, "gamma_end": None} | changed
    return NPG("MlpPolicy", env, seed=0, device="cpu", **settings)


def collect(agent: NPG) -> None:
    """One iteration's rollout without its update."""
    agent.train = lambda batch: None  # type: ignore[method-assign]
    next(agent.iterations(1))
    del agent.train


@torch.no_grad()
def test_samples_of_earlier_policies_count_by_how_likely_the_policy_still_takes_them() -> None:
    """The third update's advantages are ρ A, with ρ = min(1, π / μ) of the policies that acted and V-trace's A."""
    agent, acted, given = make(target_kl=0.3, reused_rollouts=2, reuse_until=None), [], []
    direction = agent.curvature.direction
    agent.curvature.direction = lambda Psi, A, rows: given.append(A) or direction(Psi, A, rows)  # type: ignore
    agent.train = lambda batch: acted.append(copy.deepcopy(agent.policy)) or NPG.train(agent, batch)  # type: ignore
    agent.learn(3 * 128)
    batch, pi = agent.recent.rollout, acted[2]
    assert batch is not None
    s, a = (batch[name].unflatten(1, (3, 4)) for name in ("observations", "actions"))  # [T, rollouts, N, ...]

    def log_probs(policy: Any, place: int) -> Tensor:
        of_one = policy.normalize(s[:, place].flatten(0, 1))
        return policy.actor(of_one).log_prob(a[:, place].flatten(0, 1)).view(32, 4)

    rho = torch.cat([(log_probs(pi, k) - log_probs(mu, k)).exp().clamp(max=1) for k, mu in enumerate(acted)], 1)
    assert (rho[:, :8] < 0.9).any()
    assert (rho[:, 8:] == 1).all()
    values = pi.critic(pi.normalize(batch["observations"].flatten(0, 1)))
    A, _ = rollout_advantages(batch, values, pi, agent.config.gamma, agent.config.gae_lambda, rho.flatten())
    torch.testing.assert_close(given[2], rho.flatten() * standardize(A, rho.flatten()), rtol=1e-3, atol=1e-3)
    assert (given[2] - standardize(A)).abs().max() > 0.1


def test_reuse_fades_in_equal_times_until_samples_are_learned_from_once() -> None:
    """Iterations of 1, 2, 4 and then 8 rollouts of 4 steps, of which the last 8, 4, 2, 1 make 128 samples."""
    agent, before, seen = make(n_steps=4, reused_rollouts=7, reuse_until=0.6, target_kl_end=None), 0, {}
    for _ in agent.iterations(2000):
        new = 2 ** min(int(before / 400), 3)
        caution = (new / 8) ** 1.5
        assert agent.num_timesteps - before == 16 * new
        assert agent.last_metrics["train/kl"] == pytest.approx(0.04 * caution, rel=KL_TOLERANCE)
        assert agent.curvature.damping == pytest.approx(agent.config.cg_damping / caution)
        learned = agent.recent.rollout
        seen[new] = None if learned is None else (learned.n_steps, learned.num_envs)
        before = agent.num_timesteps
    assert seen == {1: (4, 32), 2: (4, 32), 4: (4, 32), 8: None}


@torch.no_grad()
def test_an_iterations_rollouts_have_the_advantages_that_they_have_alone() -> None:
    """Of each part the critic says what is worth beyond it, where an episode goes on there."""
    agent = make(make_vec("Swimmer-v5", 4, max_episode_steps=7), n_steps=4, reused_rollouts=2, reuse_until=0.0)
    given: list[Any] = []
    agent.train = given.append  # type: ignore[method-assign]
    next(agent.iterations(1))
    policy, long, side_by_side = agent.policy, agent.collector.rollout, given[0]
    for x in policy.critic.parameters():  # at first it says the same of all states
        x.add_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    assert (long.n_steps, side_by_side.n_steps, side_by_side.num_envs) == (12, 4, 12)

    def of(batch: Any) -> Tensor:
        values = policy.critic(policy.normalize(batch["observations"].flatten(0, 1)))
        return rollout_advantages(batch, values, policy, 0.99, 0.95)[0].view(batch.n_steps, -1)

    found, (steps, ids, final) = of(side_by_side), long.final_observations()
    assert steps.tolist() == [6] * 4
    for part, rows in enumerate((slice(0, 4), slice(4, 8), slice(8, 12))):
        alone = Rollout(4, 4, long.specs)
        for name in long.specs:
            alone[name].copy_(long[name][rows])
        alone.last_observations = long.last_observations if part == 2 else long["observations"][rows.stop]
        if part == 1:
            alone.take_final(steps - 4, ids, final)
        torch.testing.assert_close(found[:, 4 * part : 4 * part + 4], of(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rollouts", range(1, 14))
def test_stages_of_reuse_come_to_as_many_samples(rollouts: int) -> None:
    """Whatever number is halved, an update never learns from more than at first, and at the end from as many."""
    c = NPGConfig(reused_rollouts=rollouts - 1, reuse_until=0.5)
    stages = [c.stage(progress) for progress in np.linspace(0, 1, 101)]
    assert stages[0][:2] == (rollouts, 1)
    assert stages[50:] == [(1, rollouts, 1.0)] * 51
    assert all(rollouts / 2 < stage.kept * stage.new <= rollouts for stage in stages)
    assert NPGConfig(reused_rollouts=rollouts - 1, reuse_until=None).stage(0.9) == (rollouts, 1, 1.0)


@pytest.mark.parametrize("after_fit", [True, False])
@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "CartPole-v1"])
def test_the_update_is_the_damped_natural_gradient_of_the_definition(env_id: str, after_fit: bool) -> None:
    """θ' - θ is parallel to (F + λ I)⁻¹ g, with F and g from per-sample scores by torch.func in float64."""
    options = {"cg_max_steps": 200, "cg_tolerance": 1e-6, "target_kl_end": None, "advantages_after_fit": after_fit}
    agent = make(env_id, fisher="compatible", critic="gauss_newton", cg_damping=0.1, **options)
    collect(agent)
    policy, batch, c = agent.policy, agent.collector.rollout, agent.config
    policy.update_normalizer = lambda observations: None  # type: ignore[method-assign]
    s, a = policy.normalize(batch["observations"].flatten(0, 1)), batch["actions"].flatten(0, 1)
    before_fit, _ = rollout_advantages(batch, policy.critic(s), policy, c.gamma, c.gae_lambda)
    actor = policy.actor
    before = parameter_vector(actor).double()
    matrix = dense_scores(actor.double(), lambda m, s, a: m(s).log_prob(a), s.double(), a).matrix
    actor.float()
    n, p = matrix.shape
    fisher = matrix.T @ matrix / n
    damped = fisher + c.cg_damping * fisher.trace() / p * torch.eye(p, dtype=torch.float64)
    old = actor(s)
    agent.train(agent.collector.rollout)
    after, _ = rollout_advantages(batch, policy.critic(s), policy, c.gamma, c.gae_lambda)
    assert torch.corrcoef(torch.stack((before_fit, after)))[0, 1] < 0.9999  # the fit matters
    A = standardize(after if after_fit else before_fit)
    w = torch.linalg.solve(damped, matrix.T @ A.double() / n)
    step = parameter_vector(actor).double() - before
    assert torch.cosine_similarity(step, w, dim=0).item() == pytest.approx(1.0, abs=1e-4)
    kl = old.kl(actor(s)).mean().item()
    assert kl == pytest.approx(c.target_kl, rel=KL_TOLERANCE)


def test_curvature_samples_are_drawn_anew_for_each_update_and_none_means_all() -> None:
    agent, drawn = make(curvature_samples=32), []
    direction = agent.curvature.direction
    agent.curvature.direction = lambda Psi, A, rows: drawn.append(rows) or direction(Psi, A, rows)  # type: ignore
    agent.learn(256)
    assert [len(set(rows.tolist())) for rows in drawn] == [32, 32]
    assert not torch.equal(*drawn)
    whole, sampled = make().learn(512), make(curvature_samples=64).learn(512)
    assert not torch.equal(parameter_vector(whole.policy.actor), parameter_vector(sampled.policy.actor))
    everything = make(curvature_samples=512).learn(512)
    assert torch.equal(parameter_vector(whole.policy.actor), parameter_vector(everything.policy.actor))


@pytest.mark.parametrize("target_kl", [1e-3, 0.02, 0.1])
def test_every_update_has_the_asked_kl(target_kl: float) -> None:
    agent = make(target_kl=target_kl, target_kl_end=None)
    for _ in agent.iterations(128 * 10):
        assert agent.last_metrics["train/kl"] == pytest.approx(target_kl, rel=1.5 * KL_TOLERANCE)
    assert agent.rejections.updates == 0


def test_the_kl_falls_to_its_end_in_equal_steps() -> None:
    agent = make(target_kl=0.05, target_kl_end=0.01)
    kls = [agent.last_metrics["train/kl"] for _ in agent.iterations(128 * 4)]
    assert kls == pytest.approx([0.04, 0.03, 0.02, 0.01], rel=1.5 * KL_TOLERANCE)


@pytest.mark.parametrize(
    ("first", "last", "seen"),
    [(0.9, 0.98, [0.92, 0.94, 0.96, 0.98]), (0.9, None, [0.9] * 4), (0.999, 0.99, [0.999] * 4)],
)
def test_the_discount_rises_to_its_end_in_equal_steps(
    first: float, last: float | None, seen: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Advantages are of the discount that is due, which is logged; one above the end stays."""
    agent, used = make(gamma=first, gamma_end=last), []

    def noted(batch: Any, V: Any, policy: Any, gamma: float, *others: Any) -> Any:
        used.append(gamma)
        return rollout_advantages(batch, V, policy, gamma, *others)

    monkeypatch.setattr("agents.npg.advantages", noted)
    logged = [agent.last_metrics["train/discount"] for _ in agent.iterations(128 * 4)]
    assert used == logged == pytest.approx(seen)


@pytest.mark.parametrize("factor", [1 / 1024, 64.0])
def test_results_do_not_depend_on_the_units_of_reward(factor: float) -> None:
    def learned(forward_reward_weight: float, ctrl_cost_weight: float) -> torch.Tensor:
        weights = {"forward_reward_weight": forward_reward_weight, "ctrl_cost_weight": ctrl_cost_weight}
        agent = make(make_vec("HalfCheetah-v5", 4, **weights)).learn(128 * 6)
        return parameter_vector(agent.policy.actor)

    assert torch.equal(learned(1.0, 0.125), learned(factor, 0.125 * factor))


class ConstantReward(ContinuousAction):
    def act(self, action: Any) -> tuple[float, bool]:
        return 1.0, True


def test_without_advantages_the_policy_stays_as_it_is() -> None:
    agent = make(make_vec(ConstantReward, 4))
    before = parameter_vector(agent.policy.actor)
    agent.learn(128 * 5)
    # The critic errs by the same everywhere, so advantages are equal but for rounding.
    assert torch.equal(before, parameter_vector(agent.policy.actor))
    assert agent.rejections.updates == 0


def test_the_floor_of_the_standard_deviation_holds() -> None:
    settings = {"target_kl": 0.1, "target_kl_end": None, "log_std_init": 0.0}
    agent = make("probes/ContinuousAction-v0", log_std_min=-0.5, **settings).learn(128 * 40)
    assert agent.policy.actor.log_std is not None
    assert agent.policy.actor.log_std.bias.item() == pytest.approx(-0.5, abs=1e-6)
    free = make("probes/ContinuousAction-v0", log_std_min=None, **settings).learn(128 * 40)
    assert free.policy.actor.log_std is not None
    assert free.policy.actor.log_std.bias.item() < -0.6


def test_the_ceiling_of_the_standard_deviation_falls_with_the_training() -> None:
    """In a line from log_std_init to log_std_end."""
    seen, iterations = {}, 40
    for end in (-0.5, None):
        agent = make(log_std_init=0.0, log_std_end=end, log_std_min=None, target_kl=0.002, target_kl_end=None)
        assert agent.policy.actor.log_std is not None
        bias, unit = agent.policy.actor.log_std.bias, agent.policy.actor.log_unit.item()
        seen[end] = np.array([bias.item() - unit for _ in agent.iterations(iterations * agent.steps_per_iteration)])
    ceiling = -0.5 * np.arange(1, iterations + 1) / iterations
    assert (seen[-0.5] <= ceiling + 1e-6).all()
    assert (seen[None] > ceiling).any()  # it would not have fallen so by itself


def test_a_ceiling_that_falls_quickly_leaves_room_for_the_step() -> None:
    agent = make("Ant-v5", log_std_init=0.0, log_std_end=-3.0, log_std_min=None, target_kl_end=None)
    assert agent.policy.actor.log_std is not None
    bias, target = agent.policy.actor.log_std.bias, agent.config.target_kl
    seen = [bias.clone()]
    for _ in agent.iterations(3 * agent.steps_per_iteration):
        seen.append(bias.clone())
        assert agent.last_metrics["train/kl"] == pytest.approx(target, rel=KL_TOLERANCE)
    # Of a step's KL the eight actions' fall by d takes 8 d², which is half of it.
    falls = torch.stack(seen).diff(dim=0).neg()
    assert (falls >= math.sqrt(target / 16) - 1e-5).all()  # it is the ceiling that they follow
    assert agent.rejections.updates == 0


def test_a_direction_that_is_not_finite_leaves_the_policy_and_is_counted() -> None:
    agent = make()
    collect(agent)
    before = parameter_vector(agent.policy.actor)
    agent.collector.rollout["actions"].fill_(float("inf"))
    agent.train(agent.collector.rollout)
    assert agent.rejections.updates == 1
    assert torch.equal(parameter_vector(agent.policy.actor), before)


def test_truncation_bootstraps_from_the_observation_that_the_episode_ended_in() -> None:
    """With lambda 0 an advantage is r + gamma V(s') - V(s), and s' at the cut is not the next episode's first."""
    agent = make(make_vec("Swimmer-v5", 4, max_episode_steps=2), n_steps=3, gae_lambda=0.0)
    collect(agent)
    batch, policy = agent.collector.rollout, agent.policy
    s = policy.normalize(batch["observations"].flatten(0, 1))
    advantages, _ = rollout_advantages(batch, policy.critic(s), policy, agent.config.gamma, 0.0)
    steps, ids, final = batch.final_observations()
    assert steps.tolist() == [1, 1, 1, 1]
    assert ids.tolist() == [0, 1, 2, 3]
    assert not torch.equal(final, batch["observations"][2])
    values = policy.critic(s).view(3, 4)
    expected = batch["rewards"][1] + agent.config.gamma * policy.critic(policy.normalize(final)) - values[1]
    torch.testing.assert_close(advantages.view(3, 4)[1], expected.float())


def test_the_default_configuration_learns_the_inverted_pendulum() -> None:
    agent = NPG("MlpPolicy", "InvertedPendulum-v5", seed=0, device="cpu").learn(60_000)
    returns = [sum_of_rewards(agent, seed) for seed in range(3)]
    assert min(returns) > 900


def sum_of_rewards(agent: NPG, seed: int) -> float:
    env = make_vec("InvertedPendulum-v5", 1, autoreset="disabled")
    observation, _ = env.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        observation, reward, terminated, truncated, _ = env.step(agent.act(observation, deterministic=True))
        total += reward.item()
        ended = bool(terminated | truncated)
    return total


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_kl", 0.0),
        ("target_kl_end", 0.0),
        ("gae_lambda", 1.5),
        ("cg_max_steps", 0),
        ("curvature_samples", 0),
        ("cg_damping", -1.0),
        ("curvature_memory", -1.0),
        ("critic_steps", 0),
        ("gamma", 1.1),
        ("net_arch", (0,)),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*; give"):
        NPGConfig.of({name: value})


def test_only_factors_are_remembered() -> None:
    for changed in ({"curvature_memory": 512.0}, {"curvature_renewal": 2, "curvature_memory": None}):
        with pytest.raises(ValueError, match=rf"{next(iter(changed))} is .*fisher='kfac' or 'ekfac'"):
            NPGConfig.of(changed | {"fisher": "compatible"})
        NPGConfig.of(changed)
    with pytest.raises(ValueError, match="curvature_renewal is 2"):
        NPGConfig.of({"curvature_memory": 0.0, "curvature_renewal": 2})


def test_integers_and_lists_are_taken_where_numbers_and_tuples_are_declared() -> None:
    config = NPGConfig.of({"gamma": 1, "net_arch": [32, 32]})
    assert config.gamma == 1.0
    assert isinstance(config.gamma, float)
    assert config.net_arch == (32, 32)
    np.testing.assert_equal(NPGConfig.of({"log_std_min": None}).log_std_min, None)


CHOICES: list[dict[str, Any]] = [
    *({"fisher": name} for name in CURVATURES),
    *({"fisher": name, "curvature_memory": 512.0, "curvature_renewal": 3} for name in ("kfac", "ekfac")),
    *({"solver": name, "fisher": "compatible"} for name in ("cholesky", "gram", "cg")),
    {"fisher": "compatible", "solver": "cg", "cg_preconditioner": "ekfac", "cg_warm_start": True},
    {"line_search": True},
    *({"critic": name} for name in ("adam", "adabound")),
    *({"critic": "ridge", "value_network": name} for name in ("linear", "quadratic", "rbf")),
]


@pytest.mark.parametrize("changed", CHOICES, ids=lambda changed: "-".join(map(str, changed.values())))
def test_every_choice_learns_and_resumes_exactly(changed: dict[str, Any], tmp_path: Path) -> None:
    settings = {"net_arch": (8,), "gamma": 0.9, "target_kl": 0.05, "rbf_features": 32, "critic_epochs": 10} | changed
    agent = make("probes/ContinuousAction-v0", **settings).learn(128 * 40)
    assert agent.act(torch.zeros(1, 1), deterministic=True).item() == pytest.approx(0.5, abs=0.15)
    assert agent.rejections.updates == 0
    half = make(**settings).learn(128 * 2)
    half.save(tmp_path / "half")
    resumed = NPG.load(tmp_path / "half.zip", make_vec("InvertedPendulum-v5", 4), device="cpu")
    for part in (half, resumed):
        part.learn(128 * 2, reset_num_timesteps=False)
    assert torch.equal(parameter_vector(half.policy), parameter_vector(resumed.policy))


@pytest.mark.parametrize("changed", [c for c in CHOICES if "critic" in c], ids=lambda c: "-".join(map(str, c.values())))
def test_every_critic_bootstraps_at_truncation(changed: dict[str, Any]) -> None:
    """A reward of 1 for ever, cut off after 10 steps: V is 1 / (1 - gamma) = 10, and not what 10 steps give."""
    optimizer = {"critic_learning_rate": 1e-2, "critic_batch_size": 32, "critic_epochs": 10}
    agent = make("probes/Endless-v0", gamma=0.9, **(optimizer | changed)).learn(128 * 60)
    value = agent.policy.critic(agent.policy.normalize(torch.zeros(1, 1))).item()
    assert value == pytest.approx(10, abs=0.1)


def test_a_policy_that_is_certain_of_its_actions_goes_on() -> None:
    """Samples of before it was still give a gradient, along which no step has a KL that can be measured."""
    settings = {"target_kl": 0.05, "gamma": 0.9, "reused_rollouts": 11, "reuse_until": None, "curvature_memory": 0.0}
    agent = make("probes/MultiBinaryBandit-v0", **settings).learn(128 * 20)
    assert agent.last_metrics["train/entropy"] < CERTAIN
    assert agent.last_metrics["train/gradient_norm"] > 0
    assert agent.rejections.updates == 0
    assert agent.num_timesteps == 128 * 20


def test_trpo_steps_within_the_trust_region_and_gains() -> None:
    agent = TRPO("MlpPolicy", "InvertedPendulum-v5", seed=0, device="cpu", n_steps=32, num_envs=4, net_arch=(8,))
    for _ in agent.iterations(128 * 10):
        m = agent.last_metrics
        assert m["train/kl"] <= agent.config.target_kl
        assert m["train/gain"] > 0 or m["train/kl"] == 0
    assert agent.last_metrics["train/rejected_steps"] == agent.rejections.steps


def test_a_line_search_that_finds_nothing_is_counted_and_leaves_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make(line_search=True)
    collect(agent)
    before = parameter_vector(agent.policy.actor)
    monkeypatch.setattr("agents.npg.line_search", lambda try_step, beta, target: (try_step(beta)[0] * 0, 0.0))
    agent.train(agent.collector.rollout)
    assert (agent.rejections.steps, agent.rejections.updates) == (1, 0)
    assert torch.equal(parameter_vector(agent.policy.actor), before)


def test_a_diagnostic_that_finds_no_eigenvectors_does_not_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: torch.Tensor) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    agent = make(fisher="compatible").learn(128 * 2)
    assert agent.rejections.updates == 0
    with pytest.raises(FloatingPointError, match="In 5 updates in a row no direction was usable"):
        make(fisher="ekfac").learn(128 * 10)


def test_few_samples_of_many_observations_train() -> None:
    # Most of Ant's observations are 0 until its legs touch something.
    agent = NPG("MlpPolicy", "Ant-v5", seed=0, device="cpu", n_steps=16, num_envs=1, fisher="kfac").learn(16 * 20)
    assert agent.rejections.updates == 0


def test_updates_without_a_direction_stop_the_run_after_a_few(tmp_path: Path, monkeypatch: Any) -> None:
    agent = make(fisher="adaptive", max_rejected_updates=3)
    before = parameter_vector(agent.policy.actor)
    # Every update of the inverse goes indefinite.
    monkeypatch.setattr("agents.natural.adaptive.AdaptiveInverse.update", lambda self, rows, rate: False)
    with pytest.raises(FloatingPointError, match=r"In 3 updates in a row no direction was usable"):
        agent.learn(128 * 10)
    assert (agent.iteration, agent.rejections.updates) == (3, 3)
    assert torch.equal(parameter_vector(agent.policy.actor), before)
    agent.save(tmp_path / "kept")
    assert NPG.load(tmp_path / "kept.zip").rejections.updates == 3
    monkeypatch.undo()
    assert agent.learn(256, reset_num_timesteps=False).stop_reason is None
    assert agent.iteration == 5


def test_line_searches_that_find_nothing_stop_the_run_after_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make(line_search=True, max_rejected_updates=1, n_steps=4)
    monkeypatch.setattr("agents.npg.line_search", lambda try_step, beta, target: (try_step(beta)[0] * 0, 0.0))
    with pytest.raises(FloatingPointError, match=r"In 20 updates in a row no step within target_kl gained anything"):
        agent.learn(16 * 30)
    assert (agent.iteration, agent.rejections.steps, agent.rejections.updates) == (20, 20, 0)


def test_the_adaptive_estimate_reports_no_residual_that_nobody_measured() -> None:
    assert "train/cg_residual" not in make(fisher="adaptive").learn(128).last_metrics
    assert "train/cg_residual" in make(fisher="kfac").learn(128).last_metrics


def test_the_health_curves_are_those_of_the_update() -> None:
    agent = make("Hopper-v5", target_kl=0.01).learn(128)
    m = agent.last_metrics
    assert m["train/kl_quadratic"] == pytest.approx(m["train/kl"], rel=0.5)
    assert m["train/kl_reverse"] == pytest.approx(m["train/kl"], rel=0.5)
    assert m["train/gain"] == pytest.approx(m["train/predicted_gain"], rel=0.5)
    assert 0.5 < m["train/effective_samples"] < 1
    assert 0 < m["train/cosine"] <= 1
    assert 0 < m["train/compatible_r2"] < 1
    p = len(parameter_vector(agent.policy.actor))
    assert 1 < m["train/effective_dimension"] < p


class NormPolicy(ActorCriticPolicy):
    """With a layer whose scores do not factor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.actor.net.insert(0, torch.nn.LayerNorm(4))


def test_what_does_not_fit_is_refused_at_construction_with_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def npg(policy: Any = "MlpPolicy", **settings: Any) -> NPG:
        few = {"n_steps": 8, "net_arch": (8,), "reused_rollouts": 0}
        return NPG(policy, make_vec("InvertedPendulum-v5", 2), device="cpu", **(few | settings))

    with pytest.raises(ValueError, match="has an inverse of its own; give solver='auto'"):
        npg(fisher="kfac", solver="cg")
    with pytest.raises(ValueError, match="no fisher 'kafc'; did you mean 'kfac'"):
        npg(fisher="kafc")
    with pytest.raises(ValueError, match="critic is 'ridge' with value_network='mlp'"):
        npg(critic="ridge")
    with pytest.raises(ValueError, match=r"cg_damping is 0\.0 with solver='gram'"):
        npg(fisher="compatible", solver="gram", cg_damping=0.0)
    with pytest.raises(ValueError, match=r"cg_preconditioner is 'gram' with cg_damping or critic_damping 0\.0"):
        npg(cg_preconditioner="gram", critic_damping=0.0)
    for fisher in ("kfac", "ekfac", "analytic"):
        with pytest.raises(
            ValueError, match="no outer products; give one of compatible, diagonal, empirical, adaptive"
        ):
            npg(NormPolicy, fisher=fisher)
    with pytest.raises(ValueError, match=r"cg_preconditioner is 'kfac'.*give none, diagonal or gram"):
        npg(NormPolicy, fisher="compatible", cg_preconditioner="kfac")
    for fisher in ("compatible", "diagonal", "empirical", "adaptive"):
        agent = npg(NormPolicy, fisher=fisher, cg_preconditioner="none").learn(16 * 3)
        assert agent.rejections.updates == 0
    monkeypatch.setattr("agents.natural.curvature.MATRIX_BYTES", 4 * 49**2)
    with pytest.raises(ValueError, match=r"solver is 'cholesky'.*n = 16 samples.*give auto or gram or cg"):
        npg(fisher="compatible", solver="cholesky")
    with pytest.raises(ValueError, match=r"solver is 'cholesky'.*n = 64 samples.*give auto or cg"):
        npg(fisher="compatible", solver="cholesky", reused_rollouts=3)
    few = npg(fisher="compatible", solver="gram")  # 16 samples
    with pytest.raises(ValueError, match=r"solver is 'gram'.*n = 64 samples"):
        few.set_env(make_vec("InvertedPendulum-v5", 8))
    monkeypatch.setattr("agents.natural.MATRIX_BYTES", 4 * 49**2)
    with pytest.raises(ValueError, match=r"fisher is 'adaptive'.*give one of compatible, analytic"):
        npg(fisher="adaptive")


def test_an_update_from_many_samples_holds_nothing_of_samples_times_parameters() -> None:
    code = """
import resource, sys
from agents import NPG

agent = NPG("MlpPolicy", "InvertedPendulum-v5", seed=0, device="cpu", num_envs=256, n_steps=256)
train, agent.train = agent.train, lambda batch: None
next(agent.iterations(1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train(agent.collector.rollout)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
parameters = sum(x.numel() for x in agent.policy.actor.parameters())
print(grown * (1 if sys.platform == "darwin" else 1024) / (4 * 256 * 256 * parameters))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.6


def test_a_simulation_that_nearly_always_diverges_ends_training() -> None:
    agent = NPG("MlpPolicy", "Hopper-v5", num_envs=2, n_steps=8, net_arch=[4], device="cpu")
    step = agent.collector.vector.step

    def diverges(actions: Any, ids: Any = None) -> Any:
        agent.collector.vector.blowups += 2 if agent.iteration != 2 else 1  # half of them are no reason to stop
        return step(actions, ids)

    agent.collector.vector.step = diverges  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"In 5 rollouts in a row the simulation diverged in over 90 %"):
        agent.learn(1000)
    assert agent.iteration == 8
