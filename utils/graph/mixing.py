"""Nodes that multiply what is perturbed, or that take a softmax: each is relaxed as a whole, not value by value.

A product of matrices X Y is taken apart at points C of X and D of Y,

    X Y  =  C Y + X D - C D + E,        E = (X - C)(Y - D),

of which only E is relaxed, by an interval: the planes share their slopes, coefficients pass on unsplit, by products of
matrices, and no product of two values stands by itself. C and D are middles of boxes, and then |E| <= r_X r_Y; or, of
values that read single words, what these are without a substitute, and E has a value for every pair of words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..relaxation import softmax
from .nodes import Along, Bounds, Chain, Interval, Node
from .sums import apply_rows, sum_length


class Mixing(Node):
    """A node of which relaxations make a vector of planes at once; see ``NonLinear`` for those of single values.

    As with these, bounds count for their rounding, and what is handed to the parents loses nothing more.
    """

    @property
    def relaxed_operands(self) -> tuple[Node, ...]:
        return self.parents

    def reads(self, *parents: Tensor) -> Tensor:
        """Which elements depend on what parents' elements depend on, (sources, size) each, of bool."""
        raise NotImplementedError

    def tangent(self, along: Along) -> Node:
        raise ValueError(
            "gradients through products and softmax are not bounded from the input on: take direction backward"
        )


@dataclass(frozen=True)
class Shape:
    """Of a stack of products: ``count`` of (rows, inner) times (inner, columns)."""

    count: int
    rows: int
    inner: int
    columns: int


class MatMul(Mixing):
    """Products of matrices of the parents' elements, of which both may be perturbed.

    ``limit``, a number or (size,), is known to be no less than the absolute values, whatever the operands are.
    """

    def __init__(self, x: Node, y: Node, shape: Shape, limit: float | Tensor | None = None):
        super().__init__(shape.count * shape.rows * shape.columns, (x, y))
        self.shape, self.limit = shape, limit

    @property
    def longest_sum(self) -> int:
        return max(sum_length(self.size), self.shape.inner, self.shape.rows, self.shape.columns)

    def left(self, vector: Tensor) -> Tensor:
        """X of a vector, (..., count, rows, inner)."""
        return vector.unflatten(-1, (self.shape.count, self.shape.rows, self.shape.inner))

    def right(self, vector: Tensor) -> Tensor:
        return vector.unflatten(-1, (self.shape.count, self.shape.inner, self.shape.columns))

    def product(self, vector: Tensor) -> Tensor:
        return vector.unflatten(-1, (self.shape.count, self.shape.rows, self.shape.columns))

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.left(x) @ self.right(y)).flatten(-3)

    def term_sizes(self, x: Tensor, y: Tensor, own: bool = True) -> Tensor:
        return self.value(x, y)

    def reads(self, x: Tensor, y: Tensor) -> Tensor:
        left, right = self.left(x).any(dim=-1, keepdim=True), self.right(y).any(dim=-2, keepdim=True)
        return (left | right).flatten(-3)

    # --- intervals ---

    def interval(self, bounds: Bounds) -> Interval:
        x, y = self.parents
        if bounds.is_exact(x) or bounds.is_exact(y):
            return self._linear_interval(bounds)
        low, high = self._box_interval(bounds)
        found = [bounds.words and bounds.words.pair_range(self), self._mean_interval(bounds)]
        if self.limit is not None:
            found.append((-self.limit, self.limit))
        for other in found:
            if other is not None:
                low, high = low.clamp(min=other[0]), high.clamp(max=other[1])
        return low, high

    def _linear_interval(self, bounds: Bounds) -> Interval:
        (low_x, high_x), (low_y, high_y) = (bounds.interval(parent) for parent in self.parents)
        center = self.value(0.5 * (low_x + high_x), 0.5 * (low_y + high_y))
        half = self.value(0.5 * (high_x - low_x), torch.maximum(low_y.abs(), high_y.abs()))
        half = half + self.value(torch.maximum(low_x.abs(), high_x.abs()), 0.5 * (high_y - low_y))
        return center - half, center + half

    def _box_interval(self, bounds: Bounds) -> Interval:
        """Sums of the products' own intervals, one inner index after the other."""
        x = [self.left(end) for end in bounds.interval(self.parents[0])]
        y = [self.right(end) for end in bounds.interval(self.parents[1])]
        low = high = 0.0
        for inner in range(self.shape.inner):
            ends = [a[..., inner, None] * b[..., None, inner, :] for a in x for b in y]
            low = low + torch.minimum(torch.minimum(*ends[:2]), torch.minimum(*ends[2:]))
            high = high + torch.maximum(torch.maximum(*ends[:2]), torch.maximum(*ends[2:]))
        return low.flatten(-3), high.flatten(-3)

    def _mean_interval(self, bounds: Bounds) -> Interval | None:
        """Of a softmax times values, which is a mean of these; not of products of single shares and values."""
        if not isinstance(self.parents[0], Softmax) or self.parents[0].width != self.shape.inner:
            return None
        scores = [self.left(end) for end in bounds.interval(self.parents[0].parents[0])]
        least, most = (
            self.right(end).unsqueeze(-3).expand(*scores[0].shape, -1) for end in bounds.interval(self.parents[1])
        )
        lower, upper = softmax.mean_below(*scores, least), -softmax.mean_below(*scores, -most)
        return lower.flatten(-3), upper.flatten(-3)

    # --- planes ---

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        chain.product(self, adjoint)

    def expansion(self, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """C and D, (batch or 1, parent size), and the interval of E with room for rounding, (batch, size)."""
        return bounds.once(self, lambda: self._expand(bounds))

    def _expand(self, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (low_x, high_x), (low_y, high_y) = (bounds.interval(parent) for parent in self.parents)
        center_x, center_y = 0.5 * (low_x + high_x), 0.5 * (low_y + high_y)
        reach = self.value(0.5 * (high_x - low_x), 0.5 * (high_y - low_y))
        low, high = -reach, reach
        pairs = bounds.words and bounds.words.products(self)
        if pairs is not None:
            center_x, center_y, low, high = pairs
        elif bounds.is_exact(self.parents[0]) or bounds.is_exact(self.parents[1]):
            low, high = 0.0 * low, 0.0 * high
        lost = self._lost(bounds, center_x, center_y, torch.maximum(low.abs(), high.abs()))
        return center_x, center_y, low - lost, high + lost

    def _lost(self, bounds: Bounds, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        if bounds.rounding is None:
            return torch.zeros_like(inside)
        with torch.no_grad():
            gamma = bounds.rounding.gamma_of(self)
            (size_x, error_x), (size_y, error_y) = (bounds.rounding.of(parent) for parent in self.parents)
            lost = self.value(x.abs(), error_y + 2.0 * gamma * (size_y + y.abs()))
            lost = lost + self.value(error_x + 2.0 * gamma * size_x, y.abs())
            return lost + gamma * (inside + self.value(size_x, size_y)) + bounds.rounding.tiny

    def backward(self, coefficients: Tensor, bounds: Bounds) -> Tensor:
        whole = bounds.words and bounds.words.mean(self, coefficients)
        if whole is not None:
            return whole
        center_x, center_y, low, high = self.expansion(bounds)
        x, y = self.parents
        rows = self.product(coefficients)
        positive, negative = bounds.signed_parts(coefficients)
        constant = apply_rows(positive, low) + apply_rows(negative, high)
        if not bounds.is_exact(x):
            bounds.pass_to(x, (rows @ self.right(center_y).mT.unsqueeze(-4)).flatten(-3))
        if not bounds.is_exact(y):
            bounds.pass_to(y, (self.left(center_x).mT.unsqueeze(-4) @ rows).flatten(-3))
        if bounds.is_exact(x) or bounds.is_exact(y):
            return constant
        return constant - apply_rows(coefficients, self.value(center_x, center_y))


class Softmax(Mixing):
    """A softmax over rows of ``width`` scores, the parent's elements.

    p sums to one, so rows a of coefficients may be shifted:  a p = theta + (a - theta) p.  Errors of the planes of p
    are multiplied by a - theta then; theta is the mean of a, weighted by p at the middle.
    """

    def __init__(self, parent: Node, width: int):
        super().__init__(parent.size, (parent,))
        self.width = width

    def rows_of(self, vector: Tensor) -> Tensor:
        return vector.unflatten(-1, (-1, self.width))

    def value(self, parent: Tensor) -> Tensor:
        return self.rows_of(parent).softmax(dim=-1).flatten(-2)

    def term_sizes(self, parent: Tensor, own: bool = True) -> Tensor:
        return torch.ones_like(parent)

    def reads(self, parent: Tensor) -> Tensor:
        rows = self.rows_of(parent)
        return rows.any(dim=-1, keepdim=True).expand_as(rows).flatten(-2)

    def interval(self, bounds: Bounds) -> Interval:
        low, high = (self.rows_of(end) for end in bounds.interval(self.parents[0]))
        return tuple(end.flatten(-2) for end in softmax.softmax_range(low, high))

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        chain.softmax(self, adjoint)

    def planes(self, bounds: Bounds) -> tuple[Tensor, ...]:
        """Fields of the planes below and above, with room for rounding, and p at the middle, (batch, rows, width)."""
        return bounds.once(self, lambda: self._planes(bounds))

    def _planes(self, bounds: Bounds) -> tuple[Tensor, ...]:
        low, high = (self.rows_of(end) for end in bounds.interval(self.parents[0]))
        fields = []
        for plane, sign in zip(softmax.relax_softmax(low, high), (-1.0, 1.0), strict=True):
            lost = self._lost(bounds, plane, torch.maximum(low.abs(), high.abs()))
            fields += [*plane[:3], plane.intercept + sign * lost]
        return (*fields, (0.5 * (low + high)).softmax(dim=-1))

    def _lost(self, bounds: Bounds, plane: softmax.RowPlane, scores: Tensor) -> Tensor:
        if bounds.rounding is None:
            return torch.zeros_like(plane.intercept)
        with torch.no_grad():
            rounding, gamma = bounds.rounding, bounds.rounding.gamma_of(self)
            size, error = (self.rows_of(part) for part in rounding.of(self.parents[0]))
            through = softmax.terms(plane, error + 2.0 * gamma * (size + scores))
            return through + 4.0 * gamma * (1.0 + plane.intercept.abs()) + rounding.tiny

    def backward(self, coefficients: Tensor, bounds: Bounds) -> Tensor:
        *planes, middle = (field.unsqueeze(-3) for field in self.planes(bounds))
        rows = self.rows_of(coefficients)
        mean = (rows * middle).sum(dim=-1, keepdim=True)
        shifted = rows - mean
        constant, passed = mean.sum(dim=(-1, -2)), 0.0
        for own, part in ((planes[:4], shifted.clamp(min=0.0)), (planes[4:], shifted.clamp(max=0.0))):
            slope, shared, direction, intercept = own
            constant = constant + (part * intercept).sum(dim=(-1, -2))
            passed = passed + part * slope + (part * shared).sum(dim=-1, keepdim=True) * direction
        bounds.pass_to(self.parents[0], passed.flatten(-2))
        if bounds.rounding is None:
            return constant
        lost = rows.detach().abs().amax(dim=-1).sum(dim=-1)  # of the shift, as p sums to one
        return constant - 4.0 * bounds.rounding.gamma_of(self) * lost
