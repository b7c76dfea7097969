"""Counter-based random streams: what is drawn depends on what it is for, never on who draws it.

Every stream is Philox, keyed by (run seed, purpose, iteration, shard) through NumPy's SeedSequence. Work over many
environments or pairs is cut into fixed shards of `SHARD` columns, each drawn as one block from its own stream, so
results do not depend on the number of workers.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405;
https://numpy.org/doc/stable/reference/random/parallel.html.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.devices import sent

SHARD = 32
"""Columns (environments or pairs) per stream."""

_NUMPY_DTYPES: dict[torch.dtype, type[np.floating]] = {torch.float32: np.float32, torch.float64: np.float64}


def stream(seed: int, purpose: str, iteration: int, shard: int = 0) -> np.random.Generator:
    """Give the random stream of one purpose, iteration and shard of a run.

    Args:
        seed: the run's seed, not negative.
        purpose: what the numbers are for, such as "action"; each purpose has its own streams.
        iteration: the training iteration, not negative.
        shard: the shard's index (or any other counter within the iteration, such as the epoch), not negative.

    Raises:
        ValueError: a counter is negative.
    """
    for name, counter in (("seed", seed), ("iteration", iteration), ("shard", shard)):
        if counter < 0:
            raise ValueError(f"{name} is {counter}; give 0 or more.")
    key = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), iteration, shard))
    return np.random.Generator(np.random.Philox(key))


def seed_of(seed: int, purpose: str) -> int:
    """Give a seed of its own for one purpose of a run, from 0 to 2^32 - 1.

    Episodes are seeded with consecutive numbers from it on: counted from the run's own seed, runs of neighbouring seeds
    would share all but a few.
    """
    return int(np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()),)).generate_state(1)[0])


def normal(
    seed: int,
    purpose: str,
    iteration: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    start: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Draw standard normal noise of the shape [T, N, ...].

    Args:
        shape: [T, N, ...]; N counts environments or pairs.
        dtype: torch.float32 or torch.float64.
        start: the first column, a multiple of `SHARD`: the result is what a draw from 0 holds in the columns start to
            start + N.
        device: a GPU draws by itself, see `drawn_there`; for any other the numbers are drawn on the CPU, where they
            stay.

    Raises:
        ValueError: a counter is negative, the shape has fewer than two dimensions, start is no multiple of `SHARD`,
            or dtype is another.
    """
    if device is not None and device.type == "cuda":
        return drawn_there(torch.randn, (seed, purpose, iteration, start // SHARD), shape, dtype, device)
    return _draw(np.random.Generator.standard_normal, seed, purpose, iteration, shape, dtype, start)


def uniform(
    seed: int,
    purpose: str,
    iteration: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    start: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Draw noise of the shape [T, N, ...], uniform on [0, 1); otherwise as `normal`."""
    if device is not None and device.type == "cuda":
        return drawn_there(torch.rand, (seed, purpose, iteration, start // SHARD), shape, dtype, device)
    return _draw(np.random.Generator.random, seed, purpose, iteration, shape, dtype, start)


def action_noise(
    policy: Any,
    seed: int,
    counter: int,
    steps: int,
    num_envs: int,
    first: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Draw what a rollout's actions are sampled with, [steps, num_envs, *noise_shape].

    Args:
        policy: one whose actor samples.
        seed: the run's.
        counter: which of the run's rollouts this is.
        first: number of the first environment among all of the run's, a multiple of `SHARD`.
        device: a GPU draws by itself; see `normal`.
    """
    head = policy.head
    draw = normal if head.kind == "gaussian" else uniform
    return draw(seed, "action", counter, (steps, num_envs, *head.noise_shape), start=first, device=device)


def drawn_there(
    sample: Callable[..., Tensor],
    key: tuple[int, str, int, int],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Draw on a device by PyTorch's generator there, which on a GPU is Philox too: one kernel, and nothing is copied.

    What is drawn is fixed by the key and the shape, on one kind of device. Differs from a draw on the CPU: the numbers
    are others, and a column's depend on how many there are.

    Args:
        sample: torch.randn or torch.rand.
        key: seed, purpose, iteration and shard, as of `stream`.
    """
    generator = torch.Generator(device).manual_seed(int(stream(*key).integers(2**63)))
    return sample(shape, generator=generator, dtype=dtype, device=device)


def permutation(seed: int, purpose: str, iteration: int, n: int, epoch: int = 0) -> Tensor:
    """Draw a random order of the indices 0 to n - 1, int64 [n]; each epoch of an iteration has its own."""
    return torch.from_numpy(stream(seed, purpose, iteration, epoch).permutation(n))


def few(
    seed: int, purpose: str, iteration: int, n: int, k: int | None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Draw k of the indices 0 to n - 1, int64 [k] on a device; None where all are meant: k is None, or n or more."""
    return None if k is None or k >= n else sent(permutation(seed, purpose, iteration, n)[:k], device)


def _draw(
    sample: Callable[..., np.ndarray],
    seed: int,
    purpose: str,
    iteration: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    start: int,
) -> Tensor:
    if len(shape) < 2:
        raise ValueError(f"shape is {shape}; give at least [T, N], where N counts environments or pairs.")
    if start < 0 or start % SHARD:
        raise ValueError(f"start is {start}; shards begin at multiples of {SHARD}.")
    if dtype not in _NUMPY_DTYPES:
        raise ValueError(f"dtype is {dtype}; noise is drawn as torch.float32 or torch.float64.")
    steps, columns, *rest = shape
    noise = np.empty(shape, _NUMPY_DTYPES[dtype])
    for first in range(0, columns, SHARD):
        width = min(SHARD, columns - first)
        generator = stream(seed, purpose, iteration, (start + first) // SHARD)
        # Column by column within the block, so that a column does not depend on how many follow it.
        block = sample(generator, (width, steps, *rest), dtype=noise.dtype)
        noise[:, first : first + width] = block.swapaxes(0, 1)
    return torch.from_numpy(noise)
