"""Weighted sums of squares over a set: their greatest eigenvalues, over balls and over boxes."""

from .box_quadratic import line_and_squares_over_box, squares_over_box
from .eigenvalues import eigenvalue_bound, spectral_norm
from .quadratic import Guesses, largest_eigenvalue, line_and_squares

__all__ = [
    "Guesses",
    "eigenvalue_bound",
    "largest_eigenvalue",
    "line_and_squares",
    "line_and_squares_over_box",
    "spectral_norm",
    "squares_over_box",
]
