"""make_vec: what it makes, and what it says when it cannot."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import mujoco
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import FlattenObservation

from agents import NPG
from envs import GymVectorEnv, make_vec
from envs.mujoco import MujocoVectorEnv


@pytest.mark.parametrize(
    ("env_id", "backend", "kind"),
    [
        ("Hopper-v5", "auto", MujocoVectorEnv),
        ("Hopper-v5", "mujoco", MujocoVectorEnv),
        ("Hopper-v5", "gymnasium", GymVectorEnv),
        ("CartPole-v1", "auto", GymVectorEnv),
        ("gymnasium:CartPole-v1", "auto", GymVectorEnv),
        (lambda: gymnasium.make("CartPole-v1"), "auto", GymVectorEnv),
    ],
)
def test_backends(env_id: Any, backend: str, kind: type) -> None:
    env = make_vec(env_id, 2, backend=backend)
    assert type(env) is kind
    assert env.num_envs == 2


def test_arguments_reach_the_environments() -> None:
    env = make_vec("Pendulum-v1", 2, g=1.0)
    assert isinstance(env, GymVectorEnv)
    assert [one.unwrapped.g for one in env.envs] == [1.0, 1.0]
    assert make_vec("Hopper-v5", 2, max_episode_steps=7).max_episode_steps == 7


@pytest.mark.parametrize("env_id", ["Hopper-v5", "families/HalfCheetahVel-v0"])
def test_threads_of_batched_physics_are_no_matter_to_one_environment_after_the_other(env_id: str) -> None:
    env = make_vec(env_id, 2, backend="gymnasium", num_threads=1)
    assert isinstance(env, GymVectorEnv)
    with pytest.raises(ValueError, match=r"was not made with the arguments \['num_threads'\]"):
        make_vec("CartPole-v1", 2, num_threads=1)


def test_a_callable_may_flatten_observations() -> None:
    assert make_vec(lambda: FlattenObservation(gymnasium.make("FrozenLake-v1")), 2).reset()[0].shape == (2, 16)
    with pytest.raises(ValueError, match="FlattenObservation"):
        make_vec("Blackjack-v1", 2)  # a Tuple; FrozenLake's Discrete is one that policies take


def test_seed_fixes_the_first_reset() -> None:
    starts = [make_vec("CartPole-v1", 2, seed=seed).reset()[0] for seed in (1, 1, 3)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": "Hoper-v5"}, "'Hoper-v5'.*did you mean 'Hopper-v5'"),
        ({"env_id": "probes/OneStep-v0"}, "did you mean 'probes/OneStepReward-v0'"),
        ({"env_id": "qqqqqq"}, "'qqqqqq'.*callable.$"),
        ({"backend": "mojoco"}, "'mojoco'.*did you mean 'mujoco'"),
        ({"backend": "mujoco"}, "'CartPole-v1'.*backend='auto'"),
        ({"device": "cuda"}, "'cuda'.*to the agent.*backend='warp'"),
        ({"autoreset": "next_step"}, "next_step"),
        ({"num_envs": 0}, "num_envs is 0"),
        ({"lenght": 3}, r"CartPole-v1.*\['lenght'\].*unexpected keyword"),
        ({"env_id": lambda: gymnasium.make("CartPole-v1"), "lenght": 3}, "lenght"),
        ({"env_id": "Hopper-v5", "lenght": 3}, "lenght"),
    ],
)
def test_mistakes_are_explained(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vec(**{"env_id": "CartPole-v1", "num_envs": 2, **arguments})


def test_what_is_not_an_environment_is_refused() -> None:
    with pytest.raises(TypeError, match="callable"):
        make_vec(3, 2)
    with pytest.raises(TypeError, match="returned a dict"):
        make_vec(dict, 2)
    one = gymnasium.make("CartPole-v1")
    with pytest.raises(ValueError, match="twice"):
        make_vec(lambda: one, 2)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        make_vec("no_such_package:Env-v0", 1)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_probes_need_no_import() -> None:
    assert run("from envs import make_vec; print(make_vec('probes/Endless-v0', 2).num_envs)") == "2"


def test_importing_envs_is_light() -> None:
    code = "import sys, envs; print([m for m in ('mujoco', 'stable_baselines3', 'envs.probes') if m in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.parametrize("mode", ["SameStep", "same_step", "SAME_STEP", AutoresetMode.SAME_STEP])
def test_autoreset_is_said_as_gymnasium_says_it(mode: Any) -> None:
    assert make_vec("CartPole-v1", autoreset=mode).autoreset is AutoresetMode.SAME_STEP
    assert make_vec("CartPole-v1", autoreset="Disabled").autoreset is AutoresetMode.DISABLED


def test_warp_that_is_not_installed_is_said_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envs.mujoco.warp", None)
    with pytest.raises(ValueError, match=r"needs MuJoCo Warp .*pip install 'geodesic-rl\[warp\]'"):
        make_vec("Hopper-v5", backend="warp")


@pytest.mark.parametrize("env_id", ["newton/Humanoid-v5", "newton/HumanoidStandup-v5"])
def test_humanoids_with_newtons_solver_are_gymnasiums_with_it(env_id: str) -> None:
    ours, theirs = make_vec(env_id, 1, seed=0), make_vec(env_id, 1, backend="gymnasium")
    model = theirs.envs[0].unwrapped.model  # type: ignore[attr-defined]
    assert model.opt.solver == ours.model.opt.solver == mujoco.mjtSolver.mjSOL_NEWTON  # type: ignore[attr-defined]
    assert mujoco.MjModel.from_xml_path(theirs.envs[0].unwrapped.fullpath).opt.solver != model.opt.solver  # type: ignore[attr-defined]
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.single_action_space == theirs.single_action_space
    assert NPG.preset(env_id) == NPG.preset(env_id.removeprefix("newton/"))
