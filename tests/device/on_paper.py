"""Counts the kernels and bytes of an update on the device made in Python, and what they would take on a GPU, on paper.

    PYTHONPATH=. python tests/device/on_paper.py

A kernel takes what its tensors' bytes take, once each, and 3 µs at least; within a graph half of that at least.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import sim_device as sim
import torch
from device_env import DeviceEnv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents import NPG, PES, Agent
from envs import make_vec

WORLDS, COUNTED = 4096, 64
"""Worlds that are spoken of, and that are computed with: bytes grow with them, kernels do not."""
KERNEL = 3e-6
"""Seconds of a small kernel."""
BANDWIDTHS = (3.4e12, 4.8e12)
"""Bytes a second: what is likely, and the data sheet's."""
NONE = {
    *("view", "expand", "select", "slice", "t", "transpose", "permute", "unsqueeze", "squeeze", "detach", "alias"),
    *("as_strided", "_unsafe_view", "split", "split_with_sizes", "unbind", "diagonal", "_reshape_alias", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "scalar_tensor", "_local_scalar_dense"),
}
"""Operations without a kernel."""


class Count(TorchDispatchMode):
    """Notes the bytes of each kernel, of as many worlds as are spoken of."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] not in NONE:
            tensors = {id(x): x for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)}
            sizes = (min(x.nbytes, sim.to_host(x).untyped_storage().nbytes()) for x in tensors.values())
            self.kernels.append(sum(sizes) * WORLDS / COUNTED)
        return found

    def told(self) -> str:
        took = [
            f"{1e3 * sum(max(least, bytes_ / width) for bytes_ in self.kernels):.2f} ms"
            for least in (KERNEL, KERNEL / 2)
            for width in BANDWIDTHS
        ]
        alone, graph = " / ".join(took[:2]), " / ".join(took[2:])
        return f"{len(self.kernels)} kernels, {sum(self.kernels) / 1e9:.1f} GB: {alone}, in a graph {graph}"


def counted(count: Count, work: Callable[..., Any]) -> Callable[..., Any]:
    """Give work that is counted."""

    def does(*args: Any, **kwargs: Any) -> Any:
        with count:
            return work(*args, **kwargs)

    return does


def count(kind: type[Agent], **settings: Any) -> None:
    """Count an update of an algorithm, at the third iteration."""
    inner = make_vec("HalfCheetah-v5", COUNTED, seed=0, autoreset="disabled", num_threads=1)
    agent: Any = kind(
        "MlpPolicy", DeviceEnv(inner, kind.autoreset, sim.NAME, sim.unseen), seed=0, device=sim.NAME, **settings
    )
    iterations = agent.iterations(10**9)
    for _ in range(2):
        next(iterations)
    parts = {name: Count() for name in ("update", "train") if hasattr(agent, name)}
    for name, part in parts.items():
        setattr(agent, name, counted(part, getattr(agent, name)))
    next(iterations)
    for name, part in parts.items():
        print(f"{kind.__name__}.{name} {settings}: {part.told()}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sim.install()
    print("milliseconds at", " / ".join(f"{width / 1e12:g} TB/s" for width in BANDWIDTHS))
    count(NPG, n_steps=32)
    count(NPG, n_steps=32, curvature_samples=32 * COUNTED // 16)
    count(PES, n_steps=20, net_arch=(64, 64))
