"""The natural gradient: scores, curvature, the step, and the critic's fits on the same scores."""

from typing import Any

from agents.natural.adaptive import AdaptiveCurvature
from agents.natural.critic_fits import CRITIC_FITS, CriticFit, CriticFitConfig
from agents.natural.curvature import (
    MATRIX_BYTES,
    Curvature,
    CurvatureConfig,
    Empirical,
    Expected,
    Sampled,
    check_solver,
)
from agents.natural.kronecker import (
    PRECONDITIONERS,
    DiagonalCurvature,
    EigenKroneckerCurvature,
    KroneckerCurvature,
)
from agents.natural.scores import is_factored

__all__ = ["CURVATURES", "Curvature", "check_size", "is_steady", "make_curvature", "make_natural"]

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


def make_natural(c: CriticFitConfig, policy: Any, seed: int) -> tuple[Curvature, CriticFit]:
    """Make the curvature of a policy's actor and the fit of its critic; see `make_curvature`."""
    curvature = make_curvature(c, policy.actor, seed)
    return curvature, CRITIC_FITS[c.critic](c, policy.critic, curvature.precondition, seed)


def is_steady(c: CriticFitConfig, remembers: bool = True) -> bool:
    """Say whether updates do the same work on the same memory each time, so that a device can be told it only once;
    remembers: whether factors of K-FAC, if any, are remembered unless curvature_memory says otherwise.
    """
    own_factors = c.fisher in ("kfac", "ekfac") and not (
        remembers if c.curvature_memory is None else c.curvature_memory
    )
    asks = c.fisher == "adaptive" or own_factors or c.cg_preconditioner in ("kfac", "ekfac") or c.cg_warm_start
    return c.critic == "gauss_newton" and not asks


def check_size(c: CurvatureConfig, actor: Any, num_envs: int) -> None:
    """Raise ValueError where the solver's matrix for the rollouts of so many environments is too large."""
    n, p = c.n_steps * num_envs, sum(x.numel() for x in actor.parameters())
    check_solver(c.solver, min(c.curvature_samples or n, n), p)
