"""What crosses between the host and a device, how often the host waits for it, and what is asked for there."""

from __future__ import annotations

import pytest
import sim_device as sim
import torch
from torch import nn

from agents import NPG
from agents.devices import Instant, fetched, resolved, sent
from agents.natural.kronecker import Eigenbasis
from agents.optim.flat import FlatParameters


def test_tensors_of_all_kinds_come_in_one_copy(device: str) -> None:
    given = {
        "flag": torch.tensor([True, False, True]),
        "number": torch.tensor(0.1),
        "wide": torch.arange(6, dtype=torch.float64).view(2, 3).T,
        "none": torch.zeros(0, 4),
        "places": torch.arange(5),
    }
    there = {name: value.to(device) for name, value in given.items()}
    with sim.record() as log:
        found = fetched(there)
    assert log.waits == (1 if device == sim.NAME else 0), log.table()
    assert list(found) == list(given)
    for name, value in given.items():
        assert found[name].device.type == "cpu"
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_what_is_sent_does_not_make_the_host_wait(device: str) -> None:
    with sim.record() as log:
        there = sent(torch.ones(3), device)
    assert log.waits == 0
    assert resolved(there.device) == resolved(device)
    assert sent(there, device) is there


def test_two_instants_of_a_device_are_seconds_apart(device: str) -> None:
    with sim.record() as log:
        first, last = Instant(torch.device(device)), Instant(torch.device(device))
    assert log.waits == 0
    last.event.synchronize()
    assert 0 <= last - first < 10


def test_the_seconds_of_a_device_are_those_of_the_iteration_before(device: str) -> None:
    agent = NPG("MlpPolicy", "InvertedPendulum-v5", num_envs=2, n_steps=4, net_arch=(4,), seed=0, device=device)
    told = [{name for name in agent.last_metrics if name.endswith("_seconds")} for _ in agent.iterations(16)]
    assert told == [set(), {"time/collect_seconds", "time/train_seconds"}]


def test_a_gradient_that_is_not_finite_becomes_zero_and_its_norm_tells(device: str) -> None:
    layer = nn.Linear(3, 1).to(device)
    flat = FlatParameters([layer])
    flat.differentiate(layer(torch.full((1, 3), torch.inf, device=device)).sum())
    with sim.record() as log:
        norm = flat.clip(0.5)
    assert log.waits == 0, log.table()
    assert not bool(norm.isfinite())
    assert not bool(flat.grad.any())
    flat.differentiate(layer(torch.ones(1, 3, device=device)).sum())
    assert flat.clip(0.5).item() == pytest.approx(2.0)
    assert flat.grad.norm().item() == pytest.approx(0.5)


def test_a_devices_eigenvectors_are_the_hosts_for_one_wait(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    roots = [torch.randn(n, n, generator=generator) for n in (5, 3, 8, 1)]
    A, G, B, H = (root @ root.T for root in roots)
    factors = [(A, G), (B, torch.full((2, 2), torch.nan)), (torch.zeros(4, 4), H)]
    there = [(x.to(device), y.to(device)) for x, y in factors]
    with sim.record() as log:
        found = Eigenbasis.of(there)
    assert log.waits == (device == sim.NAME), log.table()
    for basis, expected in zip(found, Eigenbasis.of(factors), strict=True):
        for x, y in zip(basis, expected, strict=True):
            assert resolved(x.device) == resolved(device)
            assert torch.equal(torch.nan_to_num(sim.to_host(x).cpu()), torch.nan_to_num(y))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="device is 'cuda', but PyTorch sees no such device here; give 'cpu' or 'au"):
        NPG("MlpPolicy", "Hopper-v5", num_envs=2, device="cuda")
