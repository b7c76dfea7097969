"""Policies out of Stable-Baselines3's files, of which nothing is unpickled.

Of such a zip two members are read: the JSON of its settings, whose pickled parts stay texts, and the tensors of its
policy, by PyTorch's loader of weights alone, once their list has been seen to name nothing but tensors.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.checkpoint import CheckpointError, StrPath, damage_named, find, not_finite, zipped
from agents.config import CommonConfig
from agents.policy.choice import options_of
from agents.policy.networks import ACTIVATIONS

SETTINGS, WEIGHTS, VERSION = "data", "policy.pth", "_stable_baselines3_version"
POLICIES = "stable_baselines3.common.policies"
"""SB3's module of the policies whose networks are known."""
SETTINGS_BYTES, LIST_BYTES = 2**22, 2**20
NAMED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
"""What the list of a policy's tensors is written with."""
LAYER = re.compile(r"mlp_extractor\.(policy|value)_net\.(\d+)\.(weight|bias)")
MOST_LAYERS = 100


@dataclass(frozen=True)
class SB3Policy:
    """The policy of an agent of Stable-Baselines3's PPO or A2C, or of sb3-contrib's TRPO."""

    file: Path
    num_timesteps: int
    """That it was trained for."""
    parameters: dict[str, Tensor]
    """Under the names that they have in policies of this package."""
    net_arch: dict[str, tuple[int, ...]]
    """Hidden layer sizes, {"pi": sizes, "vf": sizes}."""
    activation_fn: str
    described: dict[str, Any]
    """What the file says of its spaces."""
    normalizes: bool
    """Whether the statistics of a VecNormalize are among the parameters."""

    @property
    def policy_kwargs(self) -> dict[str, Any]:
        """Give what makes a policy of its shape: NPG("MlpPolicy", env, policy_kwargs=...)."""
        own = {"activation_fn": self.activation_fn, "normalize_observations": self.normalizes}
        return {"net_arch": dict(self.net_arch), **own}

    def policy(self, algorithm: Any) -> str | None:
        """Name its kind of policy, if the algorithm has it."""
        return "MlpPolicy" if "MlpPolicy" in algorithm.policy_aliases else None

    def shape(self, algorithm: Any, policy: str | None) -> dict[str, Any]:
        """Give the hyperparameters of an algorithm that shape its policy."""
        config: type[CommonConfig] = algorithm.Config
        names = options_of(config, algorithm.policy_aliases[policy]) if policy in algorithm.policy_aliases else []
        known = self.policy_kwargs | {"net_arch": self.net_arch["pi"]}
        return {name: value for name, value in known.items() if name in names}

    def give(self, agent: Any) -> str:
        """Give the agent its parameters; returns a sentence for people. A critic of another shape begins anew.

        Raises:
            ValueError: the spaces are others, or the agent's policy is of another shape.
        """
        for name in ("observation_space", "action_space"):
            self._check_space(name, getattr(agent, name))
        own, given = agent.policy.state_dict(), self.parameters
        odd = [name for name in own if name in given and given[name].shape != own[name].shape]
        odd += [name for name in own if name not in given and not name.startswith(("critic.scale.", "normalizer."))]
        same = agent.policy.normalize_observations is self.normalizes
        if not same or any(not name.startswith("critic.") for name in odd):
            raise ValueError(
                f"The policy of {self.file} is of another shape than the agent's; make the agent with "
                f'"MlpPolicy" and policy_kwargs={self.policy_kwargs}.'
            )
        fits = {name: x for name, x in given.items() if name in own and not (odd and name.startswith("critic."))}
        agent.set_parameters({"policy": own | fits})
        critic = "; its critic does not fit and begins anew" if odd else ""
        return f"begins from {self.file} (Stable-Baselines3, {self.num_timesteps:,} steps){critic}"

    def _check_space(self, name: str, space: spaces.Space) -> None:
        """Raise ValueError unless a space is as the file describes its own, whose object is pickled."""
        theirs = self.described[name]
        kind = type(space).__name__
        known = {key: x for key, x in theirs.items() if key in ("_shape", "low", "high", "n", "nvec", "start")}
        same = kind in re.split(r"\W+", str(theirs.get(":type:", "")))
        for key, value in known.items():
            ours, read = numbers_in(getattr(space, key, None)), numbers_in(value)
            same = same and len(ours) == len(read) and np.allclose(ours, read, rtol=1e-4, atol=1e-6)
        if not same:
            found = ", ".join(f"{key.strip('_')} {value}" for key, value in known.items())
            raise ValueError(f"The {name} of {self.file} is another one ({found[:300]}); the agent's is {space}.")


def load_sb3_policy(path: StrPath, obs_rms: Any = None) -> SB3Policy:
    """Read the MlpPolicy of an agent that Stable-Baselines3 saved (PPO, A2C, sb3-contrib's TRPO); nothing is unpickled.

    To go on from it, with an algorithm of this package:

        saved = agents.load_sb3_policy("ppo.zip")
        agent = agents.NPG("MlpPolicy", "Hopper-v5", policy_kwargs=saved.policy_kwargs)
        saved.give(agent)

    Args:
        path: the file, which may go without its .zip.
        obs_rms: the statistics of a VecNormalize that the agent was trained behind, which are in a file of their own.
            That is a pickle, so it is not read here: VecNormalize.load(file, venv).obs_rms, of a file of one's own.

    Raises:
        CheckpointError: it is no such file, or not safe to read.
    """
    file = find(path)
    with damage_named(file), zipped(file) as archive:
        names = set(archive.namelist())
        if missing := {SETTINGS, WEIGHTS, VERSION} - names:
            raise CheckpointError(f"{file} was not saved by Stable-Baselines3: it holds no {min(missing)}.")
        settings = json.loads(member(file, archive, SETTINGS, SETTINGS_BYTES))
        weights = tensors_of(file, member(file, archive, WEIGHTS, file.stat().st_size))
        kwargs = settings.get("policy_kwargs") or {}
        described = {name: dict(settings[name]) for name in ("observation_space", "action_space")}
        steps = settings.get("num_timesteps", 0)
        _check_kind(file, settings, kwargs)
        parameters, sizes = renamed(file, weights)
        if obs_rms is not None:
            moments = (np.ravel(x) for x in (obs_rms.mean, obs_rms.var))
            mean, var = (torch.as_tensor(x, dtype=torch.float64) for x in moments)
            count = torch.as_tensor(obs_rms.count, dtype=torch.float64)
            parameters |= {"normalizer.count": count, "normalizer.mean": mean, "normalizer.m2": var * count}
        activation = activation_of(file, kwargs)
        return SB3Policy(file, int(steps), parameters, sizes, activation, described, obs_rms is not None)


def is_sb3(path: Path) -> bool:
    """Say whether a file looks like one of Stable-Baselines3's."""
    try:
        with damage_named(path), zipped(path) as archive:
            return VERSION in archive.namelist()
    except CheckpointError:
        return False


def member(file: Path, archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Read a member of a zip, which must be stored, single, and no larger than most and the file."""
    found = [info for info in archive.infolist() if info.filename == name]
    most = min(most, file.stat().st_size)
    if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED or found[0].file_size > most:
        raise CheckpointError(
            f"{file} is damaged or unsafe: {name} is there {len(found)} times, compressed, or of more than {most:,} "
            "bytes; use another file."
        )
    return archive.read(found[0])


def tensors_of(file: Path, content: bytes) -> dict[str, Tensor]:
    """Read the tensors that torch.save wrote, float32 and finite, without running anything that content names."""
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        lists = [info for info in inner.infolist() if info.filename.endswith("/data.pkl")]
        plain = all(info.compress_type == zipfile.ZIP_STORED for info in inner.infolist())
        if len(lists) != 1 or not plain or lists[0].file_size > LIST_BYTES:
            raise CheckpointError(f"{file} is damaged or unsafe: {WEIGHTS} is not as PyTorch saves one.")
        for name in named_by(inner.read(lists[0])):
            if name not in NAMED:
                raise CheckpointError(f"{file} is not safe: {WEIGHTS} names {name[:80]!r}, which is no float32 tensor.")
    tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(tensors, Mapping) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise CheckpointError(f"{file} is damaged: {WEIGHTS} holds something else than tensors.")
    for name, x in tensors.items():
        if x.dtype != torch.float32 or not x.is_contiguous():  # one number may pass for any shape
            raise CheckpointError(f"{file} is damaged or unsafe: {name} in {WEIGHTS} is not a plain float32 tensor.")
    if odd := not_finite(tensors):
        raise CheckpointError(f"{file} holds values that are not finite, in {odd}; use another file.")
    return {str(name): x.clone() for name, x in tensors.items()}


def named_by(pickled: bytes) -> Iterator[str]:
    """Name what a pickle would import, as "module name", without running it; "?" where that is made while it runs."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "REDUCE_EX", "NEWOBJ", "NEWOBJ_EX", "OBJ"):
            yield f"? ({opcode.name})"


def renamed(file: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Give SB3's parameters of an MlpPolicy under our names, and the hidden layer sizes."""
    weights, parameters, sizes = dict(weights), {}, {}
    for ours, theirs, last in (("actor.net", "policy", "action_net"), ("critic.network", "value", "value_net")):
        layers = sorted({int(found[2]) for name in weights if (found := LAYER.fullmatch(name)) and found[1] == theirs})
        if layers != list(range(0, 2 * len(layers), 2)) or len(layers) > MOST_LAYERS:
            raise CheckpointError(f"{file} is damaged: the layers of its {theirs} network are {layers[:5]}.")
        names = [f"mlp_extractor.{theirs}_net.{number}" for number in layers] + [last]
        for number, name in enumerate(names):
            for part in ("weight", "bias"):
                if f"{name}.{part}" not in weights:
                    raise CheckpointError(f"{file} holds no actor-critic MlpPolicy: it has no {name}.{part}.")
                parameters[f"{ours}.{2 * number}.{part}"] = weights.pop(f"{name}.{part}")
        own = [parameters[f"{ours}.{2 * number}.weight"] for number in range(len(names))]
        if any(x.ndim != 2 for x in own):
            raise CheckpointError(f"{file} is damaged: a layer of its {theirs} network is no matrix.")
        sizes["pi" if theirs == "policy" else "vf"] = tuple(len(x) for x in own[:-1])
    if "log_std" in weights:
        parameters["actor.log_std.bias"] = weights.pop("log_std")
    if weights:
        raise CheckpointError(f"{file} holds no plain MlpPolicy: it has {min(weights)} too.")
    return parameters, sizes


def activation_of(file: Path, kwargs: Mapping[str, Any]) -> str:
    """Give the key of the activation that SB3's policy_kwargs name, as JSON shows a class; tanh is its default."""
    said = kwargs.get("activation_fn")
    classes = {str(kind): key for key, kind in ACTIVATIONS.items()} | {str(nn.Tanh): "tanh"}
    if said is not None and said not in classes:
        raise CheckpointError(f"{file} has the activation {str(said)[:80]}; known are {', '.join(ACTIVATIONS)}.")
    return "tanh" if said is None else classes[said]


def _check_kind(file: Path, settings: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Raise CheckpointError for policies that act otherwise than their networks say."""
    module = settings["policy_class"].get("__module__")
    if module != POLICIES:
        raise CheckpointError(f"{file} holds a policy class of {str(module)[:80]}; only SB3's own MlpPolicy is known.")
    if settings.get("use_sde") or kwargs.get("use_sde") or kwargs.get("squash_output"):
        raise CheckpointError(f"{file} holds a policy with use_sde or squash_output, which no agent here has.")


def numbers_in(value: Any) -> list[float]:
    """Give the numbers that a value is printed with."""
    return [float(text) for text in re.findall(r"-?(?:inf|\d+\.?\d*(?:e[+-]?\d+)?)", str(value))]
