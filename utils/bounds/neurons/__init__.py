"""Bounds of the neurons that relaxations need bounds of, by rows of backward passes."""

from .tighten import is_exact_image, readers, tightened

__all__ = ["is_exact_image", "readers", "tightened"]
