"""Direct solvers and preconditioned conjugate gradients: parity, residuals, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from agents.natural import curvature
from agents.natural.curvature import check_solver, cholesky, choose_solver, conjugate_gradient, gram
from agents.natural.scores import DenseScores


def problem(n: int = 12, p: int = 20, dtype: torch.dtype = torch.float64) -> tuple[DenseScores, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    psi = torch.randn(n, p, generator=generator, dtype=torch.float64)
    return DenseScores(torch.zeros(n, dtype=dtype), psi.to(dtype)), torch.randn(p, generator=generator).to(dtype)


def damped(scores: DenseScores, shift: float) -> torch.Tensor:
    return scores.fisher() + shift * torch.eye(scores.p, dtype=scores.dtype)


@pytest.mark.parametrize(("n", "p"), [(12, 20), (50, 20), (1, 20), (30, 1)])
def test_the_solvers_agree(n: int, p: int) -> None:
    scores, b = problem(n, p)
    A = damped(scores, 0.05)
    expected = torch.linalg.solve(A, b)
    found = {
        "cholesky": cholesky(A, b),
        "gram": gram(scores, b, 0.05),
        "cg": conjugate_gradient(lambda v: A @ v, b, max_iterations=200, tolerance=1e-13),
    }
    for name, solution in found.items():
        torch.testing.assert_close(solution.direction, expected, rtol=1e-8, atol=1e-10, msg=name)
        assert solution.residual <= 1e-11
        assert solution.converged
        assert (solution.iterations > 0) == (name == "cg")


def test_the_residual_is_the_true_one() -> None:
    scores, b = problem(40, 30, torch.float32)
    A = damped(scores, 1e-6)
    for solution in (cholesky(A, b), gram(scores, b, 1e-6)):
        true = (b - A @ solution.direction).norm() / b.norm()
        assert solution.residual == pytest.approx(true.item(), rel=0.5)
        assert solution.residual > 1e-9
    assert cholesky(A, b, tolerance=1e-12).status == "max_iterations"


def test_gram_keeps_its_digits_at_small_damping() -> None:
    scores, b = problem(60, 20, torch.float32)
    exact = torch.linalg.solve(damped(DenseScores(scores.values.double(), scores.matrix.double()), 1e-4), b.double())
    found = gram(scores, b, 1e-4).direction
    assert (found - exact).norm() < 2e-5 * exact.norm()


def test_matrices_that_have_no_factor() -> None:
    b = torch.ones(2)
    assert cholesky(torch.diag(torch.tensor([1.0, -1.0])), b).status == "indefinite"
    assert cholesky(torch.diag(torch.tensor([1.0, math.nan])), b).status in ("indefinite", "non_finite")
    assert cholesky(torch.eye(2), torch.tensor([1.0, math.inf])).status == "non_finite"
    assert cholesky(torch.eye(2), torch.zeros(2)).status == "zero_rhs"
    for solution in (cholesky(-torch.eye(2), b), cholesky(torch.eye(2), b * math.nan)):
        assert solution.direction.tolist() == [0, 0]
        assert not solution.converged
    scores, b = problem()
    with pytest.raises(ValueError, match=r"damping is 0\.0.*Give cholesky or cg"):
        gram(scores, b, 0.0)


def test_preconditioned_cg_by_hand() -> None:
    # The exact inverse as preconditioner: one iteration. A diagonal matrix with its own diagonal: likewise.
    A, b = torch.diag(torch.tensor([1.0, 3.0, 10.0])).double(), torch.tensor([1.0, 1.0, 2.0]).double()
    solution = conjugate_gradient(
        lambda v: A @ v, b, max_iterations=9, tolerance=1e-12, preconditioner=lambda v: v / A.diagonal()
    )
    assert (solution.iterations, solution.status) == (1, "converged")
    torch.testing.assert_close(solution.direction, b / A.diagonal())


def test_preconditioned_cg_ends_within_as_many_products_as_there_are_unknowns() -> None:
    scores, b = problem(30, 6)
    A = damped(scores, 0.1)
    weights = torch.tensor([1.0, 5.0, 0.2, 3.0, 0.7, 10.0]).double()
    solution = conjugate_gradient(
        lambda v: A @ v, b, max_iterations=6, tolerance=1e-10, preconditioner=lambda v: weights * v
    )
    assert solution.status == "converged"
    torch.testing.assert_close(solution.direction, torch.linalg.solve(A, b))


def test_preconditioned_cg_reports_the_residual_of_the_system_itself() -> None:
    scores, b = problem(50, 20)
    A = damped(scores, 0.1)
    for steps in (1, 4):
        solution = conjugate_gradient(
            lambda v: A @ v, b, max_iterations=steps, tolerance=0.0, preconditioner=lambda v: v / A.diagonal()
        )
        true = (b - A @ solution.direction).norm() / b.norm()
        assert solution.residual == pytest.approx(true.item())


def test_auto_chooses_by_size() -> None:
    assert choose_solver(10_000, curvature.CHOLESKY_PARAMETERS) == "cholesky"
    assert choose_solver(curvature.GRAM_SAMPLES, 5000) == "gram"
    assert choose_solver(2048, 5000) == "cg"


def test_a_matrix_that_does_not_fit_is_refused_with_those_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "MATRIX_BYTES", 4 * 1000**2)
    check_solver("cholesky", 50_000, 1000)
    check_solver("gram", 1000, 50_000)
    check_solver("cg", 10**6, 10**6)
    with pytest.raises(ValueError, match=r"solver is 'cholesky'.*p = 1001 .*give auto or gram or cg"):
        check_solver("cholesky", 1000, 1001)
    with pytest.raises(ValueError, match=r"solver is 'gram'.*n = 1001 .*give auto or cholesky or cg"):
        check_solver("gram", 1001, 1000)
