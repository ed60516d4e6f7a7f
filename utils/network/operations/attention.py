"""Attention and normalisation of layers: products of what is perturbed, softmax within a network, LayerNorm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...graph.mixing import MatMul, Shape, Softmax
from ...graph.nodes import Constant, Frame, Linear, Node, WeightedSum
from ...graph.picks import Concat
from ...graph.pooling import Pick
from ..symbolic import CONSTANT, DTYPE, Builder, Symbol, UnsupportedError, constant
from ..trace import OPERATIONS, SETTLE, as_symbol, operation

LOWEST = -1e30  # scores that are constants and no higher count as masked
constant_matmul, last_softmax = OPERATIONS["matmul"], OPERATIONS["softmax"]


# --- nodes ------------------------------------------------------------------------------------------------------------


def gathered(builder: Builder, x: Symbol) -> Node:
    """A node, but an input frame, that holds just the elements of x, (batch, ...), in their order."""
    whole = builder._whole(x)
    if whole is not None and whole[0] is not None and whole[1].is_plain and not isinstance(whole[0], Frame):
        return whole[0]
    samples, (row,) = builder._same_row([x.view(lambda part: part.reshape(part.shape[0], -1))])
    if samples.tolist() != list(range(len(samples))):
        raise UnsupportedError("the samples of a batch are not in their order")
    fixed = row.ids == CONSTANT
    if bool(fixed.all()):
        return builder.graph.add(Constant(row.shift))
    node = _picked(builder, row, fixed)
    scale, shift = torch.where(fixed, 1.0, row.scale), torch.where(fixed, 0.0, row.shift)
    if bool((scale == 1).all()) and bool((shift == 0).all()):
        return node
    factor = scale[0].item() if bool((scale == scale[0]).all()) and not scale.requires_grad else scale
    if bool((shift == 0).all()):
        return builder.graph.add(WeightedSum((node,), (factor,)))
    return builder.graph.add(WeightedSum((node, builder.graph.add(Constant(shift))), (factor, 1.0)))


def _picked(builder: Builder, row: Symbol, fixed: Tensor) -> Node:
    """The elements without scales and shifts; those that are constants come from a node of these."""
    owners = builder._nodes_of(row.ids)
    nodes = [builder.graph.nodes[index] for index in dict.fromkeys(owners.tolist()) if index >= 0]
    parents, places, start = [], torch.empty(len(owners), dtype=torch.int64), 0
    for node in nodes:
        own = owners == node.index
        places[own] = start + builder._offsets(row.ids[own], node)
        parents.append(_identity(builder, node) if isinstance(node, Frame) else node)
        start += node.size
    if bool(fixed.any()):
        parents.append(builder.graph.add(Constant(row.shift[fixed])))
        places[fixed] = start + torch.arange(int(fixed.sum()))
        start += int(fixed.sum())
    key = tuple(parents)
    base = parents[0] if len(parents) == 1 else builder._once("concat", key, None, lambda: Concat(key))
    if torch.equal(places, torch.arange(start)):
        return base
    return builder._once("pick", (base,), places.numpy().tobytes(), lambda: Pick(base, places))


def _identity(builder: Builder, frame: Frame) -> Node:
    eye, zero = torch.eye(frame.size, dtype=DTYPE), torch.zeros(frame.size, dtype=DTYPE)
    return builder._once("identity", (frame,), None, lambda: Linear((frame,), (eye,), zero))


def product(builder: Builder, x: Symbol, y: Symbol, limit: float | None = None) -> Symbol:
    """x (batch, ..., rows, inner) times y (batch, ..., inner, columns), of which both may be perturbed."""
    if len(x.shape) < 3 or len(y.shape) < 3 or x.shape[-1] != y.shape[-2]:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise UnsupportedError(f"a product of matrices that both depend on the input is one a sample, not {shapes}")
    x, y = _without_zeros(x, y)
    stack = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (one.view(lambda part, one=one: part.expand(*stack, *one.shape[-2:])) for one in (x, y))
    shape = Shape(stack[1:].numel(), x.shape[-2], x.shape[-1], y.shape[-1])
    node = builder.graph.add(MatMul(gathered(builder, x), gathered(builder, y), shape, limit))
    result = builder.symbol(node, torch.arange(stack[0]))
    return result.view(lambda part: part.reshape(*stack, shape.rows, shape.columns))


def _without_zeros(x: Symbol, y: Symbol) -> tuple[Symbol, Symbol]:
    """Factors without the inner indices at which x is 0, as shares of what a mask leaves out are."""
    zero = (x.ids == CONSTANT) & (x.shift == 0)
    left = ~zero.flatten(0, -2).all(dim=0)
    if bool(left.all()) or not bool(left.any()):
        return x, y
    return x.view(lambda part: part[..., left]), y.view(lambda part: part[..., left, :])


def softmax(builder: Builder, x: Symbol) -> Symbol:
    """Over the last axis; scores of minus infinity, as masks make them, have no part in it.

    Nor have constants of -1e30 and less, whose shares no float can hold: a least float is often meant as infinity.
    """
    out = (x.shift == -torch.inf) | ((x.ids == CONSTANT) & (x.shift <= LOWEST))
    if bool(out.any()):
        return _masked_softmax(builder, x, ~out)
    scores, width = gathered(builder, x), x.shape[-1]
    node = builder._once("softmax", (scores,), width, lambda: Softmax(scores, width))
    return builder.symbol(node, torch.arange(x.shape[0])).view(lambda part: part.reshape(x.shape))


def _masked_softmax(builder: Builder, x: Symbol, left: Tensor) -> Symbol:
    """Rows of which the same scores are left, at a time."""
    rows = x.view(lambda part: part.reshape(len(part), -1, part.shape[-1]))
    left = left.reshape(rows.shape)
    if not bool((left == left[:1]).all()) or not bool(left.any(dim=-1).all()):
        raise UnsupportedError("a mask leaves the samples different scores, or none of a row")
    patterns, kind = torch.unique(left[0], dim=0, return_inverse=True)
    result = constant(torch.zeros(rows.shape))
    for number, pattern in enumerate(patterns):
        own, places = (kind == number).nonzero(), pattern.nonzero().squeeze(-1)
        share = softmax(builder, rows.view(lambda part, own=own, places=places: part[:, own, places]))
        for whole, part in zip(_parts_of(result), _parts_of(share), strict=True):
            whole[:, own, places] = part
    return result.view(lambda part: part.reshape(x.shape))


def _parts_of(x: Symbol) -> tuple[Tensor, Tensor, Tensor]:
    return x.ids, x.scale, x.shift


def masked(builder: Builder, scores: Symbol, mask: Tensor | None, takes_part: bool = False) -> Symbol:
    """Scores with a constant mask: of numbers that are added, or of bool, where ``takes_part`` says what True means."""
    if mask is None:
        return scores
    if isinstance(mask, Symbol):
        raise UnsupportedError("a mask must not depend on the input's vectors")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask if takes_part else mask, -torch.inf)
    return builder.add(scores, constant(mask))


# --- operations -------------------------------------------------------------------------------------------------------


@operation("matmul", "__matmul__", "bmm")
def _matmul(builder, x, y):
    """Of a constant matrix, or of two tensors that both depend on the input."""
    if isinstance(x, Symbol) and isinstance(y, Symbol):
        if y.is_constant and len(set(y.shape[:-2])) <= 1 and _is_one_matrix(y):
            return constant_matmul(builder, x, y.shift.reshape(-1, *y.shape[-2:])[0])
        return product(builder, x, y)
    other = y if isinstance(x, Symbol) else x
    if other.dim() <= 2:
        return constant_matmul(builder, x, y)
    return product(builder, as_symbol(x), as_symbol(y))


def _is_one_matrix(y: Symbol) -> bool:
    matrices = y.shift.reshape(-1, *y.shape[-2:])
    return bool((matrices == matrices[:1]).all())


@operation("__rmatmul__")
def _rmatmul(builder, x, y):
    return _matmul(builder, y, x)


@operation("softmax")
def _softmax(builder, x, dim=None, _stacklevel=3, dtype=None):
    last = len(x.shape) - 1
    if dim in (last, -1) or (dim is None and last == 1):
        return last_softmax(builder, x, dim)
    if dim is None or last < 1 or dim % (last + 1) == 0:
        raise UnsupportedError("a softmax is supported over one axis of a sample")
    share = softmax(builder, x.view(lambda part: part.movedim(dim, -1)))
    return share.view(lambda part: part.movedim(-1, dim))


def normalised(builder: Builder, x: Symbol, eps: float, centre: bool = True) -> Symbol:
    """(x - mean) / sqrt(variance + eps) over the last axis, of n, of which no value is above sqrt(n - 1).

    Without ``centre`` nothing is subtracted, and squares are averaged: none is above sqrt(n).
    """
    size = x.shape[-1]
    if centre:
        x = builder.linear(x, torch.eye(size, dtype=DTYPE) - 1.0 / size)
    variance = builder.linear(builder.activation(x, "power(2)"), torch.full((1, size), 1.0 / size, dtype=DTYPE))
    factor = builder.activation(variance, f"rsqrt({float(eps)!r})")
    columns, factors = (one.view(lambda part: part.unsqueeze(-1)) for one in (x, factor))
    return product(builder, columns, factors, math.sqrt(size - centre)).view(lambda part: part.squeeze(-1))


@operation("layer_norm")
def layer_norm(builder, x, normalized_shape, weight=None, bias=None, eps=1e-5):
    if len(normalized_shape) != 1:
        raise UnsupportedError("LayerNorm is supported over the last axis")
    result = normalised(builder, x, eps)
    if weight is not None:
        result = builder.scaled(result, constant(weight.to("cpu", DTYPE)))
    return result if bias is None else builder.add(result, constant(bias.to("cpu", DTYPE)))


@operation("scaled_dot_product_attention")
def _attention(builder, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        raise UnsupportedError("attention is supported with as many heads of keys as of queries")
    if dropout_p > 0:
        raise UnsupportedError("dropout is random in training mode: call model.eval() first")
    q, k, v = map(as_symbol, (q, k, v))
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = product(builder, builder.scaled(q, constant(factor)), k.view(lambda part: part.mT))
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return product(builder, softmax(builder, masked(builder, scores, attn_mask, takes_part=True)), v)


@operation("multi_head_attention_forward")
def _heads(
    builder,
    query,
    key,
    value,
    width,
    heads,
    in_weight,
    in_bias,
    bias_k,
    bias_v,
    add_zero_attn,
    dropout_p,
    out_weight,
    out_bias,
    training=True,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    use_separate_proj_weight=False,
    q_proj_weight=None,
    k_proj_weight=None,
    v_proj_weight=None,
    **options,
):
    """nn.MultiheadAttention, of query, key and value (T, batch, width)."""
    unusual = (bias_k, bias_v, options.get("static_k"), options.get("static_v"))
    if any(value is not None for value in unusual) or add_zero_attn or (options.get("is_causal") and attn_mask is None):
        raise UnsupportedError("attention is supported without additional keys, and with the mask of what is causal")
    if training and dropout_p > 0:
        raise UnsupportedError("dropout is random in training mode: call model.eval() first")
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_weight.chunk(3)
    biases = (None,) * 3 if in_bias is None else in_bias.chunk(3)

    def split(x: Symbol, weight: Tensor, bias: Tensor | None) -> Symbol:
        """(T, batch, width) to (batch, heads, T, width / heads)."""
        made = builder.linear(x.view(lambda part: part.transpose(0, 1)), weight, bias)
        return made.view(lambda part: part.unflatten(-1, (heads, -1)).transpose(1, 2))

    q, k, v = (split(*given) for given in zip((query, key, value), weights, biases, strict=True))
    scores = product(builder, builder.scaled(q, constant(1.0 / math.sqrt(q.shape[-1]))), k.view(lambda part: part.mT))
    if attn_mask is not None and not isinstance(attn_mask, Symbol) and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, heads))
    scores = masked(builder, scores, attn_mask)
    if key_padding_mask is not None and not isinstance(key_padding_mask, Symbol):
        key_padding_mask = key_padding_mask[:, None, None]
    share = softmax(builder, masked(builder, scores, key_padding_mask))
    mixed = product(builder, share, v).view(lambda part: part.transpose(1, 2).flatten(2))
    result = builder.linear(mixed, out_weight, out_bias).view(lambda part: part.transpose(0, 1))
    if not need_weights:
        return result, None
    if not options.get("average_attn_weights", True):
        return result, share
    return result, builder.mean(share, (1,))


WITHIN = {"softmax": softmax}  # what makes nodes of each such function, by the names that symbols have of them


def settled(builder: Builder, value: object) -> object:
    """A symbol as it is; a softmax that was left for the end of the network as a node, since something reads it."""
    if isinstance(value, Symbol) and value.softmax in WITHIN:
        if value.settle is not None:
            return value.settle()
        return WITHIN[value.softmax](builder, Symbol(value.ids, value.scale, value.shift))
    if isinstance(value, dict):
        return {key: settled(builder, part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, torch.Size)):
        return type(value)(settled(builder, part) for part in value)
    return value


SETTLE[0] = settled
