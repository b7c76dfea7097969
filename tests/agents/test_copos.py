"""COPOS: its dual against the definition, its bounds, its natural parameters, its degenerate cases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.func import jvp

from agents import COPOS
from agents.copos import SHORTEST, Dual, EntropySchedule, LogLinear, Update, secant
from agents.natural.step import KL_TOLERANCE
from agents.policy.actor_critic import ActorCriticPolicy
from agents.policy.distributions import Head
from agents.policy.networks import assign_parameters, parameter_vector
from envs import make_vec
from envs.probes import ContinuousAction

HEADS = {
    "gaussian": Head("gaussian", (3,)),
    "categorical": Head("categorical", (2,), (2, 4)),
    "bernoulli": Head("bernoulli", (3,)),
}
EPSILON = 0.02


def problem(kind: str, seed: int, n: int = 50) -> LogLinear:
    """Policies at n states and how a direction changes them, float64."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    k = HEADS[kind].outputs
    stds = (0.5 * normal(k), 0.3 * normal(k)) if kind == "gaussian" else ()
    return LogLinear(normal(n, k), normal(n, k), *stds)


def g(kind: str, x: LogLinear, b: float, eta: float, omega: float) -> float:
    """The dual by its definition: log ∫ exp((η log π + Â) / (η + ω)) da as sums, or by quadrature."""
    t, head = eta + omega, HEADS[kind]
    old = head.distribution(x.y, x.log_std)
    if kind == "gaussian":
        assert x.log_std is not None
        assert x.w_std is not None
        z = torch.linspace(-30, 30, 1501, dtype=torch.float64)[:, None, None]
        std = x.log_std.exp()
        log_pi = -0.5 * z**2 - x.log_std - 0.5 * math.log(2 * math.pi)
        A = z * x.m / std + (z**2 - 1) * x.w_std
        log_integral = torch.logsumexp((eta * log_pi + A) / t + x.log_std, 0) + math.log(0.04)
    elif kind == "categorical":
        parts = []
        for y, m in zip(x.y.split(head.choices, -1), x.m.split(head.choices, -1), strict=True):
            log_pi = y.log_softmax(-1)
            A = m - (log_pi.exp() * m).sum(-1, keepdim=True)
            parts.append(torch.logsumexp((eta * log_pi + A) / t, -1))
        log_integral = torch.stack(parts, -1)
    else:
        p = torch.sigmoid(x.y)
        yes, no = (eta * p.log() + (1 - p) * x.m) / t, (eta * (1 - p).log() - p * x.m) / t
        log_integral = torch.logaddexp(yes, no)
    log_integrals = log_integral.sum(-1).mean().item()
    return eta * EPSILON + omega * (b - old.entropy().mean().item()) + t * log_integrals


def constraints(dual: Dual, eta: float, omega: float) -> tuple[float, float]:
    """KL(new || old) and H_old - H_new, of all states."""
    new = dual.head.distribution(*dual.policies.at(eta, omega))
    return new.kl(dual.old).mean().item(), (dual.old.entropy() - new.entropy()).mean().item()


@pytest.mark.parametrize(("b", "equality"), [(1e-3, False), (0.02, False), (10.0, False), (0.02, True), (-0.02, True)])
@pytest.mark.parametrize("kind", HEADS)
def test_the_dual_is_minimized(kind: str, b: float, equality: bool) -> None:
    x = problem(kind, 0)
    dual = Dual(HEADS[kind], x, EPSILON, b, equality)
    eta = dual.minimize(1.0)
    omega, _ = dual.solve(eta)
    assert eta > dual.floor + SHORTEST
    best, h = g(kind, x, b, eta, omega), 1e-4
    kl, drop = constraints(dual, eta, omega)
    numeric = (g(kind, x, b, eta + h, omega) - g(kind, x, b, eta - h, omega)) / (2 * h)
    assert EPSILON - kl == pytest.approx(numeric, abs=1e-6)
    numeric = (g(kind, x, b, eta, omega + h) - g(kind, x, b, eta, omega - h)) / (2 * h)
    assert b - drop == pytest.approx(numeric, abs=1e-6)
    for more in np.linspace(-0.9, 3, 8):
        other_eta = dual.floor + (1 + more) * (eta - dual.floor)
        for other in np.linspace(-0.9 * other_eta if equality else 0, 3 * abs(omega) + 1, 8):
            assert best <= g(kind, x, b, other_eta, other) + 1e-9


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("seed", range(10))
def test_both_bounds_hold_and_what_has_a_multiplier_is_at_its_bound(kind: str, seed: int) -> None:
    for b in (1e-4, 0.01, 0.3):
        dual = Dual(HEADS[kind], problem(kind, seed), EPSILON, b)
        eta = dual.minimize(5.0)
        omega, _ = dual.solve(eta)
        kl, drop = constraints(dual, eta, omega)
        assert kl <= EPSILON * (1 + 1e-8)
        assert drop <= b + 1e-8
        if omega > 0:
            assert drop == pytest.approx(b, abs=1e-8)
        if eta > dual.floor + SHORTEST * 5 * (1 + 1e-9):
            assert kl == pytest.approx(EPSILON, rel=1e-8)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("b", [-0.01, 0.0, 0.03])
@pytest.mark.parametrize("seed", range(5))
def test_as_an_equality_the_kl_is_epsilon_and_the_entropy_lost_is_b(kind: str, b: float, seed: int) -> None:
    dual = Dual(HEADS[kind], problem(kind, seed), EPSILON, b, equality=True)
    eta = dual.minimize(5.0)
    omega, _ = dual.solve(eta)
    assert constraints(dual, eta, omega) == pytest.approx((EPSILON, b), abs=1e-9)
    assert eta + omega > 0


@pytest.mark.parametrize("kind", HEADS)
def test_an_equality_that_epsilon_does_not_allow_is_halved_until_it_does(kind: str) -> None:
    dual = Dual(HEADS[kind], problem(kind, 0), EPSILON, 3.0, equality=True)
    eta = dual.minimize(5.0)
    omega, _ = dual.solve(eta)
    kl, drop = constraints(dual, eta, omega)
    assert 0.05 < drop < 3
    assert math.log2(3 / dual.b) == int(math.log2(3 / dual.b))
    assert (kl, drop) == pytest.approx((EPSILON, dual.b), abs=1e-9)


def test_where_the_entropy_alone_bounds_the_step_stays_finite() -> None:
    """From equal probabilities the KL is the loss of entropy: a smaller bound on that leaves the other slack."""
    x = LogLinear(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    dual = Dual(Head("categorical", (), (2,)), x, EPSILON, EPSILON / 4)
    eta = dual.minimize(3.0)
    assert eta == pytest.approx(SHORTEST * 3.0, rel=1e-9)
    assert constraints(dual, eta, dual.solve(eta)[0]) == pytest.approx((EPSILON / 4, EPSILON / 4))


def test_of_hidden_layers_some_states_tell_where_to_begin() -> None:
    x, head = problem("categorical", 0, n=3000), HEADS["categorical"]
    some = LogLinear(x.y[::12], x.m[::12])
    exact, near = Dual(head, x, EPSILON, 0.01), Dual(head, some, EPSILON, 0.01, known=head.distribution(x.y))
    assert near.minimize(1.0) == pytest.approx(exact.minimize(1.0), rel=0.1)
    assert len(near.old.entropy()) == 3000


def test_the_root_of_a_decreasing_function() -> None:
    for start in (-9.0, 0.0, 9.0):
        for slope in (-1e-3, -1.0, 5.0):
            x, found = secant(lambda x: math.tanh(2 - x), start, slope, (-10.0, 10.0), 1e-13)
            assert x == pytest.approx(2, abs=1e-9)
            assert found == pytest.approx(-1, abs=1e-3)
    assert secant(lambda _: 1.0, 0.0, -1.0, (-3.0, 3.0), 1e-13)[0] == pytest.approx(3)
    assert secant(lambda _: -1.0, 0.0, -1.0, (-3.0, 3.0), 1e-13)[0] == pytest.approx(-3)


def test_the_schedule_falls_by_b_from_where_a_training_began() -> None:
    schedule = EntropySchedule()
    assert [schedule.next(3.0, 0.5, begins=True), schedule.next(9.0, 0.25, begins=False)] == [2.5, 2.25]
    other = EntropySchedule()
    other.load(schedule.tensors())
    assert other.next(9.0, 0.25, begins=False) == 2.0
    assert other.next(9.0, 0.25, begins=True) == 8.75


def make(env: Any = "InvertedPendulum-v5", policy: Any = "MlpPolicy", **changed: Any) -> COPOS:
    """An agent of four environments."""
    settings = {"n_steps": 32, "num_envs": 4, "net_arch": (8,), "entropy_decrease": 0.02} | changed
    return COPOS(policy, env, seed=0, device="cpu", **settings)


@torch.no_grad()
def updated(kind: str, policy: str = "LinearPolicy") -> tuple[Update, Tensor]:
    """What an actor may become along a random direction w, in float64, and w."""
    space = spaces.Box(-1, 1, (2,)) if kind == "gaussian" else spaces.MultiDiscrete([2, 3])
    agent = COPOS.policy_aliases[policy](spaces.Box(-1, 1, (4,)), space, log_std_init=0.3)
    actor = agent.actor.double()
    torch.manual_seed(0)
    assign_parameters(actor, torch.randn_like(parameter_vector(actor)))
    w = torch.randn_like(parameter_vector(actor))
    w[-2:] = -w[-2:].abs()  # of a Gaussian's log σ, which is to fall
    return Update(actor, w, torch.randn(20, 4, dtype=torch.float64)), w


def dual_of(update: Update, b: float, equality: bool = False) -> Dual:
    old = None if update.exact else update.actor(update.s)
    return Dual(update.actor.head, update.log_linear(), EPSILON, b, equality, old)


@pytest.mark.parametrize(("eta", "omega"), [(7.0, 0.0), (9.0, 2.5), (9.0, -2.5)])
@torch.no_grad()
def test_a_gaussians_natural_parameters_of_fixed_features_are_the_closed_form(eta: float, omega: float) -> None:
    """Σ'⁻¹ = (η Σ⁻¹ + W_aa) / (η + ω), and Kᵀ Σ⁻¹ likewise, with W the change of both along w."""

    def natural(K: Tensor, bias: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        precision = torch.diag(torch.exp(-2 * log_std))
        return precision, torch.cat((K, bias[:, None]), 1).T @ precision

    update, w = updated("gaussian")
    old, along = (tuple(part.split([8, 2, 2])) for part in (parameter_vector(update.actor), w))
    shaped = [tuple(x.view(2, 4) if len(x) == 8 else x for x in parts) for parts in (old, along)]
    update.take(eta, omega)
    theta, W = jvp(natural, *shaped)
    new = (*update.actor.net.parameters(), update.actor.log_std.bias)
    for one, change, found in zip(theta, W, natural(*new), strict=True):
        torch.testing.assert_close(found, (eta * one + change) / (eta + omega), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_discrete_actions_are_log_linear_in_their_logits() -> None:
    update, w = updated("categorical")
    old = parameter_vector(update.actor)
    update.take(3.0, 1.5)
    torch.testing.assert_close(parameter_vector(update.actor), (3 * old + w) / 4.5)


@pytest.mark.parametrize("equality", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
@torch.no_grad()
def test_without_hidden_layers_an_update_has_the_kl_epsilon_and_loses_the_entropy_b(kind: str, equality: bool) -> None:
    update, _ = updated(kind)
    old = update.actor(update.s)
    dual = dual_of(update, 0.003, equality)
    eta, omega = update.search(dual, dual.minimize(3.0))
    new = update.actor(update.s)
    assert omega != 0
    assert new.kl(old).mean().item() == pytest.approx(EPSILON, abs=1e-9)
    assert (old.entropy() - new.entropy()).mean().item() == pytest.approx(0.003, abs=1e-9)
    assert (eta, omega) == pytest.approx((eta, dual.solve(eta)[0]))


@torch.no_grad()
def test_hidden_layers_take_the_step_w_over_eta() -> None:
    update, w = updated("gaussian", "MlpPolicy")
    old, n = parameter_vector(update.actor), sum(x.numel() for x in update.actor.net[:-1].parameters())
    x = update.log_linear()
    update.log_linear_at(9.0)
    update.take(9.0, 2.5)
    torch.testing.assert_close(parameter_vector(update.actor)[:n], (old + w / 9.0)[:n])
    h, y = 1e-6, []
    for sign in (1, -1):
        assign_parameters(update.actor, old + sign * h * w)
        y.append(update.actor.net(update.s))
    torch.testing.assert_close(x.m, (y[0] - y[1]) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("equality", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
@torch.no_grad()
def test_the_search_finds_the_true_kl_and_entropy(kind: str, equality: bool) -> None:
    update, _ = updated(kind, "MlpPolicy")
    dual, old = dual_of(update, 0.003, equality), update.actor(update.s)
    far = dual.floor + (dual.minimize(3.0) - dual.floor) / 3
    update.log_linear_at(far)
    update.take(far, dual.solve(far)[0])
    assert update.actor(update.s).kl(old).mean() > 2 * EPSILON
    eta, omega = update.search(dual, far)
    new = update.actor(update.s)
    assert new.kl(old).mean().item() == pytest.approx(EPSILON, rel=1.01 * KL_TOLERANCE)
    assert (old.entropy() - new.entropy()).mean().item() == pytest.approx(0.003, abs=1e-6)
    assert omega == pytest.approx(dual.solve(eta, update.log_linear_at(eta))[0], abs=1e-2 * eta)


@torch.no_grad()
def test_without_a_usable_step_the_actor_is_put_back() -> None:
    update, _ = updated("gaussian", "MlpPolicy")
    dual, old = dual_of(update, 0.1), parameter_vector(update.actor)
    update.s = torch.full_like(update.s, math.nan)
    assert update.search(dual, 9.0) == (math.inf, math.inf)
    assert torch.equal(parameter_vector(update.actor), old)


@pytest.mark.parametrize("env_id", ["Hopper-v5", "CartPole-v1"])
def test_every_update_keeps_the_bounds(env_id: str) -> None:
    agent, bound = make(env_id, entropy_decrease=0.005), 0
    for _ in agent.iterations(128 * 15):
        metrics = agent.last_metrics
        assert 0 < metrics["train/kl"] <= 0.01 * (1 + 1.1 * KL_TOLERANCE)
        assert metrics["train/entropy"] >= metrics["train/entropy_bound"] - 1e-5
        if metrics["train/omega"] > 0:
            bound += 1
            assert metrics["train/entropy"] == pytest.approx(metrics["train/entropy_bound"], abs=1e-5)
    assert bound > 0
    assert agent.rejections.updates == 0


@pytest.mark.parametrize(("env_id", "b"), [("Hopper-v5", 0.04), ("CartPole-v1", 0.002)])
def test_as_an_equality_the_entropy_follows_its_schedule(env_id: str, b: float) -> None:
    """But for what other states, and the first ones' statistics, change at once: that is made up for as ε allows."""
    agent, followed = make(env_id, entropy_decrease=b, entropy_constraint="equality"), []
    first = agent.policy.actor(torch.zeros(1, agent.observation_space.shape[0])).entropy().item()
    for k in agent.iterations(128 * 20):
        metrics = agent.last_metrics
        scheduled = metrics["train/entropy_schedule"]
        assert scheduled == pytest.approx(first - k * b, abs=0.01)
        followed.append(abs(metrics["train/entropy"] - scheduled) <= 0.05 * b + 1e-5)
        assert 0 < metrics["train/kl"] <= 0.01 * (1 + 1.1 * KL_TOLERANCE)
    assert all(followed[0 if env_id == "Hopper-v5" else 4 :])
    assert agent.rejections.updates == 0


def test_a_loaded_agent_goes_on_along_its_schedule(tmp_path: Path) -> None:
    agent = make(entropy_constraint="equality").learn(128 * 3)
    agent.save(tmp_path / "agent")
    loaded = COPOS.load(tmp_path / "agent", make_vec("InvertedPendulum-v5", 4), device="cpu")
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.last_metrics["train/entropy_schedule"] == agent.schedule.entropy - 0.02
    assert loaded.last_metrics["train/entropy"] == pytest.approx(loaded.schedule.entropy, abs=1e-5)
    loaded.learn(128)  # another training
    assert loaded.schedule.entropy == pytest.approx(agent.schedule.entropy - 2 * 0.02, abs=1e-5)


def test_b_may_have_a_schedule() -> None:
    agent = make("Hopper-v5", entropy_decrease=lambda left: 0.04 * left, entropy_constraint="equality")
    entropies = [agent.last_metrics["train/entropy"] for _ in agent.iterations(128 * 8)]
    assert -np.diff(entropies) == pytest.approx([0.04 * (1 - k / 8) for k in range(2, 9)], abs=1e-4)


class ConstantReward(ContinuousAction):
    def act(self, action: Any) -> tuple[float, bool]:
        return 1.0, True


@pytest.mark.parametrize("size", [{"env": make_vec(ConstantReward, 4), "num_envs": 4}, {"n_steps": 1, "num_envs": 1}])
def test_without_advantages_or_with_one_sample_the_policy_stays_as_it_is(size: dict[str, Any]) -> None:
    agent = make(**size)
    before = parameter_vector(agent.policy.actor)
    agent.learn(agent.config.n_steps * agent.n_envs * 6)
    assert torch.equal(before, parameter_vector(agent.policy.actor))
    assert agent.rejections.updates == 0


def test_the_entropy_may_fall_from_its_first_value_to_its_negative() -> None:
    agent = make("Hopper-v5", entropy_decrease=None, log_std_init=-0.5)
    first = agent.policy.actor(torch.zeros(1, 11)).entropy().item()
    agent.learn(128 * 5)
    assert agent.entropy_decrease == pytest.approx(2 * first / 5)
    agent = make("CartPole-v1", entropy_decrease=None).learn(100)
    assert agent.entropy_decrease == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="give entropy_decrease"):
        make(entropy_decrease=None, policy_kwargs={"log_std_init": -3.0}).learn(100)


class Squashed(ActorCriticPolicy):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.actor.net.append(nn.Tanh())


def test_an_actor_without_a_linear_last_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="give a Linear"):
        make(policy=Squashed)
