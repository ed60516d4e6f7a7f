"""Bounds of the Jacobian from the input on: RecurJac's other direction.

The derivatives of the nodes along a vector of the input are handed on from layer to layer, W t through a linear node,
kappa * t through a non-linear one: a network as deep as the network itself, for every coordinate of the input. Bounds
differ from those of the backward direction (``utils.jacobian.passes``): other values are replaced by lines. Each
is tighter on some entries, and the best of both holds. It costs a pass for every coordinate.

RecurJac's shift 1 begins at the first hidden layer h in place of the input, and goes from there to the input by
intervals, W^T (kappa * [least, most]): fewer passes where the input is wider than that layer, and looser bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bounds.passes import BoundPass
from ..graph.graph import Graph
from ..graph.mixing import Mixing
from ..graph.nodes import Constant, Frame, Interval, Linear, Node, WeightedSum, intersect
from ..graph.nonlinear import Activation, NonLinear
from .adjoint import Derivative, Ranges, repeated

AT_ONCE = 2**21  # coefficients of hidden neurons in one pass


class Tangents:
    """A graph with the derivatives of its nodes along some vectors of one frame appended.

    Attributes:
        graph: the nodes of the given graph, and then the tangents.
        output: that of the output; None if nothing comes to it from the start.
    """

    def __init__(self, graph: Graph, start: Node, vectors: Tensor, chain: str):
        """``vectors`` are (batch, size of the node ``start``), one a sample; ``start`` is a node of the graph."""
        self.graph, self.chain = Graph(), chain
        self.graph.nodes, self.graph.recurrent = list(graph.nodes), True
        self.ranges = Ranges()
        self._of: dict[Node, Node] = {}
        for node in graph.nodes:
            if node is start:
                self._of[node] = self.graph.add(Constant(vectors))
            elif self.moved(node):
                self._of[node] = self.graph.add(node.tangent(self))
        self.output = self._of.get(graph.output)

    # --- what nodes ask for ---

    def moved(self, node: Node) -> list[int]:
        """Numbers of the parents that change along the vectors."""
        return [number for number, parent in enumerate(node.parents) if parent in self._of]

    def of(self, node: Node) -> Node:
        """The tangent; zeros of a node that does not change."""
        if node in self._of:
            return self._of[node]
        like = next(n for n in self.graph.nodes if isinstance(n, Linear)).bias
        return self.graph.add(Constant(like.new_zeros(node.size)))

    def derivatives(self, node: NonLinear) -> Node:
        """The sum of kappa * t over the operands."""
        parts = [
            Derivative(self._of[node.parents[number]], node, number, self.chain, self.ranges)
            for number in self.moved(node)
        ]
        return parts[0] if len(parts) == 1 else WeightedSum(tuple(self.graph.add(part) for part in parts))


def forward_bounds(values: BoundPass, rows: Tensor, frame: int, chain: str, sound: bool = True) -> Interval:
    """Lower and upper bounds of the gradients of ``rows @ output`` in a frame, (batch * n_rows, n) each.

    Arguments as for ``JacobianPass``; chain is any but "interval".
    """
    return bounds_from(values, rows, next(n for n in values.graph.frames if n.frame == frame), chain, sound)


def first_layer_bounds(values: BoundPass, rows: Tensor, chain: str, sound: bool = True) -> tuple[Node, Interval]:
    """The first layer of activations, and bounds of the derivatives in it: what RecurJac's shift 1 begins with.

    Raises ValueError unless the network is a perceptron.
    """
    first = first_layer(values.graph)
    return first, bounds_from(values, rows, first, chain, sound)


def first_layer(graph: Graph) -> Activation:
    """The activation through which alone the input goes on."""
    start = graph.frames[0]
    readers = [node for node in graph.nodes if start in node.parents]
    after = [node for node in graph.nodes if readers and readers[0] in node.parents]
    fits = len(readers) == len(after) == 1 and isinstance(readers[0], Linear) and isinstance(after[0], Activation)
    if not fits or len(graph.frames) > 1 or readers[0].parents != (start,):
        raise ValueError("direction shift is for perceptrons, whose input meets one layer of activations")
    return after[0]


def bounds_from(values: BoundPass, rows: Tensor, start: Node, chain: str, sound: bool) -> Interval:
    """Bounds of the derivatives of ``rows @ output`` in a node's elements, (batch * n_rows, size) each."""
    batch, count = rows.shape[:2]
    width = start.size
    hidden = max(node.size for node in values.graph.nodes if not isinstance(node, Frame))
    size = max(1, AT_ONCE // (batch * 2 * hidden**2))
    parts = [_columns(values, rows, start, part, chain, sound) for part in torch.arange(width).split(size)]
    lower, upper = (torch.cat(ends, dim=1).mT.reshape(batch * count, width) for ends in zip(*parts, strict=True))
    return intersect((lower, upper), (lower, upper))


def _columns(values: BoundPass, rows: Tensor, start: Node, which: Tensor, chain: str, sound: bool) -> Interval:
    """Of some elements of the node, (batch, elements, n_rows) each."""
    batch, times = len(rows), len(which)
    vectors = torch.eye(start.size, dtype=rows.dtype, device=rows.device)[which].repeat(batch, 1)
    graph = repeated(values.graph, times)
    tangents = Tangents(graph, graph.nodes[start.index], vectors, chain)
    if tangents.output is None:
        nothing = rows.new_zeros(batch, times, rows.shape[1])
        return nothing, nothing
    known = known_operands(values, graph, times)
    around = values.perturbation.repeated(times)
    bounds = BoundPass(tangents.graph, around, "crown", None, sound, known)
    both = torch.cat((rows, -rows), dim=1).repeat_interleave(times, dim=0)
    cheap = bounds.interval_lower_bound(tangents.output, both)
    least = torch.maximum(cheap, bounds.lower_bound(tangents.output, both)).reshape(batch, times, -1)
    lower, minus_upper = least.split(rows.shape[1], dim=-1)
    return lower, -minus_upper


def known_operands(values: BoundPass, graph: Graph, times: int) -> dict[Node, Interval]:
    """Intervals of what non-linear nodes read, and of what that is a part of, for the graph ``repeated`` so often."""
    mixed = (NonLinear, Mixing)
    operands = {operand for node in values.graph.nodes if isinstance(node, mixed) for operand in node.parents}
    operands |= {operand.bounded_through for operand in operands}

    return {
        graph.nodes[operand.index]: tuple(_for_rows(end, times) for end in values.interval(operand))
        for operand in operands
    }


def _for_rows(tensor: Tensor, times: int) -> Tensor:
    return tensor if tensor.shape[0] == 1 else tensor.repeat_interleave(times, dim=0)
