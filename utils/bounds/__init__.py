"""Passes over a graph: intervals, backward bounds, tuned slopes, curved bounds."""

from .alpha import tune_slopes
from .curve import CurvedPass
from .curve_tuning import tune_curves
from .passes import BoundPass

__all__ = ["BoundPass", "CurvedPass", "tune_curves", "tune_slopes"]
