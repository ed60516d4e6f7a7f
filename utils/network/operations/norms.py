"""Logarithms, roots and quotients of perturbed values, and what is made of them: lengths, norms, variances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...graph.nodes import Constant, Linear, Node, WeightedSum
from ...graph.nonlinear import Activation
from ...graph.picks import Concat, Slice
from ...graph.pooling import Maximum, Pick
from ..symbolic import CONSTANT, DTYPE, SAMPLE, Builder, Symbol, UnsupportedError, constant, join
from ..trace import OPERATIONS, as_symbol, operation
from .attention import WITHIN, normalised
from .functions import amax, named, zeroed

POSITIVE = ("relu", "sigmoid", "softplus", "exp", "abs", "log1p", "rsqrt", "reciprocal", "sqrt")
constant_division = OPERATIONS["div"]
OPERATIONS |= {name: named(name) for name in ("sin", "cos")}


# --- what is known of values, whatever the input ----------------------------------------------------------------------


def floor_of(node: Node) -> Tensor | None:
    """A lower bound, (size,), not below 0, of a node that has one whatever the input is; None if none is known."""
    if isinstance(node, Constant):
        floor = node.vector.amin(dim=0)
        return floor if bool((floor >= 0).all()) else None
    if isinstance(node, Activation):
        return _floor_of_activation(node.name, node.size)
    if isinstance(node, Maximum) or not isinstance(node, (Linear, WeightedSum, Concat, Slice, Pick)):
        return None
    return _floor_through(node)


def _floor_of_activation(name: str, size: int) -> Tensor | None:
    family, _, numbers = name.removesuffix(")").partition("(")
    zero = torch.zeros(size, dtype=DTYPE)
    if family in POSITIVE or (family == "power" and int(numbers) % 2 == 0):
        return zero
    if family == "hardtanh" and numbers and float(numbers.split(",")[0]) >= 0:
        return zero + float(numbers.split(",")[0])
    return None


def _floor_through(node: Node) -> Tensor | None:
    """Through nodes that only add with factors that are not negative, or move elements."""
    floors = [floor_of(parent) for parent in node.parents]
    if any(floor is None for floor in floors):
        return None
    if isinstance(node, Linear) and any(bool((weight < 0).any()) for weight in node.weights):
        return None
    if isinstance(node, WeightedSum) and any(bool((torch.as_tensor(one) < 0).any()) for one in node.factors):
        return None
    if isinstance(node, Linear) and not bool((node.bias >= 0).all()):
        return None
    floor = node.value(*(floor[None] for floor in floors))[0]
    return floor * (1.0 - 1e-9)  # sums are rounded


def known_floor(builder: Builder, x: Symbol) -> float | None:
    """The least of the known lower bounds of x's elements."""
    ids = torch.where(x.ids == CONSTANT, CONSTANT, x.ids % SAMPLE).reshape(-1)
    scale, shift, owners = x.scale.reshape(-1), x.shift.reshape(-1), builder._nodes_of(ids)
    found = [shift[owners < 0]]
    for index in owners[owners >= 0].unique().tolist():
        own, node = owners == index, builder.graph.nodes[index]
        floor = floor_of(node)
        if floor is None or not bool((scale[own] >= 0).all()):
            return None
        found.append(floor[builder._offsets(ids[own], node)] * scale[own] + shift[own])
    return float(torch.cat(found).detach().min()) * (1.0 - 1e-9)


def of_half_line(builder: Builder, x: Symbol, family: str) -> Symbol:
    """log or reciprocal; with what is known of the operand, its bounds need not show that it is in the domain."""
    floor = known_floor(builder, x)
    return builder.activation(x, f"{family}({floor!r})" if floor is not None and floor > 0 else f"{family}(0.0)")


# --- functions --------------------------------------------------------------------------------------------------------


@operation("log")
def log(builder, x):
    return of_half_line(builder, x, "log")


@operation("log2")
def _log2(builder, x):
    return builder.scaled(log(builder, x), constant(1.0 / math.log(2.0)))


@operation("log10")
def _log10(builder, x):
    return builder.scaled(log(builder, x), constant(1.0 / math.log(10.0)))


@operation("log1p", "special_log1p")
def _log1p(builder, x):
    return log(builder, builder.add(x, constant(1.0)))


@operation("expm1", "special_expm1")
def _expm1(builder, x):
    return builder.add(builder.activation(x, "exp"), constant(-1.0))


@operation("reciprocal")
def reciprocal(builder, x):
    return of_half_line(builder, x, "reciprocal")


@operation("sqrt")
def sqrt(builder, x):
    floor = known_floor(builder, x)
    return builder.activation(x, "sqrt(0)" if floor is None or floor < 0 else "sqrt(1)")


@operation("rsqrt")
def _rsqrt(builder, x):
    """1 / sqrt(v + eps) as one function of v >= 0, if that is what x is; else the reciprocal of the root."""
    floor = known_floor(builder, x)
    if floor is None or floor <= 0:
        return reciprocal(builder, sqrt(builder, x))
    return builder.activation(builder.add(x, constant(-floor)), f"rsqrt({floor!r})")


@operation("div", "divide", "true_divide", "__truediv__", "__div__")
def divide(builder, x, y, rounding_mode=None):
    if not isinstance(y, Symbol) or rounding_mode is not None:
        return constant_division(builder, x, y, rounding_mode)
    return builder.multiply(as_symbol(x), reciprocal(builder, y))


@operation("__rtruediv__", "__rdiv__")
def _rdivide(builder, x, y):
    return divide(builder, y, x)


# --- lengths and norms ------------------------------------------------------------------------------------------------


@operation("vector_norm", "linalg_vector_norm")
def vector_norm(builder, x, ord=2, dim=None, keepdim=False, dtype=None):
    """Along an axis of a sample, of order 1, 2 or infinity."""
    if not isinstance(dim, (int, tuple, list)):
        raise UnsupportedError("a length is supported along an axis of a sample")
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    if any(axis % len(x.shape) == 0 for axis in axes):
        raise UnsupportedError("a length is supported along an axis of a sample, not over the batch")
    if ord == 2:
        return sqrt(builder, builder.sum(builder.activation(x, "power(2)"), axes, keepdim))
    if ord == 1:
        return builder.sum(builder.activation(x, "abs"), axes, keepdim)
    if ord == math.inf and len(axes) == 1:
        return amax(builder, builder.activation(x, "abs"), axes[0], keepdim)
    raise UnsupportedError("a length is supported of order 1, 2 and infinity")


@operation("norm", "linalg_norm")
def norm(builder, x, p="fro", dim=None, keepdim=False, out=None, dtype=None, ord=None):
    p = p if ord is None else ord
    if not isinstance(dim, int) and p not in ("fro", 2, None):
        raise UnsupportedError("norms of matrices are not supported")
    return vector_norm(builder, x, 2 if p in ("fro", None) else p, dim, keepdim)


@operation("normalize")
def _normalize(builder, x, p=2.0, dim=1, eps=1e-12, out=None):
    """Divided by max(length, eps). The bound of the quotient is loose where the length may come near 0."""
    return divide(builder, x, _at_least(builder, vector_norm(builder, x, p, dim, True), eps))


def _at_least(builder: Builder, x: Symbol, eps: float) -> Symbol:
    return builder.activation(x, f"hardtanh({float(eps)!r},inf)")


@operation("cosine_similarity")
def _cosine(builder, x1, x2, dim=1, eps=1e-8):
    x1, x2 = (as_symbol(one) for one in (x1, x2))
    shape = torch.broadcast_shapes(x1.shape, x2.shape)
    sides = [x.view(lambda part: part.expand(shape)) for x in (x1, x2)]
    sides = [divide(builder, x, _at_least(builder, vector_norm(builder, x, 2, dim, True), eps)) for x in sides]
    return builder.sum(builder.multiply(*sides), (dim,))


@operation("cdist")
def _cdist(builder, x1, x2, p=2.0, compute_mode=None):
    x1, x2 = (as_symbol(one) for one in (x1, x2))
    x1, x2 = x1.view(lambda part: part.unsqueeze(-2)), x2.view(lambda part: part.unsqueeze(-3))
    return vector_norm(builder, builder.add(x1, builder.negative(x2)), p, -1)


@operation("bilinear")
def _bilinear(builder, x1, x2, weight, bias=None):
    """Outputs x1' W_k x2, weight (outputs, first, second)."""
    x1, x2 = (as_symbol(one) for one in (x1, x2))
    mapped = builder.linear(x2, weight.flatten(0, 1)).view(lambda part: part.unflatten(-1, weight.shape[:2]))
    products = builder.multiply(x1.view(lambda part: part.unsqueeze(-2).expand(mapped.shape)), mapped)
    result = builder.sum(products, (len(products.shape) - 1,))
    return result if bias is None else builder.add(result, constant(bias.to("cpu", DTYPE)))


@operation("rms_norm")
def _rms_norm(builder, x, normalized_shape, weight=None, eps=None):
    if len(normalized_shape) != 1:
        raise UnsupportedError("RMSNorm is supported over the last axis")
    if eps is None:
        eps = torch.finfo(torch.float32 if weight is None else weight.dtype).eps
    result = normalised(builder, x, eps, centre=False)
    return result if weight is None else builder.scaled(result, constant(weight.to("cpu", DTYPE)))


@operation("group_norm")
def group_norm(builder, x, num_groups, weight=None, bias=None, eps=1e-5):
    shape = x.shape
    rows = x.view(lambda part: part.reshape(shape[0], num_groups, -1))
    result = normalised(builder, rows, eps).view(lambda part: part.reshape(shape))
    by_channel = (-1, *[1] * (len(shape) - 2))
    if weight is not None:
        result = builder.scaled(result, constant(weight.to("cpu", DTYPE).reshape(by_channel)))
    return result if bias is None else builder.add(result, constant(bias.to("cpu", DTYPE).reshape(by_channel)))


@operation("instance_norm")
def _instance_norm(
    builder,
    x,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if not use_input_stats:
        return OPERATIONS["batch_norm"](builder, x, running_mean, running_var, weight, bias, False, momentum, eps)
    return group_norm(builder, x, x.shape[1], weight, bias, eps)


@operation("var")
def var(builder, x, dim=None, unbiased=True, keepdim=False, *, correction=None):
    """Over one axis of a sample."""
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if type(dim) is not int or dim % len(x.shape) == 0:
        raise UnsupportedError("a variance is supported over one axis of a sample")
    less = int(unbiased) if correction is None else correction
    size = x.shape[dim]
    if size <= less:
        raise UnsupportedError(f"a variance of {size} values, divided by {size - less}, is no number")
    last = x.view(lambda part: part.movedim(dim, -1))
    centred = builder.linear(last, torch.eye(size, dtype=DTYPE) - 1.0 / size)
    share = torch.full((1, size), 1.0 / (size - less), dtype=DTYPE)
    result = builder.linear(builder.activation(centred, "power(2)"), share)
    return result.view(lambda part: part.movedim(-1, dim) if keepdim else part.squeeze(-1))


@operation("std")
def _std(builder, x, dim=None, unbiased=True, keepdim=False, *, correction=None):
    return sqrt(builder, var(builder, x, dim, unbiased, keepdim, correction=correction))


@operation("logsumexp")
def logsumexp(builder, x, dim, keepdim=False):
    """x_k + log(sum_j exp(x_j - x_k)), k a place: of differences, whose bounds are tighter, and the sum is at least 1.

    Minus infinity, as masks make it, adds nothing.
    """
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if type(dim) is not int or dim % len(x.shape) == 0:
        raise UnsupportedError("a logsumexp is supported over one axis of a sample")
    size, place = x.shape[dim], _least_constant(x, dim)
    result = x.view(lambda part: part.narrow(dim, place, 1))
    if size > 1:
        others = torch.tensor([k for k in range(size) if k != place])
        rest = x.view(lambda part: part.index_select(dim, others))
        out = rest.shift == -torch.inf
        terms = builder.activation(builder.add(zeroed(rest, out), builder.negative(result)), "exp")
        total = builder.add(builder.sum(zeroed(terms, out), (dim,), True), constant(1.0))
        result = builder.add(result, log(builder, total))
    return result if keepdim else result.view(lambda part: part.squeeze(dim))


def _least_constant(x: Symbol, dim: int) -> int:
    """The place along an axis at which the fewest values are constants, such as a mask's, and none minus infinity."""
    fixed, out = ((part.movedim(dim, 0).flatten(1)) for part in (x.ids == CONSTANT, x.shift == -torch.inf))
    counts = torch.where(out.any(dim=1), out.shape[1] + 1, fixed.sum(dim=1))
    if int(counts.min()) > out.shape[1]:
        raise UnsupportedError("a mask leaves nothing in one and the same place of all rows")
    return int(counts.argmin())


def log_softmax_within(builder: Builder, x: Symbol) -> Symbol:
    """Over the last axis, minus log(sum_j exp(x_j - x_i)), each of its differences."""
    parts = []
    for k in range(x.shape[-1]):
        own = [k, *(j for j in range(x.shape[-1]) if j != k)]
        parts.append(logsumexp(builder, x.view(lambda part, own=own: part[..., own]), len(x.shape) - 1))
    return builder.add(x, builder.negative(join(lambda made: torch.stack(made, dim=-1), parts)))


WITHIN["log_softmax"] = log_softmax_within
