"""What is not finite is neither saved nor loaded."""

import re
from pathlib import Path

import pytest
import torch

import agents
from agents import NPG, checkpoint
from agents.checkpoint import CheckpointError
from agents.run import cli
from agents.run.folder import RunFolder


@pytest.fixture
def agent() -> NPG:
    agent = NPG("MlpPolicy", "probes/Survival-v0", num_envs=2, n_steps=8, net_arch=(4,), seed=0, device="cpu")
    return agent.learn(16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_do_not_replace_a_good_file(agent: NPG, tmp_path: Path, value: float) -> None:
    file = tmp_path / "last.zip"
    agent.save(file)
    before = file.read_bytes()
    name, parameter = next(iter(agent.policy.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] = value
    with pytest.raises(FloatingPointError, match=rf"last\.zip is not written: values of policy\.{re.escape(name)} are"):
        agent.save(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["policy", "npg", "env", "episode"])
def test_a_file_with_such_values_is_refused_by_every_door(agent: NPG, tmp_path: Path, name: str) -> None:
    manifest, tensors = agent._packed()
    odd = next(key for key, x in tensors.items() if key.startswith(f"{name}.") and x.is_floating_point() and x.numel())
    tensors[odd].view(-1)[-1] = torch.nan
    checkpoint.write(tmp_path / "a.zip", manifest, tensors)
    sentence = rf"a\.zip holds values that are not finite, in {re.escape(odd)}; use another"
    for door in (agents.load, NPG.load, agent.set_parameters):
        with pytest.raises(CheckpointError, match=sentence):
            door(tmp_path / "a.zip")


def test_such_a_file_begins_no_run(agent: NPG, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, tensors = agent._packed()
    name = next(key for key in tensors if key.startswith("policy.actor") and key.endswith("weight"))
    tensors[name] = tensors[name] * torch.inf
    checkpoint.write(tmp_path / "a.zip", manifest, tensors)
    words = ["npg", "--env", "probes/Survival-v0", "--init-from", str(tmp_path / "a.zip")]
    assert cli.train(words) == 1
    assert f"not finite, in {name}" in capsys.readouterr().err


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = NPG.train

    def diverge(self: NPG, batch: object) -> None:
        train(self, batch)
        if self.iteration >= 2:
            with torch.no_grad():
                next(self.policy.critic.parameters()).fill_(torch.nan)

    monkeypatch.setattr(NPG, "train", diverge)
    sizes = ["--num-envs=2", "--n-steps=16", "--net-arch=4", "--eval-episodes=1", "--checkpoint-every=0"]
    words = ["npg", "--env", "probes/Survival-v0", *sizes, "--steps=2000", f"--run-dir={tmp_path / 'run'}"]
    assert cli.train(words) == 1
    folder, said = RunFolder(tmp_path / "run"), capsys.readouterr().err
    assert "not finite" in said
    assert f"The last saved state of this run is in {folder.last}." in said
    assert folder.read_state().state == "failed"
    assert agents.load(folder.last).num_timesteps == 32 * (2 + 5)  # updates that failed are undone


@pytest.mark.filterwarnings("ignore:New episodes begin")
def test_states_of_environments_that_are_none_are_named_or_left_out(agent: NPG, tmp_path: Path) -> None:
    manifest, tensors = agent._packed()
    said = []
    for odd in [name for name in tensors if name.startswith("env.")]:
        checkpoint.write(tmp_path / "a.zip", manifest, tensors | {odd: tensors[odd][:0]})
        try:
            agents.load(tmp_path / "a.zip", "probes/Survival-v0")
        except CheckpointError as error:
            said.append(str(error))
        assert agents.load(tmp_path / "a.zip", "probes/Survival-v0", force_reset=True).num_timesteps == 16
    assert said
    assert all("a.zip holds environments that cannot be put back (" in sentence for sentence in said)
