"""Adaptive methods are one method with other averages: each row against torch.optim's and this package's own."""

from __future__ import annotations

import pytest
import torch

from benchmarks.optim.regret import Logistic, Reddi, family, losses, optimizers

SETTINGS = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "final_lr": 0.03, "gamma": 0.2}


@pytest.mark.parametrize("name", optimizers(**SETTINGS))
def test_each_row_is_the_generic_method_with_its_averages(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(40, 4, generator=draw, dtype=torch.float64) * torch.tensor([5.0, 1.0, 0.1, 0.01])
    x = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer, at = optimizers(**SETTINGS)[name]([x]), torch.zeros(4, dtype=torch.float64)
    phi, root = family(**SETTINGS)[name]
    for t in range(1, 41):
        x.grad = gradients[t - 1].clone()
        optimizer.step()
        at = at - SETTINGS["lr"] * phi(gradients[:t]) / root(gradients[:t])
        torch.testing.assert_close(x.detach(), at, rtol=1e-9, atol=1e-12)


def test_the_rows_differ() -> None:
    g = torch.tensor([[1.0], [-0.5], [0.3], [4.0], [0.1]], dtype=torch.float64)
    moves = {name: (phi(g) / root(g)).flatten()[-1].item() for name, (phi, root) in family(**SETTINGS).items()}
    assert len({round(x, 6) for x in moves.values()}) == len(moves)


def test_regret_is_counted_from_the_best_fixed_point() -> None:
    problem = Reddi(300)
    assert problem.best(300) == -100  # at -1: of three slopes, 3 - 1 - 1
    adam = losses(problem, optimizers(0.1, 0.0, 0.1, 1e-8, 0.1, 1e-3)["Adam"], 300)[-1]
    amsgrad = losses(problem, optimizers(0.1, 0.0, 0.1, 1e-8, 0.1, 1e-3)["AMSGrad"], 300)[-1]
    assert adam - problem.best(300) > 120 > amsgrad - problem.best(300) > 0
    assert 0 < Logistic(200).best(200) < 200 * 0.6931
