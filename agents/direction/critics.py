"""Value functions: the scale of their targets, and how they are fitted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from agents.direction.fisher import damped, preconditioner, relative_damping
from agents.direction.scores import assign_parameters, capture, parameter_vector
from agents.direction.solvers import Status, cholesky, conjugate_gradient

CRITICS = ("gauss_newton", "ridge", "adam", "adabound")
"""How a critic is fitted: `gauss_newton`; `ridge`, for networks linear in fixed features; `descend`, by optimizer."""
HALVINGS = 4
"""How often a Gauss-Newton step that raises the loss is halved before it is given up."""


class ReturnScale(nn.Module):
    """Running mean and standard deviation of value targets; count, mean and M2 are float64 buffers.

    Batches are merged by Chan's formula. Before each merge the past loses the share 1 - decay of its weight, because
    the targets move with the policy: a cumulative mean would trail behind by half the training. There is no absolute
    epsilon: rewards in other units give the same normalized targets (bit for bit, if the factor is a power of two).
    A standard deviation that float32 cannot tell from zero beside the mean counts as zero, and the scale is then 1.

    Args:
        decay: what an update leaves of the past's weight, in (0, 1]; 1 is cumulative.

    Source: Chan, Golub & LeVeque 1983 (the pairwise update), https://doi.org/10.1080/00031305.1983.10483115.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}; give a number in (0, 1], 1 for cumulative statistics.")
        self.decay = decay
        for name in ("count", "mean", "m2"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def std(self) -> Tensor:
        """The standard deviation, or 1 where there is none; a float64 scalar."""
        std = (self.m2 / self.count).sqrt()
        return torch.where(std > torch.finfo(torch.float32).eps * self.mean.abs(), std, 1.0)

    @torch.no_grad()
    def update(self, targets: Tensor) -> None:
        """Merge a batch of targets [n], n at least 1."""
        batch = targets.double()
        mean = batch.mean()
        self.count *= self.decay
        self.m2 *= self.decay
        total = self.count + len(batch)
        shift = mean - self.mean
        self.m2 += (batch - mean).square().sum() + shift.square() * self.count * len(batch) / total
        self.mean += shift * len(batch) / total
        self.count.copy_(total)

    def normalize(self, targets: Tensor) -> Tensor:
        """(targets - mean) / std, in the targets' dtype."""
        return ((targets.double() - self.mean) / self.std).to(targets.dtype)

    def denormalize(self, outputs: Tensor) -> Tensor:
        """outputs * std + mean, in the outputs' dtype."""
        return outputs * self.std.to(outputs.dtype) + self.mean.to(outputs.dtype)


class Critic(nn.Module):
    """A value function V(s) whose network learns targets of mean 0 and variance 1.

    Args:
        network: observations [n, O] -> [n, 1]; its last module is a Linear with one output and a bias.
        scale: the statistics of the targets.

    Raises:
        ValueError: the network ends in another module.
    """

    def __init__(self, network: nn.Module, scale: ReturnScale | None = None) -> None:
        super().__init__()
        _output_layer(network)
        self.network = network
        self.scale = ReturnScale() if scale is None else scale

    def forward(self, observations: Tensor) -> Tensor:
        """V(s) in reward units: [n, O] -> [n]."""
        return self.scale.denormalize(self.normalized(observations))

    def normalized(self, observations: Tensor) -> Tensor:
        """The network's own output, (V(s) - mean) / std: [n, O] -> [n]."""
        return self.network(observations).squeeze(-1)

    @torch.no_grad()
    def update_scale(self, targets: Tensor) -> None:
        """Merge targets [n] into the scale and rescale the output layer, so that V stays what it was.

        Source: van Hasselt et al. 2016, proposition 1, https://arxiv.org/abs/1602.07714.
        """
        output = _output_layer(self.network)
        old_mean, old_std = self.scale.mean.clone(), self.scale.std
        self.scale.update(targets)
        new_mean, new_std = self.scale.mean, self.scale.std
        output.weight.copy_(output.weight * (old_std / new_std))
        output.bias.copy_((old_std * output.bias.double() + old_mean - new_mean) / new_std)


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
    output = _output_layer(critic.network)
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


def _output_layer(network: nn.Module) -> nn.Linear:
    *_, output = network.modules()
    if not isinstance(output, nn.Linear) or output.out_features != 1 or output.bias is None:
        raise ValueError(f"the value network ends in {output}; let it end in a Linear with one output and a bias.")
    return output


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
