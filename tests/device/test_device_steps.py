"""Steps on a device as one piece of work that could be recorded: what it reads stays where it is."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sim_device as sim
import torch
from addresses import Tape, replays
from addresses import place as place_of
from gymnasium import spaces
from torch import Tensor

from agents import NPG, PES, PPO, devices
from agents.devices import EAGER, Recorded, held
from agents.rollout.buffer import FieldSpec, Rollout
from agents.rollout.device_steps import DeviceSteps
from envs.device import DeviceVectorEnv, Transition


class Walk(DeviceVectorEnv):
    """Points that their actions move; an episode ends far off, or after three steps."""

    def __init__(self, num_envs: int, device: str, autoreset: Any = "same_step") -> None:
        box = spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(-1, 1, (2,))
        super().__init__(num_envs, *box, device=device, autoreset=autoreset)
        self.position = torch.zeros(num_envs, 2, device=device)
        self.elapsed = torch.zeros(num_envs, dtype=torch.int64, device=device)

    def begin(self, mask: Tensor, seeds: Tensor | None = None) -> Tensor:
        self.position.masked_fill_(mask[:, None], 0.5)
        self.elapsed.masked_fill_(mask, 0)
        return self.position.clone()

    def advance(self, actions: Tensor) -> Transition:
        self.position += actions
        self.elapsed += 1
        where = self.position.clone()
        return Transition(where, -where.square().sum(1), where[:, 0] > 1.0, self.elapsed >= 3)


class Rebinding(Walk):
    """The same, but its state comes to lie elsewhere with each step."""

    def advance(self, actions: Tensor) -> Transition:
        self.position = self.position + actions
        return super().advance(torch.zeros_like(actions))


OWN: dict[Any, dict[str, Any]] = {NPG: {}, PPO: {"batch_size": 8}, PES: {"horizon": 16}}


def agent_on(env: Any, device: str, kind: Any = NPG) -> Any:
    agent = kind("MlpPolicy", env, n_steps=8, net_arch=(4,), seed=0, device=device, **OWN[kind])
    return agent.learn(2 * agent.steps_per_iteration)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_a_step_reads_the_same_memory_each_time(kind: Any, where: str, device: str) -> None:
    place = "cpu" if where == "cpu" else device
    agent = agent_on(Walk(4, place, kind.autoreset), place, kind)
    steps = agent.collector.steps
    with torch.no_grad():
        steps.t.zero_()
        assert replays(steps._step)
    read = [place_of(x) for x in steps._read()]
    agent.learn(agent.steps_per_iteration, reset_num_timesteps=False)
    if place != "cpu":
        assert [place_of(x) for x in steps._read()] == read  # neither training nor a new rollout makes it stale


def test_what_comes_to_lie_elsewhere_is_noticed() -> None:
    agent = agent_on(Rebinding(3, "cpu"), "cpu")
    with torch.no_grad():
        agent.collector.steps.t.zero_()
        assert not replays(agent.collector.steps._step)


def test_values_are_held_in_one_place_as_long_as_they_fit() -> None:
    first = held(torch.empty(0), torch.ones(3))
    assert held(first, torch.full((3,), 2.0)) is first
    assert first.tolist() == [2.0, 2.0, 2.0]
    assert held(first, torch.ones(4)).shape == (4,)
    assert held(first, torch.ones(3, dtype=torch.float64)).dtype == torch.float64


def test_work_on_a_gpu_is_recorded_once_and_anew_where_memory_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    done, addresses = [], [1]
    tensor = SimpleNamespace(device=torch.device("cuda"), data_ptr=lambda: addresses[0])
    recorded = Recorded(lambda: done.append("work"), lambda: [tensor])  # type: ignore[list-item]
    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    monkeypatch.setattr(recorded, "_record", lambda: done.append("record") or graph)  # type: ignore[func-returns-value]
    for _ in range(EAGER + 2):
        recorded()
    assert done == ["work"] * EAGER + ["record", "replay", "replay"]
    done.clear()
    addresses[0] = 2
    recorded()
    recorded()
    assert done == ["record", "replay", "replay"]


UPDATES: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "kfac, renewed now and then, and a ceiling": {
        "fisher": "kfac",
        "curvature_renewal": 2,
        "normalize_observations": False,
        "log_std_end": -1.1,
    },
    "conjugate gradients on some samples": {"fisher": "compatible", "solver": "cg", "curvature_samples": 9},
}


@pytest.mark.parametrize(
    "settings", [pytest.param(x, marks=[pytest.mark.slow] * (len(x) > 0), id=name) for name, x in UPDATES.items()]
)
def test_an_update_that_is_done_again_by_rote_is_what_it_would_be(
    settings: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, metrics, here = [], [], device == sim.NAME
    for rote in (False, True):
        small = {"n_steps": 4, "net_arch": (4,), "critic_steps": 1, "critic_cg_max_steps": 1, "reused_rollouts": 3}
        # Every update is the same work.
        small |= {"critic": "gauss_newton", "curvature_memory": 25_600.0, "reuse_until": None}
        agent = NPG("MlpPolicy", Walk(4, device), seed=0, device=device, **small, **settings)
        recorded, tapes = agent.recorded, []

        def record(recorded: Any = recorded, tapes: Any = tapes) -> Tape:
            with Tape(recorded.read) as tape:
                recorded.found = recorded.work(*recorded._given)
            tapes.append(tape)
            return tape

        monkeypatch.setattr(devices, "RECORDS", torch.device(device).type if rote else "none")
        if here:  # in place of a GPU, which records itself
            monkeypatch.setattr(devices, "EAGER", 0)
            monkeypatch.setattr(recorded, "_record", record)
            monkeypatch.setattr(agent.collector.steps.step, "_record", lambda: None)
        agent.learn((5 if here else 9) * agent.steps_per_iteration)
        assert len(tapes) == (rote and here)
        assert (recorded.graph is not None) == rote
        learned.append(agent.policy.state_dict() | agent.own_tensors())
        metrics.append({name: x for name, x in agent.last_metrics.items() if not name.startswith("time/")})
    for name, x in learned[0].items():
        if here:
            assert torch.equal(x, learned[1][name]), name
        else:
            torch.testing.assert_close(learned[1][name], x, rtol=1e-2, atol=1e-3, msg=name)
    assert metrics[0] == (metrics[1] if here else pytest.approx(metrics[1], rel=0.05, abs=1e-3, nan_ok=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to record on")
def test_what_cannot_be_recorded_is_done_as_it_is_and_said_once() -> None:
    done: list[int] = []
    tensor = SimpleNamespace(device=torch.device("cuda"), data_ptr=lambda: 1)
    recorded = Recorded(lambda: done.append(1), lambda: [tensor])  # type: ignore[list-item]
    for _ in range(EAGER):
        recorded()
    with pytest.warns(UserWarning, match="a GPU is told its work kernel by kernel"):
        recorded()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded()  # it is said once
    assert len(done) == EAGER + 2


def test_off_a_gpu_nothing_is_recorded(device: str) -> None:
    if device != sim.NAME:
        pytest.skip("this is one")
    done: list[int] = []
    recorded = Recorded(lambda: done.append(1), lambda: [torch.zeros(1, device=device)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(EAGER + 3):
            recorded()
    assert recorded.graph is None
    assert len(done) == EAGER + 3


def test_what_has_ended_stands_still_as_far_as_one_sees(device: str) -> None:
    env = Walk(3, device, "disabled")
    observations, _ = env.reset()
    fields = {"rewards": FieldSpec(), **{name: FieldSpec(dtype=torch.bool) for name in ("terminated", "stepped")}}
    rollout = Rollout(5, 3, fields, device)
    actions = torch.tensor([[0.3, 0.0], [0.0, 0.0], [0.0, 0.0]], device=device)
    steps = DeviceSteps(env, lambda _, noise: (actions, actions), rollout, lambda: [])
    last = steps.fill(observations, ids=torch.tensor([0, 1], device=device))
    found = {name: sim.to_host(rollout[name]).cpu() for name in fields}
    assert found["stepped"].int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert found["terminated"].int().tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert ((found["rewards"] != 0) == found["stepped"])[:, :2].all()
    torch.testing.assert_close(sim.to_host(last).cpu(), torch.tensor([[1.1, 0.5], [0.5, 0.5], [0.5, 0.5]]))
    assert sim.to_host(env.position).cpu()[0, 0] > 1.5  # where it is by now
