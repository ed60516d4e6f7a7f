"""VNN-LIB: properties, how they are read, and how they are written."""

from .parse import PropertyError, parse_vnnlib, read_vnnlib
from .properties import Case, Property
from .write import counter_example, decimal, write_robustness

__all__ = [
    "Case",
    "Property",
    "PropertyError",
    "counter_example",
    "decimal",
    "parse_vnnlib",
    "read_vnnlib",
    "write_robustness",
]
