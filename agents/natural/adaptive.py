"""The adaptive natural gradient: a running inverse of the Fisher matrix that each update changes a little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agents import noise
from agents.devices import sent
from agents.natural.curvature import Curvature, Precondition
from agents.natural.scores import Scores
from agents.natural.solution import Solution, Status

RATE = 0.1
"""ε: the weight of an update's samples in the running matrix."""
ROWS = 64
"""Samples, drawn anew for each update, that the running inverse takes in; its damping takes as many rows."""


class AdaptiveInverse:
    """A running inverse B of G, where each update makes G into (1 - ε) G + ε F, F from a batch's rows.

    Exact, for F = Rᵀ R with k rows R: B ← [B - B Rᵀ ((1 - ε) / ε I + R B Rᵀ)⁻¹ R B] / (1 - ε), positive definite for
    every ε below 1. First order in ε: B ← (1 + ε) B - ε (R B)ᵀ (R B), positive definite only while ε times the largest
    eigenvalue of R B Rᵀ is below 1 + ε: an update that would go beyond is refused and B stays.

    Args:
        inverse: B, [p, p]; kept and changed in place.
        first_order: which form.

    Source: Amari, Park & Fukumizu 2000, "Adaptive method of realizing natural gradient learning for multilayer
    perceptrons" (first order, one sample at a time); the exact form is Woodbury's identity.
    """

    def __init__(self, inverse: Tensor, *, first_order: bool = False) -> None:
        self.inverse = inverse
        self.first_order = first_order

    def update(self, rows: Tensor, rate: float) -> bool:
        """Take rows R [k, p] in with the rate ε in (0, 1); False if that was refused."""
        projected = rows @ self.inverse
        inner = projected @ rows.T
        if not inner.isfinite().all():
            return False
        if self.first_order:
            if rate * torch.linalg.eigvalsh(inner)[-1] >= 1 + rate:
                return False
            self.inverse.mul_(1 + rate).addmm_(projected.T, projected, alpha=-rate)
            return True
        inner.diagonal().add_((1 - rate) / rate)
        factor, info = torch.linalg.cholesky_ex(inner)
        if info != 0:
            return False
        half = torch.linalg.solve_triangular(factor, projected, upper=False)
        self.inverse.addmm_(half.T, half, alpha=-1).div_(1 - rate)
        # What rounding makes asymmetric would grow by 1 / (1 - ε) in each update.
        self.inverse.copy_((self.inverse + self.inverse.T) / 2)
        return True

    def solve(self, b: Tensor) -> Tensor:
        """Solve: b [p] to G⁻¹ b [p]."""
        return self.inverse @ b


def damping_rows(p: int, shift: float, places: Tensor) -> Tensor:
    """Give rows R [k, p] whose Rᵀ R is λ I on average over uniform places, int64 [k], of the diagonal."""
    rows = torch.zeros(len(places), p, device=places.device)
    rows[torch.arange(len(places), device=places.device), places] = math.sqrt(shift * p / len(places))
    return rows


class AdaptiveCurvature(Curvature):
    """Curvature by an `AdaptiveInverse`, which takes some of each update's samples in, and as many rows of damping."""

    def __init__(self, c: Any, precondition: Precondition | None = None, seed: int = 0) -> None:
        super().__init__(c, precondition, seed)
        self.running: AdaptiveInverse | None = None
        self.updates = 0

    def solve(self, fisher: Scores, shift: Tensor, gradient: Tensor) -> Solution:
        taken = self._take_in(fisher, shift.item())
        self.updates += 1
        if not taken or self.running is None:
            return Solution(torch.zeros_like(gradient), 0, math.nan, "indefinite")
        w = self.running.solve(gradient)
        # No product with G is at hand, so no residual is measured.
        size, finite = (gradient @ gradient).item(), bool(w.isfinite().all())
        status: Status = "zero_rhs" if size == 0 else "converged" if finite and math.isfinite(size) else "non_finite"
        return Solution(w if status == "converged" else torch.zeros_like(w), 0, math.nan, status)

    def _take_in(self, Psi: Scores, shift: float) -> bool:
        """Update the inverse by some of Ψ's rows and of the damping's; False if that would go indefinite."""
        p, key = Psi.p, (self.seed, "fisher", self.updates)
        some = Psi.of(sent(noise.permutation(*key, Psi.n)[:ROWS], Psi.device))
        if not math.isfinite(shift):
            return False
        if self.running is None:
            # G begins as the mean eigenvalue everywhere.
            self.running = AdaptiveInverse(torch.eye(p, dtype=Psi.dtype, device=Psi.device) * (p / Psi.trace()))
        places = sent(noise.permutation(*key, p, 1)[:ROWS], Psi.device)
        damping = damping_rows(p, shift, places).to(Psi.dtype)
        return self.running.update(torch.cat((some.dense() / some.n**0.5, damping)), RATE)

    def tensors(self) -> dict[str, Tensor]:
        held = {"updates": torch.tensor(self.updates)}
        return held if self.running is None else {**held, "inverse": self.running.inverse}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.updates = int(tensors.get("updates", torch.tensor(0)))
        if "inverse" in tensors:
            self.running = AdaptiveInverse(tensors["inverse"].clone())
