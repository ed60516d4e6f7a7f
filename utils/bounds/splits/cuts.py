"""Cuts: which side of a point the inputs of some neurons lie on, and a multiplier for each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...graph.graph import Graph
from ...graph.nodes import Node
from ...graph.picks import Negative, Slice
from ...graph.pooling import Pick
from ..neurons import readers


class Neurons:
    """All neurons whose bounds relaxations need, numbered from 0 over the nodes that they are elements of.

    Attributes:
        nodes: these nodes, in the graph's order.
        starts: number of the first neuron of each.
        total: how many neurons there are.
    """

    def __init__(self, graph: Graph):
        self.nodes: list[Node] = sorted(readers(graph), key=lambda node: node.index)
        self.starts, self.total = [], 0
        for node in self.nodes:
            self.starts.append(self.total)
            self.total += node.size

    def spans(self):
        """Each node with the numbers of its neurons, (node, first, end)."""
        return ((node, start, start + node.size) for node, start in zip(self.nodes, self.starts, strict=True))

    def read_by(self, operand: Node) -> tuple[Tensor, float]:
        """Numbers of the neurons that an operand's elements are, (size,), and 1.0, or -1.0 where they are minus these.

        An operand is a node whose elements are neurons, or moves those of one (``Node.bounded_through``).
        """
        if isinstance(operand, (Negative, Slice, Pick)):
            numbers, sign = self.read_by(operand.parents[0])
            if isinstance(operand, Negative):
                return numbers, -sign
            places = operand.places if isinstance(operand, Pick) else slice(operand.start, operand.start + operand.size)
            return numbers[places], sign
        start = self.starts[self.nodes.index(operand)]
        return torch.arange(start, start + operand.size), 1.0


@dataclass
class Cuts:
    """Those of a batch of parts of perturbation sets, (parts, n_cuts) each; parts with fewer cuts are filled up.

    In a part lie the inputs x' for which, for each of its cuts, side (z - point) >= 0, where z is the neuron's input.

    Attributes:
        neuron: its number (``Neurons``), or -1 where there is no cut.
        side: 1.0 or -1.0.
        point: where the neuron's range is cut.
        multiplier: at least 0: what side (z - point) counts in a lower bound. Any multipliers are sound.
    """

    neuron: Tensor
    side: Tensor
    point: Tensor
    multiplier: Tensor

    @classmethod
    def none(cls, parts: int, like: Tensor) -> Cuts:
        """Of whole perturbation sets."""
        return cls(torch.zeros(parts, 0, dtype=torch.long, device=like.device), *(like.new_zeros(parts, 0),) * 3)

    def __getitem__(self, chosen: Tensor) -> Cuts:
        return Cuts(self.neuron[chosen], self.side[chosen], self.point[chosen], self.multiplier[chosen])

    def to(self, dtype: torch.dtype) -> Cuts:
        return Cuts(self.neuron, self.side.to(dtype), self.point.to(dtype), self.multiplier.to(dtype))

    def with_multiplier(self, multiplier: Tensor) -> Cuts:
        return replace(self, multiplier=multiplier)

    def and_at(self, neuron: Tensor, side: Tensor, point: Tensor) -> Cuts:
        """With one more cut in every part, (parts,) each, of multiplier 0."""
        new = (neuron, side, point, torch.zeros_like(point))
        mine = (self.neuron, self.side, self.point, self.multiplier)
        return Cuts(*(torch.cat((old, one[:, None]), dim=1) for old, one in zip(mine, new, strict=True)))

    def within(self, first: int, end: int) -> Tensor:
        """Which cuts are of the neurons from a number on to before another."""
        return (self.neuron >= first) & (self.neuron < end)

    def totals(self, values: Tensor, first: int, end: int) -> Tensor:
        """The sums of values, (parts, n_cuts), of each neuron from a number on, (parts, end - first)."""
        mine = self.within(first, end)
        place = torch.where(mine, self.neuron - first, 0)
        sums = values.new_zeros(len(values), end - first)
        return sums.scatter_add(1, place, torch.where(mine, values, 0.0))

    def narrowed(self, low: Tensor, high: Tensor, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Intervals of the neurons, (parts, end - first) each, cut, and the parts that are empty, (parts,)."""
        mine = self.within(first, end)
        place = torch.where(mine, self.neuron - first, 0)
        at_least = torch.where(mine & (self.side > 0), self.point, -torch.inf)
        at_most = torch.where(mine & (self.side < 0), self.point, torch.inf)
        low = low.scatter_reduce(1, place, at_least, "amax")
        high = high.scatter_reduce(1, place, at_most, "amin")
        empty = (low > high).any(dim=1)
        # What is said of an empty part does not matter, but has to be finite.
        return torch.minimum(low, high), high, empty
