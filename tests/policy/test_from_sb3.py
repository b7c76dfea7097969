"""Policies of Stable-Baselines3's files: the same actions, and nothing in a file is run."""

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from torch import nn

import agents
from agents import NPG, PES, PPO, REGISTRY, CheckpointError, load_sb3_policy
from agents.run import cli
from agents.run.folder import RunFolder


class Grid(gymnasium.Env):
    """Observations and choices of several dimensions."""

    observation_space = gymnasium.spaces.Box(-3, 3, (2, 3))
    action_space = gymnasium.spaces.MultiDiscrete([3, 2])


gymnasium.register("Grid-v0", entry_point=Grid)

SMALL = {"pi": [8, 4], "vf": [6]}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PPO": ("PPO", "Pendulum-v1", {"policy_kwargs": {"net_arch": SMALL, "activation_fn": nn.ReLU}}),
    "A2C of choices": ("A2C", "CartPole-v1", {}),
    "no hidden layers": ("PPO", "Pendulum-v1", {"policy_kwargs": {"net_arch": []}}),
    "choices as observations": ("PPO", "FrozenLake-v1", {"policy_kwargs": {"net_arch": [5]}}),
    "several dimensions": ("A2C", "Grid-v0", {"policy_kwargs": {"net_arch": [5]}}),
}


def saved(kind: str, path: Path) -> Any:
    """An agent of SB3's with other weights than the first ones, whose last layer is next to nothing."""
    algorithm, env_id, settings = KINDS[kind]
    agent = getattr(sb3, algorithm)("MlpPolicy", env_id, seed=0, device="cpu", **settings)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.normal_(0, 0.3)
    agent.save(path)
    return agent


@pytest.mark.parametrize("kind", KINDS)
def test_its_actions_and_values_are_those_of_sb3(kind: str, tmp_path: Path) -> None:
    theirs = saved(kind, tmp_path / "sb3.zip")
    file = load_sb3_policy(tmp_path / "sb3")
    agent = PPO("MlpPolicy", KINDS[kind][1], policy_kwargs=file.policy_kwargs, n_steps=8, num_envs=1, batch_size=8)
    assert file.give(agent) == f"begins from {tmp_path / 'sb3.zip'} (Stable-Baselines3, 0 steps)"
    space = theirs.observation_space
    space.seed(0)
    drawn = np.array([space.sample() for _ in range(64)])
    seen = drawn * 30 if kind == "PPO" else drawn  # beyond what a normalizer would clip
    np.testing.assert_allclose(agent.predict(seen, deterministic=True)[0], theirs.predict(seen, deterministic=True)[0],
                               atol=1e-6)  # fmt: skip
    given = torch.as_tensor(seen)
    torch.testing.assert_close(
        agent.policy.predict_values(given), theirs.policy.predict_values(given), atol=1e-5, rtol=1e-5
    )
    ours, old = (policy.get_distribution(given) for policy in (agent.policy, theirs.policy))
    torch.testing.assert_close(ours.entropy().reshape(-1), old.entropy().reshape(-1), atol=1e-5, rtol=1e-5)


def test_statistics_of_vec_normalize_are_given_apart(tmp_path: Path) -> None:
    theirs = saved("PPO", tmp_path / "sb3.zip")
    rng = np.random.default_rng(0)
    rms = SimpleNamespace(mean=rng.normal(size=3), var=rng.uniform(0.1, 4, size=3), count=500.0)
    file = load_sb3_policy(tmp_path / "sb3.zip", obs_rms=rms)
    agent = NPG("MlpPolicy", "Pendulum-v1", policy_kwargs=file.policy_kwargs, num_envs=1)
    file.give(agent)
    seen = rng.uniform(-8, 8, (64, 3)).astype(np.float32)
    normal = np.clip((seen - rms.mean) / np.sqrt(rms.var + 1e-8), -10, 10).astype(np.float32)
    actions = theirs.predict(normal, deterministic=True)[0]
    np.testing.assert_allclose(agent.predict(seen, deterministic=True)[0], actions, atol=1e-5)
    assert agent.policy.normalizer.count == 500


def test_a_run_begins_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = saved("PPO", tmp_path / "sb3.zip")
    words = "npg --env Pendulum-v1 --num-envs 2 --n-steps 32 --eval-episodes 1 --steps 64 --target-kl 1e-9"
    asked = [*words.split(), "--target-kl-end", "None", "--init-from", str(tmp_path / "sb3.zip"), "--run-dir"]
    assert cli.train([*asked, str(tmp_path / "run")]) == 0
    assert "(Stable-Baselines3, 0 steps); its critic does not fit and begins anew" in capsys.readouterr().out
    settings = RunFolder(tmp_path / "run").read_config()
    assert (settings.config["net_arch"], settings.config["activation_fn"]) == ([8, 4], "relu")
    assert settings.config["normalize_observations"] is False
    assert settings.origins["net_arch"] == "file"
    agent = agents.load(RunFolder(tmp_path / "run").last)
    ours, weight = agent.policy.actor.net[4].weight, theirs.policy.action_net.weight
    torch.testing.assert_close(ours, weight, rtol=0, atol=1e-3)  # one update with a KL of 1e-9
    assert cli.train([*asked, str(tmp_path / "other"), "--net-arch", "9"]) == 2
    assert "is of another shape than the agent's" in capsys.readouterr().err


@pytest.mark.parametrize("name", REGISTRY)
def test_every_algorithm_begins_from_it(name: str, tmp_path: Path) -> None:
    saved("PPO", tmp_path / "sb3.zip")
    file, kind = load_sb3_policy(tmp_path / "sb3.zip"), REGISTRY[name]
    assert file.policy(kind) == "MlpPolicy"
    shape = file.shape(kind, "MlpPolicy")
    sizes = {"num_envs": 8, "meta_batch_size": 2} if "meta_batch_size" in kind.Config.names() else {"num_envs": 2}
    agent = kind("MlpPolicy", "Pendulum-v1", **sizes, **shape)
    file.give(agent)
    assert torch.equal(agent.policy.actor.net[0].weight, file.parameters["actor.net.0.weight"])
    if kind is PES:
        assert "critic" not in dir(agent.policy)


def test_other_spaces_and_shapes_are_refused(tmp_path: Path) -> None:
    saved("PPO", tmp_path / "sb3.zip")
    file = load_sb3_policy(tmp_path / "sb3.zip")
    kwargs = file.policy_kwargs
    with pytest.raises(ValueError, match=r"The observation_space of .* \(shape \[3\], low .*the agent's is Box"):
        file.give(NPG("MlpPolicy", "Hopper-v5", policy_kwargs=kwargs, num_envs=1))
    with pytest.raises(ValueError, match=r"is of another shape than the agent's; make the agent with"):
        file.give(NPG("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [7]}, num_envs=1))
    with pytest.raises(ValueError, match="is of another shape"):  # its statistics would change what the policy does
        file.give(NPG("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs | {"normalize_observations": True}, num_envs=1))
    wide = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)
    with pytest.raises(ValueError, match=r"The action_space of .*\(shape \[1\], low \[-2.\]"):
        file.give(NPG("MlpPolicy", wide, policy_kwargs=kwargs))


# Files that are not what they should be ------------------------------------------------------------------------------


class Executes:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def weights(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def with_pickle(content: bytes, pickled: bytes) -> bytes:
    """Put another list into what torch.save wrote."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(made, "w") as changed:
        for info in archive.infolist():
            changed.writestr(info, pickled if info.filename.endswith("data.pkl") else archive.read(info))
    return made.getvalue()


def deflated(content: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as changed:
        for info in archive.infolist():
            changed.writestr(info.filename, archive.read(info))
    return made.getvalue()


State = dict[str, torch.Tensor]
Change = Callable[[dict[str, Any], State], Any]
"""Of a good file's settings and weights; gives other content for policy.pth, a list for it alone, or None."""


def with_more(**more: torch.Tensor) -> Change:
    return lambda data, state: weights(state | {name.replace("__", "."): x for name, x in more.items()})


def without(state: State, name: str) -> State:
    return {other: x for other, x in state.items() if other != name}


def with_settings(name: str | None = None, **more: Any) -> Change:
    return lambda data, state: (data if name is None else data[name]).update(more)


NOT_SAVED_SO = "is not as PyTorch saves one"
HOSTILE: dict[str, tuple[str, Change]] = {
    "a payload": ("is not safe: policy.pth names 'posix mkdir'", lambda data, state: pickle.dumps(Executes(), 2)),
    "a payload among weights": ("is not safe: .*mkdir", lambda data, state: weights({**state, "x": Executes()})),
    "a payload by the stack": (r"names '\? \(STACK_GLOBAL\)'", lambda data, state: pickle.dumps(Executes(), 4)),
    "memory": ("names '__builtin__ bytearray'", lambda data, state: pickle.dumps({"x": bytearray(9)}, 2)),
    "one number for all": ("is not a plain float32 tensor", with_more(log_std=torch.zeros(1).expand(2**40))),
    "doubles": ("names 'torch DoubleStorage'", with_more(log_std=torch.zeros(1).double())),
    "no numbers": ("not finite, in log_std", with_more(log_std=torch.tensor([torch.nan]))),
    "deflated weights": (NOT_SAVED_SO, lambda data, state: deflated(weights(state))),
    "no list": (NOT_SAVED_SO, lambda data, state: zipfile_of({"x": b""})),
    "no zip": ("is damaged", lambda data, state: b"PK"),
    "not tensors": ("holds something else than tensors", lambda data, state: weights(OrderedDict(a=3))),
    "another layer": ("the layers of its policy net", with_more(mlp_extractor__policy_net__9__bias=torch.zeros(1))),
    "no value": ("has no value_net.weight", lambda data, state: weights(without(state, "value_net.weight"))),
    "more": ("has features_extractor.x too", with_more(features_extractor__x=torch.zeros(1))),
    "sde": ("use_sde or squash_output", with_settings(use_sde=True)),
    "an own class": ("a policy class of evil", with_settings("policy_class", __module__="evil")),
    "an own activation": ("has the activation os.system", with_settings("policy_kwargs", activation_fn="os.system")),
    "other JSON": (r"is damaged or not a .*AttributeError", with_settings(policy_class=3)),
}


def zipfile_of(members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("sb3") / "good.zip"
    saved("PPO", path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_one_sentence(
    kind: str, members: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, words = json.loads(members["data"]), HOSTILE[kind][0]
    state = torch.load(io.BytesIO(members["policy.pth"]), weights_only=True)
    content = HOSTILE[kind][1](data, state)
    if isinstance(content, bytes) and content.startswith(b"\x80"):  # a list alone, in place of the weights' own
        content = with_pickle(members["policy.pth"], content)
    content = members["policy.pth"] if content is None else content
    file = tmp_path / "odd.zip"
    file.write_bytes(zipfile_of({**members, "data": json.dumps(data).encode(), "policy.pth": content}))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_sb3_policy(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("executed").exists()


def test_compressed_and_missing_members_are_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    file = tmp_path / "odd.zip"
    file.write_bytes(zipfile_of(members, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="data is there 1 times, compressed"):
        load_sb3_policy(file)
    file.write_bytes(zipfile_of({name: x for name, x in members.items() if name != "policy.pth"}))
    with pytest.raises(CheckpointError, match=r"was not saved by Stable-Baselines3: it holds no policy\.pth"):
        load_sb3_policy(file)
    NPG("MlpPolicy", "CartPole-v1", num_envs=1).save(file)
    with pytest.raises(CheckpointError, match="it holds no _stable_baselines3_version"):
        load_sb3_policy(file)


def test_policies_of_other_algorithms_are_refused(tmp_path: Path) -> None:
    sb3.SAC("MlpPolicy", "Pendulum-v1", device="cpu").save(tmp_path / "sac.zip")
    with pytest.raises(CheckpointError, match=r"a policy class of stable_baselines3\.sac\.policies"):
        load_sb3_policy(tmp_path / "sac.zip")
