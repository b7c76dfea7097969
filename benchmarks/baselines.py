"""Gradients of differentiable unrolls, one particle at a time: TBPTT, RTRL and UORO.

Each takes parameters θ [P] and what it carried over from the window before, and returns the gradient [P] of the
window's score, the score, and what to carry on. θ may change between windows; what is carried then holds old θ's
effect, as it does in the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from agents import noise
from agents.evolution.unroll import State, Unroll

NORM_FLOOR = 1e-7
"""Added to UORO's norms, which start at zero (the paper's value)."""


def tbptt(task: Unroll, theta: Tensor, state: State, window: int) -> tuple[Tensor, Tensor, State]:
    """Backpropagate through one window, truncated at its beginning: biased.

    Args:
        state: of one particle, from task.init or the window before.
    """
    with torch.enable_grad():
        rows = theta.detach()[None].requires_grad_()
        state, score, _ = task.unroll(rows, state, window)
        (gradient,) = torch.autograd.grad(score.sum(), rows)
    return gradient[0], score.detach()[0], {name: value.detach() for name, value in state.items()}


@dataclass(frozen=True)
class Rtrl:
    """What RTRL carries: the state of one particle and its derivative after each parameter, [P, S]."""

    state: State
    jacobian: Tensor

    @classmethod
    def start(cls, state: State, theta: Tensor) -> Rtrl:
        return cls(state, theta.new_zeros(len(theta), len(_floats(state))))


def rtrl(task: Unroll, theta: Tensor, carried: Rtrl, window: int) -> tuple[Tensor, Tensor, Rtrl]:
    """Differentiate in forward mode and never truncate: unbiased at fixed θ, and P times the cost of the unroll.

    Source: Williams & Zipser 1989, https://doi.org/10.1162/neco.1989.1.2.270.
    """
    advance = _as_function(task, carried.state, window)
    point = (theta, _floats(carried.state))
    directions = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    jacobian, gradient = vmap(lambda t, s: jvp(advance, point, (t, s))[1])(directions, carried.jacobian)
    state, score, _ = task.unroll(theta[None], carried.state, window)
    return gradient, score[0], Rtrl(state, jacobian)


@dataclass(frozen=True)
class Uoro:
    """What UORO carries: the state of one particle, and vectors [S] and [P] whose product is, in the mean, RTRL's."""

    state: State
    toward_state: Tensor
    toward_theta: Tensor
    windows: int = 0

    @classmethod
    def start(cls, state: State, theta: Tensor) -> Uoro:
        return cls(state, torch.zeros_like(_floats(state)), torch.zeros_like(theta))


def uoro(task: Unroll, theta: Tensor, carried: Uoro, window: int, seed: int) -> tuple[Tensor, Tensor, Uoro]:
    """Approximate RTRL with a random rank-one derivative of the state: unbiased at fixed θ, noisy.

    Source: Tallec & Ollivier 2018, algorithm 1, https://arxiv.org/abs/1702.05043.
    """
    advance = _as_function(task, carried.state, window)
    floats = _floats(carried.state)
    (_, score), pull = vjp(advance, theta, floats)[:2]
    along_theta, along_floats = pull((torch.zeros_like(floats), torch.ones_like(score)))
    gradient = along_theta + (along_floats @ carried.toward_state) * carried.toward_theta

    draw = noise.normal(seed, "uoro", carried.windows, (1, 1, len(floats)), torch.float64).flatten()
    signs = draw.sign().to(floats)
    forward, _ = jvp(advance, (theta, floats), (torch.zeros_like(theta), carried.toward_state))[1]
    backward, _ = pull((signs, torch.zeros_like(score)))
    past = ((carried.toward_theta.norm() + NORM_FLOOR) / (forward.norm() + NORM_FLOOR)).sqrt() + NORM_FLOOR
    new = ((backward.norm() + NORM_FLOOR) / (signs.norm() + NORM_FLOOR)).sqrt() + NORM_FLOOR
    state, _, _ = task.unroll(theta[None], carried.state, window)
    toward_state = past * forward + new * signs
    toward_theta = carried.toward_theta / past + backward / new
    return gradient, score, Uoro(state, toward_state, toward_theta, carried.windows + 1)


def _floats(state: State) -> Tensor:
    """Return what can be differentiated of one particle's state, as one vector [S]."""
    return torch.cat([value[0].flatten() for value in state.values() if value.is_floating_point()])


def _as_function(task: Unroll, state: State, window: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the window as a function of (θ [P], floats [S]) that returns the floats after it and the score."""

    def advance(theta: Tensor, floats: Tensor) -> tuple[Tensor, Tensor]:
        filled, start = dict(state), 0
        for name, value in state.items():
            if value.is_floating_point():
                filled[name] = floats[start : start + value.numel()].view_as(value)
                start += value.numel()
        after, score, _ = task.unroll(theta[None], filled, window)
        return _floats(after), score[0]

    return advance
