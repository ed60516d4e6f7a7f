"""Bounds of whatever a module returns, and radii within which it stays in a band."""

from .band import band_radius
from .bounds import OutputBounds, output_bounds

__all__ = ["OutputBounds", "band_radius", "output_bounds"]
