"""Weights that move: balls of parameters, shared by all places where they act, and what is certified over them."""

from .attack import attack_weights
from .balls import WeightBalls
from .passes import WeightPass
from .problem import (
    MovedWeights,
    WeightProblem,
    Weights,
    certified_weight_margin,
    certified_weight_radius,
    weight_problem,
)

__all__ = [
    "MovedWeights",
    "WeightBalls",
    "WeightPass",
    "WeightProblem",
    "Weights",
    "attack_weights",
    "certified_weight_margin",
    "certified_weight_radius",
    "weight_problem",
]
