"""A backward pass over parts of perturbation sets (beta-CROWN: Wang et al., NeurIPS 2021).

In a part, side (z - point) >= 0 for each cut of a neuron's input z. So for any multipliers b >= 0

    C f(x') >= min over the whole set of  C f - sum b side (z - point),

a bound of rows that have coefficients of middle nodes, too. Planes are those of the intervals that the cuts leave.
These come from the whole set's, narrowed by the cuts and by intervals of what they change; no rows bound them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...graph.graph import Graph
from ...graph.nodes import Interval, Node
from ...graph.nonlinear import Activation, NonLinear
from ...graph.sums import apply_rows
from ...perturbation.sets import Perturbation
from ...relaxation.lines import Plane, Relaxation, pieces_of
from ..passes import BoundPass
from .cuts import Cuts, Neurons


@dataclass
class Narrowed:
    """What is known of neurons over a batch of parts, by the index of their node: intervals, and chords above them."""

    intervals: dict[int, Interval]
    chords: dict[int, Plane] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Narrowed:
        return Narrowed({index: tuple(end.to(dtype) for end in ends) for index, ends in self.intervals.items()})


class CutPass(BoundPass):
    """Bounds of a batch of parts; ``margin`` is inf for empty ones.

    Attributes:
        empty: (parts,): where cuts contradict intervals.
        losses: by non-linear node, the most that its planes cost the last rows that ended the graph, (parts, size).
    """

    def __init__(
        self,
        graph: Graph,
        perturbation: Perturbation,
        neurons: Neurons,
        known: Narrowed,
        cuts: Cuts,
        slopes: list | None = None,
        sound: bool = True,
        fresh: bool = True,
    ):
        """``known`` are intervals of the whole sets, or of parts that these are parts of.

        ``fresh``: the cuts change them; else they are those of a pass over the same parts (``narrowed``).
        """
        self.neurons, self.cuts, self._outer, self._fresh = neurons, cuts, known.intervals, fresh
        self._chords = {} if fresh else known.chords
        self._span = {node.index: (start, end) for node, start, end in neurons.spans()}
        self.empty = torch.zeros(len(cuts.neuron), dtype=torch.bool, device=cuts.neuron.device)
        self.losses: dict[NonLinear, Tensor] = {}
        super().__init__(graph, perturbation, "crown-ibp", slopes, sound)
        self.balls = None

    def interval(self, node: Node) -> Interval:
        if node not in self._intervals and node.index in self._outer:
            self._intervals[node] = self._cut(node)
        return super().interval(node)

    def _cut(self, node: Node) -> Interval:
        low, high = self._outer[node.index]
        if not self._fresh or self.is_exact(node):
            return low, high
        own = self._own_interval(node)
        if self.rounding:
            lost = self.rounding.of_interval(node, *own)
            own = (own[0] - lost, own[1] + lost)
        low, high = torch.maximum(low, own[0]), torch.minimum(high, own[1])
        low, high, empty = self.cuts.narrowed(low, high, *self._span[node.index])
        self.empty = self.empty | empty
        return low, high

    def narrowed(self) -> Narrowed:
        """Intervals of all neurons."""
        return Narrowed({node.index: self.interval(node) for node in self.neurons.nodes})

    def _relax(self, node: NonLinear, operands: list[Interval]) -> Relaxation:
        """With chords above convex functions of two pieces, and the function itself where its piece is known."""
        slopes, knot = self._slopes.get(node), knot_of(node)
        if slopes is None or knot is None:
            return node.relax(*operands, slopes=slopes)
        (low, high), (first, second) = operands[0], pieces_of(node.name).slopes
        below = torch.where(high <= knot, first, torch.where(low >= knot, second, slopes[0][0]))
        if node.index not in self._chords:
            with torch.no_grad():
                chord = (node.value(high) - node.value(low)) / torch.where(high > low, high - low, 1.0)
                chord = torch.where(high > low, chord.clamp(first, second), below)
                self._chords[node.index] = Plane((chord,), node.value(high) - chord * high)
        chord = self._chords[node.index]
        if self.rounding:
            return node.relax(*operands, slopes=((below,), chord.slopes))
        at_knot = node.value(low.new_tensor(knot))
        return Relaxation(Plane((below,), at_knot - knot * below), chord)

    def margin(self, rows: Tensor) -> Tensor:
        found = super().margin(rows)
        return torch.where(self.empty[:, None], torch.inf, found)

    def _meet(self, node: Node, coefficients: Tensor) -> Tensor | None:
        if self._target is not self.graph.output:
            return super()._meet(node, coefficients)
        if node is self._target:
            return self._multiplied(coefficients)
        if not torch.is_grad_enabled() and knot_of(node) is not None:
            self.losses[node] = self._loss(node, coefficients)
        return None

    def _multiplied(self, rows: Tensor) -> Tensor | None:
        """Hands every neuron with cuts its multipliers and returns their constants, (parts, 1)."""
        cuts, gained = self.cuts, None
        if not cuts.neuron.shape[1]:
            return None
        weight = cuts.side * cuts.multiplier
        for node, start, end in self.neurons.spans():
            if self.is_exact(node) or not bool(cuts.within(start, end).any()):
                continue
            total = cuts.totals(weight, start, end)
            self.pass_to(node, -total[:, None].expand(-1, rows.shape[1], -1))
            terms = weight * cuts.point * cuts.within(start, end)
            constant = terms.sum(dim=1, keepdim=True)
            if self.rounding:
                size, error = self.rounding.of(node)
                lost = apply_rows(total.abs()[:, None], error + self.rounding.gamma_of(node) * size)
                constant = constant - lost - self.rounding.gamma * terms.abs().sum(dim=1, keepdim=True)
            gained = constant if gained is None else gained + constant
        return gained

    def _loss(self, node: NonLinear, coefficients: Tensor) -> Tensor:
        """The most that planes and the function are apart, as rows count it, (parts, size)."""
        lower, upper = self.relaxation(node)
        positive, negative = self.signed_parts(coefficients)
        low, high = self.interval(node.parents[0])
        ends = [torch.full_like(low, knot_of(node)).clamp(low, high), low, high]
        values = [node.value(end) for end in ends]
        below = torch.stack([v - lower.slopes[0] * z - lower.intercept for v, z in zip(values, ends, strict=True)])
        above = torch.stack([upper.slopes[0] * z + upper.intercept - v for v, z in zip(values, ends, strict=True)])
        return (positive * below.amax(dim=0)[:, None] - negative * above.amax(dim=0)[:, None]).amax(dim=1)


def knot_of(node: Node) -> float | None:
    """Where neurons of the node are cut: the knot of a convex function of two linear pieces; None for other nodes."""
    pieces = pieces_of(node.name) if isinstance(node, Activation) else None
    if pieces is None or len(pieces.knots) != 1 or pieces.slopes[0] >= pieces.slopes[1]:
        return None
    return pieces.knots[0]
