"""Environments on a device: masks in place of indices, final observations always, and no wait."""

from __future__ import annotations

from typing import Any

import pytest
import sim_device as sim
import torch
from device_env import DeviceEnv
from torch import Tensor

from envs import make_vec


def both(autoreset: str, device: str) -> tuple[Any, DeviceEnv]:
    """Make the same environments on the CPU and on the device, with episodes of two steps."""
    settings = {"num_envs": 4, "seed": 3, "max_episode_steps": 2}
    inner = make_vec("Hopper-v5", autoreset="disabled", **settings)
    return make_vec("Hopper-v5", autoreset=autoreset, **settings), DeviceEnv(inner, autoreset, device, sim.unseen)


def host(x: Tensor) -> Tensor:
    return sim.to_host(x).cpu()


def test_an_episode_that_ends_is_followed_by_the_next_within_the_step(device: str) -> None:
    expected, env = both("same_step", device)
    assert torch.equal(host(env.reset()[0]), expected.reset()[0])
    for t in range(5):
        actions = torch.full((4, 3), 0.1 * t)
        there = actions.to(device)
        with sim.record() as log:
            *found, info = env.step(there)
        assert log.waits == 0, log.table()
        *wanted, wanted_info = expected.step(actions)
        for x, y in zip(found, wanted, strict=True):
            assert torch.equal(host(x), y)
        ended = wanted[2] | wanted[3]
        assert torch.equal(host(info["_final_obs"]), ended)
        assert torch.equal(host(info["final_obs"]), wanted_info["final_obs"] if ended.any() else wanted[0])


def test_an_episode_that_has_ended_is_masked_until_it_is_reset(device: str) -> None:
    expected, env = both("disabled", device)
    env.reset()
    expected.reset()
    actions = torch.zeros(4, 3)
    for _ in range(2):
        env.step(actions.to(device))
        expected.step(actions)
    _, rewards, terminated, truncated, info = env.step(actions.to(device))
    assert not any(host(x).any() for x in (rewards, terminated, truncated, info["_final_obs"]))
    assert host(env.ended).all()

    ids, seeds = torch.tensor([2, 0]).to(device), torch.tensor([7, 8]).to(device)
    with sim.record() as log:
        begun, _ = env.reset(seed=seeds, ids=ids)
        _, rewards, *_ = env.step(actions.to(device))
    assert log.waits <= (1 if device == sim.NAME else 0), log.table()
    assert torch.equal(host(begun), expected.reset(seed=[7, 8], ids=[2, 0])[0])
    assert torch.equal(host(rewards)[[2, 0]], expected.step(actions[:2], [2, 0])[1])
    assert host(rewards)[[1, 3]].tolist() == [0, 0]
    assert host(env.ended).tolist() == [False, True, False, True]


def test_what_they_do_not_take_is_refused_in_words(device: str) -> None:
    _, env = both("disabled", device)
    with pytest.raises(ValueError, match="stepped together; leave ids out"):
        env.step(torch.zeros(1, 3), ids=[0])
    with pytest.raises(ValueError, match="take none, and ids in place of a mask"):
        env.reset(options={"reset_mask": [True] * 4})
