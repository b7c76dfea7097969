"""Learning to adapt: the inner loop that Reptile, FOMAML and MAML share, and their meta-gradients.

N tasks adapt in one batch: parameters are rows theta [N, P], and a loss gives one number per row. U^k is k steps of SGD
from the shared initial parameters phi [P].

    Reptile  phi - U^k(phi)                     a difference, which plays the gradient's part
    FOMAML   L'(U^k(phi))                       the Jacobian of U^k left out
    MAML     L'(U^k(phi)) times the Jacobian    exact, through torch.func

Sources: Finn, Abbeel & Levine 2017, https://arxiv.org/abs/1703.03400; Nichol, Achiam & Schulman 2018,
https://arxiv.org/abs/1803.02999.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

Loss = Callable[[Tensor, Any], Tensor]
"""theta [N, P] and a batch of each of N tasks to N losses; row i depends on theta[i] alone."""
Gradients = Callable[[Tensor, Any], Tensor]
"""The same to each row's gradient of its own loss, [N, P]."""
NextBatch = Callable[[int, Tensor], Any]
"""j and θ_j, theta after j steps [N, P], to a batch of each task for the next step."""

RULES = ("reptile", "fomaml", "maml")


@dataclass(frozen=True)
class InnerSGD:
    """The step of the inner loop: theta - α g."""

    lr: float
    """α of a task's first step."""
    later: float = 1.0
    """Factor on α after it."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"the inner step size is {self.lr}; give a number above 0.")
        if not self.later > 0:
            raise ValueError(f"the factor on later inner steps is {self.later}; give a number above 0.")

    def step(self, theta: Tensor, g: Tensor, j: int) -> Tensor:
        """Return theta [N, P] after step j, 0 being the tasks' first, against the gradients g [N, P]."""
        return theta - (self.lr if j == 0 else self.lr * self.later) * g


class Adaptation(NamedTuple):
    """What the inner loop went through."""

    thetas: list[Tensor]
    """θ_0 to θ_k = U^k(θ_0), [N, P] each."""
    batches: list[Any]
    """What the steps were computed from, and what was asked for after the last one."""
    gradients: Tensor
    """g_1 to g_k, [k, N, P]."""


def inner_loop(
    next_batch: NextBatch, gradients: Gradients, theta: Tensor, inner: InnerSGD, steps: int, after: int = 0
) -> Adaptation:
    """Take steps from theta [N, P], each against the gradients on a batch that may depend on where it begins.

    Args:
        next_batch: gives a batch for each step.
        gradients: of the tasks' losses; see `gradients_of`.
        theta: θ_0, [N, P]: phi.expand(N, -1) where the tasks share it.
        inner: the step.
        steps: k, at least 0.
        after: how many batches of θ_k to ask for, once the steps are done.
    """
    thetas, batches, found = [theta], [], []
    for j in range(steps + after):
        batches.append(next_batch(j, theta))
        if j < steps:
            g = gradients(theta, batches[-1])
            theta = inner.step(theta, g, j)
            thetas.append(theta)
            found.append(g)
    return Adaptation(thetas, batches, torch.stack(found) if found else theta.new_empty(0, *theta.shape))


def adapt(loss: Loss, theta: Tensor, batches: Sequence[Any], inner: InnerSGD) -> Adaptation:
    """Take one inner step from theta [N, P] on each of k batches that are there already, k at least 0."""
    return inner_loop(lambda j, _: batches[j], partial(gradients_of, loss), theta, inner, len(batches))


def adapted(loss: Loss, theta: Tensor, batches: Sequence[Any], inner: InnerSGD) -> Tensor:
    """Return where `adapt` ends, [N, P], keeping nothing of the way: memory does not grow with k.

    It is differentiable in theta through torch.func, which does keep the way.
    """
    for j, batch in enumerate(batches):
        theta = inner.step(theta, gradients_of(loss, theta, batch), j)
    return theta


def gradients_of(loss: Loss, theta: Tensor, batch: Any) -> Tensor:
    """Return each row's gradient of its own loss, [N, P]."""
    gradient: Tensor = torch.func.grad(lambda rows: loss(rows, batch).sum())(theta)
    return gradient


def gradients_after(adapted: Callable[[Tensor], Tensor], loss: Loss, phi: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Differentiate the losses after adaptation by the chain rule.

    Args:
        adapted: phi to the tasks' parameters [N, P].
        loss: see `Loss`.
        phi: the initial parameters, of any shape.
        batch: what the losses are taken on.

    Returns:
        The product of adapted's transposed Jacobian with the losses' gradients, in phi's shape, and these gradients
        L'(adapted(phi)), [N, P].
    """
    theta, pullback = torch.func.vjp(adapted, phi)  # type: ignore[misc]
    g = gradients_of(loss, theta, batch)
    (through,) = pullback(g)
    return through, g


def meta_gradients(
    rule: str, loss: Loss, theta: Tensor, train: Sequence[Any], test: Any | None, inner: InnerSGD
) -> Tensor:
    """Return directions for the initial parameters of N tasks, to be followed downhill, [N, P].

    Tasks that start from one phi give it their mean: one task a time is serial Reptile, several are batched Reptile.

    Args:
        rule: "reptile", "fomaml" or "maml".
        loss: see `Loss`.
        theta: the initial parameters, [N, P]: phi.expand(N, -1) where the tasks share them.
        train: k batches, one inner step on each.
        test: the batch of L in FOMAML and MAML; None for Reptile, which needs none.
        inner: the inner step. Reptile's direction is phi - phi~, so that SGD of step size eps is
            phi <- phi + eps (phi~ - phi); over α it is the sum of the inner gradients.

    Raises:
        ValueError: the rule is unknown, there is no inner step (k = 0), or test is missing.
    """
    if rule not in RULES:
        raise ValueError(f"the rule is {rule!r}; use 'reptile', 'fomaml' or 'maml'.")
    if not train:
        raise ValueError("there are 0 inner steps; adaptation needs at least 1.")
    if test is None and rule != "reptile":
        raise ValueError(f"{rule} needs the batch that its loss after adaptation is taken on; give test.")

    after = partial(adapted, loss, batches=train, inner=inner)
    match rule:
        case "reptile":
            return theta - after(theta)
        case "fomaml":
            return gradients_of(loss, after(theta), test)
        case _:
            return gradients_after(after, loss, theta, test)[0]


def linear_anneal(first: float, done: float) -> float:
    """Return a step size that falls from first to 0 in equal steps; done is the share of training that is over."""
    return first * max(1.0 - done, 0.0)


def inner_products(gradients: Tensor) -> Tensor:
    """Average the inner products of a task's gradients g_i and g_j, i < j: gradients [k, N, P] to [N].

    Nichol et al. 2018, section 5.1: all three rules raise it. Zero for k = 1, which has no pair.
    """
    k = len(gradients)
    if k < 2:
        return gradients.new_zeros(gradients.shape[1])
    total = gradients.sum(0)
    pairs = (total.square().sum(-1) - gradients.square().sum((0, -1))) / 2
    return pairs / (k * (k - 1) / 2)
