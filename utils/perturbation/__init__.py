"""Where the input may lie: sets of sequences, and how coefficients, projections and random points meet them."""

from .balls import Ball
from .cut_balls import CutBalls
from .lp_ball import INF, NORMS, dual_norm
from .moves import FrameBalls
from .sets import InputSet, Perturbation, clip_of

__all__ = ["INF", "NORMS", "Ball", "CutBalls", "FrameBalls", "InputSet", "Perturbation", "clip_of", "dual_norm"]
