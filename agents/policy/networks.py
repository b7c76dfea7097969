"""Networks, and the names under which activations are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
"""Registry key -> activation. Checkpoints store keys."""


def activation_key(activation: str | type[nn.Module]) -> str:
    """The registry key of an activation given as key or class; others raise ValueError."""
    for key, module in ACTIVATIONS.items():
        if activation in (key, module):
            return key
    raise ValueError(f"activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}.")


def unrolled(network: nn.Sequential) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network as one function without module calls, which cost more than the arithmetic of small layers.

    It gives the network's own bits, and follows its parameters as long as they are changed in place.
    """
    plan: list[Callable[[torch.Tensor], torch.Tensor]] = [
        partial(_affine, layer.weight.detach().T, layer.bias.detach())
        if isinstance(layer, nn.Linear)
        else layer.forward
        for layer in network
    ]

    def run(x: torch.Tensor) -> torch.Tensor:
        for operation in plan:
            x = operation(x)
        return x

    return run


def _affine(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, x, weight)


def mlp(inputs: int, hidden: Sequence[int], outputs: int, activation: str, output_gain: float) -> nn.Sequential:
    """Linear layers with an activation between them; weights orthogonal (gain √2, the last output_gain), biases 0."""
    sizes = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for i, (size_in, size_out) in enumerate(pairwise(sizes)):
        last = i == len(hidden)
        layer = nn.Linear(size_in, size_out)
        nn.init.orthogonal_(layer.weight, output_gain if last else 2**0.5)
        nn.init.zeros_(layer.bias)
        layers += [layer] if last else [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


def flatten(observations: torch.Tensor) -> torch.Tensor:
    """[n, *O] as float32 [n, prod O]."""
    return observations.flatten(1).to(torch.float32)
