"""Conjugate gradients, the natural gradient's identities, and what theory says of it."""

import math

import pytest
import torch
from directions import natural_gradient
from torch import nn

from agents.natural import curvature
from agents.natural.curvature import conjugate_gradient
from agents.natural.scores import DenseScores, capture
from agents.natural.step import step_size
from agents.policy.networks import Constant, assign_parameters, parameter_vector


def spd(p, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(p, p, generator=generator, dtype=torch.float64)
    return root @ root.T + 0.5 * torch.eye(p, dtype=torch.float64), torch.randn(p, generator=generator).double()


def solve(A, b, max_iterations=50, tolerance=1e-12, **kwargs):
    return conjugate_gradient(lambda v: A @ v, b, max_iterations=max_iterations, tolerance=tolerance, **kwargs)


def scores_of(n=60, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    log_std = Constant(2).double()
    module = nn.ModuleList([net, log_std])
    x, a = torch.randn(n, 4).double(), torch.randn(n, 2).double()

    def log_prob():
        scale = log_std(n)
        return (-0.5 * ((a - net(x)) * torch.exp(-scale)).square() - scale).sum(1)

    return capture(module, log_prob), torch.randn(n).double()


def matrix(scores):
    return torch.stack([scores.matvec(e) for e in torch.eye(scores.p, dtype=torch.float64)], dim=1)


def test_cg_solves_and_reports():
    A, b = spd(12)
    solution = solve(A, b)
    assert solution.status == "converged"
    assert solution.converged
    assert solution.residual <= 1e-12
    torch.testing.assert_close(solution.direction, torch.linalg.solve(A, b))


def test_cg_by_hand():
    # A = diag(1, 3), b = (1, 1): step r.r / r.Ar = 2 / 4, so x = (1/2, 1/2) and r = (1/2, -1/2): residual 1/2.
    # Then beta = (1/2) / 2 = 1/4, d = (3/4, -1/4), d.Ad = 9/16 + 3/16 = 3/4, step (1/2) / (3/4) = 2/3: x = (1, 1/3).
    A, b = torch.diag(torch.tensor([1.0, 3.0])), torch.ones(2)
    first = solve(A, b, 1)
    assert first.direction.tolist() == [0.5, 0.5]
    assert first.residual == pytest.approx(0.5)
    assert (first.iterations, first.status) == (1, "max_iterations")
    assert not first.converged
    second = solve(A, b, 2, 1e-6)
    torch.testing.assert_close(second.direction, torch.tensor([1.0, 1 / 3]))
    assert (second.iterations, second.status) == (2, "converged")


def test_cg_stops_at_the_tolerance():
    A, b = spd(30)
    loose, tight = solve(A, b, tolerance=1e-1), solve(A, b, tolerance=1e-8)
    assert loose.iterations < tight.iterations
    for solution, tolerance in ((loose, 1e-1), (tight, 1e-8)):
        assert (b - A @ solution.direction).norm() <= 1.01 * tolerance * b.norm()
        assert solution.residual == pytest.approx(((b - A @ solution.direction).norm() / b.norm()).item(), rel=1e-3)


def test_cg_counts_products():
    A, b = spd(12)
    calls = []
    solution = conjugate_gradient(lambda v: calls.append(1) or A @ v, b, max_iterations=5, tolerance=0.0)
    assert len(calls) == solution.iterations == 5


def test_cg_from_a_first_guess():
    A, b = spd(12)
    exact = torch.linalg.solve(A, b)
    guess = exact.clone()
    solution = solve(A, b, tolerance=1e-9, x0=guess)
    assert (solution.iterations, solution.status) == (0, "converged")
    near = solve(A, b, max_iterations=3, x0=exact + 1e-3)
    assert (near.direction - exact).norm() < (solve(A, b, max_iterations=3).direction - exact).norm()
    assert torch.equal(guess, exact)


def test_cg_without_a_right_hand_side():
    solution = solve(torch.eye(3), torch.zeros(3), x0=torch.ones(3))
    assert (solution.status, solution.iterations, solution.residual) == ("zero_rhs", 0, 0.0)
    assert solution.direction.tolist() == [0, 0, 0]
    assert solution.converged


@pytest.mark.parametrize("diagonal", [(1.0, -1.0), (-1.0, -2.0), (0.0, 0.0)])
def test_cg_meets_curvature_that_is_not_positive(diagonal):
    solution = solve(torch.diag(torch.tensor(diagonal)), torch.tensor([1.0, 1.0]))
    assert solution.status == "indefinite"
    assert not solution.converged
    assert solution.direction.tolist() == [0, 0]


@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_in_float32_keeps_its_residuals_orthogonal(preconditioned):
    # A few eigenvalues far above the others, as a network's output bias makes them: without orthogonal residuals the
    # direction is 20 to 50 % off after 8 iterations.
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.cat([torch.tensor([1e4, 1e3, 3e2]).double(), torch.logspace(1, -3, 297, dtype=torch.float64)])
    A, b = Q * eigenvalues @ Q.T, Q @ (eigenvalues.sqrt() * torch.randn(300, generator=generator).double())
    if preconditioned:  # one that does not know those eigenvectors
        scale = torch.logspace(-1, 1, 300, dtype=torch.float64)
        A, b = scale[:, None] * A * scale, scale * b
    diagonal = scale.square() if preconditioned else torch.ones(300).double()
    for iterations in (8, 15):
        single, double = (
            conjugate_gradient(
                lambda v: A.to(v.dtype) @ v,
                b.to(dtype),
                max_iterations=iterations,
                tolerance=0.0,
                preconditioner=(lambda v: v / diagonal.to(v.dtype)) if preconditioned else None,
            ).direction.double()
            for dtype in (torch.float32, torch.float64)
        )
        assert (single - double).norm() <= 1e-3 * double.norm()


def test_cg_remembers_a_bounded_number_of_residuals(monkeypatch):
    monkeypatch.setattr(curvature, "REMEMBERED_RESIDUALS", 3)
    A, b = spd(20)
    torch.testing.assert_close(solve(A, b).direction, torch.linalg.solve(A, b))


def test_cg_singular_but_consistent():
    # b in the range of a singular A: the solution of least norm.
    solution = solve(torch.diag(torch.tensor([2.0, 4.0, 0.0])), torch.tensor([2.0, 4.0, 0.0]), tolerance=1e-6)
    assert solution.converged
    torch.testing.assert_close(solution.direction, torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cg_meets_numbers_that_are_not_finite(bad):
    for A, b in ((torch.eye(2), torch.tensor([1.0, bad])), (torch.eye(2) * bad, torch.ones(2))):
        solution = solve(A, b)
        assert solution.status == "non_finite"
        assert solution.direction.tolist() == [0, 0]


def test_cg_keeps_the_last_good_direction():
    A, b = spd(12)
    products = []

    def matvec(v):
        products.append(1)
        return A @ v * (math.nan if len(products) == 4 else 1.0)

    solution = conjugate_gradient(matvec, b, max_iterations=10, tolerance=0.0)
    assert (solution.status, solution.iterations) == ("non_finite", 3)
    assert torch.equal(solution.direction, solve(A, b, 3, 0.0).direction)


@pytest.mark.parametrize(("iterations", "tolerance"), [(0, 0.1), (5, -0.1), (5, math.nan)])
def test_cg_refusals(iterations, tolerance):
    with pytest.raises(ValueError, match="give"):
        solve(torch.eye(2), torch.ones(2), iterations, tolerance)


@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_natural_gradient_is_the_compatible_least_squares_fit(damping):
    # w = argmin |Psi w - A|² / n + lambda |w|², by lstsq on the stacked system, and in sample space (Woodbury):
    # w = Psi^T u / n with u = (Psi Psi^T / n + lambda I)^-1 A.
    scores, advantages = scores_of()
    n, p = scores.n, scores.p
    psi = matrix(scores)
    shift = damping * psi.square().sum() / n / p
    found = natural_gradient(scores, advantages, damping=damping, cg_iterations=500, cg_tolerance=1e-12)
    assert found.solution.converged
    rows = torch.cat((psi / math.sqrt(n), shift.sqrt() * torch.eye(p).double()))
    target = torch.cat((advantages / math.sqrt(n), torch.zeros(p).double()))
    torch.testing.assert_close(found.direction, torch.linalg.lstsq(rows, target).solution, rtol=1e-7, atol=1e-9)
    u = torch.linalg.solve(scores.gram() / n + shift * torch.eye(n).double(), advantages)
    torch.testing.assert_close(found.direction, scores.rmatvec(u) / n, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.gradient, psi.T @ advantages / n)
    fisher = psi.T @ psi / n
    torch.testing.assert_close(found.quadratic, found.direction @ fisher @ found.direction)


def test_the_fisher_may_be_estimated_from_some_samples_and_the_gradient_takes_all():
    scores, advantages = scores_of()
    rows = torch.tensor([3, 1, 40, 22, 17, 59, 8])
    result = natural_gradient(scores, advantages, damping=0.1, cg_iterations=200, cg_tolerance=1e-12, rows=rows)
    psi = matrix(scores)
    fisher = psi[rows].T @ psi[rows] / len(rows)
    gradient = psi.T @ advantages / len(psi)
    damped = fisher + 0.1 * fisher.trace() / scores.p * torch.eye(scores.p, dtype=torch.float64)
    torch.testing.assert_close(result.gradient, gradient)
    torch.testing.assert_close(result.direction, torch.linalg.solve(damped, gradient))
    torch.testing.assert_close(result.quadratic, result.direction @ fisher @ result.direction)


def test_the_step_has_the_kl_that_was_asked_for():
    scores, advantages = scores_of()
    found = natural_gradient(scores, advantages, damping=0.1, cg_iterations=10, cg_tolerance=1e-6)
    step = step_size(found.quadratic, 0.02) * found.direction
    assert 0.5 * (step @ scores.fisher_matvec(step)) == pytest.approx(0.02)


def test_no_advantage_gives_no_direction_and_no_length():
    scores, _ = scores_of()
    found = natural_gradient(scores, torch.zeros(60).double(), damping=0.1, cg_iterations=5, cg_tolerance=1e-3)
    assert found.solution.status == "zero_rhs"
    assert found.direction.abs().max() == 0
    with pytest.raises(ValueError, match=r"quadratic is 0\.0"):
        step_size(found.quadratic, 0.02)


@pytest.mark.parametrize(("quadratic", "target"), [(-1.0, 0.1), (math.nan, 0.1), (math.inf, 0.1), (1.0, -0.1)])
def test_step_size_refusals(quadratic, target):
    with pytest.raises(ValueError, match="is "):
        step_size(quadratic, target)


def test_negative_damping_is_refused():
    scores, advantages = scores_of()
    with pytest.raises(ValueError, match=r"damping is -0\.1"):
        natural_gradient(scores, advantages, damping=-0.1, cg_iterations=5, cg_tolerance=1e-3)


def test_invariance_under_reparametrization():
    # A Gaussian by (mu, log sigma) and by (mu / sigma², 1 / (2 sigma²)): the tangent that the natural gradient gives in
    # one chart, pushed through the charts' Jacobian, is the one that it gives in the other. The plain gradient is not.
    torch.manual_seed(0)
    x, advantages = torch.randn(200).double() * 1.5 + 0.3, torch.randn(200).double()

    def by_moments(theta):
        return -0.5 * ((x - theta[0]) / theta[1].exp()).square() - theta[1]

    def to_natural(theta):
        precision = torch.exp(-2 * theta[1])
        return torch.stack((theta[0] * precision, precision / 2))

    def by_natural(eta):
        return eta[0] * x - eta[1] * x.square() - eta[0].square() / (4 * eta[1]) + 0.5 * torch.log(2 * eta[1])

    theta = torch.tensor([0.3, 0.4]).double()
    chart = torch.autograd.functional.jacobian(to_natural, theta)
    found = []
    for log_prob, point in ((by_moments, theta), (by_natural, to_natural(theta))):
        psi = torch.autograd.functional.jacobian(log_prob, point)
        scores = DenseScores(log_prob(point), psi)
        found.append(natural_gradient(scores, advantages, damping=0.0, cg_iterations=20, cg_tolerance=1e-12))
    moments, natural = found
    torch.testing.assert_close(chart @ moments.direction, natural.direction)
    torch.testing.assert_close(moments.quadratic, natural.quadratic)
    assert not torch.allclose(chart @ moments.gradient, natural.gradient, rtol=0.1)


def test_where_the_metric_is_the_identity_it_is_the_plain_gradient():
    scores = DenseScores(torch.zeros(4).double(), 2 * torch.eye(4).double())  # F = Psi^T Psi / 4 = I
    found = natural_gradient(
        scores, torch.tensor([1.0, -2.0, 3.0, 0.5]).double(), damping=0.0, cg_iterations=5, cg_tolerance=1e-9
    )
    torch.testing.assert_close(found.direction, found.gradient)


def test_tabular_softmax_step_is_mirror_descent():
    # Theta += eta w gives pi' proportional to pi exp(eta A). The samples hold each action as often as pi says, in
    # eighths, so that the sampled Fisher matrix is the exact one; it is singular (logits have a free constant).
    counts = torch.tensor([[4, 2, 2], [1, 6, 1]])
    pi = counts.double() / 8
    A = torch.tensor([[1.0, -1.0, -1.0], [0.5, 0.25, -2.0]]).double()
    A = A - (pi * A).sum(1, keepdim=True)
    policy = nn.Linear(2, 3, bias=False).double()
    assign_parameters(policy, pi.log().T.flatten())
    states, actions = torch.tensor([(s, a) for s in (0, 1) for a in range(3) for _ in range(counts[s, a])]).T
    onehot = torch.eye(2).double()

    def log_prob():
        return policy(onehot[states]).log_softmax(1).gather(1, actions[:, None]).squeeze(1)

    scores = capture(policy, log_prob)
    found = natural_gradient(scores, A[states, actions], damping=0.0, cg_iterations=10, cg_tolerance=1e-12)
    assert found.solution.converged
    eta = 0.7
    assign_parameters(policy, parameter_vector(policy) + eta * found.direction)
    expected = pi * torch.exp(eta * A)
    torch.testing.assert_close(policy(onehot).softmax(1).detach(), expected / expected.sum(1, keepdim=True))
