"""Counter-based streams: equal keys agree, other keys differ, and no cut of the work changes a number."""

import itertools

import numpy as np
import pytest
import torch

from agents import noise
from agents.noise import SHARD, normal, permutation, stream, uniform

DRAWS = [normal, uniform]


@pytest.mark.parametrize("draw", DRAWS)
def test_equal_keys_agree_and_each_part_of_the_key_counts(draw):
    shape = (5, 40, 3)
    first = draw(7, "action", 3, shape)
    assert torch.equal(first, draw(7, "action", 3, shape))
    for other in (draw(8, "action", 3, shape), draw(7, "reset", 3, shape), draw(7, "action", 4, shape)):
        assert (first != other).float().mean() > 0.99


def test_every_counter_opens_another_stream():
    keys = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (2**32, "a", 0, 0)]
    assert len({stream(*key).integers(2**63) for key in keys}) == len(keys)


def test_the_purpose_is_hashed_the_same_in_every_process():
    # Frozen: a checkpoint resumes with these numbers.
    assert stream(1, "action", 2, 3).integers(2**32, size=2).tolist() == [402129665, 2982909418]


@pytest.mark.parametrize("draw", DRAWS)
def test_a_helper_that_starts_at_a_shard_draws_the_same_columns(draw):
    whole = draw(1, "action", 0, (4, 3 * SHARD + 5, 2))
    helper = draw(1, "action", 0, (4, SHARD + 5, 2), start=2 * SHARD)
    assert torch.equal(whole[:, 2 * SHARD :], helper)


@pytest.mark.parametrize("draw", DRAWS)
def test_columns_do_not_depend_on_how_many_follow(draw):
    assert torch.equal(draw(1, "action", 0, (4, 50, 2))[:, :7], draw(1, "action", 0, (4, 7, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments(dtype):
    z, u = normal(0, "z", 0, (100, 64, 5), dtype), uniform(0, "u", 0, (100, 64, 5), dtype)
    assert z.dtype == u.dtype == dtype
    assert z.is_contiguous()
    # 32000 numbers: a standard error of 0.0056 for the normal mean, 0.0016 for the uniform one.
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.03
    assert abs(u.mean() - 0.5) < 0.01
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(np.corrcoef(z[:, :, 0].T)[0, 1]) < 0.4


def test_shards_are_different():
    z = normal(0, "z", 0, (50, 2 * SHARD))
    assert not torch.equal(z[:, :SHARD], z[:, SHARD:])


def test_no_columns_is_an_empty_block():
    assert normal(0, "z", 0, (3, 0, 2)).shape == (3, 0, 2)


def test_permutations_hold_every_index_once_and_epochs_differ():
    orders = [permutation(0, "minibatch", 1, 20, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(20))
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[1], permutation(0, "minibatch", 1, 20, 1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: stream(-1, "a", 0), "seed is -1"),
        (lambda: stream(0, "a", -2), "iteration is -2"),
        (lambda: normal(0, "a", 0, (2, 3), start=5), "multiples of 32"),
        (lambda: normal(0, "a", 0, (2, 3), start=-32), "multiples of 32"),
        (lambda: normal(0, "a", 0, (3,)), r"\[T, N\]"),
        (lambda: uniform(0, "a", 0, (3, 2), torch.int64), "float32 or torch.float64"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_ten_seeds_are_ten() -> None:
    purposes = ("environments", "evaluation", "final evaluation")
    first = sorted(noise.seed_of(seed, purpose) for seed in range(10) for purpose in purposes)
    assert 0 <= first[0] <= first[-1] < 2**32
    assert min(b - a for a, b in itertools.pairwise(first)) > 10_000
    assert first == sorted(noise.seed_of(seed, purpose) for seed in range(10) for purpose in purposes)


@pytest.mark.parametrize("sample", [torch.randn, torch.rand])
def test_what_a_device_draws_by_itself_is_fixed_by_its_key(sample):
    def draw(*key):
        return noise.drawn_there(sample, key, (64, 128, 3), torch.float32, "cpu")

    first = draw(7, "action", 3, 0)
    assert torch.equal(first, draw(7, "action", 3, 0))
    for key in ((8, "action", 3, 0), (7, "reset", 3, 0), (7, "action", 4, 0), (7, "action", 3, 1)):
        assert (first != draw(*key)).float().mean() > 0.99
    mean, std = (0.0, 1.0) if sample is torch.randn else (0.5, 12**-0.5)
    assert abs(first.mean() - mean) < 0.02 * std * 3
    assert abs(first.std() / std - 1) < 0.02
