"""The batched MuJoCo tasks against Gymnasium's own environments, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.mujoco_env import expand_model_path
from gymnasium.vector import AutoresetMode

from envs import make_vec
from envs.infos import row_of
from envs.mujoco import TASKS, MujocoVectorEnv, model
from envs.mujoco.model import skip_idle_work
from envs.mujoco.tasks import Hopper, RandomStreams

COMMON = {"exclude_current_positions_from_observation": False, "frame_skip": 3}
HUMANOID = {
    **COMMON,
    "ctrl_cost_weight": 0.3,
    "reset_noise_scale": 0.05,
    "include_cinert_in_observation": False,
    "include_qfrc_actuator_in_observation": False,
}
CHANGED = {
    "Ant-v5": {
        **COMMON,
        "forward_reward_weight": 2.0,
        "ctrl_cost_weight": 0.2,
        "contact_cost_weight": 3e-3,
        "healthy_reward": 0.7,
        "main_body": "front_left_leg",
        "healthy_z_range": (0.3, 0.9),
        "contact_force_range": (-0.5, 0.3),
        "reset_noise_scale": 0.05,
        "include_cfrc_ext_in_observation": False,
    },
    "HalfCheetah-v5": {**COMMON, "forward_reward_weight": 1.5, "ctrl_cost_weight": 0.3, "reset_noise_scale": 0.2},
    "Hopper-v5": {
        **COMMON,
        "forward_reward_weight": 1.5,
        "ctrl_cost_weight": 0.02,
        "healthy_reward": 0.5,
        "healthy_state_range": (-8.0, 8.0),
        "healthy_z_range": (0.9, 1.5),
        "healthy_angle_range": (-0.1, 0.3),
        "reset_noise_scale": 0.01,
    },
    "Humanoid-v5": {
        **HUMANOID,
        "forward_reward_weight": 1.0,
        "contact_cost_weight": 1e-4,
        "contact_cost_range": (0.01, 0.5),
        "healthy_reward": 2.0,
        "healthy_z_range": (1.1, 1.9),
    },
    "HumanoidStandup-v5": {
        **HUMANOID,
        "include_cfrc_ext_in_observation": False,
        "include_cvel_in_observation": False,
        "uph_cost_weight": 2.0,
        "impact_cost_weight": 1e-5,
        "impact_cost_range": (0.1, 2.0),
    },
    "InvertedDoublePendulum-v5": {"frame_skip": 2, "healthy_reward": 3.0, "reset_noise_scale": 0.2},
    "InvertedPendulum-v5": {"frame_skip": 4, "reset_noise_scale": 0.05},
    "Pusher-v5": {"frame_skip": 3, "reward_near_weight": 0.3, "reward_dist_weight": 2.0, "reward_control_weight": 0.5},
    "Reacher-v5": {"frame_skip": 3, "reward_dist_weight": 2.0, "reward_control_weight": 0.3},
    "Swimmer-v5": {**COMMON, "forward_reward_weight": 2.0, "ctrl_cost_weight": 0.01, "reset_noise_scale": 0.3},
    "Walker2d-v5": {
        **COMMON,
        "forward_reward_weight": 1.5,
        "ctrl_cost_weight": 0.02,
        "healthy_reward": 0.5,
        "healthy_z_range": (0.9, 1.4),
        "healthy_angle_range": (-0.5, 0.4),
        "reset_noise_scale": 0.02,
    },
}
UNTERMINATED = {
    name: {"terminate_when_unhealthy": False} for name in ("Ant-v5", "Hopper-v5", "Humanoid-v5", "Walker2d-v5")
}
CASES = [(env_id, {}) for env_id in TASKS] + list(CHANGED.items()) + list(UNTERMINATED.items())


def assert_equal_infos(ours: dict, theirs: dict) -> None:
    """Keys, and values to the bit."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name, strict=isinstance(value, np.ndarray))


def form(info: dict) -> dict:
    """Masks, and the shapes of what they belong to."""
    return {
        name: form(value) if isinstance(value, dict) else value.tolist() if name[0] == "_" else np.shape(value)[1:]
        for name, value in info.items()
        if name not in ("final_obs", "_final_obs")
    }


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("env_id", TASKS)
def test_infos_and_metadata_have_gymnasiums_vector_form(env_id: str, mode: AutoresetMode) -> None:
    limit = {"max_episode_steps": 4}
    theirs = gymnasium.make_vec(env_id, 2, "sync", vector_kwargs={"autoreset_mode": mode}, **limit)
    ours = MujocoVectorEnv(env_id, 2, autoreset=mode, **limit)
    assert ours.metadata == theirs.metadata
    assert form(ours.reset(seed=0)[1]) == form(theirs.reset(seed=0)[1])
    actions = np.zeros(theirs.action_space.shape, np.float32)
    for step in range(6):
        if step == 2:
            # So that one episode ends alone.
            ours.reset(ids=[0])
            theirs.envs[0].reset()
        info = ours.step(actions)[4]
        expected = theirs.step(actions)[4]
        assert form(info) == form(expected)
        if mode is AutoresetMode.DISABLED and step == 3:
            break


def test_infos_that_nobody_reads_are_not_made_and_those_read_late_are_of_their_step() -> None:
    made = []

    class Telling(Hopper):
        def where(self, *args: Any) -> dict:
            made.append(self)
            return super().where(*args)

    env = MujocoVectorEnv("Hopper-v5", 2)
    env.task = Telling()
    env.reset(seed=0)
    still, moved = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    late = env.step(still)[4]
    x = env.snapshot()["position"].tolist()
    env.step(moved)
    assert made == []
    assert copy.deepcopy(late).keys() == {**late}.keys()
    assert late["x_position"].tolist() == x
    assert len(made) == 1
    assert "no such entry" not in late


@pytest.mark.parametrize(("env_id", "kwargs"), CASES, ids=[f"{e}-{'-'.join(k) or 'default'}"[:60] for e, k in CASES])
def test_equals_gymnasium_bit_for_bit(env_id: str, kwargs: dict) -> None:
    n, steps = 2, 1000 if env_id not in UNTERMINATED or "terminate_when_unhealthy" not in kwargs else 200
    gyms = [gymnasium.make(env_id, **kwargs) for _ in range(n)]
    batch = MujocoVectorEnv(env_id, n, autoreset="disabled", **kwargs)
    assert batch.single_observation_space == gyms[0].observation_space
    assert batch.single_action_space == gyms[0].action_space

    def restart(i: int, seed: int | None = None) -> None:
        observation, told = gyms[i].reset(seed=seed)
        data = gyms[i].unwrapped.data
        ours = batch.set_state(data.qpos[None], data.qvel[None], ids=[i])
        np.testing.assert_array_equal(ours[0].numpy(), observation)
        assert_equal_infos(
            row_of(batch._begin_episodes(np.array([i]), start=(data.qpos[None], data.qvel[None])), 0), told
        )

    for i in range(n):
        restart(i, seed=i)
    space = gyms[0].action_space
    space.seed(0)
    ends = 0
    for _ in range(steps):
        actions = np.stack([space.sample() for _ in range(n)])
        observations, rewards, terminated, truncated, info = batch.step(actions)
        for i in range(n):
            observation, reward, ended, cut, told = gyms[i].step(actions[i])
            assert_equal_infos(row_of(info, i), told)
            np.testing.assert_array_equal(observations[i].numpy(), observation)
            assert (rewards[i].item(), bool(terminated[i]), bool(truncated[i])) == (reward, bool(ended), cut)
            if ended or cut:
                ends += 1
                restart(i)
    assert ends > 0 or steps < 1000


def test_every_keyword_argument_of_gymnasium_is_taken_and_changed_here() -> None:
    import inspect

    for env_id, task in TASKS.items():
        module, name = gymnasium.spec(env_id).entry_point.split(":")
        theirs = inspect.signature(getattr(__import__(module, fromlist=[name]), name).__init__).parameters
        names = {p for p in theirs if p not in ("self", "kwargs", "default_camera_config")}
        ours = {field.name: field.default for field in dataclasses.fields(task)}
        assert names == set(ours)
        assert all(theirs[p].default == ours[p] for p in names)
        changed = {*CHANGED[env_id], *UNTERMINATED.get(env_id, ()), "xml_file"}
        assert names - changed <= {"include_cfrc_ext_in_observation", "include_cvel_in_observation"}


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5"])
def test_threads_and_batch_size_make_no_difference(env_id: str) -> None:
    def rollout(num_envs: int, num_threads: int) -> torch.Tensor:
        env = MujocoVectorEnv(env_id, num_envs, num_threads=num_threads)
        env.reset(seed=3)
        generator = np.random.default_rng(0)
        space = env.single_action_space
        rows = []
        for _ in range(60):
            actions = generator.uniform(space.low, space.high, (5, *space.shape)).astype(np.float32)
            rows.append(env.step(np.resize(actions, (num_envs, *space.shape)))[0][:5].clone())
        return torch.stack(rows)

    expected = rollout(5, 1)
    assert torch.equal(rollout(5, 2), expected)
    assert torch.equal(rollout(5, 4), expected)
    assert torch.equal(rollout(10, 2), expected)


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5"])
def test_a_simulation_that_diverges_terminates_is_counted_and_goes_on(env_id: str) -> None:
    env = MujocoVectorEnv(env_id, 3, autoreset="disabled")
    env.reset(seed=0)
    state = env.snapshot()
    last = state["observation"][1].clone()
    # A velocity beyond MuJoCo's limit of 1e10 diverges in the next step.
    env.set_state(env.model.qpos0[None], np.full((1, env.model.nv), 1e12), ids=[1])
    before = env.snapshot()["observation"][1].clone()
    actions = np.zeros((3, env.model.nu), dtype=np.float32)
    observation, reward, terminated, truncated, info = env.step(actions)
    assert terminated.tolist() == [False, True, False]
    assert not truncated.any()
    assert reward[1] == 0.0
    assert torch.equal(observation[1], before)
    assert torch.isfinite(observation[[0, 2]]).all()
    assert env.blowups == 1
    assert info["diverged"].tolist() == [False, True, False]
    again, _ = env.reset(seed=[1], ids=[1])
    assert torch.equal(again[0], last)
    assert not env.step(actions)[2].any()
    assert env.blowups == 1


def test_bad_input_is_named() -> None:
    env = make_vec("Hopper-v5", 2)
    with pytest.raises(ValueError, match="never begun"):
        env.step(np.zeros((2, 3), dtype=np.float32))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full((2, 3), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="qpos and qvel have shapes"):
        env.set_state(np.zeros((2, 5)), np.zeros((2, 6)))
    with pytest.raises(ValueError, match="takes no argument 'reset_noise'"):
        make_vec("Hopper-v5", 2, reset_noise=0.1)


def test_actions_of_another_kind_are_cast_once() -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (2, 3))
    outcomes = []
    for actions in (
        rows.astype(np.float32),
        rows,
        rows.tolist(),
        torch.tensor(rows),
        torch.tensor(rows, dtype=torch.float32, requires_grad=True),
    ):
        env = make_vec("Hopper-v5", 2)
        env.reset(seed=0)
        outcomes.append(torch.cat((env.step(actions)[0].flatten(), env.step(actions, ids=[0, 1])[1])))
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


def test_an_episode_at_a_given_state_leaves_the_streams_where_they_were() -> None:
    env, twin = make_vec("Hopper-v5", 2, seed=0), make_vec("Hopper-v5", 2, seed=0)
    env.reset()
    twin.reset()
    env.set_state(env.model.qpos0[None], np.ones((1, env.model.nv)), ids=[1])
    assert torch.equal(env.reset()[0], twin.reset()[0])


def test_time_limit_can_be_changed() -> None:
    env = make_vec("Swimmer-v5", 1, max_episode_steps=3)
    env.reset(seed=0)
    cuts = [bool(env.step(np.zeros((1, 2), dtype=np.float32))[3][0]) for _ in range(6)]
    assert cuts == [False, False, True, False, False, True]


@pytest.mark.parametrize("env_id", TASKS)
def test_reset_states_have_gymnasiums_distribution(env_id: str) -> None:
    """Mean and standard deviation of every coordinate of 400 reset states agree within six standard errors."""
    n = 400
    env = MujocoVectorEnv(env_id, n)
    env.reset(seed=0)
    ours = env._physics.integration_state(np.arange(n))[:, 1 : 1 + env.model.nq + env.model.nv]
    theirs_env = gymnasium.make(env_id).unwrapped
    theirs_env.reset(seed=0)
    theirs = []
    for _ in range(n):
        theirs_env.reset()
        theirs.append(np.concatenate((theirs_env.data.qpos, theirs_env.data.qvel)))
    reference_states = np.array(theirs)
    spread = reference_states.std(axis=0)
    atol = 6 * spread.max() * math.sqrt(2 / n)
    np.testing.assert_allclose(ours.mean(0), reference_states.mean(0), rtol=0, atol=atol)
    np.testing.assert_allclose(ours.std(0), spread, rtol=6 / math.sqrt(n), atol=1e-12)


def test_random_streams_are_uniform_normal_and_independent() -> None:
    n = 20_000
    noise = RandomStreams(np.arange(n), np.zeros(n, dtype=np.int64))
    uniform, normal = noise.uniform(-1.0, 3.0, 4), noise.normal(4)
    assert uniform.min() >= -1
    assert uniform.max() < 3
    np.testing.assert_allclose(uniform.mean(0), 1.0, atol=0.05)
    np.testing.assert_allclose(uniform.var(0), 16 / 12, rtol=0.05)
    np.testing.assert_allclose(normal.mean(0), 0.0, atol=0.05)
    np.testing.assert_allclose(normal.var(0), 1.0, rtol=0.05)
    columns = np.corrcoef(np.hstack((uniform, normal)).T)
    np.testing.assert_allclose(columns, np.eye(8), atol=0.05)
    neighbors = np.corrcoef(uniform[:-1, 0], uniform[1:, 0])[0, 1]
    assert abs(neighbors) < 0.05
    next_episode = RandomStreams(np.arange(n), np.ones(n, dtype=np.int64)).uniform(-1.0, 3.0, 4)
    assert abs(np.corrcoef(uniform[:, 0], next_episode[:, 0])[0, 1]) < 0.05


def test_rendering_draws_the_current_state() -> None:
    env = make_vec("InvertedPendulum-v5", 2, render_mode="rgb_array", width=64, height=48)
    env.reset(seed=0)
    env.set_state(np.array([[0.0, 0.0], [0.5, 0.1]]), np.zeros((2, 2)))
    try:
        frames = env.render()
    except Exception as error:  # whatever this machine's OpenGL raises
        pytest.skip(f"this machine cannot render: {error}")
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 2
    assert (frames[0] != frames[1]).any()
    env.close()


NEVER = 'contype="0" conaffinity="0"'
"""Of the floor alone: the ball could touch itself only."""


@pytest.mark.parametrize(
    ("masks", "pair", "trees", "skipped"),
    [
        ('contype="0"', "", 1, {"CONTACT", "ISLAND"}),
        ('contype="0"', "", 2, {"CONTACT"}),
        ('contype="2" conaffinity="1"', "", 1, {"CONTACT", "ISLAND"}),
        ('contype="0"', '<contact><pair geom1="floor" geom2="ball0"/></contact>', 1, {"ISLAND"}),
        ("", "", 1, {"ISLAND"}),
        ("", "", 2, set()),
        (NEVER, "", 1, {"CONTACT", "ISLAND"}),
    ],
)
def test_only_idle_parts_of_the_pipeline_are_skipped(masks: str, pair: str, trees: int, skipped: set[str]) -> None:
    ball = '<body pos="0 0 {0}.5"><freejoint/><geom name="ball{0}" size="0.1" {1}/></body>'
    balls = "".join(ball.format(i, "" if masks == NEVER else masks) for i in range(trees))
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><worldbody><geom name="floor" type="plane" size="1 1 1" {masks}/>{balls}</worldbody>{pair}</mujoco>'
    )
    model.opt.disableflags = mujoco.mjtDisableBit.mjDSBL_GRAVITY
    skip_idle_work(model)
    bits = {name: getattr(mujoco.mjtDisableBit, f"mjDSBL_{name}") for name in ("CONTACT", "ISLAND", "MIDPHASE")}
    assert {name for name, bit in bits.items() if model.opt.disableflags & bit} == skipped
    assert model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_GRAVITY


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5"])  # both kinds of physics
def test_physics_that_diverges_is_counted_in_silence(
    env_id: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = {"Hopper-v5": "hopper.xml", "Ant-v5": "ant.xml"}[env_id]
    text = Path(expand_model_path(name)).read_text()
    unstable = re.sub(r'gear="[^"]*"', 'gear="1e8"', re.sub(r'timestep="[^"]*"', 'timestep="0.5"', text))
    Path("unstable.xml").write_text(unstable)
    env = make_vec(env_id, 3, xml_file=str(tmp_path / "unstable.xml"), seed=0)
    env.reset()
    for _ in range(5):
        env.step(np.ones((3, env.single_action_space.shape[0]), np.float32))
    env.step(np.ones((2, env.single_action_space.shape[0]), np.float32), ids=[0, 2])
    assert env.blowups == 17
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["unstable.xml"]


def test_gymnasiums_own_physics_warns_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "_said", set())
    text = Path(expand_model_path("hopper.xml")).read_text()
    Path("unstable.xml").write_text(re.sub(r'gear="[^"]*"', 'gear="1e12"', text))
    env = make_vec("Hopper-v5", 3, backend="gymnasium", xml_file=str(tmp_path / "unstable.xml"), seed=0)
    env.reset()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(5):
            env.step(np.ones((3, 3), np.float32))
    assert len([one for one in warned if "MuJoCo: " in str(one.message) and "unstable" in str(one.message)]) == 1
    assert "unstable" not in capfd.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["unstable.xml"]


@pytest.mark.parametrize(
    ("env_id", "arguments", "sentence"),
    [
        ("Hopper-v5", {"frame_skip": 0}, r"frame_skip=0; give a whole number from 1 to 1,000,000"),
        ("Hopper-v5", {"frame_skip": 1.5}, "frame_skip=1.5; give a whole number"),
        ("Hopper-v5", {"reset_noise_scale": math.nan}, r"reset_noise_scale=nan; give a finite number from 0"),
        ("Hopper-v5", {"reset_noise_scale": "x"}, r"reset_noise_scale='x'; give a finite number"),
        ("Hopper-v5", {"reset_noise_scale": -1}, "reset_noise_scale=-1"),
        ("Hopper-v5", {"ctrl_cost_weight": math.inf}, "ctrl_cost_weight=inf; give a finite number"),
        ("Hopper-v5", {"healthy_z_range": 3}, "healthy_z_range=3; give 2 numbers"),
        ("Hopper-v5", {"healthy_z_range": [1, "b"]}, "healthy_z_range=.*; give 2 numbers"),
        ("Hopper-v5", {"terminate_when_unhealthy": 3}, "terminate_when_unhealthy=3; give true or false"),
        ("Hopper-v5", {"max_episode_steps": 0}, "max_episode_steps=0; give a whole number from 1"),
        ("Hopper-v5", {"num_threads": 100_000}, "num_threads=100000; give a whole number from 0 to 1,024"),
        ("Hopper-v5", {"xml_file": 3}, "xml_file=3; give a text"),
        ("Hopper-v5", {"xml_file": __file__}, r"xml_file=.*py is no model that MuJoCo reads \(.*\); correct"),
        ("families/HopperRandParams-v0", {"task_seed": "x"}, "task_seed='x'; give a whole number"),
        (".:x", {}, "before its last colon stands a module's name"),
    ],
)
def test_odd_arguments_are_one_sentence(env_id: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_vec(env_id, 2, **arguments)


def test_ordinary_arguments_are_taken() -> None:
    own = {"healthy_z_range": (0.5, math.inf), "frame_skip": np.int64(3), "reset_noise_scale": 0, "num_threads": 2}
    make_vec("Hopper-v5", 1, **own).reset(seed=0)
