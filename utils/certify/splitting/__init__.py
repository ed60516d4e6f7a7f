"""Branch and bound over the phases of piecewise-linear neurons."""

from .margins import can_split, split_margins
from .question import SplitQuestion, few_change_sides, has_pieces
from .radii import raise_radius
from .search import split_rows

__all__ = [
    "SplitQuestion",
    "can_split",
    "few_change_sides",
    "has_pieces",
    "raise_radius",
    "split_margins",
    "split_rows",
]
