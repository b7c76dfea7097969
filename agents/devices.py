"""Between the host and a device: what crosses, in few copies, and how long work there takes.

A host that asks a device for a number waits until all work before it is done. What acts and trains asks seldom: for a
rollout's numbers, and for an update's, together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def resolved(device: torch.device | str) -> torch.device:
    """Give the device with its index: "cuda" and "cuda:0" are one."""
    return torch.empty(0, device=device).device


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor of the host to a device without waiting for it; itself where it is there already."""
    if tensor.device.type != "cpu" or torch.device(device).type == "cpu":
        return tensor.to(device)
    held = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return held.to(device, non_blocking=True)


def fetched(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Bring tensors of one device to the host in one copy, which waits for the device."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return dict(tensors)
    of_dtype: dict[torch.dtype, list[Any]] = {}
    for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
        of_dtype.setdefault(tensors[name].dtype, []).append(name)
    # As bytes, the widest numbers first, so that each lies where its type may.
    flat = [torch.cat([tensors[name].detach().flatten() for name in names]) for names in of_dtype.values()]
    host = torch.cat([part.view(torch.uint8) for part in flat]).cpu()
    found: dict[Any, Tensor] = {}
    for names, part in zip(of_dtype.values(), host.split([part.nbytes for part in flat]), strict=True):
        values = part.view(tensors[names[0]].dtype).split([tensors[name].numel() for name in names])
        found |= {name: value.view(tensors[name].shape) for name, value in zip(names, values, strict=True)}
    return {name: found[name] for name in tensors}


class Instant:
    """A point among the work of a device, which the host does not wait for. The difference of two is in seconds, once
    the device has passed them.
    """

    def __init__(self, device: torch.device) -> None:
        self.event = torch.Event(device, enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        return earlier.event.elapsed_time(self.event) / 1e3
