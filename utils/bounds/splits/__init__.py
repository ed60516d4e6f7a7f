"""Bounds over parts of a perturbation set, in which some neurons' inputs lie on one side of a point."""

from .cut_pass import CutPass, Narrowed, knot_of
from .cuts import Cuts, Neurons
from .tuning import raise_linear, tune_parts

__all__ = ["CutPass", "Cuts", "Narrowed", "Neurons", "knot_of", "raise_linear", "tune_parts"]
