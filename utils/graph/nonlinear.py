"""Nodes that are not linear, each replaced by its relaxation: activations and the gate products of LSTM and GRU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..relaxation.curves import CURVED, CurvedFunction
from ..relaxation.derivatives import derivative_ranges
from ..relaxation.lines import ACTIVATIONS, Relaxation
from ..relaxation.planes import PRODUCTS, relax_product
from .nodes import Along, Bounds, Chain, Interval, Node
from .sums import apply_rows


class NonLinear(Node):
    """A node that is replaced by its relaxation, made from the bounds of its operands (the parents)."""

    name: str = ""  # of the function, as tables of relaxations have it

    @property
    def kind(self) -> tuple[str, ...] | None:
        """What nodes have in common whose planes are made alike, element by element; None if no others are.

        Nor are those of subclasses, which may have settings of their own.
        """
        return None

    @property
    def curved(self) -> CurvedFunction | None:
        """What curved bounds of the node are made of; None if none are known."""
        return CURVED.get(self.name)

    @property
    def relaxed_operands(self) -> tuple[Node, ...]:
        return self.parents

    @property
    def plane_operands(self) -> tuple[Node, ...]:
        """The parents that the node's planes have slopes in."""
        return self.parents

    def relax(self, *operands: Interval, slopes=None) -> Relaxation:
        """Planes on the box of the operands' intervals, with the node's own choice of slopes or the given ones.

        Given slopes are a pair for the lower and the upper plane, each with a tensor an operand.
        """
        raise NotImplementedError

    def derivative_ranges(self, *operands: Interval) -> tuple[Interval, ...]:
        """Where the derivative in each operand lies over the box of their intervals."""
        return derivative_ranges(self.name, *operands)

    def slope_ranges(self, *operands: Interval) -> tuple[Tensor, ...]:
        """How far the derivative in each operand varies over the box: the scale on which slopes differ."""
        return tuple(high - low for low, high in self.slope_ends(*operands))

    def slope_ends(self, *operands: Interval) -> tuple[Interval, ...]:
        """Least and greatest derivative in each operand among corners and middles of the box."""
        derivatives = []
        for point in itertools.product(*((low, 0.5 * (low + high), high) for low, high in operands)):
            with torch.enable_grad():
                variables = [coordinate.detach().requires_grad_() for coordinate in point]
                derivatives.append(torch.autograd.grad(self.value(*variables).sum(), variables))
        stacked = [torch.stack(values) for values in zip(*derivatives, strict=True)]
        return tuple((values.amin(dim=0), values.amax(dim=0)) for values in stacked)

    def backward(self, coefficients: Tensor, bounds: Bounds) -> Tensor:
        lower, upper = bounds.relaxation(self)
        positive, negative = bounds.signed_parts(coefficients)
        constant = apply_rows(positive, lower.intercept) + apply_rows(negative, upper.intercept)
        for parent, low, high in zip(self.plane_operands, lower.slopes, upper.slopes, strict=True):
            if low is high:
                passed = coefficients * low.unsqueeze(-2)
            else:
                passed = torch.addcmul(positive * low.unsqueeze(-2), negative, high.unsqueeze(-2))
            if bounds.is_exact(parent):
                constant = constant + apply_rows(passed, bounds.exact_value(parent))
            else:
                bounds.pass_to(parent, passed)
        return constant

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        chain.derivatives(self, adjoint)

    def tangent(self, along: Along) -> Node:
        return along.derivatives(self)


class Activation(NonLinear):
    """An activation of ``utils.relaxation.ACTIVATIONS`` by name, element-wise."""

    def __init__(self, parent: Node, name: str):
        super().__init__(parent.size, (parent,))
        self.name = name

    @property
    def kind(self) -> tuple[str, ...] | None:
        return ("activation", self.name) if type(self) is Activation else None

    def value(self, parent: Tensor) -> Tensor:
        return ACTIVATIONS[self.name].function(parent)

    def ball_radius(self, norm: Callable[[Tensor], Tensor], radius: Tensor) -> Tensor | None:
        steepest = ACTIVATIONS[self.name].steepest
        return None if steepest is None else steepest * radius

    def interval(self, bounds: Bounds) -> Interval:
        low, high = bounds.interval(self.parents[0])
        image = ACTIVATIONS[self.name].image
        return (self.value(low), self.value(high)) if image is None else image(low, high)

    def relax(self, operand: Interval, slopes=None) -> Relaxation:
        return ACTIVATIONS[self.name].relax(*operand, None if slopes is None else (slopes[0][0], slopes[1][0]))


class Product(NonLinear):
    """A gate product of ``utils.relaxation.PRODUCTS`` by name: of a state-like x and a gate's pre-activation y."""

    def __init__(self, x: Node, y: Node, name: str, relaxation: str):
        super().__init__(x.size, (x, y))
        self.name, self.relaxation = name, relaxation

    @property
    def kind(self) -> tuple[str, ...] | None:
        return ("product", self.name, self.relaxation) if type(self) is Product else None

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return PRODUCTS[self.name].function(x, y)

    def interval(self, bounds: Bounds) -> Interval:
        """At corners of the box: the product grows with x, and with y where x > 0."""
        (lx, ux), (ly, uy) = (bounds.interval(operand) for operand in self.parents)
        low, high = torch.where(lx >= 0, ly, uy), torch.where(ux >= 0, uy, ly)
        return self.value(lx, low), self.value(ux, high)

    def relax(self, x: Interval, y: Interval, slopes=None) -> Relaxation:
        return relax_product(self.name, x, y, self.relaxation, slopes)
