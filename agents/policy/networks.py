"""Networks: activations by name, layers, the actor and the critic."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from agents.policy.base import Moments
from agents.policy.distributions import Distribution, Head


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
    """tanh, on a CPU from PyTorch's σ. The values differ by at most 2e-7."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return torch.tanh(input)
        return _TanhOfSigmoid.apply(input)


def _slow_tanh() -> bool:
    """Say whether this machine's PyTorch takes tanh from Intel's library on a processor that is not Intel's: there it
    is ten times as slow as σ, where Intel's own take half of σ's time."""
    if not torch.backends.mkl.is_available():
        return False
    about = Path("/proc/cpuinfo")
    return "GenuineIntel" not in (about.read_text() if about.is_file() else platform.processor())


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": Tanh if _slow_tanh() else nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
"""Registry key -> activation. Checkpoints store keys."""


def activation_key(activation: str | type[nn.Module]) -> str:
    """Find the registry key of an activation given as key or class; others raise ValueError."""
    for key, module in ACTIVATIONS.items():
        if activation in (key, module) or (key == "tanh" and activation is nn.Tanh):
            return key
    raise ValueError(f"activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}.")


def unrolled(network: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """Give the network with the parameters that it has now, as one function without module calls and their overhead,
    which on small batches costs more than the arithmetic.

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
    """Make Linear layers with activations between: orthogonal weights (gain √2, the last output_gain), biases 0."""
    sizes = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for i, (size_in, size_out) in enumerate(pairwise(sizes)):
        last = i == len(hidden)
        layer = nn.Linear(size_in, size_out)
        nn.init.orthogonal_(layer.weight, output_gain if last else 2**0.5)
        nn.init.zeros_(layer.bias)
        layers += [layer] if last else [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


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
        """Give the vector once per sample, [n, size]: copies, which keep their values when the parameters change."""
        return self.bias.repeat(n, 1)


class Actor(nn.Module):
    """Normalized observations to action distributions. Its parameters are the theta of every direction.

    Args:
        head: how actions are parametrized.
        net: [n, O] to [n, head.outputs].
        log_std_init: initial log standard deviation of Gaussian actions, in their units.
        units: of Gaussian actions, (middle [A], half [A]): means begin near the middle, the standard deviation at
            half exp(log_std_init). None is 0 and 1.

    Attributes:
        log_unit: log half, [A], which limits of the log standard deviation are counted from; 0 of other actions.
    """

    log_unit: Tensor

    def __init__(
        self,
        head: Head,
        net: nn.Sequential,
        log_std_init: float = 0.0,
        units: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.head = head
        self.net = net
        self.log_std = Constant(head.outputs, log_std_init) if head.kind == "gaussian" else None
        middle, half = (torch.zeros(head.outputs), torch.ones(head.outputs)) if units is None else units
        self.register_buffer("log_unit", half.log(), persistent=False)
        if self.log_std is not None and units is not None:
            output = net[-1]
            assert isinstance(output, nn.Linear)
            with torch.no_grad():
                self.log_std.bias.add_(self.log_unit)
                output.weight.mul_(half[:, None])
                output.bias.mul_(half).add_(middle)

    def forward(self, normalized: Tensor) -> Distribution:
        log_std = None if self.log_std is None else self.log_std(len(normalized))
        return self.head.distribution(self.net(normalized), log_std)

    def shared_std(self, normalized: Tensor) -> Distribution:
        """Do as `forward`, without a copy of the log standard deviation per sample: follows it when it changes."""
        return self.head.distribution(self.net(normalized), self.log_std.bias if self.log_std is not None else None)

    def sampler(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Give actions [n, *A] as a function of normalized observations [n, O] and noise [n, *noise_shape].

        It has the parameters of now, is quick on small batches, and equal to sampling from `forward` up to rounding.
        """
        head, act = self.head, unrolled(self.net)
        if self.log_std is None:
            return lambda normalized, noise: head.distribution(act(normalized)).sample(noise)
        std = self.log_std.bias.detach().exp()
        return lambda normalized, noise: torch.addcmul(act(normalized), std, noise)


class ReturnScale(nn.Module):
    """Running mean and standard deviation of value targets; count, mean and M2 are float64 buffers.

    Batches are merged as `Moments`. Before each merge the past loses the share 1 - decay of its weight, because
    the targets move with the policy: a cumulative mean would trail behind by half the training. There is no absolute
    epsilon: rewards in other units give the same normalized targets (bit for bit, if the factor is a power of two).
    A standard deviation that float32 cannot tell from zero beside the mean counts as zero, and the scale is then 1.

    Args:
        decay: what an update leaves of the past's weight, in (0, 1]; 1 is cumulative.
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
        """Give the standard deviation, or 1 where there is none; a float64 scalar."""
        std = (self.m2 / self.count).sqrt()
        return torch.where(std > torch.finfo(torch.float32).eps * self.mean.abs(), std, 1.0)

    @torch.no_grad()
    def update(self, targets: Tensor) -> None:
        """Merge a batch of targets [n], n at least 1."""
        past = Moments(self.count * self.decay, self.mean, self.m2 * self.decay)
        for held, merged in zip((self.count, self.mean, self.m2), past.merge(Moments.of(targets)), strict=True):
            held.copy_(merged)


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
        output_layer(network)
        self.network = network
        self.scale = ReturnScale() if scale is None else scale

    def forward(self, observations: Tensor) -> Tensor:
        """Give V(s) in reward units: [n, O] to [n]."""
        y = self.normalized(observations)
        return y * self.scale.std.to(y.dtype) + self.scale.mean.to(y.dtype)

    def normalized(self, observations: Tensor) -> Tensor:
        """Give the network's own output, (V(s) - mean) / std: [n, O] to [n]."""
        return self.network(observations).squeeze(-1)

    @torch.no_grad()
    def update_scale(self, targets: Tensor) -> Tensor:
        """Merge targets [n] into the scale, rescale the output layer so that V stays what it was, and give the targets
        as the network learns them, [n].

        Source: van Hasselt et al. 2016, proposition 1, https://arxiv.org/abs/1602.07714.
        """
        output = output_layer(self.network)
        old_mean, old_std = self.scale.mean.clone(), self.scale.std
        self.scale.update(targets)
        new_mean, new_std = self.scale.mean, self.scale.std
        output.weight.copy_(output.weight * (old_std / new_std))
        output.bias.copy_((old_std * output.bias.double() + old_mean - new_mean) / new_std)
        return ((targets.double() - new_mean) / new_std).to(targets.dtype)


def output_layer(network: nn.Module) -> nn.Linear:
    """Return the last module of a value network; ValueError if it is no Linear with one output and a bias."""
    *_, output = network.modules()
    if not isinstance(output, nn.Linear) or output.out_features != 1 or output.bias is None:
        raise ValueError(f"the value network ends in {output}; let it end in a Linear with one output and a bias.")
    return output


@torch.no_grad()
def parameter_vector(module: nn.Module) -> Tensor:
    """Copy the module's parameters, [p]."""
    return parameters_to_vector(module.parameters())


@torch.no_grad()
def assign_parameters(module: nn.Module, vector: Tensor) -> None:
    """Write vector [p] into the module's parameters, in place.

    torch.nn.utils.vector_to_parameters would make the parameters views of the vector.
    """
    parameters = list(module.parameters())
    for parameter, part in zip(parameters, vector.split([x.numel() for x in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))
