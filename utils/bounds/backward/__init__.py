"""Parts of a backward pass: how coefficients are added up, the planes it goes through, and where it ends."""

from .contributions import Contribution, gather, spread
from .sources import FrameSources, JointSources, Sources
from .together import alike, relaxed

__all__ = ["Contribution", "FrameSources", "JointSources", "Sources", "alike", "gather", "relaxed", "spread"]
