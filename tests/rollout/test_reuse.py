"""Recent rollouts side by side: what lies where, and what of them counts how much."""

import pytest
import torch
from torch import Tensor

from agents import NPG
from agents.rollout.buffer import FieldSpec, Rollout, advantages, importance_weights
from agents.rollout.reuse import RecentRollouts
from envs import make_vec

T, N = 3, 2
FIELDS = {
    "observations": FieldSpec((4,)),
    "actions": FieldSpec((1,)),
    "rewards": FieldSpec(dtype=torch.float64),
    "terminated": FieldSpec(dtype=torch.bool),
    "truncated": FieldSpec(dtype=torch.bool),
}


def rollout(number: int, width: int = N) -> tuple[Rollout, Tensor]:
    """The number-th of some rollouts, whose first environment is cut off at step 1, and its log μ(a|s)."""
    made, generator = Rollout(T, width, FIELDS), torch.Generator().manual_seed(number)
    for name in ("observations", "actions", "rewards"):
        made[name].copy_(torch.randn(made[name].shape, generator=generator))
    made["truncated"][1, 0] = True
    made.add_final(1, torch.tensor([0]), torch.full((1, 4), float(number)))
    made.last_observations = torch.randn((width, 4), generator=generator)
    return made, torch.randn(T * width, generator=generator)


def take_in(recent: RecentRollouts, new: Rollout, log_probs: Tensor) -> Rollout:
    """As an update does that comes to its end."""
    joined = recent.take_in(new, log_probs)
    recent.trusted = True
    return joined


def test_the_last_rollouts_lie_side_by_side_and_the_oldest_makes_room() -> None:
    recent, made = RecentRollouts(3), [rollout(number) for number in range(5)]
    for number, (new, log_probs) in enumerate(made):
        joined = take_in(recent, new, log_probs)
        kept = min(number + 1, 3)
        assert (joined.n_steps, joined.num_envs) == (T, kept * N)
    for place, number in enumerate((3, 4, 2)):
        new, log_probs = made[number]
        columns = slice(place * N, (place + 1) * N)
        for name in FIELDS:
            assert torch.equal(joined[name][:, columns], new[name])
        assert torch.equal(joined["log_probs"][:, columns], log_probs.view(T, N))
        assert torch.equal(joined.last_observations[columns], new.last_observations)
    steps, ids, observations = joined.final_observations()
    assert steps.tolist() == [1, 1, 1]
    assert ids.tolist() == [0, 2, 4]
    assert observations[:, 0].tolist() == [3, 4, 2]


def test_what_it_keeps_is_a_copy_in_memory_that_stays() -> None:
    recent = RecentRollouts(2)
    for number in range(2):
        new, log_probs = rollout(number)
        joined = take_in(recent, new, log_probs)
    new["rewards"].zero_()
    assert (joined["rewards"] != 0).all()
    places = [joined[name].data_ptr() for name in joined.specs]
    assert take_in(recent, *rollout(2)) is joined
    assert [joined[name].data_ptr() for name in joined.specs] == places


@pytest.mark.parametrize("taken", [1, 2, 3, 5])
def test_what_is_saved_goes_on_as_it_would_have(taken: int) -> None:
    recent, copy = RecentRollouts(3), RecentRollouts(3)
    for number in range(taken):
        take_in(recent, *rollout(number))
    copy.load({name: x.clone() for name, x in recent.tensors().items()})
    for number in range(taken, taken + 4):
        ours, theirs = take_in(recent, *rollout(number)), take_in(copy, *rollout(number))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.specs)
        assert torch.equal(ours.last_observations, theirs.last_observations)
        pairs = zip(ours.final_observations(), theirs.final_observations(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_rollouts_of_another_size_begin_anew() -> None:
    recent = RecentRollouts(2)
    take_in(recent, *rollout(0))
    assert take_in(recent, *rollout(1, width=3)).num_envs == 3
    fewer = RecentRollouts(3)
    for number in range(3):
        take_in(fewer, *rollout(number))
    changed = RecentRollouts(2)
    changed.load(fewer.tensors())
    changed.most = 2
    assert take_in(changed, *rollout(4)).num_envs == N
    assert changed.tensors()["taken"] == 1


def test_after_an_update_that_did_not_come_to_its_end_it_begins_anew() -> None:
    recent = RecentRollouts(3)
    take_in(recent, *rollout(0))
    recent.take_in(*rollout(1))
    assert recent.tensors() == {}
    assert take_in(recent, *rollout(2)).num_envs == N


@pytest.mark.parametrize("taken", [1, 2, 4])
def test_where_a_field_holds_what_steps_came_to_the_same_is_saved_and_goes_on(taken: int) -> None:
    """As on a device, which is not asked which episodes ended."""

    def of_every_step(number: int) -> tuple[Rollout, Tensor]:
        plain, log_probs = rollout(number)
        wide = Rollout(T, N, FIELDS | {"final_observations": FIELDS["observations"]})
        for name in FIELDS:
            wide[name].copy_(plain[name])
        came_to = wide["final_observations"]
        came_to[:-1], came_to[-1] = plain["observations"][1:], plain.last_observations
        steps, ids, observations = plain.final_observations()
        came_to[steps, ids] = observations
        wide.last_observations = plain.last_observations
        return wide, log_probs

    plain, wide, moved = RecentRollouts(2), RecentRollouts(2), RecentRollouts(2)
    for number in range(taken):
        take_in(plain, *rollout(number))
        take_in(wide, *of_every_step(number))
    saved, expected = wide.tensors(), plain.tensors()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], x) for name, x in expected.items())
    moved.load(expected)
    ours, theirs = take_in(moved, *of_every_step(9)), take_in(wide, *of_every_step(9))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs.specs)


def test_only_what_the_policy_does_less_weighs_less() -> None:
    recent, (new, log_probs) = RecentRollouts(1), rollout(0)
    joined = take_in(recent, new, log_probs)
    change = torch.linspace(-1, 1, T * N)
    torch.testing.assert_close(importance_weights(log_probs + change, joined), change.exp().clamp(max=1))


@torch.no_grad()
def test_side_by_side_the_last_rollout_has_the_advantages_it_has_alone() -> None:
    agent = NPG("MlpPolicy", make_vec("Swimmer-v5", 4, max_episode_steps=20), seed=0, n_steps=32, device="cpu")
    agent.train = lambda batch: None  # type: ignore[method-assign]
    next(agent.iterations(1))
    policy, new = agent.policy, agent.collector.rollout
    log_probs = policy.actor(policy.normalize(new["observations"].flatten(0, 1))).log_prob(new["actions"].flatten(0, 1))
    recent = RecentRollouts(3)
    for moved in (0.5, -0.3, 0.0):  # as if other policies had taken the same actions before
        joined = take_in(recent, new, log_probs + moved)

    def of(batch: Rollout, rho: Tensor | None) -> tuple[Tensor, Tensor]:
        values = policy.critic(policy.normalize(batch["observations"].flatten(0, 1)))
        found = advantages(batch, values, policy, 0.99, 0.95, rho)
        return found[0].view(batch.n_steps, -1), found[1].view(batch.n_steps, -1)

    rho = importance_weights(policy.actor(policy.normalize(joined["observations"].flatten(0, 1))).log_prob(
        joined["actions"].flatten(0, 1)), joined)  # fmt: skip
    (A, returns), (alone, returns_alone) = of(joined, rho), of(new, None)
    torch.testing.assert_close(A[:, 8:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(returns[:, 8:], returns_alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A[:, 4:8], alone, rtol=1e-4, atol=1e-4)  # weights above 1 count as 1
    assert (A[:, :4] - alone).abs().max() > 0.1 * alone.abs().max()
