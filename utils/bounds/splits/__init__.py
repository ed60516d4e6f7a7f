"""Bounds over parts of a perturbation set, in which some neurons' inputs lie on one side of a point."""

from .cut_pass import CutPass, Narrowed, knot_of
from .cuts import Cuts, Neurons
from .tuning import tune_parts

__all__ = ["CutPass", "Cuts", "Narrowed", "Neurons", "knot_of", "tune_parts"]
