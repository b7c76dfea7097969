"""Every kind of VectorEnv keeps the contract of envs/vector.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from gymnasium.wrappers.vector.array_conversion import ArrayConversion
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.rollout.buffer import RunningEpisodes
from envs import SnapshotError, VectorEnv, make_vec
from envs.sb3 import as_vector
from envs.vector import EpisodeStatistics

Factory = Callable[..., VectorEnv]

N = 3
LIMIT = 5
SAME_STEP = {"autoreset_mode": AutoresetMode.SAME_STEP}


def made(env_id: str, backend: str) -> Any:
    def factory(num_envs: int, **kwargs: Any) -> VectorEnv:
        return make_vec(env_id, num_envs, backend=backend, **kwargs)

    return pytest.param(factory, id=f"{backend}-{env_id}")


def from_gymnasium(num_envs: int, **kwargs: Any) -> VectorEnv:
    return as_vector(gymnasium.make_vec("CartPole-v1", num_envs, "sync", vector_kwargs=SAME_STEP, **kwargs))


def from_sb3(num_envs: int, **kwargs: Any) -> VectorEnv:
    return as_vector(DummyVecEnv([lambda: gymnasium.make("CartPole-v1", **kwargs)] * num_envs))


OURS = [
    made("CartPole-v1", "gymnasium"),
    made("Pendulum-v1", "gymnasium"),
    made("Hopper-v5", "gymnasium"),
    made("probes/MultiDiscreteBandit-v0", "gymnasium"),
    made("probes/MultiBinaryBandit-v0", "gymnasium"),
    made("Hopper-v5", "mujoco"),
    made("Ant-v5", "mujoco"),
]
NO_WARP = pytest.mark.skipif(importlib.util.find_spec("mujoco_warp") is None, reason="MuJoCo Warp is not installed")
WARP = [
    pytest.param(*made(env_id, "warp").values, id=f"warp-{env_id}", marks=[pytest.mark.slow, NO_WARP])
    for env_id in ("Hopper-v5", "HalfCheetah-v5")
]
"""Environments on a device: without ids to step, and masked where others refuse; tests/device has what differs."""
FOREIGN = [pytest.param(from_gymnasium, id="foreign-gymnasium"), pytest.param(from_sb3, id="foreign-sb3")]

ours = pytest.mark.parametrize("make", OURS)
foreign = pytest.mark.parametrize("make", FOREIGN)
every = pytest.mark.parametrize("make", OURS + FOREIGN)
ours_and_warp = pytest.mark.parametrize("make", OURS + WARP)
every_and_warp = pytest.mark.parametrize("make", OURS + FOREIGN + WARP)


def plan(env: VectorEnv, steps: int, seed: int = 0) -> list[np.ndarray]:
    """The same random actions for every environment of this kind: steps times [N, *A]."""
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(steps)]


def play(env: VectorEnv, actions: list[np.ndarray]) -> list[torch.Tensor]:
    """All tensors that the steps return, final observations included."""
    seen = []
    for action in actions:
        *tensors, info = env.step(action)
        seen += [x.clone() for x in tensors]
        if "final_obs" in info:
            seen.append(info["final_obs"].clone())
    return seen


def agree(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_and_warp
def test_shapes_and_dtypes(make: Factory) -> None:
    env = make(N)
    dtype = np.float32 if env.masked else env.single_observation_space.dtype  # Warp's physics is of float32
    observation, info = env.reset(seed=0)
    assert observation.shape == (N, *env.single_observation_space.shape)
    assert observation.numpy().dtype == dtype
    assert isinstance(info, dict)
    observation, reward, terminated, truncated, info = env.step(plan(env, 1)[0])
    assert observation.shape == (N, *env.single_observation_space.shape)
    assert observation.numpy().dtype == dtype
    assert reward.shape == terminated.shape == truncated.shape == (N,)
    assert reward.dtype.is_floating_point
    assert terminated.dtype == truncated.dtype == torch.bool
    assert isinstance(info, dict)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


@every_and_warp
def test_equal_seeds_agree_bit_for_bit_across_episodes(make: Factory) -> None:
    env, twin = make(N, max_episode_steps=LIMIT), make(N, max_episode_steps=LIMIT)
    actions = plan(env, 4 * LIMIT)
    assert torch.equal(env.reset(seed=7)[0], twin.reset(seed=7)[0])
    assert agree(play(env, actions), play(twin, actions))


@ours_and_warp
def test_reset_with_a_seed_reproduces_itself(make: Factory) -> None:
    env = make(N, max_episode_steps=LIMIT)
    actions = plan(env, 3 * LIMIT)
    first = env.reset(seed=7)[0].clone()
    seen = play(env, actions)
    assert torch.equal(env.reset(seed=7)[0], first)
    assert agree(play(env, actions), seen)


def random_starts(env: VectorEnv) -> bool:
    return "probes" not in str(env)


@every_and_warp
def test_environments_seeds_and_episodes_differ(make: Factory) -> None:
    env = make(N)
    if not random_starts(env):
        pytest.skip("this probe always starts alike")
    starts = [env.reset(seed=0)[0].clone(), env.reset()[0].clone(), env.reset(seed=N)[0].clone()]
    assert len(torch.cat(starts).unique(dim=0)) == 3 * N


@ours_and_warp
def test_environment_i_gets_seed_plus_i(make: Factory) -> None:
    env = make(N)
    together = env.reset(seed=5)[0].clone()
    assert torch.equal(env.reset(seed=[5, 6, 7])[0], together)
    assert torch.equal(env.reset(seed=5, ids=[2, 0])[0], together[[2, 0]])
    assert torch.equal(env.reset(seed=[6], ids=[0])[0], together[[1]])


@ours_and_warp
@pytest.mark.parametrize("seed", [-1, [0, 1], [0, 1, -1], [[0, 1, 2]]])
def test_bad_seeds_are_refused_and_change_nothing(make: Factory, seed: Any) -> None:
    env, twin = make(N, seed=5), make(N, seed=5)
    with pytest.raises(ValueError, match="seed is"):
        env.reset(seed=seed)
    assert torch.equal(env.reset()[0], twin.reset()[0])


@ours_and_warp
def test_seed_of_the_constructor_fixes_unseeded_resets(make: Factory) -> None:
    seeded = make(N, seed=5)
    assert torch.equal(seeded.reset()[0], make(N).reset(seed=5)[0])


@ours
def test_stepping_some_leaves_the_others_alone(make: Factory) -> None:
    env, twin = make(N, max_episode_steps=LIMIT), make(N, max_episode_steps=LIMIT)
    env.reset(seed=1)
    twin.reset(seed=1)
    for action in plan(env, 2 * LIMIT):
        observation, reward, *_ = env.step(action)
        for ids in ([2, 0], [1]):
            some, some_reward, *_ = twin.step(action[ids], ids=ids)
            assert torch.equal(some, observation[ids])
            assert torch.equal(some_reward, reward[ids])


@ours
def test_no_ids_step_nothing(make: Factory) -> None:
    env, untouched = make(N), make(N)
    first, second = plan(env, 2)
    for each in (env, untouched):
        each.reset(seed=1)
        each.step(first)
    observation, reward, *_ = env.step(first[:0], ids=[])
    assert observation.shape == (0, *env.single_observation_space.shape)
    assert reward.shape == (0,)
    assert env.reset(ids=[])[0].shape == observation.shape
    assert agree(play(env, [second]), play(untouched, [second]))


@ours
def test_resetting_some_leaves_the_others_alone(make: Factory) -> None:
    env, untouched = make(N), make(N)
    first, second = plan(env, 2)
    for each in (env, untouched):
        each.reset(seed=1)
        each.step(first)
    env.reset(ids=[1])
    others = [0, 2]
    assert agree(list(env.step(second[others], others)[:4]), list(untouched.step(second[others], others)[:4]))


@ours
def test_reset_mask_says_ids(make: Factory) -> None:
    env, twin = make(N, seed=1), make(N, seed=1)
    options = {"reset_mask": np.array([False, True, True])}
    first = env.reset()[0].clone()
    twin.reset()
    observation, info = env.reset(options=options)
    assert torch.equal(observation[1:], twin.reset(ids=[1, 2])[0])
    assert torch.equal(observation[0], first[0])
    assert all(len(value) == N for value in info.values())
    assert all(not mask[0] for name, mask in info.items() if name.startswith("_"))
    assert list(options) == ["reset_mask"]


@ours
def test_seeds_may_be_given_to_some(make: Factory) -> None:
    env, twin = make(N, seed=1), make(N, seed=1)
    some = env.reset(seed=[None, 7, None])[0].clone()
    assert torch.equal(some[[0, 2]], twin.reset()[0][[0, 2]])
    assert torch.equal(some[1], twin.reset(seed=[7], ids=[1])[0][0])
    mask = {"reset_mask": np.array([False, True, False])}
    assert torch.equal(env.reset(seed=[0, 7, 0], options=mask)[0], some)


@every_and_warp
def test_same_step_gives_the_last_observation_and_the_next_first(make: Factory) -> None:
    env = make(N, max_episode_steps=2)
    env.reset(seed=3)
    actions = plan(env, 6)
    ends = 0
    for action in actions:
        observation, _, terminated, truncated, info = env.step(action)
        ended = terminated | truncated
        assert ("final_obs" in info) == (env.masked or bool(ended.any()))
        if ended.any():
            ends += int(ended.sum())
            assert torch.equal(torch.as_tensor(info["_final_obs"]), ended)
            assert info["final_obs"].shape == observation.shape
            assert info["final_obs"].dtype == observation.dtype
            assert torch.equal(info["final_obs"][~ended], observation[~ended])
            if random_starts(env):
                assert (info["final_obs"][ended] != observation[ended]).any(dim=1).all()
    assert ends >= 3 * N


@ours_and_warp
def test_final_observation_is_what_disabled_autoreset_shows(make: Factory) -> None:
    env, still = make(N, max_episode_steps=2), make(N, max_episode_steps=2, autoreset="disabled")
    env.reset(seed=3)
    still.reset(seed=3)
    for action in plan(env, 2):
        observation, _, terminated, truncated, info = env.step(action)
        last, _, last_terminated, last_truncated, still_info = still.step(action)
        assert torch.equal(info.get("final_obs", observation), last)
        assert torch.equal(terminated, last_terminated)
        assert torch.equal(truncated, last_truncated)
        assert env.masked or "final_obs" not in still_info
        if (terminated | truncated).all():
            break
    assert torch.equal(still.reset(ids=range(N))[0], observation)


@ours
def test_disabled_refuses_to_step_what_has_ended(make: Factory) -> None:
    env = make(N, max_episode_steps=1, autoreset=AutoresetMode.DISABLED)
    env.reset(seed=0)
    (action,) = plan(env, 1)
    env.step(action[:2], ids=[0, 1])
    with pytest.raises(ValueError, match="ended"):
        env.step(action)
    env.reset(ids=[0, 1])
    env.step(action)


@ours
def test_stepping_before_the_first_reset_is_refused(make: Factory) -> None:
    env = make(N)
    with pytest.raises(ValueError, match="reset"):
        env.step(plan(env, 1)[0])


@ours_and_warp
@pytest.mark.parametrize("before", [0, 3, LIMIT, 2 * LIMIT + 1])
def test_restored_environments_go_on_bit_for_bit(make: Factory, before: int) -> None:
    env = make(N, max_episode_steps=LIMIT)
    actions = plan(env, before + 3 * LIMIT)
    current = env.reset(seed=11)[0].clone()
    for action in actions[:before]:
        current = env.step(action)[0].clone()
    snapshot = env.snapshot()
    expected = play(env, actions[before:])

    other = make(N, max_episode_steps=LIMIT)
    assert torch.equal(other.restore(snapshot), current)
    assert agree(play(other, actions[before:]), expected)
    assert torch.equal(env.restore(snapshot), current)
    assert agree(play(env, actions[before:]), expected)


@ours_and_warp
def test_snapshot_of_some_goes_into_others(make: Factory) -> None:
    env = make(N, max_episode_steps=LIMIT)
    first, *rest = plan(env, 2 * LIMIT)
    env.reset(seed=11)
    env.step(first)
    snapshot = env.snapshot(ids=[2, 0])
    env.restore(snapshot, ids=[0, 1])
    for action in rest:
        action[1], action[2] = action[1], action[0]
        observation, reward, *_ = env.step(action)
        assert torch.equal(observation[0], observation[2])
        assert reward[0] == reward[2]


@ours_and_warp
def test_snapshot_holds_copies(make: Factory) -> None:
    env = make(N)
    actions = plan(env, 3)
    env.reset(seed=11)
    snapshot = env.snapshot()
    kept = {name: value.clone() for name, value in snapshot.items()}
    play(env, actions)
    assert all(torch.equal(snapshot[name], kept[name]) for name in kept)


@ours
def test_disabled_snapshot_remembers_what_has_ended(make: Factory) -> None:
    env = make(N, max_episode_steps=1, autoreset="disabled")
    env.reset(seed=0)
    (action,) = plan(env, 1)
    env.step(action[:1], ids=[0])
    snapshot = env.snapshot()
    other = make(N, max_episode_steps=1, autoreset="disabled")
    other.restore(snapshot)
    with pytest.raises(ValueError, match="ended"):
        other.step(action[:1], ids=[0])
    other.step(action[1:], ids=[1, 2])


@ours_and_warp
def test_snapshot_that_does_not_fit_is_refused(make: Factory) -> None:
    env = make(N)
    env.reset(seed=0)
    with pytest.raises(SnapshotError, match="fit"):
        env.restore(env.snapshot(ids=[0]))
    with pytest.raises(SnapshotError, match="fit"):
        env.restore({"seed": torch.zeros(N)})


@every_and_warp
def test_actions_of_a_wrong_shape_or_value_are_refused(make: Factory) -> None:
    env = make(N)
    env.reset(seed=0)
    (action,) = plan(env, 1)
    with pytest.raises(ValueError, match="shape"):
        env.step(action[:2])
    with pytest.raises(ValueError, match="shape"):
        env.step(action[..., None])
    if env.masked:
        return  # a number that the host would wait for
    with pytest.raises(ValueError, match=r"actions (hold NaN|are)"):
        env.step(np.full(action.shape, np.nan, dtype=np.float32))


@every
@pytest.mark.parametrize("ids", [[N], [-1], [0, N], [-1, 0], [N, 0], [0, -1], [0, 0], [1, 0, 1], [0.5], [[0]]])
def test_bad_ids_are_refused(make: Factory, ids: Any) -> None:
    env = make(N)
    env.reset(seed=0)
    (action,) = plan(env, 1)
    with pytest.raises(ValueError, match="ids"):
        env.step(action[: len(ids)], ids=ids)
    with pytest.raises(ValueError, match="ids"):
        env.reset(ids=ids)


@ours
@pytest.mark.parametrize("num_envs", [0, -1, 2.0, True])
def test_bad_numbers_of_environments_are_refused(make: Factory, num_envs: Any) -> None:
    with pytest.raises(ValueError, match="num_envs"):
        make(num_envs)


@every_and_warp
def test_arrays_and_tensors_are_the_same_actions(make: Factory) -> None:
    env, twin = make(N), make(N)
    env.reset(seed=0)
    twin.reset(seed=0)
    actions = plan(env, 3)
    assert agree(play(env, actions), play(twin, [torch.from_numpy(action) for action in actions]))


@every_and_warp
def test_stepping_does_not_change_the_actions(make: Factory) -> None:
    env = make(N)
    env.reset(seed=0)
    (action,) = plan(env, 1)
    kept = action.copy()
    env.step(action)
    np.testing.assert_array_equal(action, kept)


@ours_and_warp
def test_gymnasiums_episode_statistics_agree_with_ours(make: Factory) -> None:
    """RecordEpisodeStatistics adds in place to NumPy arrays, so it needs Gymnasium's own conversion from tensors."""
    env, twin = make(N, max_episode_steps=LIMIT), make(N, max_episode_steps=LIMIT)
    actions = plan(env, 4 * LIMIT)
    recorder = RecordEpisodeStatistics(ArrayConversion(twin, env_xp=torch, target_xp=np))
    statistics = EpisodeStatistics(N)
    env.reset(seed=0)
    recorder.reset(seed=0)
    returns, lengths = [], []
    for action in actions:
        _, reward, terminated, truncated, _ = env.step(action)
        finished = statistics.update(reward, terminated | truncated)
        if finished is not None:
            returns += finished[0].tolist()
            lengths += finished[1].tolist()
        recorder.step(action)
    assert returns == list(recorder.return_queue)
    assert lengths == list(recorder.length_queue)
    assert len(returns) >= 4 * N


@pytest.mark.parametrize("ends", [0.0, 0.05, 0.5, 1.0])
def test_a_rollouts_statistics_are_those_of_its_steps(ends: float) -> None:
    torch.manual_seed(0)
    stepped, whole = EpisodeStatistics(N), RunningEpisodes(N)
    for T in (1, 40, 7):
        rewards, ended = torch.randn(T, N, dtype=torch.float64), torch.rand(T, N) < ends
        finished = [found for t in range(T) if (found := stepped.update(rewards[t], ended[t])) is not None]
        found = whole.update_rollout(rewards, ended)
        returns, lengths = found["returns"][ended], found["lengths"][ended]
        assert found["steps"] == rewards.numel()
        assert returns.tolist() == [x for row in finished for x in row[0].tolist()]
        assert lengths.tolist() == [x for row in finished for x in row[1].tolist()]
        assert torch.equal(whole.returns, stepped.returns)
        assert torch.equal(whole.lengths, stepped.lengths)


@foreign
def test_foreign_environments_say_what_they_cannot_do(make: Factory) -> None:
    env = make(N)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="make_vec"):
        env.step(plan(env, 1)[0][:1], ids=[0])
    with pytest.raises(ValueError, match="make_vec"):
        env.reset(ids=[0])
    with pytest.raises(SnapshotError, match="make_vec"):
        env.snapshot()
    with pytest.raises(SnapshotError, match="make_vec"):
        env.restore({})


@every_and_warp
def test_close_may_be_called_twice(make: Factory) -> None:
    env = make(N)
    env.reset(seed=0)
    env.close()
    env.close()
