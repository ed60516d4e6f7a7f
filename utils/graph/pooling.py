"""Max pooling: the greatest of several vectors, element-wise, and the node that picks these out of an image.

Let x_1 ... x_n lie in [l_j, u_j], of which pooling over a padded image may lack some. Then

    sum_j a_j x_j  <=  max(x),                 for any a_j >= 0 of sum 1; the x_j of the greatest l_j unless told
                                               otherwise;

    max(x)  <=  max(x_i, M)  <=  M + (u_i - M) / (u_i - l_i) (x_i - l_i),    M = max of u_j over j != i,

for the i of the greatest u_i, if l_i < M <= u_i; if M <= l_i, max(x) = x_i.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..relaxation.lines import Plane, Relaxation
from .nodes import Along, Bounds, Chain, Interval, Node
from .nonlinear import Activation, NonLinear


class Pick(Node):
    """Elements ``places``, (size,), of the parent; the same one may be picked several times."""

    rounds = False

    def __init__(self, parent: Node, places: Tensor):
        super().__init__(len(places), (parent,))
        self.places = places

    def value(self, parent: Tensor) -> Tensor:
        return parent[..., self.places]

    def interval(self, bounds: Bounds) -> Interval:
        low, high = bounds.interval(self.parents[0])
        return self.value(low), self.value(high)

    def ball_radius(self, norm: Callable[[Tensor], Tensor], radius: Tensor) -> Tensor:
        return radius * torch.bincount(self.places).max().to(radius).sqrt()

    def backward(self, coefficients: Tensor, bounds: Bounds) -> None:
        (parent,) = self.parents
        passed = coefficients.new_zeros(*coefficients.shape[:-1], parent.size)
        bounds.pass_to(parent, passed.index_add(-1, self.places, coefficients))

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        chain.placed(self.parents[0], adjoint, self.places)

    def tangent(self, along: Along) -> Node:
        return Pick(along.of(self.parents[0]), self.places)

    @property
    def bounded_through(self) -> Node:
        return self.parents[0].bounded_through


class Maximum(NonLinear):
    """The greatest of the parents, element-wise; ``present``, (number of parents, size), says which count where.

    At least one must be present everywhere.
    """

    name = "maximum"

    def __init__(self, parents: tuple[Node, ...], present: Tensor):
        super().__init__(parents[0].size, tuple(parents))
        self.present = present

    def _stacked(self, parts: tuple[Tensor, ...]) -> Tensor:
        """(parents, batch, size), -inf where a parent is not present."""
        return torch.where(self.present[:, None], torch.stack(torch.broadcast_tensors(*parts)), -torch.inf)

    def value(self, *parents: Tensor) -> Tensor:
        return self._stacked(parents).amax(dim=0)

    def interval(self, bounds: Bounds) -> Interval:
        lows, highs = zip(*(bounds.interval(parent) for parent in self.parents), strict=True)
        return self.value(*lows), self.value(*highs)

    @property
    def relaxed_operands(self) -> tuple[Node, ...]:
        """Bounds of an activation are as good as those of what it is taken of: it grows with that."""
        operands = []
        for parent in self.parents:
            node = parent.bounded_through
            while isinstance(node, Activation):
                node = node.parents[0].bounded_through
            operands.append(node)
        return tuple(dict.fromkeys(operands))

    def relax(self, *operands: Interval, slopes=None) -> Relaxation:
        """Of given slopes, the lower ones count: as shares, made to be of sum 1."""
        low, high = (self._stacked(ends) for ends in zip(*operands, strict=True))
        number = torch.arange(len(operands), device=low.device)[:, None, None]
        lower = (number == low.argmax(dim=0)).to(low)
        if slopes is not None:
            shares = torch.where(self.present[:, None], torch.stack(torch.broadcast_tensors(*slopes[0])), 0.0)
            total = shares.clamp(min=0.0).sum(dim=0)
            lower = torch.where(total > 0, shares.clamp(min=0.0) / torch.where(total > 0, total, 1.0), lower)
        pivot = high.argmax(dim=0, keepdim=True)
        left, top = low.gather(0, pivot).squeeze(0), high.gather(0, pivot).squeeze(0)
        others = torch.where(number == pivot, -torch.inf, high).amax(dim=0)
        alone = others <= left
        second = torch.where(alone, left, others)
        width = torch.where(alone, 1.0, top - left)
        slope = torch.where(alone, 1.0, (top - second) / width)
        upper = torch.where(number == pivot, slope, 0.0)
        intercept = torch.where(alone, 0.0, second - slope * left)
        zero = torch.zeros_like(intercept)
        return Relaxation(Plane(tuple(lower), zero), Plane(tuple(upper), intercept))

    def slope_ends(self, *operands: Interval) -> tuple[Interval, ...]:
        zero = torch.zeros_like(operands[0][0])
        return ((zero, zero + 1.0),) * len(operands)

    def derivative_ranges(self, *operands: Interval) -> tuple[Interval, ...]:
        """Of the share that an operand has in the greatest: 1 if it is that everywhere, 0 if nowhere, else any."""
        low, high = (self._stacked(ends) for ends in zip(*operands, strict=True))
        number = torch.arange(len(operands), device=low.device)[:, None, None]
        found = []
        for k in range(len(operands)):
            others = torch.where(number == k, -torch.inf, low).amax(dim=0)
            rivals = torch.where(number == k, -torch.inf, high).amax(dim=0)
            sure, never = low[k] > rivals, (high[k] < others) | ~self.present[k]
            found.append((sure.to(low), (~never).to(low)))
        return tuple(found)
