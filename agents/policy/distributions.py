"""Action distributions: what a network's outputs mean for each kind of action space.

A distribution is built from outputs [n, K] and, for Gaussians, a log standard deviation. Sampling is a plain function
of noise that the caller draws, so that equal noise gives equal actions wherever it is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional


class Distribution(Protocol):
    """n distributions over actions."""

    def log_prob(self, actions: Tensor) -> Tensor:
        """Give the log-density or log-probability of actions [n, *A], in nats: [n]."""
        ...

    def entropy(self) -> Tensor:
        """Give the entropies in nats, [n]."""
        ...

    def kl(self, other: Any) -> Tensor:
        """Give KL(self || other) in nats: [n]."""
        ...

    def fisher_roots(self) -> Tensor:
        """Give numbers [K, n] the outer products of whose derivatives, summed over K, are E_a[∇ log π ∇ log πᵀ]."""
        ...

    def mode(self) -> Tensor:
        """Give the most probable actions [n, *A]."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """Give actions [n, *A] from noise of the head's kind and shape."""
        ...


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normal actions.

    Attributes:
        mean: [n, A].
        log_std: [n, A] or [A].
    """

    mean: Tensor
    log_std: Tensor

    def log_prob(self, actions: Tensor) -> Tensor:
        z = (actions - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).expand_as(self.mean).sum(-1)

    def kl(self, other: DiagonalGaussian) -> Tensor:
        ratio = torch.exp(2 * (self.log_std - other.log_std))
        distance = ((self.mean - other.mean) * torch.exp(-other.log_std)).square()
        return (other.log_std - self.log_std + 0.5 * (ratio + distance - 1)).sum(-1)

    def fisher_roots(self) -> Tensor:
        # The matrix is diagonal: 1 / σ² for a mean, 2 for a log standard deviation.
        log_std = self.log_std.expand_as(self.mean)
        return torch.cat((self.mean * torch.exp(-log_std.detach()), 2**0.5 * log_std), dim=1).T

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        return torch.addcmul(self.mean, torch.exp(self.log_std), noise)


@dataclass(frozen=True)
class Categoricals:
    """D independent categorical actions.

    Attributes:
        log_probs: [n, D, C] normalized log-probabilities; choices that an action does not have are -inf.
        shape: of one action: (D,), or () for a single Discrete action.
    """

    log_probs: Tensor
    shape: tuple[int, ...]

    def log_prob(self, actions: Tensor) -> Tensor:
        chosen = actions.reshape(-1, self.log_probs.shape[1], 1).long()
        return self.log_probs.gather(-1, chosen).sum((-2, -1))

    def entropy(self) -> Tensor:
        # Not torch.special.entr, whose derivative at a choice that an action does not have is not a number.
        possible = torch.isfinite(self.log_probs)
        return -(self.log_probs.exp() * torch.where(possible, self.log_probs, 0.0)).sum((-2, -1))

    def kl(self, other: Categoricals) -> Tensor:
        possible = torch.isfinite(self.log_probs)
        difference = torch.where(possible, self.log_probs, 0.0) - torch.where(possible, other.log_probs, 0.0)
        return (self.log_probs.exp() * difference).sum((-2, -1))

    def fisher_roots(self) -> Tensor:
        # The mean over choices: each one's log π weighted by √π.
        possible = torch.where(torch.isfinite(self.log_probs), self.log_probs, 0.0)
        return (self.log_probs.exp().sqrt().detach() * possible).flatten(1).T

    def mode(self) -> Tensor:
        return self.log_probs.argmax(-1).reshape(-1, *self.shape)

    def sample(self, noise: Tensor) -> Tensor:
        cumulative = self.log_probs.exp().cumsum(-1)
        # The last cumulative value may round below 1: scale the noise to it.
        threshold = noise.reshape(*cumulative.shape[:2], 1) * cumulative[..., -1:]
        return (cumulative <= threshold).sum(-1).reshape(-1, *self.shape)


@dataclass(frozen=True)
class Bernoullis:
    """D independent binary actions.

    Attributes:
        logits: [n, D].
    """

    logits: Tensor

    def log_prob(self, actions: Tensor) -> Tensor:
        return -functional.binary_cross_entropy_with_logits(
            self.logits, actions.to(self.logits.dtype), reduction="none"
        ).sum(-1)

    def entropy(self) -> Tensor:
        p = torch.sigmoid(self.logits)
        return functional.binary_cross_entropy_with_logits(self.logits, p, reduction="none").sum(-1)

    def kl(self, other: Bernoullis) -> Tensor:
        p = torch.sigmoid(self.logits)
        cross = functional.binary_cross_entropy_with_logits(other.logits, p, reduction="none")
        return cross.sum(-1) - self.entropy()

    def fisher_roots(self) -> Tensor:
        p = torch.sigmoid(self.logits.detach())
        return (self.logits * (p * (1 - p)).sqrt()).T

    def mode(self) -> Tensor:
        return (self.logits > 0).long()

    def sample(self, noise: Tensor) -> Tensor:
        return (noise < torch.sigmoid(self.logits)).long()


@dataclass(frozen=True)
class Head:
    """How an action space is parametrized.

    Attributes:
        kind: the family.
        shape: of one action, *A.
        choices: number of choices of each action; empty for Gaussian and Bernoulli heads.
    """

    kind: Literal["gaussian", "categorical", "bernoulli"]
    shape: tuple[int, ...]
    choices: tuple[int, ...] = ()

    @staticmethod
    def of(space: spaces.Space) -> Head:
        """Find the head for a Box, Discrete, MultiDiscrete or MultiBinary space; others raise ValueError."""
        match space:
            case spaces.Box() if np.issubdtype(space.dtype, np.floating):
                return Head("gaussian", space.shape)
            case spaces.Discrete():
                return Head("categorical", (), (int(space.n),))
            case spaces.MultiDiscrete() if space.nvec.ndim == 1:
                return Head("categorical", space.shape, tuple(int(n) for n in space.nvec))
            case spaces.MultiBinary() if isinstance(space.n, (int, np.integer)):
                return Head("bernoulli", space.shape)
        raise ValueError(
            f"The action space {space} is not supported; use a float Box, or a Discrete, MultiDiscrete or MultiBinary "
            "space of one dimension."
        )

    @cached_property
    def outputs(self) -> int:
        """Count the network's outputs, K."""
        return sum(self.choices) if self.kind == "categorical" else math.prod(self.shape)

    @cached_property
    def noise_shape(self) -> tuple[int, ...]:
        """Give the shape of the noise that one action takes; a Gaussian action is drawn flat and has the same shape."""
        return (len(self.choices),) if self.kind == "categorical" else (self.outputs,)

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Give the shape of one action as the distribution gives and takes it."""
        return self.noise_shape if self.kind == "gaussian" else self.shape

    @property
    def action_dtype(self) -> torch.dtype:
        return torch.float32 if self.kind == "gaussian" else torch.int64

    def distribution(self, outputs: Tensor, log_std: Tensor | None = None) -> Distribution:
        """Make the distributions that outputs [n, K] stand for; log_std [A] or [n, A] belongs to Gaussian heads."""
        if self.kind == "gaussian":
            assert log_std is not None
            return DiagonalGaussian(outputs, log_std)
        if self.kind == "bernoulli":
            return Bernoullis(outputs)
        width = max(self.choices)
        logits = [
            functional.pad(part, (0, width - part.shape[-1]), value=-torch.inf)
            for part in outputs.split(self.choices, -1)
        ]
        return Categoricals(torch.log_softmax(torch.stack(logits, -2), -1), self.shape)
