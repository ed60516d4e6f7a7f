"""Nodes that compute nothing: they pick elements of their parents, put them side by side or turn their signs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .nodes import Along, Bounds, Chain, Interval, Node
from .sums import apply_rows


class LastState(Node):
    """Each sample's own last state, where samples of a batch are in the order of their ends, the last one first.

    Parent k is the last state of samples starts[k] ... starts[k + 1] - 1.
    """

    rounds = False

    def __init__(self, parents: tuple[Node, ...], starts: tuple[int, ...]):
        super().__init__(parents[0].size, parents)
        self.starts = starts

    def _join(self, parents: tuple[Tensor, ...]) -> Tensor:
        ends = zip(parents, self.starts, (*self.starts[1:], None), strict=True)
        return torch.cat([parent[start:end] for parent, start, end in ends])

    def value(self, *parents: Tensor) -> Tensor:
        return self._join(parents)

    def interval(self, bounds: Bounds) -> Interval:
        lows, highs = zip(*(bounds.interval(parent) for parent in self.parents), strict=True)
        return self._join(lows), self._join(highs)

    def backward(self, coefficients: Tensor, bounds: Bounds) -> None:
        for parent, start, end in zip(self.parents, self.starts, (*self.starts[1:], None), strict=True):
            bounds.pass_to(parent, coefficients[start:end], first_sample=start)


class Slice(Node):
    """Elements start ... start + size of the parent: one gate of a stack of them."""

    rounds = False

    def __init__(self, parent: Node, start: int, size: int):
        super().__init__(size, (parent,))
        self.start = start

    def of(self, vector: Tensor) -> Tensor:
        return vector[..., self.start : self.start + self.size]

    def value(self, parent: Tensor) -> Tensor:
        return self.of(parent)

    def interval(self, bounds: Bounds) -> Interval:
        low, high = bounds.interval(self.parents[0])
        return self.of(low), self.of(high)

    def ball_radius(self, norm: Callable[[Tensor], Tensor], radius: Tensor) -> Tensor:
        return radius

    def backward(self, coefficients: Tensor, bounds: Bounds) -> None:
        bounds.pass_to(self.parents[0], coefficients, start=self.start)

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        chain.sliced(self.parents[0], adjoint, self.start)

    def tangent(self, along: Along) -> Node:
        return Slice(along.of(self.parents[0]), self.start, self.size)

    @property
    def bounded_through(self) -> Node:
        return self.parents[0].bounded_through


class Concat(Node):
    """The parents' elements side by side."""

    rounds = False

    def __init__(self, parents: tuple[Node, ...]):
        super().__init__(sum(parent.size for parent in parents), tuple(parents))

    def value(self, *parents: Tensor) -> Tensor:
        batch = max(part.shape[0] for part in parents)
        return torch.cat([part.expand(batch, -1) for part in parents], dim=-1)

    def interval(self, bounds: Bounds) -> Interval:
        lows, highs = zip(*(bounds.interval(parent) for parent in self.parents), strict=True)
        return self.value(*lows), self.value(*highs)

    def ball_radius(self, norm: Callable[[Tensor], Tensor], *radii: Tensor) -> Tensor:
        return sum(radius**2 for radius in radii) ** 0.5

    def backward(self, coefficients: Tensor, bounds: Bounds) -> Tensor | None:
        constant = None
        for parent, part in zip(self.parents, coefficients.split([p.size for p in self.parents], dim=-1), strict=True):
            if bounds.is_exact(parent):
                term = apply_rows(part, bounds.exact_value(parent))
                constant = term if constant is None else constant + term
            else:
                bounds.pass_to(parent, part)
        return constant

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        start = 0
        for parent in self.parents:
            chain.picked(parent, adjoint, start)
            start += parent.size

    def tangent(self, along: Along) -> Node:
        return Concat(tuple(along.of(parent) for parent in self.parents))


class Negative(Node):
    """Minus the parent."""

    rounds = False

    def __init__(self, parent: Node):
        super().__init__(parent.size, (parent,))

    def value(self, parent: Tensor) -> Tensor:
        return -parent

    def term_sizes(self, parent: Tensor, own: bool = True) -> Tensor:
        return parent

    def interval(self, bounds: Bounds) -> Interval:
        low, high = bounds.interval(self.parents[0])
        return -high, -low

    def ball_radius(self, norm: Callable[[Tensor], Tensor], radius: Tensor) -> Tensor:
        return radius

    def backward(self, coefficients: Tensor, bounds: Bounds) -> None:
        bounds.pass_to(self.parents[0], -coefficients)

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        chain.scaled(self.parents[0], adjoint, -1.0)

    def tangent(self, along: Along) -> Node:
        return Negative(along.of(self.parents[0]))

    @property
    def bounded_through(self) -> Node:
        return self.parents[0].bounded_through
