"""Branch and bound over the phases of piecewise-linear neurons."""

from .search import can_split, split_margins

__all__ = ["can_split", "split_margins"]
