"""Between the host and a device: what crosses, in few copies, how long work there takes, and what is told only once.

A host that asks a device for a number waits until all work before it is done. What acts and trains asks seldom: for a
rollout's numbers, and for an update's, together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

RECORDS = "cuda"
"""The type of device that work is recorded for."""
EAGER = 2
"""Turns before work is recorded: by then all is compiled and allocated."""


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


class Recorded:
    """Work on a device; on CUDA, after some turns, recorded as a graph and launched as a whole from then on.

    Args:
        work: reads and writes tensors of fixed addresses, and asks the device for nothing. What it gives is of the last
            turn, and overwritten by the next.
        read: lists those that may come to lie elsewhere, upon which it is recorded anew.
    """

    def __init__(self, work: Callable[..., Any], read: Callable[[], list[Tensor]]) -> None:
        self.work, self.read = work, read
        self.turns, self.graph, self.found = 0, None, None
        self._given: tuple[Tensor | None, ...] = ()
        self._addresses: list[int] = []

    def __call__(self, *given: Tensor | None) -> Any:
        """Do it; given are tensors that are others in each turn."""
        tensors = self.read() if self.turns >= EAGER else []
        self.turns += 1
        if not tensors or tensors[0].device.type != RECORDS:
            return self.work(*given)
        places = self._given or (None,) * len(given)
        self._given = tuple(None if x is None else held(place, x) for place, x in zip(places, given, strict=True))
        addresses = [x.data_ptr() for x in (*tensors, *self._given) if x is not None]
        if addresses != self._addresses:
            self._addresses, self.graph = addresses, self._record()
        if self.graph is None:
            return self.work(*self._given)
        self.graph.replay()
        return self.found

    def _record(self) -> Any:
        """Give the graph of the work, or None where it cannot be recorded."""
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as MuJoCo Warp's own
                self.found = self.work(*self._given)
        except RuntimeError as error:
            warnings.warn(
                f"a GPU is told its work kernel by kernel, for there is no graph of it: {error}", stacklevel=2
            )
            return None
        return graph

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"turns": 0, "graph": None, "found": None, "_given": (), "_addresses": []}


def memory(module: nn.Module) -> list[Tensor]:
    """List a module's tensors: parameters, buffers, and what else its parts hold."""
    others = [x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor)]
    return [*module.parameters(), *module.buffers(), *others]


def held(where: Tensor | None, value: Tensor) -> Tensor:
    """Copy a value to where earlier ones of its shape were, or to a new place."""
    if where is None or (where.shape, where.dtype, where.device) != (value.shape, value.dtype, value.device):
        with torch.inference_mode(False):
            where = torch.empty_like(value)
    return where.copy_(value)
