"""A network as nodes: values, intervals and how coefficients pass back through them."""

from .graph import Graph
from .mix import GateSum, weighted_sum
from .nodes import Bounds, Constant, Frame, Interval, Linear, Node, WeightedSum
from .nonlinear import Activation, NonLinear, Product
from .picks import Concat, LastState, Negative, Slice

__all__ = [
    "Activation",
    "Bounds",
    "Concat",
    "Constant",
    "Frame",
    "GateSum",
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
    "weighted_sum",
]
