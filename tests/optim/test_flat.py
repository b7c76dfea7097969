"""Parameters as one vector: the modules follow it, and their gradients are its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from agents.optim.adabound import AdaBound
from agents.optim.clipup import ClipUp
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


# Ties that came undone ------------------------------------------------------------------------------------------------


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def step(modules: list[nn.Module], flat: FlatParameters, optimizer: torch.optim.Optimizer) -> None:
    flat.differentiate(loss_of(modules))
    optimizer.step()


def values(modules: list[nn.Module]) -> torch.Tensor:
    return torch.cat([nn.utils.parameters_to_vector(module.parameters()) for module in modules]).detach()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, AdaBound, ClipUp])
def test_a_copy_goes_on_as_the_original(modules: list[nn.Module], make: type, copied: Callable[[Any], Any]) -> None:
    flat = FlatParameters(modules)
    optimizer = make(flat.groups, lr=0.1)
    for _ in range(2):
        step(modules, flat, optimizer)
    before = values(modules)
    others, other_flat, other_optimizer = copied((modules, flat, optimizer))
    for _ in range(3):
        step(others, other_flat, other_optimizer)
    assert torch.equal(values(modules), before)
    for _ in range(3):
        step(modules, flat, optimizer)
    assert torch.equal(values(modules), values(others))
    assert not torch.equal(values(modules), before)


def test_what_is_loaded_into_a_copy_is_what_it_goes_on_from(modules: list[nn.Module]) -> None:
    others, flat = copy.deepcopy((modules, FlatParameters(modules)))
    others[1].load_state_dict({"weight": torch.full((1, 3), 7.0), "bias": torch.zeros(1)})
    assert flat.groups[1].tolist() == [7.0, 7.0, 7.0, 0.0]


def test_a_conversion_and_back_is_taken_up_by_the_next_step(modules: list[nn.Module]) -> None:
    plain = copy.deepcopy(modules)
    flats = [FlatParameters(each) for each in (modules, plain)]
    optimizers = [torch.optim.Adam(flat.groups, lr=0.1) for flat in flats]
    for i in range(3):
        for each, flat, optimizer in zip((modules, plain), flats, optimizers, strict=True):
            step(each, flat, optimizer)
        if i == 1:
            modules[0].double().float()
    assert torch.equal(values(modules), values(plain))


def test_another_dtype_is_refused_in_words(modules: list[nn.Module]) -> None:
    flat = FlatParameters(modules)
    for module in modules:
        module.double()
    loss = sum((module(torch.ones(1, 3).double()).square().sum() for module in modules), torch.zeros(()))
    with pytest.raises(RuntimeError, match=r"are torch.float64 on cpu now, .* torch.float32 on cpu; bring them back"):
        flat.differentiate(loss)
