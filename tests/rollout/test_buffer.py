"""The rollout buffer: allocated once, filled in place, true last observations kept apart."""

import copy
import pickle

import pytest
import torch

from agents.rollout.buffer import FieldSpec, Rollout

FIELDS = {
    "observations": FieldSpec((3,)),
    "actions": FieldSpec((2,)),
    "rewards": FieldSpec((), torch.float64),
    "terminated": FieldSpec((), torch.bool),
}


def step(t, n=4):
    return {
        "observations": torch.full((n, 3), t + 0.1, dtype=torch.float64),
        "actions": torch.full((n, 2), float(-t)),
        "rewards": torch.arange(n, dtype=torch.float64) + 10 * t,
        "terminated": torch.arange(n) == t,
    }


def filled():
    buffer = Rollout(5, 4, FIELDS)
    for t in range(5):
        buffer.add(t, **step(t))
    return buffer


def test_steps_are_kept_and_cast():
    buffer = filled()
    assert buffer["observations"].shape == (5, 4, 3)
    assert buffer["observations"].dtype == torch.float32
    assert torch.equal(buffer["observations"][3], torch.full((4, 3), 3.1))
    assert buffer["rewards"].dtype == torch.float64
    assert buffer["rewards"][2].tolist() == [20, 21, 22, 23]
    assert buffer["terminated"].sum().item() == 4


def test_values_are_copied_into_memory_that_stays():
    buffer = filled()
    address = buffer["observations"].data_ptr()
    values = step(0)
    buffer.add(0, **values)
    values["observations"].fill_(99)
    buffer.clear()
    assert buffer["observations"][0].max() < 1
    assert buffer["observations"].data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_final_observations_in_order_and_copied(dtype):
    buffer = filled()
    last = torch.arange(6, dtype=dtype).view(2, 3)
    buffer.add_final(1, torch.tensor([0, 3]), last)
    buffer.add_final(4, torch.tensor([2]), torch.full((1, 3), 7.0))
    last.fill_(-1)
    t, n, observations = buffer.final_observations()
    assert t.tolist() == [1, 1, 4]
    assert n.tolist() == [0, 3, 2]
    assert observations.tolist() == [[0, 1, 2], [3, 4, 5], [7, 7, 7]]
    assert observations.dtype == torch.float32


def test_no_final_observations_is_empty_and_clear_forgets():
    buffer = filled()
    buffer.add_final(0, torch.tensor([1]), torch.zeros(1, 3))
    buffer.clear()
    t, n, observations = buffer.final_observations()
    assert len(t) == len(n) == 0
    assert observations.shape == (0, 3)
    assert t.dtype == n.dtype == torch.int64


def test_the_same_device_is_the_same_buffer():
    buffer = filled()
    assert buffer.to("cpu") is buffer
    assert buffer.to(torch.device("cpu", 0)) is buffer


def test_another_device_gets_one_lasting_twin():
    buffer = filled()
    twin = buffer.to("meta")
    assert twin["rewards"].device.type == "meta"
    assert twin["observations"].shape == (5, 4, 3)
    assert len(twin.final_observations()[0]) == 0
    buffer.add_final(1, torch.tensor([2]), torch.zeros(1, 3))
    assert buffer.to("meta") is twin
    assert twin.final_observations()[2].shape == (1, 3)
    assert buffer.to("meta").final_observations()[2].shape == (1, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pin_memory", [False, True])
def test_the_twin_on_a_gpu_holds_the_rollout(pin_memory):
    buffer = Rollout(5, 4, FIELDS, pin_memory=pin_memory)
    for t in range(5):
        buffer.add(t, **step(t))
    buffer.add_final(1, torch.tensor([2]), torch.ones(1, 3))
    twin = buffer.to("cuda")
    for name in FIELDS:
        assert torch.equal(twin[name].cpu(), buffer[name])
    assert [kept.cpu().tolist() for kept in twin.final_observations()] == [[1], [2], [[1, 1, 1]]]
    assert buffer.to("cuda:0") is twin


def test_a_step_may_be_added_in_parts():
    buffer = Rollout(5, 4, FIELDS)
    buffer.add(1, actions=torch.ones(4, 2))
    buffer.add(1, rewards=torch.full((4,), 2.0))
    assert buffer["actions"][1].min() == 1
    assert buffer["rewards"][1].min() == 2


def test_some_environments_entries_are_put_and_the_others_stay():
    buffer = Rollout(2, 3, {"rewards": FieldSpec()})
    buffer["rewards"].fill_(7)
    buffer.put("rewards", 1, torch.tensor([0, 2]), torch.tensor([1.5, 2.5]))
    assert buffer["rewards"].tolist() == [[7, 7, 7], [1.5, 7, 2.5]]


def test_unknown_fields_are_named():
    buffer = Rollout(5, 4, FIELDS)
    with pytest.raises(ValueError, match="add got log_probs; this rollout keeps actions, observations"):
        buffer.add(0, **step(0), log_probs=torch.zeros(4))
    with pytest.raises(KeyError, match="no field 'values'"):
        _ = buffer["values"]


def test_a_shape_that_would_broadcast_is_refused():
    buffer = Rollout(5, 4, FIELDS)
    with pytest.raises(ValueError, match=r"rewards has shape \(1,\)"):
        buffer.add(0, **(step(0) | {"rewards": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"give \(2, 3\)"):
        buffer.add_final(0, torch.tensor([0, 1]), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 4, FIELDS), "n_steps is 0"),
        ((5, -1, FIELDS), "num_envs is -1"),
        ((5, 4, {}), "fields is empty"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        Rollout(*arguments)


def test_final_observations_need_the_field():
    buffer = Rollout(5, 4, {"rewards": FieldSpec()})
    with pytest.raises(KeyError, match="'observations'"):
        buffer.final_observations()


def test_one_step_of_one_environment():
    buffer = Rollout(1, 1, {"rewards": FieldSpec()})
    buffer.add(0, rewards=torch.tensor([2.0]))
    assert buffer["rewards"].tolist() == [[2]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rollout: pickle.loads(pickle.dumps(rollout))])
def test_a_copy_is_filled_apart_from_the_original(copied):
    buffer = filled()
    other = copied(buffer)
    other.add(0, rewards=torch.full((4,), 5.0))
    assert other["rewards"][0].tolist() == [5, 5, 5, 5]
    assert buffer["rewards"][0].tolist() == [0, 1, 2, 3]


def test_the_last_observations_go_along_and_are_forgotten():
    buffer = filled()
    buffer.last_observations = torch.ones(4, 3)
    assert buffer.to("meta").last_observations.device.type == "meta"
    buffer.clear()
    assert buffer.last_observations is None
