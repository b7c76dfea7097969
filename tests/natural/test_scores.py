"""The factored operator against per-sample gradients of torch.func, in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector

from agents.natural.scores import FactoredScores, UnfactoredModuleError, capture, dense_scores
from agents.policy.networks import Constant, assign_parameters, parameter_vector


class Gaussian(nn.Module):
    """Actions ~ N(network(s), exp(log_std)²) with a global log_std."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.log_std = Constant(size, -0.3)
        self.network = network

    def forward(self, observations, actions):
        log_std = self.log_std(len(observations))
        z = (actions - self.network(observations)) * torch.exp(-log_std)
        return (-0.5 * z.square() - log_std).sum(1)


class Categorical(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observations, actions):
        return self.network(observations).log_softmax(1).gather(1, actions[:, None]).squeeze(1)


def mlp(activation, bias=True):
    return nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 6, bias=bias), activation(), nn.Linear(6, 3))


def gaussian(n, activation=nn.Tanh, bias=True):
    return Gaussian(mlp(activation, bias), 3).double(), torch.randn(n, 5).double(), torch.randn(n, 3).double()


def categorical(n, activation=nn.Tanh, bias=True):
    return Categorical(mlp(activation, bias)).double(), torch.randn(n, 5).double(), torch.randint(3, (n,))


def per_sample(module, *batch):
    """Ψ [n, p], independent of the code under test."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def one(parameters, *sample):
        return functional_call(module, parameters, tuple(x[None] for x in sample))[0]

    rows = vmap(grad(one), in_dims=(None, *(0 for _ in batch)))(parameters, *batch)
    return torch.cat([rows[name].flatten(1) for name, _ in module.named_parameters()], dim=1)


CASES = [
    pytest.param(make, n, activation, bias, id=f"{make.__name__}-{n}-{activation.__name__}-{bias}")
    for make in (gaussian, categorical)
    for n, activation, bias in (
        (40, nn.Tanh, True),
        (40, nn.SiLU, True),
        (40, nn.ReLU, False),
        (1, nn.Tanh, True),
        (200, nn.ELU, True),
    )
]


@pytest.mark.parametrize(("make", "n", "activation", "bias"), CASES)
def test_every_product_equals_the_explicit_matrix(make, n, activation, bias):
    torch.manual_seed(n)
    module, *batch = make(n, activation, bias)
    psi = per_sample(module, *batch)
    scores = capture(module, lambda: module(*batch))
    v, u = torch.randn(psi.shape[1]).double(), torch.randn(n).double()
    assert (scores.n, scores.p) == psi.shape
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores.values, module(*batch).detach())
    for operator in (scores, dense_scores(module, lambda m, *x: m(*x), *batch)):
        torch.testing.assert_close(operator.matvec(v), psi @ v)
        torch.testing.assert_close(operator.rmatvec(u), psi.T @ u)
        torch.testing.assert_close(operator.fisher_matvec(v), psi.T @ (psi @ v) / n)
        torch.testing.assert_close(operator.gram(), psi @ psi.T)
        torch.testing.assert_close(operator.diagonal(), psi.square().mean(0))
        torch.testing.assert_close(operator.trace(), psi.square().sum() / n)
        torch.testing.assert_close(operator.gradient(u), psi.T @ u / n)
        rows = torch.randperm(n)[: n // 2 + 1]
        part = operator.of(rows)
        torch.testing.assert_close(part.values, operator.values[rows])
        torch.testing.assert_close(part.matvec(v), psi[rows] @ v)
        torch.testing.assert_close(part.rmatvec(u[rows]), psi[rows].T @ u[rows])
        torch.testing.assert_close(part.trace(), psi[rows].square().sum() / len(rows))


def test_a_product_does_not_disturb_an_earlier_one():
    module, *batch = gaussian(20)
    scores = capture(module, lambda: module(*batch))
    v, u = torch.randn(scores.p).double(), torch.randn(20).double()
    kept = [scores.matvec(v), scores.rmatvec(u), scores.diagonal(), scores.fisher_matvec(v)]
    copies = [x.clone() for x in kept]
    scores.matvec(v + 1), scores.rmatvec(u + 1), scores.diagonal()
    for x, copy in zip(kept, copies, strict=True):
        assert torch.equal(x, copy)


def test_kronecker_factors():
    n = 30
    module, *batch = gaussian(n)
    factors = capture(module, lambda: module(*batch)).kfac()
    shapes = [(tuple(A.shape), tuple(G.shape)) for A, G in factors]
    assert shapes == [((1, 1), (3, 3)), ((6, 6), (7, 7)), ((8, 8), (6, 6)), ((7, 7), (3, 3))]
    inputs = torch.cat((batch[0], torch.ones(n, 1).double()), 1)
    torch.testing.assert_close(factors[1][0], inputs.T @ inputs / n)
    # With one sample A ⊗ G is the layer's exact Fisher block.
    module, *batch = gaussian(1)
    psi = per_sample(module, *batch)
    A, G = capture(module, lambda: module(*batch)).kfac()[1]
    row = torch.cat((psi[0, 3:38].view(7, 5), psi[0, 38:45, None]), 1)
    torch.testing.assert_close(torch.kron(G, A), torch.outer(row.flatten(), row.flatten()))


def test_global_log_std_has_the_textbook_score():
    module, observations, actions = gaussian(50)
    log_std = module.log_std(50)
    z = (actions - module.network(observations)) / log_std.exp()
    scores = capture(module, lambda: module(observations, actions))
    torch.testing.assert_close(scores.rmatvec(torch.ones(50).double())[:3], (z.square() - 1).sum(0).detach())


def test_float32_is_close_and_stays_float32():
    torch.manual_seed(0)
    module, *batch = gaussian(500)
    psi = per_sample(module, *batch)
    module = module.float()
    batch = [x.float() for x in batch]
    scores = capture(module, lambda: module(*batch))
    v = torch.randn(scores.p)
    assert scores.fisher_matvec(v).dtype == torch.float32
    expected = psi.T @ (psi @ v.double()) / 500
    assert (scores.fisher_matvec(v) - expected).norm() < 1e-5 * expected.norm()


def test_capture_leaves_no_trace_and_works_without_grad_mode():
    module, *batch = gaussian(4)
    with torch.no_grad():
        scores = capture(module, lambda: module(*batch))
    assert isinstance(scores, FactoredScores)
    assert not scores.values.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(not part._forward_hooks for part in module.modules())


def test_dense_scores_take_any_module():
    module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(9, 4).double()
    scores = dense_scores(module, lambda m, x: m(x).squeeze(1), x)
    for i in range(9):
        row = torch.autograd.grad(module(x[i : i + 1]).sum(), list(module.parameters()))
        torch.testing.assert_close(scores.matrix[i], torch.cat([part.flatten() for part in row]))


def test_parameters_are_written_in_place_in_flat_order():
    module = gaussian(1)[0]
    first = next(module.parameters())
    address = first.data_ptr()
    vector = torch.arange(len(parameter_vector(module)), dtype=torch.float64)
    assign_parameters(module, vector)
    assert torch.equal(parameters_to_vector(module.parameters()), vector)
    vector.zero_()
    assert first.data_ptr() == address
    assert first.tolist() == [0, 1, 2]


def refused(error, words, module, forward):
    with pytest.raises(error, match=words):
        capture(module, forward)


def test_modules_that_do_not_factor_are_named():
    x = torch.randn(3, 4)
    norm = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    refused(UnfactoredModuleError, "LayerNorm has parameters", norm, lambda: norm(x).squeeze(1))
    refused(ValueError, "Tanh has no Linear", nn.Tanh(), lambda: x[:, 0])
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    refused(UnfactoredModuleError, "share a parameter", tied, lambda: tied(x).sum(1))


def test_calls_that_would_give_wrong_scores_are_refused():
    x = torch.randn(3, 4)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    refused(ValueError, "inplace", net, lambda: net(x).squeeze(1))
    layer = nn.Linear(4, 4)
    refused(ValueError, "called twice", layer, lambda: layer(layer(x)).sum(1))
    two = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    refused(ValueError, "takes no part", two, lambda: two[0](x).squeeze(1))
    refused(ValueError, "takes no part", two, lambda: (two[0](x) + two[1](x).detach()).squeeze(1))
    refused(ValueError, "for 4 outputs", layer, lambda: layer(x))
    refused(ValueError, "one number per sample", layer, lambda: layer(x)[None])
    refused(ValueError, "n at least 1", layer, lambda: layer(x[:0]).sum(1))
    refused(ValueError, "for 3 outputs", layer, lambda: layer(x[None].expand(2, 3, 4)).sum((0, 2)))
    assert not layer._forward_hooks
