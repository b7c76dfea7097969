"""The natural gradient's solvers on a device: what they find is what they find on the CPU, and nothing is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sim_device as sim
import torch
from torch import Tensor, nn

from agents.natural import masked
from agents.natural.critic_fits import GaussNewton
from agents.natural.curvature import checked, conjugate_gradient
from agents.natural.solution import Solution
from agents.natural.step import Line, match_kl, step_size
from agents.policy.networks import parameter_vector

P = 12


def matrix(spectrum: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(P, P, generator=generator))
    return (basis * spectrum) @ basis.T


GOOD, BENT = torch.linspace(0.1, 4.0, P), torch.linspace(-1.0, 4.0, P)
ONES = torch.linspace(1.0, 2.0, P)
SYSTEMS: dict[str, tuple[Tensor, Tensor, int, float]] = {
    "to the end": (matrix(GOOD), ONES, 4, 1e-9),
    "converged on the way": (matrix(GOOD), ONES, 20, 1e-2),
    "one iteration": (matrix(GOOD), ONES, 1, 1e-9),
    "indefinite": (matrix(BENT), ONES, 20, 1e-9),
    "no right-hand side": (matrix(GOOD), torch.zeros(P), 5, 1e-3),
    "not a number": (matrix(GOOD), torch.full((P,), math.nan), 5, 1e-3),
    "infinite on the way": (matrix(GOOD) * 3e38, ONES, 5, 1e-3),
}
"""A, b, iterations and tolerance."""


def same(found: Solution, expected: Solution, device: str) -> None:
    """Compare, the bits too where the device computes as the CPU does."""
    exact = {"rtol": 0, "atol": 0} if device == sim.NAME else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(sim.to_host(found.direction).cpu(), expected.direction, **exact)
    assert (found.status, found.iterations) == (expected.status, expected.iterations)
    assert found.residual == pytest.approx(expected.residual, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("guessed", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_conjugate_gradients_are_those_of_the_cpu(name: str, guessed: bool, device: str) -> None:
    A, b, iterations, tolerance = SYSTEMS[name]
    there, guess = A.to(device), 0.1 * torch.ones(P) if guessed else None
    given = {"max_iterations": iterations, "tolerance": tolerance}
    expected = conjugate_gradient(lambda v: A @ v, b, x0=guess, **given)
    right, first = b.to(device), None if guess is None else guess.to(device)
    with sim.record() as log:
        found = conjugate_gradient(lambda v: there @ v, right, x0=first, **given)
    assert log.waits == 0, log.table()
    same(found, expected, device)


@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_direct_solution_is_checked_as_on_the_cpu(name: str, definite: bool, device: str) -> None:
    A, b, _, tolerance = SYSTEMS[name]
    there, x, told = A.to(device), b / 3, torch.tensor(definite)
    expected = checked(x, lambda v: A @ v, b, tolerance, definite=told)
    given = [value.to(device) for value in (x, b, told)]
    with sim.record() as log:
        found = checked(given[0], lambda v: there @ v, given[1], tolerance, definite=given[2])
    assert log.waits == 0, log.table()
    same(found, expected, device)


class Bent(nn.Module):
    """A critic whose outputs are bent so much in its parameter that a whole step raises the loss."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
        for parameter in self.network.parameters():
            nn.init.constant_(parameter, start)

    def normalized(self, s: Tensor) -> Tensor:
        return self.network(s)[:, 0]


@pytest.mark.parametrize(("steps", "damping", "share"), [(3, 1.0, 1.0), (1, 1e-3, 0.5)])
def test_a_critics_steps_are_the_longest_that_raise_no_loss(
    steps: int, damping: float, share: float, device: str
) -> None:
    s, z = torch.linspace(-1.0, 1.0, 16)[:, None], torch.linspace(-2.0, 2.0, 16)
    here, there, given = Bent(0.6), Bent(0.6).to(device), (s.to(device), z.to(device))
    fit = GaussNewton(steps=steps, cg_iterations=2, damping=damping)
    expected = fit.fit(here, s, z)  # type: ignore[arg-type]
    assert expected.step == share
    with sim.record() as log:
        found = fit.fit(there, *given)  # type: ignore[arg-type]
    assert log.waits == 0, log.table()
    learned = sim.to_host(parameter_vector(there.network)).cpu()
    torch.testing.assert_close(learned, parameter_vector(here.network), rtol=1e-6, atol=0)
    assert (found.iterations, found.step, found.status) == (expected.iterations, expected.step, expected.status)


def test_a_critics_step_that_would_be_halved_often_is_given_up(device: str) -> None:
    s, z = torch.linspace(-1.0, 1.0, 16)[:, None], torch.linspace(-2.0, 2.0, 16)
    here, there, fit = Bent(0.6), Bent(0.6).to(device), GaussNewton(cg_iterations=2, damping=1e-4)
    assert fit.fit(here, s, z).step == 0.125  # type: ignore[arg-type]
    assert fit.fit(there, s.to(device), z.to(device)).step == 0.0  # type: ignore[arg-type]
    assert torch.equal(sim.to_host(parameter_vector(there.network)).cpu(), parameter_vector(Bent(0.6).network))


class Gaussians:
    """Distributions of unit variance at a mean, as far as a `Line` asks."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def kl(self, other: Gaussians) -> Tensor:
        return 0.5 * (self.mean - other.mean).square()


class Cubic(nn.Module):
    """An actor whose means are a cubic of its parameter."""

    log_std = None

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1))

    def forward(self, s: Tensor) -> Gaussians:
        return Gaussians(s * (self.theta + 4 * self.theta**3))


@pytest.mark.parametrize("target", [1e-4, 1e-3, 0.3])
def test_the_step_of_a_kl_is_that_of_the_cpu(target: float, device: str) -> None:
    s, w, taken = torch.linspace(0.5, 1.5, 8), torch.ones(1), {}
    look: dict[str, Callable[[Line, Tensor], Any]] = {
        "cpu": lambda line, quadratic: match_kl(line.kl, step_size(quadratic, target), target)[0],
        device: lambda line, quadratic: line.match(quadratic, target),
    }
    for place, ask in look.items():
        actor, states = Cubic().to(place), s.to(place)
        with torch.no_grad():
            line = Line(actor, w.to(place), actor(states), states)  # type: ignore[arg-type]
            quadratic = states.square().mean()
            with sim.record() as log:
                beta = ask(line, quadratic)
            assert place != sim.NAME or log.waits == 0, log.table()
            kl = line.old.kl(line.new).mean().item()
        taken[place] = float(beta), kl, sim.to_host(actor.theta.detach()).item()
    if target < 0.1:
        assert taken[device] == pytest.approx(taken["cpu"], rel=1e-6)
    else:  # where the CPU tries more
        assert 0.5 < taken[device][1] / target < 2


KLS: dict[str, Callable[[Tensor], Tensor]] = {
    "as foretold": lambda beta: beta.square() / 2,
    "far too long": lambda beta: 200 * beta**4,
    "far too short": lambda beta: 0.02 * beta.square(),
    "rounding": lambda beta: torch.where(beta > 0.5, beta.square(), -1e-9),
    "infinite at first": lambda beta: torch.where(beta > 0.15, torch.inf, beta.square()),
    "none": lambda beta: torch.full_like(beta, torch.nan),
    "out of reach": lambda beta: torch.full_like(beta, 1.0),
}


@pytest.mark.parametrize("name", KLS)
def test_a_step_has_the_kl_whatever_kl_there_is(name: str, device: str) -> None:
    target, tried = 0.02, []
    quadratic = torch.tensor(1.0, device=device)
    with sim.record() as log:
        beta = masked.match_kl(lambda beta: tried.append(beta) or KLS[name](beta), quadratic, target)  # type: ignore[func-returns-value]
    assert log.waits == 0, log.table()
    assert len(tried) == masked.TRIES
    kl_at = lambda beta: KLS[name](torch.tensor(beta, dtype=torch.float64)).item()  # noqa: E731
    expected, kl = match_kl(kl_at, step_size(1.0, target), target)
    if expected == 0 or abs(kl / target - 1) > 0.05:
        assert beta.item() == 0
    else:
        assert kl_at(beta.item()) == pytest.approx(target, rel=1.0)
        if len({x.item() for x in tried}) < masked.TRIES:  # it has converged by then
            assert beta.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("quadratic", [0.0, -1.0, torch.nan, torch.inf])
def test_without_a_length_no_step_is_taken(quadratic: float, device: str) -> None:
    s = torch.linspace(0.5, 1.5, 8, device=device)
    actor = Cubic().to(device)
    with torch.no_grad():
        line = Line(actor, torch.ones(1, device=device), actor(s), s)  # type: ignore[arg-type]
        beta = line.match(torch.tensor(quadratic, device=device), 0.01)
    assert beta.item() == 0
    assert sim.to_host(actor.theta.detach()).item() == 0
