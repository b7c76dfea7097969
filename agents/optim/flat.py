"""Modules' parameters as one vector, which an optimizer steps at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FlatParameters:
    """The parameters of some modules, moved into one vector [p] that they are views of from now on.

    An optimizer over `groups` changes the modules, by operations on whole vectors instead of many small tensors.
    State dicts, copies and whatever writes parameters in place work as before; `.to` another dtype or device ends it.

    Args:
        modules: whose parameters are moved, without parameters in common and on one device.

    Attributes:
        groups: the parameters of each module as one, [p_i].
        grad: the gradient [p] that the groups' gradients are views of.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._parameters = [parameter for module in modules for parameter in module.parameters()]
        vector = nn.utils.parameters_to_vector(self._parameters).detach()
        nn.utils.vector_to_parameters(vector, self._parameters)
        self.grad = torch.zeros_like(vector)
        sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
        self.groups = [nn.Parameter(part) for part in vector.split(sizes)]
        for group, part in zip(self.groups, self.grad.split(sizes), strict=True):
            group.grad = part

    def differentiate(self, loss: Tensor) -> None:
        """Set grad to the loss's; zero for parameters that it does not depend on."""
        grads = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        torch.cat([grad.flatten() for grad in grads], out=self.grad)
