"""The targets' scale, PopArt's invariance, and Gauss-Newton fits against closed forms."""

import math

import pytest
import torch
from directions import gauss_newton
from torch import nn

from agents.natural import critic_fits as critics
from agents.policy.networks import Critic, ReturnScale, parameter_vector
from agents.rollout.buffer import explained_variance


def critic(seed=0, hidden=16, dtype=torch.float32, scale=None):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1)).to(dtype)
    return Critic(network, scale)


def data(n=300, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=dtype)
    return x, 50 + 20 * torch.sin(x[:, 0]) + 10 * x[:, 1] * x[:, 2]


def test_cumulative_statistics_equal_those_of_all_targets():
    scale, targets = ReturnScale(decay=1.0), 100 + 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for batch in targets.split([1, 299, 500, 200]):
        scale.update(batch)
    torch.testing.assert_close(scale.mean, targets.double().mean())
    torch.testing.assert_close(scale.std, targets.double().std(correction=0))
    assert scale.count == 1000


def test_decay_by_hand():
    # Batch (0, 2): count 2, mean 1, M2 2. Halved: count 1, M2 1. Batch (4): count 2, shift 3, mean 1 + 3 / 2 = 2.5,
    # M2 = 1 + 0 + 9 * 1 * 1 / 2 = 5.5, std = sqrt(5.5 / 2).
    scale = ReturnScale(decay=0.5)
    scale.update(torch.tensor([0.0, 2.0]))
    assert (scale.count.item(), scale.mean.item(), scale.std.item()) == (2, 1, 1)
    scale.update(torch.tensor([4.0]))
    assert (scale.count.item(), scale.mean.item()) == (2, 2.5)
    assert scale.std.item() == math.sqrt(5.5 / 2)


def test_decay_forgets_an_old_level():
    scale = ReturnScale()
    for level in [0.0] * 5 + [100.0] * 60:
        scale.update(level + torch.tensor([-1.0, 1.0]))
    assert scale.mean == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**10, 2.0**40])
def test_other_reward_units_give_the_same_targets_bit_for_bit(factor):
    one, other = critic(), critic()
    for seed in range(3):
        targets = data(seed=seed)[1]
        assert torch.equal(one.update_scale(targets), other.update_scale(targets * factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e6, 1e-12])
def test_targets_without_variance_have_scale_one(value, dtype):
    model, targets = critic(dtype=dtype), torch.full((11,), value, dtype=dtype)
    for _ in range(3):
        z = model.update_scale(targets)
    assert model.scale.std == 1
    assert z.dtype == dtype
    assert z.abs().max() <= 1e-6 * abs(value)


def test_a_small_spread_is_a_spread():
    scale = ReturnScale()
    scale.update(torch.tensor([-1e-15, 1e-15]))
    assert scale.std == pytest.approx(1e-15)


def test_no_targets_yet_changes_nothing():
    model, (x, _) = critic(), data()
    assert (model.scale.mean, model.scale.std) == (0, 1)
    assert torch.equal(model(x), model.normalized(x))


def test_statistics_are_part_of_the_state():
    scale, other = ReturnScale(), ReturnScale()
    scale.update(torch.tensor([1.0, 5.0]))
    other.load_state_dict(scale.state_dict())
    assert (other.mean, other.std, other.count) == (3, 2, 2)
    assert other.mean.dtype == torch.float64


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.1])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match="decay is"):
        ReturnScale(decay)


def test_updating_the_scale_keeps_the_values():
    model, (x, y) = critic(dtype=torch.float64), data(dtype=torch.float64)
    first = model(x).detach()
    assert first.shape == (300,)
    for targets in (y, 1e4 * y - 7, torch.full((4,), 2.0).double(), 1e-3 * y):
        before, parameters = model(x).detach(), parameter_vector(model)
        model.update_scale(targets)
        assert not torch.equal(parameters, parameter_vector(model))
        torch.testing.assert_close(model(x).detach(), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "network",
    [nn.Sequential(nn.Linear(3, 1), nn.Tanh()), nn.Linear(3, 2), nn.Linear(3, 1, bias=False)],
    ids=["activation", "two outputs", "no bias"],
)
def test_the_network_must_end_in_one_affine_output(network):
    with pytest.raises(ValueError, match="let it end in a Linear"):
        Critic(network)


def test_a_linear_critic_is_fitted_by_ridge_regression():
    # One undamped step from anywhere is ordinary least squares; a damped one solves (X'X/n + lambda) d = X'r/n.
    x, y = data(dtype=torch.float64)
    X = torch.cat((x, torch.ones(300, 1).double()), 1)
    for damping in (0.0, 0.3):
        torch.manual_seed(0)
        model = Critic(nn.Linear(3, 1).double())
        z, start = model.update_scale(y), parameter_vector(model)
        found = gauss_newton(model, x, y, cg_iterations=20, cg_tolerance=1e-12, damping=damping)
        shift = damping * X.square().sum() / 300 / 4
        d = torch.linalg.solve(X.T @ X / 300 + shift * torch.eye(4).double(), X.T @ (z - X @ start) / 300)
        torch.testing.assert_close(parameter_vector(model), start + d)
        assert (found.status, found.step) == ("converged", 1.0)
        assert found.iterations <= 4


def test_a_step_improves_and_its_statistics_are_those_of_the_critic():
    model, (x, y) = critic(), data()
    model.update_scale(y)
    before = explained_variance(y, model(x).detach()).item()
    found = gauss_newton(model, x, y)
    after = explained_variance(y, model(x).detach()).item()
    assert after > max(before, 0.5)
    assert 1 <= found.iterations <= 15
    assert 0 <= found.residual < 1
    more = gauss_newton(model, x, y, steps=10)
    assert explained_variance(y, model(x).detach()) > 0.95
    assert more.iterations > 15


def test_reward_units_do_not_change_the_fit():
    x, y = data()
    values = []
    for factor in (1.0, 1024.0):
        model = critic()
        model.update_scale(factor * y)
        with torch.no_grad():
            model.network[-1].weight.copy_(torch.linspace(-1, 1, 16))
            model.network[-1].bias.zero_()
        gauss_newton(model, x, factor * y, steps=3)
        values.append(model(x).detach() / factor)
    assert torch.equal(*values)


def test_a_step_that_raises_the_loss_is_halved_or_given_up(monkeypatch):
    # y = tanh(w) + b far from the optimum: undamped steps overshoot where tanh is flat.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), (3.0, 0.0, 1.0, 0.0), strict=True):
            parameter.fill_(value)
    model = Critic(network)
    x = torch.linspace(-1, 1, 50).double()[:, None]
    y = -torch.tanh(0.2 * x[:, 0])

    def loss():
        return (model(x) - y).square().mean().item()

    shares = []
    for _ in range(6):
        before = loss()
        shares.append(gauss_newton(model, x, y, damping=1e-6, cg_iterations=50).step)
        assert loss() <= before
    assert any(0 < share < 1 for share in shares)
    # Without a halving left the network stays as it was.
    monkeypatch.setattr(critics, "HALVINGS", 0)
    shares = []
    for _ in range(6):
        before, parameters = loss(), parameter_vector(model)
        shares.append(gauss_newton(model, x, y, damping=1e-6, cg_iterations=50).step)
        assert shares[-1] == 1 or torch.equal(parameters, parameter_vector(model))
    assert 0 in shares
    # Targets that are not finite move nothing, and that is said.
    parameters = parameter_vector(model)
    found = gauss_newton(model, x, torch.full((50,), math.nan).double())
    assert (found.status, found.step) == ("non_finite", 0.0)
    assert torch.equal(parameters, parameter_vector(model))


def test_a_perfect_critic_stays():
    model, (x, _) = critic(), data()
    y = model(x).detach()
    parameters = parameter_vector(model)
    assert gauss_newton(model, x, y).status == "zero_rhs"
    assert torch.equal(parameters, parameter_vector(model))


def test_one_sample():
    model = critic(dtype=torch.float64)
    x, y = torch.ones(1, 3).double(), torch.tensor([5.0]).double()
    gauss_newton(model, x, y, damping=1e-6)
    assert (model(x) - 5).abs() < 1.0
    assert explained_variance(y, model(x)).isnan()


def test_explained_variance_closed_forms():
    y = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(y, y) == 1
    assert explained_variance(y, y + 7) == 1
    assert explained_variance(y, torch.zeros(4)) == 0
    assert explained_variance(y, -y) == -3
    assert explained_variance(torch.ones(4), y).isnan()


def test_steps_are_checked():
    model, (x, y) = critic(), data()
    with pytest.raises(ValueError, match="steps is 0"):
        gauss_newton(model, x, y, steps=0)
