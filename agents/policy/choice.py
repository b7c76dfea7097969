"""Policies as people choose them: by a name or a class, and keyword arguments as Stable-Baselines3 writes them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from stable_baselines3.common.torch_layers import FlattenExtractor

from agents.config import CommonConfig, checked, near
from agents.policy.networks import activation_key

OFF_IN_SB3 = (
    ("use_sde", False), ("sde_sample_freq", -1), ("rollout_buffer_class", None),
    ("rollout_buffer_kwargs", None), ("_init_setup_model", True),
)  # fmt: skip
"""Keyword arguments of SB3's algorithms, with the values at which they change nothing."""
OFF_IN_SB3S_POLICIES = (
    ("net_arch", None), ("use_sde", False), ("use_expln", False), ("full_std", True), ("squash_output", False),
    ("features_extractor_class", FlattenExtractor), ("features_extractor_kwargs", None),
    ("share_features_extractor", True), ("normalize_images", True),
)  # fmt: skip
"""Those of SB3's policies."""


def known_policy(algorithm: str, aliases: Mapping[str, type], base: type, policy: Any) -> Any:
    """Give the policy class of a name in aliases, or the class itself.

    Raises:
        ValueError: the name is not known, or the class no subclass of base, with which the algorithm works.
    """
    if isinstance(policy, str):
        if policy in aliases:
            return aliases[policy]
        images = policy in ("CnnPolicy", "MultiInputPolicy")
        end = f", for images or dicts; give one of {', '.join(aliases)}." if images else near(policy, aliases)
        raise ValueError(f"There is no policy {policy!r}{end}")
    if not (isinstance(policy, type) and issubclass(policy, base)):
        raise ValueError(
            f"policy is {policy!r}; {algorithm} takes {' or '.join(map(repr, aliases))}, or a subclass of "
            f"{base.__module__}.{base.__name__}."
        )
    return policy


def options_of(config: CommonConfig | type[CommonConfig], policy_class: Any) -> list[str]:
    """Name the policy's keyword arguments that are hyperparameters; without a critic there is none for one."""
    return [name for name in policy_class.options if name in config.names()]


def checked_kwargs(
    config: type[CommonConfig], policy_class: Any, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give policy_kwargs as the policy takes them, and those that are hyperparameters as these.

    Raises:
        ValueError: a name is not known, or the sizes of net_arch are none; other values are the hyperparameters' to
            check.
    """
    values = _optimizer_of(config, given)
    given = {name: value for name, value in given.items() if (name, value) not in OFF_IN_SB3S_POLICIES}
    options = [*options_of(config, policy_class), *policy_class.options_of_its_own]
    for unknown in given.keys() - set(options):
        raise ValueError(f"policy_kwargs has no {unknown!r}{near(unknown, options)}")
    if "activation_fn" in given:
        given["activation_fn"] = activation_key(given["activation_fn"])
    values |= {name: value for name, value in given.items() if name in config.names()}
    sizes = given.get("net_arch")
    if isinstance(sizes, list) and sizes and isinstance(sizes[0], dict):
        warnings.warn(f"net_arch is {sizes!r}; give the dict alone, net_arch={sizes[0]!r}.", stacklevel=4)
        sizes = given["net_arch"] = sizes[0]
    if isinstance(sizes, dict):
        parts = {"pi", "vf"} if "value_network" in options else {"pi"}
        if not sizes or sizes.keys() - parts:
            raise ValueError(f"net_arch is {sizes!r}; give a list, or a dict of {' and '.join(sorted(parts))}.")
        kind = config.annotations()["net_arch"]
        checks = {name: checked(f"net_arch[{name!r}]", sizes.get(name, ()), kind) for name in parts}
        values["net_arch"] = checks["pi"]
        given["net_arch"] = checks if "vf" in parts else checks["pi"]
    return given, values


def _optimizer_of(config: type[CommonConfig], given: dict[str, Any]) -> dict[str, Any]:
    """Take optimizer_class and optimizer_kwargs, which are hyperparameters here, out of policy_kwargs."""
    if "optimizer" not in config.names():
        return {}
    kind, values = given.pop("optimizer_class", None), dict(given.pop("optimizer_kwargs", None) or {})
    for unknown in values.keys() - {"eps", "final_lr"}:
        raise ValueError(f"optimizer_kwargs has {unknown!r}; give eps or final_lr; others are hyperparameters.")
    return values if kind is None else {"optimizer": kind.__name__.lower(), **values}
