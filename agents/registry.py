"""Every algorithm by its name, and `load`, which asks a checkpoint for the name."""

from __future__ import annotations

from typing import Any

from agents.base import Agent
from agents.checkpoint import CheckpointError, Source, read_manifest
from agents.copos import COPOS
from agents.meta import FOMAML, MAML, Reptile
from agents.npg import NPG, TRPO
from agents.pes import PES
from agents.policy.from_sb3 import load_sb3_policy
from agents.ppo import PPO

__all__ = [
    "COPOS",
    "FOMAML",
    "MAML",
    "NPG",
    "PES",
    "PPO",
    "REGISTRY",
    "TRPO",
    "Agent",
    "CheckpointError",
    "Reptile",
    "load",
    "load_sb3_policy",
]

REGISTRY: dict[str, type[Agent]] = {agent.name: agent for agent in (NPG, TRPO, COPOS, PPO, PES, Reptile, FOMAML, MAML)}
"""Name -> class of every algorithm; the commands read it."""


def load(path: Source, env: Any = None, **kwargs: Any) -> Agent:
    """Return the agent that a checkpoint holds, whatever its algorithm; arguments as for `Agent.load`."""
    name = str(read_manifest(path).get("algorithm"))
    if name not in REGISTRY:
        raise CheckpointError(
            f"{path} holds an agent of the algorithm {name[:60]!r}; this version has {', '.join(REGISTRY)}."
        )
    return REGISTRY[name].load(path, env, **kwargs)
