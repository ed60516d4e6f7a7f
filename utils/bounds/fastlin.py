"""Fast-Lin (Weng et al., ICML 2018): both lines of a piecewise-linear activation have the upper one's slope."""

from __future__ import annotations

from torch import Tensor

from ..graph.graph import Graph
from ..graph.nonlinear import NonLinear
from ..perturbation.sets import Perturbation
from ..relaxation.lines import Relaxation, pieces_of
from .passes import BoundPass


class FastLinPass(BoundPass):
    """A backward pass with parallel lines; see ``BoundPass``."""

    def _relax(self, node: NonLinear, operands: list[tuple[Tensor, Tensor]]) -> Relaxation:
        if pieces_of(node.name) is None:
            raise ValueError(f"fastlin is for piecewise-linear activations, not {node.name}: take crown")
        (slope,) = super()._relax(node, operands).upper.slopes
        return node.relax(*operands, slopes=((slope,), (slope,)))


def fastlin(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> FastLinPass:
    return FastLinPass(graph, perturbation, "crown", slopes, sound)
