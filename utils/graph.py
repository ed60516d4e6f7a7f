"""A classifier unrolled into nodes: what they compute, their intervals and how coefficients pass back through them.

A graph is a list of nodes in topological order, each a vector of ``size`` numbers a sample. Few kinds suffice for
recurrent cells, bidirectional and deep stacks, and feed-forward nets. An architecture builds them in ``utils.unroll``;
``utils.bounds`` walks them.

Backward mode keeps, for each node v, coefficients A of shape (batch or 1, rows, size) in the lower bound
``sum_v A_v v + bias`` of the rows being bounded. Handing them to the parents, a non-linear node replaces itself by its
lower plane where a coefficient is positive and by its upper plane where it is negative.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.planes import PRODUCTS, relax_product
from utils.relaxations import ACTIVATIONS, Relaxation

if TYPE_CHECKING:
    from utils.bounds import BoundPass

Interval = tuple[Tensor, Tensor]


def apply_rows(coefficients: Tensor, values: Tensor) -> Tensor:
    """A v for every row: (batch or 1, rows, n) and (batch or 1, n) to (batch, rows)."""
    if coefficients.shape[0] == 1:
        return values @ coefficients[0].T
    if values.shape[0] == 1:
        return coefficients @ values[0]
    # As a row vector times a matrix: a batch of matrices times column vectors runs ten times slower.
    return torch.bmm(values.unsqueeze(1), coefficients.mT).squeeze(1)


class Node:
    """One vector of the unrolled network.

    Attributes:
        index: its place in the graph.
        samples: how many samples have it, the first ones of the batch; None for all. It is bounded for these alone.
    """

    index: int = -1
    samples: int | None = None

    def __init__(self, size: int, parents: tuple[Node, ...]):
        self.size, self.parents = size, parents

    def value(self, *parents: Tensor) -> Tensor:
        """The node at exact parent values, (batch, size)."""
        raise NotImplementedError

    def interval(self, bounds: BoundPass) -> Interval:
        """Bounds from the parents' intervals, (batch, size) each."""
        raise NotImplementedError

    def backward(self, coefficients: Tensor, bounds: BoundPass) -> Tensor | None:
        """Hand coefficients to the parents by ``bounds.pass_to``; return the constant term, (batch, rows), if any."""
        raise NotImplementedError

    def detach(self) -> None:
        """Let the node's own tensors carry no gradients."""

    @property
    def relaxed_operands(self) -> tuple[Node, ...]:
        """Parents whose bounds the node's relaxation needs."""
        return ()

    @property
    def bounded_through(self) -> Node:
        """The node whose bounds give this one's without loss: itself, or what a slice or negation is taken of."""
        return self


class Frame(Node):
    """The input of time step ``frame``. Its children are Linear nodes only, which account for the ball's centre."""

    def __init__(self, size: int, frame: int):
        super().__init__(size, ())
        self.frame = frame
        self.child_weights: list[Tensor] = []

    def detach(self) -> None:
        self.child_weights = [weight.detach() for weight in self.child_weights]


class Constant(Node):
    """A vector known beforehand, such as an initial state: (size,) or (batch, size)."""

    def __init__(self, vector: Tensor):
        super().__init__(vector.shape[-1], ())
        self.vector = vector if vector.dim() == 2 else vector[None]

    def detach(self) -> None:
        self.vector = self.vector.detach()

    def value(self) -> Tensor:
        return self.vector


class Linear(Node):
    """``sum_i weights[i] @ parents[i] + bias``, weights (size, parent size), bias (size,).

    ``bias_size``, (size,), is the sum of the absolute values of the terms that made the bias, if several did.
    """

    def __init__(
        self,
        parents: tuple[Node, ...],
        weights: tuple[Tensor, ...],
        bias: Tensor,
        bias_size: Tensor | None = None,
    ):
        super().__init__(bias.shape[0], tuple(parents))
        self.weights, self.bias = tuple(weights), bias
        self.bias_size = (bias if bias_size is None else bias_size).detach().abs()

    def detach(self) -> None:
        self.weights, self.bias = tuple(weight.detach() for weight in self.weights), self.bias.detach()

    def value(self, *parents: Tensor) -> Tensor:
        return self.bias + sum(v @ w.T for v, w in zip(parents, self.weights, strict=True))

    def offset(self, bounds: BoundPass) -> Tensor:
        """Bias plus all that exact parents and the centres of perturbed frames contribute, (batch or 1, size)."""
        total = self.bias[None]
        for parent, weight in zip(self.parents, self.weights, strict=True):
            known = bounds.known_part(parent)
            if known is not None:
                total = total + known @ weight.T
        return total

    def inexact_parents(self, bounds: BoundPass):
        """The (parent, weight) pairs through which the perturbation comes; of a frame, what acts on its deviation."""
        pairs = zip(self.parents, self.weights, strict=True)
        return [
            (parent, bounds.ball_weight(parent, weight) if isinstance(parent, Frame) else weight)
            for parent, weight in pairs
            if not bounds.is_exact(parent)
        ]

    def interval(self, bounds: BoundPass) -> Interval:
        center, radius = self.center_radius(bounds, None)
        return center - radius, center + radius

    def center_radius(self, bounds: BoundPass, rows: Tensor | None) -> Interval:
        """Interval of ``rows @ node`` as centre and radius, (batch, n_rows).

        Rows are (batch or 1, n_rows, size), or None for the node itself. They are
        folded into the weights first: the interval of a difference, not the difference of intervals.
        """
        center, radius = bounds.offset(self), 0.0
        if rows is not None:
            center = apply_rows(rows, center)
        for parent, weight in self.inexact_parents(bounds):
            folded = weight[None] if rows is None else rows @ weight
            if isinstance(parent, Frame):
                radius = radius + bounds.deviation(parent, folded)
                continue
            low, high = bounds.interval(parent)
            center = center + apply_rows(folded, 0.5 * (low + high))
            radius = radius + apply_rows(folded.abs(), 0.5 * (high - low))
        return center, radius

    def backward(self, coefficients: Tensor, bounds: BoundPass) -> Tensor:
        for parent, weight in self.inexact_parents(bounds):
            bounds.pass_to(parent, coefficients @ weight)
        return apply_rows(coefficients, bounds.offset(self))


class WeightedSum(Node):
    """``sum_i factors[i] * parents[i]``, element-wise: additions, means, and choices between states by a mask.

    A factor is a number or a tensor that broadcasts to (batch, size).
    """

    def __init__(self, parents: tuple[Node, ...], factors: tuple[float | Tensor, ...] | None = None):
        super().__init__(parents[0].size, tuple(parents))
        self.factors = (1.0,) * len(parents) if factors is None else tuple(factors)

    def value(self, *parents: Tensor) -> Tensor:
        return sum(f * v for f, v in zip(self.factors, parents, strict=True))

    def interval(self, bounds: BoundPass) -> Interval:
        lower = upper = 0.0
        for parent, factor in zip(self.parents, self.factors, strict=True):
            low, high = (factor * end for end in bounds.interval(parent))
            lower, upper = lower + torch.minimum(low, high), upper + torch.maximum(low, high)
        return lower, upper

    def backward(self, coefficients: Tensor, bounds: BoundPass) -> Tensor | None:
        constant = None
        for parent, factor in zip(self.parents, self.factors, strict=True):
            scaled = coefficients * _per_row(factor) if isinstance(factor, Tensor) or factor != 1.0 else coefficients
            if bounds.is_exact(parent):
                term = apply_rows(scaled, bounds.exact_value(parent))
                constant = term if constant is None else constant + term
            else:
                bounds.pass_to(parent, scaled)
        return constant


def _per_row(factor: float | Tensor) -> float | Tensor:
    return factor.unsqueeze(-2) if isinstance(factor, Tensor) and factor.dim() > 1 else factor


class LastState(Node):
    """Each sample's own last state, where samples of a batch are in the order of their ends, the last one first.

    Parent k is the last state of samples starts[k] ... starts[k + 1] - 1.
    """

    def __init__(self, parents: tuple[Node, ...], starts: tuple[int, ...]):
        super().__init__(parents[0].size, parents)
        self.starts = starts

    def _join(self, parents: tuple[Tensor, ...]) -> Tensor:
        ends = zip(parents, self.starts, (*self.starts[1:], None), strict=True)
        return torch.cat([parent[start:end] for parent, start, end in ends])

    def value(self, *parents: Tensor) -> Tensor:
        return self._join(parents)

    def interval(self, bounds: BoundPass) -> Interval:
        lows, highs = zip(*(bounds.interval(parent) for parent in self.parents), strict=True)
        return self._join(lows), self._join(highs)

    def backward(self, coefficients: Tensor, bounds: BoundPass) -> None:
        for parent, start, end in zip(self.parents, self.starts, (*self.starts[1:], None), strict=True):
            bounds.pass_to(parent, coefficients[start:end], first_sample=start)


class Slice(Node):
    """Elements start ... start + size of the parent: one gate of a stack of them."""

    def __init__(self, parent: Node, start: int, size: int):
        super().__init__(size, (parent,))
        self.start = start

    def of(self, vector: Tensor) -> Tensor:
        return vector[..., self.start : self.start + self.size]

    def value(self, parent: Tensor) -> Tensor:
        return self.of(parent)

    def interval(self, bounds: BoundPass) -> Interval:
        low, high = bounds.interval(self.parents[0])
        return self.of(low), self.of(high)

    def backward(self, coefficients: Tensor, bounds: BoundPass) -> None:
        bounds.pass_to(self.parents[0], coefficients, start=self.start)

    @property
    def bounded_through(self) -> Node:
        return self.parents[0].bounded_through


class Negative(Node):
    """Minus the parent."""

    def __init__(self, parent: Node):
        super().__init__(parent.size, (parent,))

    def value(self, parent: Tensor) -> Tensor:
        return -parent

    def interval(self, bounds: BoundPass) -> Interval:
        low, high = bounds.interval(self.parents[0])
        return -high, -low

    def backward(self, coefficients: Tensor, bounds: BoundPass) -> None:
        bounds.pass_to(self.parents[0], -coefficients)

    @property
    def bounded_through(self) -> Node:
        return self.parents[0].bounded_through


class NonLinear(Node):
    """A node that is replaced by its relaxation, made from the bounds of its operands (the parents)."""

    @property
    def relaxed_operands(self) -> tuple[Node, ...]:
        return self.parents

    def relax(self, *operands: Interval, slopes=None) -> Relaxation:
        """Planes on the box of the operands' intervals, with the node's own choice of slopes or the given ones.

        Given slopes are a pair for the lower and the upper plane, each with a tensor an operand.
        """
        raise NotImplementedError

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

    def backward(self, coefficients: Tensor, bounds: BoundPass) -> Tensor:
        lower, upper = bounds.relaxation(self)
        positive, negative = bounds.signed_parts(coefficients)
        constant = apply_rows(positive, lower.intercept) + apply_rows(negative, upper.intercept)
        for parent, low, high in zip(self.parents, lower.slopes, upper.slopes, strict=True):
            if low is high:
                passed = coefficients * low.unsqueeze(-2)
            else:
                passed = torch.addcmul(positive * low.unsqueeze(-2), negative, high.unsqueeze(-2))
            if bounds.is_exact(parent):
                constant = constant + apply_rows(passed, bounds.exact_value(parent))
            else:
                bounds.pass_to(parent, passed)
        return constant


class Activation(NonLinear):
    """An activation of ``utils.relaxations.ACTIVATIONS`` by name, element-wise."""

    def __init__(self, parent: Node, name: str):
        super().__init__(parent.size, (parent,))
        self.name = name

    def value(self, parent: Tensor) -> Tensor:
        return ACTIVATIONS[self.name].function(parent)

    def interval(self, bounds: BoundPass) -> Interval:
        low, high = bounds.interval(self.parents[0])
        return self.value(low), self.value(high)

    def relax(self, operand: Interval, slopes=None) -> Relaxation:
        return ACTIVATIONS[self.name].relax(*operand, None if slopes is None else (slopes[0][0], slopes[1][0]))


class Product(NonLinear):
    """A gate product of ``utils.planes.PRODUCTS`` by name: of a state-like x and a gate's pre-activation y."""

    def __init__(self, x: Node, y: Node, name: str, relaxation: str):
        super().__init__(x.size, (x, y))
        self.name, self.relaxation = name, relaxation

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return PRODUCTS[self.name].function(x, y)

    def interval(self, bounds: BoundPass) -> Interval:
        """At corners of the box: the product grows with x, and with y where x > 0."""
        (lx, ux), (ly, uy) = (bounds.interval(operand) for operand in self.parents)
        low, high = torch.where(lx >= 0, ly, uy), torch.where(ux >= 0, uy, ly)
        return self.value(lx, low), self.value(ux, high)

    def relax(self, x: Interval, y: Interval, slopes=None) -> Relaxation:
        return relax_product(self.name, x, y, self.relaxation, slopes)


class Graph:
    """Nodes in topological order; the last one is the output (logits)."""

    def __init__(self):
        self.nodes: list[Node] = []
        self.samples: int | None = None  # of the nodes that are added next
        self._reduced: dict[tuple, Tensor] = {}

    def add(self, node: Node) -> Node:
        """Append a node whose parents are in the graph already, and return it."""
        for parent in node.parents:
            if not 0 <= parent.index < len(self.nodes) or self.nodes[parent.index] is not parent:
                raise ValueError("a node's parents must be added to the graph before it")
            if isinstance(parent, Frame) and not isinstance(node, Linear):
                raise ValueError("an input frame must enter through a Linear node (the identity, if nothing else)")
        for parent, weight in zip(node.parents, node.weights, strict=True) if isinstance(node, Linear) else ():
            if isinstance(parent, Frame):
                parent.child_weights.append(weight)
        node.samples = self.samples
        node.index = len(self.nodes)
        self.nodes.append(node)
        return node

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    def detach(self) -> Graph:
        """Let the graph's own tensors carry no gradients to the model, which stays as it is; returns the graph."""
        for node in self.nodes:
            node.detach()
        return self

    def reduced_weight(self, frame: Frame, weight: Tensor) -> Tensor:
        """``weight`` times an orthonormal basis of the space spanned by the rows of all weights that meet the frame."""
        children = frame.child_weights
        if sum(child.shape[0] for child in children) >= frame.size:
            return weight
        # Frames share weights, of which each holds views of its own.
        key = tuple((child.data_ptr(), child.shape, child.stride()) for child in (weight, *children))
        if key not in self._reduced:
            basis, _ = torch.linalg.qr(torch.cat(children).detach().T)
            self._reduced[key] = weight.detach() @ basis
        return self._reduced[key]

    @property
    def frames(self) -> list[Frame]:
        return [node for node in self.nodes if isinstance(node, Frame)]

    def evaluate(self, x: Tensor) -> Tensor:
        """The output at the sequences x, (batch, T, n): the forward pass."""
        return self._values(x)[-1]

    def term_sizes(self, x: Tensor, rows: Tensor) -> Tensor:
        """Sums of the absolute values of the terms that make ``rows @ output`` at x, (batch, n_rows).

        Rounding is in proportion to these, not to what is left when terms cancel. Rows are (batch or 1, n_rows, size).
        """
        values, output = self._values(x), self.output
        pairs = [(values[-1], rows)]
        if isinstance(output, Linear):
            pairs = [(values[p.index], rows @ weight) for p, weight in zip(output.parents, output.weights, strict=True)]
            pairs.append((output.bias[None], rows))
        return sum((factors.abs() @ part.abs().unsqueeze(-1)).squeeze(-1) for part, factors in pairs)

    def _values(self, x: Tensor) -> list[Tensor]:
        """Every node's value."""
        values: list[Tensor] = []
        for node in self.nodes:
            if isinstance(node, Frame):
                values.append(x[:, node.frame])
            else:
                values.append(node.value(*(values[parent.index] for parent in node.parents)))
        return values
