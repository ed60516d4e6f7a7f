"""What bounds of waveforms have of their own."""

from .narrow import Narrow
from .shared import SharedSquares

__all__ = ["Narrow", "SharedSquares"]
