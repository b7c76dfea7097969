"""Stable-Baselines3's own tests with our classes in place of its PPO and A2C, and what fails, by cause.

    python tests/peers/sb3.py stable-baselines3/tests

Its tests are read from a folder that you give, of the version that is installed; they are not part of its wheel, and
none is copied here. They import pandas and ale_py. A test counts if it makes one of our agents. Not run with our own.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import causes
import stable_baselines3

sys.path.insert(0, str(Path(__file__).parents[2]))

from agents import NPG, PPO, Agent

OTHERS = {stable_baselines3.SAC, stable_baselines3.TD3, stable_baselines3.DQN, stable_baselines3.DDPG}

CAUSES = {
    "images and dicts of observations are refused": ("'CnnPolicy'", "'MultiInputPolicy'", "features_extractor_class"),
    "a VecNormalize of observations is refused: that is the policy's": ("this VecNormalize normalizes observations",),
    "state-dependent exploration and squashed actions are refused": ("use_expln", "squash_output", "use_sde"),
    "optimizers are refused that have no name here, or that the algorithm has not": (
        "optimizer_class", "optimizer_kwargs", "There is no optimizer",
    ),
    "agents are saved, not policies, and without pickle, so there is nothing to include": (
        "Save the agent", "give neither exclude nor include", "test_load_invalid_object",
    ),
    "set_env takes another number of environments": (r"test_set_env.*DID NOT RAISE AssertionError",),
    "SB3 has an AssertionError where we have a sentence": (
        "clip_range_vf is -0.2", "batch_size is 1; give", r"MultiBinary\(\(2, 3\)\) is not supported",
    ),
    "its own policies, rollout buffers and schedule objects are looked into": (
        "CustomPolicy", "test_custom_rollout_buffer", "lr_schedule", "test_save_load_clip_range_portable",
        "test_save_load_backward_compatible", "no attribute 'net_arch'",
    ),
}  # fmt: skip


class AdaptedPPO(causes.Adapted, PPO):
    """PPO for PPO."""


class AdaptedNPG(causes.Adapted, NPG):
    """NPG for A2C, whose own hyperparameters it has not, with rollouts nearly as short."""

    def __init__(self, policy: Any, env: Any, **keywords: Any) -> None:
        known = {*NPG.Config.names(), *inspect.signature(Agent.__init__).parameters, "use_sde"}
        keywords = {"n_steps": 8} | {name: value for name, value in keywords.items() if name in known}
        super().__init__(policy, env, **keywords)


PLUGIN = causes.Chooses(CAUSES, {AdaptedPPO, AdaptedNPG}, OTHERS, "PPO|A2C")


def main() -> int:
    asked = causes.parse(__doc__, "Stable-Baselines3")
    stable_baselines3.PPO, stable_baselines3.A2C = AdaptedPPO, AdaptedNPG
    return causes.run(PLUGIN, "agents", [asked.tests], asked.tests, asked.k)


if __name__ == "__main__":
    sys.exit(main())
