"""Saving and loading: an agent as a checkpoint's manifest and tensors, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import gymnasium
import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import get_system_info
from torch import Tensor

from agents import checkpoint, noise
from agents.checkpoint import CheckpointError, Source, decode_space, encode_space, with_prefix
from agents.config import CommonConfig
from agents.failures import Failures
from agents.policy.base import named_as_in, uncompiled
from agents.policy.networks import activation_key
from envs.vector import SnapshotError, VectorEnv

SETTINGS = ("seed", "stats_window_size", "verbose", "tensorboard_log")
"""Arguments of an agent, beside its hyperparameters, that a checkpoint holds."""
SCHEDULES = ("learning_rate", "lr_schedule", "clip_range", "clip_range_vf")
"""What SB3's files hold as functions, which are replaced where they cannot be unpickled."""
EXACT = "exact"
"""The manifest's "env_snapshot" where the environments were saved; else it says why they were not."""
UNBEGUN = ("there were none", "no episode had begun")
"""Why there was nothing to save of them."""


class Stateful(Protocol):
    """A part of an algorithm that keeps something between updates."""

    def tensors(self) -> dict[str, Tensor]:
        """Give what it keeps."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        ...


def tensors_of(parts: Mapping[str, Stateful]) -> dict[str, Tensor]:
    """Give what parts keep, under their names."""
    return {f"{name}.{key}": x for name, part in parts.items() for key, x in part.tensors().items()}


def load_parts(parts: Mapping[str, Stateful], tensors: Mapping[str, Tensor]) -> None:
    """Take back what `tensors_of` gave."""
    for name, part in parts.items():
        part.load(with_prefix(tensors, f"{name}."))


@dataclasses.dataclass
class Begun:
    """Where an iteration began: what collecting changes, as it was. What is saved within it is this state."""

    counts: dict[str, Any]
    """Of the manifest."""
    snapshot: Callable[[], dict[str, Tensor]]
    """Of the environments; see `VectorEnv.mark`."""
    returns: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, agent: Any) -> Begun:
        """Take note of where an agent is."""
        episodes = agent.collector.episodes
        return cls(_counts(agent), agent.env.vector.mark(), episodes.returns.clone(), episodes.lengths.clone())


def _counts(agent: Any) -> dict[str, Any]:
    return {
        "num_timesteps": agent.num_timesteps,
        "episodes": agent._episode_num,
        "episode_infos": [_numbers(episode) for episode in agent.ep_info_buffer or ()],
        "episode_successes": [bool(success) for success in agent.ep_success_buffer or ()],
        "blowups": 0 if agent.env is None else agent.env.vector.blowups,
    }


class Saved:
    """What can be saved and loaded: an algorithm's name, Config and policies, a policy, counters, and a collector.

    An algorithm names its parts that keep more than these in `parts`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[CommonConfig]]
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]]
    config: Any
    policy: Any
    collector: Any

    def parts(self) -> dict[str, Stateful]:
        """Name what an exact resume needs beside policy and environments."""
        return {}

    def own_tensors(self) -> dict[str, Tensor]:
        """Give what the parts keep."""
        return tensors_of(self.parts())

    def load_own_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `own_tensors` gave."""
        load_parts(self.parts(), {name: tensor.to(self.policy.device) for name, tensor in tensors.items()})

    def save(self, path: Source, exclude: Any = None, include: Any = None) -> None:
        """Write a checkpoint from which training goes on exactly; see `agents.checkpoint`.

        Differs from SB3: nothing is pickled, and there is nothing to exclude or include. Within an iteration, as from
        SB3's CheckpointCallback, the state at its beginning is saved, since nothing was learned from the steps since:
        num_timesteps is that of then. Environments that cannot be put back exactly are left out, which a warning and
        the manifest's env_snapshot say: a resumed run begins new episodes in them.

        Args:
            path: the file, .zip being added to a name without suffix, in a folder that is made if there is none; or an
                open binary file.
            exclude: nothing.
            include: nothing.

        Raises:
            OSError: the file cannot be written; an earlier one is untouched.
            FloatingPointError: a value of the agent is not finite; an earlier file is untouched.
            ValueError: exclude or include names something.
        """
        if exclude or include:
            raise ValueError(f"{exclude or include} is not pickled, as nothing is; give neither exclude nor include.")
        target = with_suffix(path) if isinstance(path, (str, os.PathLike)) else path
        manifest, tensors = self._packed()
        if (reason := manifest["env_snapshot"]) not in (EXACT, *UNBEGUN):
            warnings.warn(f"What goes on from {target} is not exact: {reason}", NewEpisodes, stacklevel=2)
        if odd := checkpoint.not_finite(tensors):
            raise FloatingPointError(
                f"{target} is not written: values of {odd} are not finite. Training has diverged: scale the rewards "
                "(a few units per step), or lower the learning rates; what was saved before stays."
            )
        checkpoint.write(target, manifest, tensors)

    @classmethod
    def load(
        cls,
        path: Source,
        env: Any = None,
        device: Any = "auto",
        custom_objects: Mapping[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = False,
        **changed: Any,
    ) -> Self:
        """Make the agent that `save` wrote.

        Args:
            path: the file, which may go without its .zip, or an open binary file.
            env: environments to go on training in, with the stored spaces; None for an agent that only predicts. They
                are put into the stored state; where that cannot be, a warning says that new episodes begin.
            device: where the policy trains.
            custom_objects: {"policy_class": class} for an agent that was made with a policy class of one's own; others
                as if they were keyword arguments. Schedules of SB3's that the algorithm does not have are left out.
            print_system_info: as in SB3.
            force_reset: begin new episodes. Differs from SB3, where that is the default.
            **changed: in place of what is stored: hyperparameters, verbose, tensorboard_log, seed, stats_window_size.

        Raises:
            CheckpointError: the file is missing, damaged, or another algorithm's.
            ValueError: env has other spaces.
        """
        if print_system_info:
            get_system_info()
        return cls.unpacked(path, *checkpoint.read_agent(path), env, device, custom_objects, force_reset, **changed)

    @classmethod
    def unpacked(
        cls,
        path: Source,
        manifest: dict[str, Any],
        tensors: dict[str, Tensor],
        env: Any = None,
        device: Any = "auto",
        custom_objects: Mapping[str, Any] | None = None,
        force_reset: bool = False,
        **changed: Any,
    ) -> Self:
        """Make the agent that a checkpoint's manifest and tensors describe; arguments as for `load`."""
        if manifest.get("algorithm") != cls.name:
            raise CheckpointError(
                f"{path} holds an agent of the algorithm {str(manifest.get('algorithm'))[:60]!r}; load it with "
                "agents.load."
            )
        changed = cls._as_in_sb3(custom_objects or {}) | changed
        # What the caller changed may be what does not fit.
        with contextlib.nullcontext() if changed else checkpoint.damage_named(path):
            agent = cls._made(path, manifest, tensors, device, changed)
        if env is not None:
            agent.set_env(env)
            if not force_reset:
                agent._put_back(path, manifest, tensors)
        return agent

    @classmethod
    def _as_in_sb3(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Take what SB3's users, and rl-zoo3, give in place of the schedules of a file: 0 stands for one that is 0."""
        own = {name: value for name, value in given.items() if name in cls.Config.names() or name not in SCHEDULES}
        zero = {name: lambda _: 0.0 for name in cls.Config.scheduled() if isinstance(own.get(name), float | int)}
        return own | {name: schedule for name, schedule in zero.items() if own[name] == 0}

    @classmethod
    def _made(
        cls, path: Source, manifest: dict[str, Any], tensors: dict[str, Tensor], device: Any, changed: dict[str, Any]
    ) -> Any:
        """Make the agent, without environments."""
        policy_class = changed.pop("policy_class", None) or cls._policy_class(manifest)
        settings = {name: manifest[name] for name in SETTINGS if name in manifest}
        settings |= {name: changed.pop(name) for name in SETTINGS if name in changed}
        for name in set(manifest.get("schedules", ())) - changed.keys():
            warnings.warn(
                f"{name} had a schedule, which {path} does not hold: it stays at {manifest['config'][name]}. Give it "
                f"again, as load(path, {name}=...).",
                stacklevel=5,
            )
        kept = {name: value for name, value in manifest["policy_kwargs"].items() if name not in changed}
        agent: Any = cls(  # type: ignore[call-arg]
            policy_class,
            None,
            policy_kwargs=changed.pop("policy_kwargs", kept),
            device=device,
            **settings,
            **(dataclasses.asdict(cls.Config.of(manifest["config"])) | changed),
        )
        agent._unpack(manifest, tensors, reseeded=settings["seed"] != manifest["seed"])
        return agent

    @classmethod
    def _policy_class(cls, manifest: dict[str, Any]) -> type[BasePolicy]:
        """Find the policy class that a checkpoint names; CheckpointError if it is not one of the algorithm's own."""
        # The first checkpoints name the class, later ones the alias.
        named = {known.__name__: known for known in cls.policy_aliases.values()} | cls.policy_aliases
        if manifest["policy_class"] in named:
            return named[manifest["policy_class"]]
        raise CheckpointError(
            f"This agent was made with the policy class {manifest['policy_class']}; "
            "give it again: load(path, custom_objects={'policy_class': ...})."
        )

    def _packed(self: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Give everything that an exact resume needs."""
        snapshot, tensors_of_envs = self._packed_environments()  # first: it may put back what an algorithm has there
        tensors = {f"policy.{name}": tensor for name, tensor in uncompiled(self.policy.state_dict()).items()}
        tensors |= {f"{self.name}.{name}": tensor for name, tensor in self.own_tensors().items()}
        policy_kwargs = dict(self.policy_kwargs)
        if "activation_fn" in policy_kwargs:
            policy_kwargs["activation_fn"] = activation_key(policy_kwargs["activation_fn"])
        kind, aliases = self.policy_class, {known: alias for alias, known in self.policy_aliases.items()}
        manifest = {
            "algorithm": self.name,
            "policy_class": aliases.get(kind, f"{kind.__module__}.{kind.__qualname__}"),
            "policy_kwargs": policy_kwargs,
            "config": dataclasses.asdict(self.config),
            "observation_space": encode_space(self.observation_space),
            "action_space": encode_space(self.action_space),
            "schedules": list(self.schedules),
            "seed": self.seed,
            "stream_seed": self.stream_seed,
            "total_timesteps": self._total_timesteps,
            "iteration": self.iteration,
            "counter": self.counter,
            "stats_window_size": self._stats_window_size,
            "verbose": self.verbose,
            "tensorboard_log": self.tensorboard_log,
            "failures": [self.failures.updates, self.failures.in_a_row],
            "metrics": _numbers(self.last_metrics),
            **(_counts(self) if self.begun is None else self.begun.counts),
            **snapshot,
        }
        return manifest, tensors | tensors_of_envs

    def _unpack(self, manifest: dict[str, Any], tensors: dict[str, Tensor], reseeded: bool = False) -> None:
        """Give a new agent without environments the stored counters, spaces and policy, and unless it has a seed of its
        own the stored streams of random numbers.
        """
        agent: Any = self
        agent.observation_space = decode_space(manifest["observation_space"])
        agent.action_space = decode_space(manifest["action_space"])
        if not reseeded:
            agent.stream_seed = manifest["stream_seed"]
        agent.num_timesteps, agent.iteration = manifest["num_timesteps"], manifest["iteration"]
        agent.counter = manifest.get("counter", manifest["iteration"])  # the first checkpoints have none
        agent.failures = Failures(*manifest.get("failures", ()))
        agent._total_timesteps, agent._episode_num = manifest["total_timesteps"], manifest["episodes"]
        agent.ep_info_buffer = deque(manifest["episode_infos"], maxlen=agent._stats_window_size)
        agent.ep_success_buffer = deque(manifest.get("episode_successes", ()), maxlen=agent._stats_window_size)
        agent.last_metrics = manifest["metrics"]
        agent._setup_model()
        given, own = named_as_in(agent.policy, with_prefix(tensors, "policy.")), agent.policy.state_dict()
        for name in own.keys() | given.keys():
            if name not in given or name not in own or given[name].dtype != own[name].dtype:
                found, wanted = (f"of {x[name].dtype}" if name in x else "missing" for x in (given, own))
                raise CheckpointError(f"policy.{name} does not fit: in the file it is {found}, in the policy {wanted}.")
        agent.policy.load_state_dict(given)
        agent.load_own_tensors(with_prefix(tensors, f"{agent.name}."))

    def _packed_environments(self: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.env is None:
            return {"env_id": None, "env_kwargs": {}, "env_snapshot": UNBEGUN[0]}, {}
        vector, rewards = self.env.vector, _scale_of_rewards(self.env.normalize)
        origin = _origin(vector)
        begun = self.begun
        if begun is None and self.amid_iteration:
            return {**origin, "env_snapshot": "the agent was saved within an iteration that had not ended."}, rewards
        if begun is None and self.collector.observations is None:
            return {**origin, "env_snapshot": UNBEGUN[1]}, rewards
        try:
            snapshot = vector.snapshot() if begun is None else begun.snapshot()
        except SnapshotError as error:
            return {**origin, "env_snapshot": str(error)}, rewards
        tensors = {f"env.{name}": tensor for name, tensor in snapshot.items()}
        tensors["episode.returns"] = (begun or self.collector.episodes).returns
        tensors["episode.lengths"] = (begun or self.collector.episodes).lengths
        return {**origin, "env_snapshot": EXACT}, tensors

    def _put_back(self: Any, path: Source, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Do as `_restore_environments`; CheckpointError if the states are not as environments save them."""
        try:
            self._restore_environments(manifest, tensors)
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if hasattr(error, "raised_in"):  # an environment's own
                raise
            raise CheckpointError(
                f"{path} holds environments that cannot be put back ({type(error).__name__}: {str(error)[:200]}); use "
                "another checkpoint, or load with force_reset=True."
            ) from error

    def _restore_environments(self: Any, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Put the environments into the stored state, if one was stored for as many; else they begin anew."""
        vector, normalize = self.env.vector, self.env.normalize
        if normalize is not None and (held := with_prefix(tensors, "rewards.")):
            rms = normalize.ret_rms
            rms.mean, rms.var, rms.count = held["mean"].numpy(), held["var"].numpy(), held["count"].item()
        if manifest["env_snapshot"] == UNBEGUN[1] and self.seed is not None:
            self.env.seed(noise.seed_of(self.seed, "environments"))  # as they were for the agent that was saved
        if manifest["env_snapshot"] != EXACT:
            return self._begin_anew(manifest["env_snapshot"])
        if vector.num_envs != (n := len(tensors["episode.returns"])):
            return self._begin_anew(f"the states of {n} environments are stored, and these are {vector.num_envs}.")
        try:
            observations = vector.restore(with_prefix(tensors, "env."))
        except SnapshotError as error:
            return self._begin_anew(str(error))
        self.collector.begin(observations)
        self._last_obs = self.collector.observations.cpu().numpy()
        vector.blowups = manifest.get("blowups", 0)
        self.collector.episodes.returns.copy_(tensors["episode.returns"])
        self.collector.episodes.lengths.copy_(tensors["episode.lengths"])

    def _begin_anew(self, reason: str) -> None:
        if reason not in UNBEGUN:
            warnings.warn(f"New episodes begin: {reason}", NewEpisodes, stacklevel=5)


class NewEpisodes(UserWarning):
    """Training goes on, but not where the environments stood."""


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep numbers and texts, which JSON has."""
    return {name: value for name, value in values.items() if isinstance(value, (int, float, str))}


def _scale_of_rewards(normalize: Any) -> dict[str, Tensor]:
    """Give the statistics by which a VecNormalize scales rewards."""
    if normalize is None:
        return {}
    rms = normalize.ret_rms
    values = {"mean": rms.mean, "var": rms.var, "count": rms.count}
    return {f"rewards.{name}": torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}


def with_suffix(path: str | os.PathLike[str]) -> Path:
    """Add .zip to a path without a suffix, as SB3 does."""
    path = Path(path)
    return path if path.suffix else path.with_suffix(".zip")


def _origin(vector: VectorEnv) -> dict[str, Any]:
    """Give the id and arguments that make such environments again; no id where JSON cannot hold the arguments."""
    of_environments = hasattr(vector, "envs") or hasattr(vector, "env")
    made = vector.made_from or (_of_spec(vector.spec) if of_environments else {})
    try:
        kwargs = json.loads(json.dumps(made.get("kwargs", {}), default=lambda value: value.tolist()))
    except (TypeError, AttributeError):
        return {"env_id": None, "env_kwargs": {}}
    return {"env_id": made.get("env_id"), "env_kwargs": kwargs}


def _of_spec(spec: Any) -> dict[str, Any]:
    """Give the id and arguments of an environment that gymnasium.make made, unless it was wrapped afterwards."""
    if spec is None or any(wrapper.name != "Monitor" for wrapper in spec.additional_wrappers):
        return {}
    kwargs = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    registered = gymnasium.registry.get(spec.id)
    if registered is not None and registered.max_episode_steps != spec.max_episode_steps:
        kwargs["max_episode_steps"] = spec.max_episode_steps
    return {"env_id": spec.id, "kwargs": kwargs}
