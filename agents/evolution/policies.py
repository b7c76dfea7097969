"""Deterministic policies for evolution strategies, and many of them, each with its own parameters, at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.policy.base import Policy, flatten
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
        observation_space: a Box, flattened.
        action_space: Box, Discrete, MultiDiscrete or MultiBinary.
        net_arch: hidden layer sizes.
        activation_fn: key or class of `ACTIVATIONS`.
        normalize_observations: whether the normalizer learns; otherwise it stays the identity.
        squash_actions: whether Box actions are outputs through tanh, scaled to the bounds, in place of clipped ones.
    """

    options: ClassVar[tuple[str, ...]] = ("net_arch", "activation_fn", "normalize_observations", "squash_actions")

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        net_arch: Sequence[int] = (64, 64),
        activation_fn: str | type[nn.Module] = "tanh",
        normalize_observations: bool = True,
        squash_actions: bool = False,
    ) -> None:
        box = isinstance(action_space, spaces.Box)
        super().__init__(
            observation_space,
            action_space,
            normalize_observations=normalize_observations,
            squash_output=squash_actions and box,
        )
        net = self.network(self.observation_size, self.head.outputs, net_arch, activation_key(activation_fn))
        self.actor = DeterministicActor(self.head, net)

    def network(self, inputs: int, outputs: int, net_arch: Sequence[int], activation: str) -> nn.Sequential:
        """The actor's network: Linear layers and activations."""
        raise NotImplementedError

    def distribution(self, observations: Tensor) -> Distribution:
        """For observations [n, *O], distributions of which only the mode counts."""
        return self._actions_of(self.actor(self.normalize(observations)))

    def _actions_of(self, outputs: Tensor) -> Distribution:
        if self.head.kind == "gaussian":
            return DiagonalGaussian(torch.tanh(outputs) if self.squash_output else outputs, outputs.new_zeros(()))
        return self.head.distribution(outputs)

    def to_environment(self, actions: Tensor) -> Tensor:
        """Actions [n, *A] as the environment takes them: Box actions clipped to their bounds or, squashed, scaled."""
        if not self.squash_output:
            return super().to_environment(actions)
        actions = actions.reshape(-1, *self.head.shape)
        return self._low + (0.5 * (actions + 1.0) * (self._high - self._low))  # type: ignore[operator]

    def particles(self, theta: Tensor, shift: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
        """The actions [N, *A], as the environment takes them, of N actors for observations [N, *O], one for each.

        Args:
            theta: the actors' parameters, [N, P], in the order of `actor.parameters()`.
            shift, scale: each one's normalization, [N, O].

        A row depends on its own row of the arguments alone, to the last bit, and little on N in time.
        """
        clip, normalizes = self.normalizer.clip, self.normalize_observations
        layers, finish = self._layers(theta), self._finish()
        normalized = torch.empty_like(shift)

        def act(observations: Tensor) -> Tensor:
            x = flatten(observations)
            if normalizes:
                x = torch.sub(x, shift, out=normalized).mul_(scale).clamp_(-clip, clip)
            for layer in layers:
                x = layer(x)
            return finish(x)

        return act

    def whitened(self, noise: Tensor, M: Tensor) -> Tensor:
        """Perturbations [N, P] from standard normal ones: the first layer's weights are multiplied by M [O, O].

        With M of `agents.policy.normalizer.whitening` the first layer's outputs change as much in every direction of
        the observations. That is the inverse root of the layer's Fisher matrix for Gaussian outputs, E[x xᵀ] ⊗ I.
        """
        first = next(self.actor.parameters())
        weights = (noise[:, : first.numel()].view(-1, *first.shape) @ M).flatten(1)
        return torch.cat([weights, noise[:, first.numel() :]], dim=1)

    def _finish(self) -> Callable[[Tensor], Tensor]:
        """Outputs [n, K] to actions [n, *A], as the environment takes them."""
        shape = self.actor.head.shape
        if self.actor.head.kind != "gaussian" or self.squash_output or len(shape) != 1:
            return lambda outputs: self.to_environment(self._actions_of(outputs).mode())
        low, high = self._low, self._high
        return lambda outputs: torch.clamp(outputs, low, high)  # type: ignore[arg-type]

    def _layers(self, theta: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """The network's layers with a weight and a bias for each row of theta [N, P]."""
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


class LinearPolicy(DeterministicPolicy):
    """One matrix without bias, zero at first, as in Mania et al. 2018, https://arxiv.org/abs/1803.07055.

    net_arch and activation_fn mean nothing to it.
    """

    def network(self, inputs: int, outputs: int, net_arch: Sequence[int], activation: str) -> nn.Sequential:
        layer = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(layer.weight)
        return nn.Sequential(layer)


class MlpPolicy(DeterministicPolicy):
    """Hidden layers with biases; a small last layer makes the first policy nearly the same in every state."""

    def network(self, inputs: int, outputs: int, net_arch: Sequence[int], activation: str) -> nn.Sequential:
        return mlp(inputs, net_arch, outputs, activation, output_gain=0.01)


class _Affine:
    """x [N, I] to W x + b [N, J], with a matrix for each row.

    A product and a sum, in memory that is allocated once: a matrix product with one column is no quicker on a CPU, and
    its rounding may depend on the number of rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._products = torch.empty_like(weight)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.mul(self.weight, x.unsqueeze(1), out=self._products).sum(-1)
        return y if self.bias is None else y.add_(self.bias)
