"""Infos of vector environments: made when somebody reads them, and one environment's entries of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor


class LazyInfo(dict[str, Any]):
    """A dict whose entries are made when one is first looked for that is not there: nobody pays for unread infos."""

    make: Callable[[], dict[str, Any]] | None = None
    """Gives the entries; called once at most, at any time."""

    def _complete(self) -> dict[str, Any]:
        if self.make is not None:
            make, self.make = self.make, None
            for key, value in make().items():
                dict.setdefault(self, key, value)
        return self

    def __missing__(self, key: str) -> Any:
        if self.make is None:
            raise KeyError(key)
        return self._complete()[key]

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or dict.__contains__(self._complete(), key)

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _completed_first(method: Callable[..., Any]) -> Callable[..., Any]:
    def read(self: LazyInfo, *args: Any) -> Any:
        return method(self._complete(), *args)

    return read


for _name in ("__iter__", "__len__", "__eq__", "__or__", "__repr__", "keys", "values", "items", "copy", "pop"):
    setattr(LazyInfo, _name, _completed_first(getattr(dict, _name)))


def with_masks(values: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """Give values, and beside each the mask of the rows [n] that have it, as Gymnasium's vector environments do."""
    return {key: x for name, value in values.items() for key, x in ((name, value), (f"_{name}", rows.copy()))}


def step_info(
    where: Callable[[], dict[str, np.ndarray]],
    terms: dict[str, np.ndarray],
    ended: np.ndarray,
    began: dict[str, Any] | None,
) -> dict[str, Any]:
    """Put a step's info together as Gymnasium's vector environments do.

    Args:
        where: gives entries [n, ...] that a step and a reset tell.
        terms: those that a step alone tells.
        ended: [n], which environments ended.
        began: the info of the resets of those that ended and began anew within the step; None: none did.
    """
    told = where() | terms
    if began is None:
        return with_masks(told, np.ones(len(ended), dtype=bool))
    final = {name: _only(value, ended) for name, value in told.items()}
    info: dict[str, Any] = {"final_info": with_masks(final, ended), "_final_info": ended.copy()}
    for name, value in told.items():
        values, mask = _only(value, ~ended), ~ended
        if name in began:
            values[ended], mask = began[name], np.ones_like(ended)
        if mask.any():
            info |= {name: values, f"_{name}": mask}
    return info


def _only(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Keep some rows of values [n, ...], and 0 elsewhere."""
    kept = np.zeros_like(values)
    kept[rows] = values[rows]
    return kept


def spread(info: dict[str, Any], rows: np.ndarray, n: int) -> dict[str, Any]:
    """Give an info of some environments rows [k] as one of n, with 0 and False for the others."""

    def whole(values: Any) -> Any:
        if isinstance(values, dict):
            return spread(values, rows, n)
        kept = np.zeros((n, *values.shape[1:]), values.dtype)
        kept[rows] = values
        return kept

    return {name: whole(values) for name, values in info.items()}


def row_of(info: dict[str, Any], i: int) -> dict[str, Any]:
    """Pick environment i's entries of a vector environment's info."""
    row: dict[str, Any] = {}
    for key, value in info.items():
        mask = info.get(f"_{key}")
        is_mask = key[:1] == "_" and key[1:] in info
        if is_mask or key in ("final_obs", "final_info") or (mask is not None and not mask[i]):
            continue
        if isinstance(value, dict):
            row[key] = row_of(value, i)
        elif isinstance(value, Tensor):
            row[key] = value[i].tolist() if value.ndim == 1 else value[i].cpu().numpy()
        else:
            row[key] = value[i]
    return row


def plain(value: Any) -> Any:
    """Give NumPy's numbers and arrays in a value as Python's: they are logged and saved."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
