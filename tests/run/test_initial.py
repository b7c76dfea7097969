"""--init-from: training that begins from a saved agent's policy."""

from pathlib import Path

import pytest
import torch

from agents import FOMAML, NPG, PES, PPO, checkpoint, load
from agents.run import cli
from agents.run.folder import RunFolder
from agents.run.initial import Initial

SIZES = ["--num-envs", "2", "--n-steps", "32", "--eval-episodes", "1", "--target-kl", "1e-9", "--target-kl-end", "None"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"num_envs": 2, "n_steps": 32, "reused_rollouts": 0, "net_arch": (7,), "value_network": "linear"}
    agent = NPG("MlpPolicy", "Hopper-v5", seed=0, **small)
    agent.learn(256).save(tmp_path_factory.mktemp("saved") / "hopper.zip")
    return tmp_path_factory.getbasetemp() / "saved0" / "hopper.zip"


def begin(file: Path, run: Path, *more: str) -> int:
    asked = ["npg", "--env", "Hopper-v5", *SIZES, "--steps", "64", "--run-dir", str(run), "--init-from", str(file)]
    return cli.train([*asked, *more])


def test_a_run_begins_as_the_saved_agent_ended(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert begin(file, tmp_path / "run") == 0
    out, run = capsys.readouterr().out, RunFolder(tmp_path / "run")
    assert f"begins from {file} (npg on Hopper-v5, 256 steps)" in out
    settings = run.read_config()
    assert settings.config["net_arch"] == [7]
    assert (settings.origins["net_arch"], settings.origins["n_steps"], settings.origins["gae_lambda"]) == (
        "file", "flag", "preset",
    )  # fmt: skip
    before, after = load(file), load(run.last)
    assert after.num_timesteps == 64
    # One update with a KL of 1e-9 moves next to nothing.
    for (name, x), y in zip(before.policy.actor.named_parameters(), after.policy.actor.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-3, msg=name)
    assert after.policy.normalizer.count == before.policy.normalizer.count + 64


def test_a_runs_folder_is_its_last_checkpoint(file: Path, tmp_path: Path) -> None:
    assert begin(file, tmp_path / "first") == 0
    assert Initial.of(str(tmp_path / "first")).file == tmp_path / "first" / "checkpoints" / "last.zip"


def test_what_is_typed_counts_and_must_fit(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert begin(file, tmp_path / "run", "--net-arch", "9") == 2
    assert "a MlpPolicy of npg whose parameters are others: actor." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_spaces_are_refused(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["npg", "--env", "InvertedPendulum-v5", "--run-dir", str(tmp_path / "run"), "--init-from", str(file)]
    assert cli.train(asked) == 2
    assert f"--init-from is '{file}', whose observation_space is Box(-inf, inf, (11,)" in capsys.readouterr().err
    assert cli.train([*asked[:-1], "nowhere.zip"]) == 1


def test_another_algorithm_takes_the_policy(file: Path) -> None:
    other = PPO("MlpPolicy", "Hopper-v5", num_envs=2, n_steps=32, net_arch=(7,), value_network="linear")
    Initial.of(str(file)).give(other)
    saved = checkpoint.read(file)[1]
    assert all(torch.equal(x, saved[f"policy.{name}"]) for name, x in other.policy.state_dict().items())
    search = PES("MlpPolicy", "Hopper-v5", num_envs=4, net_arch=(7,), trials=(2,), trial_steps=(4000,))
    with pytest.raises(Exception, match="give --trials without numbers"):
        Initial.of(str(file)).give(search)


def test_a_policy_without_a_fitting_critic_gives_its_actor(tmp_path: Path) -> None:
    family = {"num_envs": 4, "meta_batch_size": 2, "n_steps": 100, "net_arch": (5,)}
    meta = FOMAML("MlpPolicy", "families/Point-v0", **family)
    meta.save(tmp_path / "meta.zip")
    agent = NPG("MlpPolicy", "families/Point-v0", num_envs=2, net_arch=(5,), seed=1)
    critic = {name: x.clone() for name, x in agent.policy.critic.state_dict().items()}
    assert Initial.of(str(tmp_path / "meta")).give(agent).endswith("its critic does not fit and begins anew")
    pairs = zip(meta.policy.actor.parameters(), agent.policy.actor.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    assert all(torch.equal(x, critic[name]) for name, x in agent.policy.critic.state_dict().items())
