"""What ONNX's operators share: the table of them, symbols and numbers among their inputs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..symbolic import Symbol, UnsupportedError, constant

Value = Symbol | Tensor
Handler = Callable[..., object]
OPERATORS: dict[str, Handler] = {}


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
