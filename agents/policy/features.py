"""Fixed features that a network may be linear in, and networks by kind."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agents.policy.networks import mlp

NETWORKS = ("mlp", "linear", "rbf", "quadratic")
"""Kinds of networks: hidden layers; or linear in the inputs, in random Fourier features, in products of two inputs."""


def network(
    kind: str,
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    activation: str,
    output_gain: float,
    rbf_features: int = 250,
) -> nn.Sequential:
    """Make a network of one of NETWORKS; all but "mlp" are linear in fixed features and have no hidden layers.

    Raises:
        ValueError: there is no such kind.
    """
    match kind:
        case "mlp":
            return mlp(inputs, hidden, outputs, activation, output_gain)
        case "linear":
            return mlp(inputs, (), outputs, activation, output_gain)
        case "rbf":
            # Of normalized observations: √(2 O) is their root mean square distance from each other.
            features = FourierFeatures(inputs, rbf_features, (2 * inputs) ** 0.5)
            return nn.Sequential(features, *mlp(rbf_features, (), outputs, activation, output_gain))
        case "quadratic":
            products = QuadraticFeatures(inputs)
            return nn.Sequential(products, *mlp(products.features, (), outputs, activation, output_gain))
    raise ValueError(f"there is no network {kind!r}; give one of {', '.join(NETWORKS)}.")


class FourierFeatures(nn.Module):
    """Random Fourier features y = sin(P o / ν + φ) of observations o: a fixed layer, saved but not trained.

    Args:
        inputs: O, the length of an observation.
        features: their number m; P [m, O] is standard normal, φ [m] uniform in [-π, π).
        bandwidth: ν, in units of the observations; about their mean distance from each other.

    Source: Rajeswaran et al. 2017, section 2, https://arxiv.org/abs/1703.02660.
    """

    projection: Tensor
    phase: Tensor

    def __init__(self, inputs: int, features: int, bandwidth: float) -> None:
        super().__init__()
        # Divided by ν here, so that the saved features are complete.
        self.register_buffer("projection", torch.randn(inputs, features) / bandwidth)
        self.register_buffer("phase", torch.empty(features).uniform_(-math.pi, math.pi))

    def forward(self, observations: Tensor) -> Tensor:
        """Map [n, O] to [n, m]."""
        return torch.addmm(self.phase, observations, self.projection).sin_()


class QuadraticFeatures(nn.Module):
    """Observations and the products of all their pairs: a fixed layer.

    Args:
        inputs: O.
    """

    _pairs: Tensor

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.register_buffer("_pairs", torch.triu_indices(inputs, inputs), persistent=False)

    @property
    def features(self) -> int:
        """O + O (O + 1) / 2."""
        return self.inputs + self._pairs.shape[1]

    def forward(self, observations: Tensor) -> Tensor:
        """Map [n, O] to [n, features]."""
        first, second = self._pairs
        return torch.cat((observations, observations[:, first] * observations[:, second]), dim=1)
