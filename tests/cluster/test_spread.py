"""Environments in shards give what they give together, come home as they stand, and say what they cannot do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from shard_runs import bits, made, train
from stable_baselines3.common.callbacks import CallbackList

from agents import NPG, PES
from agents.cluster.executor import Serial
from agents.rollout.spread import Spread
from agents.run import cli
from envs import SnapshotError, make_vec
from envs.sb3 import as_vector

KINDS: dict[str, dict[str, Any]] = {
    "Hopper-v5": {},
    "Ant-v5": {},
    "CartPole-v1": {},
    "families/Point-v0": {"redraw": True, "horizon": 5},
    "families/HopperRandParams-v0": {},
}


@pytest.mark.parametrize("env_id", KINDS)
def test_parts_go_on_as_the_whole_does(env_id: str) -> None:
    whole = make_vec(env_id, 5, seed=1, **KINDS[env_id])
    whole.reset()
    whole.action_space.seed(1)
    actions = [torch.from_numpy(whole.action_space.sample()) for _ in range(20)]
    for action in actions[:3]:
        whole.step(action)
    if env_id == "CartPole-v1":  # whose environments move into the parts
        twin = make_vec(env_id, 5)
        twin.restore(whole.snapshot())
        parts = [twin.part(0, 3), twin.part(3, 2)]
    else:
        parts = [whole.part(0, 3, num_threads=1), whole.part(3, 2)]
    for action in actions[3:]:
        expected = whole.step(action)
        found = zip(*(part.step(x)[:4] for part, x in zip(parts, (action[:3], action[3:]), strict=True)), strict=True)
        assert all(torch.equal(x, torch.cat(pair)) for x, pair in zip(expected, found, strict=False))


@pytest.mark.parametrize(
    ("name", "num_envs"), [("npg", 20), ("npg any environment", 20), ("pes", 68), ("pes truncated_es", 99)]
)
def test_shards_here_give_the_bits_of_all_together(name: str, num_envs: int) -> None:
    """Of npg one shard: more, and products may round otherwise."""
    one, many = (train(made(name, executor, num_envs=num_envs, n_steps=10), 3) for executor in (None, Serial()))
    assert bits(one) == bits(many)


@pytest.mark.parametrize(("name", "changed"), [("ppo", {}), ("pes", {"num_envs": 68, "n_steps": 10}), ("fomaml", {})])
def test_a_saved_run_goes_on_exactly_and_so_does_one_whose_environments_came_home(
    name: str, changed: dict[str, int], tmp_path: Path
) -> None:
    agent = train(made(name, Serial(), **changed), 3)
    agent.save(tmp_path / "saved")
    env = made(name, None if name == "pes" else Serial(), **changed).env  # of pes ordinary ones are the same
    loaded = type(agent).load(tmp_path / "saved", env, device="cpu")
    returned = type(agent).load(tmp_path / "saved", made(name, Serial(), **changed).env, device="cpu")
    train(returned, 1)
    train(agent, 1)
    train(loaded, 1)
    assert bits(loaded) == bits(agent)
    returned.env.get_attr("num_envs")
    assert returned.env.vector.shards == []
    assert bits(train(returned, 1)) == bits(train(agent, 1))


class Breaking(Serial):
    """Breaks off, once it is told to, when the first shard has done what all are to do."""

    breaks = False

    def __init__(self) -> None:
        super().__init__()
        self.works: list[str] = []

    def each(self, work: Any, *shared: Any, own: Any = None, alters: bool = True) -> list[Any]:
        self.works.append(work.__name__)
        if self.breaks and alters:
            work(self._held[0], *shared, *(own or [()])[0])
            raise KeyboardInterrupt
        return super().each(work, *shared, own=own, alters=alters)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        # KL and discount go by the length of training, which differs by 1e-8 where three iterations are two and one.
        ("npg", {"num_envs": 40, "target_kl_end": None, "gamma_end": None}),
        ("npg any environment", {"target_kl_end": None, "gamma_end": None}),
        ("pes", {"num_envs": 68, "n_steps": 10}),
        ("fomaml", {}),
    ],
)
def test_what_breaks_off_within_an_iteration_is_saved_as_the_iteration_began(
    name: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    executor = Breaking()
    agent, undisturbed = train(made(name, executor, **changed), 2), train(made(name, Serial(), **changed), 3)
    executor.breaks = agent.keeps_beginnings = True
    executor.works.clear()
    with pytest.raises(KeyboardInterrupt):
        train(agent, 1)
    assert executor.works in (["_fill"], ["_estimate"], ["_adapt"])  # states cross for whoever needs them
    agent.save(tmp_path / "saved")
    loaded = type(agent).load(tmp_path / "saved", made(name, Serial(), **changed).env, device="cpu")
    assert bits(train(loaded, 1)) == bits(undisturbed)


def test_what_is_counted_of_many_shards_is_what_is_counted_together() -> None:
    one, many = (train(made("npg any environment", executor), 6) for executor in (None, Serial()))
    assert one.num_timesteps == many.num_timesteps == 6 * 70 * 8
    assert one.env.vector.num_envs == many.env.vector.num_envs
    assert len(many.env.vector.shards) == 3
    assert one.collector.episodes.lengths.equal(many.collector.episodes.lengths)
    assert one.episode_lengths == many.episode_lengths


class Odd(gymnasium.Wrapper):
    """Gives a huge reward in its seventh step, if it is the last one that was made."""

    made = 0

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        Odd.made += 1
        self.number, self.steps = Odd.made, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        observation, reward, *rest = self.env.step(action)
        return observation, 1e30 if (self.number, self.steps) == (40, 7) else reward, *rest


def test_an_error_names_the_environment_by_its_number_among_all() -> None:
    Odd.made = 0
    env = Spread(make_vec(lambda: Odd(gymnasium.make("CartPole-v1")), 40), Serial())
    agent = NPG("MlpPolicy", env, seed=0, n_steps=16, device="cpu")
    with pytest.raises(ValueError, match=r"environment 39 gave the reward 1.*e\+30 at step 7"):
        agent.learn(1000)
    agent.learn(1000)  # in new episodes


def test_what_needs_single_steps_or_cannot_be_cut_is_refused() -> None:
    pes = PES("LinearPolicy", Spread(make_vec("Swimmer-v5", 4, autoreset="disabled"), Serial()), seed=0)
    npg = NPG("MlpPolicy", Spread(make_vec("CartPole-v1", 4), Serial()), seed=0)
    for agent in (pes, npg):
        with pytest.raises(ValueError, match="callbacks and the progress bar see single steps"):
            agent.learn(1000, CallbackList([]))
    foreign = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.make("CartPole-v1")] * 2, autoreset_mode=AutoresetMode.SAME_STEP
    )
    with pytest.raises(SnapshotError, match=r"make them with envs\.make_vec"):
        Spread(as_vector(foreign), Serial())


def test_environments_at_home_are_ordinary_ones() -> None:
    env, ordinary = Spread(make_vec("Hopper-v5", 3, seed=2), Serial()), make_vec("Hopper-v5", 3, seed=2)
    actions = np.zeros((3, 3), np.float32)
    for one in (env, ordinary):
        one.reset()
    assert torch.equal(env.step(actions)[0], ordinary.step(actions)[0])
    assert torch.equal(env.restore(env.snapshot()), ordinary.restore(ordinary.snapshot()))
    assert env.max_episode_steps == 1000
    env.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--workers 2", "--executor ray too"),
        ("--executor serial --ray-address auto", "--executor ray too"),
        ("--executor ray --workers 0", "--workers is 0; give at least 1"),
        ("--executor ray --step-timeout 5", "--step-timeout is 5, which watches"),
        ("--executor ray", 'pip install "geodesic-rl[ray]"'),
    ],
)
def test_what_was_typed_wrongly_is_one_sentence(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.train(["npg", "--env", "CartPole-v1", *words.split(), "--runs", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_in_shards_is_trained_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    words = [
        "pes",
        "--env",
        "CartPole-v1",
        "--num-envs",
        "68",
        "--n-steps",
        "5",
        "--eval-episodes",
        "1",
        "--threads",
        "1",
        "--quiet",
    ]
    for folder, more in ((run, ["--executor", "serial"]), (str(tmp_path / "other"), [])):
        assert cli.train([*words, "--steps", "300", "--run-dir", folder, *more]) == 0
    assert cli.main(["resume", run, "--steps", "600", "--executor", "serial", "--quiet"]) == 0
    assert cli.main(["resume", str(tmp_path / "other"), "--steps", "600", "--quiet"]) == 0
    first, second = (PES.load(folder / "checkpoints" / "last.zip") for folder in (tmp_path / "run", tmp_path / "other"))
    assert bits(first)[:2] == bits(second)[:2]
    assert cli.main(["resume", str(tmp_path / "other"), "--steps", "900", "--executor", "serial"]) == 2
    assert "for a run that had one" in capsys.readouterr().err
