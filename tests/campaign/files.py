"""Checkpoints that are damaged by chance or made to harm: opened by the commands, in processes that are watched."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from agents import checkpoint
from agents.checkpoint import MANIFEST, TENSORS
from tests.campaign.watch import CANARY, Case

BOMB = 512
"""MiB, inflated."""
ODD: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: -1, lambda: 2**63, lambda: 10**12, lambda: 10**30, lambda: 0.5, lambda: -1e308,
    lambda: float("nan"), lambda: float("inf"), lambda: "", lambda: "x" * 100_000, lambda: "\0", lambda: "ÿ\ud800é",
    lambda: "../../../etc/passwd", lambda: [], lambda: {}, lambda: [[[[]]]], lambda: {"": {"": None}},
    lambda: [0] * 100_000, lambda: [10**6] * 3, lambda: ["a", None], lambda: {"kind": "Box"},
    lambda: "planted.payload:Evil-v0", lambda: "os.system", lambda: "builtins.eval",
    lambda: {"__reduce__": "os.system"},
)  # fmt: skip
"""What a field of a manifest may be set to."""


class Executes:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


class Parts:
    """A checkpoint in parts.

    Args:
        file: a good one.
    """

    def __init__(self, file: Path) -> None:
        self.whole = file.read_bytes()
        with zipfile.ZipFile(file) as archive:
            self.manifest: dict[str, Any] = json.loads(archive.read(MANIFEST))
            self.tensors = archive.read(TENSORS)

    def named(self) -> dict[str, torch.Tensor]:
        """Give the tensors by name."""
        return safetensors.torch.load(self.tensors)

    def text(self) -> bytes:
        """Give the manifest as bytes."""
        return json.dumps(self.manifest).encode()


def zipped(*members: tuple[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """Make a zip of members, which may have one name twice."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, kind)
    return file.getvalue()


def signed(manifest: dict[str, Any], tensors: bytes | dict[str, torch.Tensor]) -> bytes:
    """Make a checkpoint whose digests fit, as someone would who knows how."""
    if isinstance(tensors, dict):
        manifest["sha256"] = {name: checkpoint.digest(x) for name, x in tensors.items()}
        tensors = safetensors.torch.save({name: x.contiguous() for name, x in tensors.items()})
    manifest.pop("manifest_sha256", None)
    try:
        text = json.loads(json.dumps(manifest))
        manifest["manifest_sha256"] = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
    except ValueError:
        pass
    return zipped((MANIFEST, json.dumps(manifest).encode("utf-8", "surrogatepass")), (TENSORS, tensors))


# Bytes ---------------------------------------------------------------------------------------------------------------


def flipped(parts: Parts, chance: random.Random) -> bytes:
    data = bytearray(parts.whole)
    for _ in range(chance.choice((1, 1, 1, 2, 16))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def flipped_in_the_frame(parts: Parts, chance: random.Random) -> bytes:
    """Flip where a zip says what it holds: the end, and the two members' own headers."""
    data = bytearray(parts.whole)
    ends = [chance.randrange(len(data) - 200, len(data)), chance.randrange(60)]
    data[chance.choice([*ends, data.index(b"tensors.safetensors") - chance.randrange(1, 30)])] = chance.randrange(256)
    return bytes(data)


def truncated(parts: Parts, chance: random.Random) -> bytes:
    cut = chance.choice((chance.randrange(len(parts.whole)), chance.randrange(100), len(parts.whole) - 1))
    return parts.whole[:cut] if chance.random() < 0.8 else parts.whole[cut:]


def moved(parts: Parts, chance: random.Random) -> bytes:
    """Zero, repeat, drop or swap blocks, as a disk may."""
    a, b = sorted(chance.randrange(len(parts.whole)) for _ in range(2))
    head, block, tail = parts.whole[:a], parts.whole[a:b], parts.whole[b:]
    ways = (head + bytes(len(block)) + tail, head + block + block + tail, head + tail, tail + block + head)
    return chance.choice(ways)


def of_something_else(parts: Parts, chance: random.Random) -> bytes:
    pickled = io.BytesIO()
    torch.save({"policy": Executes()}, pickled)
    return chance.choice((
        b"", chance.randbytes(chance.randrange(1, 5000)), pickle.dumps(Executes()), pickled.getvalue(), parts.text(),
        parts.tensors, b"PK\5\6" + bytes(18), b"\x1f\x8b" + chance.randbytes(50), b"#!/bin/sh\ntouch canary\n",
        zipped(), zipped(("data.pkl", pickle.dumps(Executes()))), parts.whole + parts.whole,
    ))  # fmt: skip


# The archive ---------------------------------------------------------------------------------------------------------


def many_members(whole: bytes) -> bytes:
    """Say that there are 400,000 members more, of which one knows in 47 bytes each."""
    start, end = whole.index(b"PK\1\2"), whole.rindex(b"PK\5\6")
    one = b"PK\1\2" + bytes(24) + struct.pack("<HHHHHII", 1, 0, 0, 0, 0, 0, 0) + b"x"
    listed = whole[start:end] + one * 400_000
    return whole[:start] + listed + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 65535, 65535, len(listed), start, 0)


def of_odd_members(parts: Parts, chance: random.Random) -> bytes:
    manifest, tensors = (MANIFEST, parts.text()), (TENSORS, parts.tensors)
    if chance.random() < 0.05:
        return many_members(parts.whole)
    evil = pickle.dumps(Executes())
    return zipped(*chance.choice((
        [manifest], [tensors], [(MANIFEST, parts.tensors), (TENSORS, parts.text())], [manifest, tensors, manifest],
        [manifest, tensors, ("../../" + CANARY.name, b"")], [manifest, tensors, (str(CANARY), b"")],
        [manifest, tensors, ("data.pkl", evil)], [(MANIFEST, evil), tensors], [manifest, (TENSORS, evil)],
        [(MANIFEST, b""), tensors], [manifest, (TENSORS, b"")], [(MANIFEST.upper(), parts.text()), tensors],
        [("./" + MANIFEST, parts.text()), tensors], [manifest, tensors, ("x" * 60_000, b"")],
        [manifest, tensors, *((f"{i}", b"") for i in range(5000))],
        [("data", json.dumps({"policy_class": {":serialized:": "gASV"}}).encode()), ("policy.pth", evil),
         ("_stable_baselines3_version", b"2.9.2")],
    )))  # fmt: skip


@cache
def packed_zeros(mebibytes: int) -> bytes:
    """Deflate so many zeros."""
    packer, block = zlib.compressobj(1, zlib.DEFLATED, -15), bytes(2**20)
    return b"".join([*(packer.compress(block) for _ in range(mebibytes)), packer.flush()])


def bomb(parts: Parts, chance: random.Random) -> bytes:
    """Deflate: a member of hundreds of MiB in little file; some say a small size."""
    name, packed = chance.choice((MANIFEST, TENSORS)), packed_zeros(BOMB)
    other = (TENSORS, parts.tensors) if name == MANIFEST else (MANIFEST, parts.text())
    data = bytearray(zipped(other, (name, packed)))
    size = chance.choice((BOMB * 2**20, len(packed), 100))
    method = chance.choice((8, 8, 8, 12, 14, 93))
    for mark, at_method, at_size in ((b"PK\3\4", 8, 22), (b"PK\1\2", 10, 24)):
        where = data.rindex(mark)
        struct.pack_into("<H", data, where + at_method, method)
        struct.pack_into("<I", data, where + at_size, size)
    return bytes(data)


def of_lying_sizes(parts: Parts, chance: random.Random) -> bytes:
    data = bytearray(zipped((MANIFEST, parts.text()), (TENSORS, parts.tensors)))
    where = data.index(b"PK\1\2") if chance.random() < 0.5 else data.rindex(b"PK\1\2")
    field = chance.choice((8, 10, 16, 20, 24, 28, 30, 32, 42))  # flags, method, CRC, sizes, lengths, offset
    wide = field in (16, 20, 24, 42)
    value = chance.choice((0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**32 - 2)) & (2**32 - 1 if wide else 2**16 - 1)
    struct.pack_into("<I" if wide else "<H", data, where + field, value)
    return bytes(data)


# The manifest --------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the ways to everything in JSON values."""
    if isinstance(value, dict):
        inner = [place for key, x in value.items() for place in places(x, (*path, key))]
    elif isinstance(value, list):
        inner = [place for key, x in enumerate(value[:3]) for place in places(x, (*path, key))]
    else:
        inner = []
    return [path, *inner] if path else inner


def of_an_odd_field(parts: Parts, chance: random.Random) -> bytes:
    manifest: Any = copy.deepcopy(parts.manifest)
    # Every name is as likely, whatever it holds.
    top = chance.choice([name for name in manifest if name not in ("sha256", "versions", "metrics")])
    *way, last = chance.choice([place for place in places(manifest) if place[0] == top])
    holder = manifest
    for key in way:
        holder = holder[key]
    if chance.random() < 0.1:
        del holder[last]
    else:
        holder[last] = chance.choice(ODD)()
    return signed(manifest, parts.tensors)


def of_a_hostile_field(parts: Parts, chance: random.Random) -> bytes:
    """Make a field say something enormous, deep, or that a module be imported."""
    manifest: Any = copy.deepcopy(parts.manifest)
    box = {"kind": "Box", "shape": [2**40], "dtype": "float32", "low": -1.0, "high": 1.0}
    net = [10**6, 10**6]
    changes: tuple[dict[str, Any], ...] = (
        {"observation_space": box}, {"observation_space": box | {"shape": [2**20, 2**20, 2**20]}},
        {"observation_space": box | {"shape": [-1]}}, {"observation_space": box | {"dtype": "O"}},
        {"observation_space": box | {"shape": [3], "dtype": "S1000000000"}},
        {"observation_space": box | {"shape": [0]}}, {"observation_space": {"kind": "Discrete", "n": 10**12,
        "start": 0}},
        {"action_space": {"kind": "Discrete", "n": 10**12, "start": 0}}, {"action_space": box},
        {"action_space": {"kind": "MultiDiscrete", "nvec": [10**9] * 9, "start": [0] * 9}},
        {"action_space": {"kind": "MultiBinary", "n": [10**6, 10**6]}}, {"action_space": {"kind": "Evil"}},
        {"config": manifest["config"] | {"net_arch": net}}, {"config": manifest["config"] | {"net_arch": [1] * 10**5}},
        {"config": manifest["config"] | {"num_envs": 10**9}}, {"config": manifest["config"] | {"n_steps": 10**12}},
        {"config": manifest["config"] | {"activation_fn": "planted.payload.Evil"}},
        {"policy_kwargs": {"net_arch": net}}, {"policy_kwargs": {"net_arch": {"pi": net, "vf": [1]}}},
        {"policy_kwargs": {"activation_fn": "planted.payload.Evil"}},
        {"policy_kwargs": {"features_extractor_class": "x"}},
        {"policy_class": "planted.payload.Evil"}, {"policy_class": "RBFPolicy",
        "policy_kwargs": {"rbf_features": 10**10}},
        {"algorithm": "planted.payload.Evil"}, {"algorithm": "../npg"}, {"env_id": "planted.payload:Evil-v0"},
        {"env_id": "GymV26Environment-v0", "env_kwargs": {"env_id": "planted.payload:Evil-v0"}},
        {"env_id": "Nothing-v0"}, {"env_kwargs": {"render_mode": "planted.payload:x"}}, {"env_kwargs": {"nothing": 1}},
        {"format_version": 10**6}, {"stats_window_size": 10**12}, {"seed": 10**400},
        {"tensorboard_log": str(CANARY)}, {"episode_infos": [{"r": 0, "l": 0}] * 300_000},
    )  # fmt: skip
    return signed(manifest | chance.choice(changes), parts.tensors)


def of_odd_json(parts: Parts, chance: random.Random) -> bytes:
    text = parts.text()
    deep = chance.choice((1000, 100_000, 4_000_000))
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: b"[" * deep, lambda: b'{"a":' * (deep // 10), lambda: b'{"a": ' + b"[" * deep + b"]" * deep + b"}",
        lambda: text[:-1] + b', "x": ' + b"[" * deep + b"]" * deep + b"}", lambda: b"1" * 1_000_000,
        lambda: text.replace(b'"seed"', b'"seed": ' + b"9" * 10_000 + b', "y"', 1), lambda: b"\xef\xbb\xbf" + text,
        lambda: text.decode().encode("utf-16"), lambda: b"\xff" + text, lambda: text[: chance.randrange(len(text))],
        lambda: b'{"a": [' + b"[]," * 4_000_000 + b"[]]}", lambda: b"null", lambda: b"[]", lambda: b'"x"',
        lambda: b"NaN", lambda: text + b" " * (17 * 2**20),
        lambda: text + text, lambda: b'{"format": "geodesic-rl checkpoint"}',
        lambda: b"{" + b'"a":1,' * 300_000 + b'"b":1}',
        lambda: b'{"format": "geodesic-rl checkpoint", "format_version": "nan", "sha256": {}}',
    )  # fmt: skip
    return zipped((MANIFEST, chance.choice(ways)()), (TENSORS, parts.tensors))


# The tensors ---------------------------------------------------------------------------------------------------------


def of_odd_tensors(parts: Parts, chance: random.Random) -> bytes:
    tensors, manifest = parts.named(), copy.deepcopy(parts.manifest)
    name = chance.choice(sorted(tensors))
    x = tensors[name]
    way = chance.randrange(7)
    if way == 0 and x.is_floating_point() and x.numel():
        flat = x.reshape(-1).clone()
        flat[chance.randrange(x.numel())] = chance.choice((float("nan"), float("inf"), -float("inf")))
        tensors[name] = flat.view(x.shape)
    elif way == 1:
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int8, torch.bool, torch.uint8)
        kind = chance.choice([kind for kind in kinds if kind != x.dtype])
        tensors[name] = x.to(kind)
    elif way == 2:
        shape = chance.choice(((), (0,), (1,), (*x.shape, 2), (3, 5), (2**16,), (1,) * 9))
        tensors[name] = torch.zeros(shape if shape != tuple(x.shape) else (7, 7), dtype=x.dtype)
    elif way == 3:
        del tensors[name]
    elif way == 4:
        tensors[name + "x" * chance.choice((1, 100_000))] = tensors.pop(name)
    elif way == 5:
        return zipped((MANIFEST, parts.text()), (TENSORS, safetensors.torch.save({"x": x})))
    else:
        tensors = {}
    return signed(manifest, tensors)


def of_an_odd_header(parts: Parts, chance: random.Random) -> bytes:
    """Change what safetensors says of its tensors; the manifest's digests are the good ones, or none."""
    (length,) = struct.unpack("<Q", parts.tensors[:8])
    header, data = json.loads(parts.tensors[8 : 8 + length]), parts.tensors[8 + length :]
    name = chance.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header[name]
    changes: tuple[dict[str, Any], ...] = (
        {"shape": [2**40]}, {"shape": [2**63, 2**63]}, {"shape": [-1]}, {"shape": "x"}, {"dtype": "F1024"},
        {"dtype": None},
        {"data_offsets": [0, 2**63]}, {"data_offsets": [5, 3]}, {"data_offsets": [0, len(data) + 1]},
        {"data_offsets": []}, {"data_offsets": [-1, 4]}, {"shape": [*entry["shape"], 1, 1]},
    )  # fmt: skip
    header[name] = entry | chance.choice(changes)
    text = json.dumps(header).encode()
    lengths = (len(text), len(text), len(text), 0, 1, 2**32, 2**63, 2**64 - 1, len(text) + len(data) + 1)
    odd = chance.choice((text, text, text, b"[" * 100_000, b"{" * 10_000, text[:-5], b"\0" * len(text)))
    tensors = struct.pack("<Q", len(odd) if odd is not text else chance.choice(lengths)) + odd + data
    manifest = copy.deepcopy(parts.manifest)
    if chance.random() < 0.3:
        manifest["sha256"] = {}
    return signed(manifest, tensors)


WAYS: dict[str, tuple[Callable[[Parts, random.Random], bytes], float]] = {
    "bytes flipped": (flipped, 3),
    "bytes flipped in the zip's own": (flipped_in_the_frame, 1),
    "cut": (truncated, 1.5),
    "blocks moved": (moved, 1),
    "something else": (of_something_else, 0.7),
    "odd members": (of_odd_members, 1),
    "bombs": (bomb, 0.3),
    "lying sizes": (of_lying_sizes, 1),
    "odd fields": (of_an_odd_field, 4),
    "hostile fields": (of_a_hostile_field, 2),
    "odd JSON": (of_odd_json, 1),
    "odd tensors": (of_odd_tensors, 2),
    "odd headers of tensors": (of_an_odd_header, 1),
}
"""Ways to damage a checkpoint, and how often each is taken."""
DOORS: dict[str, tuple[list[str], float]] = {
    "evaluate FILE": (["evaluate", "{file}", "--episodes", "1", "--device", "cpu"], 5),
    "evaluate RUN": (["evaluate", "{run}", "--episodes", "1", "--device", "cpu"], 1),
    "evaluate several": (["evaluate", "{file}", "{file}", "--episodes", "1", "--device", "cpu"], 0.3),
    "resume": (["resume", "{run}", "--device", "cpu"], 4),
    "resume --steps": (["resume", "{run}", "--steps", "100", "--device", "cpu", "--quiet"], 1),
    "export": (["export", "{file}", "{scratch}/out.safetensors"], 1),
    "adapt": (["adapt", "{file}"], 0.3),
    "train --init-from": (
        [
            *("train", "npg", "--env", "{env}", "--run-dir", "{scratch}/new", "--init-from", "{file}", "--quiet"),
            *("--num-envs", "2", "--n-steps", "8", "--steps", "8", "--eval-episodes", "1", "--device", "cpu"),
        ],
        0.4,
    ),
}
"""Commands that open a checkpoint, and how often each is taken."""


def cases(count: int, chance: random.Random, runs: dict[str, Path], scratch: Path) -> list[Case]:
    """Plan so many openings: each is made when its turn comes."""
    packed_zeros(BOMB)  # once, before processes are forked
    parts = {name: (Parts(run / "checkpoints" / "last.zip"), run) for name, run in runs.items()}
    planned = []
    for _ in range(count):
        way, door, source = drawn(WAYS, chance), drawn(DOORS, chance), chance.choice(list(parts))
        planned.append(
            Case(f"{source}, {way}, {door}", chance.getrandbits(64), lambda case: prepare(case, parts, scratch))
        )
    return planned


def drawn(weighted: dict[str, tuple[Any, float]], chance: random.Random) -> str:
    """Draw a name."""
    return chance.choices(list(weighted), [weight for _, weight in weighted.values()])[0]


def prepare(case: Case, parts: dict[str, tuple[Parts, Path]], scratch: Path) -> tuple[list[str], Callable[[], bool]]:
    """Write the files of a case; gives what is typed, and what says whether the file is as good as before."""
    source, way, door = case.name.split(", ")
    good, run = parts[source]
    data = WAYS[way][0](good, random.Random(case.seed))
    place = scratch / "run"
    file = place / "checkpoints" / "last.zip"
    shutil.rmtree(scratch, ignore_errors=True)
    if "{run}" in DOORS[door][0]:
        shutil.copytree(run, place)
    else:
        file.parent.mkdir(parents=True)
    for name in ("last.zip", "previous.zip", "best.zip"):
        file.with_name(name).write_bytes(data)
    filled = {"file": file, "run": place, "scratch": scratch, "env": good.manifest["env_id"]}

    def as_good() -> bool:
        try:
            manifest, _ = checkpoint.read_agent(io.BytesIO(data))  # the command may have written another since
        except checkpoint.CheckpointError:
            return False
        return manifest == checkpoint.read_agent(run / "checkpoints" / "last.zip")[0]

    return [word.format(**filled) for word in DOORS[door][0]], as_good
