"""AdaBound against a scalar in plain Python, its limits, its counterexamples, and the defects of its public code."""

import copy
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
from stable_baselines3 import A2C, PPO, SAC
from torch import nn
from torch.optim import lr_scheduler

from agents.optim.adabound import AdaBound, AMSBound, handover_gamma
from agents.optim.effective_steps import bounds_at, charts, report


def scalar_steps(gradient, x, amsbound=False, maximize=False, weight_decay=0.0, decoupled_weight_decay=False):
    """AdaBound on one float, as a coroutine: send(group) -> x after the next update."""
    m = v = largest = 0.0
    for t in itertools.count(1):
        group = yield x
        g = -gradient(x) if maximize else gradient(x)
        (beta1, beta2), lr = group["betas"], group["lr"]
        if decoupled_weight_decay:
            x -= lr * weight_decay * x
        else:
            g += weight_decay * x
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        largest = max(largest, v) if amsbound else v
        final = group["final_lr"] * lr / group["base_lr"]
        lower, upper = final * (1 - 1 / (group["gamma"] * t + 1)), final * (1 + 1 / (group["gamma"] * t))
        eta = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) / (math.sqrt(largest) + group["eps"])
        x -= min(max(eta, lower), upper) * m


def started(*args, **kwargs):
    steps = scalar_steps(*args, **kwargs)
    next(steps)
    return steps


def slope(x):
    return math.sin(5 * x) + 0.3 * x - 0.1


def set_slopes(parameter):
    parameter.grad = torch.sin(5 * parameter.detach()) + 0.3 * parameter.detach() - 0.1


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def train(net, optimizer, steps, start=0):
    """Steps on batches that their number determines."""
    for i in range(start, start + steps):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(i)).to(next(net.parameters()))
        optimizer.zero_grad()
        (net(x) - x[:, :2].sin()).square().mean().backward()
        optimizer.step()


def values(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def stepped(make, steps=20, dtype=torch.float32):
    net = network(dtype)
    train(net, make(net.parameters()), steps)
    return values(net)


# The update


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsbound": True},
        {"maximize": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "amsbound": True, "maximize": True},
    ],
    ids=str,
)
def test_equals_the_scalar_trajectory(options, foreach):
    starts = [-1.5, -0.2, 0.4, 2.0]
    parameter = nn.Parameter(torch.tensor(starts, dtype=torch.float64))
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "final_lr": 0.05, "gamma": 0.02, "eps": 1e-6}
    optimizer = AdaBound([parameter], **settings, **options, foreach=foreach)
    expected = [started(slope, x, **options) for x in starts]
    for _ in range(200):
        set_slopes(parameter)
        optimizer.step()
        xs = [steps.send(optimizer.param_groups[0]) for steps in expected]
    torch.testing.assert_close(parameter.detach(), torch.tensor(xs, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_amsbound_is_adabound_with_the_maximum():
    both = [stepped(lambda p: AMSBound(p, final_lr=0.03)), stepped(lambda p: AdaBound(p, final_lr=0.03, amsbound=True))]
    assert torch.equal(*both)
    assert not torch.equal(both[0], stepped(lambda p: AdaBound(p, final_lr=0.03)))


def test_the_bounds_meet_in_final_lr_and_keep_their_digits_in_float32():
    group = {"final_lr": 0.1, "base_lr": 1e-3, "gamma": 1e-3}
    # Relative to lr: 100 k and 100 / k with k = gamma t / (gamma t + 1), which is 1/2 at t = 1000.
    assert bounds_at(1000.0, group) == (50.0, 200.0)
    assert bounds_at(1e12, group) == pytest.approx((100, 100))
    lower, upper = bounds_at(torch.tensor(1.0), group | {"gamma": 1e-9})
    assert lower.item() == pytest.approx(100e-9, rel=1e-6)
    assert upper.item() == pytest.approx(100e9, rel=1e-6)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_tiny_gamma_is_adam(amsgrad, foreach):
    settings = {"lr": 1e-3, "eps": 0.0, "foreach": foreach}
    ours = stepped(lambda p: AdaBound(p, gamma=1e-18, amsbound=amsgrad, **settings), 200, torch.float64)
    adam = stepped(lambda p: torch.optim.Adam(p, amsgrad=amsgrad, **settings), 200, torch.float64)
    assert (ours - adam).abs().max() < 1e-14


@pytest.mark.parametrize("foreach", [False, True])
def test_a_huge_gamma_is_sgd(foreach):
    def sgd(params):
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.9)
        for p in optimizer.param_groups[0]["params"]:  # SGD sets its first buffer to g, not to (1 - dampening) g
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer

    ours = stepped(lambda p: AdaBound(p, gamma=1e15, foreach=foreach), 200, torch.float64)
    assert (ours - stepped(sgd, 200, torch.float64)).abs().max() < 1e-14


def mixed_parameters():
    torch.manual_seed(0)
    shapes = [((5, 3), torch.float32), ((), torch.float64), ((4,), torch.complex64), ((0,), torch.float32)]
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, dtype in shapes]


@pytest.mark.parametrize("options", [{}, {"capturable": True, "nonfinite": "ignore"}], ids=["host", "capturable"])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
@pytest.mark.parametrize("amsbound", [False, True])
def test_foreach_equals_single(options, decay, amsbound):
    results = []
    for foreach in (False, True):
        parameters = mixed_parameters()
        optimizer = AdaBound(
            parameters, final_lr=0.02, gamma=0.1, foreach=foreach, amsbound=amsbound, maximize=True, **decay, **options
        )
        for _ in range(20):
            for p in parameters:
                set_slopes(p)
            optimizer.step()
        results.append(parameters)
    for single, foreach in zip(*results, strict=True):
        if options:  # (m / d) f against m / (d / f): a rounding each
            torch.testing.assert_close(single, foreach, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(single, foreach)


@pytest.mark.parametrize("options", [{}, {"amsbound": True, "weight_decay": 0.1}], ids=str)
def test_what_stays_on_the_device_equals_the_default(options):
    def end(**kind):
        parameter = torch.linspace(-1, 1, 5, requires_grad=True).clone()  # no leaf: a differentiable update is in place
        parameter.retain_grad()
        optimizer = AdaBound([parameter], final_lr=0.02, gamma=0.1, **options, **kind)
        for _ in range(20):
            set_slopes(parameter)
            optimizer.step()
        return parameter.detach()

    # As in Adam, bias corrections in float32 too: 1 - 0.999 loses four digits.
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    default = end()
    torch.testing.assert_close(end(differentiable=True), default, **tolerance)
    for foreach in (False, True):
        kind = {"capturable": True, "nonfinite": "ignore", "foreach": foreach}
        torch.testing.assert_close(end(**kind), default, **tolerance)


@pytest.mark.parametrize("capturable", [False, True])
def test_lr_may_be_a_tensor(capturable, monkeypatch):
    # As on a GPU, where foreach is the default; no foreach kernel takes lr as a tensor and t as a number.
    monkeypatch.setattr("agents.optim.adabound._default_to_fused_or_foreach", lambda *_: (False, True))
    options = {"capturable": True, "nonfinite": "ignore"} if capturable else {}
    number, tensor = (
        stepped(lambda p, lr=lr: AdaBound(p, lr=lr, **options), dtype=torch.float64)
        for lr in (0.01, torch.tensor(0.01, dtype=torch.float64))
    )
    torch.testing.assert_close(number, tensor)


@pytest.mark.parametrize("amsbound", [False, True])
def test_autograd_goes_through_the_update(amsbound):
    def end(lr, start):
        parameter = start.clone()
        optimizer = AdaBound([parameter], lr=lr, final_lr=0.03, gamma=0.5, amsbound=amsbound, differentiable=True)
        optimizer.param_groups[0]["base_lr"] = 0.01
        for i in range(3):
            parameter.grad = (i + 1) * start.cos()
            optimizer.step()
        return parameter

    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (lr, start))


def test_complex_parameters_are_pairs_of_real_ones():
    complex_parameter = nn.Parameter(torch.randn(6, dtype=torch.complex128))
    real = nn.Parameter(torch.view_as_real(complex_parameter.detach()).clone())
    optimizers = AMSBound([complex_parameter], weight_decay=0.1), AMSBound([real], weight_decay=0.1)
    for _ in range(10):
        complex_parameter.grad = torch.randn(6, dtype=torch.complex128)
        real.grad = torch.view_as_real(complex_parameter.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.view_as_real(complex_parameter.detach()), real.detach())


def test_a_parameter_without_a_gradient_stays_and_keeps_its_own_count():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdaBound([a, b])
    for i in range(3):
        set_slopes(a)
        if i == 2:
            set_slopes(b)
        optimizer.step()
        assert i == 2 or torch.equal(b, torch.ones(2))
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [3, 1]


@pytest.mark.parametrize("foreach", [False, True])
def test_no_step_is_undefined(foreach):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdaBound([parameter], eps=0.0, foreach=foreach)
    parameter.grad = torch.tensor([0.0, 1.0, 1e-30])
    optimizer.step()
    assert parameter.isfinite().all()
    assert parameter[0] == 1
    before = parameter.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0  # a schedule's end
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(parameter, before)


# Counterexamples


def online(make, gradient, start, bound, *reports):
    """x after each of the reports' steps on [-bound, bound], with projection and steps that fall as 1 / √t."""
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = make([x])
    schedule = lr_scheduler.LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1))
    xs = []
    for t in range(1, reports[-1] + 1):
        x.grad = torch.tensor(gradient(t), dtype=torch.float64)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(-bound, bound)
        if t in reports:
            xs.append(x.item())
    return xs


def reddi(t):
    """Reddi et al. 2018, theorem 1, with C = 3: the best x is -1."""
    return 3.0 if t % 3 == 1 else -1.0


def luo(t):
    """Luo et al. 2019, theorem 1, with C = 3, taken as linear: the best x is -2."""
    return {1: -1.0, 2: 2.0, 0: 0.0}[t % 3]


def test_reddis_counterexample():
    settings = {"lr": 0.1, "betas": (0.0, 0.1)}
    bound = {"final_lr": 0.1, **settings}
    tolerance = {"abs": 0.005}
    assert online(lambda p: torch.optim.Adam(p, **settings), reddi, 0.0, 1, 1000, 5000) == pytest.approx(
        [1, 0.999], **tolerance
    )
    assert online(lambda p: AMSBound(p, **bound), reddi, 0.0, 1, 1000, 5000) == pytest.approx([-0.819, -1], **tolerance)
    assert online(lambda p: AdaBound(p, **bound), reddi, 0.0, 1, 1000, 5000, 20_000) == pytest.approx(
        [1, -0.01, -1], **tolerance
    )
    # Savarese 2019, https://arxiv.org/abs/1908.04457: what decides is the rate of the bounds, not their presence.
    slow = online(lambda p: AdaBound(p, gamma=1e-4, **bound), reddi, 0.0, 1, 20_000)
    assert slow == pytest.approx([0.76], **tolerance)


def test_luos_counterexample():
    settings = {"lr": 0.1, "betas": (0.0, 0.04)}
    ends = [
        online(make, luo, 1.0, 2, 6000)[0]
        for make in (
            lambda p: torch.optim.Adam(p, **settings),
            lambda p: AdaBound(p, final_lr=0.1, **settings),
            lambda p: AMSBound(p, final_lr=0.1, **settings),
        )
    ]
    assert ends == pytest.approx([1.05, -0.27, -1.97], abs=0.05)


# What the public code gets wrong


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_as_the_original(copied):
    net = network()
    optimizer = AdaBound(net.parameters(), final_lr=0.02, gamma=0.1)
    train(net, optimizer, 10)
    other_net, other = copied((net, optimizer))
    for each in ((net, optimizer), (other_net, other)):
        train(*each, 10, start=10)
    assert torch.equal(values(net), values(other_net))


@pytest.mark.parametrize("cls", [AdaBound, AMSBound])
@pytest.mark.parametrize("rebuilt_lr", [0.01, 0.001])
def test_a_state_goes_on_whatever_lr_the_optimizer_was_rebuilt_with(cls, rebuilt_lr):
    net = network()
    optimizer = cls(net.parameters(), lr=0.01, final_lr=0.02, gamma=0.1)
    train(net, optimizer, 10)
    optimizer.param_groups[0]["lr"] = 0.001
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other_net = network(seed=1)
    other_net.load_state_dict(saved["net"])
    other = cls(other_net.parameters(), lr=rebuilt_lr)
    other.load_state_dict(saved["optimizer"])
    for each in ((net, optimizer), (other_net, other)):
        train(*each, 10, start=10)
    assert torch.equal(values(net), values(other_net))


def test_an_added_group_is_updated_with_its_own_options():
    first, second = (nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (0.4, -0.7))
    optimizer = AdaBound([first], lr=0.01)
    set_slopes(first)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.001
    optimizer.add_param_group({"params": [second], "lr": 0.02, "final_lr": 0.5, "gamma": 0.1})
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    expected = started(slope, -0.7)
    for _ in range(20):
        set_slopes(first)
        set_slopes(second)
        optimizer.step()
        x = expected.send(optimizer.param_groups[1])
    assert second.item() == pytest.approx(x, rel=1e-12)


def test_the_closure_may_differentiate():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = AdaBound([parameter])

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 2
    assert (parameter < 1).all()


def test_decoupled_decay_is_proportional_to_lr():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = AdaBound([parameter], lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert parameter.tolist() == [1 - 0.01 * 0.1] * 2


def test_a_state_of_the_public_code_goes_on():
    net = network()
    optimizer = AdaBound(net.parameters(), lr=0.01, final_lr=0.02, gamma=0.1)
    train(net, optimizer, 10)
    optimizer.param_groups[0]["lr"] = 0.001
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    public = ("params", "lr", "betas", "final_lr", "gamma", "eps", "weight_decay", "amsbound")
    saved["param_groups"] = [{name: group[name] for name in public} for group in saved["param_groups"]]
    other_net = copy.deepcopy(net)
    other = AdaBound(other_net.parameters(), lr=0.01)
    other.load_state_dict(saved)
    for each in ((net, optimizer), (other_net, other)):
        train(*each, 10, start=10)
    assert torch.equal(values(net), values(other_net))


# Schedules

SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 9]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.0, 10),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, 30),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [5]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001),
}


def test_every_schedule_of_torch_is_tried():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_scales_the_bounds(name):
    parameter = nn.Parameter(torch.tensor([0.4], dtype=torch.float64))
    optimizer = AdaBound([{"params": [parameter], "base_lr": 0.02}], lr=0.01, final_lr=0.05, gamma=0.05)
    schedule = SCHEDULES[name](optimizer)
    expected = started(slope, 0.4)
    for i in range(30):
        set_slopes(parameter)
        optimizer.step()
        x = expected.send(optimizer.param_groups[0])
        schedule.step(*([1.0 + i] if name == "ReduceLROnPlateau" else []))
        assert optimizer.param_groups[0]["base_lr"] == 0.02
    assert parameter.item() == pytest.approx(x, rel=1e-12)


# An automatic final_lr, and gamma as a share of the updates


@pytest.mark.parametrize("cls", [AdaBound, AMSBound])
def test_an_automatic_final_lr_is_each_groups_own_median_at_the_hand_over(cls):
    a, b = (nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64)) for _ in range(2))
    ours = cls(
        [{"params": [a], "base_lr": 0.02}, {"params": [b], "final_lr": 0.3}],
        betas=(0.9, 0.5),
        final_lr="auto",
        gamma=0.1,
    )
    c = nn.Parameter(a.detach().clone())
    adam = torch.optim.Adam([c], betas=(0.9, 0.5), amsgrad=cls is AMSBound)
    for parameter in (a, b, c):
        parameter.grad = torch.zeros(7, dtype=torch.float64)
    for t in range(1, 11):
        assert ours.param_groups[0]["final_lr"] == "auto"
        a.grad[2:] = torch.arange(1.0, 6.0, dtype=torch.float64) / t
        c.grad.copy_(a.grad)
        ours.step()
        adam.step()
    torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-9)
    # Elements 2 to 6 have had gradients; by the median of |g| the middle one is element 4, with 3 / t.
    squares = [9 / t**2 for t in range(1, 11)]
    averages = list(itertools.accumulate(squares, lambda v, square: 0.5 * v + 0.5 * square, initial=0.0))
    v = max(averages) if cls is AMSBound else averages[-1]
    step = math.sqrt(1 - 0.5**10) / (1 - 0.9**10) / (math.sqrt(v) + 1e-8)
    assert ours.param_groups[0]["final_lr"] == pytest.approx(0.02 * step)
    assert ours.param_groups[1]["final_lr"] == 0.3


def test_an_automatic_final_lr_survives_a_checkpoint_before_and_after_it_is_measured():
    net = network()
    optimizer = AdaBound(net.parameters(), final_lr="auto", gamma=0.1)
    for start in (0, 5, 10):
        train(net, optimizer, 5, start)
        other_net = copy.deepcopy(net)
        other = AdaBound(other_net.parameters())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors otherwise
        train(other_net, other, 10, start + 5)
        copied_net, copied = copy.deepcopy((net, optimizer))
        train(copied_net, copied, 10, start + 5)
        assert torch.equal(values(other_net), values(copied_net))
        assert other.param_groups[0]["final_lr"] == copied.param_groups[0]["final_lr"] > 0


def test_an_automatic_final_lr_waits_for_a_gradient():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdaBound([parameter], final_lr="auto", gamma=1.0)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.param_groups[0]["final_lr"] == "auto"


# Local time


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_open_bounds_in_local_time_are_adam_in_local_time(amsgrad, foreach):
    settings = {"lr": 1e-3, "eps": 0.0, "foreach": foreach}
    ours, theirs = network(torch.float64), network(torch.float64)
    bound = AdaBound(ours.parameters(), gamma=1e-18, amsbound=amsgrad, **settings)
    adam = torch.optim.Adam(theirs.parameters(), amsgrad=amsgrad, **settings)
    for rollout in range(10):
        bound.begin_local_time()
        for state in adam.state.values():
            state["step"].zero_()
        train(ours, bound, 7, 7 * rollout)
        train(theirs, adam, 7, 7 * rollout)
    assert (values(ours) - values(theirs)).abs().max() < 1e-14
    assert (values(ours) - stepped(lambda p: AdaBound(p, gamma=1e-18, **settings), 70, torch.float64)).norm() > 1e-4


def test_local_time_opens_the_bounds_and_measures_final_lr_anew():
    a, b = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    optimizer = AdaBound([{"params": [a]}, {"params": [b]}], betas=(0.9, 0.5), final_lr="auto", gamma=0.1)
    finals = []
    for size in (1.0, 10.0):
        for _ in range(15):
            a.grad, b.grad = torch.full_like(a, size), torch.full_like(b, 2 * size)
            optimizer.step()
        finals.append([group["final_lr"] for group in optimizer.param_groups])
        optimizer.begin_local_time(measure_final_lr=True)
        assert [group["final_lr"] for group in optimizer.param_groups] == ["auto", "auto"]
        assert bounds_at(1.0, optimizer.param_groups[0]) == (0.0, math.inf)
    # v has all but forgotten the smaller gradients ten updates later, at the hand-over.
    correction = math.sqrt(1 - 0.5**10) / (1 - 0.9**10)
    assert finals[0] == pytest.approx([1e-3 * correction / math.sqrt(1 - 0.5**10) / size for size in (1, 2)], rel=1e-3)
    assert finals[1] == pytest.approx([1e-3 * correction / size for size in (10, 20)], rel=1e-3)

    optimizer = AdaBound([a], final_lr=0.3, gamma=0.1)
    for _ in range(100):
        optimizer.step()
    optimizer.begin_local_time()
    optimizer.step()
    (group,) = optimizer.param_groups
    assert optimizer.state[a]["step"] == 1
    assert group["final_lr"] == 0.3


def test_what_rules_out_measuring_rules_it_out_in_local_time():
    optimizer = AdaBound([nn.Parameter(torch.zeros(3))], eps=0.0)
    with pytest.raises(ValueError, match="positive eps"):
        optimizer.begin_local_time(measure_final_lr=True)
    assert optimizer.param_groups[0]["final_lr"] == 0.1
    optimizer.begin_local_time()


def test_the_hand_over_comes_after_the_given_share_of_the_updates():
    gamma = handover_gamma(0.25, 4000)
    assert bounds_at(1000.0, {"final_lr": 1.0, "base_lr": 1.0, "gamma": gamma}) == pytest.approx((0.5, 2.0))


@pytest.mark.parametrize("arguments", [(0, 10), (1.1, 10), (math.nan, 10), (0.5, 0)])
def test_an_impossible_hand_over_is_refused(arguments):
    with pytest.raises(ValueError, match=r"(fraction|updates) is .*; give"):
        handover_gamma(*arguments)


# Bad input


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"lr": torch.tensor(0.0)},
        {"final_lr": 0.0},
        {"final_lr": -0.1},
        {"final_lr": "automatic"},
        {"gamma": 0.0},
        {"gamma": -1e-3},
        {"gamma": math.inf},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9,)},
        {"betas": (0.9, -0.1)},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"nonfinite": "stop"},
        {"base_lr": 0.0},
    ],
    ids=str,
)
def test_an_option_out_of_its_range_is_named(options):
    (name,) = options
    good, bad = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = AdaBound([good])
    with pytest.raises(ValueError, match=f"^{name} is .*; give"):
        optimizer.add_param_group({"params": [bad], **options})
    assert len(optimizer.param_groups) == 1
    if name != "base_lr":
        with pytest.raises(ValueError, match=f"^{name} is .*; give"):
            AdaBound([bad], **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"foreach": True, "differentiable": True}, "cannot be differentiated"),
        ({"lr": torch.tensor([0.1])}, "a tensor lr"),
        ({"lr": torch.tensor(0.1), "foreach": True}, "a tensor lr"),
        ({"capturable": True}, "nonfinite='ignore'"),
        ({"capturable": True, "nonfinite": "ignore", "final_lr": "auto"}, "give final_lr as a number"),
        ({"final_lr": "auto", "eps": 0.0}, "positive eps"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdaBound([nn.Parameter(torch.ones(1))], **options)


def test_there_is_no_fused_kernel():
    with pytest.raises(TypeError, match="fused"):
        AdaBound([nn.Parameter(torch.ones(1))], fused=True)


def test_a_sparse_gradient_is_refused_before_anything_changes():
    net = nn.ModuleDict({"dense": nn.Linear(2, 2), "table": nn.Embedding(4, 2, sparse=True)})
    optimizer = AdaBound(net.named_parameters())
    net["dense"](net["table"](torch.tensor([1]))).sum().backward()
    before = values(net)
    with pytest.raises(RuntimeError, match=r"'table.weight' is sparse.*SparseAdam"):
        optimizer.step()
    assert torch.equal(values(net), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("named", [False, True])
def test_a_gradient_that_is_not_finite_is_reported_before_anything_changes(bad, named):
    net = network()
    optimizer = AdaBound(net.named_parameters() if named else net.parameters())
    train(net, optimizer, 2)
    net[2].weight.grad[0, 0] = bad
    before, state = values(net), copy.deepcopy(optimizer.state_dict()["state"])
    name = "'2.weight'" if named else r"parameter 2 of group 0, of shape \[2, 8\],"
    with pytest.raises(FloatingPointError, match=f"the gradient of {name} is not finite"):
        optimizer.step()
    assert torch.equal(values(net), before)
    for key, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry, state[key][name]) for name, entry in entries.items())


def test_a_step_is_skipped_only_if_asked_for():
    net = network()
    optimizer = AdaBound(net.named_parameters(), nonfinite="skip")
    train(net, optimizer, 2)
    before = values(net)
    net[0].bias.grad.fill_(math.nan)
    with pytest.warns(RuntimeWarning, match=r"'0.bias' is not finite; this step is skipped"):
        optimizer.step()
    assert torch.equal(values(net), before)
    train(net, optimizer, 1, start=2)
    assert optimizer.state[net[0].weight]["step"].item() == 3
    optimizer.param_groups[0]["nonfinite"] = "ignore"
    net[0].bias.grad.fill_(math.nan)
    optimizer.step()
    assert net[0].bias.isnan().all()


def test_large_finite_gradients_are_not_taken_for_infinite_ones():
    parameter = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    optimizer = AdaBound([parameter])
    parameter.grad = torch.full((4,), 3e38 + 3e38j)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def other_states():
    net = network()
    wide = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 2))
    for optimizer, owner, sentence in (
        (torch.optim.Adam(net.parameters()), net, "lacks final_lr, gamma, amsbound"),
        (torch.optim.SGD(net.parameters(), lr=0.1), net, "lacks betas, final_lr"),
        (AMSBound(net.parameters()), net, "load it into AMSBound"),
        (AdaBound(wide.parameters()), wide, r"shape \[9, 3\], the parameter has \[8, 3\]"),
        (AdaBound([net[0].weight]), net, "doesn't match the size"),
        (AdaBound([{"params": [p]} for p in net.parameters()]), net, "different number of parameter groups"),
    ):
        train(owner, optimizer, 1)
        yield pytest.param(optimizer.state_dict(), sentence, id=sentence)


@pytest.mark.parametrize(("state", "sentence"), list(other_states()))
def test_a_state_of_another_layout_is_refused(state, sentence):
    net = network()
    optimizer = AdaBound(net.parameters())
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(state)
    train(net, optimizer, 1)


# Curves


def test_effective_steps_by_hand():
    parameter, idle = nn.Parameter(torch.ones(6, dtype=torch.float64)), nn.Parameter(torch.ones(2))
    optimizer = AdaBound(
        [{"params": [parameter]}, {"params": [idle]}], lr=0.1, betas=(0.0, 0.0), final_lr=0.1, gamma=1.0, eps=0.0
    )
    parameter.grad = torch.tensor([0.0, 0.1, 0.5, 1.0, 4.0, 10.0], dtype=torch.float64)
    optimizer.step()
    # Without averages η is 0.1 / |g|: 1, 0.2, 0.1, 0.025, 0.01. At gamma t = 1, k = 1/2: the bounds are 0.05 and 0.2.
    # The nearest ranks of 0.05, 0.5 and 0.95 among the five.
    assert report(optimizer, ["a", "b"]) == pytest.approx(
        {
            "adam_step_a_q05": 0.01,
            "adam_step_a_q50": 0.1,
            "adam_step_a_q95": 1.0,
            "effective_step_a_q05": 0.05,
            "effective_step_a_q50": 0.1,
            "effective_step_a_q95": 0.2,
            "effective_step_a_raised": 0.4,
            "effective_step_a_cut": 0.2,
            "effective_step_a_lower": 0.05,
            "effective_step_a_upper": 0.2,
        }
    )
    assert {f"train/{key}" for key in report(optimizer, ["a", "b"])} == {x for xs in charts("a").values() for x in xs}
    moved = (1 - parameter.detach())[1:] / parameter.grad[1:]
    assert moved.tolist() == pytest.approx([0.2, 0.2, 0.1, 0.05, 0.05])


def test_effective_steps_before_the_hand_over_are_adams():
    net = network()
    optimizer = AMSBound(net.parameters(), final_lr="auto")
    train(net, optimizer, 3)
    steps = report(optimizer, ["net"])
    for quantile in ("q05", "q50", "q95"):
        assert steps[f"adam_step_net_{quantile}"] == steps[f"effective_step_net_{quantile}"] > 0
    assert steps["effective_step_net_raised"] == steps["effective_step_net_cut"] == 0
    assert "effective_step_net_upper" not in steps


def test_effective_steps_of_parameters_with_unequal_counts_are_bounded_each_by_its_own():
    often, once = nn.Parameter(torch.ones(1, dtype=torch.float64)), nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdaBound([often, once], lr=0.1, betas=(0.0, 0.0), final_lr=0.1, gamma=1.0, eps=0.0)
    for _ in range(3):
        often.grad = torch.full((1,), 10.0, dtype=torch.float64)
        optimizer.step()
    once.grad, often.grad = torch.full((1,), 10.0, dtype=torch.float64), None
    optimizer.step()
    # Adam's 0.01 is raised to 0.1 k with k = 3/4 and 1/2.
    steps = report(optimizer, ["net"])
    assert (steps["effective_step_net_q05"], steps["effective_step_net_q95"]) == pytest.approx((0.05, 0.075))
    assert (steps["effective_step_net_lower"], steps["effective_step_net_upper"]) == pytest.approx((0.075, 0.1 * 4 / 3))


def test_there_are_no_effective_steps_to_tell_of_other_optimizers():
    net = network()
    adam = torch.optim.Adam(net.parameters())
    train(net, adam, 1)
    assert report(adam, ["net"]) == {}


# Users


@pytest.mark.parametrize("optimizer_class", [AdaBound, AMSBound])
@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (PPO, {"n_steps": 64, "batch_size": 32, "n_epochs": 2}),
        (A2C, {"n_steps": 16}),
        (SAC, {"learning_starts": 100, "batch_size": 16, "train_freq": 4}),
    ],
)
def test_stable_baselines3_accepts_it(algorithm, settings, optimizer_class, tmp_path):
    policy_kwargs = {
        "net_arch": [16],
        "optimizer_class": optimizer_class,
        "optimizer_kwargs": {"final_lr": "auto", "gamma": handover_gamma(0.5, 10)},
    }
    model = algorithm(
        "MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, learning_rate=lambda left: 1e-3 * left, **settings
    )
    model.learn(300)
    owners = (model.actor, model.critic) if algorithm is SAC else (model.policy,)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env=model.env)
    for owner in owners:
        (group,) = owner.optimizer.param_groups
        assert type(owner.optimizer) is optimizer_class
        assert group["lr"] < group["base_lr"] == 1e-3
        assert group["final_lr"] > 0
    again.learn(100, reset_num_timesteps=False)
