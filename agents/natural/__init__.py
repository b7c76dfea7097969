"""The natural gradient: scores, curvature, the step, and the critic's fits on the same scores."""

from typing import Any

from agents.natural.adaptive import AdaptiveCurvature
from agents.natural.curvature import MATRIX_BYTES, Curvature, CurvatureConfig, Empirical, Expected, Sampled
from agents.natural.kronecker import (
    PRECONDITIONERS,
    DiagonalCurvature,
    EigenKroneckerCurvature,
    KroneckerCurvature,
)
from agents.natural.scores import is_factored

__all__ = ["CURVATURES", "Curvature", "make_curvature"]

CURVATURES: dict[str, type[Curvature]] = {
    "compatible": Sampled,
    "analytic": Expected,
    "kfac": KroneckerCurvature,
    "ekfac": EigenKroneckerCurvature,
    "diagonal": DiagonalCurvature,
    "empirical": Empirical,
    "adaptive": AdaptiveCurvature,
}
"""How the Fisher matrix is estimated, by name."""


def make_curvature(c: CurvatureConfig, actor: Any, seed: int) -> Curvature:
    """Make what a configuration says, for an actor.

    Raises:
        ValueError: it needs factored scores, and the actor has layers that do not factor; or its matrix is too large.
    """
    if not is_factored(actor):
        net, fits = type(actor.net).__name__, [x for x in CURVATURES if x not in ("analytic", "kfac", "ekfac")]
        if c.fisher not in fits:
            raise ValueError(
                f"fisher is {c.fisher!r}, but {net} has layers whose scores are no outer products; give one of "
                f"{', '.join(fits)}."
            )
        if c.cg_preconditioner in ("kfac", "ekfac"):
            raise ValueError(
                f"cg_preconditioner is {c.cg_preconditioner!r}, but the policy has layers whose scores are no outer "
                "products; give none, diagonal or gram."
            )
    p = sum(x.numel() for x in actor.parameters())
    if c.fisher == "adaptive" and 4 * p * p > MATRIX_BYTES:
        raise ValueError(
            f"fisher is 'adaptive', whose inverse for p = {p} parameters takes {4 * p * p / 2**30:.1f} GiB of at most "
            f"{MATRIX_BYTES / 2**30:.0f}; give one of {', '.join(x for x in CURVATURES if x != 'adaptive')}."
        )
    return CURVATURES[c.fisher](c, PRECONDITIONERS[c.cg_preconditioner], seed)
