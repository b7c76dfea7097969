import gc
import io
import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import agents
from agents import checkpoint
from agents.checkpoint import CheckpointError, read, write
from agents.run import cli

TENSORS = {
    "float64": torch.linspace(0, 1, 7, dtype=torch.float64),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "uint64": torch.tensor([2**64 - 1], dtype=torch.uint64),
    "bool": torch.tensor([[True, False]]),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "strided": torch.arange(6.0).reshape(2, 3).T,
    "nan": torch.tensor([float("nan"), float("inf")]),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "last.zip"
    write(path, {"algorithm": "npg", "num_timesteps": 10**12}, TENSORS)
    return path


def rewrite(path: Path, **members: bytes) -> None:
    """Replace members of the archive at path, leaving its own checksums valid."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content |= {name.replace("__", "."): data for name, data in members.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def test_round_trip_is_exact(saved: Path) -> None:
    manifest, tensors = read(saved)
    assert manifest["algorithm"] == "npg"
    assert manifest["num_timesteps"] == 10**12
    assert manifest["versions"]["torch"]
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert tensors[name].shape == tensor.shape, name
        assert checkpoint.digest(tensors[name]) == checkpoint.digest(tensor), name


def test_the_tensors_are_stored_as_safetensors_stores_them(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        assert archive.read("tensors.safetensors") == safetensors.torch.save(
            {name: tensor.contiguous() for name, tensor in TENSORS.items()}
        )


def test_saving_tensors_of_ever_other_sizes_keeps_no_memory() -> None:
    def save(sizes: range) -> int:
        for size in sizes:
            write(io.BytesIO(), {}, {"x": torch.zeros(size)})
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = save(range(100, 150))
        assert save(range(150, 250)) - before < 2**15
    finally:
        tracemalloc.stop()


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    whole = torch.arange(4.0)
    write(tmp_path / "a.zip", {}, {"whole": whole, "part": whole[1:3]})
    assert read(tmp_path / "a.zip")[1]["part"].tolist() == [1.0, 2.0]


def test_the_archive_is_stored_and_holds_two_plain_members(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        assert archive.namelist() == ["manifest.json", "tensors.safetensors"]
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}


def test_a_tensor_is_hashed_once_to_read_and_twice_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import agents

    hashed: list[int] = []
    digest = checkpoint.digest
    monkeypatch.setattr(checkpoint, "digest", lambda tensor: hashed.append(1) or digest(tensor))
    path = tmp_path / "npg.zip"
    agents.NPG("MlpPolicy", "CartPole-v1", num_envs=1).save(path)
    tensors = len(read(path)[1])
    assert len(hashed) == 3 * tensors
    hashed.clear()
    agents.load(path)
    assert len(hashed) == tensors


def test_the_manifest_comes_without_the_tensors(saved: Path) -> None:
    assert checkpoint.read_manifest(saved) == read(saved)[0]
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        checkpoint.read_manifest(saved.with_name("nothing.zip"))


def test_a_digest_tells_dtype_and_shape_apart() -> None:
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)]
    assert len({checkpoint.digest(tensor) for tensor in zeros}) == 3


def test_writing_again_replaces_and_leaves_no_temporary_file(saved: Path) -> None:
    write(saved, {"algorithm": "ppo"}, {})
    assert read(saved)[0]["algorithm"] == "ppo"
    assert [file.name for file in saved.parent.iterdir()] == ["last.zip"]


def test_a_failed_write_leaves_the_earlier_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def damaged(specs: dict[str, Any]) -> bytes:
        data = bytearray(original(specs))
        data[-1] ^= 1
        return bytes(data)

    original = checkpoint.serialize
    monkeypatch.setattr(checkpoint, "serialize", damaged)
    with pytest.raises(CheckpointError, match="sha256"):
        write(saved, {}, {"x": torch.zeros(3)})
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["last.zip"]


def test_a_manifest_that_is_not_json_leaves_the_earlier_file(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        write(saved, {"policy": object()}, {})
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["last.zip"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint file at .*nothing\.zip"):
        read(tmp_path / "nothing.zip")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", pickle.dumps({"a": 1})])
def test_what_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last.zip"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or not a geodesic-rl checkpoint"):
        read(path)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        read(saved)


def test_a_flipped_byte_is_noticed(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[data.index(TENSORS["float64"].numpy().tobytes()) + 20] ^= 1
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        read(saved)


def test_other_tensors_than_the_manifest_says_are_named(saved: Path) -> None:
    other = {**TENSORS, "float64": torch.zeros(7, dtype=torch.float64)}
    rewrite(saved, tensors__safetensors=safetensors.torch.save({n: t.contiguous() for n, t in other.items()}))
    with pytest.raises(CheckpointError, match="float64 does not match the sha256"):
        read(saved)


def test_a_missing_tensor_is_named(saved: Path) -> None:
    rewrite(saved, tensors__safetensors=safetensors.torch.save({"bool": TENSORS["bool"]}))
    with pytest.raises(CheckpointError, match="bfloat16, empty, float64 do not match"):
        read(saved)


def test_a_stable_baselines3_save_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data", "policy.pth", "_stable_baselines3_version"):
            archive.writestr(name, "")
    with pytest.raises(CheckpointError, match="saved by Stable-Baselines3"):
        read(path)


def test_a_foreign_zip_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "torch.zip")
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json and no tensors\.safetensors"):
        read(tmp_path / "torch.zip")


def test_a_foreign_manifest_is_refused(saved: Path) -> None:
    rewrite(saved, manifest__json=b'{"name": "an extension"}')
    with pytest.raises(CheckpointError, match="of another kind"):
        read(saved)


def test_a_newer_format_says_update(saved: Path) -> None:
    manifest, _ = read(saved)
    rewrite(saved, manifest__json=json.dumps({**manifest, "format_version": 99}).encode())
    with pytest.raises(CheckpointError, match=r"format 99 .* update geodesic-rl"):
        read(saved)


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "one" / "last.zip", {"n": 1}, TENSORS)
    assert read(tmp_path / "runs" / "one" / "last.zip")[0]["n"] == 1
    with pytest.raises(OSError, match=r"last\.zip"):
        write(tmp_path / "runs" / "one" / "last.zip" / "below.zip", {}, {})


def test_the_suffix_may_be_left_out_to_read(saved: Path) -> None:
    assert read(saved.with_suffix(""))[0] == read(saved)[0]
    saved.rename(saved.with_name("model_0.5.zip"))
    assert read(saved.with_name("model_0.5"))[0]["algorithm"] == "npg"


def test_a_file_that_is_open_is_written_and_read(saved: Path) -> None:
    stream = io.BytesIO()
    write(stream, {"algorithm": "npg"}, TENSORS)
    manifest, tensors = read(stream)
    assert manifest["algorithm"] == "npg"
    assert tensors.keys() == TENSORS.keys()
    with saved.open("rb") as file:
        assert read(file)[0]["num_timesteps"] == 10**12
    with pytest.raises(CheckpointError, match=r"BytesIO.* damaged"):
        read(io.BytesIO(b"no zip"))


def test_an_altered_manifest_is_noticed(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        text = archive.read("manifest.json")
    rewrite(saved, manifest__json=text.replace(b"1000000000000", b"1000000000001"))
    for reads in (read, checkpoint.read_manifest):
        with pytest.raises(CheckpointError, match="does not match its own sha256"):
            reads(saved)
    without = json.loads(text)
    del without["manifest_sha256"]
    rewrite(saved, manifest__json=json.dumps(without).encode())
    with pytest.raises(CheckpointError, match="own sha256"):
        read(saved)
    rewrite(saved, manifest__json=json.dumps(without | {"format_version": 1}).encode())
    assert read(saved)[0]["num_timesteps"] == 10**12


def test_compressed_members_are_refused_unread(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="neither of them compressed"):
        read(saved)


@pytest.mark.parametrize("field", ["flags", "method"])
def test_odd_zips_are_refused(saved: Path, field: str) -> None:
    data = bytearray(saved.read_bytes())
    for signature, flags, method in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        place = data.index(signature)
        if field == "flags":
            data[place + flags] |= 1  # encrypted
        else:
            data[place + method] = 99
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged|compressed"):
        read(saved)


ODD = {
    "no version": {"format_version": None},
    "a word for a version": {"format_version": "two"},
    "no digests": {"sha256": None},
    "a list of digests": {"sha256": []},
    "a newer one of nobody": {"format_version": 99, "versions": None},
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_manifests_are_refused(saved: Path, kind: str) -> None:
    manifest, _ = read(saved)
    odd = {key: value for key, value in (manifest | ODD[kind]).items() if value is not None}
    odd["manifest_sha256"] = checkpoint._digest_of_manifest(odd)
    rewrite(saved, manifest__json=json.dumps(odd).encode())
    with pytest.raises(CheckpointError, match="damaged"):
        read(saved)


def test_agents_of_odd_manifests_are_refused(tmp_path: Path) -> None:
    import agents

    path = tmp_path / "npg.zip"
    agents.NPG("MlpPolicy", "CartPole-v1", num_envs=1).save(path)
    manifest, tensors = read(path)
    for name in manifest.keys() - {"format", "format_version", "versions", "sha256", "schedules", "counter"}:
        for odd in ({}, [[]], None):
            changed = {key: value for key, value in (manifest | {name: odd}).items() if value is not None}
            with path.open("wb") as file:  # a path's file is read back
                write(file, changed, tensors)
            try:
                agents.load(path)
            except CheckpointError:
                continue
    write(path, manifest, {})
    with pytest.raises(CheckpointError, match="does not fit: in the file it is missing"):
        agents.load(path)


LARGE = {
    "a Discrete space": {"observation_space": {"kind": "Discrete", "n": 10**12, "start": 0}},
    "a Box": {"observation_space": {"kind": "Box", "shape": [2**40], "dtype": "float32", "low": 0.0, "high": 1.0}},
    "many choices": {"action_space": {"kind": "MultiDiscrete", "nvec": [10**9, 10**9], "start": [0, 0]}},
    "bits": {"observation_space": {"kind": "MultiBinary", "n": [2**20, 2**20]}},
    "wide layers": {"net_arch": [10**6, 10**6]},
    "the critic's layers": {"policy_kwargs": {"net_arch": {"pi": [4], "vf": [10**6, 10**6]}}},
    "many layers": {"net_arch": [1] * 100_000},
    "features": {"policy_class": "RBFPolicy", "rbf_features": 10**9},
    "products": {
        "observation_space": {"kind": "Box", "shape": [2**22], "dtype": "float32", "low": 0.0, "high": 1.0},
        "value_network": "quadratic",
    },
}


@pytest.fixture
def agent_file(tmp_path: Path) -> Path:
    agents.NPG("MlpPolicy", "CartPole-v1", num_envs=1, net_arch=(4,), device="cpu").save(tmp_path / "npg.zip")
    return tmp_path / "npg.zip"


def altered(path: Path, tensors: dict[str, torch.Tensor] | None = None, **fields: object) -> Path:
    """Write a checkpoint beside it, its digests right, with other fields and hyperparameters."""
    manifest, own = read(path)
    config = {**manifest["config"], **{name: fields.pop(name) for name in fields.keys() & manifest["config"].keys()}}
    with path.with_name("odd.zip").open("wb") as file:
        write(file, {**manifest, "config": config, **fields}, own | (tensors or {}))
    return path.with_name("odd.zip")


@pytest.mark.parametrize("kind", LARGE)
def test_what_is_larger_than_the_file_is_refused_before_it_is_made(agent_file: Path, kind: str) -> None:
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"odd\.zip is damaged: its .* numbers, and all its tensors are"):
        agents.load(altered(agent_file, **LARGE[kind]))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("member", [0, 1])
def test_a_member_that_says_it_is_larger_than_the_file_is_refused(agent_file: Path, member: int) -> None:
    data, place = bytearray(agent_file.read_bytes()), -1
    for _ in range(member + 1):
        place = data.index(b"PK\x01\x02", place + 1)
    data[place + 20 : place + 28] = (2**31).to_bytes(4, "little") * 2
    agent_file.write_bytes(data)
    with pytest.raises(CheckpointError, match="says that it has 2,147,483,648 bytes, and can have"):
        agents.load(agent_file)


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("num_timesteps", "100"), ("num_timesteps", -1), ("iteration", 2**70), ("stream_seed", 0.5), ("versions", []),
        ("metrics", {"a": []}), ("episode_infos", [{"r": "1", "l": 1}]), ("env_id", []), ("env_kwargs", None),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_named(agent_file: Path, name: str, odd: object) -> None:
    path = agent_file
    if name == "versions":  # which writing adds
        manifest = read(path)[0] | {name: odd}
        manifest["manifest_sha256"] = checkpoint._digest_of_manifest(manifest)
        rewrite(path, manifest__json=json.dumps(manifest).encode())
    else:
        path = altered(path, **{name: odd})
    with pytest.raises(CheckpointError, match=rf"{name} in its manifest\.json is .*, not "):
        agents.load(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32])
def test_a_tensor_of_another_type_is_not_cast(agent_file: Path, dtype: torch.dtype) -> None:
    name, tensor = next((key, x) for key, x in read(agent_file)[1].items() if key.startswith("policy.actor"))
    with pytest.raises(CheckpointError, match=rf"{name} does not fit: in the file it is of {dtype}"):
        agents.load(altered(agent_file, {name: tensor.to(dtype)}))


@pytest.mark.slow
def test_no_odd_file_is_a_traceback(agent_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes changed anywhere, fields and tensors changed with right digests: one sentence each, or an agent."""
    random, (manifest, tensors), whole = np.random.default_rng(0), read(agent_file), agent_file.read_bytes()
    odd = agent_file.with_name("odd.zip")
    values = [None, -1, 0, 1e999, 2**80, "", "x", [], [[]], {}, {"kind": "Box"}, [None], True]
    codes = []

    def evaluated() -> None:
        codes.append(cli.evaluate([str(odd), "--episodes", "1"]))
        err = capsys.readouterr().err
        assert codes[-1] == 0 or err.startswith("evaluate.py: error: "), err
        assert err.count("\n") <= 1, err

    for _ in range(40):
        data = bytearray(whole)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            data[place] = random.integers(256)
        odd.write_bytes(data[: random.integers(len(data))] if random.random() < 0.2 else data)
        evaluated()
    for name in manifest.keys() - {"format", "format_version", "versions", "sha256"}:
        for value in random.choice(np.array(values, object), 2, replace=False):
            altered(agent_file, **{name: value})
            evaluated()
    for name in manifest["config"]:
        for value in random.choice(np.array(values, object), 1, replace=False):
            altered(agent_file, **{name: value})
            evaluated()
    for name in tensors:
        for value in (torch.zeros(0), torch.zeros(3, 3, 3), torch.zeros((), dtype=torch.int64)):
            altered(agent_file, {name: value})
            evaluated()
    assert {0, 1} <= set(codes) <= {0, 1, 2}


def test_lists_of_members_and_manifests_are_short_before_they_are_read(agent_file: Path) -> None:
    whole = agent_file.read_bytes()
    start, one = whole.index(b"PK\1\2"), b"PK\1\2" + bytes(24) + b"\1" + bytes(17) + b"x"
    listed = whole[start : whole.rindex(b"PK\5\6")] + one * 200_000
    end = b"PK\5\6" + bytes(4) + b"\xff" * 4 + len(listed).to_bytes(4, "little") + start.to_bytes(4, "little")
    long = json.dumps({"a": [[]] * 3_000_000}).encode()
    for content in (whole[:start] + listed + end + bytes(2), long):
        if content is long:
            agent_file.write_bytes(whole)
            rewrite(agent_file, manifest__json=long)
        else:
            agent_file.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=r"a zip of few members|says that it has \d+,\d+,\d+ bytes"):
            read(agent_file)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()


def test_odd_spaces_and_names_of_tensors_are_refused(agent_file: Path) -> None:
    box = {"kind": "Box", "shape": [4], "dtype": "float32", "low": 0.0, "high": 1.0}
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"its numbers are of \|S100000000"):
        agents.load(altered(agent_file, observation_space=box | {"dtype": "S100000000"}))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    with pytest.raises(CheckpointError, match=r"is damaged or not a .*float"):
        checkpoint.read_agent(altered(agent_file, observation_space=box | {"low": {}}))
    with pytest.raises(CheckpointError, match=r"episode_successes in its manifest\.json is .*, not a list of true and"):
        agents.load(altered(agent_file, episode_successes=["a", None]))
    with pytest.raises(CheckpointError, match=r"policy_class in its manifest.json is 'xxx.*, not a name"):
        agents.load(altered(agent_file, policy_class="x" * 2000))
    with pytest.raises(CheckpointError, match="its observation_space is of 0 numbers"):
        agents.load(altered(agent_file, observation_space=box | {"shape": [0]}))
    with pytest.raises(CheckpointError, match="the name of a tensor has 2,000 letters") as caught:
        agents.load(altered(agent_file, {"x" * 2000: torch.zeros(1)}))
    assert len(str(caught.value)) < 300
