"""Functions of each value by itself, whose lines stand in ``utils.relaxation.shapes``, and what is made of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...graph.pooling import Maximum
from ..symbolic import CONSTANT, Builder, Symbol, UnsupportedError, check_scores, constant, join
from ..trace import OPERATIONS, as_symbol, operation
from .attention import gathered

# As torch calls them, and as the table of activations does.
NAMES = {
    **dict.fromkeys(("silu", "mish", "hardswish", "softsign", "tanhshrink", "erf", "exp"), ""),
    **{"log_sigmoid": "logsigmoid", "logsigmoid": "logsigmoid", "special_erf": "erf", "square": "power(2)"},
    **dict.fromkeys(("abs", "absolute", "__abs__"), "abs"),
}
ROOTS = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def named(name: str):
    return lambda builder, x: builder.activation(x, name)


OPERATIONS |= {name: named(of or name) for name, of in NAMES.items()}


@operation("gelu")
def _gelu(builder, x, approximate="none"):
    """Approximated by tanh, y (1 + tanh(z)) / 2 = y sigmoid(2 z), a product of its own and looser."""
    if approximate == "none":
        return builder.activation(x, "gelu")
    cube = builder.scaled(builder.activation(x, "power(3)"), constant(0.044715))
    gate = builder.scaled(builder.add(x, cube), constant(2.0 * (2.0 / math.pi) ** 0.5))
    return builder.multiply(x, builder.activation(gate, "sigmoid"))


@operation("elu")
def elu(builder, x, alpha=1.0):
    return builder.activation(x, "elu" if alpha == 1.0 else f"elu({float(alpha)!r},1.0,1.0)")


@operation("celu")
def celu(builder, x, alpha=1.0):
    return builder.activation(x, f"elu({float(alpha)!r},1.0,{float(alpha)!r})")


@operation("selu")
def selu(builder, x, alpha=SELU_ALPHA, scale=SELU_SCALE):
    return builder.activation(x, f"elu({float(alpha)!r},{float(scale)!r},1.0)")


@operation("softshrink")
def _softshrink(builder, x, lambd=0.5):
    return builder.activation(x, f"softshrink({float(lambd)!r})")


@operation("threshold", "_threshold")
def _threshold(builder, x, threshold, value):
    if threshold != value:
        raise UnsupportedError("it jumps at the threshold, unless that is the value below it")
    return builder.activation(x, f"hardtanh({float(threshold)!r},inf)")


@operation("rrelu")
def _rrelu(builder, x, lower=1.0 / 8, upper=1.0 / 3, training=False):
    if training:
        raise UnsupportedError("rrelu is random in training mode: call model.eval() first")
    return builder.activation(x, f"leaky_relu({0.5 * (lower + upper)!r})")


@operation("prelu")
def prelu(builder, x, weight):
    """Leaky relu with a slope a channel, the second axis; a negative slope as relu(x) - slope * relu(-x)."""
    weight = weight.detach().reshape(-1)
    if len(weight) == 1 or len(x.shape) < 2:
        return _leaky(builder, x, float(weight[0]))
    channels = [x.view(lambda part, k=k: part[:, k]) for k in range(x.shape[1])]
    made = [_leaky(builder, one, float(slope)) for one, slope in zip(channels, weight, strict=True)]
    return join(lambda parts: torch.stack(parts, dim=1), made)


def _leaky(builder: Builder, x: Symbol, slope: float) -> Symbol:
    if slope >= 0:
        return builder.activation(x, f"leaky_relu({slope!r})")
    below = builder.activation(builder.negative(x), "relu")
    return builder.add(builder.activation(x, "relu"), builder.scaled(below, constant(-slope)))


@operation("glu")
def _glu(builder, x, dim=-1):
    half = x.shape[dim] // 2
    state, gate = (x.view(lambda part, k=k: part.narrow(dim, k, half)) for k in (0, half))
    return builder.multiply(state, builder.activation(gate, "sigmoid"))


@operation("pow", "__pow__")
def power(builder, x, exponent):
    if isinstance(exponent, (Symbol, Tensor)) or not isinstance(x, Symbol):
        raise UnsupportedError("a power is supported with a whole number as its exponent")
    if exponent == 1:
        return x
    if exponent in ROOTS:
        return OPERATIONS[ROOTS[exponent]](builder, x)
    if exponent != int(exponent) or exponent < 2:
        raise UnsupportedError("a power is supported with a whole exponent of at least 1, 1 / 2, -1 / 2 and -1")
    return builder.activation(x, f"power({int(exponent)})")


class Greatest(NamedTuple):
    """What ``torch.max`` over an axis returns; the places depend on the input, and are not there to be read."""

    values: Symbol
    indices: None = None


@operation("amax")
def amax(builder, x, dim=None, keepdim=False):
    """Over one axis of a sample: one node for the greatest of all, not a chain of maxima of two."""
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    if len(dims) != 1 or dims[0] is None or dims[0] % len(x.shape) == 0:
        raise UnsupportedError("a maximum is supported over one axis of a sample")
    axis = dims[0] % len(x.shape)
    parts = [x.view(lambda part, k=k: part.select(axis, k)) for k in range(x.shape[axis])]
    shape = parts[0].shape
    parts = [part for part in parts if not bool((part.shift == -torch.inf).all())]
    if not parts:
        raise UnsupportedError("nothing is left to take the greatest of")
    present = torch.stack([part.shift[0].flatten() != -torch.inf for part in parts])
    nodes = tuple(gathered(builder, zeroed(part, part.shift == -torch.inf)) for part in parts)
    made = builder.graph.add(Maximum(nodes, present)) if len(nodes) > 1 else nodes[0]
    result = builder.symbol(made, torch.arange(shape[0])).view(lambda part: part.reshape(shape))
    return result.view(lambda part: part.unsqueeze(axis)) if keepdim else result


def zeroed(x: Symbol, out: Tensor) -> Symbol:
    """With zeros at some places, such as those that a mask has made minus infinity, and that are left out."""
    return Symbol(x.ids.masked_fill(out, CONSTANT), x.scale.masked_fill(out, 0.0), x.shift.masked_fill(out, 0.0))


@operation("amin")
def amin(builder, x, dim=None, keepdim=False):
    return builder.negative(amax(builder, builder.negative(x), dim, keepdim))


def _over_axis(of_axis, builder, x, others, how) -> Greatest | None:
    """The result of max(x, dim, keepdim) or min; None for those of two tensors."""
    dim, keepdim = (*others, *(None,) * 2)[:2]
    dim, keepdim = how.get("dim", dim), how.get("keepdim", bool(keepdim))
    return Greatest(of_axis(builder, x, dim, keepdim)) if type(dim) is int else None


@operation("maximum", "max", "fmax")
def maximum(builder, x, *others, **how):
    """Of two tensors, one of which may be constant, y + relu(x - y); or over an axis."""
    over_axis = _over_axis(amax, builder, x, others, how)
    if over_axis is not None:
        return over_axis
    y = _other("maximum", x, others, how)
    x, y = as_symbol(x), as_symbol(y)
    if x.is_constant:
        x, y = y, x
    difference = builder.add(x, builder.negative(y))
    return builder.add(builder.activation(difference, "relu"), y)


@operation("minimum", "min", "fmin")
def minimum(builder, x, *others, **how):
    over_axis = _over_axis(amin, builder, x, others, how)
    if over_axis is not None:
        return over_axis
    x, y = (builder.negative(as_symbol(part)) for part in (x, _other("minimum", x, others, how)))
    return builder.negative(maximum(builder, x, y))


def _other(name: str, x, others, how):
    other = others[0] if others else how.get("other")
    if len(others) > 1 or isinstance(other, (int, float, type(None))):
        raise UnsupportedError(f"a {name} has a bound of two tensors and over one axis, not over all values")
    return other


@operation("lerp")
def _lerp(builder, x, end, weight):
    if isinstance(weight, Symbol):
        raise UnsupportedError("the weight must not depend on the input")
    weight = torch.as_tensor(weight, dtype=torch.float64)
    return builder.add(
        builder.scaled(as_symbol(x), constant(1.0 - weight)), builder.scaled(as_symbol(end), constant(weight))
    )


@operation("addcmul")
def _addcmul(builder, x, first, second, value=1):
    product = builder.multiply(as_symbol(first), as_symbol(second))
    check_scores(product)
    return builder.add(as_symbol(x), builder.scaled(product, constant(float(value))))
