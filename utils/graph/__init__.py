"""A network as nodes: values, intervals and how coefficients pass back through them."""

from .graph import Graph
from .nodes import Bounds, Constant, Frame, Interval, LastState, Linear, Negative, Node, Slice, WeightedSum
from .nonlinear import Activation, NonLinear, Product

__all__ = [
    "Activation",
    "Bounds",
    "Constant",
    "Frame",
    "Graph",
    "Interval",
    "LastState",
    "Linear",
    "Negative",
    "Node",
    "NonLinear",
    "Product",
    "Slice",
    "WeightedSum",
]
