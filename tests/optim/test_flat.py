"""Parameters as one vector: the modules follow it, and their gradients are its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from agents.optim.flat import FlatParameters


@pytest.fixture
def modules() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.Linear(3, 1)]


def loss_of(modules: list[nn.Module]) -> torch.Tensor:
    x = torch.linspace(-1, 1, 15).view(5, 3)
    return sum((module(x).square().mean() for module in modules), torch.zeros(()))


def test_values_stay_and_the_gradient_is_that_of_backward(modules: list[nn.Module]) -> None:
    plain = copy.deepcopy(modules)
    loss_of(plain).backward()
    flat = FlatParameters(modules)
    flat.differentiate(loss_of(modules))
    assert [len(group) for group in flat.groups] == [3 * 4 + 4 + 4 * 2 + 2, 3 + 1]
    for module, other, group in zip(modules, plain, flat.groups, strict=True):
        assert torch.equal(nn.utils.parameters_to_vector(module.parameters()), group)
        assert torch.equal(group.grad, torch.cat([p.grad.flatten() for p in other.parameters()]))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_steps_are_those_of_the_parameters_themselves(modules: list[nn.Module], make: type) -> None:
    plain = copy.deepcopy(modules)
    separate = make([p for module in plain for p in module.parameters()], lr=0.1)
    flat = FlatParameters(modules)
    together = make(flat.groups, lr=0.1)
    for _ in range(3):
        separate.zero_grad()
        loss_of(plain).backward()
        separate.step()
        flat.differentiate(loss_of(modules))
        together.step()
    for module, other in zip(modules, plain, strict=True):
        for a, b in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_a_loaded_state_is_the_one_that_steps_go_on_from(modules: list[nn.Module]) -> None:
    flat = FlatParameters(modules)
    modules[1].load_state_dict({"weight": torch.full((1, 3), 7.0), "bias": torch.zeros(1)})
    assert flat.groups[1].tolist() == [7.0, 7.0, 7.0, 0.0]


def test_parameters_without_influence_have_no_gradient(modules: list[nn.Module]) -> None:
    flat = FlatParameters(modules)
    flat.differentiate(loss_of(modules))
    assert flat.grad.all()
    flat.differentiate(loss_of(modules[:1]))
    assert flat.groups[0].grad.any()
    assert not flat.groups[1].grad.any()
