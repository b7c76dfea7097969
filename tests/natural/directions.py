"""Curvatures and critic fits with their options given one by one, as the tests of this folder ask for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from agents.natural import CURVATURES
from agents.natural.critic_fits import FitStatistics, GaussNewton
from agents.natural.curvature import NaturalGradient
from agents.natural.kronecker import PRECONDITIONERS
from agents.natural.scores import Scores


def natural_gradient(
    scores: Scores,
    advantages: Tensor,
    *,
    damping: float,
    cg_iterations: int = 10,
    cg_tolerance: float = 1e-3,
    rows: Tensor | None = None,
    solver: str = "cg",
    cg_preconditioner: str = "none",
    x0: Tensor | None = None,
    estimate: str = "compatible",
) -> NaturalGradient:
    """Give the direction of a new curvature."""
    options = {
        "cg_damping": damping,
        "solver": solver,
        "cg_max_steps": cg_iterations,
        "cg_tolerance": cg_tolerance,
        "cg_warm_start": x0 is not None,
        "curvature_memory": 0.0,
    }
    curvature: Any = CURVATURES[estimate](SimpleNamespace(**options), PRECONDITIONERS[cg_preconditioner])
    if x0 is not None:
        curvature.load({"last_direction": x0})
    return curvature.direction(scores, advantages, rows)


def gauss_newton(
    critic: Any,
    observations: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    cg_preconditioner: str = "none",
    **options: Any,
) -> FitStatistics:
    """Fit a critic by Gauss-Newton steps, to targets in reward units."""
    fit = GaussNewton(**options, precondition=PRECONDITIONERS[cg_preconditioner])
    z = ((targets.double() - critic.scale.mean) / critic.scale.std).to(targets.dtype)
    return fit.fit(critic, observations, z, rows)
