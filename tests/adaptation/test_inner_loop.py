"""Reptile, FOMAML and MAML against the theory of Nichol et al. 2018, in float64."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.adaptation.inner_loop import (
    InnerSGD,
    adapt,
    adapted,
    gradients_of,
    inner_loop,
    inner_products,
    meta_gradients,
)
from agents.policy.actor_critic import ActorPolicy
from agents.policy.batched import BatchedActor, BatchedNetwork
from agents.policy.networks import parameter_vector

MODULE = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
NETWORK = BatchedNetwork(MODULE, MODULE)
COEFFICIENTS = {
    "reptile": lambda k: (k, -k * (k - 1) / 2),
    "fomaml": lambda k: (1, -(k - 1)),
    "maml": lambda k: (1, -2 * (k - 1)),
}


def squares(theta: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared errors [N] of the networks theta [N, P] on inputs [N, B, I] and targets [N, B, K]."""
    return (NETWORK(theta, batch[0]) - batch[1]).square().mean((1, 2))


def batches(k: int, tasks: int = 1, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda size: torch.randn(tasks, 3, size, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(2), draw(1)) for _ in range(k)]


def parameters(seed: int = 1) -> Tensor:
    return torch.randn(NETWORK.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2


def gradient_and_hessian(phi: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    of = lambda vector: squares(vector[None], batch)[0]  # noqa: E731
    return torch.func.grad(of)(phi), torch.func.jacrev(torch.func.jacrev(of))(phi)


def gradient(rule: str, phi: Tensor, minibatches: list, alpha: float) -> Tensor:
    """g of the paper's section 5.1 on k minibatches: the last one is the test batch of FOMAML and MAML."""
    inner = InnerSGD(alpha)
    if rule == "reptile":
        return meta_gradients(rule, squares, phi[None], minibatches, None, inner)[0] / alpha
    return meta_gradients(rule, squares, phi[None], minibatches[:-1], minibatches[-1], inner)[0]


@pytest.mark.parametrize("rule", COEFFICIENTS)
def test_the_leading_order_identities_for_two_minibatches(rule: str) -> None:
    phi, (first, second) = parameters(), batches(2)
    (g1, H1), (g2, H2) = gradient_and_hessian(phi, first), gradient_and_hessian(phi, second)
    residuals = []
    for alpha in (1e-3, 1e-4):
        expected = {
            "maml": g2 - alpha * H2 @ g1 - alpha * H1 @ g2,
            "fomaml": g2 - alpha * H2 @ g1,
            "reptile": g1 + g2 - alpha * H2 @ g1,
        }[rule]
        residuals.append((gradient(rule, phi, [first, second], alpha) - expected).norm())
    assert residuals[0] > 1e-9
    assert residuals[0] / residuals[1] == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("rule", COEFFICIENTS)
def test_the_coefficients_of_the_mean_gradient_and_the_inner_products(rule: str, k: int) -> None:
    phi, minibatches, alpha = parameters(), batches(k), 1e-5
    found = [gradient_and_hessian(phi, batch) for batch in minibatches]
    mean_gradient = torch.stack([g for g, _ in found]).mean(0)
    inner = torch.stack([found[i][1] @ found[j][0] for i, j in itertools.permutations(range(k), 2)]).mean(0)
    orders = [gradient(rule, phi, list(order), alpha) for order in itertools.permutations(minibatches)]
    design = torch.stack((mean_gradient, alpha * inner), dim=1)
    fit = torch.linalg.lstsq(design, torch.stack(orders).mean(0)[:, None]).solution[:, 0]
    expected = COEFFICIENTS[rule](k)
    assert fit[0].item() == pytest.approx(expected[0], rel=1e-6)
    assert fit[1].item() == pytest.approx(expected[1], rel=1e-3)


def test_maml_is_the_derivative_of_the_loss_after_adaptation() -> None:
    phi, (*train, test) = parameters(), batches(4, tasks=3)
    inner = InnerSGD(0.1)

    def after(vector: Tensor) -> float:
        return squares(adapt(squares, vector.expand(3, -1), train, inner).thetas[-1], test).mean().item()

    h, found = 1e-6, meta_gradients("maml", squares, phi.expand(3, -1), train, test, inner).mean(0)
    steps = torch.eye(len(phi), dtype=phi.dtype) * h
    differences = torch.tensor([(after(phi + e) - after(phi - e)) / (2 * h) for e in steps], dtype=phi.dtype)
    torch.testing.assert_close(found, differences, atol=1e-8, rtol=1e-6)
    first_order = meta_gradients("fomaml", squares, phi.expand(3, -1), train, test, inner).mean(0)
    assert (first_order - differences).norm() > 0.01 * differences.norm()


def test_a_batch_of_tasks_adapts_as_each_alone() -> None:
    phi, (*train, test) = parameters(), batches(3, tasks=4)
    inner = InnerSGD(0.05)
    for rule in COEFFICIENTS:
        together = meta_gradients(rule, squares, phi.expand(4, -1), train, test, inner)
        one = lambda batch, i: tuple(x[i : i + 1] for x in batch)  # noqa: E731
        alone = [
            meta_gradients(rule, squares, phi[None], [one(b, i) for b in train], one(test, i), inner) for i in range(4)
        ]
        torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("rule", ["reptile", "fomaml"])
def test_first_order_rules_keep_no_parameters_of_inner_steps_that_are_taken(rule: str) -> None:
    taken: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Watched(InnerSGD):
        def step(self, theta: Tensor, g: Tensor, j: int) -> Tensor:
            alive.append(sum(reference() is not None for reference in taken))
            after = super().step(theta, g, j)
            taken.append(weakref.ref(after))
            return after

    phi, minibatches = parameters(), batches(8)
    found = meta_gradients(rule, squares, phi[None], minibatches, minibatches[0], Watched(0.1))
    assert max(alive) == 1  # θ itself
    theta = adapt(squares, phi[None], minibatches, InnerSGD(0.1)).thetas[-1]
    assert torch.equal(adapted(squares, phi[None], minibatches, InnerSGD(0.1)), theta)
    assert torch.equal(found, phi - theta if rule == "reptile" else gradients_of(squares, theta, minibatches[0]))


def test_reptile_minimizes_the_mean_squared_distance_to_the_solution_manifolds() -> None:
    """Nichol et al. 2018, section 5.2: where U solves a task, phi~ is the projection P_W(phi)."""
    generator = torch.Generator().manual_seed(0)
    tasks, size, rank = 5, 4, 2
    basis = torch.linalg.qr(torch.randn(tasks, size, rank, generator=generator, dtype=torch.float64))[0]
    curvature = basis @ torch.diag_embed(torch.rand(tasks, rank, generator=generator, dtype=torch.float64) / 5 + 0.9)
    curvature = curvature @ basis.mT
    center = torch.randn(tasks, size, generator=generator, dtype=torch.float64)

    def quadratic(theta: Tensor, _: Any) -> Tensor:
        """½ (θ - c)ᵀ A (θ - c); its minimizers are c plus the null space of A."""
        return 0.5 * torch.einsum("ni,nij,nj->n", theta - center, curvature, theta - center)

    normal = basis @ basis.mT  # phi - P_W(phi) = normal (phi - center)
    phi = torch.zeros(size, dtype=torch.float64)
    inner, eps = InnerSGD(0.9), 1.0

    def reptile(vector: Tensor) -> Tensor:
        rows = vector.expand(tasks, -1)
        return meta_gradients("reptile", quadratic, rows, [None] * 15, None, inner).mean(0)

    first = reptile(phi)
    torch.testing.assert_close(first, torch.einsum("nij,nj->ni", normal, phi - center).mean(0))
    for _ in range(100):
        phi = phi - eps * reptile(phi)
    nearest = torch.linalg.solve(normal.sum(0), torch.einsum("nij,nj->i", normal, center))
    torch.testing.assert_close(phi, nearest, atol=1e-6, rtol=0)


def test_a_step_is_against_the_gradient_where_the_step_before_ended_and_later_ones_have_their_own_size() -> None:
    phi, minibatches = parameters(), batches(3, tasks=2)
    seen: list[Tensor] = []

    def next_batch(j: int, theta: Tensor) -> Any:
        seen.append(theta)
        return minibatches[min(j, 2)]

    inner = InnerSGD(0.3, later=0.5)
    found = inner_loop(next_batch, lambda x, batch: gradients_of(squares, x, batch), phi.expand(2, -1), inner, 3, 1)
    theta = phi.expand(2, -1)
    for batch, lr, g in zip(minibatches, (0.3, 0.15, 0.15), found.gradients, strict=True):
        torch.testing.assert_close(g, gradients_of(squares, theta, batch))
        theta = theta - lr * g
    torch.testing.assert_close(found.thetas[-1], theta)
    assert len(found.batches) == len(seen) == len(found.thetas) == 4
    assert all(x is y for x, y in zip(seen, found.thetas, strict=True))
    again = adapt(squares, phi.expand(2, -1), minibatches, inner)
    assert torch.equal(again.thetas[-1], found.thetas[-1])


def test_inner_products_are_means_over_pairs() -> None:
    g = torch.randn(4, 3, 5, dtype=torch.float64)
    pairs = [(g[i] * g[j]).sum(-1) for i, j in itertools.combinations(range(4), 2)]
    torch.testing.assert_close(inner_products(g), torch.stack(pairs).mean(0))
    assert torch.equal(inner_products(g[:1]), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "mmaml"}, "the rule is 'mmaml'"),
        ({"train": []}, "0 inner steps; adaptation needs at least 1"),
        ({"test": None}, "needs the batch"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    train, test = batches(2)
    asked = {"rule": "maml", "train": [train], "test": test, "inner": InnerSGD(0.1)} | change
    with pytest.raises(ValueError, match=words):
        meta_gradients(asked["rule"], squares, parameters()[None], asked["train"], asked["test"], asked["inner"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "step size is 0"),
        ({"lr": 0.1, "later": -1.0}, "later inner steps is -1"),
    ],
)
def test_impossible_inner_steps_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InnerSGD(**settings)


@pytest.mark.parametrize("space", ["box", "multidiscrete", "multibinary"])
def test_batched_policies_are_the_policies_one_by_one(space: str) -> None:
    from gymnasium import spaces

    from agents.policy.networks import assign_parameters

    action_space = {
        "box": spaces.Box(-1, 1, (3,)),
        "multidiscrete": spaces.MultiDiscrete([2, 3]),
        "multibinary": spaces.MultiBinary(4),
    }[space]
    policy = ActorPolicy(spaces.Box(-1, 1, (5,)), action_space, net_arch=(7, 6))
    actor, batched = policy.actor, BatchedActor(policy.actor)
    generator = torch.Generator().manual_seed(0)
    theta = parameter_vector(actor) + 0.5 * torch.randn(4, batched.size, generator=generator)
    s = torch.randn(4, 9, 5, generator=generator)
    noise = torch.rand(36, *actor.head.noise_shape, generator=generator)
    together = batched.distribution(theta, s)
    actions = together.sample(noise)
    assert torch.allclose(batched.sampler(theta)(s.flatten(0, 1), noise).double(), actions.double(), atol=1e-5)
    for i in range(4):
        assign_parameters(actor, theta[i])
        alone = actor(s[i])
        rows = slice(9 * i, 9 * i + 9)
        torch.testing.assert_close(together.log_prob(actions)[rows], alone.log_prob(actions[rows]))
        torch.testing.assert_close(together.entropy()[rows], alone.entropy())


def test_a_layer_that_cannot_be_batched_is_refused() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match=r"LayerNorm.*not Linear"):
        BatchedNetwork(network, network)
