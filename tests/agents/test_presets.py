"""Presets name real environments and hyperparameters, and differ from the defaults."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from importlib import resources

import gymnasium
import pytest
import yaml

import envs.mujoco  # registers the families of tasks
from agents import NPG, REGISTRY
from agents.config import preset_values
from agents.policy.base import warn_of_units
from envs import make_vec

FILES = [file for file in resources.files("agents.presets").iterdir() if file.name.endswith(".yaml")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_presets_are_valid_and_differ_from_the_defaults(file) -> None:
    algorithm = REGISTRY[file.name.removesuffix(".yaml")]
    defaults = algorithm.Config()
    for env_id, values in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        assert env_id in gymnasium.registry
        assert preset_values(algorithm.name, env_id) == values
        config = algorithm.preset(env_id)
        assert all(getattr(config, name) != getattr(defaults, name) for name in values)


def test_an_environment_without_a_preset_gets_the_defaults() -> None:
    for algorithm in REGISTRY.values():
        assert algorithm.preset("CartPole-v1") == algorithm.Config()
        assert preset_values(algorithm.name, "CartPole-v1") == {}


def test_trpo_has_npgs_presets_with_a_line_search() -> None:
    npg, trpo = (asdict(REGISTRY[name].preset("Swimmer-v5")) for name in ("npg", "trpo"))
    assert npg != asdict(REGISTRY["npg"].Config())
    assert trpo == npg | {"line_search": True}


@pytest.mark.parametrize("env_id", [*envs.mujoco.TASKS, *envs.mujoco.FAMILIES])
def test_no_policy_begins_far_from_a_tasks_actions(env_id: str) -> None:
    with warnings.catch_warnings(action="error"):
        warn_of_units(make_vec(env_id, 1).single_action_space)


def test_a_preset_is_given_as_keyword_arguments() -> None:
    for algorithm in REGISTRY.values():
        preset = algorithm.preset("CartPole-v1")
        assert {**preset} == asdict(preset)
    assert NPG("MlpPolicy", "Hopper-v5", **NPG.preset("Hopper-v5")).config == NPG.preset("Hopper-v5")


@pytest.mark.parametrize(("env_id", "words"), [("Hoper-v5", "Did you mean: `Hopper`"), ("Hopper-v99", "v99")])
def test_there_is_no_preset_for_an_environment_that_there_is_not(env_id: str, words: str) -> None:
    for algorithm in REGISTRY.values():
        with pytest.raises(gymnasium.error.UnregisteredEnv, match=words):
            algorithm.preset(env_id)
