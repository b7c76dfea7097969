"""A run's policy as a file of its own, which acts without this package and without an environment."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tyro.conf import Positional, arg

from agents import Agent, checkpoint, exported, load
from agents.exported import ABOUT, load_policy
from agents.policy.base import Policy
from agents.policy.features import FourierFeatures
from agents.policy.networks import ACTIVATIONS, Actor, Tanh
from agents.run.errors import RunError
from agents.run.folder import checkpoint_file
from agents.run.options import Flag
from agents.run.outputs import check_output, complete

TOLERANCE = 1e-5
"""Largest difference from the agent's actions, relative to those above 1. Rounding makes some 1e-7."""
ROWS = 256
"""Observations on which that is looked at."""


@dataclass(frozen=True)
class Export:
    """Write a run's deterministic policy, with its normalization and clipping, to one file."""

    target: Positional[Annotated[str, arg(metavar="RUN_OR_FILE")]]
    """A run's folder (its last checkpoint is taken) or a checkpoint file."""
    file: Positional[Annotated[str, arg(metavar="POLICY")]]
    """The new file: policy.onnx for any ONNX runtime, policy.pt2 for PyTorch, policy.safetensors for NumPy."""
    best: Flag = False
    """Of a run's folder, take the checkpoint of the best evaluation."""
    debug: Flag = False
    """Show the traceback of an error."""


def export(asked: Export, command: str) -> int:
    """Export as asked, compare the file's actions with the agent's, and say so; returns the exit code.

    Raises:
        UsageError: an argument is not possible.
        RunError: a package is missing, the policy has no such form, or the file does not act as the agent does.
    """
    check_output("POLICY", asked.file, WRITERS)
    agent, file = load(checkpoint_file(asked.target, asked.best), device="cpu"), Path(asked.file)
    difference = export_policy(agent, file)
    print(f"policy      {file} ({file.stat().st_size:,} bytes), deterministic")
    print(f"checked     {ROWS} actions differ from the agent's by at most {difference:.0e}")
    print(f"to act      copy {exported.__file__} beside it:")
    print(f"            load_policy({file.name!r}).predict(observation)[0]")
    return 0


def export_policy(agent: Agent, file: Path) -> float:
    """Write an agent's policy in the format of the file's ending; the file is there once it was tried.

    Returns:
        The largest difference from the agent's own actions, relative to those above 1.

    Raises:
        RunError: see `export`.
    """
    policy = portable(copy.deepcopy(agent.policy).cpu().eval())
    observations = plausible_observations(policy)
    with complete(file) as unfinished:
        with _quiet():
            WRITERS[file.suffix.lower()](policy, observations, json.dumps(about(agent)), unfinished)
            found = load_policy(unfinished)(observations.numpy())
        wanted = agent.predict(observations.numpy(), deterministic=True)[0]
        if found.shape != wanted.shape:
            raise RunError(f"the exported policy's actions are {found.shape}, the agent's {wanted.shape}.")
        difference = float((np.abs(found.astype(float) - wanted) / np.maximum(1.0, np.abs(wanted))).max())
        if not difference <= TOLERANCE:
            raise RunError(f"the exported policy's actions differ from the agent's by {difference:.1e}; none is kept.")
    return difference


def about(agent: Agent) -> dict[str, Any]:
    """Say what observations and actions are, and which agent a policy is of."""
    space, head = agent.observation_space, agent.policy.head
    return {
        "format": "geodesic-rl policy",
        "format_version": 1,
        "observation": {"shape": list(space.shape or ())},
        "action": {**asdict(head), "dtype": str(agent.action_space.dtype)},
        "agent": {
            "algorithm": agent.name,
            "num_timesteps": agent.num_timesteps,
            "versions": checkpoint.versions(),
        },
    }


def plausible_observations(policy: Policy) -> Tensor:
    """Draw observations [ROWS, *O], float32, as the policy's training had them; the first ones lie far outside."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(ROWS, policy.observation_size, generator=generator)
    drawn[:8] *= 20.0
    normalizer = policy.normalizer
    scaled = normalizer.shift + drawn / normalizer.scale
    return scaled.float().reshape(ROWS, *(policy.observation_space.shape or ()))


def portable(policy: Policy) -> Policy:
    """Make of a policy what can be traced for any number of observations: PyTorch's tanh is in place of ours, which
    differs by at most 2e-7, and one standard deviation in place of one per observation.
    """
    for parent in list(policy.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Tanh):
                setattr(parent, name, nn.Tanh())
        if isinstance(parent, Actor):
            parent.forward = parent.shared_std  # type: ignore[method-assign]
    return policy


class _Acting(nn.Module):
    """A policy as a function of observations alone."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Tensor) -> Tensor:
        return self.policy._predict(observation, deterministic=True)


def _program(policy: Policy, observations: Tensor) -> torch.export.ExportedProgram:
    """Trace the policy for any number of observations; where in which file each operation stood is left out."""
    shapes = {"observation": {0: torch.export.Dim("n", min=1)}}
    with torch.no_grad():
        program = torch.export.export(_Acting(policy), (observations,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _onnx(policy: Policy, observations: Tensor, about: str, file: Path) -> None:
    with _needing('"geodesic-rl[onnx]"', file):
        import onnxruntime  # noqa: F401, the file is tried with it
        import onnxscript  # noqa: F401, PyTorch writes with it
    program = torch.onnx.export(
        _program(policy, observations), input_names=["observation"], output_names=["action"], dynamo=True, verbose=False
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()
    program.model.metadata_props[ABOUT] = about
    program.save(file, external_data=False)


def _pt2(policy: Policy, observations: Tensor, about: str, file: Path) -> None:
    torch.export.save(_program(policy, observations), file, extra_files={ABOUT: about})


def _safetensors(policy: Policy, observations: Tensor, about: str, file: Path) -> None:
    layers: list[str] = []
    tensors: dict[str, Tensor] = {}
    for k, layer in enumerate(policy.actor.net):
        layers.append(kind := _kind(layer))
        kept = layer.state_dict() if kind in ("linear", "fourier") else {}
        tensors |= {f"layers.{k}.{name}": tensor for name, tensor in kept.items()}
    clip = policy.normalizer.clip if policy.normalize_observations else None
    if clip is not None:
        tensors |= {"observation.scale": policy.normalizer.scale, "observation.offset": policy.normalizer.offset}
    if policy.head.kind == "gaussian":
        tensors |= {f"action.{side}": policy.get_buffer(f"_{side}") for side in ("low", "high")}
    elif policy._first is not None:
        tensors["action.start"] = policy._first
    described = {**json.loads(about), "layers": layers, "clip": clip}
    save_file({name: x.contiguous() for name, x in tensors.items()}, file, {ABOUT: json.dumps(described)})


def _kind(layer: nn.Module) -> str:
    """Name a layer as `agents.exported` knows it."""
    named = {nn.Linear: "linear", FourierFeatures: "fourier", nn.Tanh: "tanh"}
    named |= {kind: key for key, kind in ACTIVATIONS.items()}
    if type(layer) not in named:
        raise RunError(
            f"the policy has a layer {type(layer).__name__}, which .safetensors has no words for; export it to .onnx "
            "or .pt2."
        )
    return named[type(layer)]


@contextlib.contextmanager
def _needing(extra: str, file: Path) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise RunError(f"{file.suffix} needs {error.name}; pip install {extra} brings it.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says of its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


WRITERS = {".onnx": _onnx, ".pt2": _pt2, ".safetensors": _safetensors}
