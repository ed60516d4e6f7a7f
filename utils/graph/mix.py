"""Sums of products that share a gate, such as a GRU's new state sigmoid(-z) tanh(n) + sigmoid(z) h."""

from __future__ import annotations

import torch
from torch import Tensor

from ..relaxation.planes import PRODUCTS
from .nodes import Bounds, Interval, Node, WeightedSum
from .nonlinear import Product
from .picks import Negative

Factors = tuple[float | Tensor, ...]


class GateSum(WeightedSum):
    """``sum_i factors[i] * f_i(x_i) * sigmoid(+-y)``: products whose gates are one node y or minus it.

    For any y the sum is least where each ``factors[i] * f_i(x_i)`` is, and then it is linear in sigmoid(y), as
    sigmoid(-y) = 1 - sigmoid(y). So it is least at one end of y for all products together, and the interval is exact
    for operands that vary freely; adding up the products' own intervals takes an end of y for each.
    """

    def interval(self, bounds: Bounds) -> Interval:
        gate, _ = _gate(self.parents[0])
        ends = [{1: y.sigmoid(), -1: (-y).sigmoid()} for y in bounds.interval(gate)]
        sums = [(0.0, 0.0), (0.0, 0.0)]
        for product, factor in zip(self.parents, self.factors, strict=True):
            states = [factor * PRODUCTS[product.name].factor(x) for x in bounds.interval(product.parents[0])]
            low, high = states if _positive(factor) else (torch.minimum(*states), torch.maximum(*states))
            opened = [end[_gate(product)[1]] for end in ends]
            sums = [(lo + low * g, hi + high * g) for (lo, hi), g in zip(sums, opened, strict=True)]
        (low, high), (other_low, other_high) = sums
        return torch.minimum(low, other_low), torch.maximum(high, other_high)


def weighted_sum(parents: tuple[Node, ...], factors: Factors | None = None) -> WeightedSum:
    """``WeightedSum``, as a ``GateSum`` where that is tighter."""
    gated = len(parents) > 1 and all(isinstance(parent, Product) for parent in parents)
    shared = gated and len({_gate(parent)[0] for parent in parents}) == 1
    return (GateSum if shared else WeightedSum)(parents, factors)


def _gate(product: Node) -> tuple[Node, int]:
    """The node y of a product's gate, and the sign that it has there."""
    gate, sign = product.parents[1], 1
    while isinstance(gate, Negative):
        gate, sign = gate.parents[0], -sign
    return gate, sign


def _positive(factor: float | Tensor) -> bool:
    return not isinstance(factor, Tensor) and factor > 0
