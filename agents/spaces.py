"""Spaces as JSON values, for checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces


def encode(space: spaces.Space) -> dict[str, Any]:
    """A Box, Discrete, MultiDiscrete or MultiBinary space as JSON values; others raise ValueError."""
    match space:
        case spaces.Box():
            bounds = {"low": _bound(space.low), "high": _bound(space.high)}
            return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
        case spaces.Discrete():
            return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
        case spaces.MultiBinary():
            return {"kind": "MultiBinary", "n": np.asarray(space.n).tolist()}
    raise ValueError(f"The space {space} cannot be stored; use a Box, Discrete, MultiDiscrete or MultiBinary space.")


def decode(value: dict[str, Any]) -> spaces.Space:
    """The space that `encode` was given."""
    match value["kind"]:
        case "Box":
            low, high = (np.asarray(value[name], dtype=value["dtype"]) for name in ("low", "high"))
            shape = tuple(value["shape"])
            return spaces.Box(np.broadcast_to(low, shape), np.broadcast_to(high, shape), dtype=low.dtype.type)
        case "Discrete":
            return spaces.Discrete(value["n"], start=value["start"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(value["nvec"], start=value["start"])
        case "MultiBinary":
            return spaces.MultiBinary(value["n"])
    raise ValueError(f"The stored space kind {value['kind']!r} is not known to this version; update geodesic-rl.")


def _bound(bound: np.ndarray) -> Any:
    """One number for equal bounds (Infinity is valid in Python's JSON), else all of them."""
    return float(bound.flat[0]) if bound.size and (bound == bound.flat[0]).all() else bound.tolist()
