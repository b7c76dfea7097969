"""The papers' tasks against references that are written another way, and the gradient baselines against each other."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from agents import noise
from benchmarks.baselines import Rtrl, Uoro, rtrl, tbptt, uoro
from benchmarks.learning import Classification, LearnedOptimizer, LearningRateDecay
from benchmarks.toys import InfluenceBalancing, ToyRegression

ONE = torch.zeros(1, dtype=torch.int64)


def classification(hidden=(5,)):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    return Classification(inputs, torch.randint(3, (30,), generator=generator), hidden, batch_size=7)


def optimizer():
    return LearnedOptimizer(classification(), horizon=20, hidden=3)


def thetas(task, n):
    size = {InfluenceBalancing: 1, LearnedOptimizer: 23}.get(type(task), 2)
    return torch.randn(n, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.3 - 1


TASKS = [InfluenceBalancing(), ToyRegression(20), LearningRateDecay(classification(), 20, 5.0), optimizer()]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)


@every_task
def test_two_windows_make_a_long_one(task):
    theta, keys = thetas(task, 3), torch.tensor([5, 5, 9])
    begin = task.init(keys, torch.arange(3))
    long, total, _ = task.unroll(theta, begin, 6)
    middle, first, _ = task.unroll(theta, begin, 4)
    short, second, _ = task.unroll(theta, middle, 2)
    for name, value in long.items():
        assert torch.equal(value, short[name])
    assert long["steps"].tolist() == [6, 6, 6]
    # Influence balancing scores the last step alone.
    torch.testing.assert_close(total, second if isinstance(task, InfluenceBalancing) else first + second)


@every_task
def test_rows_are_independent_and_inputs_stay(task):
    theta, keys = thetas(task, 4), torch.tensor([5, 5, 9, 1])
    begin = task.init(keys, torch.arange(4))
    copies = {name: value.clone() for name, value in begin.items()}
    state, score, ended = task.unroll(theta, begin, 5)
    assert score.shape == ended.shape == (4,)
    assert all(torch.equal(value, begin[name]) for name, value in copies.items())
    rows = torch.tensor([2, 0])
    alone, part, _ = task.unroll(theta[rows], {name: value[rows] for name, value in begin.items()}, 5)
    torch.testing.assert_close(part, score[rows])
    for name, value in alone.items():
        torch.testing.assert_close(value, state[name][rows])


@pytest.mark.parametrize("task", TASKS[1:], ids=lambda task: type(task).__name__)
def test_episodes_end_at_the_horizon(task):
    theta = thetas(task, 1)
    state, _, ended = task.unroll(theta, task.init(ONE, ONE), 19)
    assert not ended.any()
    assert task.unroll(theta, state, 1)[2].all()


def test_influence_balancing_is_the_matrix_recursion():
    task, theta = InfluenceBalancing(), torch.tensor([[0.5], [-1 / 6]], dtype=torch.float64)
    A = 0.5 * (torch.eye(23) + torch.eye(23).roll(1, 1).triu(1)).double()
    v = torch.cat((torch.ones(10), -torch.ones(13))).double()
    s = torch.ones(2, 23).double()
    for _ in range(500):
        s = s @ A.T + theta * v
    state, score, ended = task.unroll(theta, task.init(ONE.expand(2), torch.arange(2)), 500)
    torch.testing.assert_close(state["s"], s)
    torch.testing.assert_close(score, torch.tensor([-8.0, 0.0]).double())
    assert not ended.any()


def test_toy_regression_has_the_published_losses():
    task = ToyRegression()
    # From the reference: the initial point, and the best of a grid over both rates.
    grid = torch.linspace(-6, 4, 101, dtype=torch.float64)
    theta = torch.cat((torch.tensor([[-4.0, -4.0]]).double(), torch.cartesian_prod(grid, grid)))
    keys = torch.zeros(len(theta), dtype=torch.int64)
    losses = -task.unroll(theta, task.init(keys, keys), 100)[1]
    assert losses[0].item() == pytest.approx(2488, abs=0.5)
    assert losses.min().item() == pytest.approx(558, abs=0.5)
    x = torch.tensor([[1.0, 1.0], [0.3, -2.0], [-0.1, 120.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(task._loss(x).sum(), x)
    torch.testing.assert_close(task._gradient(x.detach()), gradient)


def network(problem, weights):
    """The same classifier as modules."""
    layers, start = [], 0
    for fan_in, fan_out in problem.layers:
        layer = nn.Linear(fan_in, fan_out).double()
        with torch.no_grad():
            layer.weight.copy_(weights[start : start + fan_in * fan_out].view(fan_in, fan_out).T)
            start += fan_in * fan_out
            layer.bias.copy_(weights[start : start + fan_out])
            start += fan_out
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def flat(net):
    return torch.cat([part.detach().flatten() for layer in net[::2] for part in (layer.weight.T, layer.bias)])


def test_a_learning_rate_schedule_is_torch_sgd():
    problem = classification((5, 6))
    task, key = LearningRateDecay(problem, 20, time_scale=5.0), torch.tensor([28])
    theta = torch.tensor([[-2.0, 0.5]], dtype=torch.float64)
    begin = task.init(key, ONE)
    net = network(problem, begin["weights"][0])
    sgd, total = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9), 0.0
    for t in range(10):
        rows = (28 + 7 * t + torch.arange(7)) % 30
        loss = nn.functional.cross_entropy(net(problem.inputs[rows]), problem.labels[rows])
        sgd.param_groups[0]["lr"] = (theta[0, 0].exp() / (1 + t / 5) ** theta[0, 1].exp()).item()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        total -= loss.item()
    state, score, _ = task.unroll(theta, begin, 10)
    assert score.item() == pytest.approx(total)
    torch.testing.assert_close(state["weights"][0], flat(net))
    assert len(parameters_to_vector(net.parameters())) == problem.size


def test_weights_come_from_the_key():
    problem = classification((40,))
    weights = problem.init(torch.tensor([3, 4, 3]))
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
    assert weights[0, :160].std().item() == pytest.approx((2 / 4) ** 0.5, rel=0.2)
    assert weights[0, 160:200].tolist() == [0] * 40
    with pytest.raises(ValueError, match="batch_size is 31; give 1 to 30"):
        Classification(problem.inputs, problem.labels, (3,), 31)


def test_the_first_move_of_a_learned_optimizer():
    task, key = optimizer(), torch.tensor([3])
    theta = torch.randn(1, task.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    begin = task.init(key, ONE)
    gradient, _ = task.problem.gradient(begin["weights"], key, ONE)
    # After one step the corrected running means are the gradient, and the root of the square is its size.
    sign = gradient / (gradient.abs() + 1e-8)
    features = torch.stack((sign, begin["weights"], sign, sign), 2)[0]
    first, first_bias, second, second_bias = theta[0].split([12, 3, 6, 2])
    outputs = (features @ first.view(4, 3) + first_bias).tanh() @ second.view(3, 2) + second_bias
    expected = begin["weights"][0] - 1e-3 * outputs[:, 0] * outputs[:, 1].exp()
    torch.testing.assert_close(task.unroll(theta, begin, 1)[0]["weights"][0], expected)
    still = task.unroll(torch.zeros_like(theta), begin, 5)[0]
    assert torch.equal(still["weights"], begin["weights"])


@pytest.mark.parametrize("task", TASKS[1:3], ids=lambda task: type(task).__name__)
def test_rtrl_adds_up_to_backpropagation_and_to_finite_differences(task):
    theta = thetas(task, 1)[0]
    whole, score, after = tbptt(task, theta, task.init(ONE, ONE), 12)
    assert not any(value.requires_grad for value in after.values())
    carried, total = Rtrl.start(task.init(ONE, ONE), theta), torch.zeros_like(theta)
    for _ in range(4):
        gradient, _, carried = rtrl(task, theta, carried, 3)
        total += gradient
    torch.testing.assert_close(total, whole)

    for i, step in enumerate(1e-5 * torch.eye(2, dtype=torch.float64)):
        up, down = (task.unroll((theta + sign * step)[None], task.init(ONE, ONE), 12)[1] for sign in (1, -1))
        assert whole[i].item() == pytest.approx((up - down).item() / 2e-5, rel=1e-4)
    assert score.item() == task.unroll(theta[None], task.init(ONE, ONE), 12)[1].item()


def test_truncation_turns_the_sign_on_influence_balancing():
    task, theta = InfluenceBalancing(), torch.tensor([0.5], dtype=torch.float64)
    state = task.unroll(theta[None], task.init(ONE, ONE), 200)[0]
    carried = Rtrl.start(task.init(ONE, ONE), theta)
    for _ in range(4):
        gradient, _, carried = rtrl(task, theta, carried, 50)
    torch.testing.assert_close(gradient, torch.tensor([-24.0]).double())
    signs = [tbptt(task, theta, state, window)[0].sign().item() for window in (1, 10, 100)]
    assert signs == [1, 1, -1]


def test_uoro_carries_what_rtrl_does_in_the_mean(monkeypatch):
    task, theta = InfluenceBalancing(3, 2), torch.tensor([0.5], dtype=torch.float64)
    begin = task.init(ONE, ONE)
    # A memory as after earlier windows: its product is the derivative of the state.
    toward_state, toward_theta = torch.tensor([0.2, -1.0, 0.5]).double(), torch.tensor([3.0]).double()
    gradient, score, exact = rtrl(task, theta, Rtrl(begin, torch.outer(toward_theta, toward_state)), 2)
    products = []
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        monkeypatch.setattr(noise, "normal", lambda *_, signs=signs: torch.tensor(signs))
        estimate, value, after = uoro(task, theta, Uoro(begin, toward_state, toward_theta), 2, 0)
        products.append(torch.outer(after.toward_theta, after.toward_state))
        torch.testing.assert_close(estimate, gradient)
        assert value == score
        assert torch.equal(after.state["s"], exact.state["s"])
    assert torch.stack(products).std(0).min() > 0.1
    torch.testing.assert_close(torch.stack(products).mean(0), exact.jacobian, rtol=0, atol=1e-5)


def test_uoro_draws_anew_for_every_window_and_seed():
    task, theta = InfluenceBalancing(), torch.tensor([0.5], dtype=torch.float64)
    begin = Uoro.start(task.init(ONE, ONE), theta)
    _, _, first = uoro(task, theta, begin, 1, seed=0)
    _, _, other = uoro(task, theta, begin, 1, seed=1)
    _, _, later = uoro(task, theta, replace(begin, windows=first.windows), 1, seed=0)
    assert torch.equal(uoro(task, theta, begin, 1, seed=0)[2].toward_state, first.toward_state)
    for different in (other, later):
        assert not torch.equal(different.toward_state, first.toward_state)
