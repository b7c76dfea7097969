"""Checkpoints: one stored .zip of manifest.json and tensors.safetensors; nothing in it is pickled.

A file is complete or absent: it is written beside its place, synced, read back and compared, then renamed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch
from gymnasium import spaces
from torch import Tensor

FORMAT = "geodesic-rl checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
PACKAGES = ("geodesic-rl", "torch", "numpy", "gymnasium", "mujoco", "stable-baselines3")

StrPath = str | os.PathLike[str]


class CheckpointError(RuntimeError):
    """A file is not a checkpoint that this version can read; the message says why and what to do."""


def write(path: StrPath, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint to path, over an earlier one only once the new one has been read back in full.

    Args:
        path: the file; its folder exists.
        manifest: JSON values. The keys "format", "format_version", "versions" and "sha256" are added.
        tensors: of any shape, dtype and device.

    Raises:
        OSError: the file cannot be written.
        CheckpointError: what was written does not read back. In both cases an earlier file at path is untouched.
    """
    path = Path(path)
    host = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    digests = {name: digest(tensor) for name, tensor in host.items()}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "versions": versions(), "sha256": digests}
    with replaced(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(MANIFEST, json.dumps({**manifest, **header}, indent=1))
            archive.writestr(TENSORS, safetensors.torch.save(host))
        file.flush()
        read(file.name)


def read(path: StrPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the manifest and the tensors (on the CPU) of the checkpoint at path, every digest verified.

    Raises:
        CheckpointError: there is no such file, or it is damaged, foreign or from a newer version.
    """
    path = Path(path)
    with _opened(path) as (manifest, archive):
        tensors = safetensors.torch.load(archive.read(TENSORS))
    _check_digests(path, manifest["sha256"], tensors)
    return manifest, tensors


def read_manifest(path: StrPath) -> dict[str, Any]:
    """Return the manifest of the checkpoint at path without reading its tensors, whose digests stay unverified.

    Raises:
        CheckpointError: as `read`, as far as the manifest shows it.
    """
    with _opened(Path(path)) as (manifest, _):
        return manifest


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any], zipfile.ZipFile]]:
    """Give the manifest of a checkpoint and its open archive; what is wrong with either is a CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file at {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, set(archive.namelist()))
            manifest = json.loads(archive.read(MANIFEST))
            _check_format(path, manifest)
            yield manifest, archive
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or not a {FORMAT} ({error}); use another checkpoint.") from error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Give a new file beside path, which takes path's place, synced, on leaving; after an error path is as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Give the tensors whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def digest(tensor: Tensor) -> str:
    """Give the sha256 of a CPU tensor's dtype, shape and bytes, in hexadecimal."""
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _check_members(path: Path, members: set[str]) -> None:
    if "_stable_baselines3_version" in members:
        raise CheckpointError(
            f"{path} was saved by Stable-Baselines3, which pickles; load it there, with the class that saved it."
        )
    missing = {MANIFEST, TENSORS} - members
    if missing:
        raise CheckpointError(f"{path} is not a {FORMAT}: it holds no {' and no '.join(sorted(missing))}.")


def _check_format(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT}: its {MANIFEST} is of another kind.")
    found = manifest["format_version"]
    if found > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {found} (geodesic-rl {manifest['versions']['geodesic-rl']}); "
            f"this version reads up to format {FORMAT_VERSION}: update geodesic-rl."
        )


def _check_digests(path: Path, expected: dict[str, str], tensors: dict[str, Tensor]) -> None:
    found = {name: digest(tensor) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{path} is damaged: {', '.join(wrong[:3])} {'does' if len(wrong) == 1 else 'do'} not match the sha256 "
            "in its manifest; use another checkpoint."
        )


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode_space(space: spaces.Space) -> dict[str, Any]:
    """Write a Box, Discrete, MultiDiscrete or MultiBinary space as JSON values; others raise ValueError."""
    match space:
        case spaces.Box():
            bounds = {"low": _bound(space.low), "high": _bound(space.high)}
            return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
        case spaces.Discrete():
            return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
        case spaces.MultiBinary():
            return {"kind": "MultiBinary", "n": np.asarray(space.n).tolist()}
    raise ValueError(f"The space {space} cannot be stored; use a Box, Discrete, MultiDiscrete or MultiBinary space.")


def decode_space(value: dict[str, Any]) -> spaces.Space:
    """Make the space that `encode_space` was given."""
    match value["kind"]:
        case "Box":
            low, high = (np.asarray(value[name], dtype=value["dtype"]) for name in ("low", "high"))
            shape = tuple(value["shape"])
            return spaces.Box(np.broadcast_to(low, shape), np.broadcast_to(high, shape), dtype=low.dtype.type)
        case "Discrete":
            return spaces.Discrete(value["n"], start=value["start"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(value["nvec"], start=value["start"])
        case "MultiBinary":
            return spaces.MultiBinary(value["n"])
    raise ValueError(f"The stored space kind {value['kind']!r} is not known to this version; update geodesic-rl.")


def _bound(bound: np.ndarray) -> Any:
    """Write one number for equal bounds (Infinity is valid in Python's JSON), else all of them."""
    return float(bound.flat[0]) if bound.size and (bound == bound.flat[0]).all() else bound.tolist()
