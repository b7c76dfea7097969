"""The MuJoCo tasks, written once against the array API, on tensors of a device: NumPy's numbers, without a wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sim_device as sim
import torch
from torch import Tensor

from envs import make_vec
from envs.mujoco import TASKS, MujocoVectorEnv
from envs.mujoco.model import constants
from envs.mujoco.tasks import RandomStreams

torch_api = pytest.importorskip("array_api_compat.torch")


def on(device: str, x: Any) -> Any:
    return torch.as_tensor(np.array(x)).to(device)


def check(found: Tensor | None, expected: np.ndarray | None, tolerance: float = 1e-12) -> None:
    assert (found is None) == (expected is None)
    if found is not None:
        kept = sim.to_host(found).cpu().numpy()
        np.testing.assert_allclose(kept, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("env_id", TASKS)
def test_a_task_is_the_same_on_a_device(env_id: str, device: str) -> None:
    env = make_vec(env_id, 3, seed=0)
    assert isinstance(env, MujocoVectorEnv)
    env.reset()
    actions = env.action_space.sample() * 0.5
    for _ in range(3):
        env.step(actions)
    task, fields = env.task, {name: np.array(x) for name, x in env._physics.fields.items()}
    host = SimpleNamespace(**fields)
    there = SimpleNamespace(**{name: on(device, x) for name, x in fields.items()})
    model, rest = constants(env.model, lambda x: on(device, x)), [on(device, x) for x in env._rest]
    seeds, episodes, velocity = np.arange(3), np.arange(3) + 7, None
    velocity_there, actions_there = None, on(device, actions)
    streams = RandomStreams(on(device, seeds), on(device, episodes), xp=torch_api)

    with sim.record() as log:
        position = task.position(torch_api, there, model)
        observation = task.observe(torch_api, there, model)
        velocity_there = None if position is None else position * 0.5
        reward, terminated, _ = task.reward(torch_api, there, model, actions_there, velocity_there)
        started = task.initial_state(torch_api, streams, *rest)
    assert log.waits == 0, log.table()

    expected = task.position(np, host, env.model)
    velocity = None if expected is None else expected * 0.5
    check(position, expected)
    check(observation, task.observe(np, host, env.model))
    expected_reward, expected_end, _ = task.reward(np, host, env.model, actions, velocity)
    check(reward, expected_reward, 1e-6)  # actions are squared in float32
    check(terminated, expected_end)
    for found, given in zip(started, task.initial_state(np, RandomStreams(seeds, episodes), *env._rest), strict=True):
        check(found, given)


def test_uniform_numbers_are_the_same_to_the_last_bit(device: str) -> None:
    seeds, episodes = np.array([0, 1, 2**62, 5]), np.array([3, 0, 2**40, 5])
    host = RandomStreams(seeds, episodes, "task")
    there = RandomStreams(on(device, seeds), on(device, episodes), "task", xp=torch_api)
    for size in (1, 7):
        found = sim.to_host(there.uniform(-0.3, 0.1, size)).cpu().numpy()
        assert (found == host.uniform(-0.3, 0.1, size)).all()
