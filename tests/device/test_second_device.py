"""Whole trainings on a second device: they give the CPU's bits, and wait for it as often as they may.

The device is `sim_device`, or a GPU (`pytest tests/device --device cuda`), which computes with kernels of its own: its
numbers are compared by tolerance. Two placements: "apart", with environments on the CPU and the policy on the device,
and "together", with all on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import device_env
import pytest
import sim_device as sim
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from agents import REGISTRY, Agent, copos, load, npg
from agents.evolution import policy_search
from agents.natural import critic_fits
from agents.policy import networks
from agents.rollout.buffer import FieldSpec, Rollout
from envs import VectorEnv, make_vec

FAMILY = {"env": "families/HalfCheetahVel-v0", "env_kwargs": {"horizon": 8}, "n_steps": 8, "meta_batch_size": 2}
SEARCH = {"policy": "LinearPolicy", "n_steps": 8, "env_kwargs": {"max_episode_steps": 24}}
WHOLE = {"policy": "LinearPolicy", "n_steps": 12, "estimator": "es"}
SOLVED = {"fisher": "compatible", "net_arch": (8,), "critic": "gauss_newton"}
REMEMBERED = {"curvature_memory": 25_600.0, "critic": "gauss_newton"}
"""What a device can do without asking."""
CASES: dict[str, dict[str, Any]] = {
    "npg": REMEMBERED | {"reused_rollouts": 3},
    "npg defaults": {},
    "trpo": REMEMBERED | {"reused_rollouts": 0},
    "copos": SOLVED,
    "ppo": {"batch_size": 16, "n_epochs": 2},
    "pes": SEARCH,
    "reptile": FAMILY,
    "fomaml": FAMILY,
    "maml": FAMILY,
    "trpo reuse": REMEMBERED | {"reused_rollouts": 3},
    "npg gram": SOLVED | {"cg_preconditioner": "gram", "curvature_samples": 24, "solver": "cg"},
    "npg own factors": {"curvature_memory": 0.0, "reused_rollouts": 0},
    "npg adaptive": {"fisher": "adaptive", "net_arch": (8,), "critic": "adam", "reused_rollouts": 0},
    "npg adam": REMEMBERED | {"critic": "adam", "critic_epochs": 2, "reused_rollouts": 3},
    "pes truncated_es": SEARCH | {"estimator": "truncated_es", "num_envs": 6},
    "pes whitened": SEARCH | {"whitening_memory": 20, "optimizer": "adam"},
    "pes ranks": WHOLE | {"reward_scaling": "ranks"},
    "pes log_ranks": WHOLE | {"reward_scaling": "log_ranks"},
    "pes best": WHOLE | {"top_directions": 1, "learning_rate_end": 0.01},
}
"""Algorithm and variant -> settings."""
PLACEMENTS = ("apart", "together")
BUDGETS = {
    "npg": (1, 1),
    "npg defaults": (1, 1),
    "trpo": (4, 4),
    "copos": (19, 19),
    "ppo": (1, 1),
    "pes": (1, 1),
    "reptile": (7, 5),
    "fomaml": (12, 10),
    "maml": (12, 10),
    "trpo reuse": (6, 6),  # a step more is tried than by trpo, at two waits each
    "npg gram": (1, 1),
    "npg own factors": (2, 2),
    "npg adaptive": (7, 7),
    "npg adam": (1, 1),
    "pes truncated_es": (1, 1),
    "pes whitened": (1, 3),
    "pes ranks": (1, 1),
    "pes log_ranks": (1, 1),
    "pes best": (1, 2),  # its rate goes by the steps that were made
}
"""Waits per iteration, apart and together. What grows with the steps of a rollout is too much."""


@pytest.fixture(autouse=True)
def _one_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take on the CPU what the device takes: its tanh and sums, which differ by rounding, eigenvectors of the update
    before, few halvings, and derivatives without forward mode, for which a device made in Python has no memory.
    """
    monkeypatch.setattr(networks.Tanh, "forward", lambda self, x: torch.tanh(x))
    monkeypatch.setattr(copos, "jvp", jvp)
    monkeypatch.setattr(npg, "AT_ONCE", None)
    monkeypatch.setattr(critic_fits, "HALVINGS", critic_fits.HALVINGS_UNASKED)
    monkeypatch.setattr(policy_search, "chosen", policy_search.masked)


def jvp(function: Any, primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    """Give a function's value and its derivative along tangents, a dict of tensors each, by two reverse passes."""
    with torch.enable_grad():
        (theta,), (w,) = primals, tangents
        theta = {name: x.detach().requires_grad_() for name, x in theta.items()}
        value = function(theta)
        weights = torch.zeros_like(value, requires_grad=True)
        along = torch.autograd.grad(value, list(theta.values()), weights, create_graph=True)
        (derivative,) = torch.autograd.grad(along, weights, list(w.values()))
    return value.detach(), derivative.detach()


def environments(name: str, device: str | None) -> VectorEnv:
    """Make a case's environments, on a device unless it is None."""
    settings = {"env": "Hopper-v5", "num_envs": 4, "env_kwargs": {"max_episode_steps": 12}} | CASES[name]
    autoreset = REGISTRY[name.split()[0]].autoreset
    make = partial(make_vec, settings["env"], settings["num_envs"], seed=0, **settings["env_kwargs"])
    if device is None:
        return make(autoreset=autoreset)
    kind = device_env.DeviceTaskEnv if "families" in settings["env"] else device_env.DeviceEnv
    return kind(make(autoreset="disabled"), autoreset, device, sim.unseen)


def agent_of(name: str, device: str, vector: VectorEnv) -> Agent:
    settings = {"policy": "MlpPolicy", "n_steps": 16, "net_arch": (16, 16)} | CASES[name]
    policy, _ = settings.pop("policy"), [settings.pop(key, None) for key in ("env", "num_envs", "env_kwargs")]
    return REGISTRY[name.split()[0]](policy, vector, seed=0, device=device, **settings)


def advance(agent: Agent) -> None:
    """Train for one more iteration."""
    next(agent.iterations(10**6, reset_num_timesteps=False))


def learned(agent: Agent) -> dict[str, Tensor]:
    """Give all that the agent has learned and keeps, on the CPU."""
    kept = {f"policy.{name}": value for name, value in agent.policy.state_dict().items()} | agent.own_tensors()
    return {name: sim.to_host(value.detach()).clone().cpu() for name, value in kept.items()}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], device: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "schedule.entropy":  # a sum over a row that the CPU has once, and the device for each sample
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0.0, msg=name)
        elif device == sim.NAME:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3, msg=name)


@contextmanager
def counted(device: str, budget: int) -> Iterator[None]:
    """Fail where the host waits for the device more often than it may: by our log, or by CUDA's own."""
    if device == sim.NAME:
        with sim.record() as log:
            yield
        assert log.waits <= budget, f"{log.waits} waits of {budget}:\n{log.table()}"
        return
    torch.cuda.set_sync_debug_mode("warn" if budget else "error")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) <= budget, waits


@pytest.fixture(scope="module", name="on_the_cpu")
def _on_the_cpu() -> dict[str, dict[str, Tensor]]:
    """Keep what trainings on the CPU learn, by case."""
    return {}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", CASES)
def test_training_has_the_bits_of_the_cpu_and_keeps_to_its_budget(
    name: str, placement: str, device: str, on_the_cpu: dict[str, dict[str, Tensor]]
) -> None:
    if name not in on_the_cpu:
        agent = agent_of(name, "cpu", environments(name, None))
        for _ in range(2):  # as below: each call makes the training a little longer, by which its schedules go
            advance(agent)
        on_the_cpu[name] = learned(agent)
    agent = agent_of(name, device, environments(name, device if placement == "together" else None))
    advance(agent)
    with counted(device, BUDGETS[name][PLACEMENTS.index(placement)]):
        advance(agent)
    check_equal(learned(agent), on_the_cpu[name], device)


class Watching(BaseCallback):
    """Sees single steps, and asks for nothing."""

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["npg", "pes ranks"])
def test_with_callbacks_or_a_policy_on_the_cpu_the_same_is_learned(name: str, device: str) -> None:
    found = []
    for policy, place in (("cpu", None), (device, device), ("cpu", device)):
        agent = agent_of(name, policy, environments(name, place))
        iterations = agent.iterations(10**6, callback=Watching())
        for _ in range(2):
            next(iterations)
        found.append(learned(agent))
    for other in found[1:]:
        check_equal(other, found[0], device)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["npg", "pes whitened"])
def test_a_run_goes_on_on_another_device(name: str, placement: str, device: str, tmp_path: Path) -> None:
    straight = agent_of(name, "cpu", environments(name, None))
    for _ in range(4):  # schedules count from the beginning of each
        advance(straight)

    agent = agent_of(name, "cpu", environments(name, None))
    for step, where in enumerate((device, device, "cpu")):
        advance(agent)
        agent.save(tmp_path / f"{step}.zip")
        together = where != "cpu" and placement == "together"
        agent = load(tmp_path / f"{step}.zip", environments(name, where if together else None), device=where)
    advance(agent)
    check_equal(learned(agent), learned(straight), device)


def test_a_rollout_waits_for_its_copies_before_it_is_overwritten(device: str) -> None:
    if device != sim.NAME:
        pytest.skip("a GPU does not tell")
    rollout = Rollout(2, 3, {"rewards": FieldSpec()})
    for begin in (lambda: rollout.add(0, rewards=torch.ones(3)), rollout.clear):
        rollout.to(device)
        begin()
        rollout["rewards"].add_(1)
        sim.synchronize()

    rollout.to(device)
    rollout._copies = None  # as if nobody waited
    rollout.add(0, rewards=torch.zeros(3))
    with pytest.raises(sim.Race):
        sim.synchronize()


@pytest.mark.parametrize("name", ["npg", "npg adam", "ppo", "pes"])
def test_a_rollout_to_learn_nothing_from_is_refused_and_leaves_the_policy_as_it_was(name: str, device: str) -> None:
    # Its numbers come to the host after the update.
    vector = environments(name, device)
    agent = agent_of(name, device, vector)
    advance(agent)
    before, own = learned(agent), vector.advance

    def spoilt(actions: Tensor) -> Any:
        transition = own(actions)
        return transition._replace(rewards=transition.rewards * torch.nan)

    vector.advance = spoilt
    with pytest.raises(ValueError, match="environment 0 gave the reward nan at step 1 of this rollout"):
        advance(agent)
    after = {key: value for key, value in learned(agent).items() if key.startswith("policy.")}
    assert after
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    vector.advance = own
    advance(agent)
    assert not all(torch.equal(value, before[key]) for key, value in learned(agent).items() if key in after)


@pytest.mark.parametrize("fails", [False, True])
def test_what_acts_elsewhere_is_what_was_learned(fails: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of("ppo", device, environments("ppo", None))
    advance(agent)
    train = agent.train

    def failing(batch: Any) -> None:
        train(batch)
        raise FloatingPointError("a test")

    if fails:
        monkeypatch.setattr(agent, "train", failing)
    advance(agent)
    acting = agent.collector.policy.state_dict()
    for name, value in agent.policy.state_dict().items():
        assert torch.equal(sim.to_host(value).cpu(), acting[name]), name
