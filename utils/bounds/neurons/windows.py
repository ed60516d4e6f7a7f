"""Rows of single neurons of convolutions: windows in place of images of coefficients.

The row of a neuron meets only what it sees of the image below: a window, which grows with every convolution on the way
down. Through one of kernel k and stride s, a window of side M becomes one of side (M - 1) s + k, by the transpose of
the convolution. Once windows are as large as the image, they are written into images.

A window may reach over the edge of its image, into the padding of the convolution above. What stands there is no
coefficient of anything. It meets zeros in sums and in the slopes of planes, and is struck out before a convolution
passes it on, and before it meets a ball.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...graph.convolution import Convolution, Shape
from ...graph.nodes import Bounds, Frame, Linear, Node, WeightedSum
from ...graph.nonlinear import Activation
from ...graph.picks import Concat
from ...graph.sums import BLOCK
from ...perturbation.lp_ball import dual_norm

MOSTLY_ZEROS = 10.0  # entries of a matrix for every one that is not zero, from which on convolutions are faster
MATRIX_ENTRIES = 2**22
BYTES = 2**22  # of the largest windows that are worked on at once; a dozen such blocks exist for a moment


@dataclass
class Windows:
    """Coefficients of the rows of P neurons and of minus these, (2, P, channels, height, width), over a node's image.

    ``top`` and ``left``, (places,), are where the windows of all neurons at a place of a sample begin in the image,
    perhaps before it; None if each window is the image. ``inside`` says that what stands outside of it is zero.
    """

    values: Tensor
    top: Tensor | None
    left: Tensor | None
    inside: bool = False


def fits(bounds: Bounds, node: Node) -> bool:
    """Whether ``WindowPass`` bounds the node: convolutions, activations, sums and one perturbed frame are below it."""
    return follows(node, bounds.is_exact)


def follows(node: Node, is_exact: Callable[[Node], bool] = lambda node: False) -> bool:
    """``fits``, of a graph that no perturbation is known of."""
    if not isinstance(node, (Convolution, WeightedSum, Concat)):
        return False
    shapes = _shapes(node, is_exact)
    moved = [below for below in shapes or () if not is_exact(below)]
    for below in moved:
        if not isinstance(below, (Convolution, Activation, WeightedSum, Concat, Frame)):
            return False
        if isinstance(below, Convolution) and below.transposed:
            return False
    return sum(isinstance(below, Frame) for below in moved) == 1


def image_shape(node: Node) -> Shape | None:
    """Shape of the node's images, of those of the convolutions that it is made of; None if it is made of others."""
    open_nodes, seen = [node], set()
    while open_nodes:
        current = open_nodes.pop()
        if isinstance(current, Convolution):
            _, height, width = current.out_shape
            return _image_of(node, height, width)
        if current not in seen and not isinstance(current, Linear):  # whose values have no places
            seen.add(current)
            open_nodes += current.parents
    return None


class WindowPass:
    """Backward passes from the neurons of one image."""

    def __init__(self, bounds: Bounds, node: Node):
        self.bounds, self.node = bounds, node
        self.shapes = _shapes(node, bounds.is_exact)

    def bound(self, samples: Tensor, neurons: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds, (P,) each, of some neurons of some samples, (P,) each."""
        size = self._at_once()
        parts = [self._bound(*part) for part in zip(samples.split(size), neurons.split(size), strict=True)]
        lower, upper = zip(*parts, strict=True)
        return torch.cat(lower), torch.cat(upper)

    def _at_once(self) -> int:
        """Neurons whose windows take ``BYTES``."""
        largest, sides = 1, {self.node: (1, 1)}
        for node in self._downwards():
            side = sides[node]
            if isinstance(node, Convolution):
                side = tuple(
                    (own - 1) * step + (taps - 1) * gap + 1
                    for own, step, taps, gap in zip(
                        side, node.windows.stride, node.weight.shape[2:], node.windows.dilation, strict=True
                    )
                )
            for parent in node.parents:
                if parent in self.shapes:
                    shape = self.shapes[parent]
                    own = tuple(map(min, side, shape[1:]))
                    sides[parent] = tuple(map(max, sides.get(parent, own), own))
                    largest = max(largest, shape[0] * sides[parent][0] * sides[parent][1])
        itemsize = self.bounds.perturbation.x.dtype.itemsize
        return max(1, BYTES // (2 * itemsize * largest))

    def _downwards(self) -> list[Node]:
        return sorted(self.shapes, key=lambda node: -node.index)

    def _bound(self, samples: Tensor, neurons: Tensor) -> tuple[Tensor, Tensor]:
        self._total, self._pending = 0.0, {}
        self._begin(samples, neurons)
        for node in self._downwards():
            if node in self._pending:
                self._step(node, self._joined(self._pending.pop(node), self.shapes[node]))
        lower, minus_upper = self._total
        if self.bounds.rounding:
            size, error = self.bounds.rounding.of(self.node)
            lost = (error + self.bounds.rounding.gamma_of(self.node) * size).expand(len(self.bounds.perturbation.x), -1)
            lost = lost[samples, neurons]
            lower, minus_upper = lower - lost, minus_upper - lost
        return lower, -minus_upper

    # --- steps ---

    def _begin(self, samples: Tensor, neurons: Tensor) -> None:
        """Of a convolution the kernels, where the neurons have them: it needs no step itself. Else ones."""
        node = self.node
        channels, height, width = self.shapes[node]
        places, self._place = torch.unique(samples * (height * width) + neurons % (height * width), return_inverse=True)
        self._samples, self._place_samples = samples, places // (height * width)
        row, column = places // width % height, places % width
        channel = neurons // (height * width)
        if not isinstance(node, Convolution):
            units = torch.eye(channels, dtype=self.bounds.perturbation.x.dtype, device=samples.device)
            values = units.index_select(0, channel)[:, :, None, None]
            self._pending[node] = [Windows(torch.stack((values, -values)), row, column, True)]
            return
        windows = node.windows
        offset = self.bounds.offset(node)
        offset = offset.expand(len(self.bounds.perturbation.x), -1)[samples, neurons]
        self._total = torch.stack((offset, -offset))
        kernel = _whole_kernel(node).index_select(0, channel)
        top, left = row * windows.stride[0] - windows.pads[2], column * windows.stride[1] - windows.pads[0]
        self._pass_to(node.parents[0], Windows(torch.stack((kernel, -kernel)), top, left))

    def _step(self, node: Node, given: Windows) -> None:
        if isinstance(node, Frame):
            self._meet_frame(node, given)
        elif isinstance(node, Activation):
            self._relax(node, given)
        elif isinstance(node, Convolution):
            self._convolve(node, given)
        elif isinstance(node, WeightedSum):
            for parent, factor in zip(node.parents, node.factors, strict=True):
                if isinstance(factor, Tensor):
                    values = given.values * self._gather(factor.reshape(-1, node.size), node, given)
                    self._pass_to(parent, replace(given, values=values, inside=True))
                else:
                    self._pass_to(parent, given if factor == 1.0 else replace(given, values=factor * given.values))
        else:
            channels = [self._channels(node, parent) for parent in node.parents]
            for parent, values in zip(node.parents, given.values.split(channels, dim=2), strict=True):
                self._pass_to(parent, replace(given, values=values))

    def _channels(self, node: Concat, parent: Node) -> int:
        _, height, width = self.shapes[node]
        return parent.size // (height * width)

    def _pass_to(self, parent: Node, given: Windows) -> None:
        if self.bounds.is_exact(parent):
            self._gain(given.values * self._gather(self.bounds.exact_value(parent), parent, given))
        else:
            self._pending.setdefault(parent, []).append(given)

    def _gain(self, products: Tensor) -> None:
        self._total = self._total + _summed(products)

    def _meet_frame(self, frame: Frame, given: Windows) -> None:
        values = self._inside(frame, given).values

        if self.bounds.perturbation.takes_windows:
            self._total = self._total - self.bounds.perturbation.window_deviation(
                frame.frame,
                values.flatten(-2),
                lambda part: self._gather(part, frame, given).flatten(-2),
                self._samples,
            )
            return

        def absolute(sizes: Tensor) -> Tensor:
            return _summed(values.abs() * self._gather(sizes, frame, given))

        def norms(norm: float) -> Tensor:
            return dual_norm(dual_norm(dual_norm(values, norm), norm), norm)

        deviation = self.bounds.perturbation.map_deviation(frame.frame, absolute, norms, self._samples)
        self._total = self._total - deviation

    def _relax(self, node: Activation, given: Windows) -> None:
        lower, upper = self.bounds.relaxation(node)
        planes = torch.stack((*lower.slopes, *upper.slopes, lower.intercept, upper.intercept), dim=1)
        low, high, below, above = self._gather(planes.flatten(1), node, given, 4).unbind(dim=1)
        positive, negative = given.values.clamp(min=0.0), given.values.clamp(max=0.0)
        self._gain(torch.addcmul(positive * below, negative, above))
        self._pass_to(
            node.parents[0], replace(given, values=torch.addcmul(positive * low, negative, high), inside=True)
        )

    def _convolve(self, node: Convolution, given: Windows) -> None:
        self._gain(given.values * self._gather(self.bounds.offset(node), node, given))
        given, windows = self._inside(node, given), node.windows
        sides = [
            (own - 1) * step + (taps - 1) * gap + 1
            for own, step, taps, gap in zip(
                given.values.shape[3:], windows.stride, node.weight.shape[2:], windows.dilation, strict=True
            )
        ]
        _, height, width = windows.large
        if given.top is not None and sides[0] * sides[1] >= height * width:
            given = self._whole(given, self.shapes[node])
        if given.top is None:
            found = node.adjoint(given.values.flatten(0, 1)).reshape(2, -1, *windows.large)
            self._pass_to(node.parents[0], Windows(found, None, None, True))
            return
        found = self._spread(given.values.flatten(0, 1), node, sides)
        top, left = given.top * windows.stride[0] - windows.pads[2], given.left * windows.stride[1] - windows.pads[0]
        self._pass_to(node.parents[0], Windows(found.unflatten(0, (2, -1)), top, left))

    def _spread(self, values: Tensor, node: Convolution, sides: list[int]) -> Tensor:
        """The transposed convolution of many small windows: as a product by its matrix, unless that is mostly zeros."""
        windows, shape = node.windows, (node.weight.shape[1] * node.windows.groups, *sides)

        def through(images: Tensor) -> Tensor:
            options = (windows.stride, 0, 0, windows.groups, windows.dilation)
            return F.conv_transpose2d(images, node.weight, None, *options)

        size = values[0].numel()
        zeros = windows.groups * sides[0] * sides[1] / (node.weight.shape[2] * node.weight.shape[3])
        if zeros > MOSTLY_ZEROS or size * shape[0] * sides[0] * sides[1] > MATRIX_ENTRIES:
            return through(values)
        what = ("windows", windows, values.shape[1:])
        units = torch.eye(size, dtype=values.dtype, device=values.device).reshape(size, *values.shape[1:])
        matrix = self.bounds.graph.once(what, (node.weight,), lambda: through(units).flatten(1))
        return (values.flatten(1) @ matrix).reshape(-1, *shape)

    # --- windows and images ---

    def _gather(self, vectors: Tensor, node: Node, given: Windows, stacked: int = 0) -> Tensor:
        """What a node's vectors, (batch or 1, size), have where the windows stand, (P, channels, height, width).

        Zero outside of the image. With ``stacked`` vectors side by side, (P, stacked, channels, height, width).
        """
        _, height, width = self.shapes[node]
        images = vectors.reshape(vectors.shape[0], -1, height, width)
        several = images.shape[0] > 1
        if given.top is None:
            found = images.index_select(0, self._samples) if several else images
        else:
            samples = self._place_samples if several else torch.zeros_like(self._place_samples)
            found = _cut(images, samples, given).index_select(0, self._place)
        return found.unflatten(1, (stacked, -1)) if stacked else found

    def _inside(self, node: Node, given: Windows) -> Windows:
        if given.inside or given.top is None:
            return given
        _, height, width = self.shapes[node]
        ones = given.values.new_ones(1, 1, height, width)
        mask = _cut(ones, torch.zeros_like(self._place_samples), given).index_select(0, self._place)
        return replace(given, values=given.values * mask, inside=True)

    def _joined(self, parts: list[Windows], shape: Shape) -> Windows:
        """The sum of what several children handed over."""
        if len(parts) == 1:
            return parts[0]
        if any(part.top is None for part in parts):
            parts = [part if part.top is None else self._whole(part, shape) for part in parts]
            return Windows(sum(part.values for part in parts[1:]) + parts[0].values, None, None, True)
        first, total = parts[0], 0.0
        # Windows of all neurons are as far apart: all strides on the ways down have the same product.
        apart = [(part.top - first.top, part.left - first.left) for part in parts]
        if not all(bool((one == one[0]).all()) for pair in apart for one in pair):  # a sum of odd strides
            return self._joined([self._whole(part, shape) for part in parts], shape)
        shifts = [(int(down[0]), int(across[0])) for down, across in apart]
        top, left = (min(shift[axis] for shift in shifts) for axis in (0, 1))
        bottom = max(shift[0] + part.values.shape[3] for shift, part in zip(shifts, parts, strict=True))
        right = max(shift[1] + part.values.shape[4] for shift, part in zip(shifts, parts, strict=True))
        for (down, across), part in zip(shifts, parts, strict=True):
            height, width = part.values.shape[3:]
            pads = (across - left, right - across - width, down - top, bottom - down - height)
            total = total + F.pad(part.values, pads)
        return Windows(total, first.top + top, first.left + left, all(part.inside for part in parts))

    def _whole(self, given: Windows, shape: Shape) -> Windows:
        """Windows written into images."""
        channels, height, width = given.values.shape[2], *shape[1:]
        rows = given.top[:, None] + torch.arange(given.values.shape[3], device=given.top.device)
        columns = given.left[:, None] + torch.arange(given.values.shape[4], device=given.top.device)
        held = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        places = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
        values = (given.values * held[self._place, None]).flatten(3)
        places = places.flatten(1)[self._place, None].expand(values.shape)
        images = values.new_zeros(*values.shape[:2], channels, height * width).scatter_add(-1, places, values)
        return Windows(images.unflatten(-1, (height, width)), None, None, True)


def _shapes(node: Node, is_exact: Callable[[Node], bool]) -> dict[Node, Shape] | None:
    """Shapes of the images of all nodes that coefficients come to; None where a node is no image of one shape.

    A vector may be read as images of several shapes, of which each has windows of its own, and may hold parts of
    channels side by side.
    """
    shapes: dict[Node, Shape] = {}
    open_nodes = [(node, image_shape(node))]
    while open_nodes:
        current, shape = open_nodes.pop()
        moved = not is_exact(current)
        if shape is None or shapes.get(current, shape) != shape:
            return None
        if moved and isinstance(current, Convolution) and shape != current.out_shape:
            return None
        if current not in shapes and moved:
            sides = (current.in_shape if isinstance(current, Convolution) else shape)[1:]
            open_nodes += [(parent, _image_of(parent, *sides)) for parent in current.parents]
        shapes[current] = shape
    return shapes


def _image_of(node: Node, height: int, width: int) -> Shape | None:
    """The node's shape as images of these sides; None if it has no whole channels of them."""
    return None if node.size % (height * width) else (node.size // (height * width), height, width)


def _cut(images: Tensor, samples: Tensor, given: Windows) -> Tensor:
    """Windows of images, (batch, channels, height, width), with zeros outside: (P, channels, ...)."""
    height, width = given.values.shape[3:]
    top, left = max(0, -int(given.top.min())), max(0, -int(given.left.min()))
    bottom = max(0, int(given.top.max()) + height - images.shape[2])
    right = max(0, int(given.left.max()) + width - images.shape[3])
    padded = F.pad(images, (left, right, top, bottom))
    views = padded.unfold(2, height, 1).unfold(3, width, 1)
    return views[samples, :, given.top + top, given.left + left]


def _summed(products: Tensor) -> Tensor:
    """Over channels, height and width, in short sums."""
    if products.shape[-1] * products.shape[-2] > BLOCK:
        products = products.sum(dim=-1, keepdim=True)
    return products.flatten(-2).sum(dim=-1).sum(dim=-1)


def _whole_kernel(node: Convolution) -> Tensor:
    """Weights for all channels of the image below, gaps between taps filled, (channels, channels below, ...)."""
    weight, windows = node.weight, node.windows
    if windows.groups > 1:
        each = weight.shape[0] // windows.groups
        rows = [
            F.pad(part, (0, 0, 0, 0, k * weight.shape[1], (windows.groups - 1 - k) * weight.shape[1]))
            for k, part in enumerate(weight.split(each))
        ]
        weight = torch.cat(rows)
    if windows.dilation != (1, 1):
        height, width = ((size - 1) * gap + 1 for size, gap in zip(weight.shape[2:], windows.dilation, strict=True))
        filled = weight.new_zeros(*weight.shape[:2], height, width)
        filled[:, :, :: windows.dilation[0], :: windows.dilation[1]] = weight
        weight = filled
    return weight
