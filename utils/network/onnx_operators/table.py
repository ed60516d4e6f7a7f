"""What ONNX's operators share: the table of them, symbols and numbers among their inputs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..symbolic import Builder, Symbol, UnsupportedError, constant

Value = Symbol | Tensor
Handler = Callable[..., object]
OPERATORS: dict[str, Handler] = {}
AXIS_OPSET = 13  # before, a softmax was over all axes from the given one on
# What only moves all elements of its first input.
MOVES = ("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Cast", "CastLike", "Dropout")


def operator(*names: str):
    """Register a handler: called with the reader, the node's inputs and its attributes."""

    def register(handler: Handler) -> Handler:
        OPERATORS.update(dict.fromkeys(names, handler))
        return handler

    return register


def symbol(value: Value) -> Symbol:
    return value if isinstance(value, Symbol) else constant(value)


def whole_numbers(value) -> list[int]:
    """Whole numbers that must be known beforehand: axes, indices, sizes."""
    if isinstance(value, Symbol):
        raise UnsupportedError("a shape or index must not depend on the input")
    return value.reshape(-1).tolist() if isinstance(value, Tensor) else list(value)


def fixed_number(value: Value | float) -> float:
    """A number that must be known beforehand."""
    if isinstance(value, Symbol):
        raise UnsupportedError("a number of the operator must not depend on the input")
    return float(value)


def of_one_sample(function: Callable[..., Symbol], builder: Builder, *values: Symbol, axis: int = -1, **how) -> Symbol:
    """``function(builder, *values)`` of what acts along an axis, the last one there, of the values of a sample.

    A file's axes are those of one sample: wherever its batch of one is, functions of modules get an axis before all.
    """
    moved = [value.view(lambda part: part.movedim(axis, -1)[None]) for value in values]
    result = function(builder, *moved, **how)
    return result.view(lambda part: part[0].movedim(-1, axis))
