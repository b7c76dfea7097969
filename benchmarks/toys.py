"""The two toy tasks of Vicol, Metz & Sohl-Dickstein 2021, https://arxiv.org/abs/2112.13835. Both are differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from agents.evolution.unroll import State


class InfluenceBalancing:
    """A linear system whose parameter's short-term effect has the wrong sign; P = 1, no end.

    s' = A s + θ v with 1/2 on the diagonal and superdiagonal of A [size, size] and signs v, of which the first
    `positives` are +1; s₀ = 1. A window scores -(s[0] - 1)²/2 at its last step.

    Source: Tallec & Ollivier 2018, "Unbiased online recurrent optimization", https://arxiv.org/abs/1702.05043.
    """

    def __init__(self, size: int = 23, positives: int = 10, dtype: torch.dtype = torch.float64) -> None:
        self.size, self.positives, self.dtype = size, positives, dtype

    def init(self, keys: Tensor, slots: Tensor) -> State:
        s = torch.ones(len(keys), self.size, dtype=self.dtype, device=keys.device)
        return {"s": s, "steps": torch.zeros_like(keys)}

    def unroll(self, theta: Tensor, state: State, window: int) -> tuple[State, Tensor, Tensor]:
        s = state["s"]
        push = torch.cat((theta.expand(-1, self.positives), -theta.expand(-1, self.size - self.positives)), 1)
        for _ in range(window):
            # Row by row, unlike a matrix product, whose rounding depends on how many rows there are.
            s = 0.5 * (s + torch.cat((s[:, 1:], torch.zeros_like(s[:, :1])), 1)) + push
        ended = torch.zeros(len(s), dtype=torch.bool, device=s.device)
        return {"s": s, "steps": state["steps"] + window}, -0.5 * (s[:, 0] - 1).square(), ended


class ToyRegression:
    """Tune the learning rates of gradient descent in two dimensions; P = 2, an episode has `horizon` steps.

    Descent on f(x) = sqrt(x₀² + 5) - sqrt(5) + sin²(x₁) exp(-5 x₀²) + |x₁ - 100|/4 from (1, 1), with the learning rate
    (1 - t/T) exp(θ₀) + (t/T) exp(θ₁). A window scores minus the sum of f after each of its steps.
    """

    def __init__(self, horizon: int = 100, dtype: torch.dtype = torch.float64) -> None:
        self.horizon, self.dtype = horizon, dtype

    def init(self, keys: Tensor, slots: Tensor) -> State:
        x = torch.ones(len(keys), 2, dtype=self.dtype, device=keys.device)
        return {"x": x, "steps": torch.zeros_like(keys)}

    def unroll(self, theta: Tensor, state: State, window: int) -> tuple[State, Tensor, Tensor]:
        x, steps = state["x"], state["steps"]
        first, last = theta.exp().unbind(1)
        score = torch.zeros_like(x[:, 0])
        for _ in range(window):
            done = steps / self.horizon
            rate = (1 - done) * first + done * last
            x = x - rate[:, None] * self._gradient(x)
            score = score - self._loss(x)
            steps = steps + 1
        return {"x": x, "steps": steps}, score, steps >= self.horizon

    @staticmethod
    def _loss(x: Tensor) -> Tensor:
        x0, x1 = x.unbind(1)
        bowl = (x0.square() + 5).sqrt() - 5**0.5
        return bowl + x1.sin().square() * (-5 * x0.square()).exp() + 0.25 * (x1 - 100).abs()

    @staticmethod
    def _gradient(x: Tensor) -> Tensor:
        x0, x1 = x.unbind(1)
        ripple = (-5 * x0.square()).exp()
        along_x0 = x0 / (x0.square() + 5).sqrt() - 10 * x0 * x1.sin().square() * ripple
        along_x1 = (2 * x1).sin() * ripple + 0.25 * (x1 - 100).sign()
        return torch.stack((along_x0, along_x1), 1)
