"""Hyperparameters: declared once, in frozen dataclasses, and everything that is read from those declarations."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Self

import yaml


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every agent has. Raises ValueError for values that are not possible."""

    num_envs: int = 16
    """Environments stepped together, where the agent makes them itself."""
    n_steps: int = 128
    """Environment steps per environment and iteration."""
    gamma: float = 0.99
    """Discount per environment step."""
    net_arch: tuple[int, ...] = (64, 64)
    """Hidden layer sizes of policy and critic."""
    activation_fn: str = "tanh"
    """Activation of the hidden layers: tanh, relu, elu, gelu or silu."""
    normalize_observations: bool = True
    """Whether the policy normalizes observations by their running mean and standard deviation."""

    def __post_init__(self) -> None:
        self.require("num_envs", self.num_envs >= 1, "an integer of at least 1")
        self.require("n_steps", self.n_steps >= 1, "an integer of at least 1")
        self.require("gamma", 0.0 <= self.gamma <= 1.0, "a number from 0 to 1")
        self.require("net_arch", all(size >= 1 for size in self.net_arch), "layer sizes of at least 1")

    def require(self, name: str, holds: bool, allowed: str) -> None:
        """Raise ValueError, naming the field and what is allowed, unless holds."""
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}; give {allowed}.")

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def of(cls, values: Mapping[str, Any], base: Self | None = None) -> Self:
        """base (the defaults: None) with values in place of its own; unknown names and wrong types raise ValueError."""
        annotations = typing.get_type_hints(cls)
        for name in values:
            if name not in annotations:
                raise ValueError(f"{cls.__name__} has no hyperparameter {name!r}{near(name, cls.names())}.")
        checked = {name: _as_type(name, value, annotations[name]) for name, value in values.items()}
        return dataclasses.replace(base or cls(), **checked)

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """The fields as keyword-only parameters, for a constructor's signature."""
        kind = inspect.Parameter.KEYWORD_ONLY
        return [
            inspect.Parameter(field.name, kind, default=field.default, annotation=field.type)
            for field in dataclasses.fields(cls)
        ]


@dataclass(frozen=True, kw_only=True)
class AgentConfig(CommonConfig):
    """What agents have that sample their actions."""

    log_std_init: float = 0.0
    """Initial log standard deviation of Gaussian actions."""
    value_network: str = "mlp"
    """The critic's network: mlp, or linear in fixed features: linear, rbf or quadratic (products of two inputs)."""
    rbf_features: int = 250
    """Random Fourier features of "RBFPolicy" and of the value network "rbf"."""
    rbf_bandwidth: float | None = None
    """ν of those features, in standard deviations of the observations; None takes the root of twice their number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("mlp", "linear", "rbf", "quadratic")
        self.require("value_network", self.value_network in kinds, f"one of {', '.join(kinds)}")
        self.require("rbf_features", self.rbf_features >= 1, "an integer of at least 1")
        bandwidth = self.rbf_bandwidth
        self.require("rbf_bandwidth", bandwidth is None or bandwidth > 0, "a number above 0, or None")


def _as_type(name: str, value: Any, expected: Any) -> Any:
    """value as the declared type, where YAML or a caller wrote an equal one in another way."""
    if typing.get_origin(expected) is tuple and isinstance(value, (list, tuple)):
        item = typing.get_args(expected)[0]
        return tuple(_as_type(name, element, item) for element in value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    options = typing.get_args(expected) or (expected,)
    kinds = tuple(option for option in options if isinstance(option, type))
    literals = [option for option in options if not isinstance(option, type)]
    fits = value in literals or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)))
    if not fits:
        raise ValueError(f"{name} is {value!r}; give a value of the type {_type_name(expected)}.")
    return value


def _type_name(expected: Any) -> str:
    return expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")


def near(name: str, known: list[str]) -> str:
    """How a sentence about an unknown name ends: with the near ones, or with all that are known."""
    matches = difflib.get_close_matches(name, known)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else f"; it has {', '.join(known)}"


_ALIKE = {"trpo": "npg"}
"""Algorithms whose presets are another's: TRPO is NPG with a line search."""


@cache
def _presets(algorithm: str) -> dict[str, dict[str, Any]]:
    file = resources.files("agents.presets") / f"{algorithm}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def preset_values(algorithm: str, env_id: str) -> dict[str, Any]:
    """The values in which an algorithm's preset for an environment differs from the defaults; {} if it has none."""
    return dict(_presets(_ALIKE.get(algorithm, algorithm)).get(env_id, {}))
