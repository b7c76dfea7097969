"""What the natural gradient is: each statement of docs/geometry.md, on small problems in float64."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.natural import geometry as g


@pytest.mark.parametrize("eta", [0.1, 0.7])
def test_on_a_table_it_is_multiplicative_weights_and_mirror_descent_with_the_kl(eta: float) -> None:
    steps = g.table(eta)
    natural = steps["natural gradient"]
    torch.testing.assert_close(natural, steps["multiplicative weights"], rtol=0, atol=1e-12)
    torch.testing.assert_close(natural, steps["mirror descent"], rtol=0, atol=1e-8)
    before = g.table(0.0)["natural gradient"]
    assert (natural - before).abs().max() > 0.02


def test_of_an_exponential_family_it_is_a_mirror_step_of_the_log_partition() -> None:
    found = g.gaussian_policy()
    torch.testing.assert_close(found["Fisher matrix"], found["log-partition's Hessian"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["natural gradient"], found["mirror step"], rtol=0, atol=1e-7)
    torch.testing.assert_close(found["natural gradient"], found["COPOS"], rtol=0, atol=1e-12)
    assert (g.gaussian_policy(1e9)["mirror step"] - found["mirror step"]).abs().max() > 0.01


def test_in_every_chart_it_is_the_same_direction_and_the_plain_gradient_is_not() -> None:
    plain, natural = [], []
    for chart, inverse in g.CHARTS.values():
        x = inverse(torch.tensor(g.START, dtype=torch.float64))
        into, d = torch.autograd.functional.jacobian(chart, x), g.slope(chart, x)
        plain.append(into @ d)
        natural.append(into @ torch.linalg.solve(g.metric(chart, x), d))
    for first, other in ((0, 1), (0, 2), (1, 2)):
        torch.testing.assert_close(natural[first], natural[other], rtol=1e-10, atol=0)
        assert torch.cosine_similarity(plain[first], plain[other], dim=0) < 0.999


def test_flows_coincide_in_every_chart_but_for_their_steps() -> None:
    ends = [g.path(name, natural=True, step=0.02, steps=50)[-1] for name in g.CHARTS]
    finer = [g.path(name, natural=True, step=0.01, steps=100)[-1] for name in g.CHARTS]
    for k in (1, 2):
        apart, less = ((x[k] - x[0]).norm() for x in (ends, finer))
        assert less < 0.02
        assert less < 0.6 * apart  # of the order of the step
    plain = [g.path(name, natural=False, step=5e-3, steps=100)[-1] for name in g.CHARTS]
    assert min((plain[0] - plain[1]).norm(), (plain[0] - plain[2]).norm(), (plain[1] - plain[2]).norm()) > 0.05


def test_a_chart_s_metric_is_the_curvature_of_the_kl() -> None:
    for chart, inverse in g.CHARTS.values():
        x = inverse(torch.tensor(g.START, dtype=torch.float64))
        kl = torch.autograd.functional.hessian(lambda y: g.gaussian(chart(x)).kl(g.gaussian(chart(y)))[0], x)  # noqa: B023
        torch.testing.assert_close(g.metric(chart, x), kl, rtol=1e-9, atol=1e-12)


def test_on_the_curved_family_few_natural_steps_arrive_where_steepest_ones_do_not() -> None:
    target = torch.tensor(g.TARGET, dtype=torch.float64)
    assert (g.path("(μ, log σ)", True, 0.4, 30)[-1] - target).norm() < 1e-3
    for step in (0.01, 0.036):  # more than 2 σ² of the target would leave it again
        assert (g.path("(μ, log σ)", False, step, 30)[-1] - target).norm() > 3


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_newton_s_step_is_the_same_for_a_logistic_regression_at_every_point(scale: float) -> None:
    newton, natural = g.logistic(scale)
    torch.testing.assert_close(newton, natural, rtol=1e-9, atol=1e-12)


def test_newton_s_matrix_is_another_away_from_a_gaussian_s_maximum() -> None:
    y = g.normal(0, 50)
    at = torch.stack((y.mean(), y.std(correction=0).log()))
    hessian, fisher = g.of_a_sample(at, y)
    torch.testing.assert_close(hessian, fisher, rtol=1e-9, atol=1e-9)
    hessian, fisher = g.of_a_sample(at + torch.tensor([0.0, 1.0]), y)
    assert (hessian - fisher).norm() > 0.5 * fisher.norm()
    hessian, fisher = g.of_a_sample(at + torch.tensor([1.5, 0.0]), y)  # farther than σ
    assert torch.linalg.eigvalsh(hessian)[0] < 0 < torch.linalg.eigvalsh(fisher)[0]


def test_where_a_layer_saturates_the_plain_gradient_vanishes_and_the_natural_one_keeps_its_length() -> None:
    lengths = [g.saturated(scale) for scale in (0.1, 3.0, 30.0)]
    assert lengths[0]["plain"] > 50 * lengths[2]["plain"]
    for length in lengths:
        assert length["natural"] == pytest.approx(length["parameters"], rel=0.05)


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
def test_one_step_of_the_fisher_matrix_solves_a_regression_and_the_empirical_one_s_leaves(distance: float) -> None:
    ends = g.regression(distance)
    assert ends["Fisher"].norm() < 1e-12
    assert ends["empirical"].norm() > 0.9 * distance
    if distance < 1:  # as residuals shrink the step grows as 1 / them
        assert ends["empirical"].norm() == pytest.approx(1.09 / distance, rel=0.02)


def test_adam_s_second_moment_is_the_empirical_fisher_s_diagonal_with_its_weights() -> None:
    found = g.second_moment()
    torch.testing.assert_close(found["Adam"], found["weighted"], rtol=1e-12, atol=0)
    error = (found["Adam"] / found["equal"] - 1).abs().max()
    longer = g.second_moment(beta2=0.999, passes=100)
    assert (longer["Adam"] / longer["equal"] - 1).abs().max() < 0.3 * error


def test_the_running_inverse_is_that_of_all_samples_and_converges_to_the_fisher_matrix_s() -> None:
    errors, found, of_all = g.running_inverse(1600)
    torch.testing.assert_close(found, of_all, rtol=1e-9, atol=1e-12)
    assert errors[-1] < 0.15
    assert errors[-1] < 0.7 * errors[99]
    assert errors[-1] < min(g.running_inverse(1600, rate)[0][-1] for rate in (0.03, 0.1))
    assert math.isfinite(errors[0])
