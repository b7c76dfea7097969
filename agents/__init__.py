"""Natural-gradient and evolution-strategy agents for continuous control."""

from __future__ import annotations

import os
from typing import Any

# PyTorch's idle threads spin on the cores that the physics needs; after this many turns (some 0.1 ms) they sleep. Read
# when PyTorch is first imported; whoever has set it keeps their value.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

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
