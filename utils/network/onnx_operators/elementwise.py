"""ONNX's operators that act on each value by itself: sums, products, activations."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch

from ..operations import attention, functions, norms
from ..symbolic import Symbol, UnsupportedError, check_scores, constant
from ..trace import OPERATIONS
from .table import AXIS_OPSET, OPERATORS, fixed_number, of_one_sample, operator, symbol, whole_numbers


@operator("Add", "Sum")
def _add(reader, *terms):
    return reader.builder.add(*(symbol(term) for term in terms))


@operator("Sub")
def _sub(reader, x, y):
    return reader.builder.add(symbol(x), reader.builder.scaled(symbol(y), constant(-1.0)))


@operator("Neg")
def _negative(reader, x):
    return reader.builder.scaled(x, constant(-1.0))


@operator("Mul")
def _multiply(reader, x, y):
    return reader.builder.multiply(symbol(x), symbol(y))


@operator("Div")
def _divide(reader, x, y):
    if isinstance(y, Symbol):
        return norms.divide(reader.builder, symbol(x), y)
    if not bool((y != 0).all()):
        raise UnsupportedError("it divides by zero")
    return reader.builder.scaled(x, constant(1.0 / y.double()))


@operator("Relu")
def _relu(reader, x):
    return reader.builder.activation(x, "relu")


@operator("Tanh")
def _tanh(reader, x):
    return reader.builder.activation(x, "tanh")


@operator("Sigmoid")
def _sigmoid(reader, x):
    return reader.builder.activation(x, "sigmoid")


@operator("Atan")
def _arctan(reader, x):
    return reader.builder.activation(x, "arctan")


@operator("Softplus")
def _softplus(reader, x):
    return reader.builder.activation(x, "softplus")


@operator("Elu")
def _elu(reader, x, alpha=1.0):
    return functions.elu(reader.builder, x, alpha)


@operator("Celu")
def _celu(reader, x, alpha=1.0):
    return functions.celu(reader.builder, x, alpha)


@operator("Selu")
def _selu(reader, x, alpha=functions.SELU_ALPHA, gamma=functions.SELU_SCALE):
    return functions.selu(reader.builder, x, alpha, gamma)


@operator("PRelu")
def _prelu(reader, x, slope):
    """relu(x) - slope * relu(-x); as one function of x where all values, or all of a channel, have one slope."""
    if isinstance(slope, Symbol) or not isinstance(x, Symbol):
        raise UnsupportedError("PRelu is supported with constant slopes")
    slopes = slope.expand(x.shape)
    by_channel = slopes.movedim(1, 0).flatten(1) if slopes.dim() > 1 else slopes.reshape(1, -1)
    if bool((by_channel == by_channel[:, :1]).all()):
        return functions.prelu(reader.builder, x, by_channel[:, 0])
    below = reader.builder.activation(reader.builder.negative(x), "relu")
    return reader.builder.add(reader.builder.activation(x, "relu"), reader.builder.scaled(below, constant(-slopes)))


@operator("Gelu")
def _gelu(reader, x, approximate="none"):
    return OPERATIONS["gelu"](reader.builder, x, approximate)


@operator("Pow")
def _power(reader, x, exponent):
    if isinstance(exponent, Symbol) or exponent.numel() != 1:
        raise UnsupportedError("Pow is supported with one constant exponent")
    return functions.power(reader.builder, x, float(exponent))


@operator("Max")
def _maximum(reader, first, *others):
    for other in others:
        first = functions.maximum(reader.builder, symbol(first), symbol(other))
    return first


@operator("Min")
def _minimum(reader, first, *others):
    for other in others:
        first = functions.minimum(reader.builder, symbol(first), symbol(other))
    return first


@operator("ReduceMax")
def _reduce_max(reader, x, axes_input=None, axes=None, keepdims=1, noop_with_empty_axes=0):
    axes = whole_numbers(axes_input) if axes_input is not None else axes or []
    if not axes and noop_with_empty_axes:
        return x
    chosen = sorted({axis % len(x.shape) for axis in axes}) if axes else list(range(len(x.shape)))
    kept = [1 if axis in chosen else size for axis, size in enumerate(x.shape)]
    rows = x.view(lambda part: part.movedim(chosen, list(range(-len(chosen), 0))).flatten(-len(chosen))[None])
    greatest = functions.amax(reader.builder, rows, -1)
    return greatest.view(lambda part: part.reshape(kept) if keepdims else part[0])


@operator("ReduceMin")
def _reduce_min(reader, x, *given, **how):
    return reader.builder.negative(_reduce_max(reader, reader.builder.negative(x), *given, **how))


@operator("GlobalMaxPool")
def _global_max_pool(reader, x):
    return _reduce_max(reader, x, axes=range(2, len(x.shape)))


SHAPES = {"Mish": "mish", "HardSwish": "hardswish", "Softsign": "softsign", "Erf": "erf", "Exp": "exp", "Abs": "abs"}
SHAPES |= {"Sin": "sin", "Cos": "cos"}
OPERATORS |= {name: lambda reader, x, of=of: reader.builder.activation(x, of) for name, of in SHAPES.items()}
ROOTS = {"Log": norms.log, "Sqrt": norms.sqrt, "Reciprocal": norms.reciprocal}
OPERATORS |= {name: lambda reader, x, of=of: of(reader.builder, x) for name, of in ROOTS.items()}


@operator("LeakyRelu")
def _leaky_relu(reader, x, alpha=0.01):
    return reader.builder.activation(x, f"leaky_relu({alpha!r})")


@operator("Clip")
def _clip(reader, x, lowest=None, highest=None, min=None, max=None):
    ends = [(lowest, min, -math.inf), (highest, max, math.inf)]
    low, high = (
        fixed_number(given if given is not None else other if other is not None else end) for given, other, end in ends
    )
    if math.isnan(low) or math.isnan(high):
        raise UnsupportedError("an end of its range is NaN")
    if low >= high:  # the upper end is applied last
        return constant(torch.full(x.shape, high))
    return reader.builder.activation(x, f"hardtanh({low!r},{high!r})")


@operator("HardSigmoid")
def _hard_sigmoid(reader, x, alpha=0.2, beta=0.5):
    y = reader.builder.add(reader.builder.scaled(x, constant(alpha)), constant(beta))
    return reader.builder.activation(y, "hardtanh(0,1)")


def _softmax(name: str):
    def handler(reader, x, axis=None):
        """Left out where it is the end of the network, over all its outputs: a node as soon as something reads it."""
        check_scores(x)
        newest = reader.opsets[""] >= AXIS_OPSET
        axis = (-1 if newest else 1) if axis is None else axis
        if newest:
            made = functools.partial(of_one_sample, attention.WITHIN[name], reader.builder, x, axis=axis)
        else:  # over all axes from the given one on
            first = math.prod(x.shape[: axis % len(x.shape)])
            rows = x.view(lambda part: part.reshape(first, -1))
            made = functools.partial(_in_rows, reader, name, rows, x.shape)
        whole = x.shape.numel() == (x.shape[axis] if newest else rows.shape[1])
        return replace(x, softmax=name, settle=made) if whole else made()

    return handler


def _in_rows(reader, name: str, rows: Symbol, shape: torch.Size) -> Symbol:
    made = of_one_sample(attention.WITHIN[name], reader.builder, rows)
    return made.view(lambda part: part.reshape(shape))


OPERATORS["Softmax"], OPERATORS["LogSoftmax"] = _softmax("softmax"), _softmax("log_softmax")
