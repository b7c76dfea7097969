"""Networks, and the names under which activations are stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


class _TanhOfSigmoid(torch.autograd.Function):
    """tanh(x) = 2 σ(2 x) - 1, which autograd would take four passes back through in place of one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sigmoid_(x + x).mul_(2).sub_(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(gradient, output)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return tangent * (1 - output.square())


class Tanh(nn.Tanh):
    """tanh, on a CPU from PyTorch's σ, which is ten times as fast. The values differ by at most 2e-7."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return torch.tanh(input)
        return _TanhOfSigmoid.apply(input)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
"""Registry key -> activation. Checkpoints store keys."""


NETWORKS = ("mlp", "linear", "rbf", "quadratic")
"""Kinds of networks: hidden layers; or linear in the inputs, in random Fourier features, in products of two inputs."""


def activation_key(activation: str | type[nn.Module]) -> str:
    """The registry key of an activation given as key or class; others raise ValueError."""
    for key, module in ACTIVATIONS.items():
        if activation in (key, module) or (activation is nn.Tanh and module is Tanh):
            return key
    raise ValueError(f"activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}.")


def unrolled(network: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """The network with the parameters that it has now, as one function without module calls and their overhead, which
    on small batches costs more than the arithmetic.

    tanh(x) = 2 σ(2 x) - 1 is a sigmoid between layers of other weights, so that outputs differ by rounding.
    """
    layers = list(network)
    linear = [isinstance(layer, nn.Linear) for layer in layers]
    sigmoid = [
        isinstance(layer, Tanh) and 0 < i < len(layers) - 1 and linear[i - 1] and linear[i + 1]
        for i, layer in enumerate(layers)
    ]
    plan: list[Callable[[Tensor], Tensor]] = []
    for i, layer in enumerate(layers):
        if not isinstance(layer, nn.Linear):
            plan.append(torch.sigmoid_ if sigmoid[i] else layer.forward)
            continue
        weight, bias = layer.weight.detach(), layer.bias.detach()
        if i > 0 and sigmoid[i - 1]:
            weight, bias = 2 * weight, bias - weight.sum(1)
        if i + 1 < len(layers) and sigmoid[i + 1]:
            weight, bias = 2 * weight, 2 * bias
        plan.append(partial(_affine, weight.T, bias))

    def run(x: Tensor) -> Tensor:
        for operation in plan:
            x = operation(x)
        return x

    return run


def _affine(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
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
        """[n, O] -> [n, m]."""
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
        """[n, O] -> [n, features]."""
        first, second = self._pairs
        return torch.cat((observations, observations[:, first] * observations[:, second]), dim=1)


class Constant(nn.Module):
    """A vector of parameters that depends on no input, such as a global log standard deviation.

    Args:
        size: its length.
        value: what every entry starts with.
    """

    def __init__(self, size: int, value: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((size,), value))

    def forward(self, n: int) -> Tensor:
        """The vector once per sample, [n, size]: copies, which keep their values when the parameters change."""
        return self.bias.repeat(n, 1)


def network(
    kind: str,
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    activation: str,
    output_gain: float,
    rbf: tuple[int, float | None] = (250, None),
) -> nn.Sequential:
    """A network of one of the kinds NETWORKS; all but "mlp" are linear in fixed features and have no hidden layers.

    Raises:
        ValueError: there is no such kind.
    """
    match kind:
        case "mlp":
            return mlp(inputs, hidden, outputs, activation, output_gain)
        case "linear":
            return mlp(inputs, (), outputs, activation, output_gain)
        case "rbf":
            number, bandwidth = rbf
            features = FourierFeatures(inputs, number, (2 * inputs) ** 0.5 if bandwidth is None else bandwidth)
            return nn.Sequential(features, *mlp(number, (), outputs, activation, output_gain))
        case "quadratic":
            products = QuadraticFeatures(inputs)
            return nn.Sequential(products, *mlp(products.features, (), outputs, activation, output_gain))
    raise ValueError(f"there is no network {kind!r}; give one of {', '.join(NETWORKS)}.")


def flatten(observations: Tensor) -> Tensor:
    """[n, *O] as float32 [n, prod O]."""
    flat = observations if observations.ndim == 2 else observations.flatten(1)
    return flat if flat.dtype == torch.float32 else flat.to(torch.float32)


@torch.no_grad()
def parameter_vector(module: nn.Module) -> Tensor:
    """A copy of the module's parameters, [p]."""
    return parameters_to_vector(module.parameters())


@torch.no_grad()
def assign_parameters(module: nn.Module, vector: Tensor) -> None:
    """Write vector [p] into the module's parameters, in place.

    torch.nn.utils.vector_to_parameters would make the parameters views of the vector.
    """
    parameters = list(module.parameters())
    for parameter, part in zip(parameters, vector.split([x.numel() for x in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))
