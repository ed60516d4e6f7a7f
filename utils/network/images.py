"""Layers over images as nodes: convolutions and pooling of symbols, (batch, channels, length) or (..., height, width).

``utils.network.trace`` and the operators of ONNX files both come here, with padding as ``F.pad`` takes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph.convolution import Windows
from ..graph.picks import Slice
from ..graph.pooling import Maximum, Pick
from .symbolic import DTYPE, Builder, Symbol, UnsupportedError, check_scores, constant


def convolve(
    builder: Builder,
    x: Symbol,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Symbol:
    """Over one or two axes; the numbers are one an axis, of ``pads`` two, the last axis first."""
    rank = len(stride)
    image, weight, (stride, dilation), pads = _as_images(x, weight, (stride, dilation), pads)
    channels, height, width = image.shape[1:]
    if weight.shape[1] * groups != channels or weight.shape[0] % groups:
        raise UnsupportedError(f"a weight of shape {tuple(weight.shape)} does not fit {channels} channels")
    places = []
    for axis, size in enumerate((height + pads[2] + pads[3], width + pads[0] + pads[1])):
        places.append((size - (weight.shape[2 + axis] - 1) * dilation[axis] - 1) // stride[axis] + 1)
    if min(places) < 1 or min(pads) < 0:
        raise UnsupportedError("the windows do not fit the image")
    windows = Windows((channels, height, width), (len(weight), *places), stride, pads, dilation, groups)
    return _squeezed(builder.alike(image, lambda own: builder.convolution(own, weight, bias, windows)), rank)


def convolve_transposed(
    builder: Builder,
    x: Symbol,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Symbol:
    """The transpose of ``convolve``."""
    rank = len(stride)
    pads = [width for size in reversed(padding) for width in (size, size)]
    image, weight, (stride, dilation), pads = _as_images(x, weight, (stride, dilation), pads)
    extra = (0,) * (2 - rank) + tuple(output_padding)
    large = [
        (image.shape[2 + axis] - 1) * stride[axis]
        + (weight.shape[2 + axis] - 1) * dilation[axis]
        + 1
        + extra[axis]
        - around
        for axis, around in enumerate((pads[2] + pads[3], pads[0] + pads[1]))
    ]
    shape = (weight.shape[1] * groups, *large)
    windows = Windows(shape, tuple(image.shape[1:]), stride, pads, dilation, groups)
    made = builder.alike(image, lambda own: builder.convolution(own, weight, bias, windows, transposed=True))
    return _squeezed(made, rank)


def average_pool(
    builder: Builder,
    x: Symbol,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Symbol:
    """The sums of windows, as a convolution of every channel by itself, over as many values as torch divides by.

    Padding is the same at both ends of an axis.
    """
    rank = len(kernel)
    padding = tuple(pads[0::2])[::-1]
    function = (F.avg_pool1d, F.avg_pool2d)[rank - 1]
    options = {} if divisor is None else {"divisor_override": divisor}
    ones = torch.ones(1, 1, *x.shape[2:], dtype=DTYPE)
    means = function(ones, tuple(kernel), tuple(stride), padding, ceil_mode, count_include_pad, **options)
    padded = [max(0, width) for width in _grown(x.shape[2:], kernel, stride, pads, means.shape[2:])]
    window = torch.ones(1, 1, *kernel, dtype=DTYPE)
    count = (F.conv1d, F.conv2d)[rank - 1](F.pad(ones, padded), window, stride=tuple(stride))
    shares = means / count  # every window of torch's holds a value
    return _windows_summed(builder, x, window, shares, stride, padded, [1] * rank)


def average_of_windows(
    builder: Builder,
    x: Symbol,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    places: Sequence[int],
    count_include_pad: bool,
) -> Symbol:
    """The mean of windows at ``places``, a number an axis; values beyond the padding never count, it does if asked."""
    rank = len(kernel)
    reaches = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    padded = [max(0, width) for width in _grown(x.shape[2:], reaches, stride, pads, places)]
    counted = F.pad(torch.ones(1, 1, *x.shape[2:], dtype=DTYPE), tuple(pads), value=float(count_include_pad))
    counted = F.pad(counted, [max(0, width - known) for width, known in zip(padded, pads, strict=True)])
    window, how = torch.ones(1, 1, *kernel, dtype=DTYPE), {"stride": tuple(stride), "dilation": tuple(dilation)}
    shares = 1.0 / (F.conv1d, F.conv2d)[rank - 1](counted, window, **how)
    if not bool(shares.isfinite().all()):
        raise UnsupportedError("a window of the pooling lies outside the image")
    return _windows_summed(builder, x, window, shares, stride, padded, dilation)


def _windows_summed(
    builder: Builder,
    x: Symbol,
    window: Tensor,
    shares: Tensor,
    stride: Sequence[int],
    padded: Sequence[int],
    dilation: Sequence[int],
) -> Symbol:
    """The sum of every window of each channel times its share, (1, 1, *places)."""
    channels, same = x.shape[1], bool((shares == shares.flatten()[0]).all())
    weight = window.expand(channels, *window.shape[1:]) * (shares.flatten()[0] if same else 1.0)
    sums = convolve(builder, x, weight, None, stride, padded, dilation, channels)
    return sums if same else builder.scaled(sums, constant(shares))


def max_pool(
    builder: Builder,
    x: Symbol,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    places: Sequence[int],
) -> Symbol:
    """The maximum of windows at ``places``, a number an axis; what lies outside the image does not count."""
    check_scores(x)
    taps, present = _taps(tuple(x.shape[1:]), kernel, stride, pads, dilation, places)
    return builder.alike(x, lambda own: _greatest(builder, own, taps, present, places))


def _greatest(builder: Builder, x: Symbol, taps: Tensor, present: Tensor, places: Sequence[int]) -> Symbol:
    """The greatest of the values at each of the taps, (taps, values), of those that are present."""
    picked = builder.graph.add(Pick(builder.image_node(x), taps.flatten()))
    size = taps.shape[1]
    parts = tuple(builder.graph.add(Slice(picked, k * size, size)) for k in range(len(taps)))
    found = builder.symbol(builder.graph.add(Maximum(parts, present)), torch.arange(x.shape[0]))
    return found.view(lambda part: part.reshape(x.shape[0], x.shape[1], *places))


def _taps(shape, kernel, stride, pads, dilation, places) -> tuple[Tensor, Tensor]:
    """Where each tap of the windows finds its value, (taps, values), in padding another one's; which are present."""
    reaches = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    padded = _grown(shape[1:], reaches, stride, pads, places)
    taps = F.pad(torch.arange(math.prod(shape)).reshape(shape), padded, value=-1)
    for axis, (reach, step, gap) in enumerate(zip(reaches, stride, dilation, strict=True), start=1):
        taps = taps.unfold(axis, reach, step)[..., ::gap]
    taps = taps.reshape(shape[0] * math.prod(places), -1).T  # (taps, values)
    present = taps >= 0
    if not bool(present.any(dim=0).all()):
        raise UnsupportedError("a window of the pooling lies outside the image")
    first = taps.gather(0, present.int().argmax(dim=0, keepdim=True))
    return torch.where(present, taps, first), present


def _grown(sizes, reaches, stride, pads, places) -> list[int]:
    """Pads with more at the end of every axis, or less, so that windows stand at just these places."""
    rank, grown = len(reaches), list(pads)
    for axis in range(rank):
        first = 2 * (rank - 1 - axis)
        grown[first + 1] = (places[axis] - 1) * stride[axis] + reaches[axis] - sizes[axis] - pads[first]
    return grown


def _as_images(x: Symbol, weight: Tensor, numbers, pads):
    """Everything for two axes: an image of height 1 where there is one axis."""
    weight = weight.to("cpu", DTYPE)
    if weight.dim() == 4:
        return x, weight, tuple(tuple(own) for own in numbers), tuple(pads)
    image = x.view(lambda part: part.unsqueeze(2))
    return image, weight.unsqueeze(2), tuple((1, *own) for own in numbers), (*pads, 0, 0)


def _squeezed(y: Symbol, rank: int) -> Symbol:
    return y if rank == 2 else y.view(lambda part: part.squeeze(2))
