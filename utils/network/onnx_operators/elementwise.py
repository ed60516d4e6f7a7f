"""ONNX's operators that act on each value by itself: sums, products, activations."""

from __future__ import annotations

import math

import torch

from ..operations import attention, functions, norms
from ..symbolic import Symbol, UnsupportedError, check_scores, constant
from .table import OPERATORS, operator, symbol, whole_numbers


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
        raise UnsupportedError("only a division by constants is supported")
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
    if isinstance(slope, Symbol) or (slope.numel() > 1 and slope.numel() != slope.shape[0]):
        raise UnsupportedError("PRelu is supported with a constant slope for every channel")
    return functions.prelu(reader.builder, x, slope)


@operator("Gelu")
def _gelu(reader, x, approximate="none"):
    if approximate not in ("none", b"none"):
        raise UnsupportedError("Gelu is supported as it is, not approximated by tanh")
    return reader.builder.activation(x, "gelu")


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
def _reduce_max(reader, x, axes=None, keepdims=1):
    axes = whole_numbers(axes) if axes is not None else []
    if len(axes) != 1:
        raise UnsupportedError("a maximum is supported over one axis")
    return functions.amax(reader.builder, x, axes[0], bool(keepdims))


@operator("ReduceMin")
def _reduce_min(reader, x, axes=None, keepdims=1):
    return reader.builder.negative(_reduce_max(reader, reader.builder.negative(x), axes, keepdims))


@operator("GlobalMaxPool")
def _global_max_pool(reader, x):
    flat = x.view(lambda part: part.flatten(2))
    return functions.amax(reader.builder, flat, 2, True).view(
        lambda part: part.reshape(*x.shape[:2], *[1] * (len(x.shape) - 2))
    )


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
        float(given if given is not None else other if other is not None else end) for given, other, end in ends
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


def _final_softmax(reader, x, axis=None, name="softmax"):
    check_scores(x)
    axis = (-1 if reader.opsets[""] >= 13 else 1) if axis is None else axis
    if name == "softmax" and x.shape.numel() != x.shape[axis] and reader.opsets[""] >= 13:
        share = attention.softmax(reader.builder, x.view(lambda part: part.movedim(axis, -1)))
        return share.view(lambda part: part.movedim(-1, axis))
    if x.shape.numel() != x.shape[axis]:
        raise UnsupportedError("a softmax is supported at the end of the network only, over all its outputs")
    return Symbol(x.ids, x.scale, x.shift, name)


OPERATORS["Softmax"] = _final_softmax
OPERATORS["LogSoftmax"] = lambda reader, x, axis=None: _final_softmax(reader, x, axis, "log_softmax")
