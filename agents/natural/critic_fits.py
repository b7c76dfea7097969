"""How a critic is fitted to its targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from agents.natural.curvature import damped, preconditioner, relative_damping
from agents.natural.scores import capture
from agents.natural.solvers import Status, cholesky, conjugate_gradient
from agents.policy.networks import Critic, assign_parameters, output_layer, parameter_vector

CRITICS = ("gauss_newton", "ridge", "adam", "adabound")
"""How a critic is fitted: `gauss_newton`; `ridge`, for networks linear in fixed features; `descend`, by optimizer."""
HALVINGS = 4
"""How often a Gauss-Newton step that raises the loss is halved before it is given up."""


@dataclass(frozen=True)
class FitStatistics:
    """What a fit of a critic did."""

    explained_variance_before: float
    explained_variance_after: float
    iterations: int
    """Conjugate-gradient iterations, all steps together; or an optimizer's steps."""
    residual: float = 0.0
    """The last solve's relative residual."""
    status: Status = "converged"
    """The last solve's status."""
    step: float = 1.0
    """The share of the last step that was taken: 1, or less where the loss would have risen; 0 if given up."""


@torch.no_grad()
def gauss_newton(
    critic: Critic,
    observations: Tensor,
    targets: Tensor,
    *,
    steps: int = 1,
    cg_iterations: int = 15,
    cg_tolerance: float = 1e-3,
    damping: float = 0.03,
    rows: Tensor | None = None,
    cg_preconditioner: str = "none",
) -> FitStatistics:
    """Fit the critic by damped Gauss-Newton steps on |y - z|² / n, with z the normalized targets.

    Each step solves (Jᵀ J / n + λ I) d = Jᵀ (z - y) / n with the Jacobian J [n, p] of the outputs y. A step that raises
    the loss is halved a few times, then given up. The scale is the caller's: `Critic.update_scale` first.

    Args:
        observations: [n, O].
        targets: value targets in reward units, [n].
        steps: Gauss-Newton steps, at least 1.
        cg_iterations: the most conjugate-gradient iterations per step.
        cg_tolerance: relative residual to stop at.
        damping: λ / (tr(Jᵀ J / n) / p), the damping relative to the mean eigenvalue.
        rows: the samples that Jᵀ J / n is estimated from, int64 [k]; None takes all. The gradient always takes all.
        cg_preconditioner: one of `fisher.PRECONDITIONERS`.

    Raises:
        ValueError: steps is below 1.

    Source: Nocedal & Wright 2006, Numerical Optimization, section 10.3; Martens 2010, "Deep learning via Hessian-free
    optimization", section 4.1 (damping).
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; give at least 1.")
    z = critic.scale.normalize(targets)
    explained: list[Tensor] = []
    iterations = 0
    for _ in range(steps):
        jacobian = capture(critic.network, lambda: critic.normalized(observations))
        error = z - jacobian.values
        explained.append(explained_variance(z, jacobian.values))
        curvature = jacobian if rows is None else jacobian.of(rows)
        shift = relative_damping(curvature, damping)
        solution = conjugate_gradient(
            damped(curvature, shift),
            jacobian.gradient(error),
            max_iterations=cg_iterations,
            tolerance=cg_tolerance,
            preconditioner=preconditioner(cg_preconditioner, curvature, shift),
        )
        iterations += solution.iterations
        step, outputs = _descend(critic, observations, z, error.square().mean(), solution.direction)
    explained.append(explained_variance(z, outputs))
    before, after = explained[0].item(), explained[-1].item()
    return FitStatistics(before, after, iterations, solution.residual, solution.status, step)


@torch.no_grad()
def ridge(critic: Critic, observations: Tensor, targets: Tensor, *, damping: float) -> FitStatistics:
    """The output layer [W, b] that minimizes |Φ W + b - z|² / n + λ |W|², with z the normalized targets.

    Args:
        critic: its network is a chain of layers without parameters, which give the features Φ [n, m], and a Linear.
        observations: [n, O].
        targets: value targets in reward units, [n].
        damping: λ / (tr(Φᵀ Φ / n) / m).

    Raises:
        ValueError: the network has other parameters than its output layer's.

    Source: Hastie, Tibshirani & Friedman 2009, The Elements of Statistical Learning, section 3.4.1.
    """
    output = output_layer(critic.network)
    if sum(x.numel() for x in critic.network.parameters()) != output.weight.numel() + 1:
        raise ValueError("the critic has hidden layers; ridge takes value_network='linear', 'quadratic' or 'rbf'.")
    z = critic.scale.normalize(targets)
    features: Tensor = observations
    for layer in list(critic.network.children())[:-1]:
        features = layer(features)
    before = explained_variance(z, output(features)[:, 0])
    # Centered, the bias is free of the penalty; float64, because the sums run over all samples.
    center, mean = features.mean(0, dtype=torch.float64), z.mean(dtype=torch.float64)
    centered = features.double() - center
    matrix = centered.T @ centered / len(z)
    matrix.diagonal().add_(damping * matrix.trace() / len(matrix))
    solution = cholesky(matrix, centered.T @ (z.double() - mean) / len(z))
    usable = solution.status in ("converged", "zero_rhs")
    if usable:
        output.weight.copy_(solution.direction[None])
        output.bias.copy_(mean - center @ solution.direction)
    after = explained_variance(z, output(features)[:, 0])
    return FitStatistics(before.item(), after.item(), 1, solution.residual, solution.status, float(usable))


def descend(
    critic: Critic, observations: Tensor, targets: Tensor, optimizer: Optimizer, minibatches: Iterable[Tensor]
) -> FitStatistics:
    """Steps of an optimizer on |y - z|² over minibatches, with z the normalized targets.

    Args:
        observations: [n, O].
        targets: value targets in reward units, [n].
        optimizer: over the network's parameters.
        minibatches: the samples of each step, int64 [k].
    """
    z = critic.scale.normalize(targets)
    with torch.no_grad():
        before = explained_variance(z, critic.normalized(observations))
    steps = 0
    for rows in minibatches:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = (critic.normalized(observations[rows]) - z[rows]).square().mean()
        loss.backward()
        optimizer.step()
        steps += 1
    with torch.no_grad():
        after = explained_variance(z, critic.normalized(observations))
    return FitStatistics(before.item(), after.item(), steps)


def explained_variance(targets: Tensor, values: Tensor) -> Tensor:
    """1 - Var(targets - values) / Var(targets), a float64 scalar; not a number where the targets do not vary.

    Args:
        targets, values: [n].
    """
    targets = targets.double()
    variance = targets.var(correction=0)
    share = (targets - values).var(correction=0) / variance
    return torch.where(variance > 0, 1 - share, torch.nan)


def _descend(critic: Critic, observations: Tensor, z: Tensor, loss: Tensor, direction: Tensor) -> tuple[float, Tensor]:
    """Take the longest of the steps 1, 1/2, 1/4, ... that does not raise the loss; 0 leaves the network as it was.

    Returns:
        The step and the outputs [n] after it.
    """
    origin = parameter_vector(critic.network)
    step = 1.0
    for _ in range(HALVINGS + 1):
        assign_parameters(critic.network, origin + step * direction)
        outputs = critic.normalized(observations)
        if (outputs - z).square().mean() <= loss:
            return step, outputs
        step /= 2
    assign_parameters(critic.network, origin)
    return 0.0, critic.normalized(observations)
