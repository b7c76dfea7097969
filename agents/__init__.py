"""Natural-gradient and evolution-strategy agents for continuous control."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

# PyTorch's idle threads spin on the cores that the physics needs; after this many turns (some 0.1 ms) they sleep. Read
# when PyTorch is first imported; whoever has set it keeps their value.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Intel's BLAS adds up in an order that depends on where in memory a matrix lies, unless it is strict: a resumed run
# would round otherwise than one that was not interrupted. Read at the first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from agents.base import Agent
from agents.checkpoint import CheckpointError, read
from agents.meta import FOMAML, MAML, Reptile
from agents.npg import NPG, TRPO
from agents.pes import PES
from agents.ppo import PPO

__all__ = ["FOMAML", "MAML", "NPG", "PES", "PPO", "REGISTRY", "TRPO", "Agent", "CheckpointError", "Reptile", "load"]

REGISTRY: dict[str, type[Agent]] = {agent.name: agent for agent in (NPG, TRPO, PPO, PES, Reptile, FOMAML, MAML)}
"""Name -> class of every algorithm; the commands read it."""


def load(path: str | os.PathLike[str], env: Any = None, **kwargs: Any) -> Agent:
    """The agent that a checkpoint holds, whatever its algorithm; arguments as for `Agent.load`."""
    name = read(path)[0]["algorithm"]
    if name not in REGISTRY:
        raise CheckpointError(
            f"{path} holds an agent of the algorithm {name!r}; this version has {', '.join(REGISTRY)}."
        )
    return REGISTRY[name].load(path, env, **kwargs)


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones.

    It gives the memory of an update, some dozen MiB, back to the system and takes it again page by page: up to 29,000
    page faults an update, which then takes twice as long. Whoever has set one of glibc's own variables keeps their way.
    """
    set_already = os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not set_already else None
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # <malloc.h>
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)


_keep_freed_memory()
