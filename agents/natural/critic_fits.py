"""How a critic is fitted to its targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from agents import noise
from agents.config import AgentConfig, above, at_least
from agents.devices import sent
from agents.natural.curvature import CurvatureConfig, Precondition, cholesky, conjugate_gradient, damped
from agents.natural.scores import capture
from agents.natural.solution import Solution, Status
from agents.optim.registry import OptimizerState, make_optimizer
from agents.policy.networks import Critic, assign_parameters, output_layer, parameter_vector

HALVINGS = 4
"""How often a Gauss-Newton step that raises the loss is halved before it is given up."""
HALVINGS_UNASKED = 1
"""The same on a device, which tries all; of 788 steps on HalfCheetah-v5 and Hopper-v5 none was halved at all."""


@dataclass(frozen=True, kw_only=True)
class CriticFitConfig(CurvatureConfig, AgentConfig):
    """How the critic is fitted; of its curvature, cg_preconditioner and curvature_samples say how it is estimated."""

    critic: Literal["gauss_newton", "ridge", "adam", "adabound"] = "gauss_newton"
    """How the critic is fitted: gauss_newton, ridge (closed form; needs a value_network linear in features), adam or
    adabound."""
    critic_learning_rate: Annotated[float, above(0)] = 1e-3
    """Step size of adam and adabound."""
    critic_epochs: Annotated[int, at_least(1)] = 10
    """Passes of adam and adabound over the samples per iteration."""
    critic_batch_size: Annotated[int, at_least(1)] = 256
    """Samples of one of their steps, at most."""
    critic_steps: Annotated[int, at_least(1)] = 4
    """Gauss-Newton steps of the critic per iteration."""
    critic_cg_max_steps: Annotated[int, at_least(1)] = 2
    """Most conjugate-gradient iterations per Gauss-Newton step. Few, from many points, fit what many samples share;
    more would learn a small batch by heart."""
    critic_damping: Annotated[float, at_least(0)] = 0.03
    """Damping of the Gauss-Newton matrix, in units of its mean eigenvalue."""
    advantages_after_fit: bool = False
    """Whether advantages are relative to the values of the critic that this batch was fitted to, and not, as Schulman
    et al. 2015 have it, to those of the last one. Walker2d and Hopper start quicker with it; after 1M steps it is
    behind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic == "ridge" and self.value_network == "mlp":
            raise ValueError("critic is 'ridge' with value_network='mlp'; give value_network='quadratic' or 'rbf'.")
        if self.cg_preconditioner == "gram" and min(self.cg_damping, self.critic_damping) == 0:
            raise ValueError(
                "cg_preconditioner is 'gram' with cg_damping or critic_damping 0.0; give both above 0, or another "
                "preconditioner."
            )


@dataclass(frozen=True)
class FitStatistics:
    """What a fit of a critic did; on a device that stays there until somebody asks."""

    solutions: Sequence[Solution] = ()
    """Of linear equations, one for each step."""
    share: float | Tensor = 1.0
    """The share of the last step that was taken."""
    steps: int = 0
    """Of an optimizer."""

    @property
    def iterations(self) -> int:
        """Count conjugate-gradient iterations, all steps together; or an optimizer's steps."""
        return self.steps + sum(solution.iterations for solution in self.solutions)

    @property
    def residual(self) -> float:
        """Give the last solve's relative residual."""
        return self.solutions[-1].residual if self.solutions else 0.0

    @property
    def status(self) -> Status:
        """Give the last solve's status."""
        return self.solutions[-1].status if self.solutions else "converged"

    @property
    def step(self) -> float:
        """Give the share of the last step that was taken: 1, or less where the loss would have risen; 0: given up."""
        return float(self.share)


class CriticFit(ABC):
    """A way to fit a critic to value targets, with what it keeps between updates."""

    @abstractmethod
    def fit(self, critic: Critic, s: Tensor, z: Tensor, rows: Tensor | None = None) -> FitStatistics:
        """Fit the critic's outputs y = `Critic.normalized`(s) to normalized targets z.

        Args:
            s: normalized observations, [n, O].
            z: value targets as `Critic.update_scale` gives them, [n].
            rows: the samples that curvature is estimated from, int64 [k], where there is any; None takes all.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Give what it keeps between updates."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027, most keep nothing
        """Take back what `tensors` gave."""


@dataclass(frozen=True)
class GaussNewton(CriticFit):
    """Damped Gauss-Newton steps on |y - z|² / n.

    Each step solves (Jᵀ J / n + λ I) d = Jᵀ (z - y) / n with the Jacobian J [n, p] of the outputs y. A step that raises
    the loss is halved a few times, then given up.

    Args:
        steps: Gauss-Newton steps, at least 1.
        cg_iterations: the most conjugate-gradient iterations per step.
        cg_tolerance: relative residual to stop at.
        damping: λ / (tr(Jᵀ J / n) / p), the damping relative to the mean eigenvalue.
        precondition: one of `PRECONDITIONERS`' values.

    Raises:
        ValueError: steps is below 1.

    Source: Nocedal & Wright 2006, Numerical Optimization, section 10.3; Martens 2010, "Deep learning via Hessian-free
    optimization", section 4.1 (damping).
    """

    steps: int = 1
    cg_iterations: int = 15
    cg_tolerance: float = 1e-3
    damping: float = 0.03
    precondition: Precondition | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give at least 1.")
        if not self.damping >= 0:
            raise ValueError(f"damping is {self.damping}; give 0 or more.")

    @torch.no_grad()
    def fit(self, critic: Critic, s: Tensor, z: Tensor, rows: Tensor | None = None) -> FitStatistics:
        solutions: list[Solution] = []
        for _ in range(self.steps):
            jacobian = capture(critic.network, lambda: critic.normalized(s))
            error = z - jacobian.values
            curvature = jacobian if rows is None else jacobian.of(rows)
            shift = self.damping * curvature.trace() / curvature.p
            solutions.append(
                conjugate_gradient(
                    damped(curvature, shift),
                    jacobian.gradient(error),
                    max_iterations=self.cg_iterations,
                    tolerance=self.cg_tolerance,
                    preconditioner=None if self.precondition is None else self.precondition(curvature, shift),
                )
            )
            # The longest of the steps 1, 1/2, 1/4, ... that does not raise the loss. A device tries some unasked.
            origin, direction, loss = parameter_vector(critic.network), solutions[-1].direction, error.square().mean()
            taken: float | Tensor = torch.zeros((), device=s.device)
            halvings = HALVINGS if s.device.type == "cpu" else HALVINGS_UNASKED
            for step in (0.5**k for k in range(halvings + 1)):
                assign_parameters(critic.network, origin + step * direction)
                fine = (critic.normalized(s) - z).square().mean() <= loss
                if s.device.type != "cpu":
                    taken = torch.where((taken == 0) & fine, step, taken)
                elif fine:
                    taken = step
                    break
            if isinstance(taken, Tensor):  # a direction that is not finite has no part in it
                assign_parameters(critic.network, torch.where(taken > 0, origin + taken * direction, origin))
        return FitStatistics(solutions, taken)


@dataclass(frozen=True)
class Ridge(CriticFit):
    """The output layer [W, b] that minimizes |Φ W + b - z|² / n + λ |W|².

    The critic's network is a chain of layers without parameters, which give the features Φ [n, m], and a Linear; `fit`
    raises ValueError where it has other parameters than its output layer's.

    Args:
        damping: λ / (tr(Φᵀ Φ / n) / m).

    Source: Hastie, Tibshirani & Friedman 2009, The Elements of Statistical Learning, section 3.4.1.
    """

    damping: float

    @torch.no_grad()
    def fit(self, critic: Critic, s: Tensor, z: Tensor, rows: Tensor | None = None) -> FitStatistics:
        output = output_layer(critic.network)
        if sum(x.numel() for x in critic.network.parameters()) != output.weight.numel() + 1:
            raise ValueError("the critic has hidden layers; ridge takes value_network='linear', 'quadratic' or 'rbf'.")
        features = s
        for layer in list(critic.network.children())[:-1]:
            features = layer(features)
        # Centered, the bias is free of the penalty; float64, because the sums run over all samples.
        center, mean = features.mean(0, dtype=torch.float64), z.mean(dtype=torch.float64)
        centered = features.double() - center
        matrix = centered.T @ centered / len(z)
        matrix.diagonal().add_(self.damping * matrix.trace() / len(matrix))
        solution = cholesky(matrix, centered.T @ (z.double() - mean) / len(z))
        usable = solution.status in ("converged", "zero_rhs")
        if usable:
            output.weight.copy_(solution.direction[None])
            output.bias.copy_(mean - center @ solution.direction)
        return FitStatistics([solution], float(usable))


class Descent(CriticFit):
    """Steps of an optimizer on |y - z|² over minibatches in a new order each epoch.

    Where targets were not finite a device, which learns that too late, takes them back.

    Args:
        name: one of `OPTIMIZERS`.
        critic: whose network it steps.
        lr: the optimizer's step size.
        epochs: passes over the samples per fit.
        batch_size: samples of a step, at most.
        seed: of the orders.
    """

    def __init__(self, name: str, critic: Critic, lr: float, epochs: int, batch_size: int, seed: int = 0) -> None:
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.parameters = list(critic.network.parameters())
        self.optimizer = make_optimizer(name, self.parameters, lr=lr, eps=1e-5)
        self.state = OptimizerState(name, self.optimizer)
        self.updates = 0

    def fit(self, critic: Critic, s: Tensor, z: Tensor, rows: Tensor | None = None) -> FitStatistics:
        on_host, steps = s.device.type == "cpu", 0
        before = {} if on_host else {x: x.clone() for x in self._learned()}
        for some in self._minibatches(len(s)):
            some = sent(some, s.device)
            self.optimizer.zero_grad()
            with torch.enable_grad():
                loss = (critic.normalized(s[some]) - z[some]).square().mean()
            loss.backward()
            self.optimizer.step()
            steps += 1
        self.updates += 1
        if not on_host:
            fine = torch.stack([x.isfinite().all() for x in self.parameters]).all()
            for x in self._learned():
                x.copy_(torch.where(fine, x, before.get(x, torch.zeros_like(x))))
        return FitStatistics(steps=steps)

    def _learned(self) -> list[Tensor]:
        """List what a step changes on the critic's device."""
        kept = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return [x for x in (*self.parameters, *kept) if x.device == self.parameters[0].device]

    def _minibatches(self, n: int) -> Iterator[Tensor]:
        for epoch in range(self.epochs):
            yield from noise.permutation(self.seed, "critic", self.updates, n, epoch).split(self.batch_size)

    def tensors(self) -> dict[str, Tensor]:
        return {"updates": torch.tensor(self.updates), **self.state.tensors()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.updates = int(tensors.get("updates", torch.tensor(0)))
        self.state.load(tensors)


CRITIC_FITS: dict[str, Callable[[Any, Critic, Precondition | None, int], CriticFit]] = {
    "gauss_newton": lambda c, critic, precondition, seed: GaussNewton(
        c.critic_steps, c.critic_cg_max_steps, damping=c.critic_damping, precondition=precondition
    ),
    "ridge": lambda c, critic, precondition, seed: Ridge(c.critic_damping),
    **{
        name: lambda c, critic, precondition, seed: Descent(
            c.critic, critic, c.critic_learning_rate, c.critic_epochs, c.critic_batch_size, seed
        )
        for name in ("adam", "adabound")
    },
}
"""Name -> what makes a fit from a configuration, the critic, a preconditioner and the run's seed."""
