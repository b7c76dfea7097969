"""An agent as a checkpoint's manifest and tensors, and back."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from agents.checkpoint import CheckpointError, decode_space, encode_space
from agents.policy.networks import activation_key
from envs.vector import SnapshotError, VectorEnv

if TYPE_CHECKING:
    from agents.base import Agent

EXACT = "exact"
"""The manifest's "env_snapshot" where the environments were saved; else it says why they were not."""


def pack(agent: Agent) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Everything that an exact resume needs."""
    tensors = {f"policy.{name}": tensor for name, tensor in agent.policy.state_dict().items()}
    tensors |= {f"{agent.name}.{name}": tensor for name, tensor in agent.own_tensors().items()}
    policy_kwargs = dict(agent.policy_kwargs)
    if "activation_fn" in policy_kwargs:
        policy_kwargs["activation_fn"] = activation_key(policy_kwargs["activation_fn"])
    snapshot, tensors_of_envs = _pack_environments(agent)
    manifest = {
        "algorithm": agent.name,
        "policy_class": agent.policy_class.__name__,
        "policy_kwargs": policy_kwargs,
        "config": dataclasses.asdict(agent.config),
        "observation_space": encode_space(agent.observation_space),
        "action_space": encode_space(agent.action_space),
        "seed": agent.seed,
        "stream_seed": agent.stream_seed,
        "num_timesteps": agent.num_timesteps,
        "total_timesteps": agent._total_timesteps,
        "iteration": agent.iteration,
        "episodes": agent._episode_num,
        "episode_infos": list(agent.ep_info_buffer or ()),
        "stats_window_size": agent._stats_window_size,
        "metrics": {key: value for key, value in agent.last_metrics.items() if isinstance(value, (int, float))},
        **snapshot,
    }
    return manifest, tensors | tensors_of_envs


def unpack(agent: Agent, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Give a new agent without environments the stored counters, spaces and policy."""
    agent.observation_space = decode_space(manifest["observation_space"])
    agent.action_space = decode_space(manifest["action_space"])
    agent.stream_seed = manifest["stream_seed"]
    agent.num_timesteps, agent.iteration = manifest["num_timesteps"], manifest["iteration"]
    agent._total_timesteps, agent._episode_num = manifest["total_timesteps"], manifest["episodes"]
    agent.ep_info_buffer = deque(manifest["episode_infos"], maxlen=agent._stats_window_size)
    agent.ep_success_buffer = deque(maxlen=agent._stats_window_size)
    agent.last_metrics = manifest["metrics"]
    agent._setup_model()
    agent.policy.load_state_dict(with_prefix(tensors, "policy."))
    agent.load_own_tensors(with_prefix(tensors, f"{agent.name}."))


def restore_environments(agent: Agent, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put the agent's environments into the stored state, if one was stored for as many; else they begin anew."""
    assert agent.env is not None
    vector = agent.env.vector
    if manifest["env_snapshot"] != EXACT or vector.num_envs != len(tensors["episode.returns"]):
        return
    agent.observations = vector.restore(with_prefix(tensors, "env."))
    agent._last_obs = agent.observations.cpu().numpy()
    vector.blowups = manifest["blowups"]
    agent.running_episodes.returns.copy_(tensors["episode.returns"])
    agent.running_episodes.lengths.copy_(tensors["episode.lengths"])


def policy_class(algorithm: type[Agent], manifest: dict[str, Any]) -> type[BasePolicy]:
    """The policy class that a checkpoint names; CheckpointError if it is not one of the algorithm's own."""
    for known in algorithm.policy_aliases.values():
        if known.__name__ == manifest["policy_class"]:
            return known
    raise CheckpointError(
        f"This agent was made with the policy class {manifest['policy_class']}; "
        "give it again: load(path, custom_objects={'policy_class': ...})."
    )


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def with_suffix(path: str | os.PathLike[str]) -> Path:
    """path, with .zip if it has no suffix, as in SB3."""
    path = Path(path)
    return path if path.suffix else path.with_suffix(".zip")


def _origin(vector: VectorEnv) -> dict[str, Any]:
    """The id and arguments that make such environments again; no id where JSON cannot hold the arguments."""
    env_id, kwargs = vector.made_from.get("env_id"), vector.made_from.get("kwargs", {})
    try:
        json.dumps(kwargs)
    except TypeError:
        return {"env_id": None, "env_kwargs": {}}
    return {"env_id": env_id, "env_kwargs": kwargs}


def _pack_environments(agent: Agent) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if agent.env is None:
        return {"env_id": None, "env_kwargs": {}, "env_snapshot": "there were none"}, {}
    vector = agent.env.vector
    origin = _origin(vector)
    if agent.observations is None:
        return {**origin, "env_snapshot": "no episode had begun"}, {}
    try:
        snapshot = vector.snapshot()
    except SnapshotError as error:
        return {**origin, "env_snapshot": str(error)}, {}
    tensors = {f"env.{name}": tensor for name, tensor in snapshot.items()}
    tensors["episode.returns"] = agent.running_episodes.returns
    tensors["episode.lengths"] = agent.running_episodes.lengths
    return {**origin, "env_snapshot": EXACT, "blowups": vector.blowups}, tensors
