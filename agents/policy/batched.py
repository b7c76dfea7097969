"""One network at many parameter vectors at once: one batched product per layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from agents.policy.distributions import Distribution
from agents.policy.networks import Actor

Operation = Callable[[Tensor], Tensor]


class BatchedNetwork:
    """A feed-forward network's function of its parameters: theta [N, P] and inputs [N, B, I] to outputs [N, B, K].

    Row i of theta has the layout of `parameter_vector(module)`; the network's own parameters are not read.

    Args:
        module: what the layout is that of.
        network: the layers, Linear and elementwise ones; in module.

    Raises:
        ValueError: a layer with parameters is not Linear.
    """

    def __init__(self, module: nn.Module, network: nn.Sequential) -> None:
        slices = _slices(module)
        self.size = sum(parameter.numel() for parameter in module.parameters())
        self._layers: list[tuple[nn.Linear, slice, slice] | nn.Module] = []
        for layer in network:
            if isinstance(layer, nn.Linear):
                self._layers.append((layer, slices[id(layer.weight)], slices[id(layer.bias)]))
            elif any(True for _ in layer.parameters()):
                raise ValueError(f"{layer} has parameters and is not Linear; give Linear and elementwise layers.")
            else:
                self._layers.append(layer)

    def at(self, theta: Tensor) -> Operation:
        """Give the N networks as one function of their inputs [N, B, I]; theta is cut into layers once."""
        plan = [
            layer.forward if isinstance(layer, nn.Module) else partial(_affine, *_weights(theta, *layer))
            for layer in self._layers
        ]

        def run(x: Tensor) -> Tensor:
            for operation in plan:
                x = operation(x)
            return x

        return run

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.at(theta)(x)


class BatchedActor:
    """N policies that share an actor's architecture, each with its own parameters: they act in one forward pass.

    Args:
        actor: gives the architecture and the layout of parameter vectors, which is that of `parameter_vector(actor)`.
    """

    def __init__(self, actor: Actor) -> None:
        self.head = actor.head
        self.network = BatchedNetwork(actor, actor.net)
        self.log_std = None if actor.log_std is None else _slices(actor)[id(actor.log_std.bias)]

    @property
    def size(self) -> int:
        """Return P, the length of a parameter vector."""
        return self.network.size

    def distribution(self, theta: Tensor, s: Tensor) -> Distribution:
        """Evaluate the policies theta [N, P] at normalized s [N, B, O]: N * B distributions in this order."""
        return self._distribution(self.network(theta, s), theta)

    def sampler(self, theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Give actions [N * B, *A] of the policies theta from s [N * B, O] and noise [N * B, *noise_shape]."""
        run, n = self.network.at(theta), len(theta)
        scale = None if self.log_std is None else theta[:, self.log_std]

        def sample(s: Tensor, noise: Tensor) -> Tensor:
            outputs = run(s.view(n, len(s) // n, -1))
            if scale is None:
                return self.head.distribution(outputs.flatten(0, 1)).sample(noise)
            return torch.addcmul(outputs, scale.exp()[:, None], noise.view_as(outputs)).flatten(0, 1)

        return sample

    def _distribution(self, outputs: Tensor, theta: Tensor) -> Distribution:
        log_std = None
        if self.log_std is not None:
            log_std = theta[:, None, self.log_std].expand_as(outputs).flatten(0, 1)
        return self.head.distribution(outputs.flatten(0, 1), log_std)


def _slices(module: nn.Module) -> dict[int, slice]:
    """Map the id of a parameter to its place in the parameter vector."""
    found, first = {}, 0
    for parameter in module.parameters():
        found[id(parameter)] = slice(first, first + parameter.numel())
        first += parameter.numel()
    return found


def _weights(theta: Tensor, layer: nn.Linear, weight: slice, bias: slice) -> tuple[Tensor, Tensor]:
    """Cut a layer's weights [N, I, K] and biases [N, 1, K] out of theta."""
    n = len(theta)
    return theta[:, weight].reshape(n, layer.out_features, layer.in_features).mT, theta[:, None, bias]


def _affine(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return torch.baddbmm(bias, x, weight)
