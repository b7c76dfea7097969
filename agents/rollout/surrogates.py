"""Objectives whose derivatives at the sampling policy are a policy gradient's."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Give the mean over the last axis of min(r A, clip(r, 1 - ε, 1 + ε) A), which is to be maximised, [...].

    Args:
        ratio: r = π(a|s) / π_old(a|s), [..., n].
        advantages: A, [..., n].
        clip_range: ε.

    Source: Schulman et al. 2017, equation 7, https://arxiv.org/abs/1707.06347.
    """
    # Clipped only on the side where that makes it smaller, which spares half of the operations and derivatives.
    gains = advantages > 0
    most = torch.where(gains, 1 + clip_range, torch.inf)
    least = torch.where(gains, -torch.inf, 1 - clip_range)
    return (ratio.clamp(least, most) * advantages).mean(-1)


def lvc_surrogate(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Give r_t A_t, elementwise; r_t = π(a_t|s_t) / π_old(a_t|s_t).

    The mean's gradient at π_old is the policy gradient. Its Hessian leaves out the products of scores of different
    steps of an episode: that is biased for episodes of several steps, and varies less.

    Args:
        log_ratio: log r_t, [..., T].
        advantages: A_t, [..., T].

    Source: Rothfuss et al. 2019, equation 12 (low-variance curvature), https://arxiv.org/abs/1810.06784.
    """
    return log_ratio.exp() * advantages


def dice_surrogate(log_ratio: Tensor, advantages: Tensor, begin: Tensor) -> Tensor:
    """Give (Π_{u <= t} r_u - Π_{u < t} r_u) A_t, elementwise, with products over the steps of the episode up to t.

    All derivatives of the mean at π_old are unbiased estimates of those of the expected return, the Hessian included,
    where A_t is what followed the action less a baseline of the state.

    Args:
        log_ratio: log r_t, [..., T].
        advantages: A_t, [..., T].
        begin: the index of the first step of t's episode, int64 [..., T].

    Source: Foerster et al. 2018, https://arxiv.org/abs/1802.05098, in the form of Farquhar, Whiteson & Foerster 2019,
    equation 9 (Loaded DiCE), https://arxiv.org/abs/1909.10549, with the ratio to the sampling policy in place of the
    operator that stops gradients: the values are the same, and other parameters are weighted by importance.
    """
    total = log_ratio.cumsum(-1)
    upto = total - (total - log_ratio).gather(-1, begin)
    return (upto.exp() - (upto - log_ratio).exp()) * advantages
