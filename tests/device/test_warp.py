"""MuJoCo Warp's environments: MuJoCo's steps to rounding, masks, what overflows or diverges, and training.

Warp runs on its CPU device here, and on a GPU with --device cuda. tests/contract has what all environments keep to.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import array_api_compat.torch
import mujoco
import numpy as np
import pytest
import torch
from addresses import replays

from agents import NPG, PPO, Reptile, npg
from benchmarks.envs import gpu
from benchmarks.envs.warp_parity import compare
from envs import make_vec
from envs.mujoco.model import load_model
from envs.mujoco.tasks import RandomStreams

pytest.importorskip("mujoco_warp")
import warp

from envs.mujoco.warp_families import DERIVED
from envs.mujoco.warp_streams import WarpStreams

pytestmark = pytest.mark.slow
RANDOM_BODIES = "families/HopperRandParams-v0"


@pytest.fixture(name="where", scope="session")
def _where(device: str) -> str:
    return device if device.startswith("cuda") else "cpu"


def made(where: str, env_id: str = "Hopper-v5", num_envs: int = 3, **kwargs: Any) -> Any:
    return make_vec(env_id, num_envs, backend="warp", device=where, seed=0, **kwargs)


STEPS = {"Hopper-v5": 1e-4, "InvertedPendulum-v5": 1e-5, RANDOM_BODIES: 1e-4, "families/HalfCheetahVel-v0": 1e-3}


@pytest.mark.parametrize(("env_id", "most"), STEPS.items())
def test_a_step_is_mujocos_to_rounding(env_id: str, most: float, where: str) -> None:
    row = compare(env_id, 4, 30, where)
    assert row["reset"] < 1e-6
    assert row["step, most"] < most
    assert row["reward, most"] < most
    assert row["ends that differ"] == 0
    assert row["free, 10 steps"] < 100 * most


def test_capsules_that_stand_upright_have_mujocos_tangents(where: str) -> None:
    # With MuJoCo Warp's own contacts the median is 0.1.
    assert compare("Ant-v5", 2, 15, where)["step, median"] < 1e-4


def test_resetting_some_leaves_the_others_alone(where: str) -> None:
    env, untouched = made(where), made(where)
    for each in (env, untouched):
        each.reset()
        each.step(torch.full((3, 3), 0.3))
    env.reset(ids=[1])
    found, expected = (each.step(torch.full((3, 3), -0.3)) for each in (env, untouched))
    for x, y in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(x[[0, 2]].cpu(), y[[0, 2]].cpu())
    assert not torch.equal(found[0][1].cpu(), expected[0][1].cpu())


def test_too_little_room_is_said_with_what_to_give(where: str) -> None:
    env = made(where, njmax=1, nconmax=24)
    agent = NPG("MlpPolicy", env, n_steps=64, net_arch=(4,), seed=0, device=where)
    with pytest.raises(RuntimeError, match=r"no room for all rows of constraints of a world \(njmax is 1\).*njmax=2"):
        agent.learn(10_000)


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "HalfCheetah-v5"])  # the other one ends no episode itself
def test_a_simulation_that_diverges_ends_where_it_stood_and_is_counted(env_id: str, where: str) -> None:
    env = made(where, env_id, max_episode_steps=50)
    still = torch.zeros(3, *env.single_action_space.shape)
    before = env.reset()[0].clone()
    env._qvel[1] = torch.nan
    observations, rewards, terminated, _, info = env.step(still)
    assert terminated.tolist() == [False, True, False]
    assert rewards[1] == 0.0
    assert (rewards[[0, 2]] != 0.0).all()
    assert torch.equal(info["final_obs"][1], before[1])
    assert observations.isfinite().all()
    env.heed({name: value.cpu() for name, value in env.counts().items()})
    assert env.blowups == 1
    for _ in range(3):
        assert env.step(still)[0].isfinite().all()


def test_a_run_goes_on_to_the_same_numbers(where: str, tmp_path: Any) -> None:
    def agent() -> NPG:
        return NPG("MlpPolicy", made(where, "InvertedPendulum-v5"), n_steps=8, net_arch=(4,), seed=0, device=where)

    # Schedules count from the beginning of each call of learn.
    straight = agent().learn(48).learn(48, reset_num_timesteps=False)
    agent().learn(48).save(tmp_path / "half.zip")
    resumed = NPG.load(tmp_path / "half.zip", env=made(where, "InvertedPendulum-v5"), device=where)
    resumed.learn(48, reset_num_timesteps=False)
    if where == "cpu":
        for x, y in zip(straight.policy.parameters(), resumed.policy.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_a_model_with_the_solver_pgs_is_refused_in_words(where: str) -> None:
    with pytest.raises(ValueError, match=r"asks for the solver PGS.*take newton/Humanoid-v5"):
        made(where, "Humanoid-v5")


def test_what_is_no_task_of_mujocos_is_refused_in_words(where: str) -> None:
    with pytest.raises(ValueError, match="backend 'warp' does not have 'CartPole-v1'; it has Ant-v5"):
        made(where, "CartPole-v1")
    with pytest.raises(ValueError, match="was given width, but MuJoCo Warp does not draw"):
        made(where, width=10)


def test_each_world_has_the_body_of_its_task_and_what_follows_from_it(where: str) -> None:
    env, here = made(where, RANDOM_BODIES), make_vec(RANDOM_BODIES, 3, seed=0)
    for tasks in (env.tasks, here.draw_tasks([7, 8, 9])):  # type: ignore[attr-defined]
        env.set_tasks(tasks)
        parameters = here.task.parameters(tasks, here.model)  # type: ignore[attr-defined]
        for world in range(3):
            model = load_model(here.task.xml_file)  # type: ignore[attr-defined]
            for name, values in parameters.items():
                getattr(model, name)[:] = values[world]
            mujoco.mj_setConst(model, mujoco.MjData(model))
            for name in (*parameters, *DERIVED):
                expected = getattr(model, name)
                found = warp.to_torch(getattr(env._model, name))[world].cpu().numpy().reshape(expected.shape)
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_tasks_are_given_kept_and_refused_as_on_the_cpu(where: str) -> None:
    env, here = made(where, "families/HalfCheetahVel-v0"), make_vec("families/HalfCheetahVel-v0", 3, seed=0)
    assert np.array_equal(env.tasks, here.tasks)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"\[9.0\] is no task of families.*; give one number from 0 to 2"):
        env.set_tasks([[9.0]], ids=[1])
    env.set_tasks([[1.5]], ids=[1])
    assert env.tasks[1] == 1.5
    env.reset()
    kept, actions = env.snapshot(), torch.zeros(3, 6)
    before = env.step(actions)[1].clone()
    env.set_tasks([[0.5]] * 3)
    env.reset()
    assert not torch.allclose(env.step(actions)[1], before)
    env.restore(kept)
    assert torch.equal(env.step(actions)[1], before)
    assert env.tasks[1] == 1.5


def test_it_is_learned_to_adapt_to_bodies(where: str) -> None:
    env = made(where, RANDOM_BODIES, num_envs=8, horizon=8)
    agent = Reptile("MlpPolicy", env, n_steps=8, meta_batch_size=2, net_arch=(4,), seed=0, device=where)
    before = [x.detach().clone() for x in agent.policy.parameters()]
    agent.learn(1)
    assert not all(torch.equal(x, y) for x, y in zip(before, agent.policy.parameters(), strict=True))


def test_what_families_cannot_do_there_is_refused_in_words(where: str) -> None:
    with pytest.raises(ValueError, match="redraw is True, but tasks are drawn on the CPU"):
        made(where, RANDOM_BODIES, redraw=True)
    with pytest.raises(ValueError, match="backend 'warp' does not have 'families/Point-v0'"):
        made(where, "families/Point-v0")


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5", RANDOM_BODIES])
def test_a_step_could_be_recorded(env_id: str, where: str) -> None:
    limit = {"horizon": 3} if "families" in env_id else {"max_episode_steps": 3}
    env = made(where, env_id, **limit)
    env._asks = False  # as on a GPU
    agent = NPG("MlpPolicy", env, n_steps=8, net_arch=(4,), seed=0, device=where)
    agent.learn(48)
    with torch.no_grad():
        agent.collector.steps.t.zero_()  # type: ignore[union-attr]
        assert replays(agent.collector.steps._step)  # type: ignore[union-attr]


def test_physics_that_is_recorded_is_what_it_would_be(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env, plain = made(where), made(where)
    monkeypatch.setattr(plain._substeps, "calls", 9)  # too late to record
    monkeypatch.setattr(plain._forward, "calls", 9)
    for each in (env, plain):
        each.reset(seed=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        actions = torch.rand(3, 3, generator=generator) * 2 - 1
        for x, y in zip(env.step(actions)[:4], plain.step(actions)[:4], strict=True):
            assert torch.equal(x.cpu(), y.cpu())
    assert env._substeps.graph is not None
    assert plain._substeps.graph is None


def test_the_benchmark_runs_from_physics_to_training(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {}
    monkeypatch.setattr(gpu, "write", lambda name, results: kept.update({name: results}))
    tiny = ["--device", where, "--worlds", "8", "--tasks", "InvertedPendulum-v5", "--seconds", "0.05"]
    for own in ([], ["--trace", str(tmp_path / "npg.json")]):
        monkeypatch.setattr(sys, "argv", ["gpu", *tiny, *own])
        gpu.main()
    (results,) = kept.values()
    (row,) = results["rows"]
    assert (row["env"], row["worlds"]) == ("InvertedPendulum-v5", 8)
    assert all(row[name] > 0 for name in ("physics", "task", "policy", *gpu.AGENTS))
    assert row["npg/physics"] == row["npg"] / row["physics"] < 1
    assert (tmp_path / "npg.json").stat().st_size > 10_000
    assert "InvertedPendulum-v5 8: physics" in capsys.readouterr().out


def test_what_fails_in_a_benchmark_is_told_and_the_rest_goes_on(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {}
    monkeypatch.setattr(gpu, "write", lambda name, results: kept.update({name: results}))
    monkeypatch.setitem(gpu.AGENTS, "ppo", (PPO, lambda n: {"n_steps": 0}))
    tiny = ["--device", where, "--worlds", "8", "--tasks", "InvertedPendulum-v5", "NoSuch-v5", "--seconds", "0.05"]
    monkeypatch.setattr(sys, "argv", ["gpu", *tiny])
    gpu.main()
    (results,) = kept.values()
    row, unknown = results["rows"]
    assert row["pes"] > 0
    assert row["ppo failed"].startswith("ValueError: n_steps is 0")
    assert "environments failed" in unknown
    assert "InvertedPendulum-v5 8 ppo FAILED: ValueError" in capsys.readouterr().out


@pytest.mark.parametrize("compiler", [False, True])
def test_the_benchmark_sets_ways_of_launching_beside_each_other(
    compiler: bool, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if where != "cpu":
        pytest.skip("on a GPU it is a part of make bench-gpu")
    kept = {}
    monkeypatch.setattr(gpu, "write", lambda name, results: kept.update({name: results}))
    if not compiler:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif shutil.which("g++") is None:
        pytest.skip("there is no compiler")
    tiny = ["--device", where, "--tasks", "InvertedPendulum-v5", "--seconds", "0.05", "--ways", "8"]
    monkeypatch.setattr(sys, "argv", ["gpu", *tiny])
    before = dict(vars(npg))
    gpu.main()
    assert vars(npg) == before
    (results,) = kept.values()
    for way in ["eager"] + ["compiled"] * compiler:
        assert all(results["ways"][f"{work}/s, {way}"] > 0 for work in ("rollouts", "updates"))
    assert ("torch.compile is left out" in capsys.readouterr().out) != compiler
    assert not any("failed" in name for name in results["ways"])


def test_episodes_begin_by_the_numbers_of_the_cpu(where: str) -> None:
    generator = torch.Generator().manual_seed(0)
    seed = torch.randint(2**62, (5,), generator=generator)
    episode = torch.tensor([0, 1, 2, 1000, 2**40])
    expected = RandomStreams(seed, episode, xp=array_api_compat.torch)
    found = WarpStreams(warp.device_from_torch(torch.device(where)), seed.to(where), episode.to(where))
    for draw in (lambda x: x.uniform(0.0, 1.0, 3), lambda x: x.uniform(-2.0, 5.0, 4), lambda x: x.normal(3)):
        x, y = draw(expected), draw(found).cpu()
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=0 if where == "cpu" else 1e-12, atol=0 if where == "cpu" else 1e-12)
