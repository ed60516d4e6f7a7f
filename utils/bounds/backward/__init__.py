"""Parts of a backward pass: how coefficients are added up, and where it ends."""

from .contributions import Contribution, gather, spread
from .sources import FrameSources, Sources

__all__ = ["Contribution", "FrameSources", "Sources", "gather", "spread"]
