"""Nodes whose weights move: a linear node or a convolution, and what moves of its weights add, dW h.

In a backward pass a moved node hands its rows to the sources of the pass (``utils.weights.passes``), which add up what
all places of a parameter contribute. Over a box of h, an entry of an l_inf ball adds at most

    |a| unit |h|  <=  |a| unit (slope h + intercept),

a chord of |h| above, and that goes on to the node's parents. With a point m of h's box, the one nearest to 0, it is
a dW m  and a chord of |h - m|.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph.convolution import Convolution
from ..graph.graph import Graph
from ..graph.nodes import Bounds, Frame, Interval, Linear, Node
from ..graph.sums import apply_rows
from .balls import Use, WeightBalls
from .places import BIAS, KernelPlace, MatrixPlace, Place


class Move:
    """What one parameter's move does at one place of a node. Sizes are those of the node's parent, or of its bias."""

    def __init__(self, place: Place, balls: WeightBalls, node: Node):
        self.place, self.balls, self.node, self.name = place, balls, node, place.parameter

    @property
    def number(self) -> int:
        """Of the parent that the weight acts on; ``BIAS`` for none."""
        return self.place.number if isinstance(self.place, MatrixPlace) else 0

    def shifted(self, part: Tensor) -> Tensor:
        return part if self.place.shift is None else part + self.place.shift

    def ends(self, bounds: Bounds) -> Interval:
        """Bounds of what the weight acts on, (batch or 1, size of the parent) each; one tensor where it is known."""
        if self.number == BIAS:
            one = self.balls.eps.new_ones(1, 1)
            return one, one
        parent = self.node.parents[self.number]
        if bounds.is_exact(parent):
            value = self.shifted(bounds.exact_value(parent))
            return value, value
        if isinstance(parent, Frame):
            center, sides = bounds.known_part(parent), bounds.half_widths(parent)
            return self.shifted(center - sides), self.shifted(center + sides)
        low, high = bounds.interval(parent)
        return self.shifted(low), self.shifted(high)

    def reach(self, sizes: Tensor) -> Tensor:
        """Most that each element of dW h can be for |h| <= sizes, (batch, size of the node)."""
        raise NotImplementedError

    def transposed(self, rows: Tensor) -> Tensor:
        """|rows| unit, for each element of the parent, (batch or 1, n_rows, size of the parent); of l_inf balls."""
        raise NotImplementedError


class MatrixMove(Move):
    """Of a weight of a linear node, or of a bias."""

    def rows_of(self, rows: Tensor) -> Tensor:
        """Rows of the node as rows of the parameter."""
        return _placed(rows, self.place.rows, self.place.row_scale, self.place.shape[0])

    def columns_of(self, low: Tensor, high: Tensor) -> Interval:
        """What the parameter's columns meet, from what the node's parent is."""
        place = self.place
        first = _placed(low, place.columns, place.column_scale, place.shape[1])
        if low is high:
            return first, first
        if bool((place.column_scale >= 0).all()):
            return first, _placed(high, place.columns, place.column_scale, place.shape[1])
        up, down = place.column_scale.clamp(min=0.0), place.column_scale.clamp(max=0.0)
        pairs = ((low, high), (high, low))
        return tuple(
            _placed(a, place.columns, up, place.shape[1]) + _placed(b, place.columns, down, place.shape[1])
            for a, b in pairs
        )

    def unit(self) -> Tensor:
        """Radii of the entries of the node's weight at eps = 1, (size, size of the parent), of l_inf balls."""
        unit, place = self.balls.units[self.name], self.place
        scales = place.row_scale.abs()[:, None] * place.column_scale.abs()
        return scales * (unit if unit.dim() == 0 else unit.reshape(place.shape)[place.rows][:, place.columns])

    def reach(self, sizes: Tensor) -> Tensor:
        if self.balls.entrywise:
            return self.balls.eps[:, None] * (sizes @ self.unit().mT)
        return self.reach_of(self.sizes_of(sizes))

    def sizes_of(self, sizes: Tensor) -> Tensor:
        """Of what the parameter's columns meet."""
        return _placed(sizes, self.place.columns, self.place.column_scale.abs(), self.place.shape[1])

    def reach_of(self, sizes: Tensor) -> Tensor:
        """``reach`` of l_2 balls, by such sizes."""
        length = self.balls.units[self.name] * torch.linalg.vector_norm(sizes, dim=-1)
        return (self.balls.eps * length)[:, None] * self.place.row_scale.abs()

    def transposed(self, rows: Tensor) -> Tensor:
        return rows.abs() @ self.unit()

    def use(self, rows: Tensor, low: Tensor, high: Tensor) -> Use:
        low, high = self.columns_of(low, high)
        return Use(self.rows_of(rows), low, high)

    def apply(self, moves: Tensor, parent: Tensor | None) -> Tensor:
        """dW (h + shift), (N, size), for moves of the parameter, (N, *its shape), at the parent's value, (N, size)."""
        place = self.place
        matrix = moves.reshape(len(moves), *place.shape)[:, place.rows] * place.row_scale[:, None]
        if parent is None:
            return matrix.squeeze(-1)
        inner = self.shifted(parent) * place.column_scale
        return (matrix[:, :, place.columns] @ inner[..., None]).squeeze(-1)


class KernelMove(Move):
    """Of the kernel of a convolution."""

    def unit(self) -> Tensor:
        """Radii of the entries of the node's kernel at eps = 1, of l_inf balls."""
        unit, scale = self.balls.units[self.name], self.place.scale
        return scale.abs() * (unit if unit.dim() == 0 else unit.reshape(scale.shape))

    def reach(self, sizes: Tensor) -> Tensor:
        if self.balls.entrywise:
            return self.balls.eps[:, None] * self.node.apply(sizes, self.unit())
        squares = self.node.apply(sizes**2, self.place.scale**2).clamp(min=0.0)
        return (self.balls.eps * self.balls.units[self.name])[:, None] * squares.sqrt()

    def transposed(self, rows: Tensor) -> Tensor:
        return self.node.adjoint(rows.abs().flatten(0, 1), self.unit()).unflatten(0, rows.shape[:2])

    def coefficients(self, rows: Tensor, values: Tensor, scale: Tensor | None = None) -> Tensor:
        """Of the parameter's entries, (batch, n_rows, entries), at values of the parent, (batch or 1, size)."""
        scale = self.place.scale if scale is None else scale
        return kernel_rows(self.node, rows, values) * scale.flatten()

    def apply(self, moves: Tensor, parent: Tensor) -> Tensor:
        scale, windows = self.place.scale, self.node.windows
        kernels = moves.reshape(len(moves), *scale.shape) * scale
        values = zip(self.shifted(parent), kernels, strict=True)
        return torch.cat([windows.correlate(image[None], kernel) for image, kernel in values])


def kernel_rows(node: Convolution, rows: Tensor, values: Tensor) -> Tensor:
    """Coefficients of a kernel's entries, (batch, n_rows, entries): sum over places of rows times the window there."""
    windows, (channels, per_group, *taps) = node.windows, node.weight.shape
    _, height, width = windows.small
    image = F.pad(values.reshape(-1, *windows.large), windows.pads)
    reach = [(size - 1) * gap + 1 for size, gap in zip(taps, windows.dilation, strict=True)]
    places = [(size - own) // step + 1 for size, own, step in zip(image.shape[2:], reach, windows.stride, strict=True)]
    seen = F.unfold(image, taps, windows.dilation, 0, windows.stride).unflatten(-1, places)[..., :height, :width]
    seen = seen.reshape(len(seen), 1, windows.groups, per_group * taps[0] * taps[1], height * width)
    parts = rows.reshape(*rows.shape[:2], windows.groups, channels // windows.groups, height * width)
    return (parts @ seen.mT).flatten(2)


def _placed(values: Tensor, places: Tensor, scale: Tensor, size: int) -> Tensor:
    """Scaled values, (..., n), at their places among ``size`` zeros, added up where they meet."""
    values = values * scale
    if len(places) == size and bool((places == torch.arange(size, device=places.device)).all()):
        return values
    return values.new_zeros(*values.shape[:-1], size).index_add(-1, places, values)


class Moved(Node):
    """A linear node or a convolution, ``inner``, some of whose weights move."""

    meets_frames = True

    def __init__(self, inner: Linear | Convolution, places: list[Place], balls: WeightBalls):
        super().__init__(inner.size, inner.parents)
        self.inner = copy.copy(inner)
        kinds = {MatrixPlace: MatrixMove, KernelPlace: KernelMove}
        self.moves = tuple(kinds[type(place)](place, balls, self.inner) for place in places)

    @property
    def parents(self) -> tuple[Node, ...]:
        return self._parents

    @parents.setter
    def parents(self, parents: tuple[Node, ...]) -> None:
        self._parents = parents
        if "inner" in vars(self):
            self.inner.parents = parents

    @property
    def longest_sum(self) -> int:
        return self.inner.longest_sum

    def value(self, *parents: Tensor) -> Tensor:
        return self.inner.value(*parents)

    def value_with(self, moves: dict[str, Tensor], *parents: Tensor) -> Tensor:
        """The node where each parameter has moved, by (N, *its shape), at values of the parents, (N, size) each."""
        total = self.inner.value(*parents)
        for move in self.moves:
            total = total + move.apply(moves[move.name], None if move.number == BIAS else parents[move.number])
        return total

    def term_sizes(self, *parents: Tensor, own: bool = True) -> Tensor:
        total = self.inner.term_sizes(*parents, own=own)
        for move in self.moves:
            if move.number == BIAS:
                total = total + move.reach(total.new_ones(1, 1)) if own else total
                continue
            sizes, shift = parents[move.number], move.place.shift
            total = total + move.reach(sizes if shift is None or not own else sizes + shift.abs()).detach()
        return total

    def _by_name(self, kind: type[Move]) -> dict[str, list[Move]]:
        """Moves of a kind, those of one parameter together: it may act on several parents, as of two directions."""
        found: dict[str, list[Move]] = {}
        for move in self.moves:
            if isinstance(move, kind):
                found.setdefault(move.name, []).append(move)
        return found

    def interval(self, bounds: Bounds) -> Interval:
        low, high = self.inner.interval(bounds)
        reach = 0.0
        for own in self._by_name(Move).values():
            sizes = [largest(*move.ends(bounds)) for move in own]
            first = own[0]
            if len(own) > 1 and not first.balls.entrywise and all(_same_rows(first, move) for move in own):
                reach = reach + first.reach_of(sum(move.sizes_of(size) for move, size in zip(own, sizes, strict=True)))
            else:
                reach = reach + sum(move.reach(size) for move, size in zip(own, sizes, strict=True))
        return low - reach, high + reach

    def lowest(self, bounds: Bounds, rows: Tensor) -> Tensor:
        """As ``Linear.lowest``."""
        if isinstance(self.inner, Linear):
            total = self.inner.lowest(bounds, rows)
        else:
            low, high = self.inner.interval(bounds)
            total = apply_rows(rows.clamp(min=0.0), low) + apply_rows(rows.clamp(max=0.0), high)
        for name, own in self._by_name(MatrixMove).items():
            total = total - own[0].balls.deviation(name, [move.use(rows, *move.ends(bounds)) for move in own])
        for own in self._by_name(KernelMove).values():
            for move in own:
                total = total - apply_rows(rows.abs(), move.reach(largest(*move.ends(bounds))))
        return total

    def backward(self, coefficients: Tensor, bounds: Bounds) -> Tensor:
        constant = self.inner.backward(coefficients, bounds)
        for move in self.moves:
            low, high = move.ends(bounds)
            if low is not high and move.balls.entrywise and not isinstance(self.parents[move.number], Frame):
                known = torch.zeros_like(low).clamp(low, high)
                slope, intercept = chord_of_distance(low, high, known)
                size = move.transposed(coefficients) * move.balls.eps[:, None, None]
                bounds.pass_to(self.parents[move.number], -size * slope[:, None])
                shift = 0.0 if move.place.shift is None else slope * move.place.shift
                constant = constant - apply_rows(size, intercept + shift)
                low = high = known
            bounds.collect(move, coefficients, low, high)
        return constant


def largest(low: Tensor, high: Tensor) -> Tensor:
    """Greatest absolute values."""
    return torch.maximum(low.abs(), high.abs())


def _same_rows(first: MatrixMove, other: MatrixMove) -> bool:
    return torch.equal(first.place.rows, other.place.rows) and torch.equal(first.place.row_scale, other.place.row_scale)


def chord_of_distance(low: Tensor, high: Tensor, point: Tensor) -> Interval:
    """Slope and intercept of the line that lies above |h - point| on [low, high], and meets it at the ends."""
    width = high - low
    flat = width <= 0
    slope = torch.where(flat, 0.0, (high + low - 2.0 * point) / torch.where(flat, 1.0, width)).clamp(-1.0, 1.0)
    # Above at both ends, however the slope was rounded.
    return slope, torch.maximum(high - point - slope * high, point - low - slope * low)


def moved_graph(graph: Graph, places: dict[str, list[Place]], balls: WeightBalls) -> Graph:
    """The graph with moved nodes in the place of those that have places."""
    by_node: dict[int, list[Place]] = {}
    for own in places.values():
        for place in own:
            by_node.setdefault(place.node, []).append(place)

    def twin_of(node: Node) -> Node:
        return Moved(node, by_node[node.index], balls) if node.index in by_node else copy.copy(node)

    other = graph.rebuilt(twin_of)
    other.kept = graph.kept
    return other
