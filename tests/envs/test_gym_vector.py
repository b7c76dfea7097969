"""What is GymVectorEnv's own: seeds, replayed snapshots, infos, spaces, bad environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from envs import GymVectorEnv, SnapshotError, gymnasium_backend, make_vec


class Scripted(gymnasium.Env):
    """Observes its step count and the reset's options; says what it was given."""

    def __init__(self, action_space: spaces.Space | None = None, shape: tuple[int, ...] = (2,)) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = spaces.Discrete(2) if action_space is None else action_space
        self.given: list[Any] = []
        self.seeds: list[Any] = []
        self.options: Any = None
        self.reward: float = 1.0
        self.value: float = 0.0
        self.closed = False

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.seeds.append(seed)
        self.options = options
        self.value, self.count = 0.0, 0
        return self.observe(), {"start": True}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.given.append(action)
        self.value += 1
        self.count += 1
        return self.observe(), self.reward, self.count == 3, False, {"count": self.count, "name": "x"}

    def observe(self) -> np.ndarray:
        return np.full(self.observation_space.shape, self.value, np.float32)

    def render(self) -> Any:
        return np.zeros((4, 4, 3), np.uint8)

    def close(self) -> None:
        self.closed = True


class Unseeded(Scripted):
    """Draws on randomness that reset(seed) does not set."""

    random = np.random.default_rng(0)

    def observe(self) -> np.ndarray:
        return self.random.random(2, np.float32)


def test_episode_seeds_depend_on_seed_and_episode_alone() -> None:
    envs = [Scripted(), Scripted()]
    vector = GymVectorEnv(envs, seed=3)
    vector.reset()
    for _ in range(6):
        vector.step([0, 0])
    seen = [env.seeds for env in envs]
    assert len({*seen[0], *seen[1]}) == 6
    assert all(isinstance(seed, int) and 0 <= seed < 2**32 for seeds in seen for seed in seeds)

    alone = Scripted()
    vector = GymVectorEnv([alone], seed=4)
    vector.reset()
    vector.reset()
    assert alone.seeds == seen[1][:2]


def test_without_a_seed_runs_differ() -> None:
    starts = [make_vec("CartPole-v1", 1).reset()[0] for _ in range(2)]
    assert not torch.equal(*starts)


def test_unseeded_run_continues_from_its_snapshot() -> None:
    env = make_vec("CartPole-v1", 2)
    env.reset()
    snapshot = env.snapshot()
    expected = [env.reset()[0] for _ in range(3)]
    other = make_vec("CartPole-v1", 2)
    other.restore(snapshot)
    assert all(torch.equal(other.reset()[0], observation) for observation in expected)


@pytest.mark.parametrize(
    ("space", "action", "kind", "dtype"),
    [
        (spaces.Discrete(3), [2], int, None),
        (spaces.MultiDiscrete([2, 3]), [[1, 2]], np.ndarray, np.int64),
        (spaces.MultiBinary(3), [[1, 0, 1]], np.ndarray, np.int8),
        (spaces.Box(-1, 1, (2,), np.float32), [[0.5, -0.5]], np.ndarray, np.float32),
        (spaces.Box(-1, 1, (2, 2), np.float64), [[[0.5, -0.5], [1.0, 0.0]]], np.ndarray, np.float64),
    ],
)
def test_environments_get_actions_of_their_own_kind(space: spaces.Space, action: Any, kind: type, dtype: Any) -> None:
    env = Scripted(space)
    vector = GymVectorEnv([env])
    vector.reset()
    for given in (torch.tensor(action), np.array(action), action):
        vector.step(given)
    for given in env.given:
        assert type(given) is kind
        assert dtype is None or given.dtype == dtype
        assert space.contains(given)
        np.testing.assert_array_equal(given, action[0])


def test_fractions_are_no_discrete_actions() -> None:
    vector = GymVectorEnv([Scripted()])
    vector.reset()
    with pytest.raises(ValueError, match="float64; this environment takes int64"):
        vector.step([0.7])


def test_an_environment_may_change_its_action() -> None:
    class Doubling(Scripted):
        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            result = super().step(action.copy())
            action *= 2
            return result

    vector = GymVectorEnv([Doubling(spaces.Box(-1, 1, (1,), np.float32))])
    vector.reset()
    action = torch.tensor([[0.5]])
    vector.step(action)
    assert action.item() == 0.5
    snapshot = vector.snapshot()
    assert snapshot["actions"].item() == 0.5
    vector.restore(snapshot)
    assert vector.snapshot()["actions"].item() == 0.5


def test_a_caller_may_reuse_its_actions() -> None:
    vector = GymVectorEnv([Scripted(spaces.Box(-1, 1, (1,), np.float32))])
    vector.reset()
    action = torch.tensor([[0.5]])
    vector.step(action)
    action.zero_()
    assert vector.snapshot()["actions"].item() == 0.5


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_observations_of_any_shape(shape: tuple[int, ...]) -> None:
    vector = GymVectorEnv([Scripted(shape=shape), Scripted(shape=shape)])
    assert vector.reset()[0].shape == (2, *shape)
    assert vector.step([0, 0])[0].shape == (2, *shape)
    vector.restore(vector.snapshot())


def test_infos_are_gymnasiums() -> None:
    vector = GymVectorEnv([Scripted(), Scripted()])
    assert vector.reset()[1]["start"].tolist() == [True, True]
    vector.step([0], ids=[1])
    vector.step([0, 0])
    *_, info = vector.step([0, 0])
    assert info["_count"].tolist() == [True, False]
    assert info["count"].tolist() == [2, 0]
    assert info["_start"].tolist() == [False, True]
    assert info["final_info"]["count"].tolist() == [0, 3]
    assert info["_final_info"].tolist() == [False, True]
    assert info["final_info"]["name"].tolist() == [None, "x"]


def test_infos_of_a_subset_have_its_rows() -> None:
    vector = GymVectorEnv([Scripted() for _ in range(4)])
    vector.reset()
    vector.step([0], ids=[3])
    *_, info = vector.step([0, 0], ids=[3, 1])
    assert info["count"].tolist() == [2, 1]
    *_, info = vector.step([0, 0], ids=[3, 1])
    assert info["final_info"]["count"].tolist() == [3, 0]


def test_returned_tensors_are_not_the_environments_memory() -> None:
    vector = GymVectorEnv([Scripted()])
    vector.reset()[0].fill_(9)
    vector.step([0])[0].fill_(9)
    snapshot = vector.snapshot()
    assert snapshot["observation"].tolist() == [[1, 1]]
    vector.restore(snapshot)


def test_options_reach_the_environments() -> None:
    envs = [Scripted(), Scripted()]
    vector = GymVectorEnv(envs)
    vector.reset(options={"level": 2})
    assert [env.options for env in envs] == [{"level": 2}] * 2
    vector.reset(options={"level": 3, "reset_mask": np.array([False, True])})
    assert [env.options for env in envs] == [{"level": 2}, {"level": 3}]
    vector.reset(options={"reset_mask": np.array([True, False])})
    assert [env.options for env in envs] == [None, {"level": 3}]
    vector.snapshot(ids=[0])
    with pytest.raises(SnapshotError, match=r"environment 1 .* options"):
        vector.snapshot()


def test_snapshot_before_the_first_reset_is_refused() -> None:
    with pytest.raises(SnapshotError, match="not been reset"):
        GymVectorEnv([Scripted()]).snapshot()


def test_snapshots_of_long_episodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium_backend, "MAX_RECORDED_STEPS", 5)
    vector = GymVectorEnv([TimeLimit(gymnasium.make("Pendulum-v1"), 20)])
    vector.reset(seed=0)
    for _ in range(5):
        vector.step([[0.0]])
    vector.snapshot()
    vector.step([[0.0]])
    with pytest.raises(SnapshotError, match="6 steps long"):
        vector.snapshot()
    vector.reset()
    vector.snapshot()


def test_replay_that_differs_is_said() -> None:
    vector = GymVectorEnv([Unseeded()])
    vector.reset()
    vector.step([0])
    with pytest.raises(SnapshotError, match=r"environment 0 .* cannot be put back exactly"):
        vector.restore(vector.snapshot())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_are_refused(bad: float) -> None:
    envs = [Scripted(), Scripted()]
    vector = GymVectorEnv(envs)
    vector.reset()
    vector.step([0, 0])
    envs[1].reward = bad
    with pytest.raises(ValueError, match=r"environment 1 .*reward .*at step 2 "):
        vector.step([0, 0])
    envs[1].reward = 1.0
    vector.reset()
    envs[1].value = bad
    with pytest.raises(ValueError, match=r"environment 1 .*observation .*at step 1 "):
        vector.step([0], ids=[1])


def test_observation_that_contradicts_its_space_is_refused() -> None:
    env = Scripted()
    env.observation_space = spaces.Box(-1, 1, (2,), np.float32)
    env.observe = lambda: np.zeros(1, np.float32)
    with pytest.raises(ValueError, match=r"as observation in its reset, whose shape is \(1,\), .* \(2,\)"):
        GymVectorEnv([env]).reset()


@pytest.mark.parametrize(
    "space", [spaces.Text(3), spaces.Dict(a=spaces.Discrete(2)), spaces.Tuple([spaces.Discrete(2)])]
)
def test_observations_of_several_parts_or_texts_are_refused(space: spaces.Space) -> None:
    env = Scripted()
    env.observation_space = space
    with pytest.raises(ValueError, match="FlattenObservation"):
        GymVectorEnv([env])


def test_unsupported_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="ActionWrapper"):
        GymVectorEnv([Scripted(spaces.Text(3))])


def test_environments_must_be_of_one_kind_and_distinct() -> None:
    env = Scripted()
    with pytest.raises(ValueError, match="twice"):
        GymVectorEnv([env, env])
    with pytest.raises(ValueError, match="environment 1 has other spaces"):
        GymVectorEnv([env, Scripted(shape=(3,))])


def test_render_and_close() -> None:
    envs = [Scripted(), Scripted()]
    vector = GymVectorEnv(envs)
    vector.reset()
    frames = vector.render()
    assert isinstance(frames, tuple)
    assert [frame.shape for frame in frames] == [(4, 4, 3)] * 2
    vector.close()
    assert all(env.closed for env in envs)


def test_environments_need_not_know_of_options() -> None:
    class Plain(gymnasium.Env):
        observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)

        def reset(self, seed: int | None = None) -> Any:
            return np.zeros(1, np.float32), {}

        def step(self, action: Any) -> Any:
            return np.zeros(1, np.float32), 1.0, True, False, {}

    env = GymVectorEnv([Plain(), Plain()])
    env.reset(seed=0)
    assert env.step(np.zeros(2, int))[1].tolist() == [1.0, 1.0]


class Odd(Scripted):
    """Gives what it is told to, at reset or after a step."""

    def __init__(self, **told: Any) -> None:
        super().__init__()
        self.told = told

    def reset(self, **kwargs: Any) -> Any:
        begun = super().reset(**kwargs)
        return self.told.get("begun", begun)

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        names = {"observation": observation, "reward": reward, "terminated": terminated, "truncated": truncated}
        values = (names | self.told).values() if "values" not in self.told else self.told["values"]
        return *list(values)[:4], info


@pytest.mark.parametrize("observation", [np.zeros(1), np.zeros((1, 2)), np.zeros((2, 2)), np.zeros(()), 0.0, {"x": 1}])
def test_observations_of_another_shape_are_refused(observation: Any) -> None:
    env = GymVectorEnv([Scripted(), Odd(observation=observation)])
    env.reset()
    with pytest.raises(ValueError, match=r"environment 1 .* at step 1 of .*, whose shape is \(.*\(2,\); correct"):
        env.step([0, 0])


@pytest.mark.parametrize("one", [np.ones(1), np.ones((1, 1)), np.float32(1), 1, [1.0]])
def test_arrays_of_one_number_are_numbers(one: Any) -> None:
    env = GymVectorEnv([Odd(reward=one, terminated=np.ones(1, bool))])
    env.reset()
    _, reward, terminated, *_ = env.step([0])
    assert (reward.tolist(), terminated.tolist()) == ([1.0], [True])


def begin_and_step(env: GymVectorEnv) -> None:
    env.reset()
    env.step([0])


def test_what_is_no_step_and_no_reset_is_refused() -> None:
    for odd, words in {
        Odd(reward=np.ones(2)): r"\[1. 1.\] as reward at step 1 of its episode, where there is one number",
        Odd(values=(np.zeros(2), 1.0, True)): "4 values at step",
        Odd(begun=np.zeros(2)): "ndarray from reset",
        Odd(begun=(np.zeros(2), {}, 0)): "tuple from reset",
    }.items():
        with pytest.raises(ValueError, match=words):
            begin_and_step(GymVectorEnv([odd]))


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (None, r"None \(NoneType\) at step 1 of its episode"),
        (3.5, r"3.5 \(float\) at step 1"),
        ((np.zeros(2), "high", False, False, {}), "'high' as reward at step 1 of its episode, which is no number"),
        ((np.zeros(2), None, False, False, {}), "reward that is NaN or infinite at step 1"),
        ((["a", "b"], 0.0, False, False, {}), r"as observation at step 1 of its episode, which is no number"),
        ((np.ones(3), 0.0, False, False, {}), r"\[1. 1. 1.\] as observation at step 1 .* \(3,\), .* space says \(2,\)"),
        ((None, 0.0, False, False, {}), r"None as observation at step 1 .* shape is \(\)"),
        (("up", 0.0, False, False, {}), r"up as observation at step 1 .* shape is \(\)"),
        (([[1], [1, 2]], 0.0, False, False, {}), r"\[\[1\], \[1, 2\]\] as observation at step 1 .* different lengths"),
        ((np.zeros(2), 0.0, False, False, [1]), r"\(tuple\) at step 1 .*info, a dict"),
    ],
)
def test_nonsense_from_a_step_is_named_with_environment_and_step(outcome: Any, words: str) -> None:
    class Nonsense(Scripted):
        def step(self, action: Any) -> Any:
            return outcome

    env = GymVectorEnv([Scripted(), Nonsense()])
    env.reset()
    with pytest.raises(ValueError, match=rf"environment 1 of .* gave .*{words}"):
        env.step([0, 0])
    assert env.doing() is None  # a watchdog waits for nothing


def test_images_are_refused_with_a_remedy() -> None:
    class Images(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)

    with pytest.raises(ValueError, match=r"images.*FlattenObservation"):
        GymVectorEnv([Images()])
    flat = GymVectorEnv([gymnasium.wrappers.FlattenObservation(Images())])
    assert flat.single_observation_space.shape == (192,)


def test_generators_are_the_environments_own() -> None:
    env = make_vec("CartPole-v1", 3, seed=0)
    env.reset()
    assert env.np_random == tuple(one.unwrapped.np_random for one in env.envs)
    assert env.np_random_seed == tuple(one.unwrapped.np_random_seed for one in env.envs)
    assert len(set(env.np_random_seed)) == 3
