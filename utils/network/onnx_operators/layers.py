"""ONNX's linear layers: matrix products, convolutions, pooling by the mean, normalisation by known statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...graph.convolution import MAX_MATRIX
from .. import images
from ..operations import attention, norms
from ..symbolic import Symbol, UnsupportedError, constant, join
from .table import Value, operator, symbol

CHANNEL_OPSET = 21  # before, GroupNormalization had a scale and a bias for each group


def check_weights(*values: Value | None) -> None:
    if any(isinstance(value, Symbol) for value in values):
        raise UnsupportedError("a product of two tensors that both depend on the input has no bound here")


@operator("MatMul")
def _matmul(reader, x, y):
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.double() @ y.double()
    if isinstance(x, Symbol) and isinstance(y, Symbol):
        return _perturbed_product(reader, x, y)
    if isinstance(x, Symbol):
        if y.dim() < 3:
            weight = y[None] if y.dim() == 1 else y.mT
            return reader.builder.linear(x, weight).view(lambda part: part.squeeze(-1) if y.dim() == 1 else part)
        row = len(x.shape) == 1
        product = _matrix_product(reader, y.mT, x.view(lambda part: (part[None] if row else part).mT))
        return product.view(lambda part: part.squeeze(-1) if row else part.mT)
    matrix = x[None] if x.dim() == 1 else x
    column = len(y.shape) == 1
    product = _matrix_product(reader, matrix, y.view(lambda part: part[:, None] if column else part))
    product = product.view(lambda part: part.squeeze(-1) if column else part)
    return product.view(lambda part: part.squeeze(-1 if column else -2) if x.dim() == 1 else part)


def _perturbed_product(reader, x: Symbol, y: Symbol) -> Symbol:
    """Of two tensors that both depend on the input, by an axis of one sample before all others."""
    row, column = len(x.shape) == 1, len(y.shape) == 1
    x, y = x.view(lambda part: part[None] if row else part), y.view(lambda part: part[:, None] if column else part)
    rank = max(len(x.shape), len(y.shape))
    x, y = (one.view(lambda part: part[(None,) * (1 + rank - part.dim())]) for one in (x, y))
    product = attention.product(reader.builder, x, y).view(lambda part: part[0])
    product = product.view(lambda part: part.squeeze(-1) if column else part)
    return product.view(lambda part: part.squeeze(-1 if column else -2) if row else part)


def _matrix_product(reader, weight: Tensor, x: Symbol) -> Symbol:
    """weight (..., m, k) times x (..., k, n); the stacks of both broadcast."""
    stack = torch.broadcast_shapes(weight.shape[:-2], x.shape[:-2])
    if weight.shape[:-2].numel() == 1:
        factor = weight.reshape(weight.shape[-2:])
        wide = x.view(lambda part: part.expand(*stack, *part.shape[-2:]).mT)
        return reader.builder.linear(wide, factor).view(lambda part: part.mT)
    weight = weight.expand(*stack, *weight.shape[-2:]).reshape(-1, *weight.shape[-2:])
    rows = x.view(lambda part: part.expand(*stack, *part.shape[-2:]).reshape(-1, *part.shape[-2:]).mT)
    parts = [reader.builder.linear(rows.view(lambda p, k=k: p[k]), factor) for k, factor in enumerate(weight)]
    return join(torch.stack, parts).view(lambda part: part.mT.reshape(*stack, *part.mT.shape[-2:]))


@operator("Gemm")
def _gemm(reader, a, b, c=None, alpha=1.0, beta=1.0, transA=0, transB=0):
    def turned(value: Value, turn: int) -> Value:
        if not turn:
            return value
        return value.view(lambda part: part.T) if isinstance(value, Symbol) else value.T

    product = reader.builder.scaled(symbol(_matmul(reader, turned(a, transA), turned(b, transB))), constant(alpha))
    if c is None:
        return product
    return reader.builder.add(product, reader.builder.scaled(symbol(c), constant(beta)))


def _conv_padding(x: Symbol, kernel, strides, dilations, pads, auto_pad: str) -> list[int]:
    """Widths for ``F.pad``, last axis first."""
    rank = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * (2 * rank)
        for axis in range(rank):
            size, reach = x.shape[2 + axis], (kernel[axis] - 1) * dilations[axis] + 1
            total = max((-(-size // strides[axis]) - 1) * strides[axis] + reach - size, 0)
            small = total // 2
            ends = (small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small)
            pads[axis], pads[rank + axis] = ends
    elif auto_pad == "VALID" or pads is None:
        pads = [0] * (2 * rank)
    return [pads[end + axis] for axis in reversed(range(rank)) for end in (0, rank)]


@operator("Conv")
def _conv(
    reader, x, weight, bias=None, auto_pad="NOTSET", dilations=None, group=1, pads=None, strides=None, **attributes
):
    check_weights(weight, bias)
    rank = weight.dim() - 2
    if rank not in (1, 2, 3):
        raise UnsupportedError(f"a convolution over {rank} axes is not supported")
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    padding = _conv_padding(x, weight.shape[2:], strides, dilations, pads, auto_pad)
    if rank < 3:
        return images.convolve(reader.builder, x, weight, bias, strides, padding, dilations, group)
    matrix = _conv_matrix(x.shape[1:], weight.double(), padding, strides, dilations, group)
    if bias is not None:
        bias = bias.repeat_interleave(matrix[0, ..., 0].numel())
    y = reader.builder.linear(x.view(lambda part: part.flatten(1)), matrix.flatten(0, -2), bias)
    return y.view(lambda part: part.reshape(-1, *matrix.shape[:-1]))


def _conv_matrix(shape: torch.Size, weight: Tensor, padding, strides, dilations, group: int) -> Tensor:
    """The matrix, (*outputs, inputs), of a convolution over inputs of a shape (channels, ...)."""
    taps = F.pad(torch.arange(shape.numel()).reshape(shape), padding, value=-1)  # numbers of the inputs
    for axis, (size, stride, dilation) in enumerate(zip(weight.shape[2:], strides, dilations, strict=True), start=1):
        taps = taps.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    places = taps.shape[1 : len(shape)]  # (channels, *places, *kernel)
    if len(weight) * places.numel() * shape.numel() > MAX_MATRIX:
        raise UnsupportedError(f"a convolution of {shape.numel()} values is too large for its matrix to be kept")
    taps = taps.unflatten(0, (group, -1)).movedim(1, len(shape)).reshape(group, 1, places.numel(), -1)
    factors = weight.reshape(group, len(weight) // group, 1, -1)
    matrix = torch.zeros(group, len(weight) // group, places.numel(), shape.numel(), dtype=weight.dtype)
    full = torch.broadcast_shapes(taps.shape, factors.shape)
    factors = torch.where(taps < 0, 0.0, factors.expand(full))  # of padding, which is 0
    matrix.scatter_add_(3, taps.clamp(min=0).expand(full), factors)
    return matrix.reshape(len(weight), *places, shape.numel())


@operator("AveragePool")
def _average_pool(
    reader,
    x,
    kernel_shape,
    auto_pad="NOTSET",
    dilations=None,
    pads=None,
    strides=None,
    ceil_mode=0,
    count_include_pad=0,
):
    rank = len(kernel_shape)
    if rank not in (1, 2):
        raise UnsupportedError(f"average pooling over {rank} axes is not supported")
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    padding = _conv_padding(x, kernel_shape, strides, dilations, pads, auto_pad)
    places = _window_places(x, kernel_shape, strides, dilations, padding, ceil_mode)
    return images.average_of_windows(
        reader.builder, x, kernel_shape, strides, padding, dilations, places, bool(count_include_pad)
    )


@operator("MaxPool")
def _max_pool(
    reader, x, kernel_shape, auto_pad="NOTSET", dilations=None, pads=None, strides=None, ceil_mode=0, **attributes
):
    rank = len(kernel_shape)
    if rank not in (1, 2) or len(reader.node.output) > 1:
        raise UnsupportedError("max pooling is supported over one or two axes, without the places of the greatest")
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    padding = _conv_padding(x, kernel_shape, strides, dilations, pads, auto_pad)
    places = _window_places(x, kernel_shape, strides, dilations, padding, ceil_mode)
    return images.max_pool(reader.builder, x, kernel_shape, strides, padding, dilations, places)


def _window_places(x: Symbol, kernel, strides, dilations, padding: list[int], ceil_mode: int) -> list[int]:
    """How many windows there are along each axis."""
    rank, places = len(kernel), []
    for axis in range(rank):
        first = 2 * (rank - 1 - axis)
        begin, end = padding[first : first + 2]
        room = x.shape[2 + axis] + begin + end - (kernel[axis] - 1) * dilations[axis] - 1
        count = (-(-room // strides[axis]) if ceil_mode else room // strides[axis]) + 1
        if ceil_mode and (count - 1) * strides[axis] >= x.shape[2 + axis] + begin:
            count -= 1  # no window begins in the padding at the end
        places.append(count)
    return places


@operator("GlobalAveragePool")
def _global_average_pool(reader, x):
    return reader.builder.mean(x, range(2, len(x.shape)), keepdim=True)


@operator("LayerNormalization")
def _layer_norm(reader, x, scale, bias=None, axis=-1, epsilon=1e-5, stash_type=1):
    x, axis = symbol(x), axis % len(x.shape)
    result = _weighted(reader, _normalised(reader, x, x.shape[:axis].numel(), epsilon), scale, bias)
    if len(reader.node.output) == 1:
        return result
    shape = [1 if place >= axis else size for place, size in enumerate(x.shape)]
    rows = x.view(lambda part: part.reshape(1, x.shape[:axis].numel(), -1))
    inverse = reader.builder.activation(norms.var(reader.builder, rows, 2, False), f"rsqrt({float(epsilon)!r})")
    mean = reader.builder.mean(rows, (2,))
    return result, *(part.view(lambda values: values.reshape(shape)) for part in (mean, inverse))


@operator("RMSNormalization")
def _rms_norm(reader, x, scale, axis=-1, epsilon=1e-5, stash_type=1):
    rows = x.shape[: axis % len(x.shape)].numel()
    return _weighted(reader, _normalised(reader, x, rows, epsilon, centre=False), scale, None)


@operator("InstanceNormalization")
def _instance_norm(reader, x, scale, bias, epsilon=1e-5):
    return _weighted(reader, _normalised(reader, x, x.shape[:2].numel(), epsilon), *_by_channel(x, scale, bias))


@operator("GroupNormalization")
def _group_norm(reader, x, scale, bias, num_groups, epsilon=1e-5, stash_type=1):
    if len(scale.shape) != 1 or isinstance(scale, Symbol) or isinstance(bias, Symbol):
        raise UnsupportedError("GroupNormalization is supported with a constant scale and bias")
    if reader.opsets[""] < CHANNEL_OPSET:
        scale, bias = (value.repeat_interleave(x.shape[1] // num_groups) for value in (scale, bias))
    rows = x.shape[0] * num_groups
    return _weighted(reader, _normalised(reader, x, rows, epsilon), *_by_channel(x, scale, bias))


def _normalised(reader, x: Value, rows: int, epsilon: float, centre: bool = True) -> Symbol:
    """Each of so many equal parts of x, one after the other, by its own mean and deviation."""
    x = symbol(x)
    parts = x.view(lambda part: part.reshape(1, rows, -1))
    made = attention.normalised(reader.builder, parts, epsilon, centre)
    return made.view(lambda part: part.reshape(x.shape))


def _by_channel(x: Value, *values: Value) -> list[Value]:
    """Values of the channels, the second axis of x, as they broadcast to x."""
    shape = (-1, *[1] * (len(x.shape) - 2))
    return [v.view(lambda part: part.reshape(shape)) if isinstance(v, Symbol) else v.reshape(shape) for v in values]


def _weighted(reader, x: Symbol, scale: Value, bias: Value | None) -> Symbol:
    x = reader.builder.multiply(x, symbol(scale))
    return x if bias is None else reader.builder.add(x, symbol(bias))


@operator("BatchNormalization")
def _batch_norm(reader, x, scale, bias, mean, var, epsilon=1e-5, training_mode=0, **attributes):
    if training_mode or not attributes.get("spatial", 1):
        raise UnsupportedError("it mixes the samples of a batch in training mode: export the model in evaluation mode")
    check_weights(scale, bias, mean, var)
    shape = (-1, *[1] * (len(x.shape) - 2))
    factor = scale.double() / (var.double() + epsilon).sqrt()
    if not bool(factor.isfinite().all()):
        raise UnsupportedError("it divides by a variance that is not above 0")
    shift = bias.double() - mean.double() * factor
    return reader.builder.add(reader.builder.scaled(x, constant(factor.reshape(shape))), constant(shift.reshape(shape)))
