"""Learning to adapt: the inner loop that Reptile, FOMAML and MAML share, and their meta-gradients.

N tasks adapt in one batch: parameters are rows theta [N, P], and a loss gives one number per row. U^k is k steps of the
inner optimizer from the shared initial parameters phi [P].

    Reptile  phi - U^k(phi)                     a difference, which plays the gradient's part
    FOMAML   L'(U^k(phi))                       the Jacobian of U^k left out
    MAML     L'(U^k(phi)) times the Jacobian    exact, through torch.func

Sources: Finn, Abbeel & Levine 2017, https://arxiv.org/abs/1703.03400; Nichol, Achiam & Schulman 2018,
https://arxiv.org/abs/1803.02999.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Loss = Callable[[Tensor, Any], Tensor]
"""theta [N, P] and a batch of each of N tasks to N losses; row i depends on theta[i] alone."""
State = dict[str, Tensor]

RULES = ("reptile", "fomaml", "maml")
INNER_OPTIMIZERS = ("sgd", "adam")
INNER_STATES = ("reset", "persist")


@dataclass(frozen=True)
class InnerOptimizer:
    """The steps of the inner loop, as a function of parameters, gradient and state."""

    name: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.02
    """Step size."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Adam's decay rates of the moments. Nichol et al. take 0 for the first, so that no momentum crosses tasks."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    state: Literal["reset", "persist"] = "reset"
    """What becomes of Adam's moments between tasks: each task begins anew, or begins with the mean of the moments that
    the tasks before it ended with."""
    later: float = 1.0
    """Factor on the step size after a task's first step."""

    def __post_init__(self) -> None:
        if self.name not in INNER_OPTIMIZERS:
            raise ValueError(f"the inner optimizer is {self.name!r}; use 'sgd' or 'adam'.")
        if self.state not in INNER_STATES:
            raise ValueError(f"the inner optimizer's state is {self.state!r}; use 'reset' or 'persist'.")
        if not self.lr > 0:
            raise ValueError(f"the inner step size is {self.lr}; give a number above 0.")
        if not self.later > 0:
            raise ValueError(f"the factor on later inner steps is {self.later}; give a number above 0.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"the inner betas are {self.betas}; give numbers from 0 to below 1.")
        if not self.eps > 0:
            raise ValueError(f"the inner eps is {self.eps}; give a number above 0.")

    def begin(self, theta: Tensor, before: State | None = None) -> State:
        """The state at the start of N tasks, theta [N, P]; before is what the tasks before them ended with."""
        if self.name == "sgd":
            return {}
        if self.state == "persist" and before:
            return {
                name: value if name == "step" else value.mean(0, keepdim=True).expand_as(theta)
                for name, value in before.items()
            }
        zeros = torch.zeros_like(theta)
        return {"step": theta.new_zeros(()), "m": zeros, "v": zeros}

    def step(self, theta: Tensor, g: Tensor, state: State, *, first: bool = True) -> tuple[Tensor, State]:
        """theta [N, P] after one step against the gradients g [N, P], and the state after it.

        Args:
            first: whether it is the tasks' first step.
        """
        lr = self.lr if first else self.lr * self.later
        if self.name == "sgd":
            return theta - lr * g, state
        (beta1, beta2), t = self.betas, state["step"] + 1
        m = beta1 * state["m"] + (1 - beta1) * g
        v = beta2 * state["v"] + (1 - beta2) * g.square()
        root = (v / (1 - beta2**t)).sqrt() + self.eps
        return theta - lr * (m / (1 - beta1**t)) / root, {"step": t, "m": m, "v": v}


class Adapted(NamedTuple):
    """What the inner loop gives."""

    theta: Tensor
    """U^k(theta), [N, P]."""
    gradients: Tensor
    """g_1 to g_k, [k, N, P]."""
    state: State
    """The inner optimizer's, after the last step."""


def gradients_of(loss: Loss, theta: Tensor, batch: Any) -> Tensor:
    """Each row's gradient of its own loss, [N, P]."""
    gradient: Tensor = torch.func.grad(lambda rows: loss(rows, batch).sum())(theta)
    return gradient


def adapt(
    loss: Loss, theta: Tensor, batches: Sequence[Any], inner: InnerOptimizer, before: State | None = None
) -> Adapted:
    """U^k: one inner step on each of k batches, k at least 0, from theta [N, P].

    It is differentiable in theta through torch.func.
    """
    state = inner.begin(theta, before)
    gradients = []
    for batch in batches:
        g = gradients_of(loss, theta, batch)
        gradients.append(g)
        theta, state = inner.step(theta, g, state, first=len(gradients) == 1)
    return Adapted(theta, torch.stack(gradients) if gradients else theta.new_empty(0, *theta.shape), state)


class MetaGradients(NamedTuple):
    """Directions for the initial parameters, to be followed downhill."""

    gradients: Tensor
    """One for each task, [N, P]; tasks that start from one phi give it their mean."""
    adapted: Adapted


def meta_gradients(
    rule: str,
    loss: Loss,
    theta: Tensor,
    train: Sequence[Any],
    test: Any | None,
    inner: InnerOptimizer,
    before: State | None = None,
) -> MetaGradients:
    """The meta-gradients of N tasks. One task a time is serial Reptile, the mean of several is batched Reptile.

    Args:
        rule: "reptile", "fomaml" or "maml".
        loss: see `Loss`.
        theta: the initial parameters, [N, P]: phi.expand(N, -1) where the tasks share them.
        train: k batches, one inner step on each.
        test: the batch of L in FOMAML and MAML; None for Reptile, which needs none.
        inner: the inner optimizer.
        before: the inner optimizer's state after the tasks before these.

    Returns:
        Reptile's is phi - phi~, so that SGD of step size eps is phi <- phi + eps (phi~ - phi); over alpha it is the sum
        of the inner gradients.

    Raises:
        ValueError: the rule is unknown, there is no inner step (k = 0), test is missing, or MAML's inner step is one
            that it cannot differentiate.
    """
    check_rule(rule, inner, len(train))
    if rule == "reptile":
        adapted = adapt(loss, theta, train, inner, before)
        return MetaGradients(theta - adapted.theta, adapted)
    if test is None:
        raise ValueError(f"{rule} needs the batch that its loss after adaptation is taken on; give test.")
    if rule == "fomaml":
        adapted = adapt(loss, theta, train, inner, before)
        return MetaGradients(gradients_of(loss, adapted.theta, test), adapted)

    def updated(rows: Tensor) -> tuple[Tensor, Adapted]:
        result = adapt(loss, rows, train, inner, before)
        return result.theta, result

    phi_tilde, pullback, adapted = torch.func.vjp(updated, theta, has_aux=True)  # type: ignore[misc]
    (through,) = pullback(gradients_of(loss, phi_tilde, test))
    return MetaGradients(through, adapted)


def check_rule(rule: str, inner: InnerOptimizer, steps: int) -> None:
    """Raises ValueError for a rule that is unknown or that these inner steps make impossible."""
    if rule not in RULES:
        raise ValueError(f"the rule is {rule!r}; use 'reptile', 'fomaml' or 'maml'.")
    if steps < 1:
        raise ValueError(f"there are {steps} inner steps; adaptation needs at least 1.")
    if rule == "maml" and inner.name != "sgd":
        raise ValueError(
            f"maml differentiates through the inner steps, and {inner.name}'s have no derivative where a second moment "
            "is 0; use 'sgd' as inner optimizer, or fomaml."
        )


def linear_anneal(first: float, done: float) -> float:
    """A step size that falls from first to 0 in equal steps; done is the share of training that is over."""
    return first * max(1.0 - done, 0.0)


def inner_products(gradients: Tensor) -> Tensor:
    """The mean inner product of a task's gradients g_i and g_j, i < j: gradients [k, N, P] to [N].

    Nichol et al. 2018, section 5.1: all three rules raise it. Zero for k = 1, which has no pair.
    """
    k = len(gradients)
    if k < 2:
        return gradients.new_zeros(gradients.shape[1])
    total = gradients.sum(0)
    pairs = (total.square().sum(-1) - gradients.square().sum((0, -1))) / 2
    return pairs / (k * (k - 1) / 2)
