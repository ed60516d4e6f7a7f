"""Weights that move: balls of parameters, shared by all places where they act, and what is certified over them."""

from .attack import attack_weights, attacked_radius
from .balls import WeightBalls
from .fixed_point import certified_bits, rounded
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
    "attacked_radius",
    "certified_bits",
    "certified_weight_margin",
    "certified_weight_radius",
    "rounded",
    "weight_problem",
]
