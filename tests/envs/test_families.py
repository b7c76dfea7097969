"""Task families: each simulation's own task gives what that task alone gives, and rewards are what the text says."""

from __future__ import annotations

from types import SimpleNamespace

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from envs import SnapshotError, make_vec
from envs.mujoco import FAMILIES, FamilyVectorEnv
from envs.mujoco.tasks import RandomStreams

NAMES = [env_id.removeprefix("families/").removesuffix("-v0") for env_id in FAMILIES]
HELD_OUT = [name for name in NAMES if name not in ("HalfCheetahDir", "AntDir", "WalkerDir")]


def make(name: str, num_envs: int, **kwargs) -> FamilyVectorEnv:
    return make_vec(f"families/{name}-v0", num_envs, num_threads=1, **kwargs)


def play(env: FamilyVectorEnv, actions: np.ndarray) -> torch.Tensor:
    """Observations and rewards of some steps, [T, n, O + 1]."""
    rows = []
    for action in actions:
        observation, reward, *_ = env.step(action)
        rows.append(torch.cat((observation, reward[:, None]), dim=1).clone())
    return torch.stack(rows)


def some_actions(env: FamilyVectorEnv, steps: int, n: int) -> np.ndarray:
    shape = env.single_action_space.shape
    return np.random.default_rng(0).uniform(-1, 1, (steps, n, *shape)).astype(np.float32)


def scalar_reward(name: str, goal: np.ndarray, before: list, after: list, data: dict, action: np.ndarray) -> float:
    """The reward of one step of one simulation, from the text of the reference.

    before, after: x and y of the torso; data: "dt", "contact" (sum of squares of clipped cfrc_ext) and "qpos".
    """
    v = [(b - a) / data["dt"] for a, b in zip(before, after, strict=True)]
    squares = sum(float(a) ** 2 for a in action)
    match name:
        case "Point":
            return -(((after[0] - goal[0]) ** 2 + (after[1] - goal[1]) ** 2) ** 0.5)
        case "HalfCheetahDir":
            return goal[0] * v[0] - 0.05 * squares
        case "HalfCheetahVel":
            return -abs(v[0] - goal[0]) - 0.05 * squares
        case "WalkerDir":
            return goal[0] * v[0] - 0.001 * squares + 1
        case "HopperRandParams" | "WalkerRandParams":
            return v[0] - 0.001 * squares + 1
    costs = 1 - 0.5 * squares - 0.0005 * data["contact"]
    match name:
        case "AntDir":
            return goal[0] * v[0] + goal[1] * v[1] + costs
        case "AntVel":
            return -abs(v[0] - goal[0]) + costs
        case "AntGoal":
            x, y = data["qpos"][:2]
            return -abs(x - goal[0]) - abs(y - goal[1]) + costs
    raise AssertionError(name)


@pytest.mark.parametrize("variant", ["finn", "promp"])
@pytest.mark.parametrize("name", NAMES)
def test_rewards_are_those_of_the_text(name: str, variant: str) -> None:
    env = make(name, 3, variant=variant, autoreset="disabled")
    env.reset(seed=0)
    point, ant = name == "Point", name.startswith("Ant")

    def place(i: int) -> list[float]:
        state = SimpleNamespace(**env._physics.fields)
        return [*(state.xpos[i, 1, :2] if ant else state.qpos[i, :2])]

    for action in some_actions(env, 6, 3):
        before = [place(i) for i in range(3)]
        _, reward, terminated, _, _ = env.step(action)
        state = SimpleNamespace(**env._physics.fields)
        for i in range(3):
            if terminated[i]:
                continue  # without the reward of health
            contact = float(np.square(np.clip(state.cfrc_ext[i], -1, 1)).sum()) if ant else 0.0
            data = {"dt": 1.0 if point else env.dt, "contact": contact, "qpos": state.qpos[i]}
            expected = scalar_reward(name, env.tasks[i], before[i], place(i), data, action[i])
            assert reward[i].item() == pytest.approx(expected, abs=1e-6)
        if terminated.any():
            break


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_tasks_is_the_tasks_alone(name: str) -> None:
    n = 3
    together = make(name, n)
    assert len(np.unique(together.tasks, axis=0)) == (2 if "Dir" in name else n)
    together.reset(seed=5)
    actions = some_actions(together, 25, n)
    expected = play(together, actions)
    assert not torch.equal(expected[:, 0, -1], expected[:, 1, -1])
    for i in range(n):
        alone = make(name, 1)
        alone.set_tasks(together.tasks[i : i + 1])
        alone.reset(seed=5 + i)
        assert torch.equal(play(alone, actions[:, i : i + 1])[:, 0], expected[:, i])


@pytest.mark.parametrize("name", ["Point", "HalfCheetahVel", "AntGoal", "HopperRandParams"])
def test_a_snapshot_holds_the_tasks(name: str) -> None:
    env = make(name, 3)
    env.reset(seed=1)
    actions = some_actions(env, 12, 3)
    play(env, actions[:4])
    snapshot, tasks = env.snapshot(), env.tasks
    expected = play(env, actions[4:])
    other = make(name, 3, task_seed=1)
    assert not np.array_equal(other.tasks, tasks)
    other.reset(seed=9)
    other.restore(snapshot)
    np.testing.assert_array_equal(other.tasks, tasks)
    assert torch.equal(play(other, actions[4:]), expected)
    swapped = make(name, 2)
    swapped.reset(seed=2)
    swapped.restore({key: value[1:] for key, value in snapshot.items()})
    assert torch.equal(play(swapped, actions[4:, 1:]), expected[:, 1:])


def test_another_familys_snapshot_is_refused() -> None:
    point = make("Point", 2)
    point.reset(seed=0)
    velocity = make("HalfCheetahVel", 2)
    velocity.reset(seed=0)
    with pytest.raises(SnapshotError, match="its own family"):
        velocity.restore(point.snapshot())


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_tasks_are_new_and_reproducible(name: str) -> None:
    train, held_out = make(name, 40), make(name, 40, split="held_out")
    rows = np.concatenate((train.tasks, held_out.tasks))
    assert len(np.unique(rows, axis=0)) == 80
    inside, _ = held_out.task.allowed(rows, held_out.model)
    assert inside.all()
    np.testing.assert_array_equal(train.draw_tasks(range(40), "held_out"), held_out.tasks)
    np.testing.assert_array_equal(train.draw_tasks([7, 3]), train.tasks[[7, 3]])
    assert not np.isin(make(name, 40, task_seed=1).tasks, rows).any()


@pytest.mark.parametrize("name", ["HalfCheetahDir", "AntDir", "WalkerDir"])
def test_a_family_of_two_tasks_has_no_held_out_ones(name: str) -> None:
    with pytest.raises(ValueError, match="has 2 tasks and trains on all of them"):
        make(name, 2, split="held_out")
    assert len(np.unique(make(name, 5).tasks, axis=0)) == 2


def test_variants_differ_where_the_papers_do() -> None:
    fastest = {variant: make("HalfCheetahVel", 400, variant=variant).tasks.max() for variant in ("finn", "promp")}
    assert 1.9 < fastest["finn"] <= 2 < 2.9 < fastest["promp"] <= 3
    directions = make("AntDir", 400, variant="promp").tasks
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    assert np.abs(directions.mean(0)).max() < 0.15
    assert make("AntDir", 2, variant="promp", split="held_out").tasks.shape == (2, 2)


@pytest.mark.parametrize(("name", "body"), [("HopperRandParams", "Hopper"), ("WalkerRandParams", "Walker2d")])
def test_random_parameters_are_those_of_a_model_edited_by_hand(name: str, body: str) -> None:
    env = make(name, 2, autoreset="disabled", terminate_when_unhealthy=False)
    for _ in range(2):  # a second time from the originals, not on top of the first
        env.set_tasks(env.draw_tasks([4, 5]))
    env.reset(seed=0)
    datas, models = [], []
    for i in range(2):
        model = gymnasium.make(f"{body}-v5").unwrapped.model
        first, exponents = 0, env.tasks[i]
        for field, base in (("body_mass", 1.5), ("body_inertia", 1.5), ("geom_friction", 1.5), ("dof_damping", 1.3)):
            values = getattr(model, field)
            # As an array: a power of one number is not always rounded as one in an array.
            values *= np.power(base, exponents[first : first + values.size]).reshape(values.shape)
            first += values.size
        data = mujoco.MjData(model)
        mujoco.mj_setConst(model, data)
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:] = env._physics.fields["qpos"][i], env._physics.fields["qvel"][i]
        mujoco.mj_forward(model, data)
        models.append(model)
        datas.append(data)
    for action in some_actions(env, 30, 2):
        env.step(action)
        state = SimpleNamespace(**env._physics.fields)
        for i in range(2):
            datas[i].ctrl[:] = action[i]
            mujoco.mj_step(models[i], datas[i], 4)
            np.testing.assert_array_equal(state.qpos[i], datas[i].qpos)
            np.testing.assert_array_equal(state.qvel[i], datas[i].qvel)


def test_the_point_moves_by_a_tenth_of_bounded_actions() -> None:
    env = make("Point", 1, action_scale=0.1)
    env.reset(seed=0)
    observation, *_ = env.step(np.array([[1.0, 3.0]], dtype=np.float32))
    np.testing.assert_allclose(observation[0], [0.1, 0.1])
    observation, *_ = env.step(np.array([[-0.5, 0.0]], dtype=np.float32))
    np.testing.assert_allclose(observation[0], [0.05, 0.1])


def test_an_episode_at_a_given_state_keeps_the_task() -> None:
    env = make("HalfCheetahVel", 2, redraw=True)
    env.reset(seed=0)
    tasks = env.tasks
    env.set_state(np.tile(env.model.qpos0, (2, 1)), np.zeros((2, env.model.nv)))
    assert np.array_equal(env.tasks, tasks)


def test_horizon_ends_and_redraw_changes_the_task() -> None:
    env = make("HalfCheetahVel", 2, horizon=3, redraw=True)
    env.reset(seed=0)
    seen = [env.tasks]
    for t in range(6):
        _, _, terminated, truncated, info = env.step(np.zeros((2, 6), dtype=np.float32))
        assert not terminated.any()
        assert truncated.all() == (t % 3 == 2)
        assert ("final_obs" in info) == (t % 3 == 2)
        if t % 3 == 2:
            seen.append(env.tasks)
    np.testing.assert_array_equal(np.concatenate(seen), env.draw_tasks(range(6)))


def test_action_scale_changes_controls_and_not_costs() -> None:
    full, half = make("HalfCheetahVel", 1), make("HalfCheetahVel", 1, action_scale=0.5)
    for env in (full, half):
        env.reset(seed=0)
    a = np.full((1, 6), 0.8, dtype=np.float32)
    observed, _, _, _, info = half.step(a)
    expected, _, _, _, info_of_half = full.step(a / 2)
    assert torch.equal(observed, expected)
    assert info["reward_ctrl"] == pytest.approx(4 * info_of_half["reward_ctrl"])


def test_an_oracle_sees_the_task() -> None:
    env = make("AntGoal", 3, observe_task=True)
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation[:, -2:], env.tasks)
    assert env.single_observation_space.shape == (31,)


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_id_is_one_task_drawn_by_seed(name: str) -> None:
    env = gymnasium.make(f"families/{name}-v0", task_seed=3)
    vector = make(name, 1, task_seed=3)
    observation, info = env.reset(seed=7)
    np.testing.assert_array_equal(info["task"], vector.tasks[0])
    np.testing.assert_array_equal(observation, vector.reset(seed=7)[0][0])
    action = some_actions(vector, 1, 1)[0]
    observed, reward, *_ = env.step(action[0])
    expected, rewards, *_ = vector.step(action)
    np.testing.assert_array_equal(observed, expected[0])
    assert reward == rewards[0]


@pytest.mark.filterwarnings("ignore:.*A Box observation space.*:UserWarning")
def test_gymnasiums_checker_accepts_it() -> None:
    check_env(gymnasium.make("families/HalfCheetahVel-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize(
    ("name", "tasks", "words"),
    [
        ("HalfCheetahVel", [[2.5]], r"\[2\.5\] is no task.*from 0 to 2"),
        ("HalfCheetahVel", [[1.0, 1.0]], "one number"),
        ("HalfCheetahDir", [[0.5]], r"one of \[\[1\.0\], \[-1\.0\]\]"),
        ("AntDir", [[0.0, 1.0]], r"one of \[\[1\.0, 0\.0\]"),
        ("AntGoal", [[3.0, 1.0]], "at most 3 from the origin"),
        ("Point", [[0.2, 0.6]], "from -0.5 to 0.5"),
        ("HopperRandParams", [[3.5] * 41], "41 exponents from -3 to 3"),
        ("Point", [[np.nan, 0.0]], "from -0.5 to 0.5"),
        ("Point", [[0.0, 0.0]] * 2, "one row for each of 1"),
    ],
)
def test_a_task_outside_the_range_is_refused(name: str, tasks: list, words: str) -> None:
    env = make(name, 1)
    before = env.tasks
    with pytest.raises(ValueError, match=words):
        env.set_tasks(tasks)
    np.testing.assert_array_equal(env.tasks, before)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"variant": "fin"}, "variant is 'fin'"),
        ({"split": "test"}, "split is 'test'"),
        ({"horizon": 0}, "horizon is 0"),
        ({"action_scale": 0.0}, "action_scale is 0"),
        ({"task_seed": -1}, "task_seed is -1"),
        ({"num_tasks": 0}, "num_tasks is 0"),
        ({"max_episode_steps": 3}, "give horizon"),
        ({"horizen": 3}, "takes no argument 'horizen'"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make("HalfCheetahVel", 1, **kwargs)


def test_tasks_end_the_episodes_that_they_change() -> None:
    env = make("HalfCheetahVel", 2)
    env.reset(seed=0)
    env.set_tasks([[0.5]], ids=[1])
    with pytest.raises(ValueError, match="have ended or never begun"):
        env.step(np.zeros((2, 6), dtype=np.float32))
    env.reset(ids=[1])
    env.step(np.zeros((2, 6), dtype=np.float32))


def test_tasks_and_first_states_are_drawn_from_streams_of_their_own() -> None:
    numbers = np.arange(8)
    seeds = np.zeros(8, dtype=np.int64)
    velocities = make("HalfCheetahVel", 8, task_seed=0).draw_tasks(numbers)[:, 0] / 2
    of_episodes = RandomStreams(seeds, numbers).uniform(0.0, 1.0, 1)[:, 0]
    assert not np.isclose(velocities, of_episodes).any()
    assert abs(np.corrcoef(velocities, of_episodes)[0, 1]) < 0.9
