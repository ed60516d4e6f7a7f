"""Forward mode: linear bounds in the input, carried from node to node.

Of every node v two linear functions of the deviation d of the input from the set's centre are kept,

    (M - R) d + m - r  <=  v  <=  (M + R) d + m + r,

so that a linear node W v has M' = W M, R' = |W| R, m' = W m + b, r' = |W| r, and a plane with slopes a_k in operands
v_k is below by  sum_k a_k M_k - |a_k| R_k.  Such bounds lose what W takes from lower and upper functions alike, which
backward passes keep; in return there is one pass for all nodes together, of as many columns as values move.

- "forward": operands and the margins are bounded by these functions.
- "forward-backward": operands are, and the margins by one backward pass.

Each function's constant takes the rounding of its own making on its outer side, so what is kept holds as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph.convolution import Convolution
from ..graph.graph import Graph
from ..graph.nodes import Frame, Interval, Linear, Node, WeightedSum, intersect
from ..graph.nonlinear import NonLinear
from ..graph.picks import LastState, Negative, Slice
from ..graph.sums import apply_rows
from ..perturbation.sets import Perturbation
from .backward import gather
from .neurons import readers
from .passes import BoundPass


class Line(NamedTuple):
    """Linear bounds of a node: M and R, (batch or 1, size, columns), m and r, (batch or 1, size).

    R is None where both bounds have the same slopes. Columns are those of the frames up to some one; the others are 0.
    """

    slope: Tensor
    spread: Tensor | None
    center: Tensor
    radius: Tensor

    def fit(self, bounds: ForwardPass) -> Line:
        return Line(*(None if part is None else bounds.fit(part) for part in self))


class ForwardPass(BoundPass):
    """A pass whose operands are bounded by linear functions of the input that are carried forward."""

    def __init__(
        self,
        graph: Graph,
        perturbation: Perturbation,
        backward: bool = True,
        slopes: list | None = None,
        sound: bool = True,
    ):
        """With ``backward`` the margins are bounded by a backward pass, else by the functions."""
        super().__init__(graph, perturbation, "crown-ibp", slopes, sound)
        if self.words:
            raise ValueError("linear functions of the input are carried forward over balls and boxes, not over words")
        self.backward, self._lines, self._sizes = backward, {}, {}
        self._columns = self._place_frames()
        needed = readers(graph)
        last = max((node.index for node in needed), default=-1) if backward else len(graph.nodes) - 1
        for node in graph.nodes[: last + 1]:
            if isinstance(node, Frame) or self.is_exact(node):
                continue
            with self.at(node):
                line = self._lines[node] = self._made_sound(node, self._line(node))
                if node in needed:
                    self._intervals[node] = intersect(self.interval(node), self._concrete(line))

    def margin(self, rows: Tensor) -> Tensor:
        if self.backward:
            return super().margin(rows)
        output = self.graph.output
        return torch.maximum(self.interval_lower_bound(output, rows), self._lowest(output, rows))

    # --- frames ---

    def _place_frames(self) -> dict[Frame, slice]:
        """Columns of the frames that move, in the order of the graph."""
        places, start = {}, 0
        for frame in self.graph.frames:
            if not self.is_exact(frame):
                width = frame.size
                if frame.child_weights and not frame.whole:
                    width = self.ball_weight(frame, frame.child_weights[0]).shape[1]
                places[frame] = slice(start, start + width)
                start += width
        return places

    def _deviation(self, coefficients: Tensor) -> Tensor:
        """Most that functions, (batch or 1, rows, columns), can fall below their value at the centre, (batch, rows)."""
        places = self._columns.items()
        parts = {f: coefficients[..., place] for f, place in places if place.stop <= coefficients.shape[-1]}
        if self.perturbation.is_joint:
            return self.joint_deviation({frame.frame: part for frame, part in parts.items()})
        return self.perturbation.total_deviation([self.deviation(*pair) for pair in parts.items()])

    def _concrete(self, line: Line) -> Interval:
        spread = [] if line.spread is None else [-line.spread]
        low = line.center - line.radius - self._deviation(_added([line.slope, *spread]))
        return low, line.center + line.radius + self._deviation(_added([-line.slope, *spread]))

    # --- rounding ---

    @torch.no_grad()
    def _size(self, line: Line) -> Tensor:
        """Of the terms of both functions over the set, (batch, size)."""
        found = line.center.abs() + line.radius.abs()
        for part in (line.slope, line.spread):
            if part is not None and part.shape[-1]:
                down = self._deviation(part)
                found = found + (
                    down if self.perturbation.is_symmetric else torch.maximum(down, self._deviation(-part))
                )
        return found

    @torch.no_grad()
    def _made_sound(self, node: Node, line: Line) -> Line:
        """With room for the rounding of the functions' own making, and for what is wrong with values that are known."""
        if not self.rounding:
            return line
        gamma = 2.0 * (self.rounding.gamma_of(node) + self.rounding.gamma)
        size = self._size(line)
        lost = gamma * size + self.rounding.tiny
        if not isinstance(node, NonLinear):  # the planes of these have room
            known = [self._sizes.get(parent) for parent in node.parents]
            pairs = [self.rounding.of(p) if k is None else (k, None) for p, k in zip(node.parents, known, strict=True)]
            sizes = [self.fit(own) for own, _ in pairs]
            errors = [
                torch.zeros_like(own) if wrong is None or isinstance(p, Frame) else wrong
                for p, own, (_, wrong) in zip(node.parents, sizes, pairs, strict=True)
            ]
            lost = lost + gamma * node.term_sizes(*sizes) + node.term_sizes(*errors, own=False)
        self._sizes[node] = size + lost
        return line._replace(radius=line.radius + lost)

    # --- nodes ---

    def line(self, node: Node) -> Line:
        """Of a node that moves, for the samples of the node at work."""
        return self._lines[node].fit(self)

    def _line(self, node: Node) -> Line:
        if isinstance(node, Linear):
            return self._of_linear(node)
        if isinstance(node, Convolution):
            return self._of_convolution(node)
        if isinstance(node, NonLinear):
            return self._of_planes(node)
        if isinstance(node, WeightedSum):
            return self._of_sum(node)
        if isinstance(node, Slice):
            slope, spread, *constants = self.line(node.parents[0])
            part = slice(node.start, node.start + node.size)
            return Line(slope[:, part], None if spread is None else spread[:, part], *map(node.of, constants))
        if isinstance(node, Negative):
            line = self.line(node.parents[0])
            return line._replace(slope=-line.slope, center=-line.center)
        if isinstance(node, LastState):
            return self._of_last(node)
        return self._by_rows(node)

    def _of_linear(self, node: Linear) -> Line:
        slopes, spreads, center = [], [], self.offset(node)
        radius = torch.zeros_like(center)
        for parent, weight in node.inexact_parents(self):
            if isinstance(parent, Frame):
                slopes.append(torch.nn.functional.pad(weight[None], (self._columns[parent].start, 0)))
                continue
            line = self.line(parent)
            absolute = self.absolute(weight)
            slopes.append(weight @ line.slope)
            if line.spread is not None:
                spreads.append(absolute @ line.spread)
            center = center + apply_rows(weight[None], line.center)
            radius = radius + apply_rows(absolute[None], line.radius)
        return Line(_added(slopes), _added(spreads) if spreads else None, center, radius)

    def _of_convolution(self, node: Convolution) -> Line:
        (parent,), center = node.parents, self.offset(node)
        if isinstance(parent, Frame):
            start, size = self._columns[parent].start, parent.size
            unit = torch.eye(size, dtype=center.dtype, device=center.device)
            slope = torch.nn.functional.pad(node.apply(unit).T[None], (start, 0))
            return Line(slope, None, center, torch.zeros_like(center))
        line = self.line(parent)
        spread = None if line.spread is None else _through(node.absolute, line.spread)
        center = center + node.apply(line.center)
        return Line(_through(node.apply, line.slope), spread, center, node.absolute(line.radius))

    def _of_planes(self, node: NonLinear) -> Line:
        lower, upper = self.relaxation(node)
        ends = []
        for plane, sign in ((lower, -1.0), (upper, 1.0)):
            slopes, constant = [], plane.intercept
            for parent, slope in zip(node.plane_operands, plane.slopes, strict=True):
                if self.is_exact(parent):
                    constant = constant + slope * self.exact_value(parent)
                    continue
                line, factor = self.line(parent), slope.unsqueeze(-1)
                slopes.append(factor * line.slope)
                if line.spread is not None:
                    slopes.append(sign * factor.abs() * line.spread)
                constant = constant + slope * line.center + sign * slope.abs() * line.radius
            ends.append((_added(slopes), constant))
        (low, below), (high, above) = ends
        return Line(0.5 * (low + high), 0.5 * (high - low), 0.5 * (below + above), 0.5 * (above - below))

    def _of_sum(self, node: WeightedSum) -> Line:
        slopes, spreads, center, radius = [], [], 0.0, 0.0
        for parent, factor in zip(node.parents, node.factors, strict=True):
            tensor = isinstance(factor, Tensor)
            factor = self.fit(factor) if tensor and factor.dim() == 2 else factor
            if self.is_exact(parent):
                center = center + factor * self.exact_value(parent)
                continue
            line, by_row = self.line(parent), factor.unsqueeze(-1) if tensor else factor
            slopes.append(by_row * line.slope)
            if line.spread is not None:
                spreads.append(abs(by_row) * line.spread)
            center, radius = center + factor * line.center, radius + abs(factor) * line.radius
        return Line(_added(slopes), _added(spreads) if spreads else None, center, radius)

    def _of_last(self, node: LastState) -> Line:
        lines = [self._any(parent) for parent in node.parents]
        width = max(line.slope.shape[-1] for line in lines)
        batch = len(self.perturbation.x)
        parts = []
        for line, start, end in zip(lines, node.starts, (*node.starts[1:], None), strict=True):
            spread = torch.zeros_like(line.slope) if line.spread is None else line.spread
            wide = (_wide(line.slope, width), _wide(spread, width), line.center, line.radius)
            parts.append(
                [part.expand(batch if part.shape[0] == 1 else -1, *part.shape[1:])[start:end] for part in wide]
            )
        return Line(*(torch.cat(own) for own in zip(*parts, strict=True)))

    def _any(self, node: Node) -> Line:
        """Of a node that may not move."""
        if not self.is_exact(node):
            return self._lines[node]
        value = self.exact_value(node)
        return Line(value.new_zeros(1, node.size, 0), None, value, torch.zeros_like(value))

    def _by_rows(self, node: Node) -> Line:
        """Of any other node, by the rows that it hands to its parents for each of its elements."""
        like = self.perturbation.x
        unit = torch.eye(node.size, dtype=like.dtype, device=like.device)
        self._pending = [[] for _ in range(node.index + 1)]
        constant = node.backward(torch.cat((unit, -unit))[None], self)
        total = like.new_zeros(1, 2 * node.size) if constant is None else constant
        slopes = []
        for parent in dict.fromkeys(node.parents):
            if not self._pending[parent.index]:
                continue
            rows = gather(self._pending[parent.index], parent.size, None)
            if isinstance(parent, Frame):
                slopes.append(torch.nn.functional.pad(rows, (self._columns[parent].start, 0)))
                continue
            line = self.line(parent)
            slopes.append(rows @ line.slope)
            if line.spread is not None:
                slopes.append(-(rows.abs() @ line.spread))
            total = total + apply_rows(rows, line.center) - apply_rows(rows.abs(), line.radius)
        self._parts = None
        low, minus_high = _added(slopes).split(node.size, dim=1)
        below, minus_above = total.split(node.size, dim=1)
        return Line(
            0.5 * (low - minus_high),
            -0.5 * (low + minus_high),
            0.5 * (below - minus_above),
            -0.5 * (below + minus_above),
        )

    def _lowest(self, node: Node, rows: Tensor) -> Tensor:
        """Lower bounds of ``rows @ node``, (batch, n_rows), with the rows folded into a linear node."""
        if self.is_exact(node):
            return self._lowered(apply_rows(rows, self.exact_value(node)), node, rows)
        terms = [(node, rows)]
        constant = 0.0
        if isinstance(node, Linear) and not any(isinstance(parent, Frame) for parent in node.parents):
            terms = [(parent, rows @ weight) for parent, weight in node.inexact_parents(self)]
            constant = apply_rows(rows, self.offset(node))
        slopes = []
        for parent, own in terms:
            line, size = self.line(parent), own.abs()
            slopes += [own @ line.slope, *([] if line.spread is None else [-(size @ line.spread)])]
            constant = constant + apply_rows(own, line.center) - apply_rows(size, line.radius)
            if self.rounding:
                gamma = 4.0 * (self.rounding.gamma_of(node) + self.rounding.gamma)
                constant = constant - gamma * apply_rows(size, self.fit(self._sizes[parent]))
        return self._lowered(constant - self._deviation(_added(slopes)), node, rows)


def _added(parts: Sequence[Tensor]) -> Tensor:
    """Sum of functions that may have different numbers of columns."""
    width = max(part.shape[-1] for part in parts)
    wide = [_wide(part, width) for part in parts]
    return sum(wide[1:], start=wide[0])


def _wide(part: Tensor, width: int) -> Tensor:
    missing = width - part.shape[-1]
    return torch.nn.functional.pad(part, (0, missing)) if missing else part


def _through(function, columns: Tensor) -> Tensor:
    """A function of vectors, (N, size), applied to every column, (batch, size, columns)."""
    batch, _, count = columns.shape
    return function(columns.mT.flatten(0, 1)).unflatten(0, (batch, count)).mT


def forward(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> ForwardPass:
    return ForwardPass(graph, perturbation, False, slopes, sound)


def forward_backward(
    graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True
) -> ForwardPass:
    return ForwardPass(graph, perturbation, True, slopes, sound)
