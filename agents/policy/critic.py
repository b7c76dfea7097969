"""Value functions, and the scale of their targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReturnScale(nn.Module):
    """Running mean and standard deviation of value targets; count, mean and M2 are float64 buffers.

    Batches are merged by Chan's formula. Before each merge the past loses the share 1 - decay of its weight, because
    the targets move with the policy: a cumulative mean would trail behind by half the training. There is no absolute
    epsilon: rewards in other units give the same normalized targets (bit for bit, if the factor is a power of two).
    A standard deviation that float32 cannot tell from zero beside the mean counts as zero, and the scale is then 1.

    Args:
        decay: what an update leaves of the past's weight, in (0, 1]; 1 is cumulative.

    Source: Chan, Golub & LeVeque 1983 (the pairwise update), https://doi.org/10.1080/00031305.1983.10483115.
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
        """The standard deviation, or 1 where there is none; a float64 scalar."""
        std = (self.m2 / self.count).sqrt()
        return torch.where(std > torch.finfo(torch.float32).eps * self.mean.abs(), std, 1.0)

    @torch.no_grad()
    def update(self, targets: Tensor) -> None:
        """Merge a batch of targets [n], n at least 1."""
        batch = targets.double()
        mean = batch.mean()
        self.count *= self.decay
        self.m2 *= self.decay
        total = self.count + len(batch)
        shift = mean - self.mean
        self.m2 += (batch - mean).square().sum() + shift.square() * self.count * len(batch) / total
        self.mean += shift * len(batch) / total
        self.count.copy_(total)

    def normalize(self, targets: Tensor) -> Tensor:
        """(targets - mean) / std, in the targets' dtype."""
        return ((targets.double() - self.mean) / self.std).to(targets.dtype)

    def denormalize(self, outputs: Tensor) -> Tensor:
        """outputs * std + mean, in the outputs' dtype."""
        return outputs * self.std.to(outputs.dtype) + self.mean.to(outputs.dtype)


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
        """V(s) in reward units: [n, O] -> [n]."""
        return self.scale.denormalize(self.normalized(observations))

    def normalized(self, observations: Tensor) -> Tensor:
        """The network's own output, (V(s) - mean) / std: [n, O] -> [n]."""
        return self.network(observations).squeeze(-1)

    @torch.no_grad()
    def update_scale(self, targets: Tensor) -> None:
        """Merge targets [n] into the scale and rescale the output layer, so that V stays what it was.

        Source: van Hasselt et al. 2016, proposition 1, https://arxiv.org/abs/1602.07714.
        """
        output = output_layer(self.network)
        old_mean, old_std = self.scale.mean.clone(), self.scale.std
        self.scale.update(targets)
        new_mean, new_std = self.scale.mean, self.scale.std
        output.weight.copy_(output.weight * (old_std / new_std))
        output.bias.copy_((old_std * output.bias.double() + old_mean - new_mean) / new_std)


def output_layer(network: nn.Module) -> nn.Linear:
    """Return the last module of a value network; ValueError if it is no Linear with one output and a bias."""
    *_, output = network.modules()
    if not isinstance(output, nn.Linear) or output.out_features != 1 or output.bias is None:
        raise ValueError(f"the value network ends in {output}; let it end in a Linear with one output and a bias.")
    return output
