"""Made natural-gradient problems: a policy, observations, actions and advantages; and their direction."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.natural.curvature import Sampled, Solution
from agents.natural.kronecker import PRECONDITIONERS
from agents.natural.scores import Scores
from agents.policy.distributions import Head
from agents.policy.networks import Actor, mlp

SIZES = {"Hopper-v5": (11, 3), "HalfCheetah-v5": (17, 6), "Ant-v5": (105, 8)}
"""Task -> lengths of an observation and an action."""
DAMPING = 0.1
"""In units of the Fisher matrix's mean eigenvalue."""


class Problem:
    """A policy with outputs of size 1, standard normal observations, its own actions; advantages depend on both."""

    def __init__(self, task: str, n: int, hidden: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        observation_size, action_size = SIZES[task]
        head = Head.of(spaces.Box(-1, 1, (action_size,), np.float32))
        net = mlp(observation_size, hidden, head.outputs, "tanh", 1.0)
        self.actor = Actor(head, net, log_std_init=-0.5)
        nn.init.orthogonal_(self.actor.net[-1].weight)
        self.actor.to(dtype)
        self.s = torch.randn(n, observation_size).to(dtype)
        with torch.no_grad():
            policy = self.actor(self.s)
            self.a = policy.sample(torch.randn(n, action_size).to(dtype))
            A = ((self.a - policy.mean) * self.s[:, :action_size]).sum(1) + torch.randn(n).to(dtype)
        self.A = (A - A.mean()) / A.std()

    def log_prob(self) -> Tensor:
        return self.actor(self.s).log_prob(self.a)


def solve(
    scores: Scores,
    A: Tensor,
    *,
    solver: str = "cg",
    cg_max_steps: int = 1,
    cg_tolerance: float = 0.0,
    cg_preconditioner: str = "none",
) -> Solution:
    """Solve (F + λ I) w = Ψᵀ A / n with F = Ψᵀ Ψ / n and the λ of DAMPING."""
    options = {"cg_damping": DAMPING, "solver": solver, "cg_max_steps": cg_max_steps, "cg_tolerance": cg_tolerance}
    curvature = Sampled(SimpleNamespace(**options, cg_warm_start=False), PRECONDITIONERS[cg_preconditioner])
    return curvature.direction(scores, A).solution
