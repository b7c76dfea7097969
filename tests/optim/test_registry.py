"""Optimizers by name, and their states in files."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import nn

from agents.optim.adabound import AUTO, AdaBound
from agents.optim.registry import (
    OPTIMIZERS,
    OptimizerConfig,
    OptimizerName,
    OptimizerState,
    make_flat_optimizer,
    make_optimizer,
    plan_handover,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.linspace(-1, 1, 12).view(4, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - x[:, :2].sin()).square().mean().backward()
        optimizer.step()


def values(net: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def test_configurations_choose_among_all_of_them() -> None:
    assert typing.get_args(OptimizerName) == tuple(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_made_by_name(name: str) -> None:
    net = network()
    before = values(net)
    optimizer = make_optimizer(name, net.parameters(), lr=0.02)
    assert type(optimizer) is OPTIMIZERS[name]
    assert optimizer.param_groups[0]["lr"] == 0.02
    train(net, optimizer, 1)
    assert not torch.equal(values(net), before)


def test_a_misspelt_optimizer_is_corrected() -> None:
    with pytest.raises(ValueError, match="there is no optimizer 'adabond'; did you mean 'adabound'"):
        make_optimizer("adabond", network().parameters())
    with pytest.raises(ValueError, match="give one of adabound, adam"):
        make_optimizer("newton", network().parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_flat_optimizer_steps_its_modules_with_the_settings_that_it_has(name: str) -> None:
    modules = [network(), nn.Linear(3, 1)]
    settings = OptimizerConfig.of({"optimizer": name, "learning_rate": 0.02, "eps": 1e-4, "final_lr": 0.5})
    flat, optimizer = make_flat_optimizer(settings, modules)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.02
        assert group.get("eps", 1e-4) == 1e-4
        assert group.get("final_lr", 0.5) == 0.5
    before = [values(module).clone() for module in modules]
    flat.differentiate(sum((module(torch.ones(1, 3)).square().sum() for module in modules), torch.zeros(())))
    optimizer.step()
    assert not any(torch.equal(values(module), old) for module, old in zip(modules, before, strict=True))


@pytest.mark.parametrize(("handover", "gamma"), [(0.25, 1 / 10), (1.0, 1 / 40), (12.0, 1 / 12)])
def test_a_handover_is_a_share_of_the_planned_updates_or_a_number_of_them(handover: float, gamma: float) -> None:
    optimizer = AdaBound([{"params": [parameter]} for parameter in network().parameters()])
    plan_handover(optimizer, handover, updates=40)
    assert [group["gamma"] for group in optimizer.param_groups] == pytest.approx([gamma] * 4)
    others = torch.optim.SGD(network().parameters(), lr=0.1)
    plan_handover(others, handover, updates=40)
    assert "gamma" not in others.param_groups[0]


# A final_lr that is measured ------------------------------------------------------------------------------------------


def with_measured(steps: int) -> tuple[nn.Module, AdaBound]:
    """A network and an optimizer that measures at update 5."""
    net = network()
    optimizer = AdaBound(net.parameters(), final_lr=AUTO, gamma=0.2)
    train(net, optimizer, steps)
    return net, optimizer


def copy_state(source: AdaBound, target: AdaBound) -> None:
    OptimizerState("adabound", target).load(OptimizerState("adabound", source).tensors())


def final_lr(optimizer: AdaBound) -> float | str:
    return optimizer.param_groups[0]["final_lr"]


def test_a_state_from_before_the_hand_over_is_measured_anew() -> None:
    """The state of an optimizer that has not begun: what was measured since does not stay."""
    _, fresh = with_measured(0)
    net, used = with_measured(6)
    assert final_lr(used) != AUTO
    copy_state(fresh, used)
    assert final_lr(used) == AUTO
    assert not used.state
    net.load_state_dict(network().state_dict())
    again, other = with_measured(8)
    train(net, used, 8)
    assert final_lr(used) == final_lr(other) != AUTO
    assert torch.equal(values(net), values(again))


def test_a_state_from_after_the_hand_over_brings_its_own() -> None:
    _, saved = with_measured(6)
    _, used = with_measured(0)
    used.param_groups[0]["final_lr"] = 123.0
    copy_state(saved, used)
    assert final_lr(used) == final_lr(saved) != 123.0


def test_a_final_lr_that_was_given_stays() -> None:
    _, saved = with_measured(6)
    given = AdaBound(network().parameters(), final_lr=0.3)
    copy_state(saved, given)
    assert final_lr(given) == 0.3
    OptimizerState("adabound", given).load({})
    assert final_lr(given) == 0.3
