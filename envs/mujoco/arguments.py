"""The arguments of the MuJoCo tasks, which are Gymnasium's: checked before anything is simulated."""

from __future__ import annotations

import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

RANGES = {
    "reset_noise_scale": (0, 10**6),
    "frame_skip": (1, 10**6),
    "max_episode_steps": (1, 10**15),
    "num_threads": (0, 1024),
}


def check_arguments(env_id: str, kinds: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ValueError, which names argument, value and what it may be, for one of another type or out of its range.

    Args:
        env_id: of the environment.
        kinds: name -> declared type.
        values: name -> value; others than those of kinds are let be.
    """
    for name, value in values.items():
        low, high = RANGES.get(name, (-math.inf, math.inf))
        within = value is None or name not in RANGES or not _is_number(value) or low <= value <= high
        if name in kinds and not (_is(value, kinds[name]) and within):
            bounds = f" from {low} to {high:,}" if name in RANGES else ""
            raise ValueError(f"{env_id} was given {name}={value!r}; give {_words(kinds[name])}{bounds}.")


def _is(value: Any, kind: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if origin is tuple:
        if parts[-1] is ...:
            return isinstance(value, (list, tuple)) and all(_is_number(one) for one in value)
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(_is_number, value))
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return _is_number(value) and math.isfinite(value)
    return not isinstance(kind, type) or isinstance(value, kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def _words(kind: Any) -> str:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return "numbers" if parts[-1] is ... else f"{len(parts)} numbers"
    if parts:
        return " or ".join(map(_words, parts))
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", type(None): "none"}
    return words.get(kind, str(kind))
