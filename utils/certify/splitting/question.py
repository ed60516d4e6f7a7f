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
    """Whether there are neurons that can be split, of a network without cells."""
    return not graph.recurrent and any(knot_of(node) is not None for node in graph.nodes)
