"""Natural-gradient and evolution-strategy agents for continuous control.

Importing this package imports nothing else: the public names, which are those of `agents.registry`, come with their
modules when they are first used. So a command can set its process up before PyTorch is imported.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which takes some of the time in which a Ctrl-C is not yet heard
if TYPE_CHECKING:
    from typing import Any

    from agents.registry import (
        COPOS,
        FOMAML,
        MAML,
        NPG,
        PES,
        PPO,
        REGISTRY,
        TRPO,
        Agent,
        CheckpointError,
        Reptile,
        load,
        load_sb3_policy,
    )

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


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("geodesic-rl")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from agents import registry

    return getattr(registry, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
