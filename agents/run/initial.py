"""Training that begins from a saved agent's policy (--init-from), on the same or another task, algorithm or reward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from agents import Agent, checkpoint
from agents.checkpoint import decode_space, with_prefix
from agents.policy.choice import options_of
from agents.policy.from_sb3 import SB3Policy, is_sb3, load_sb3_policy
from agents.run.errors import UsageError
from agents.run.folder import checkpoint_file

ONLY_AT_THE_BEGINNING = ("log_std_init",)
"""Hyperparameters of a policy whose effect its parameters hold."""


@dataclass(frozen=True)
class Initial:
    """A saved agent that another one begins from: with its policy, its observation statistics and, if it fits, its
    critic. Counters, optimizers and curvature begin anew.
    """

    name: str
    """As it was typed."""
    file: Path
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, name: str) -> Self | SB3Policy:
        """Read a checkpoint, the last one of a run's folder, or a file of Stable-Baselines3's.

        Raises:
            CheckpointError, RunError: there is none.
        """
        file = checkpoint_file(name, best=False)
        if is_sb3(file):
            return load_sb3_policy(file)
        return cls(name, file, *checkpoint.read_agent(file))

    def policy(self, algorithm: type[Agent]) -> str | None:
        """Name its kind of policy, if the algorithm has one of that name."""
        kind = self.manifest["policy_class"]
        return kind if kind in algorithm.policy_aliases else None

    def shape(self, algorithm: type[Agent], policy: str | None) -> dict[str, Any]:
        """Give its hyperparameters that shape a policy."""
        kind = algorithm.policy_aliases.get(policy or next(iter(algorithm.policy_aliases)))
        names = [] if kind is None else options_of(algorithm.Config, kind)
        known = self.manifest["config"]
        return {name: known[name] for name in names if name in known and name not in ONLY_AT_THE_BEGINNING}

    def give(self, agent: Agent) -> str:
        """Give the agent its policy; returns a sentence for people.

        Raises:
            UsageError: the spaces are others, or the policies have other parameters.
        """
        for name in ("observation_space", "action_space"):
            own, theirs = getattr(agent, name), decode_space(self.manifest[name])
            if own != theirs:
                raise UsageError(f"--init-from is {self.name!r}, whose {name} is {theirs}; the environment's is {own}.")
        if getattr(agent.config, "trials", ()):
            raise UsageError("--init-from does not go with trials, which begin anew; give --trials without numbers.")
        own, given = agent.policy.state_dict(), with_prefix(self.tensors, "policy.")
        odd = [key for key, x in own.items() if key not in given or given[key].shape != x.shape]
        if any(not key.startswith("critic.") for key in odd):
            kinds = f"a {self.manifest['policy_class']} of {self.manifest['algorithm']}"
            raise UsageError(
                f"--init-from is {self.name!r}, {kinds} whose parameters are others: {odd[0]} does not fit; leave out "
                "--policy and what shapes networks, or take its algorithm."
            )
        fits = {key: given[key] for key in own if not (odd and key.startswith("critic."))}
        agent.set_parameters({"policy": own | fits})
        came = f"{self.manifest['algorithm']} on {self.manifest['env_id'] or 'an environment without an id'}"
        critic = "; its critic does not fit and begins anew" if odd else ""
        return f"begins from {self.file} ({came}, {self.manifest['num_timesteps']:,} steps){critic}"
