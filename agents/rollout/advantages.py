"""Generalized advantage estimation over a rollout of many environments."""

from __future__ import annotations

import torch
from torch import Tensor


def next_values(values: Tensor, last_values: Tensor, final: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The value of each step's true successor observation.

    Args:
        values: V(obs[t]), [T, N].
        last_values: V of the observations after the last step, [N].
        final: (t [k], n [k], V [k]): the values of the observations that truncated episodes really ended in; after such
            a step values[t + 1] belongs to the next episode.

    Returns:
        [T, N]. Where an episode terminated the entry means nothing; `gae` does not use it.

    Source: Pardo et al. 2018, "Time limits in reinforcement learning", section 3, https://arxiv.org/abs/1712.00378.
    """
    following = torch.cat((values[1:], last_values[None]))
    steps, columns, final_values = final
    following[steps, columns] = final_values
    return following


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and the value targets that belong to them.

    δ_t = r_t + γ V(s'_t) (1 - terminated_t) - V(s_t) and A_t = δ_t + γ λ A_{t+1}, where the recursion stops at the end
    of an episode, terminated or truncated. The sums are float64.

    Args:
        rewards: [T, N].
        values: V(s_t), [T, N].
        next_values: V(s'_t) of the true successor, [T, N]; see `next_values`.
        terminated: bool [T, N]; no bootstrapping.
        truncated: bool [T, N]; bootstraps.
        gamma: discount γ per environment step.
        gae_lambda: λ.

    Returns:
        advantages [T, N] and returns = advantages + values [T, N], in the values' dtype.

    Source: Schulman et al. 2016, equation 16, https://arxiv.org/abs/1506.02438.
    """
    values64 = values.double()
    bootstrap = (gamma * next_values.double()).masked_fill_(terminated, 0.0)
    advantages = rewards.double() + bootstrap - values64
    decay = (~(terminated | truncated)).double() * (gamma * gae_lambda)
    # A linear recurrence by doubling: after each pass an entry sums over twice as many steps. log2(T) passes over the
    # whole array take a tenth of the time of T passes over its rows.
    span = 1
    while span < len(advantages):
        advantages[:-span].add_(decay[:-span] * advantages[span:])
        decay[:-span] = decay[:-span] * decay[span:]
        span *= 2
    return advantages.to(values.dtype), (advantages + values64).to(values.dtype)
