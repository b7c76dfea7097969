"""What a solver found for A x = b; on a device, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

Status = Literal["converged", "max_iterations", "indefinite", "non_finite", "zero_rhs"]
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True)
class Solution:
    """What a solver found for A x = b, and how far to trust it."""

    direction: Tensor
    """x, [p]; finite whatever the status, if x0 was."""
    iterations: int
    """Products with A that improved x; 0 of a direct solver."""
    residual: float
    """|b - A x| / |b|; conjugate gradients' by their recurrence, a direct solver's measured."""
    status: Status
    """converged: the residual is within the tolerance. max_iterations: it is not yet. indefinite: a direction with
    curvature at or below zero was met, or a factor does not exist. non_finite: b or a product was not finite; both stop
    before x takes the bad direction. zero_rhs: |b|² = 0, so x = 0."""

    @property
    def converged(self) -> bool:
        """Say whether A x = b holds to the tolerance."""
        return self.status in ("converged", "zero_rhs")


class Unread(Solution):
    """The same where x is on a device, on which the rest stays until somebody reads it and waits.

    Args:
        direction: x, [p].
        numbers: iterations, residual and the place of the status in STATUSES, float64 [3].
    """

    numbers: Tensor

    def __init__(self, direction: Tensor, numbers: Tensor) -> None:
        vars(self).update(direction=direction, numbers=numbers)

    def __getattr__(self, name: str) -> Any:
        if name not in ("iterations", "residual", "status"):
            raise AttributeError(name)
        made, residual, place = self.numbers.tolist()
        vars(self).update(iterations=int(made), residual=residual, status=STATUSES[int(place)])
        return vars(self)[name]
