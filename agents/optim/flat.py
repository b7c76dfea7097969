"""Modules' parameters as one vector, which an optimizer steps at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FlatParameters:
    """The parameters of some modules, moved into one vector [p] that they are views of from now on.

    An optimizer over `groups` changes the modules, by operations on whole vectors instead of many small tensors.
    State dicts and whatever writes parameters in place work as before. Parameters that have come to lie elsewhere, in
    a copy or by a conversion to another dtype and back, are moved into one vector again before the next gradient.

    Args:
        modules: whose parameters are moved, without parameters in common and on one device.

    Attributes:
        groups: the parameters of each module as one, [p_i].
        grad: the gradient [p] that the groups' gradients are views of.
    """

    grad: Tensor
    _addresses: list[int]
    """Where the parameters lie as long as they are tied; groups hold that memory."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._parameters = [parameter for module in modules for parameter in module.parameters()]
        self._sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
        vector = nn.utils.parameters_to_vector(self._parameters).detach()
        self.groups = [nn.Parameter(part) for part in vector.split(self._sizes)]
        self._tie()

    def differentiate(self, loss: Tensor) -> None:
        """Set grad to the loss's, of shape (); zero for parameters that it does not depend on.

        Raises:
            RuntimeError: the parameters have been moved to another dtype or device.
        """
        grads = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        if [parameter.data_ptr() for parameter in self._parameters] != self._addresses:
            self._tie()
        torch.cat([grad.flatten() for grad in grads], out=self.grad)

    def clip(self, max_norm: float) -> Tensor:
        """Cut a longer gradient to max_norm, and give the norm that it had.

        Raises:
            FloatingPointError: it is not finite. On a device, where asking would wait, it becomes zero instead; see
                `check_norm`.
        """
        norm = self.grad.norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if norm.device.type == "cpu":
            check_norm(norm.item())
            self.grad.mul_(scale)
        else:
            self.grad.copy_(torch.where(norm.isfinite(), self.grad * scale, 0.0))
        return norm

    def _tie(self) -> None:
        """Make parameters, groups and gradients views of two vectors, with the values that the parameters have."""
        vector = nn.utils.parameters_to_vector(self._parameters).detach()
        group = self.groups[0]
        if (vector.dtype, vector.device) != (group.dtype, group.device):
            raise RuntimeError(
                f"the parameters are {vector.dtype} on {vector.device} now, and what the optimizer keeps of them is "
                f"{group.dtype} on {group.device}; bring them back by .to(...), or make optimizer or agent anew."
            )
        nn.utils.vector_to_parameters(vector, self._parameters)
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        self.grad = torch.zeros_like(vector)
        for group, part, grad in zip(self.groups, vector.split(self._sizes), self.grad.split(self._sizes), strict=True):
            group.data, group.grad = part, grad

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy ties anew; deepcopy and pickle give it parameters of its own."""
        return {name: self.__dict__[name] for name in ("_parameters", "_sizes", "groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tie()


def check_norm(norm: float) -> None:
    """Raise FloatingPointError if a gradient's norm is not finite."""
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm}; this minibatch changed nothing. Look for huge rewards or observations, or "
            "give a smaller learning_rate."
        )
