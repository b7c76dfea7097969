"""Deterministic policies for evolution strategies, and many of them, each with its own parameters, at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.policy.base import Policy
from agents.policy.distributions import DiagonalGaussian, Distribution, Head
from agents.policy.networks import activation_key, mlp


class DeterministicActor(nn.Module):
    """Normalized observations to the outputs that an action is made of. Its parameters are what is searched over.

    Args:
        head: how actions are parametrized.
        net: Linear layers and activations, [n, O] to [n, K].
    """

    def __init__(self, head: Head, net: nn.Sequential) -> None:
        super().__init__()
        self.head = head
        self.net = net

    def forward(self, normalized: Tensor) -> Tensor:
        return self.net(normalized)


class DeterministicPolicy(Policy):
    """An actor without noise or state, on observations that the policy itself normalizes.

    Args:
        observation_space: a Box or MultiBinary, flattened, or Discrete or MultiDiscrete, one-hot.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        net_arch: hidden layer sizes.
        activation_fn: key or class of `ACTIVATIONS`.
        normalize_observations: whether the normalizer learns; otherwise it stays the identity.
    """

    options: ClassVar[tuple[str, ...]] = ("net_arch", "activation_fn", "normalize_observations")

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        net_arch: Sequence[int] = (64, 64),
        activation_fn: str | type[nn.Module] = "tanh",
        normalize_observations: bool = True,
    ) -> None:
        super().__init__(observation_space, action_space, normalize_observations=normalize_observations)
        net = self.network(self.observation_size, self.head.outputs, net_arch, activation_key(activation_fn))
        self.actor = DeterministicActor(self.head, net)

    def network(self, inputs: int, outputs: int, net_arch: Sequence[int], activation: str) -> nn.Sequential:
        """Make the actor's network: Linear layers and activations."""
        raise NotImplementedError

    def distribution(self, observations: Tensor) -> Distribution:
        """Give distributions of which only the mode counts, for observations [n, *O]."""
        outputs = self.actor(self.normalize(observations))
        if self.head.kind == "gaussian":
            return DiagonalGaussian(outputs, outputs.new_zeros(()))
        return self.head.distribution(outputs)

    def particles(self, theta: Tensor, shift: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
        """Give a function of observations [N, *O] to the actions [N, *A] of N actors, as the environment takes them.

        Args:
            theta: the actors' parameters, [N, P], in the order of `actor.parameters()`; each sees one observation.
            shift, scale: each one's normalization, [N, O].

        A row depends on its own row of the arguments alone, to the last bit, and little on N in time.
        """
        clip, normalizes = self.normalizer.clip, self.normalize_observations
        layers, encode, finish = self._layers(theta), self.flatten, self._finish()
        normalized = torch.empty_like(shift)

        def act(observations: Tensor) -> Tensor:
            x = encode(observations)
            if normalizes:
                x = torch.sub(x, shift, out=normalized).mul_(scale).clamp_(-clip, clip)
            for layer in layers:
                x = layer(x)
            return finish(x)

        return act

    def whitened(self, noise: Tensor, M: Tensor) -> Tensor:
        """Make perturbations [N, P] of standard normal ones: the first layer's weights are multiplied by M [O, O].

        With M of `agents.evolution.whitening` the first layer's outputs change as much in every direction of the
        observations. That is the inverse root of the layer's Fisher matrix for Gaussian outputs, E[x xᵀ] ⊗ I.
        """
        first = next(self.actor.parameters())
        weights = (noise[:, : first.numel()].view(-1, *first.shape) @ M).flatten(1)
        return torch.cat([weights, noise[:, first.numel() :]], dim=1)

    def _finish(self) -> Callable[[Tensor], Tensor]:
        """Give what makes actions [n, *A], as the environment takes them, of outputs [n, K]."""
        if self.head.kind == "gaussian":
            return self.to_environment
        return lambda outputs: self.to_environment(self.head.distribution(outputs).mode())

    def _layers(self, theta: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """Give the network's layers with a weight and a bias for each row of theta [N, P]."""
        parts = iter(theta.split([parameter.numel() for parameter in self.actor.parameters()], dim=1))
        layers: list[Callable[[Tensor], Tensor]] = []
        for module in self.actor.net:
            if isinstance(module, nn.Linear):
                weight = next(parts).reshape(len(theta), *module.weight.shape)
                layers.append(_Affine(weight, next(parts) if module.bias is not None else None))
            else:
                layers.append(module)
        return layers

    def _predict(self, observation: Any, deterministic: bool = True) -> Tensor:
        return super()._predict(observation, deterministic=True)


class DeterministicLinear(DeterministicPolicy):
    """One matrix without bias, zero at first, as in Mania et al. 2018, https://arxiv.org/abs/1803.07055.

    net_arch and activation_fn mean nothing to it.
    """

    def network(self, inputs: int, outputs: int, net_arch: Sequence[int], activation: str) -> nn.Sequential:
        layer = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(layer.weight)
        return nn.Sequential(layer)


class DeterministicMlp(DeterministicPolicy):
    """Hidden layers with biases; a small last layer makes the first policy nearly the same in every state."""

    def network(self, inputs: int, outputs: int, net_arch: Sequence[int], activation: str) -> nn.Sequential:
        return mlp(inputs, net_arch, outputs, activation, output_gain=0.01)


class _Affine:
    """Takes x [N, I] to W x + b [N, J], with a matrix for each row.

    A product and a sum, in memory that is allocated once, and not `agents.policy.batched`: a batched product of
    matrices promises no rounding that is the same for any number of rows, which here falls with every death. It adds up
    in another order too, so that all results would change; it saves a sixth of the time at 11 inputs and 3 outputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._products = torch.empty_like(weight)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.mul(self.weight, x.unsqueeze(1), out=self._products).sum(-1)
        return y if self.bias is None else y.add_(self.bias)
