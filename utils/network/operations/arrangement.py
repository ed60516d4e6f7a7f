"""Linear functions of a tensor's axes, and what only moves or repeats elements."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..symbolic import Symbol, UnsupportedError
from ..trace import OPERATIONS, operation

PADDINGS = ("reflect", "replicate", "circular")
constant_pad = OPERATIONS["pad"]


@operation("pad")
def _pad(builder, x, pad, mode="constant", value=None):
    if mode not in PADDINGS:
        return constant_pad(builder, x, pad, mode, value)
    if not isinstance(x, Symbol):
        raise UnsupportedError("only a tensor that depends on the input is padded")
    # Numbers of elements are whole and below 2 ** 53: as floats they are moved as they are.
    return x.view(lambda part: F.pad(part.double(), pad, mode).to(part.dtype))


@operation("cumsum")
def _cumsum(builder, x, dim, dtype=None):
    size = x.shape[dim]
    moved = x.view(lambda part: part.movedim(dim, -1))
    total = builder.linear(moved, torch.ones(size, size, dtype=torch.float64).tril())
    return total.view(lambda part: part.movedim(-1, dim))


@operation("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
def _interpolate(builder, x, *args, **kwargs):
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return builder.linear_map(x, lambda part: F.interpolate(part, *args, **kwargs))


@operation("unfold", "im2col")
def _unfold(builder, x, *args, **kwargs):
    """Windows along an axis of a tensor, or, of images, as columns."""
    if len(args) == 3 and not kwargs and all(isinstance(value, int) for value in args):
        return x.view(lambda part: part.unfold(*args))
    return builder.linear_map(x, lambda part: F.unfold(part, *args, **kwargs))


@operation("pixel_shuffle")
def _pixel_shuffle(builder, x, upscale_factor):
    return x.view(lambda part: F.pixel_shuffle(part, upscale_factor))


@operation("pixel_unshuffle")
def _pixel_unshuffle(builder, x, downscale_factor):
    return x.view(lambda part: F.pixel_unshuffle(part, downscale_factor))


@operation("channel_shuffle")
def _channel_shuffle(builder, x, groups):
    return x.view(lambda part: part.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2))


@operation("tensordot")
def _tensordot(builder, x, y, dims=2, out=None):
    """Of one tensor that depends on the input and a constant; no axis of the batch is summed over."""
    if isinstance(x, Symbol) and isinstance(y, Symbol):
        raise UnsupportedError("a product of two tensors that both depend on the input has no bound here")
    own, other = (x, y) if isinstance(x, Symbol) else (y, x)
    count, other = len(own.shape), other.to("cpu", torch.float64)
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = list(range(-dims, 0)), list(range(dims))
    of_x, of_y = ([one] if isinstance(one, int) else list(one) for one in dims)
    if 0 in [axis % count for axis in (of_x if own is x else of_y)]:
        raise UnsupportedError("it mixes the samples of a batch")
    if own is x:
        return builder.linear_map(x, lambda part: torch.tensordot(part, other, (of_x, of_y)))
    place = other.dim() - len(of_x)  # of the batch in the result
    made = builder.linear_map(y, lambda part: torch.tensordot(other, part, (of_x, of_y)).movedim(place, 0))
    return made.view(lambda part: part.movedim(0, place))


@operation("einsum")
def _einsum(builder, equation, *operands):
    """Of one tensor that depends on the input and constants, where the batch is the first axis of what comes out."""
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    terms, arrow, result = equation.replace(" ", "").partition("->")
    names, places = terms.split(","), [k for k, one in enumerate(operands) if isinstance(one, Symbol)]
    if len(places) != 1:
        raise UnsupportedError("a product of two tensors that both depend on the input has no bound here")
    (place,) = places
    batch = names[place][:1]
    others = "".join(name for k, name in enumerate(names) if k != place)
    if not arrow or "." in equation or not result.startswith(batch) or batch in others:
        raise UnsupportedError("einsum is supported with the batch as the first axis of its result, and written ->")
    constants = [one.to("cpu", torch.float64) if isinstance(one, Tensor) else one for one in operands]

    def function(part: Tensor) -> Tensor:
        return torch.einsum(equation, *[part if k == place else one for k, one in enumerate(constants)])

    return builder.linear_map(operands[place], function)
