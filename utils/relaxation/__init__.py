"""One non-linearity over a box: lines and planes with exact intercepts, and curved bounds."""

from . import half_lines  # noqa: F401 - its entries in the tables
from .curves import CURVED, CurvedFunction, Curves, curved_relaxation, smooth_curves
from .lines import ACTIVATIONS, Activation, Plane, Relaxation
from .more_lines import relax_convex
from .planes import PRODUCTS, relax_product
from .shapes import SHAPES, Shape
from .squares import relax_square

__all__ = [
    "ACTIVATIONS",
    "CURVED",
    "PRODUCTS",
    "SHAPES",
    "Activation",
    "CurvedFunction",
    "Curves",
    "Plane",
    "Relaxation",
    "Shape",
    "curved_relaxation",
    "relax_convex",
    "relax_product",
    "relax_square",
    "smooth_curves",
]
