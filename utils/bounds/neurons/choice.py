"""Which neurons are worth rows of a backward pass: those whose bounds may change a plane.

A piecewise-linear activation is known where the interval of its operand holds no knot: its planes are the function, and
no tighter interval would change them. Such neurons are left with the interval that they have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph.convolution import Convolution
from ...graph.graph import Graph
from ...graph.nodes import Bounds, Frame, Interval, Linear, Node
from ...graph.nonlinear import Activation, NonLinear
from ...graph.pooling import Maximum
from ...graph.power import BandPower
from ...relaxation.lines import pieces_of


def readers(graph: Graph) -> dict[Node, list[NonLinear]]:
    """The nodes whose bounds relaxations need, and by which nodes."""
    found: dict[Node, list[NonLinear]] = {}
    for node in graph.nodes:
        for operand in node.relaxed_operands:
            found.setdefault(operand.bounded_through, []).append(node)
    return found


def is_exact_image(bounds: Bounds, node: Node) -> bool:
    """Whether rows would add nothing: of an affine map of one frame and of nothing else that moves, and of energies."""
    moved = [parent for parent in node.parents if not bounds.is_exact(parent)]
    if isinstance(node, BandPower):  # its interval takes its planes in
        return True
    return isinstance(node, (Linear, Convolution)) and len(moved) == 1 and isinstance(moved[0], Frame)


def undecided(node: Node, interval: Interval, read_by: list[NonLinear]) -> Tensor | None:
    """Neurons, (batch, size), whose bounds may change a plane, by the interval that is known; None for all."""
    low, high = (end.detach() for end in interval)
    chosen = torch.zeros_like(low, dtype=torch.bool)
    pooled = any(isinstance(reader, Maximum) for reader in read_by)
    activations = [reader for reader in read_by if not isinstance(reader, Maximum)]
    if pooled and not activations:
        return None
    for reader in activations:
        pieces = pieces_of(reader.name) if isinstance(reader, Activation) else None
        if pieces is None or reader.parents[0] is not node:
            return None
        for knot in pieces.knots:
            chosen |= ~((low >= knot) | (high <= knot))
        if pooled:  # of a maximum, what is not constant matters
            if not pieces.knots or pieces.slopes[0] != 0.0:
                return None
            chosen |= ~(high <= pieces.knots[0])
    return chosen
