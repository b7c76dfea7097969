"""The solvers of `agents.natural.curvature` for a device: they ask it for nothing, and the host runs on.

Iterations are of a fixed number and change nothing once they are over; what came of them stays on the device. Otherwise
the operations, and so the numbers, are those of the CPU's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from agents.natural.solution import STATUSES, Unread

CONVERGED, MAX_ITERATIONS, INDEFINITE, NON_FINITE, ZERO_RHS = map(float, range(len(STATUSES)))

KL_TOLERANCE = 0.05
"""Relative error of an update's KL that is left as it is."""
MOST_GROWTH = 16.0
"""Longest step, in units of the one that the quadratic model gives."""
TRIES = 4
"""Steps that are tried for a KL, without looking: two are what is needed as a rule, and three now and then."""

Product = Callable[[Tensor], Tensor]


def conjugate_gradient(
    matvec: Product,
    b: Tensor,
    *,
    max_iterations: int,
    tolerance: float,
    x0: Tensor | None,
    preconditioner: Product | None,
    remembered: int,
) -> Unread:
    """Do as `agents.natural.curvature.conjugate_gradient`, with all iterations: those past the end are void."""
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - matvec(x0)
    z = r if preconditioner is None else preconditioner(r)
    d = z.clone()
    size, rest, inner = b @ b, r @ r, r @ z
    finite, zero = size.isfinite() & rest.isfinite() & inner.isfinite(), size == 0
    status = torch.where(finite, ZERO_RHS, NON_FINITE).double()
    goes, made = finite & ~zero, torch.zeros_like(status)
    kept = min(max_iterations - 1, remembered)
    residuals = b.new_zeros(kept, len(b))
    duals = residuals if preconditioner is None else torch.zeros_like(residuals)
    for iteration in range(max_iterations):
        done = goes & (rest.double() <= tolerance**2 * size.double())
        status, goes = torch.where(done, CONVERGED, status), goes & ~done
        if iteration < kept:
            torch.div(r, inner.sqrt(), out=residuals[iteration])
            torch.div(z, inner.sqrt(), out=duals[iteration])
        product = matvec(d)
        curvature = d @ product
        step = inner / curvature
        new_r = r.addcmul(product, -step)
        if 0 < iteration < max_iterations - 1:
            seen = min(iteration + 1, kept)
            for _ in range(2):
                new_r.addmv_(residuals[:seen].T, duals[:seen] @ new_r, alpha=-1)
        z = new_r if preconditioner is None else preconditioner(new_r)
        following, new_rest = new_r @ z, new_r @ new_r
        bent = curvature.isfinite() & (curvature <= 0)
        lost = ~(curvature.isfinite() & new_rest.isfinite() & following.isfinite())
        status = torch.where(goes & bent, INDEFINITE, torch.where(goes & lost, NON_FINITE, status))
        goes = goes & ~bent & ~lost
        x = torch.where(goes, x.addcmul(d, step), x)
        d = torch.where(goes, d.mul(following / inner).add_(z), d)
        r, inner, rest = (
            torch.where(goes, new, old) for new, old in ((new_r, r), (following, inner), (new_rest, rest))
        )
        made = made + goes
    end = torch.where(rest.double() <= tolerance**2 * size.double(), CONVERGED, MAX_ITERATIONS)
    residual = torch.where(finite, torch.where(zero, 0.0, (rest.double() / size.double()).sqrt()), math.nan)
    x = torch.where(finite & zero, 0.0, x)
    return Unread(x, torch.stack((made, residual, torch.where(goes, end.double(), status))))


def match_kl(kl_at: Callable[[Tensor], Tensor], quadratic: Tensor, target: float) -> Tensor:
    """Do as `agents.natural.step.match_kl` from the step of wᵀ F w, but with `TRIES` steps at most; gives β, or 0.

    Args:
        kl_at: takes the step β and measures its mean KL divergence, both float64 of shape ().
    """
    first = beta = (2 * target / quadratic.double()).sqrt()
    none, far, done = torch.zeros_like(beta), torch.full_like(beta, math.inf), torch.zeros_like(beta, dtype=torch.bool)
    taken, kl, short, long, kl_short = none, far, none, far, none
    for _ in range(TRIES):
        last, found = (taken, kl), kl_at(beta)
        taken, kl = torch.where(done, taken, beta), torch.where(done, kl, found)
        done = done | ((kl / target - 1).abs() <= KL_TOLERANCE)
        exponent = ((kl / last[1]).log() / (taken / last[0]).log()).clamp(1.0, 4.0)  # KL ∝ β^power
        power = torch.where((last[1] > 0) & last[1].isfinite(), exponent, 2.0)
        otherwise = torch.where(kl <= 0, 2.0, 0.5)
        factor = torch.where((kl > 0) & kl.isfinite(), ((target / kl) ** (1 / power)).clamp(max=2.0), otherwise)
        beta, below = torch.minimum(taken * factor, MOST_GROWTH * first), kl < target
        kl_short = torch.where(below & (taken > short), kl, kl_short)
        short, long = torch.where(below, short.maximum(taken), short), torch.where(below, long, long.minimum(taken))
        outside = ~((short < beta) & (beta < long)) & (short > 0) & long.isfinite()
        beta = torch.where(outside, (short * long).sqrt(), beta)
        done = done | (beta == taken)
    near = kl <= 2 * target
    taken, kl = torch.where(near, taken, short), torch.where(near, kl, kl_short)
    return torch.where(kl > 0, taken, 0.0)


def checked(x: Tensor, matvec: Product, b: Tensor, tolerance: float, definite: Tensor | bool) -> Unread:
    """Do as `agents.natural.curvature.checked`."""
    size, rest = b @ b, (b - matvec(x)).square().sum()
    zero, finite = size == 0, size.isfinite()
    void = torch.zeros_like(zero) if definite is True else finite & ~definite
    lost = ~(finite & rest.isfinite())
    residual = (rest.double() / size.double()).sqrt()
    status = torch.where(residual <= tolerance, CONVERGED, MAX_ITERATIONS)
    for case, place, value in ((lost, NON_FINITE, math.nan), (void, INDEFINITE, 1.0), (zero, ZERO_RHS, 0.0)):
        status, residual = torch.where(case, place, status), torch.where(case, value, residual)
    x = torch.where(zero | void | lost, 0.0, x)
    return Unread(x, torch.stack((torch.zeros_like(residual), residual, status.double())))
