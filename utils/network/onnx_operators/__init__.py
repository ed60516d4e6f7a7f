"""ONNX's operators, by name: a line or two each, in modules by kind."""

from . import control, elementwise, layers, recurrent, shapes  # noqa: F401
from .control import CONTROL
from .table import OPERATORS, Value

__all__ = ["CONTROL", "OPERATORS", "Value"]
