"""Hyperparameters: declared once, in frozen dataclasses, and everything that is read from those declarations.

A field says its range where it is declared, and all ranges are checked here:

    target_kl: Annotated[float, above(0)] = 0.02
    gae_lambda: Annotated[float, between(0, 1)] = 0.95
    horizon: Annotated[int, at_least(1)] | None = None
    fisher: Literal["compatible", "kfac"] = "compatible"
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, Self

import numpy as np
import yaml

from envs.names import near

__all__ = [
    "SCHEDULED", "AgentConfig", "CommonConfig", "Range", "Schedule", "above", "at_least", "below", "between", "near",
    "preset_values",
]  # fmt: skip


@dataclass(frozen=True)
class Range:
    """Numbers that a field may have."""

    holds: Callable[[float], bool]
    words: str
    """What they are, after "a number" or "an integer"."""


def above(bound: float) -> Range:
    """Allow numbers above bound."""
    return Range(lambda value: value > bound, f"above {bound}")


def at_least(bound: float) -> Range:
    """Allow numbers from bound on."""
    return Range(lambda value: value >= bound, f"of at least {bound}")


def below(bound: float) -> Range:
    """Allow numbers below bound."""
    return Range(lambda value: value < bound, f"below {bound}")


def between(low: float, high: float) -> Range:
    """Allow numbers from low to high, both included."""
    return Range(lambda value: low <= value <= high, f"from {low} to {high}")


SCHEDULED = "may be a function of the share of training that remains, from 1 to 0"
"""Said in the annotation of a field that is read anew for each update: agents take SB3's schedules for it too."""
Schedule = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every agent has. Raises ValueError for values that are not possible."""

    num_envs: Annotated[int, at_least(1)] = 16
    """Environments stepped together, where the agent makes them itself."""
    n_steps: Annotated[int, at_least(1)] = 128
    """Environment steps per environment and iteration."""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """Discount per environment step."""
    net_arch: tuple[Annotated[int, at_least(1)], ...] = (64, 64)
    """Hidden layer sizes of policy and critic."""
    activation_fn: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    """Activation of the hidden layers."""
    normalize_observations: bool = True
    """Whether the policy normalizes the observations of a Box by their running mean and standard deviation."""

    def __post_init__(self) -> None:
        for name, annotation in self.annotations().items():
            object.__setattr__(self, name, checked(name, getattr(self, name), annotation))
        first, floor = (getattr(self, name, None) for name in ("log_std_init", "log_std_min"))
        if first is not None and floor is not None and first < floor:
            raise ValueError(
                f"log_std_init is {first}, below log_std_min, {floor}; give at least that, or a lower floor."
            )
        last = getattr(self, "log_std_end", None)
        if first is not None and last is not None and not (-math.inf if floor is None else floor) <= last <= first:
            raise ValueError(
                f"log_std_end is {last}; it is where a ceiling ends that falls from log_std_init, {first}, so give at "
                f"most that" + ("." if floor is None else f", and at least log_std_min, {floor}.")
            )

    def keys(self) -> list[str]:
        """Name the fields: with `[]` this makes `**config` keyword arguments."""
        return self.names()

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def require(self, name: str, holds: bool, allowed: str) -> None:
        """Raise ValueError, naming the field and what is allowed, unless holds; for what no range says."""
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}; give {allowed}.")

    @classmethod
    def names(cls) -> list[str]:
        """Name the fields, in their order."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    @cache
    def annotations(cls) -> dict[str, Any]:
        """Give each field's type with its range, in the fields' order."""
        hints = typing.get_type_hints(cls, include_extras=True)
        return {name: hints[name] for name in cls.names()}

    @classmethod
    @cache
    def scheduled(cls) -> list[str]:
        """Name the fields that may be schedules."""
        kinds = {name: _options(kind) for name, kind in cls.annotations().items()}
        return [
            name for name, parts in kinds.items() if any(SCHEDULED in getattr(x, "__metadata__", ()) for x in parts)
        ]

    @classmethod
    def without_schedules(cls, values: Mapping[str, Any]) -> tuple[dict[str, Schedule], dict[str, Any]]:
        """Take the schedules out of values; give them, and values with what each begins at in its place."""
        schedules = {name: x for name, x in values.items() if name in cls.scheduled() and callable(x)}
        first = {name: schedule(1.0) for name, schedule in schedules.items()}
        # One that warms up begins at 0, where the setting itself may not be.
        return schedules, {name: first.get(name, x) for name, x in values.items() if first.get(name, 1.0) > 0}

    def at(self, schedules: Mapping[str, Schedule], remaining: float) -> Self:
        """Give these with the values that schedules have when a share of training remains, which is cut to [0, 1]."""
        share, now = min(max(remaining, 0.0), 1.0), copy.copy(self)
        for name, schedule in schedules.items():
            value = float(schedule(share))
            if not 0 <= value < math.inf:
                raise ValueError(f"the schedule of {name} gives {value} at {share}; give one of numbers from 0 on.")
            object.__setattr__(now, name, value)  # 0 too, where a schedule ends
        return now

    @classmethod
    def of(cls, values: Mapping[str, Any], base: Self | None = None) -> Self:
        """Put values in place of base's own (None: the defaults'); unknown names and wrong values raise ValueError."""
        for name in values:
            if name not in cls.names():
                raise ValueError(f"{cls.__name__} has no hyperparameter {name!r}{near(name, cls.names())}")
        return dataclasses.replace(base or cls(), **values)

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """Give the fields as keyword-only parameters, for a constructor's signature."""
        kind = inspect.Parameter.KEYWORD_ONLY
        return [
            inspect.Parameter(field.name, kind, default=field.default, annotation=field.type)
            for field in dataclasses.fields(cls)
        ]


@dataclass(frozen=True, kw_only=True)
class AgentConfig(CommonConfig):
    """What agents have that sample their actions."""

    log_std_init: float = 0.0
    """Initial log standard deviation of Gaussian actions, in units of their bounds' half width."""
    value_network: Literal["mlp", "linear", "rbf", "quadratic"] = "mlp"
    """The critic's network: mlp, or linear in fixed features: linear, rbf or quadratic (products of two inputs)."""
    rbf_features: Annotated[int, at_least(1)] = 250
    """Random Fourier features of "RBFPolicy" and of the value network "rbf"."""


def checked(name: str, value: Any, annotation: Any) -> Any:
    """Return value as the declared type, where YAML or a caller wrote an equal one in another way.

    Raises:
        ValueError: it is of another type or outside the declared range; the message says what is allowed.
    """
    try:
        return _as_declared(value, annotation)
    except ValueError:
        options = [choice for part in _options(annotation) for choice in _choices(part)]
        if isinstance(value, str) and any(isinstance(choice, str) for choice in options):
            raise ValueError(f"There is no {name} {value!r}{near(value, options)}") from None
        raise ValueError(f"{name} is {value!r}; give {allowed(annotation)}.") from None


def allowed(annotation: Any) -> str:
    """Say what a field may be: "a number above 0, or None"."""
    return ", or ".join(_words(part) for part in _options(annotation))


def _options(annotation: Any) -> list[Any]:
    """List the types of a union; a type alone is its only one."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return list(typing.get_args(annotation)) if is_union else [annotation]


def _choices(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def _as_declared(value: Any, annotation: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    for option in _options(annotation):
        kind, ranges = _split(option)
        if choices := _choices(kind):
            if value in choices:
                return value
        elif typing.get_origin(kind) is tuple:
            if isinstance(value, (list, tuple)):
                return tuple(_as_declared(element, typing.get_args(kind)[0]) for element in value)
        elif kind in (type(None), bool, str):
            if isinstance(value, kind):
                return value
        elif isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool):
            number = kind(value)
            if math.isfinite(number) and all(one.holds(number) for one in ranges):
                return number
    raise ValueError


def _split(option: Any) -> tuple[Any, tuple[Range, ...]]:
    """Split an annotated type into the type and its ranges."""
    if typing.get_origin(option) is not Annotated:
        return option, ()
    kind, *extras = typing.get_args(option)
    return kind, tuple(extra for extra in extras if isinstance(extra, Range))


def _words(option: Any) -> str:
    kind, ranges = _split(option)
    words = " and ".join(one.words for one in ranges)
    if choices := _choices(kind):
        return " or ".join(map(repr, choices))
    if typing.get_origin(kind) is tuple:
        element, ranges = _split(typing.get_args(kind)[0])
        plural = {int: "integers", float: "numbers"}.get(element, "values")
        return " ".join(["a list of", plural, *(one.words for one in ranges)])
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return f"{names[kind]} {words}".strip()


_ALIKE = {"trpo": "npg"}
"""Algorithms whose presets are another's: TRPO is NPG with a line search."""


@cache
def _presets(algorithm: str) -> dict[str, dict[str, Any]]:
    file = resources.files("agents.presets") / f"{algorithm}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def preset_values(algorithm: str, env_id: str) -> dict[str, Any]:
    """Give the values in which a preset for an environment differs from the defaults; {} if there is none."""
    task = env_id.removeprefix("newton/")  # the same task by another solver
    return dict(_presets(_ALIKE.get(algorithm, algorithm)).get(task, {}))


def as_attribute(name: str) -> property:
    """Show a hyperparameter as an agent's attribute, as SB3's algorithms do."""

    def give(agent: Any) -> Any:
        return getattr(agent.current, name)

    def refuse(agent: Any, value: Any) -> None:
        if "config" in agent.__dict__:  # before that SB3 sets its own
            raise AttributeError(
                f"{name} is fixed when an agent is made; give it to {type(agent).__name__}(...) or load(..., "
                f"{name}=...), or a schedule where it shall change."
            )

    return property(give, refuse)
