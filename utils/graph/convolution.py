"""Convolutions as nodes, without the matrices that they are: images go through ``conv2d``, coefficients through its
transpose.

An image of c channels is a vector of its c * h * w values, in that order, as of any other node. A convolution over one
axis is one over images of height 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .nodes import Along, Bounds, Chain, Frame, Interval, Linear, Node
from .sums import apply_rows, sum_length

MAX_MATRIX = 1 << 27  # entries of one weight matrix, where something needs it
PART_NUMBERS = 1 << 20  # of one sample's windows that are worked on at once
SMALL_MATRIX = 1 << 20  # entries of a matrix whose spectral norm is bounded as such

Shape = tuple[int, int, int]  # channels, height, width
Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """How windows slide over a large image: one for every place of a small one.

    ``pads`` are the zeros to the left, the right, above and below, as ``F.pad`` takes them.
    """

    large: Shape
    small: Shape
    stride: Pair = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def correlate(self, images: Tensor, weight: Tensor) -> Tensor:
        """From large images, (N, size), to small ones: weight is (small channels, large channels / groups, k, k)."""
        images = images.reshape(-1, *self.large)
        padding, even = self._padding
        if not even:
            images = F.pad(images, self.pads)
        found = F.conv2d(images, weight, None, self.stride, padding, self.dilation, self.groups)
        _, height, width = self.small
        return found[..., :height, :width].flatten(1)

    def spread(self, images: Tensor, weight: Tensor) -> Tensor:
        """From small images to large ones, by the transpose of ``correlate``."""
        images = images.reshape(-1, *self.small)
        padding, even = self._padding
        left, right, top, bottom = self.pads
        extra = []
        for axis, pads in ((0, top + bottom), (1, left + right)):
            reach = (weight.shape[2 + axis] - 1) * self.dilation[axis] + 1
            extra.append(self.large[1 + axis] + pads - (self.small[1 + axis] - 1) * self.stride[axis] - reach)
        found = F.conv_transpose2d(images, weight, None, self.stride, padding, extra, self.groups, self.dilation)
        if not even:
            found = found[..., top : top + self.large[1], left : left + self.large[2]]
        return found.flatten(1)

    @property
    def _padding(self) -> tuple[Pair, bool]:
        """The padding of torch's functions, and whether it is all there is: the same at both ends."""
        left, right, top, bottom = self.pads
        return ((top, left), True) if (left, top) == (right, bottom) else ((0, 0), False)


def size_of(shape: Shape) -> int:
    return shape[0] * shape[1] * shape[2]


class Convolution(Node):
    """``W parent + bias`` for the W of windows that share their weight, or for its transpose.

    Args:
        weight: (channels of the small image, channels of the large one / groups, height, width), as torch has it of
            either.
        bias: (size,), of each value: what normalisation shifts before a padding is no number a channel.
        bias_size: (size,), as in ``Linear``.
    """

    meets_frames = True

    def __init__(
        self,
        parent: Node,
        weight: Tensor,
        bias: Tensor,
        windows: Windows,
        transposed: bool = False,
        bias_size: Tensor | None = None,
    ):
        super().__init__(bias.shape[0], (parent,))
        self.weight, self.bias, self.windows, self.transposed = weight, bias, windows, transposed
        self.bias_size = (bias if bias_size is None else bias_size).detach().abs()
        self._spectral: Tensor | None = None

    @property
    def in_shape(self) -> Shape:
        return self.windows.small if self.transposed else self.windows.large

    @property
    def out_shape(self) -> Shape:
        return self.windows.large if self.transposed else self.windows.small

    def detach(self) -> None:
        self.weight, self.bias = self.weight.detach(), self.bias.detach()

    def apply(self, images: Tensor, weight: Tensor | None = None) -> Tensor:
        """W times vectors, (N, parent size)."""
        through = self.windows.spread if self.transposed else self.windows.correlate
        return through(images, self.weight if weight is None else weight)

    def adjoint(self, images: Tensor, weight: Tensor | None = None) -> Tensor:
        """W^T times vectors, (N, size)."""
        through = self.windows.correlate if self.transposed else self.windows.spread
        return through(images, self.weight if weight is None else weight)

    def value(self, parent: Tensor) -> Tensor:
        return self.apply(parent) + self.bias

    def absolute(self, sizes: Tensor) -> Tensor:
        """|W| times vectors."""
        return self.apply(sizes, self.weight.abs())

    def term_sizes(self, parent: Tensor, own: bool = True) -> Tensor:
        total = self.apply(parent, self.weight.detach().abs())
        return total + self.bias_size if own else total

    @property
    def longest_sum(self) -> int:
        """Terms of the longest sum of either direction."""
        taps = self.weight.shape[2] * self.weight.shape[3]
        terms = taps * max(self.windows.large[0], self.windows.small[0]) // self.windows.groups + 1
        sides = max(sum(self.windows.large), sum(self.windows.small))  # of sums over windows, axis by axis
        return max(terms, sides, sum_length(self.size), sum_length(self.parents[0].size))

    @property
    def work(self) -> int:
        """Multiplications of either direction."""
        return self.weight.numel() * self.windows.small[1] * self.windows.small[2]

    # --- bounds ---

    def offset(self, bounds: Bounds) -> Tensor:
        """Bias plus what an exact parent or the centre of a perturbed frame contributes, (batch or 1, size)."""
        known = bounds.known_part(self.parents[0])
        return self.bias[None] if known is None else self.value(known)

    def interval(self, bounds: Bounds) -> Interval:
        (parent,) = self.parents
        center = bounds.offset(self)
        if isinstance(parent, Frame):
            below, above = bounds.map_reach(parent, self)
            return center - below, center + above
        low, high = bounds.interval(parent)
        center = center + self.apply(0.5 * (low + high))
        radius = self.absolute(0.5 * (high - low))
        return center - radius, center + radius

    @property
    def has_taps(self) -> bool:
        """Whether every value meets one window of the parent's images, of all channels."""
        return not self.transposed and self.windows.groups == 1

    def reach_by_taps(self, deviation: Callable[..., Tensor]) -> Interval:
        """Most that each value can fall and rise, (batch, size) each, where a set takes rows of windows.

        ``deviation`` gives how far rows (..., channels, taps) can fall, see ``CutBalls.window_deviation``.
        """
        channels, taps = self.windows.large[0], self.weight.shape[2] * self.weight.shape[3]
        size = max(1, PART_NUMBERS // (channels * taps * self.windows.small[1] * self.windows.small[2]))

        def windows(vectors: Tensor) -> Tensor:
            return self._taps(vectors).unsqueeze(2)

        def falls(weight: Tensor) -> Tensor:
            rows = weight.reshape(-1, channels, taps)
            found = torch.cat([deviation(part[None, None], windows) for part in rows.split(size)], dim=-1)
            return found.mT.flatten(1)

        return falls(self.weight), falls(-self.weight)

    def _taps(self, vectors: Tensor) -> Tensor:
        """What each place's window holds of images, (N, size) to (N, places, channels, taps), 0 outside of them."""
        images = F.pad(vectors.reshape(-1, *self.windows.large), self.windows.pads)
        for axis, (step, gap) in enumerate(zip(self.windows.stride, self.windows.dilation, strict=True)):
            reach = (self.weight.shape[2 + axis] - 1) * gap + 1
            images = images.unfold(2 + axis, reach, step)[..., ::gap]
        _, height, width = self.windows.small
        found = images[:, :, :height, :width]  # (N, channels, height, width, rows of taps, columns of taps)
        return found.permute(0, 2, 3, 1, 4, 5).reshape(len(images), height * width, images.shape[1], -1)

    def backward(self, coefficients: Tensor, bounds: Bounds) -> Tensor:
        (parent,) = self.parents
        if not bounds.is_exact(parent):
            passed = self.adjoint(coefficients.flatten(0, 1))
            bounds.pass_to(parent, passed.unflatten(0, coefficients.shape[:2]))
        return apply_rows(coefficients, bounds.offset(self))

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        chain.linear(self.parents[0], adjoint, self.matrix())

    def tangent(self, along: Along) -> Node:
        zero = torch.zeros_like(self.bias)
        return Convolution(along.of(self.parents[0]), self.weight, zero, self.windows, self.transposed)

    # --- norms and matrices ---

    def row_norms(self, norm: float) -> Tensor:
        """Dual l_p norms of the rows of W, (size,): the most that each value changes per unit of the parent's."""
        ones = self.weight.new_ones(1, size_of(self.in_shape))
        if norm == 2.0:
            return self.apply(ones, self.weight**2).squeeze(0).sqrt()
        return self._largest() if norm == 1.0 else self.absolute(ones).squeeze(0)

    def _largest(self) -> Tensor:
        """Greatest absolute value in each row: tap by tap, as padding is no tap."""
        groups = self.windows.groups
        if self.transposed:
            largest = self.weight.abs().unflatten(0, (groups, -1)).amax(dim=1)
        else:
            largest = self.weight.abs().amax(dim=1, keepdim=True)
        large, small = ((groups, *self.windows.large[1:]), self.windows.small)
        if self.transposed:
            large, small = self.windows.large, (groups, *self.windows.small[1:])
        windows = replace(self.windows, large=large, small=small)
        through = windows.spread if self.transposed else windows.correlate
        ones = self.weight.new_ones(1, size_of(small if self.transposed else large))
        found = None
        for row in range(largest.shape[2]):
            for column in range(largest.shape[3]):
                tap = torch.zeros_like(largest)
                tap[:, :, row, column] = largest[:, :, row, column]
                values = through(ones, tap).squeeze(0)
                found = values if found is None else torch.maximum(found, values)
        return found

    def ball_radius(self, norm: Callable[[Tensor], Tensor], radius: Tensor) -> Tensor:
        return self.spectral_bound(norm) * radius

    def spectral_bound(self, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Upper bound of ||W||_2: of the matrix if that is small, else (||W||_1 ||W||_inf)^(1/2)."""
        if self.weight.requires_grad:
            return self._norm_by_sums()
        if self._spectral is None:
            small = self.size * self.parents[0].size <= SMALL_MATRIX
            self._spectral = norm(self.matrix()) if small else self._norm_by_sums()
        return self._spectral

    def _norm_by_sums(self) -> Tensor:
        rows = self.absolute(self.weight.new_ones(1, size_of(self.in_shape))).amax()
        columns = self.adjoint(self.weight.new_ones(1, self.size), self.weight.abs()).amax()
        room = 1.0 + (self.longest_sum + 16) * torch.finfo(rows.dtype).eps  # for the rounding of the sums
        return room * (rows * columns).sqrt()

    def matrix(self) -> Tensor:
        """W, (size, parent size). Raises ValueError where that is too large to be kept."""
        size = self.parents[0].size
        if size * self.size > MAX_MATRIX:
            raise ValueError(
                f"this method needs the matrix of a convolution from {size} to {self.size} values, which is too large: "
                "take crown, crown-ibp, ibp or alpha"
            )
        return self.apply(torch.eye(size, dtype=self.weight.dtype, device=self.weight.device)).T.contiguous()

    def as_linear(self) -> Linear:
        return Linear(self.parents, (self.matrix(),), self.bias, self.bias_size)
