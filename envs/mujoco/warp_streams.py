"""The random numbers of episodes' beginnings by one kernel of Warp's, and the order of Warp's and PyTorch's work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat.torch as xp
import torch
import warp
from torch import Tensor

from envs.mujoco.tasks import FACTORS, GOLDEN, RandomStreams

_GOLDEN, _FIRST, _SECOND = (warp.constant(warp.uint64(x % 2**64)) for x in (GOLDEN, *FACTORS))


@warp.func
def _mix(z: warp.uint64) -> warp.uint64:
    z = (z ^ (z >> warp.uint64(30))) * _FIRST
    z = (z ^ (z >> warp.uint64(27))) * _SECOND
    return z ^ (z >> warp.uint64(31))


@warp.kernel
def _unit(
    seed: warp.array[warp.int64],
    episode: warp.array[warp.int64],
    first: int,
    unit: warp.array2d[warp.float64],
) -> None:
    i, j = warp.tid()
    key = _mix(_mix(warp.uint64(seed[i]) + _GOLDEN) + warp.uint64(episode[i]) * _GOLDEN)
    word = _mix(key + warp.uint64(first + j) * _GOLDEN) >> warp.uint64(11)
    unit[i, j] = warp.float64(word) * warp.float64(2.0**-53.0)


class WarpStreams(RandomStreams):
    """The numbers of `RandomStreams`, of which each draw is one kernel in place of twenty.

    Args:
        device: Warp's.
        seed, episode: [n] int64, not negative.
    """

    def __init__(self, device: warp.Device, seed: Tensor, episode: Tensor) -> None:
        self._device, self._seed, self._episode = device, seed, episode
        self._xp, self._position = xp, 1

    def uniform(self, low: Any, high: Any, size: int) -> Tensor:
        unit = torch.empty(len(self._seed), size, dtype=torch.float64, device=self._seed.device)
        given = [warp.from_torch(self._seed), warp.from_torch(self._episode), self._position, warp.from_torch(unit)]
        with in_order(self._device):
            warp.launch(_unit, unit.shape, given)
        self._position += size
        return low + (high - low) * unit


@contextmanager
def in_order(device: warp.Device) -> Iterator[tuple[warp.Stream | None, bool]]:
    """Have Warp's work within come after PyTorch's before it, and before PyTorch's after it.

    Gives Warp's stream, None on the CPU, and whether a graph of PyTorch's is being recorded, which it becomes part of.
    """
    if not device.is_cuda:
        with warp.ScopedDevice(device):
            yield None, False
        return
    others = warp.stream_from_torch(torch.cuda.current_stream(warp.device_to_torch(device)))
    if torch.cuda.is_current_stream_capturing():
        with warp.ScopedStream(others, sync_enter=False):
            warp.capture_begin(stream=others, external=True)
            try:
                yield others, True
            finally:
                warp.capture_end(stream=others)
        return
    own = device.stream
    own.wait_stream(others)
    with warp.ScopedStream(own):
        yield own, False
    others.wait_stream(own)
