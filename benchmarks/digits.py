"""scikit-learn's handwritten digits, which several benchmarks classify."""

from __future__ import annotations

import torch
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """Return the 1797 images of 8 x 8 pixels, shuffled once and standardized as a whole, [n, 64], and labels [n]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(data.data, dtype=torch.float32)[order]
    return (inputs - inputs.mean()) / inputs.std(), torch.tensor(data.target, dtype=torch.int64)[order]
