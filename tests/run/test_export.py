"""Policies that act from a file alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from agents import NPG, PES, PPO, Agent
from agents.exported import ABOUT, load_policy
from agents.policy.actor_critic import ActorCriticPolicy
from agents.policy.networks import assign_parameters, parameter_vector
from agents.run import cli
from agents.run.errors import RunError
from agents.run.export import export_policy

ROOT = Path(__file__).parents[2]
SUFFIXES = (".onnx", ".pt2", ".safetensors")
SPREAD = 0.05
"""Of the weights: actions are of any size, and the network does not magnify rounding as no trained one does."""
BOX = spaces.Box(-3.0, 3.0, (3,), np.float64)


KINDS: dict[str, tuple[Any, str, spaces.Space, dict[str, Any]]] = {
    "npg": (NPG, "MlpPolicy", spaces.Box(-2.0, 1.0, (2,), np.float32), {}),
    "box of two dimensions": (NPG, "MlpPolicy", spaces.Box(-1.0, 1.0, (2, 3), np.float32), {"activation_fn": "elu"}),
    "float64, gelu": (PPO, "MlpPolicy", spaces.Box(-1.0, 1.0, (2,), np.float64), {"activation_fn": "gelu"}),
    "without bounds, silu": (
        PPO, "MlpPolicy", spaces.Box(-np.inf, np.inf, (1,), np.float32),
        {"activation_fn": "silu"},
    ),
    "linear": (NPG, "LinearPolicy", spaces.Box(-9.0, 9.0, (1,), np.float32), {"normalize_observations": False}),
    "rbf": (NPG, "RBFPolicy", spaces.Box(-9.0, 9.0, (1,), np.float32), {}),
    "discrete": (PPO, "MlpPolicy", spaces.Discrete(4, start=-2), {"activation_fn": "relu"}),
    "multidiscrete": (NPG, "MlpPolicy", spaces.MultiDiscrete([2, 5, 3]), {}),
    "multibinary": (NPG, "RBFPolicy", spaces.MultiBinary(3), {}),
    "pes": (PES, "LinearPolicy", spaces.Box(-1.0, 1.0, (2,), np.float32), {}),
    "pes, discrete": (PES, "MlpPolicy", spaces.Discrete(3), {}),
}  # fmt: skip


def made(kind: str) -> Agent:
    """An agent whose statistics are those of its observations, and whose actions are of any size."""
    algorithm, policy, space, options = KINDS[kind]
    agent = algorithm(policy, None, seed=0, **options)
    agent.observation_space, agent.action_space = BOX, space
    agent._setup_model()
    generator = torch.Generator().manual_seed(1)
    agent.policy.update_normalizer(5.0 + 3.0 * torch.randn(100, 3, generator=generator))
    theta = parameter_vector(agent.policy.actor)
    assign_parameters(agent.policy.actor, theta + SPREAD * torch.randn(theta.shape, generator=generator))
    return agent


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_acts_as_predict_does(kind: str, suffix: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    agent, file = made(kind), tmp_path / f"policy{suffix}"
    assert export_policy(agent, file) <= 1e-6
    assert [one.name for one in tmp_path.iterdir()] == [file.name]
    policy = load_policy(file)
    observations = 5.0 + 3.0 * np.random.default_rng(2).standard_normal((70, 3))
    wanted = agent.predict(observations, deterministic=True)[0]
    assert len(np.unique(wanted, axis=0)) > 1
    for rows in (70, 1):
        found = policy.predict(observations[:rows])[0]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted[:rows].shape)
        np.testing.assert_allclose(found, wanted[:rows], rtol=0, atol=1e-6)
    np.testing.assert_allclose(policy.predict(observations[3])[0], wanted[3], rtol=0, atol=1e-6)
    assert b"/site-packages/" not in file.read_bytes()
    assert str(ROOT).encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("suffix", "absent"),
    [
        (".onnx", ["torch", "mujoco", "gymnasium", "stable_baselines3", "safetensors", "onnx"]),
        (".pt2", ["mujoco", "gymnasium", "stable_baselines3", "safetensors", "onnx"]),
        (".safetensors", ["torch", "mujoco", "gymnasium", "stable_baselines3", "onnx", "onnxruntime"]),
    ],
)
def test_a_file_acts_where_little_is_installed(suffix: str, absent: list[str], tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    agent, file = made("npg"), tmp_path / f"policy{suffix}"
    export_policy(agent, file)
    (tmp_path / "exported.py").write_text((ROOT / "agents" / "exported.py").read_text())
    script = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r} + ["agents", "envs"]))  # importing one is an error
import exported, json, numpy as np
print(json.dumps(exported.load_policy({str(file)!r}).predict(np.full((2, 3), 4.0))[0].tolist()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wanted = agent.predict(np.full((2, 3), 4.0), deterministic=True)[0]
    np.testing.assert_allclose(json.loads(done.stdout), wanted, rtol=0, atol=1e-6)


def test_a_file_says_what_it_holds(tmp_path: Path) -> None:
    agent, file = made("multidiscrete"), tmp_path / "policy.safetensors"
    export_policy(agent, file)
    about = load_policy(file).about
    assert about["observation"] == {"shape": [3]}
    assert about["action"] == {"kind": "categorical", "shape": [3], "choices": [2, 5, 3], "dtype": "int64"}
    assert about["agent"]["algorithm"] == "npg"
    with pytest.raises(ValueError, match=r"the shape \(4,\); give \(3,\)"):
        load_policy(file).predict(np.zeros(4))


class Doubled(ActorCriticPolicy):
    """A policy of one's own, with a layer of one's own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.actor.net.append(Twice())


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_a_policy_of_ones_own_is_traced(tmp_path: Path) -> None:
    agent = NPG(Doubled, None, seed=0)
    agent.observation_space, agent.action_space = BOX, spaces.Box(-1.0, 1.0, (2,), np.float32)
    agent._setup_model()
    assert export_policy(agent, tmp_path / "policy.pt2") <= 1e-6
    with pytest.raises(RunError, match=r"layer Twice, which \.safetensors has no words for; export it to \.onnx"):
        export_policy(agent, tmp_path / "policy.safetensors")
    assert [one.name for one in tmp_path.iterdir()] == ["policy.pt2"]


def test_what_acts_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, right = made("npg"), NPG.predict
    monkeypatch.setattr(NPG, "predict", lambda *a, **k: (right(*a, **k)[0] + 1e-3, None))
    with pytest.raises(RunError, match="differ from the agent's by 1"):
        export_policy(agent, tmp_path / "policy.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RunError, match=r'pip install "geodesic-rl\[onnx\]" brings it'):
        export_policy(made("npg"), tmp_path / "policy.onnx")


def test_the_command_exports_a_checkpoint_and_refuses_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent, policy = made("discrete"), tmp_path / "policy.safetensors"
    agent.save(tmp_path / "agent.zip")
    assert cli.main(["export", str(tmp_path / "agent.zip"), str(policy)]) == 0
    assert "256 actions differ from the agent's by at most 0e+00" in capsys.readouterr().out
    assert load_policy(policy).predict(np.full(3, 5.0))[0] == agent.predict(np.full(3, 5.0), deterministic=True)[0]
    assert cli.main(["export", str(tmp_path / "agent.zip"), str(policy)]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "agent.zip"), str(tmp_path / "policy.bin")]) == 2
    assert "ends in .onnx or .pt2 or .safetensors" in capsys.readouterr().err


def test_files_that_are_no_policy_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors", {"what": "else"})
    with pytest.raises(ValueError, match="does not say of itself"):
        load_policy(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"ends in \.onnx, \.pt2, \.safetensors"):
        load_policy(tmp_path / "other.bin")
    assert ABOUT == "policy.json"
