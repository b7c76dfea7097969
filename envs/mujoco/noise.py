"""Counter-based random numbers for resets: a number is a hash of (seed, episode, position), drawn batch-wise."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class ResetNoise:
    """Independent streams for n environments, each fixed by its seed and the number of its episode.

    Args:
        seed: [n] int64, not negative.
        episode: [n] int64, not negative.
    """

    def __init__(self, seed: np.ndarray, episode: np.ndarray) -> None:
        keys = _mix(_mix(seed.astype(np.uint64) + _GOLDEN) + episode.astype(np.uint64) * _GOLDEN)
        self._keys = keys[:, None]
        self._position = 1

    def _unit(self, size: int) -> np.ndarray:
        """[n, size] in [0, 1), 53 bits each."""
        counter = np.arange(self._position, self._position + size, dtype=np.uint64)
        self._position += size
        return (_mix(self._keys + counter * _GOLDEN) >> np.uint64(11)) * 2.0**-53

    def uniform(self, low: float, high: float, size: int) -> np.ndarray:
        """[n, size], uniform in [low, high)."""
        return low + (high - low) * self._unit(size)

    def normal(self, size: int) -> np.ndarray:
        """[n, size], standard normal (Box and Muller 1958)."""
        radius = np.sqrt(-2.0 * np.log1p(-self._unit(size)))
        return radius * np.cos(2.0 * np.pi * self._unit(size))
