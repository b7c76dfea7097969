"""COPOS: its dual against the definition, its bounds, its natural parameters, its degenerate cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.func import jvp

from agents import COPOS
from agents.copos import SHORTEST, Dual, LogLinear, Update, root
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
        z = torch.linspace(-30, 30, 6001, dtype=torch.float64)[:, None, None]
        std = x.log_std.exp()
        log_pi = -0.5 * z**2 - x.log_std - 0.5 * math.log(2 * math.pi)
        A = z * x.m / std + (z**2 - 1) * x.w_std
        log_integral = torch.logsumexp((eta * log_pi + A) / t + x.log_std, 0) + math.log(0.01)
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


@pytest.mark.parametrize("b", [1e-3, 0.02, 10.0])
@pytest.mark.parametrize("kind", HEADS)
def test_the_dual_is_minimized(kind: str, b: float) -> None:
    x = problem(kind, 0)
    dual = Dual(HEADS[kind], x, EPSILON, b)
    eta, omega = dual.minimize(1.0)
    assert eta > dual.floor + SHORTEST
    best, h = g(kind, x, b, eta, omega), 1e-4
    kl, drop = dual.constraints(eta, omega)
    numeric = (g(kind, x, b, eta + h, omega) - g(kind, x, b, eta - h, omega)) / (2 * h)
    assert EPSILON - kl == pytest.approx(numeric, abs=1e-6)
    numeric = (g(kind, x, b, eta, omega + h) - g(kind, x, b, eta, omega - h)) / (2 * h)
    assert b - drop == pytest.approx(numeric, abs=1e-6)
    for more in np.linspace(-0.9, 3, 14):
        for other in np.linspace(0, 3 * omega + 1, 14):
            assert best <= g(kind, x, b, dual.floor + (1 + more) * (eta - dual.floor), other) + 1e-9


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("seed", range(10))
def test_both_bounds_hold_and_what_has_a_multiplier_is_at_its_bound(kind: str, seed: int) -> None:
    for b in (1e-4, 0.01, 0.3):
        dual = Dual(HEADS[kind], problem(kind, seed), EPSILON, b)
        eta, omega = dual.minimize(5.0)
        kl, drop = dual.constraints(eta, omega)
        assert kl <= EPSILON * (1 + 1e-8)
        assert drop <= b + 1e-8
        if omega > 0:
            assert drop == pytest.approx(b, abs=1e-8)
        if eta > dual.floor + SHORTEST * 5:
            assert kl == pytest.approx(EPSILON, rel=1e-8)


def test_where_the_entropy_alone_bounds_the_step_stays_finite() -> None:
    """From equal probabilities the KL is the loss of entropy: a smaller bound on that leaves the other slack."""
    x = LogLinear(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    dual = Dual(Head("categorical", (), (2,)), x, EPSILON, EPSILON / 4)
    eta, omega = dual.minimize(3.0)
    assert eta == pytest.approx(SHORTEST * 3.0)
    assert dual.constraints(eta, omega) == pytest.approx((EPSILON / 4, EPSILON / 4))


def test_the_root_of_an_increasing_function() -> None:
    assert root(lambda x: x - 700.0, 1.0) == pytest.approx(700)
    assert root(lambda x: x + 1.0, 1.0) == 0


def make(env: Any = "InvertedPendulum-v5", policy: Any = "MlpPolicy", **changed: Any) -> COPOS:
    """An agent of four environments."""
    settings = {"n_steps": 32, "num_envs": 4, "net_arch": (8,), "entropy_decrease": 0.02} | changed
    return COPOS(policy, env, seed=0, device="cpu", **settings)


@torch.no_grad()
def updated(kind: str, eta: float, omega: float, policy: str = "LinearPolicy") -> tuple[Any, Tensor]:
    """An update along a random direction w, before it in float64, and w."""
    space = spaces.Box(-1, 1, (2,)) if kind == "gaussian" else spaces.MultiDiscrete([2, 3])
    agent = COPOS.policy_aliases[policy](spaces.Box(-1, 1, (4,)), space, log_std_init=0.3)
    actor = agent.actor.double()
    torch.manual_seed(0)
    assign_parameters(actor, torch.randn_like(parameter_vector(actor)))
    w = torch.randn_like(parameter_vector(actor))
    update = Update(actor, w, torch.randn(20, 4, dtype=torch.float64))
    update.take(eta, omega)
    return update, w


@pytest.mark.parametrize(("eta", "omega"), [(7.0, 0.0), (9.0, 2.5)])
def test_a_gaussians_natural_parameters_of_fixed_features_are_the_closed_form(eta: float, omega: float) -> None:
    """Σ'⁻¹ = (η Σ⁻¹ + W_aa) / (η + ω), and Kᵀ Σ⁻¹ likewise, with W the change of both along w."""

    def natural(K: Tensor, bias: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        precision = torch.diag(torch.exp(-2 * log_std))
        return precision, torch.cat((K, bias[:, None]), 1).T @ precision

    update, _ = updated("gaussian", eta, omega)
    old, w, new = ((*x.net.parameters(), x.log_std.bias) for x in (update.before, update.w, update.actor))
    theta, W = jvp(natural, tuple(old), tuple(w))
    for one, change, found in zip(theta, W, natural(*new), strict=True):
        torch.testing.assert_close(found, (eta * one + change) / (eta + omega), rtol=1e-12, atol=1e-12)


def test_discrete_actions_are_log_linear_in_their_logits() -> None:
    update, w = updated("categorical", 3.0, 1.5)
    torch.testing.assert_close(parameter_vector(update.actor), (3 * parameter_vector(update.before) + w) / 4.5)


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_of_fixed_features_the_dual_knows_the_true_kl_and_entropy(kind: str) -> None:
    update, _ = updated(kind, 9.0, 2.5)
    dual = Dual(update.actor.head, update.log_linear(), EPSILON, 0.1)
    old, new = update.before(update.s), update.actor(update.s)
    found = new.kl(old).mean().item(), (old.entropy() - new.entropy()).mean().item()
    assert dual.constraints(9.0, 2.5) == pytest.approx(found, rel=1e-9)


def test_hidden_layers_take_the_step_w_over_eta() -> None:
    update, _ = updated("gaussian", 9.0, 2.5, "MlpPolicy")
    for x, old, w in zip(*(a.net[:-1].parameters() for a in (update.actor, update.before, update.w)), strict=True):
        torch.testing.assert_close(x, old + w / 9.0)
    theta, w = (dict(x.net.named_parameters()) for x in (update.before, update.w))
    h = 1e-6
    y = [
        torch.func.functional_call(update.before.net, {k: theta[k] + sign * h * w[k] for k in theta}, (update.s,))
        for sign in (1, -1)
    ]
    torch.testing.assert_close(update.log_linear().m, (y[0] - y[1]) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
@torch.no_grad()
def test_the_search_keeps_the_true_kl_and_entropy_within_their_bounds(kind: str) -> None:
    update, _ = updated(kind, 1e9, 0.0, "MlpPolicy")
    dual = Dual(update.actor.head, update.log_linear(), EPSILON, 0.01)
    old, far = update.before(update.s), dual.floor + 0.1
    assert update.take(far, dual.omega(far)).kl(old).mean() > EPSILON
    eta, omega = update.search(old, dual, far, dual.omega(far))
    new = update.actor(update.s)
    assert 0 < new.kl(old).mean() <= EPSILON * (1 + KL_TOLERANCE)
    assert (old.entropy() - new.entropy()).mean() <= dual.b * (1 + KL_TOLERANCE)
    assert omega == dual.omega(eta)


@torch.no_grad()
def test_without_a_usable_step_the_actor_is_put_back() -> None:
    update, _ = updated("gaussian", 9.0, 2.5, "MlpPolicy")
    dual = Dual(update.actor.head, update.log_linear(), EPSILON, 0.1)
    update.s = torch.full_like(update.s, math.nan)
    assert update.search(update.before(update.s), dual, 9.0, 2.5) == (math.inf, math.inf)
    assert torch.equal(parameter_vector(update.actor), parameter_vector(update.before))


@pytest.mark.parametrize("env_id", ["Hopper-v5", "CartPole-v1"])
def test_every_update_keeps_the_bounds(env_id: str) -> None:
    agent, bound = make(env_id, entropy_decrease=0.005), 0
    for _ in agent.iterations(128 * 15):
        metrics = agent.last_metrics
        assert 0 < metrics["train/kl"] <= 0.01 * (1 + KL_TOLERANCE)
        bound += metrics["train/omega"] > 0
        assert metrics["train/entropy"] >= metrics["train/entropy_bound"] - KL_TOLERANCE * 0.005
    assert bound > 0
    assert agent.rejections.updates == 0


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
    assert agent.entropy_decrease == pytest.approx(2 * math.log(2))
    with pytest.raises(ValueError, match="give entropy_decrease"):
        make(entropy_decrease=None, policy_kwargs={"log_std_init": -3.0}).learn(100)


class Squashed(ActorCriticPolicy):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.actor.net.append(nn.Tanh())


def test_an_actor_without_a_linear_last_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="give a Linear"):
        make(policy=Squashed)
