"""SB3View behaves as Stable-Baselines3's own vector environments, and as_vector takes what people have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import RescaleAction
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize

from envs import GymVectorEnv, VectorEnv, make_vec
from envs.sb3 import SB3View, as_vector

N = 3


class Constant:
    """A model for evaluate_policy that always takes one action."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def predict(self, observation: np.ndarray, **kwargs: Any) -> tuple[np.ndarray, None]:
        return np.array([self.action] * len(observation)), None


def view(env_id: str = "CartPole-v1", num_envs: int = N, **kwargs: Any) -> SB3View:
    return SB3View(make_vec(env_id, num_envs, seed=0, **kwargs))


@pytest.fixture
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_types_are_those_of_sb3() -> None:
    env = view()
    observation = env.reset()
    assert (type(observation), observation.dtype, observation.shape) == (np.ndarray, np.float32, (N, 4))
    observation, rewards, dones, infos = env.step(np.zeros(N, int))
    assert (type(observation), observation.dtype, observation.shape) == (np.ndarray, np.float32, (N, 4))
    assert (type(rewards), rewards.dtype, rewards.shape) == (np.ndarray, np.float32, (N,))
    assert (type(dones), dones.dtype, dones.shape) == (np.ndarray, np.bool_, (N,))
    assert len(infos) == N
    assert env.observation_space == env.vector.single_observation_space
    assert env.action_space == env.vector.single_action_space


class Reusing(GymVectorEnv):
    """Returns the same tensors at every step, as physics with bound memory may."""

    def step(self, actions: Any, ids: Any = None) -> Any:
        *tensors, info = super().step(actions, ids)
        self.returned = getattr(self, "returned", tensors)
        for kept, new in zip(self.returned, tensors, strict=True):
            kept.copy_(new)
        return *self.returned, info


def test_what_a_step_returned_stays() -> None:
    env = SB3View(Reusing([gymnasium.make("Pendulum-v1", max_episode_steps=3)]))
    env.reset()
    first = env.step(np.zeros((1, 1), np.float32))[:3]
    kept = [array.copy() for array in first]
    for _ in range(2):
        env.step(np.ones((1, 1), np.float32))
    assert all(np.array_equal(*pair) for pair in zip(first, kept, strict=True))


def test_a_reset_within_an_episode_starts_its_statistics_anew() -> None:
    env = view("probes/Survival-v0", 1)
    env.reset()
    env.step(np.ones(1, int))
    env.reset()
    *_, infos = env.step(np.zeros(1, int))
    assert (infos[0]["episode"]["r"], infos[0]["episode"]["l"]) == (0.0, 1)


def test_infos_of_an_episode_end() -> None:
    env = view("Pendulum-v1", 2, max_episode_steps=3)
    env.reset()
    total = np.zeros(2)
    for step in range(1, 4):
        observation, rewards, dones, infos = env.step(np.zeros((2, 1), np.float32))
        total += rewards
        assert all(info["TimeLimit.truncated"] == (step == 3) for info in infos)
        assert all(("terminal_observation" in info) == ("episode" in info) == (step == 3) for info in infos)
    assert dones.all()
    for i, info in enumerate(infos):
        assert info["episode"]["r"] == pytest.approx(total[i])
        assert info["episode"]["l"] == 3
        assert info["episode"]["t"] >= 0
        assert info["terminal_observation"].shape == (3,)
        assert not np.array_equal(info["terminal_observation"], observation[i])


def test_termination_is_no_truncation() -> None:
    env = view("probes/OneStepReward-v0", 2)
    env.reset()
    *_, infos = env.step(np.zeros(2, int))
    assert [info["TimeLimit.truncated"] for info in infos] == [False, False]
    assert [info["episode"]["r"] for info in infos] == [1.0, 1.0]


def test_both_at_once_is_no_time_limit() -> None:
    env = SB3View(GymVectorEnv([TimeLimit(gymnasium.make("probes/OneStepReward-v0"), 1)]))
    env.reset()
    *_, infos = env.step(np.zeros(1, int))
    assert infos[0]["TimeLimit.truncated"] is False


def test_infos_carry_the_environments_own() -> None:
    env = view("Hopper-v5", 2, backend="gymnasium", max_episode_steps=2)
    theirs = DummyVecEnv([lambda: gymnasium.make("Hopper-v5", max_episode_steps=2)])
    env.reset()
    theirs.reset()
    for _ in range(2):
        *_, infos = env.step(np.zeros((2, 3), np.float32))
        *_, (info,) = theirs.step(np.zeros((1, 3), np.float32))
        assert infos[0].keys() - {"episode"} == info.keys()
        assert infos[0]["x_position"] != infos[1]["x_position"]


def test_infos_have_only_their_own_entries() -> None:
    class Telling(gymnasium.Wrapper):
        def step(self, action: Any) -> Any:
            *rest, info = super().step(action)
            return *rest, {**info, **({"told": {"deep": 1}} if action else {})}

    env = SB3View(make_vec(lambda: Telling(gymnasium.make("CartPole-v1")), 2, seed=0))
    env.reset()
    *_, infos = env.step(np.array([0, 1]))
    assert "told" not in infos[0]
    assert infos[1]["told"] == {"deep": 1}


def test_infos_carry_dense_batches() -> None:
    env, vector = view("Hopper-v5", 2, backend="mujoco"), make_vec("Hopper-v5", 2, seed=0, backend="mujoco")
    env.reset()
    vector.reset()
    actions = np.array([[1, 1, 1], [-1, -1, -1]], np.float32)
    *_, infos = env.step(actions)
    *_, batched = vector.step(actions)
    entries = {key for key in batched if not key.startswith("_")}
    assert infos[0].keys() == infos[1].keys() == {"TimeLimit.truncated", *entries}
    assert [info["x_velocity"] for info in infos] == batched["x_velocity"].tolist()


def test_infos_behave_as_a_list() -> None:
    env = view("probes/OneStepReward-v0")
    env.reset()
    *_, infos = env.step(np.zeros(N, int))
    infos[1]["terminal_observation"] = "changed"
    assert infos[1]["terminal_observation"] == "changed"
    assert infos[-1] is infos[N - 1]
    assert [*infos] == infos[:] == [infos[0], infos[1], infos[2]]
    infos[0] = {"new": 1}
    assert infos[0] == {"new": 1}
    with pytest.raises(IndexError):
        infos[N]


def test_disabled_autoreset_is_done_by_the_view() -> None:
    same, disabled = view(max_episode_steps=4), view(max_episode_steps=4, autoreset="disabled")
    assert np.array_equal(same.reset(), disabled.reset())
    for _ in range(10):
        first, second = same.step(np.zeros(N, int)), disabled.step(np.zeros(N, int))
        assert all(np.array_equal(*pair) for pair in zip(first[:3], second[:3], strict=True))
        for one, other in zip(first[3], second[3], strict=True):
            assert one.keys() == other.keys()
            assert np.array_equal(one.get("terminal_observation"), other.get("terminal_observation"))


def test_seed_is_that_of_the_vector() -> None:
    env = view()
    assert env.seed(7) == [7, 8, 9]
    assert np.array_equal(env.reset(), make_vec("CartPole-v1", N).reset(seed=7)[0].numpy())
    env.seed(7)
    again = env.reset()
    assert not np.array_equal(env.reset(), again)


def test_options_reach_the_environments_once() -> None:
    env = view()
    env.set_options({"low": 0.01, "high": 0.02})
    assert (env.reset() >= 0.01).all()
    assert not (env.reset() >= 0.01).all()
    env.set_options([{"low": 0.01}, {}, {}])
    with pytest.raises(ValueError, match="one dict"):
        env.reset()


SAME_STEP = {"autoreset_mode": AutoresetMode.SAME_STEP}
KINDS: dict[str, Any] = {
    "ours": lambda: make_vec("Pendulum-v1", N),
    "gymnasium-sync": lambda: gymnasium.make_vec("Pendulum-v1", N, "sync", vector_kwargs=SAME_STEP),
    "gymnasium-async": lambda: gymnasium.make_vec("Pendulum-v1", N, "async", vector_kwargs=SAME_STEP),
    "wrapped": lambda: RescaleAction(
        gymnasium.make_vec("Pendulum-v1", N, "sync", vector_kwargs=SAME_STEP), np.float32(-1), np.float32(1)
    ),
    "sb3": lambda: DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")] * N),
    "sb3-processes": lambda: SubprocVecEnv([lambda: gymnasium.make("Pendulum-v1")] * N),
    "sb3-wrapped": lambda: VecMonitor(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")] * N)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_and_methods_of_environments(kind: str) -> None:
    env = SB3View(as_vector(KINDS[kind]()))
    assert env.get_attr("g", indices=[0, 2]) == [10.0, 10.0]
    env.set_attr("g", 2.0, indices=1)
    assert env.get_attr("g") == [10.0, 2.0, 10.0]
    env.set_attr("g", 3.0)
    assert env.get_attr("g") == [3.0] * N
    assert env.env_method("get_wrapper_attr", "g") == [3.0] * N
    if kind != "gymnasium-async":
        assert env.env_method("get_wrapper_attr", "g", indices=[1]) == [3.0]
        assert len(env.env_method("reset", seed=1)) == N
    if kind not in ("gymnasium-async", "sb3-processes"):  # whose processes die of it
        assert not env.has_attr("nothing")
    assert env.env_is_wrapped(Monitor) == [True] * N
    assert env.env_is_wrapped(gymnasium.wrappers.ClipAction) == [False] * N
    if kind != "gymnasium-async":
        assert env.env_is_wrapped(TimeLimit, indices=[0]) == [True]
    assert env.spec.id == "Pendulum-v1"
    vector = env.vector
    vector.set_attr("g", [1.0, 2.0, 3.0])
    assert vector.get_attr("g", ids=[2, 0]) == (3.0, 1.0)
    with pytest.raises(ValueError, match="values holds 2"):
        vector.set_attr("g", [1.0, 2.0])
    env.close()


def test_environments_of_another_process_are_called_together() -> None:
    env = SB3View(as_vector(KINDS["gymnasium-async"]()))
    with pytest.raises(ValueError, match="together"):
        env.env_method("get_wrapper_attr", "g", indices=[1])
    env.close()


def test_attributes_and_methods_of_environments_that_are_one_object() -> None:
    env = view("Hopper-v5")
    assert env.get_attr("dt", indices=[0, 1]) == [env.vector.dt] * 2
    assert env.env_method("snapshot", indices=[0])[0].keys() == env.vector.snapshot().keys()
    env.set_attr("max_episode_steps", 3)
    assert env.vector.max_episode_steps == 3
    with pytest.raises(AttributeError, match=r"no attribute '_forward_reward_weight'.*make_vec"):
        env.set_attr("_forward_reward_weight", 3)
    with pytest.raises(ValueError, match="one for all 3"):
        env.set_attr("max_episode_steps", 3, indices=[0])
    with pytest.raises(ValueError, match="one for all 3"):
        env.vector.set_attr("max_episode_steps", [3, 4, 5])
    assert env.env_is_wrapped(Monitor) == [True] * N
    assert env.env_is_wrapped(TimeLimit) == [False] * N


def test_images() -> None:
    env = SB3View(GymVectorEnv([Painted(), Painted()]))
    env.reset()
    assert [image.shape for image in env.get_images()] == [(4, 4, 3)] * 2
    assert env.render().shape == (8, 4, 3)


class Painted(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    render_mode = "rgb_array"
    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def render(self) -> Any:
        return np.zeros((4, 4, 3), np.uint8)


def test_evaluate_policy(no_warnings: None) -> None:
    assert evaluate_policy(Constant(1), view("probes/Survival-v0"), n_eval_episodes=7) == (10.0, 0.0)
    returns, lengths = evaluate_policy(Constant(0), view(), n_eval_episodes=6, return_episode_rewards=True)
    assert returns == lengths
    assert len(returns) == 6


def test_evaluate_policy_equals_sb3s_own_monitor() -> None:
    theirs = DummyVecEnv([lambda: Monitor(gymnasium.make("probes/Endless-v0"))] * 2)
    ours = view("probes/Endless-v0", 2)
    both = [evaluate_policy(Constant(0), env, return_episode_rewards=True) for env in (theirs, ours)]
    assert both[0] == both[1]


def test_vec_monitor() -> None:
    with pytest.warns(UserWarning, match="already wrapped"):
        env = VecMonitor(view("probes/Survival-v0"))
    assert evaluate_policy(Constant(1), env, n_eval_episodes=3) == (10.0, 0.0)


def test_vec_normalize_of_rewards() -> None:
    env = VecNormalize(view("probes/Survival-v0"), norm_obs=False)
    env.reset()
    for _ in range(10):
        _, rewards, dones, infos = env.step(np.ones(N, int))
    assert dones.all()
    assert (rewards < 1.0).all()
    assert [info["episode"]["r"] for info in infos] == [10.0] * N


def test_sb3s_ppo_trains_and_evaluates(tmp_path: Path, no_warnings: None) -> None:
    callback = EvalCallback(view(), eval_freq=64, n_eval_episodes=3, best_model_save_path=str(tmp_path), verbose=0)
    model = PPO("MlpPolicy", view(num_envs=4), n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu")
    model.learn(512, callback=callback)
    assert model.num_timesteps == 512
    assert len(model.ep_info_buffer) > 0
    assert callback.best_mean_reward > 5
    assert (tmp_path / "best_model.zip").exists()


def test_sb3s_ppo_gives_the_same_on_its_own_environments() -> None:
    """Equal environments, equal seeds: the view changes nothing in what SB3 learns."""
    weights = []
    for env in (view("probes/Endless-v0", 2), DummyVecEnv([lambda: gymnasium.make("probes/Endless-v0")] * 2)):
        model = PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, seed=0, device="cpu")
        model.learn(128)
        weights.append(torch.cat([p.detach().flatten() for p in model.policy.parameters()]))
    assert torch.equal(*weights)


def same_step(mode: AutoresetMode) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec("CartPole-v1", N, "sync", vector_kwargs={"autoreset_mode": mode})


def test_as_vector_keeps_ours() -> None:
    vector = make_vec("CartPole-v1", 2)
    assert as_vector(vector) is vector
    assert as_vector(SB3View(vector)) is vector


def test_as_vector_of_one_environment() -> None:
    env = gymnasium.make("CartPole-v1")
    vector = as_vector(env)
    assert isinstance(vector, GymVectorEnv)
    assert vector.num_envs == 1
    assert vector.envs == [env]


def test_as_vector_of_gymnasiums_steps_the_same() -> None:
    env, vector = same_step(AutoresetMode.SAME_STEP), as_vector(same_step(AutoresetMode.SAME_STEP))
    assert np.array_equal(env.reset(seed=3)[0], vector.reset(seed=3)[0].numpy())
    for _ in range(30):
        *arrays, info = env.step(np.zeros(N, int))
        *tensors, ours = vector.step(torch.zeros(N, dtype=torch.int64))
        assert all(np.array_equal(array, tensor.numpy()) for array, tensor in zip(arrays, tensors, strict=True))
        assert ("final_obs" in info) == ("final_obs" in ours)
        for i in np.flatnonzero(info.get("_final_obs", [])):
            assert np.array_equal(info["final_obs"][i], ours["final_obs"][i].numpy())
    assert torch.equal(vector.reset(seed=[3, 4, 5])[0], as_vector(same_step(AutoresetMode.SAME_STEP)).reset(seed=3)[0])


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED, None])
def test_other_autoreset_of_gymnasium_is_refused_with_the_line_to_type(mode: AutoresetMode | None) -> None:
    env = same_step(mode or AutoresetMode.NEXT_STEP)
    if mode is None:
        del env.metadata["autoreset_mode"]
    with pytest.raises(ValueError, match=r"gym\.make_vec\(\"CartPole-v1\".*SAME_STEP"):
        as_vector(env)


def test_same_step_without_final_observations_is_refused() -> None:
    env = same_step(AutoresetMode.SAME_STEP)
    step = env.step
    env.step = lambda actions: (*step(actions)[:4], {})
    vector = as_vector(env)
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="final_obs"):
        evaluate_policy(Constant(0), SB3View(vector))


def sb3(env_id: str = "CartPole-v1", **kwargs: Any) -> VecEnv:
    return DummyVecEnv([lambda: gymnasium.make(env_id, **kwargs)] * N)


def test_as_vector_of_sb3s_steps_the_same() -> None:
    env, vector = sb3(), as_vector(sb3())
    env.seed(3)
    assert np.array_equal(env.reset(), vector.reset(seed=3)[0].numpy())
    ends = 0
    for _ in range(30):
        observation, rewards, dones, infos = env.step(np.zeros(N, int))
        ours, reward, terminated, truncated, info = vector.step(torch.zeros(N, dtype=torch.int64))
        assert np.array_equal(observation, ours.numpy())
        assert np.array_equal(rewards, reward.numpy())
        assert np.array_equal(dones, terminated.numpy())
        assert not truncated.any()
        for i in np.flatnonzero(dones):
            ends += 1
            assert np.array_equal(info["final_obs"][i].numpy(), infos[i]["terminal_observation"])
    assert ends


def test_as_vector_of_sb3s_tells_truncation() -> None:
    vector = as_vector(sb3("probes/Endless-v0", max_episode_steps=2))
    vector.reset(seed=0)
    assert not vector.step(np.zeros(N, int))[3].any()
    _, _, terminated, truncated, info = vector.step(np.zeros(N, int))
    assert truncated.all()
    assert not terminated.any()
    assert info["_final_obs"].all()


class Terse(DummyVecEnv):
    """Says nothing in its infos but where episodes end, and there only what is asked for."""

    told: tuple[str, ...] = ()

    def step_wait(self) -> Any:
        *arrays, dones, infos = super().step_wait()
        told = [{key: info[key] for key in self.told} for info in infos] if dones.any() else []
        return *arrays, dones, told


@pytest.mark.parametrize("told", [(), ("TimeLimit.truncated",), ("TimeLimit.truncated", "terminal_observation")])
def test_infos_may_be_missing_as_in_sb3(told: tuple[str, ...]) -> None:
    env = Terse([lambda: gymnasium.make("probes/Endless-v0", max_episode_steps=2)] * N)
    env.told = told
    vector = as_vector(env)
    vector.reset(seed=0)
    assert not vector.step(np.zeros(N, int))[3].any()
    observation, _, terminated, truncated, info = vector.step(np.zeros(N, int))
    # Without its last observation nothing says what a truncated episode would have gone on to.
    assert truncated.all() == (not terminated.any()) == ("terminal_observation" in told)
    assert torch.equal(info["final_obs"], observation)


def test_a_monitors_episode_counts_before_normalized_rewards() -> None:
    monitored = DummyVecEnv([lambda: Monitor(gymnasium.make("probes/Survival-v0"))] * N)
    env = SB3View(as_vector(VecNormalize(monitored, norm_obs=False)))
    env.seed(0)
    env.reset()
    for _ in range(10):
        _, rewards, _, infos = env.step(np.ones(N, int))
    assert (rewards < 1.0).all()
    assert [info["episode"]["r"] for info in infos] == [10.0] * N


def test_normalized_observations_are_refused() -> None:
    with pytest.raises(ValueError, match="norm_obs=False"):
        as_vector(VecMonitor(VecNormalize(sb3())))


def test_dict_observations_are_refused() -> None:
    env = gymnasium.make("CartPole-v1")
    env.observation_space = gymnasium.spaces.Dict(a=env.observation_space)
    with pytest.raises(ValueError, match="FlattenObservation"):
        as_vector(env)


@pytest.mark.parametrize("env", ["CartPole-v1", None, object()])
def test_anything_else_is_refused(env: Any) -> None:
    with pytest.raises(TypeError, match=r"gymnasium\.Env.*make_vec"):
        as_vector(env)


def test_sb3_takes_one_seed() -> None:
    with pytest.raises(ValueError, match="one int"):
        as_vector(sb3()).reset(seed=[1, 2, 3])


def test_gymnasium_takes_one_seed_or_one_for_each() -> None:
    vector = as_vector(same_step(AutoresetMode.SAME_STEP))
    seeds = np.arange(vector.num_envs) + 5
    assert torch.equal(vector.reset(seed=seeds)[0].clone(), vector.reset(seed=np.int64(5))[0])
    with pytest.raises(ValueError, match="one for each"):
        vector.reset(seed=[*seeds, 1])


def test_a_view_of_a_foreign_environment_can_be_seeded() -> None:
    for vector in (as_vector(sb3()), as_vector(same_step(AutoresetMode.SAME_STEP))):
        assert isinstance(vector, VectorEnv)
        env = SB3View(vector)
        env.seed(5)
        assert np.array_equal(env.reset(), vector.reset(seed=5)[0].numpy())
