"""Optimizers by name, as configurations and checkpoints say them."""

from __future__ import annotations

import difflib
from typing import Any

from torch import optim
from torch.optim.optimizer import Optimizer, ParamsT

from agents.direction.adabound import AdaBound, AMSBound

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adabound": AdaBound,
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "amsbound": AMSBound,
    "rmsprop": optim.RMSprop,
    "sgd": optim.SGD,
}
"""Name -> class. SB3 gives eps = 1e-5 to torch.optim.Adam alone: comparisons set eps themselves."""


def make_optimizer(name: str, params: ParamsT, **settings: Any) -> Optimizer:
    """The optimizer of that name over params, with its own settings.

    Raises:
        ValueError: no optimizer has that name.
    """
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"give one of {', '.join(OPTIMIZERS)}."
        raise ValueError(f"there is no optimizer {name!r}; {hint}")
    return OPTIMIZERS[name](params, **settings)
