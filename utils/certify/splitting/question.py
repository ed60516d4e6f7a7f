"""What is asked of a search over parts: rows of outputs over one perturbation set, of any kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...bounds.passes import BoundPass
from ...bounds.splits import knot_of
from ...graph.graph import Graph
from ...perturbation.sets import InputSet

TUNING = torch.float32  # precision in which parts are tuned; bounds that count are in the question's own
FEW = (
    0.15  # of a recurrent network's neurons: where more are open, curved bounds gain far more than cuts of single ones
)


@dataclass(frozen=True)
class SplitQuestion:
    """Rows of outputs over one set.

    Attributes:
        rows: (n_rows, outputs), in the precision of the bounds.
        whole: a pass over the set that is sound in it.
        graph_of: the network's graph in a precision, without gradients to its weights.
        set_of: a batch of so many times the set, in a precision.
    """

    rows: Tensor
    whole: BoundPass
    graph_of: Callable[[torch.dtype], Graph]
    set_of: Callable[[int, torch.dtype], InputSet]

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype


def has_pieces(graph: Graph) -> bool:
    """Whether there are neurons that can be split."""
    return any(knot_of(node) is not None for node in graph.nodes)


def few_change_sides(whole: BoundPass) -> bool:
    """Whether at most ``FEW`` of the neurons that can be split have operands on both sides of their knots.

    So it is in networks that were trained for their bounds.
    """
    sides = [
        (whole.interval(node.parents[0]), knot_of(node)) for node in whole.graph.nodes if knot_of(node) is not None
    ]
    both = [((low < knot) & (high > knot)).double() for (low, high), knot in sides]
    return bool(torch.cat(both, dim=1).mean() <= FEW)
