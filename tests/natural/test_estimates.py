"""Each estimate of the Fisher matrix against its definition, from per-sample scores of torch.func in float64."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from directions import natural_gradient
from gymnasium import spaces
from torch import Tensor

from agents.natural import CURVATURES, kronecker
from agents.natural.adaptive import AdaptiveInverse, damping_rows
from agents.natural.curvature import choose_solver
from agents.natural.kronecker import (
    PRECONDITIONERS,
    Diagonal,
    Eigenbasis,
    EigenKronecker,
    EigenKroneckerCurvature,
    Kronecker,
    RunningFactors,
    effective_dimension,
)
from agents.natural.scores import DenseScores, FactoredScores, capture, dense_scores, scores
from agents.policy.distributions import Head
from agents.policy.networks import Actor, mlp

SPACES = {
    "gaussian": spaces.Box(-1, 1, (2,)),
    "categorical": spaces.MultiDiscrete([2, 3]),
    "bernoulli": spaces.MultiBinary(2),
}
N = 40
DAMPING = 0.1


def new_actor(head: Head, hidden: tuple[int, ...]) -> Actor:
    return Actor(head, mlp(4, hidden, head.outputs, "tanh", 0.01), log_std_init=-0.4)


class Case:
    """A small policy, n samples of it, and their scores both ways."""

    def __init__(
        self, kind: str, n: int = N, scale: tuple[float, ...] = (1.0,) * 4, hidden: tuple[int, ...] = (6,)
    ) -> None:
        torch.manual_seed(0)
        self.actor = new_actor(Head.of(SPACES[kind]), hidden)
        torch.nn.init.normal_(self.actor.net[-1].weight)
        self.actor.double()
        self.s = torch.randn(n, 4).double() * torch.tensor(scale)
        with torch.no_grad():
            policy = self.actor(self.s)
            noise = (torch.randn if kind == "gaussian" else torch.rand)(n, *self.actor.head.noise_shape)
            self.a = policy.sample(noise.double())
        self.A = torch.randn(n).double()
        self.scores, _ = scores(self.actor, self.s, self.a)
        self.psi = self.per_sample(self.s, self.a)

    def per_sample(self, s: Tensor, a: Tensor) -> Tensor:
        return dense_scores(self.actor, lambda actor, s, a: actor(s).log_prob(a), s, a).matrix

    def roots(self) -> FactoredScores:
        return capture(self.actor, lambda: self.actor(self.s).fisher_roots())

    def actions(self) -> list[tuple[Tensor, Tensor]]:
        """Actions [n, *A] and their weights [n], which integrate a score's outer product exactly."""
        with torch.no_grad():
            policy = self.actor(self.s)
        if self.actor.head.kind == "gaussian":
            # Scores are polynomials of degree 2 in the noise; three Gauss-Hermite points are exact up to degree 5.
            points = {0.0: 2 / 3, math.sqrt(3): 1 / 6, -math.sqrt(3): 1 / 6}
            return [
                (
                    policy.mean + policy.log_std.exp() * torch.tensor(noise).double(),
                    torch.full((N,), points[noise[0]] * points[noise[1]]).double(),
                )
                for noise in itertools.product(points, repeat=2)
            ]
        choices = self.actor.head.choices or (2, 2)
        every = [torch.tensor(a).expand(N, 2) for a in itertools.product(*map(range, choices))]
        return [(a, policy.log_prob(a).exp()) for a in every]

    def definition(self, estimate: str) -> Tensor:
        """The undamped estimate as a matrix [p, p]."""
        if estimate == "compatible":
            return self.psi.T @ self.psi / N
        if estimate == "empirical":
            loss = self.psi * self.A[:, None]
            return loss.T @ loss / N
        if estimate == "analytic":
            parts = [(self.per_sample(self.s, a), weight) for a, weight in self.actions()]
            return sum(psi.T @ (psi * weight[:, None]) for psi, weight in parts) / N
        if estimate == "diagonal":
            return torch.diag(self.psi.square().mean(0))
        total = torch.zeros(self.psi.shape[1], self.psi.shape[1]).double()
        for flat, inputs in self.layers():
            gradients = self.psi[:, flat]  # [n, out, m]
            outer = self.kronecker(gradients, inputs, corrected=estimate == "ekfac")
            total[flat.flatten()[:, None], flat.flatten()] = outer
        return total

    def kronecker(self, gradients: Tensor, inputs: Tensor, corrected: bool) -> Tensor:
        # A sample's gradient is δ hᵀ, so δ = gradient h / |h|².
        deltas = (gradients @ inputs[:, :, None]).squeeze(-1) / inputs.square().sum(1, keepdim=True)
        A, G = inputs.T @ inputs / N, deltas.T @ deltas / N
        product = torch.kron(G, A)
        if not corrected:
            return product
        basis = torch.kron(torch.linalg.eigh(G).eigenvectors, torch.linalg.eigh(A).eigenvectors)
        along = (gradients.flatten(1) @ basis).square().mean(0)
        return basis @ torch.diag(along) @ basis.T

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Flat places [out, m] and inputs [n, m] of every layer, biases last."""
        place: dict[torch.nn.Parameter, Tensor] = {}
        p = 0
        for parameter in self.actor.parameters():
            place[parameter] = torch.arange(p, p + parameter.numel()).view(parameter.shape)
            p += parameter.numel()
        ones = torch.ones(N, 1).double()
        found = []
        h = self.s
        for layer in self.actor.net:
            if isinstance(layer, torch.nn.Linear):
                flat = torch.cat((place[layer.weight], place[layer.bias][:, None]), 1)
                found.append((flat, torch.cat((h, ones), 1).detach()))
            h = layer(h)
        if self.actor.log_std is not None:
            found.append((place[self.actor.log_std.bias][:, None], ones))
        return found


@pytest.fixture(params=SPACES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("estimate", ["compatible", "analytic", "empirical", "diagonal", "kfac", "ekfac"])
def test_every_estimate_gives_its_definitions_direction(case: Case, estimate: str) -> None:
    F = case.definition(estimate)
    of_damping = case.definition("compatible") if estimate in ("diagonal", "kfac", "ekfac") else F
    shift = DAMPING * of_damping.trace() / len(F)
    g = case.psi.T @ case.A / N
    w = torch.linalg.solve(F + shift * torch.eye(len(F)).double(), g)
    for solver in ("cholesky", "gram", "cg") if estimate in ("compatible", "analytic", "empirical") else ("auto",):
        found = natural_gradient(
            case.scores,
            case.A,
            damping=DAMPING,
            cg_iterations=500,
            cg_tolerance=1e-11,
            solver=solver,
            estimate=estimate,
        )
        torch.testing.assert_close(found.direction, w, rtol=1e-7, atol=1e-9)
        assert found.solution.converged
        assert found.solution.residual < 1e-9
        torch.testing.assert_close(found.gradient, g)
        torch.testing.assert_close(found.quadratic, (case.psi @ w).square().mean(), rtol=1e-6, atol=0)


def test_analytic_products_are_those_of_the_stacked_rows(case: Case) -> None:
    roots = case.roots()
    matrix = torch.stack([roots.rmatvec(row) for row in torch.eye(len(roots.dense())).double()])
    torch.testing.assert_close(roots.dense(), matrix)
    v, u = torch.randn(roots.p).double(), torch.randn(len(matrix)).double()
    torch.testing.assert_close(roots.matvec(v), matrix @ v)
    torch.testing.assert_close(roots.fisher_matvec(v), matrix.T @ (matrix @ v) / N)
    torch.testing.assert_close(roots.gradient(u), matrix.T @ u / N)
    torch.testing.assert_close(roots.gram(), matrix @ matrix.T)
    torch.testing.assert_close(roots.diagonal(), matrix.square().sum(0) / N)
    torch.testing.assert_close(roots.trace(), matrix.square().sum() / N)
    torch.testing.assert_close(roots.fisher(), matrix.T @ matrix / N)
    some = torch.tensor([5, 0, 33])
    expected = matrix.view(-1, N, roots.p)[:, some].flatten(0, 1)
    torch.testing.assert_close(roots.of(some).dense(), expected)


def test_the_mean_of_many_sampled_estimates_is_the_analytic_one() -> None:
    case = Case("gaussian", n=N)
    with torch.no_grad():
        policy = case.actor(case.s)
    total = torch.zeros(case.scores.p, case.scores.p).double()
    for seed in range(300):
        noise = torch.randn(N, 2, generator=torch.Generator().manual_seed(seed)).double()
        a = policy.sample(noise)
        total += capture(case.actor, lambda a=a: case.actor(case.s).log_prob(a)).fisher() / 300
    exact = case.definition("analytic")
    assert (total - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioners_change_the_way_and_not_the_goal(name: str) -> None:
    case = Case("gaussian")
    settings = {"damping": 1e-2, "cg_iterations": 400, "cg_tolerance": 1e-10}
    plain = natural_gradient(case.scores, case.A, **settings)
    found = natural_gradient(case.scores, case.A, **settings, cg_preconditioner=name)
    torch.testing.assert_close(found.direction, plain.direction, rtol=1e-6, atol=1e-8)
    assert found.solution.converged


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_kronecker_preconditioners_need_fewer_products(name: str) -> None:
    # Of a linear policy the noise does not depend on the inputs, and K-FAC is exact but for sampling.
    case = Case("gaussian", n=2000, scale=(0.1, 1.0, 3.0, 10.0), hidden=())
    settings = {"damping": 1e-4, "cg_iterations": 400, "cg_tolerance": 0.01}
    plain = natural_gradient(case.scores, case.A, **settings)
    found = natural_gradient(case.scores, case.A, **settings, cg_preconditioner=name)
    assert found.solution.converged
    assert found.solution.iterations <= 0.5 * plain.solution.iterations


def test_the_gram_preconditioner_of_all_samples_leaves_one_step_to_do() -> None:
    case = Case("gaussian")
    settings = {"damping": 1e-2, "cg_iterations": 400, "cg_tolerance": 1e-6, "cg_preconditioner": "gram"}
    found = natural_gradient(case.scores, case.A, **settings)
    assert found.solution.converged
    assert found.solution.iterations == 1


def test_the_gram_preconditioner_of_some_samples_needs_fewer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gaussian", n=2000, scale=(0.1, 1.0, 3.0, 10.0))
    settings = {"damping": 1e-3, "cg_iterations": 1000, "cg_tolerance": 0.01}
    plain = natural_gradient(case.scores, case.A, **settings)
    iterations = []
    for samples in (100, 500, 1000):
        monkeypatch.setitem(kronecker.PRECONDITIONER_SAMPLES, "gram", samples)
        found = natural_gradient(case.scores, case.A, **settings, cg_preconditioner="gram")
        assert found.solution.converged
        iterations.append(found.solution.iterations)
    assert plain.solution.iterations > 1.5 * iterations[0]
    assert iterations[0] > iterations[1] >= iterations[2]


@pytest.mark.parametrize("form", [Diagonal, Kronecker, EigenKronecker])
def test_closed_forms_invert_themselves(form: Any) -> None:
    case = Case("gaussian")
    inverse = form(case.scores, 1e-3)
    v = torch.randn(case.scores.p).double()
    torch.testing.assert_close(inverse.matvec(inverse.solve(v)), v)
    assert v @ inverse.solve(v) > 0


def test_numbers_that_are_not_finite_reach_the_status_and_not_the_direction() -> None:
    case = Case("gaussian")
    case.A[3] = math.inf
    for estimate, solver in (("kfac", "auto"), ("diagonal", "auto"), ("compatible", "cholesky"), ("compatible", "cg")):
        found = natural_gradient(
            case.scores, case.A, damping=0.1, cg_iterations=5, cg_tolerance=0.0, estimate=estimate, solver=solver
        )
        assert found.solution.status == "non_finite"
        assert found.direction.isfinite().all()
    broken = case.scores.weighted(torch.full((N,), math.nan).double())
    for choice in ({"estimate": "kfac"}, {"cg_preconditioner": "gram"}):
        found = natural_gradient(
            broken, torch.ones(N).double(), damping=0.1, cg_iterations=5, cg_tolerance=0.0, **choice
        )
        assert found.solution.status == "non_finite"


def test_the_running_inverse_is_the_inverse_of_the_running_matrix() -> None:
    case = Case("gaussian")
    p = case.scores.p
    G = 0.5 * torch.eye(p).double()
    exact = AdaptiveInverse(torch.linalg.inv(G))
    for step in range(12):
        rows = case.psi[3 * step : 3 * step + 3] / math.sqrt(3)
        assert exact.update(rows, 0.2)
        G = 0.8 * G + 0.2 * rows.T @ rows
        torch.testing.assert_close(exact.inverse, torch.linalg.inv(G))


def test_the_first_order_form_agrees_to_second_order_and_refuses_to_go_indefinite() -> None:
    case = Case("gaussian")
    start = 2.0 * torch.eye(case.scores.p).double()
    rows = case.psi[:4] / 2
    errors = []
    for rate in (1e-3, 5e-4):
        exact, first = AdaptiveInverse(start.clone()), AdaptiveInverse(start.clone(), first_order=True)
        assert exact.update(rows, rate)
        assert first.update(rows, rate)
        errors.append((exact.inverse - first.inverse).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    largest = 2.0 * torch.linalg.eigvalsh(rows @ rows.T)[-1].item()
    edge = 1 / (largest - 1)  # ε λ = 1 + ε
    below, above = AdaptiveInverse(start.clone(), first_order=True), AdaptiveInverse(start.clone(), first_order=True)
    assert below.update(rows, 0.99 * edge)
    assert torch.linalg.eigvalsh(below.inverse)[0] > 0
    assert not above.update(rows, 1.01 * edge)
    assert torch.equal(above.inverse, start)
    assert AdaptiveInverse(start.clone()).update(rows, 1.01 * edge)
    assert not above.update(rows * math.nan, 0.01)
    assert torch.equal(above.inverse, start)


def test_the_running_inverse_stays_definite_for_long() -> None:
    case = Case("gaussian")
    p = case.scores.p
    running = AdaptiveInverse(torch.eye(p).double())
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        picked = torch.randint(N, (8,), generator=generator)
        places = torch.randint(p, (8,), generator=generator)
        rows = torch.cat((case.psi[picked] / math.sqrt(8), damping_rows(p, 0.01, places).double()))
        assert running.update(rows, 0.1)
    values = torch.linalg.eigvalsh(running.inverse)
    assert values[0] > 0
    # Its largest is near 1 / λ: the damping keeps what no sample speaks of from growing without bound.
    assert 10 < values[-1] < 2000


def test_damping_rows_add_up_to_the_damping() -> None:
    rows = damping_rows(6, 0.3, torch.arange(6))
    torch.testing.assert_close(rows.T @ rows, 0.3 * torch.eye(6))
    rows = damping_rows(6, 0.3, torch.tensor([1, 4]))
    assert (rows.T @ rows).trace() == pytest.approx(6 * 0.3)


def test_the_adaptive_direction_is_the_running_inverse_times_the_gradient() -> None:
    case = Case("gaussian")
    curvature: Any = CURVATURES["adaptive"](SimpleNamespace(cg_damping=0.1))
    curvature.load({"inverse": torch.diag(torch.linspace(1, 2, case.scores.p).double())})
    first = curvature.direction(case.scores, case.A)
    torch.testing.assert_close(first.direction, curvature.running.inverse @ first.gradient)
    assert math.isnan(first.solution.residual)  # none was measured
    other: Any = CURVATURES["adaptive"](SimpleNamespace(cg_damping=0.1))
    other.load(curvature.tensors())
    second = [one.direction(case.scores, case.A).direction for one in (curvature, other)]
    assert torch.equal(*second)
    assert not torch.equal(second[0], first.direction)


def test_a_first_guess_is_scaled_to_help() -> None:
    case = Case("gaussian")
    settings = {"damping": 0.1, "cg_iterations": 3, "cg_tolerance": 0.0}
    exact = natural_gradient(case.scores, case.A, **(settings | {"cg_iterations": 300, "cg_tolerance": 1e-12}))
    for factor in (1.0, -7.0):
        found = natural_gradient(case.scores, case.A, **settings, x0=factor * exact.direction)
        torch.testing.assert_close(found.direction, exact.direction, rtol=1e-6, atol=1e-9)
    zero = natural_gradient(case.scores, case.A, **settings, x0=torch.zeros_like(exact.direction))
    cold = natural_gradient(case.scores, case.A, **settings)
    torch.testing.assert_close(zero.direction, cold.direction)


def test_dense_scores_take_every_solver() -> None:
    case = Case("gaussian")
    dense = DenseScores(case.scores.values, case.psi)
    expected = natural_gradient(dense, case.A, damping=0.1, cg_iterations=300, cg_tolerance=1e-12)
    for solver in ("cholesky", "gram", "auto"):
        found = natural_gradient(dense, case.A, damping=0.1, cg_iterations=300, cg_tolerance=1e-12, solver=solver)
        torch.testing.assert_close(found.direction, expected.direction, rtol=1e-7, atol=1e-9)
    assert choose_solver(dense.n, dense.p) == "cholesky"


def test_unknown_solvers_are_refused() -> None:
    case = Case("gaussian")
    settings = {"damping": 0.1, "cg_iterations": 3, "cg_tolerance": 0.0}
    with pytest.raises(ValueError, match="no solver 'lu'"):
        natural_gradient(case.scores, case.A, **settings, solver="lu")


@pytest.mark.parametrize("estimate", ["kfac", "ekfac"])
@pytest.mark.parametrize("renewal", [1, 2])
def test_remembered_factors_are_the_averages_of_the_definition(estimate: str, renewal: int) -> None:
    """The k-th of K updates of n samples each weighs exp(-(K - k) n / memory), divided by the sum of these."""
    case, memory, sizes = Case("gaussian"), 25.0, (8, 12, 20)
    options = {"cg_damping": DAMPING, "curvature_memory": memory, "curvature_renewal": renewal}
    curvature: Any = CURVATURES[estimate](SimpleNamespace(**options))
    batches = torch.arange(N).split(sizes)
    for rows in batches:
        found = curvature.direction(case.scores.of(rows), case.A[rows])
    # The first and the third update renew the eigenvectors.
    weights = torch.cat([torch.full((n,), math.exp(-sum(sizes[k + 1 :]) / memory)) for k, n in enumerate(sizes)])
    weights = weights.double() / weights.double().sum()
    last, shift = batches[-1], DAMPING * case.psi[batches[-1]].square().sum() / sizes[-1] / case.scores.p
    F = torch.zeros(case.scores.p, case.scores.p).double()
    for flat, inputs in case.layers():
        gradients = case.psi[:, flat]
        deltas = (gradients @ inputs[:, :, None]).squeeze(-1) / inputs.square().sum(1, keepdim=True)
        A, G = (x.T @ (x * weights[:, None]) for x in (inputs, deltas))
        outer = torch.kron(G, A)
        if estimate == "ekfac":
            basis = torch.kron(torch.linalg.eigh(G).eigenvectors, torch.linalg.eigh(A).eigenvectors)
            outer = basis @ torch.diag((gradients[last].flatten(1) @ basis).square().mean(0)) @ basis.T
        F[flat.flatten()[:, None], flat.flatten()] = outer
    g = case.psi[last].T @ case.A[last] / sizes[-1]
    w = torch.linalg.solve(F + shift * torch.eye(len(F)).double(), g)
    torch.testing.assert_close(found.direction, w, rtol=1e-7, atol=1e-9)


def test_eigenvectors_are_renewed_every_few_updates() -> None:
    case, bases = Case("gaussian"), []
    running = RunningFactors(25.0, renewal=2)
    for rows in torch.arange(N).split(8):
        assert running.take_in(case.scores.of(rows))
        bases.append(running.bases)
    assert [a is b for a, b in itertools.pairwise(bases)] == [True, False, True, False]


def test_eigenvectors_of_the_update_before_serve_as_well() -> None:
    """What a device takes: second moments are of the update's own samples, along eigenvectors of the factors before."""
    case, generator = Case("gaussian", n=400), torch.Generator().manual_seed(0)
    options = SimpleNamespace(cg_damping=DAMPING, curvature_memory=400.0, curvature_renewal=1)
    own, late = (EigenKroneckerCurvature(options) for _ in range(2))
    late.late = True
    assert late.running is not None
    for update in range(6):
        factors = [(A.clone(), G.clone()) for A, G in late.running.factors]
        with torch.no_grad():
            for x in case.actor.parameters():
                x += 0.03 * torch.randn(x.shape, generator=generator).double()
        Psi, _ = scores(case.actor, torch.randn(400, 4, generator=generator).double(), case.a)
        A = Psi.matvec(torch.ones(Psi.p).double()) + case.A
        heard = {name: x.clone() for name, x in late.asks().items()} if update % 2 else {}
        if heard:
            late.running.factors[0][0].fill_(torch.nan)  # it goes by what it has heard
        late.prepare(heard)
        for kept, given in zip(late.running.factors, factors, strict=True):
            kept[0].copy_(given[0])
        w, w_late = (curvature.direction(Psi, A) for curvature in (own, late))
        assert torch.equal(w.direction, w_late.direction) == (update == 0)
        if update > 0:
            for basis, expected in zip(late.running.bases, Eigenbasis.of(factors), strict=True):
                assert all(torch.equal(x, y) for x, y in zip(basis, expected, strict=True))
        # To first order, a step of a given KL gains by either as much.
        gain, gain_late = (x.gradient @ x.direction / x.quadratic.sqrt() for x in (w, w_late))
        torch.testing.assert_close(gain_late, gain, rtol=0.02, atol=0)


@pytest.mark.parametrize("estimate", ["kfac", "ekfac"])
def test_the_shortest_memory_is_none(estimate: str) -> None:
    case = Case("gaussian")
    options = {"cg_damping": DAMPING, "curvature_renewal": 1}
    none, short = (CURVATURES[estimate](SimpleNamespace(**options, curvature_memory=memory)) for memory in (0.0, 1e-3))
    for rows in torch.arange(N).split(10):
        Psi, A = case.scores.of(rows), case.A[rows]
        assert torch.equal(none.direction(Psi, A).direction, short.direction(Psi, A).direction)


def test_factors_that_are_not_finite_are_not_remembered() -> None:
    case = Case("gaussian")
    options = {"cg_damping": DAMPING, "curvature_memory": 25.0, "curvature_renewal": 1}
    curvature: Any = CURVATURES["kfac"](SimpleNamespace(**options))
    curvature.direction(case.scores, case.A)
    before = {name: x.clone() for name, x in curvature.tensors().items()}
    found = curvature.direction(case.scores.weighted(torch.full((N,), math.inf).double()), case.A)
    assert found.solution.status == "non_finite"
    assert not found.direction.any()
    assert all(torch.equal(x, before[name]) for name, x in curvature.tensors().items())


def fails_on(monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> None:
    """Have eigendecompositions of these dtypes not converge."""
    eigh = torch.linalg.eigh

    def decompose(matrix: Tensor) -> Any:
        if matrix.dtype in dtypes:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", decompose)


@pytest.mark.parametrize("form", [Kronecker, EigenKronecker])
def test_eigenvectors_that_float32_does_not_find_float64_does(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gaussian")
    Psi, _ = scores(case.actor.float(), case.s.float(), case.a.float())
    b = torch.randn(Psi.p)
    expected = form(Psi, 0.1).solve(b)
    fails_on(monkeypatch, torch.float32)
    torch.testing.assert_close(form(Psi, 0.1).solve(b), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimate", ["kfac", "ekfac"])
def test_where_neither_does_the_direction_is_rejected(estimate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gaussian")
    fails_on(monkeypatch, torch.float32, torch.float64)
    step = natural_gradient(case.scores, case.A, estimate=estimate, damping=DAMPING)
    assert step.solution.status == "non_finite"
    assert not step.direction.any()
    assert effective_dimension(case.scores, DAMPING).isnan()
