"""The natural gradient: scores, curvature, the step, and the critic's fits on the same scores."""

from agents.natural.adaptive import AdaptiveCurvature
from agents.natural.curvature import Curvature, Empirical, Expected, Sampled
from agents.natural.kronecker import DiagonalCurvature, EigenKroneckerCurvature, KroneckerCurvature

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

__all__ = ["CURVATURES", "Curvature"]
