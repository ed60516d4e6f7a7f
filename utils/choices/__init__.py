"""What can be chosen, by name: methods, relaxations, balls and attacks. Imports nothing heavy: --help needs it."""

from .method import ALPHA_STEPS, CURVE_STEPS, TIME_LIMIT, Method
from .registry import Registry
from .tables import ATTACKS, BALLS, METHODS, RELAXATIONS

__all__ = [
    "ALPHA_STEPS",
    "ATTACKS",
    "BALLS",
    "CURVE_STEPS",
    "METHODS",
    "RELAXATIONS",
    "TIME_LIMIT",
    "Method",
    "Registry",
]
