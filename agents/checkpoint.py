"""Checkpoints: one stored .zip of manifest.json and tensors.safetensors; nothing in it is pickled.

A file is complete or absent: it is written beside its place, synced, read back and compared, then renamed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from gymnasium import spaces
from safetensors import TensorSpec, serialize
from torch import Tensor

FORMAT = "geodesic-rl checkpoint"
FORMAT_VERSION = 2
"""From 2 on the manifest has a digest too."""
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
PACKAGES = ("geodesic-rl", "torch", "numpy", "gymnasium", "mujoco", "stable-baselines3")

NAME_LENGTH = 1000
MANIFEST_BYTES, LISTING_BYTES = 2**22, 2**16
"""At most, of the manifest and of a zip's list of its members; as objects they take 25 times as much memory."""
SLACK = 2**23
"""Numbers that an agent may have beside its tensors, as a net_arch that its kind of policy does not use."""
UNFINISHED = re.compile(r"\..+\.([1-9]\d*)\.tmp(\.\w+)?")
END_BYTES = 22 + 20 + 56
"""Of the record that ends a zip, and of the two before it in zips of gigabytes; both say how long that list is."""
LAYER = 2**20
"""What a layer counts, at least, of which the file has no tensor."""


def _is_seed(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= NAME_LENGTH


def _are_episodes(value: Any) -> bool:
    return isinstance(value, list) and all(type(episode[name]) in (int, float) for episode in value for name in "rl")


def _are_successes(value: Any) -> bool:
    return isinstance(value, list) and all(type(success) is bool for success in value)


def _are_plain(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(one, (dict, list)) for one in value.values())


_TEXT = ("a text", lambda value: isinstance(value, str))
_OBJECT = ("an object", lambda value: isinstance(value, dict))
_COUNT = ("a whole number of at least 0", lambda value: _is_seed(value) and value < 2**63)
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("algorithm", "policy_class"), ("a name", lambda value: _is_name(value))),
    "env_snapshot": _TEXT,
    **dict.fromkeys(("policy_kwargs", "config", "observation_space", "action_space", "env_kwargs"), _OBJECT),
    **dict.fromkeys(("versions", "sha256"), _OBJECT),
    **dict.fromkeys(("num_timesteps", "total_timesteps", "iteration", "counter", "episodes", "blowups"), _COUNT),
    "env_id": ("a name, or null", lambda value: value is None or _is_name(value)),
    "seed": ("a whole number of at least 0, or null", lambda value: value is None or _is_seed(value)),
    "stream_seed": ("a whole number of at least 0", _is_seed),
    "episode_infos": ("a list of episodes", _are_episodes),
    "episode_successes": ("a list of true and false", _are_successes),
    "metrics": ("an object of numbers", _are_plain),
    "failures": ("two whole numbers", lambda value: isinstance(value, list) and [*map(_is_seed, value)] == [True] * 2),
}
"""What the fields of a manifest must be, where it has them."""
REQUIRED = FIELDS.keys() - {"counter", "blowups", "failures"}
"""What an agent's manifest has; the first ones have no counter."""


StrPath = str | os.PathLike[str]
Source = StrPath | IO[bytes]
"""A path or an open binary file."""


class CheckpointError(RuntimeError):
    """A file is not a checkpoint that this version can read; the message says why and what to do."""


def write(target: Source, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint, to a path over an earlier one only once the new one has been read back in full.

    Args:
        target: a path, whose folder is made if there is none, or an open binary file.
        manifest: JSON values. The keys "format", "format_version", "versions", "sha256" and "manifest_sha256" are
            added.
        tensors: of any shape, dtype and device.

    Raises:
        OSError: the file cannot be written.
        CheckpointError: what was written does not read back. In both cases an earlier file at a path is untouched.
    """
    host = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    digests = {name: digest(tensor) for name, tensor in host.items()}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "versions": versions(), "sha256": digests}
    text = json.loads(json.dumps({**manifest, **header}))
    text["manifest_sha256"] = _digest_of_manifest(text)
    # Not by safetensors.torch, which makes a type of C for every size that ctypes then keeps for ever.
    specs = {
        name: TensorSpec(dtype=str(x.dtype)[6:], shape=x.shape, data_ptr=x.data_ptr(), data_len=x.nbytes)
        for name, x in host.items()
    }
    content: dict[str, str | bytes] = {
        MANIFEST: "{" + ",\n".join(f"{json.dumps(name)}: {json.dumps(x)}" for name, x in text.items()) + "}",
        TENSORS: bytes(serialize(specs)),
    }
    if not isinstance(target, (str, os.PathLike)):
        _write_archive(target, content)
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    with replaced(path) as file:
        _write_archive(file, content)
        file.flush()
        read(file.name)


def _write_archive(file: IO[bytes], content: Mapping[str, str | bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def read(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the manifest and the tensors (on the CPU) of a checkpoint, every digest verified.

    Raises:
        CheckpointError: there is no such file, or it is damaged, foreign or from a newer version.
    """
    with _opened(source) as (manifest, archive):
        tensors = safetensors.torch.load(archive.read(TENSORS))
        _check_digests(source, manifest["sha256"], tensors)
    return manifest, tensors


def read_agent(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the checkpoint of an agent, whose manifest has what it must, whose sizes are those of its tensors.

    Raises:
        CheckpointError: as `read`; or a field is missing or of another type, a value is not finite, or something is
            described that is far larger than what the file holds.
    """
    manifest, tensors = read(source)
    if missing := REQUIRED - manifest.keys():
        raise CheckpointError(f"{source} holds no agent: its {MANIFEST} lacks {', '.join(sorted(missing)[:3])}.")
    if odd := not_finite(tensors):
        raise CheckpointError(f"{source} holds values that are not finite, in {odd}; use another checkpoint.")
    with damage_named(source):
        _check_sizes(source, manifest, tensors)
        for name in ("observation_space", "action_space"):
            decode_space(manifest[name])
    return manifest, tensors


def read_manifest(source: Source) -> dict[str, Any]:
    """Return the manifest of a checkpoint without reading its tensors, whose digests stay unverified.

    Raises:
        CheckpointError: as `read`, as far as the manifest shows it.
    """
    with _opened(source) as (manifest, _):
        return manifest


def find(path: StrPath) -> Path:
    """Find the file that was written for a path, which may go without its .zip; CheckpointError if there is none."""
    path = Path(path)
    for file in (path, path.with_name(f"{path.name}.zip")):
        if file.is_file():
            return file
    raise CheckpointError(f"There is no checkpoint file at {path}.")


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[tuple[dict[str, Any], zipfile.ZipFile]]:
    """Give the manifest of a checkpoint and its open archive; what is wrong with either is a CheckpointError."""
    file = find(source) if isinstance(source, (str, os.PathLike)) else source
    with damage_named(file), zipped(file) as archive:
        _check_members(file, archive)
        manifest = json.loads(archive.read(MANIFEST))
        _check_manifest(file, manifest)
        yield manifest, archive


@contextlib.contextmanager
def zipped(file: Source) -> Iterator[zipfile.ZipFile]:
    """Open a zip for reading, unless its list of members, which Python reads whole, is a long one.

    Raises:
        CheckpointError: it is; or the file is no zip that ends where that list does.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(file, "rb")) if isinstance(file, (str, os.PathLike)) else file
        stream.seek(max(stream.seek(0, os.SEEK_END) - END_BYTES, 0))
        end = stream.read()
        sizes = [end[-10:-6]] + [end[-58:-50]] * (end[-42:-38] == b"PK\6\7")
        if end[-22:-18] != b"PK\5\6" or any(int.from_bytes(size, "little") > LISTING_BYTES for size in sizes):
            raise CheckpointError(
                f"{file} is damaged or not a {FORMAT}: it does not end as a zip of few members; use another checkpoint."
            )
        yield stack.enter_context(zipfile.ZipFile(stream))


@contextlib.contextmanager
def damage_named(source: Any) -> Iterator[None]:
    """Make a CheckpointError of whatever goes wrong in reading what came from a file."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # zipfile and json raise a dozen kinds for odd bytes
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it could not be opened
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{source} is damaged or not a {FORMAT} ({type(error).__name__}: {said}); use another checkpoint."
        ) from error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Give a new file beside path, which takes path's place, synced, on leaving; after an error path is as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # never through a link that lies there
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in a folder: .NAME.PID.tmp, with an ending or without."""
    for file in folder.glob(".*.tmp*"):
        named = UNFINISHED.fullmatch(file.name)
        if named and not _is_process(int(named[1])):
            file.unlink(missing_ok=True)


def _is_process(number: int) -> bool:
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Give the tensors whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name the first tensors that hold values which are not finite; "" if there are none."""
    odd = [name for name, x in tensors.items() if (x.is_floating_point() or x.is_complex()) and not x.isfinite().all()]
    return ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if odd[3:] else "")


def digest(tensor: Tensor) -> str:
    """Give the sha256 of a CPU tensor's dtype, shape and bytes, in hexadecimal."""
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _check_members(source: Any, archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    names = {member.filename for member in members}
    if "_stable_baselines3_version" in names:
        raise CheckpointError(
            f"{source} was saved by Stable-Baselines3, which pickles. To begin from its policy give --init-from, or "
            "agents.load_sb3_policy; all of it only Stable-Baselines3 loads."
        )
    if missing := {MANIFEST, TENSORS} - names:
        raise CheckpointError(f"{source} is not a {FORMAT}: it holds no {' and no '.join(sorted(missing))}.")
    if len(members) != 2 or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(
            f"{source} is not a {FORMAT}: one holds two members, neither of them compressed; use another checkpoint."
        )
    whole = archive.fp.seek(0, os.SEEK_END)  # type: ignore[union-attr]
    for member in members:  # before anything is allocated for them
        most = min(whole - member.header_offset, MANIFEST_BYTES if member.filename == MANIFEST else whole)
        if not member.compress_size == member.file_size <= most:
            raise CheckpointError(
                f"{source} is damaged: its {member.filename} says that it has {member.file_size:,} bytes, and can have "
                f"{most:,}; use another checkpoint."
            )


def _check_manifest(source: Any, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{source} is not a {FORMAT}: its {MANIFEST} is of another kind.")
    found = int(manifest["format_version"])
    if found > FORMAT_VERSION:
        raise CheckpointError(
            f"{source} has checkpoint format {found} (geodesic-rl {manifest['versions']['geodesic-rl']}); "
            f"this version reads up to format {FORMAT_VERSION}: update geodesic-rl."
        )
    if found >= 2 and manifest.pop("manifest_sha256", None) != _digest_of_manifest(manifest):
        raise CheckpointError(
            f"{source} is damaged: its {MANIFEST} does not match its own sha256; use another checkpoint."
        )
    for name, (words, holds) in FIELDS.items():
        if name in manifest and not holds(manifest[name]):
            raise CheckpointError(
                f"{source} is damaged: {name} in its {MANIFEST} is {repr(manifest[name])[:60]}, not {words}; use "
                "another checkpoint."
            )


def _digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_digests(source: Any, expected: dict[str, str], tensors: dict[str, Tensor]) -> None:
    if (longest := max(map(len, tensors), default=0)) > NAME_LENGTH:
        raise CheckpointError(
            f"{source} is damaged: the name of a tensor has {longest:,} letters; use another checkpoint."
        )
    found = {name: digest(tensor) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{source} is damaged: {', '.join(wrong[:3])} {'does' if len(wrong) == 1 else 'do'} not match the sha256 "
            "in its manifest; use another checkpoint."
        )


def _check_sizes(source: Any, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for spaces and networks far larger than the tensors, before they are made."""
    held = sum(x.numel() for x in tensors.values())
    spaces_of = {name: _size(manifest[name]) for name in ("observation_space", "action_space")}
    inputs, outputs = spaces_of.values()
    config = {**manifest["config"], **manifest["policy_kwargs"]}
    arch = config.get("net_arch") or []
    kinds = f"{manifest['policy_class']} {config.get('value_network')}".lower()
    needed = spaces_of | {
        "rbf_features": inputs * config.get("rbf_features", 0) if "rbf" in kinds else 0,
        "value_network": inputs**2 // 2 if "quadratic" in kinds else 0,
    }
    for part, hidden in (arch if isinstance(arch, dict) else {"": arch}).items():
        layers = [inputs, *hidden, outputs]
        more = LAYER * max(0, len(hidden) - len(tensors))
        needed[f"net_arch {part}".strip()] = sum(a * b for a, b in itertools.pairwise(layers)) + more
    for name, size in needed.items():
        if not (name in spaces_of) <= size <= held + SLACK:
            raise CheckpointError(
                f"{source} is damaged: its {name} is of {size:,} numbers, and all its tensors are {held:,}; use "
                "another checkpoint."
            )


def _size(space: Mapping[str, Any]) -> int:
    """Count the numbers that a stored space has as a policy's input or output."""
    match space["kind"]:
        case "Box":
            return math.prod(space["shape"])
        case "Discrete":
            return int(space["n"])
        case "MultiDiscrete":
            return int(np.sum(space["nvec"]))
        case _:
            return int(np.prod(space.get("n", 0)))


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
            if (dtype := np.dtype(value["dtype"])).kind not in "biuf":  # a text's may be of gigabytes
                raise ValueError(f"its numbers are of {str(dtype)[:60]}")
            low, high = (np.asarray(value[name], dtype=dtype) for name in ("low", "high"))
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
