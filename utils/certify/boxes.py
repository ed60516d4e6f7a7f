"""Boxes of inputs, and a pass over them that looks at the clock."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bounds.passes import BoundPass
from ..clock import now
from ..graph.convolution import Convolution
from ..graph.graph import Graph
from ..graph.nodes import Linear, Node
from ..graph.sums import apply_rows
from ..perturbation.lp_ball import INF
from ..perturbation.sets import InputSet

PART_WORK = 3e9  # multiplications and additions that are done without a look at the clock, about
PART_SECONDS = 0.25  # if it took longer, the next part is half as large


def check_clock(deadline: float) -> None:
    """Raises TimeoutError once a deadline, of ``utils.clock``, is over."""
    if now() > deadline:
        raise TimeoutError("the time limit is reached")


def work_per_row(graph: Graph, node: Node | None = None) -> int:
    """About the multiplications and additions that one row of a backward pass from a node takes, or one evaluation."""
    nodes = graph.nodes if node is None else graph.nodes[: node.index + 1]
    linear = sum(weight.numel() for part in nodes if isinstance(part, Linear) for weight in part.weights)
    return 1 + 2 * (linear + sum(part.work for part in nodes if isinstance(part, Convolution)))


class BoxSet(InputSet):
    """Perturbation set of boxes, as ``utils.bounds`` asks of it: lower and upper are (batch, T, n).

    All passes ask it at the end of every part of their work, where it raises TimeoutError after the deadline.
    """

    norm = INF

    def __init__(self, lower: Tensor, upper: Tensor, deadline: float = math.inf):
        self.x, self.deadline = lower, deadline  # x is any point of the boxes
        self._center, self._radius = 0.5 * (lower + upper), 0.5 * (upper - lower)
        # Both ends must be inside however centre and radius were rounded.
        self._radius = torch.maximum(self._radius, torch.maximum(upper - self._center, self._center - lower))
        self._exact = (upper == lower).all(dim=0).all(dim=-1).tolist()

    def is_exact(self, frame: int) -> bool:
        return self._exact[frame]

    def center(self, frame: int) -> Tensor:
        return self._center[:, frame]

    def half_widths(self, frame: int) -> Tensor:
        return self._radius[:, frame]

    def frame_deviation(self, frame: int, coefficients: Tensor) -> Tensor:
        check_clock(self.deadline)
        return apply_rows(coefficients.abs(), self._radius[:, frame])

    def map_deviation(self, frame: int, absolute, norms, samples=slice(None)) -> Tensor:
        check_clock(self.deadline)
        return super().map_deviation(frame, absolute, norms, samples)

    def total_deviation(self, deviations: list[Tensor]) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*deviations), dim=-1).sum(dim=-1)


class PartedPass(BoundPass):
    """A "crown" pass that bounds rows in parts, smaller ones if they take long: the set looks at the clock between."""

    share = 1.0  # of the rows that ``PART_WORK`` allows

    def lower_bound(self, node: Node, rows: Tensor) -> Tensor:
        most = PART_WORK / work_per_row(self.graph, node) / len(self.perturbation.x)
        found, start = [], 0
        while start < rows.shape[1]:
            size, began = max(1, int(self.share * most)), now()
            found.append(super().lower_bound(node, rows[:, start : start + size]))
            start += size
            if now() - began > PART_SECONDS:
                self.share = 0.5 * self.share * min(1.0, rows.shape[1] / size)
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
