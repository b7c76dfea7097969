"""What a worker is: the place where shards lie and are worked on, and how tensors go there and back."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.cluster.executor import Held, Work

PACKAGES = ("torch", "numpy", "mujoco", "gymnasium", "geodesic-rl")


class Call(NamedTuple):
    """Something to be done to a shard."""

    work: Work
    shared: Any
    """The arguments of all shards, or where they lie in the cluster."""
    own: tuple[Any, ...]


class About(NamedTuple):
    """Where a worker is."""

    node: str
    pid: int
    arithmetic: str


class Desk:
    """Shards by number, in a process of its own."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        register_tensors()
        self._held: dict[int, Held] = {}
        self._failed: dict[int, Exception] = {}

    def about(self, make: bytes | None) -> About:
        """Say where this is, once it has imported what a shard is made by: the others need not wait for that."""
        import ray

        if make is not None:
            with contextlib.suppress(Exception):  # `do` tells it
                pickle.loads(make)
        return About(ray.get_runtime_context().get_node_id(), os.getpid(), arithmetic())

    def take(
        self, number: int, make: bytes, state: Any, works: list[tuple[Work, tuple[Any, ...]]], *shared: Any
    ) -> None:
        """Make a shard, in a state if there is one, and repeat what was done to it since; errors are told by `do`."""
        self.drop(number)
        try:
            held: Held = pickle.loads(make)()
            if state is not None:
                held.restore(state)
            for (work, own), common in zip(works, shared, strict=True):
                work(held, *common, *own)
            self._held[number] = held
        except Exception as error:  # whatever the shards' code raises
            self._failed[number] = error

    def do(self, number: int, work: Work, shared: tuple[Any, ...], own: tuple[Any, ...]) -> Any:
        """Do work on a shard; gives the result."""
        if number in self._failed:
            raise self._failed[number]
        return work(self._held[number], *shared, *own)

    def drop(self, number: int) -> None:
        """Forget a shard."""
        self._held.pop(number, None)
        self._failed.pop(number, None)


def register_tensors() -> None:
    """Have Ray carry tensors as arrays, in a tenth of the time."""
    import ray

    ray.util.register_serializer(Tensor, serializer=_array, deserializer=_tensor)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _tensor(array: np.ndarray) -> Tensor:
    # What lies in the cluster's shared memory is not to be written to.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def arithmetic() -> str:
    """Name the versions here and what this kind of processor makes of some fixed sums and products: shards have the
    same bits where this is the same.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sha = hashlib.sha256()
    for n, m, dtype in ((7, 64, torch.float32), (32, 64, torch.float32), (17, 33, torch.float64)):
        x = torch.sin(torch.arange(n * m, dtype=dtype)).view(n, m)
        for y in (x @ x.T, x.T @ x, x.exp(), x.tanh(), x.sum(0), torch.baddbmm(x[None, :1], x[None, :, :n], x[None])):
            sha.update(y.contiguous().numpy().tobytes())
    torch.set_num_threads(threads)
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # run from its folder
            versions.append(f"{name} from a folder")
    return f"{', '.join(versions)}, sums {sha.hexdigest()[:8]}"
