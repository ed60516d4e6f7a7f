"""Parts of a backward pass: how coefficients are added up, and where it ends."""

from .contributions import Contribution, gather, spread
from .sources import FrameSources, JointSources, Sources

__all__ = ["Contribution", "FrameSources", "JointSources", "Sources", "gather", "spread"]
