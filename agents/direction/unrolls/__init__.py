"""Unrolled computations: the protocol that evolution strategies search over, the papers' tasks, gradient baselines."""

from agents.direction.unrolls.baselines import Rtrl, Uoro, rtrl, tbptt, uoro
from agents.direction.unrolls.learning import Classification, LearnedOptimizer, LearningRateDecay
from agents.direction.unrolls.protocol import State, Unroll
from agents.direction.unrolls.toys import InfluenceBalancing, ToyRegression

__all__ = [
    "Classification",
    "InfluenceBalancing",
    "LearnedOptimizer",
    "LearningRateDecay",
    "Rtrl",
    "State",
    "ToyRegression",
    "Unroll",
    "Uoro",
    "rtrl",
    "tbptt",
    "uoro",
]
