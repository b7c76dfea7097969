"""What a policy is worth: whole episodes on fixed seeds, and their statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from agents.run.statistics import bootstrap_interval, iqm
from envs.vector import VectorEnv

BLOCK = 16
"""Rows per call of act: BLAS rounds a row by the height of its batch, so a fixed height keeps results independent of
how many environments run."""


LONGEST = 100_000
"""Environment steps of an episode, at most: there are environments that end none."""
PATIENCE = 30.0
"""Seconds in which an episode should have ended."""
NEEDS_AN_END = (
    "Episodes need an end, or a time limit, as --env-kwargs max_episode_steps=1000 gives it where Gymnasium makes the "
    "environment."
)


class Acts(Protocol):
    """What evaluation needs of an agent."""

    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one policy; row k is the episode of seed + k.

    Args:
        returns: [E] undiscounted sums of the environment's own reward, float64.
        lengths: [E] environment steps, int64.
        seed: the first episode's seed.
    """

    returns: np.ndarray
    lengths: np.ndarray
    seed: int
    cut: int = 0
    """Episodes that did not end and were left after LONGEST steps."""

    @property
    def episodes(self) -> int:
        return len(self.returns)

    @property
    def steps(self) -> int:
        """Count the environment steps that the evaluation took."""
        return int(self.lengths.sum())

    @property
    def said_of_cut(self) -> str:
        """Say how many episodes did not end; "" if all did."""
        said = f"{self.cut} of {self.episodes} episodes of an evaluation were left after {LONGEST:,} steps"
        return said if self.cut else ""

    @property
    def mean(self) -> float:
        return float(self.returns.mean())

    @cached_property
    def iqm(self) -> float:
        """Return the interquartile mean: without the lowest and highest quarter (Agarwal et al. 2021, section 4.3)."""
        return float(iqm(self.returns))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Return `bootstrap_interval` of the returns."""
        return bootstrap_interval(self.returns)


def waiting(say: Callable[[str], object]) -> Callable[[bool], None]:
    """Give a tick of `evaluate` that says once where no episode ends."""
    began, some_ended = time.monotonic(), False

    def tick(ended: bool) -> None:
        nonlocal some_ended
        some_ended |= ended
        if not some_ended and time.monotonic() - began > PATIENCE:
            some_ended = True
            say(f"no episode of an evaluation has ended in {PATIENCE:g} seconds; Ctrl-C stops it")

    return tick


def evaluate(
    agent: Acts,
    env: VectorEnv,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    tick: Callable[[bool], None] = lambda ended: None,
) -> Evaluation:
    """Run one episode for each seed, seed + 1, ... with the agent as it is; acting changes nothing in it.

    Environment i runs episodes i, i + N, i + 2 N, ... (N: num_envs), so quick episodes are not preferred. With
    deterministic actions the result does not depend on N; sampled actions come from the agent's one stream, which N
    interleaves.

    Args:
        env: with autoreset disabled; its reward is taken as it is.
        episodes: E, at least 1.
        tick: called after each step of the environments, with whether an episode ended; it may raise.

    Raises:
        ValueError: episodes < 1, or an environment that resets itself.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; evaluate at least 1.")
    if env.autoreset is not AutoresetMode.DISABLED:
        raise ValueError("evaluation resets episodes itself; make the environment with autoreset='disabled'.")
    returns = np.zeros(episodes)
    lengths = np.zeros(episodes, dtype=np.int64)
    live = np.arange(min(env.num_envs, episodes))
    episode = live.copy()  # the episode that each live environment is in
    observation = env.reset(seed=(seed + episode).tolist(), ids=live)[0].clone()
    cut, count = 0, 0
    while len(live):
        count += 1
        step = env.step(_act(agent, observation, deterministic), ids=live)
        observation, reward, terminated, truncated = (value.clone() for value in step[:4])
        returns[episode] += reward.cpu().numpy()
        lengths[episode] += 1
        ended = (terminated | truncated).cpu().numpy()
        if count >= LONGEST:  # no episode is longer than all that was stepped
            left = ~ended & (lengths[episode] >= LONGEST)
            cut, ended = cut + int(left.sum()), ended | left
        tick(bool(ended.any()))
        if not ended.any():
            continue
        episode = np.where(ended, episode + env.num_envs, episode)
        restarted = ended & (episode < episodes)
        if restarted.any():
            fresh, _ = env.reset(seed=(seed + episode[restarted]).tolist(), ids=live[restarted])
            observation[torch.as_tensor(restarted, device=observation.device)] = fresh
        keep = episode < episodes
        observation = observation[torch.as_tensor(keep, device=observation.device)]
        live, episode = live[keep], episode[keep]
    return Evaluation(returns, lengths, seed, cut)


def _act(agent: Acts, observation: Tensor, deterministic: bool) -> Tensor:
    """Return actions [n, *A] for observation [n, *O], in blocks of BLOCK rows, the last one filled with zeros."""
    n = len(observation)
    padded = observation.new_zeros(-(-n // BLOCK) * BLOCK, *observation.shape[1:])
    padded[:n] = observation
    return torch.cat([agent.act(block, deterministic=deterministic).clone() for block in padded.split(BLOCK)])[:n]
