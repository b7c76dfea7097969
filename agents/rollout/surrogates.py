"""Objectives whose derivatives at the sampling policy are a policy gradient's, and what PPO logs of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from agents.config import SCHEDULED, CommonConfig, above, at_least


@dataclass(frozen=True, kw_only=True)
class ClippedConfig(CommonConfig):
    """What the clipped surrogate's policy and critic descend, L = -L^CLIP + c₁ L^VF - c₂ S, and how far."""

    clip_range: Annotated[float, above(0), SCHEDULED] = 0.2
    """ε: how far a probability ratio may go from 1 before its sample gives no more gradient."""
    clip_range_vf: Annotated[float, above(0), SCHEDULED] | None = None
    """How far a value may go from what it was before its sample gives no more gradient, in the units of the critic's
    targets: standard deviations of returns where they are normalized. None: as far as it will."""
    target_kl: Annotated[float, above(0)] | None = None
    """Mean KL(old || new), in nats: a minibatch with an estimate above 1.5 times it ends the iteration's updates; None
    never does."""
    ent_coef: Annotated[float, at_least(0)] = 0.0
    """c₂: weight of the entropy bonus."""
    vf_coef: Annotated[float, at_least(0)] = 0.5
    """c₁: weight of the value loss."""


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


class Losses(NamedTuple):
    """What a minibatch says, each of shape () but the last."""

    loss: Tensor
    """All together."""
    policy_gradient_loss: Tensor
    value_loss: Tensor
    entropy_loss: Tensor
    log_ratio: Tensor
    """log π(a|s) - log π_old(a|s), [m]."""


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Estimate KL(old || new) in nats from log π(a|s) - log π_old(a|s), [...]; shape ().

    Source: http://joschu.net/blog/kl-approx.html, the estimator that varies less.
    """
    return (log_ratio.exp() - 1 - log_ratio).mean()


@torch.no_grad()
def report_losses(
    history: Sequence[Losses], minibatches: int, actor: Any, s: Tensor, old: Any, clip_range: float
) -> dict[str, Tensor]:
    """Sum up an iteration as SB3 does: the last minibatch's loss, the last epoch's KL, and means of all else.

    kl is the mean KL(old || new) and approx_kl its estimate from the actions, in nats; clip_fraction is the share of
    samples whose probability ratio was beyond clip_range.

    Args:
        history: of each minibatch that was looked at.
        minibatches: of an epoch.
        actor: the policy after them.
        s: all normalized observations, [n, O].
        old: the distributions there before.
        clip_range: ε.
    """
    new = actor.shared_std(s)
    loss, *others, log_ratio = map(torch.stack, zip(*history, strict=True))
    last_epoch = (len(history) - 1) % minibatches + 1
    values = dict(zip(Losses._fields, (loss[-1], *(other.mean() for other in others)), strict=False))
    values["approx_kl"] = approximate_kl(log_ratio[-last_epoch:])
    values["clip_fraction"] = ((log_ratio.exp() - 1).abs() > clip_range).float().mean()
    values |= {"kl": old.kl(new).mean(), "entropy": new.entropy().mean()}
    if actor.log_std is not None:
        values["std"] = actor.log_std.bias.exp().mean()
    return values


CURVES: dict[str, dict[str, list[str]]] = {
    "does it learn": {
        "return": ["rollout/ep_rew_mean", "eval/mean_reward"],
        "standard deviation": ["train/std"],
        "critic: explained variance": ["train/explained_variance"],
    },
    "how far an update goes": {
        "KL, nats: true, estimated": ["train/kl", "train/approx_kl"],
        "share of samples beyond clip_range": ["train/clip_fraction"],
    },
}
"""What a dashboard shows of `report_losses`, as `Agent.dashboard` has it."""
