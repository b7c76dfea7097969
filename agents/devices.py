"""Between the host and a device: what crosses, in few copies, and how long work there takes.

A host that asks a device for a number waits until all work before it is done. What acts and trains asks seldom: for a
rollout's numbers, and for an update's, together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
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


def fetched(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors of one device to the host in one copy, which waits for the device."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return dict(tensors)
    of_dtype: dict[torch.dtype, list[str]] = {}
    for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
        of_dtype.setdefault(tensors[name].dtype, []).append(name)
    # As bytes, the widest numbers first, so that each lies where its type may.
    flat = [torch.cat([tensors[name].detach().flatten() for name in names]) for names in of_dtype.values()]
    host = torch.cat([part.view(torch.uint8) for part in flat]).cpu()
    found: dict[str, Tensor] = {}
    for names, part in zip(of_dtype.values(), host.split([part.nbytes for part in flat]), strict=True):
        values = part.view(tensors[names[0]].dtype).split([tensors[name].numel() for name in names])
        found |= {name: value.view(tensors[name].shape) for name, value in zip(names, values, strict=True)}
    return {name: found[name] for name in tensors}


class Stopwatch:
    """Times the parts of an iteration: by the host's clock, or where a device works by events among its work.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []
        self._before: list[Any] = []

    def mark(self) -> None:
        """End a part, and begin the next one."""
        if self.device.type == "cpu":
            self._marks.append(time.perf_counter())
        else:
            self._marks.append(torch.Event(self.device, enable_timing=True))
            self._marks[-1].record()

    def read(self) -> list[float]:
        """Give the parts' seconds and begin anew; on a device those of the last time, since these are not over yet."""
        marks, self._marks = self._marks, []
        if self.device.type == "cpu":
            return [last - first for first, last in pairwise(marks)]
        marks, self._before = self._before, marks
        return [first.elapsed_time(last) / 1e3 for first, last in pairwise(marks)]
