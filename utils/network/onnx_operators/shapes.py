"""ONNX's operators that move, choose and collect values: shapes, slices, reductions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..symbolic import Symbol, UnsupportedError, join
from .refused import EMBEDDING
from .table import OPERATORS, Handler, fixed_number, operator, symbol, whole_numbers


@operator("Identity")
def _identity(reader, x):
    return x


@operator("Dropout")
def _dropout(reader, x, ratio=None, training=None, **attributes):
    if training is not None and bool(whole_numbers(training)[0]):
        raise UnsupportedError("dropout is random in training mode: export the model in evaluation mode")
    return x, torch.ones(x.shape, dtype=torch.bool)


@operator("Cast")
def _cast(reader, x, to, **attributes):
    types = reader.onnx.TensorProto
    if to not in (types.FLOAT, types.DOUBLE):
        lookup = f" (for an embedding, {EMBEDDING})" if to in (types.INT32, types.INT64) else ""
        raise UnsupportedError(f"numbers are rounded to {types.DataType.Name(to)}{lookup}")
    return x


@operator("CastLike")
def _cast_like(reader, x, like, **attributes):
    if isinstance(like, Tensor) and like.dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(f"numbers are rounded to {like.dtype}")
    return x


@operator("Shape")
def _shape(reader, x, start=0, end=None):
    return torch.tensor(tuple(x.shape)[start:end], dtype=torch.int64)


@operator("Size")
def _size(reader, x):
    return torch.tensor(x.shape.numel())


@operator("Reshape")
def _reshape(reader, x, shape, allowzero=0):
    sizes = whole_numbers(shape)
    if not allowzero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.view(lambda part: part.reshape(sizes))


@operator("Flatten")
def _flatten(reader, x, axis=1):
    first = math.prod(x.shape[:axis])
    return x.view(lambda part: part.reshape(first, -1))


@operator("Transpose")
def _transpose(reader, x, perm=None):
    return x.view(lambda part: part.permute(perm or list(reversed(range(part.dim())))))


@operator("Squeeze")
def _squeeze(reader, x, axes_input=None, axes=None):
    axes = whole_numbers(axes_input) if axes_input is not None else axes
    if axes is None:
        axes = [axis for axis, size in enumerate(x.shape) if size == 1]
    return x.view(lambda part: part.squeeze(tuple(axes)))


@operator("Unsqueeze")
def _unsqueeze(reader, x, axes_input=None, axes=None):
    axes = whole_numbers(axes_input) if axes_input is not None else axes
    rank = len(x.shape) + len(axes)
    shape = list(x.shape)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return x.view(lambda part: part.reshape(shape))


@operator("Concat")
def _concat(reader, *parts, axis):
    return join(lambda tensors: torch.cat(tensors, dim=axis), [symbol(part) for part in parts])


@operator("Split")
def _split(reader, x, sizes=None, axis=0, split=None, num_outputs=None):
    sizes, count = whole_numbers(sizes) if sizes is not None else split, len(reader.node.output)
    if sizes is None:  # equal parts; from opset 18 on, the last may be smaller
        if num_outputs is None and x.shape[axis] % count:
            raise UnsupportedError(f"{x.shape[axis]} values do not split into {count} equal parts")
        sizes = -(-x.shape[axis] // (num_outputs or count))
    pieces = [part.split(sizes, dim=axis) for part in (x.ids, x.scale, x.shift)]
    if num_outputs is not None and len(pieces[0]) != num_outputs:
        raise UnsupportedError(f"{x.shape[axis]} values do not split into {num_outputs} parts")
    return [Symbol(*parts, x.softmax) for parts in zip(*pieces, strict=True)]


@operator("Slice")
def _slice(reader, x, *bounds, starts=None, ends=None, axes=None, steps=None):
    given = [None if value is None else whole_numbers(value) for value in bounds] + [None] * (4 - len(bounds))
    starts, ends, axes, steps = (
        own if own is not None else other for own, other in zip(given, (starts, ends, axes, steps), strict=True)
    )
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = torch.tensor(range(x.shape[axis])[slice(*_bounds(start, end, step, x.shape[axis]))], dtype=torch.int64)
        x = x.view(lambda part, axis=axis, chosen=chosen: part.index_select(axis, chosen))
    return x


def _bounds(start: int, end: int, step: int, size: int) -> tuple[int, int | None, int]:
    """ONNX cuts bounds to the axis; an end before its beginning, with a negative step, is Python's None."""
    if step < 0 and end < -size:
        return start, None, step
    return start, end, step


@operator("Gather")
def _gather(reader, x, indices, axis=0):
    if not isinstance(x, Symbol) or isinstance(indices, Symbol):
        raise UnsupportedError(f"a row is chosen by the input, as an embedding does: {EMBEDDING}")
    size, axis = x.shape[axis], axis % len(x.shape)
    if not bool(((indices >= -size) & (indices < size)).all()):
        raise UnsupportedError(f"an index is not among {size}")
    flat = indices.reshape(-1).to(torch.int64) % size
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.view(lambda part: part.index_select(axis, flat).reshape(shape))


@operator("ReverseSequence")
def _reverse_sequence(reader, x, lengths, batch_axis=1, time_axis=0):
    order = torch.arange(x.shape[time_axis]).expand(x.shape[batch_axis], -1).clone()
    for row, length in zip(order, whole_numbers(lengths), strict=True):
        row[:length] = row[:length].flip(0)

    def reverse(part: Tensor) -> Tensor:
        moved = part.movedim((batch_axis, time_axis), (0, 1))
        return moved[torch.arange(len(order))[:, None], order].movedim((0, 1), (batch_axis, time_axis))

    return x.view(reverse)


@operator("Expand")
def _expand(reader, x, shape):
    full = torch.broadcast_shapes(tuple(whole_numbers(shape)), x.shape)
    return x.view(lambda part: part.expand(full))


@operator("Where")
def _where(reader, condition, x, y):
    if isinstance(condition, Symbol):
        raise UnsupportedError("what is chosen must not depend on the input")
    return join(lambda parts: torch.where(condition, *parts), [symbol(x), symbol(y)])


@operator("Pad")
def _pad(reader, x, pads_input=None, value=None, axes=None, pads=None, mode="constant", **attributes):
    if mode != "constant" or axes is not None:
        raise UnsupportedError("only padding of all axes by a constant is supported")
    pads = whole_numbers(pads_input) if pads_input is not None else pads
    filled = fixed_number(value) if value is not None else attributes.get("value", 0.0)
    widths = [
        width
        for pair in reversed(list(zip(pads[: len(pads) // 2], pads[len(pads) // 2 :], strict=True)))
        for width in pair
    ]
    parts = zip((x.ids, x.scale, x.shift), (-1, 0.0, filled), strict=True)
    return Symbol(*(F.pad(part, widths, value=fill) for part, fill in parts))


def _reduction(name: str) -> Handler:
    def handler(reader, x, axes_input=None, axes=None, keepdims=1, noop_with_empty_axes=0):
        chosen = whole_numbers(axes_input) if axes_input is not None else axes
        if not chosen and noop_with_empty_axes:
            return x
        return getattr(reader.builder, name)(x, chosen or (), bool(keepdims))

    return handler


OPERATORS["ReduceMean"], OPERATORS["ReduceSum"] = _reduction("mean"), _reduction("sum")
