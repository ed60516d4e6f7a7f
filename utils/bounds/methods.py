"""Passes by the names of methods."""

from __future__ import annotations

from torch import Tensor

from ..graph.graph import Graph
from ..graph.nonlinear import NonLinear
from ..perturbation.sets import Perturbation
from ..relaxation.lines import Relaxation, pieces_of
from .balls import Balls
from .passes import BoundPass


class FastLinPass(BoundPass):
    """Fast-Lin (Weng et al., ICML 2018): both lines of a piecewise-linear activation have the upper one's slope."""

    def _relax(self, node: NonLinear, operands: list[tuple[Tensor, Tensor]]) -> Relaxation:
        if pieces_of(node.name) is None:
            raise ValueError(f"fastlin is for piecewise-linear activations, not {node.name}: take crown")
        (slope,) = super()._relax(node, operands).upper.slopes
        return node.relax(*operands, slopes=((slope,), (slope,)))


def fastlin(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> FastLinPass:
    return FastLinPass(graph, perturbation, "crown", slopes, sound)


def crown(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> BoundPass:
    return BoundPass(graph, perturbation, "crown", slopes, sound)


def ibp(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> BoundPass:
    return BoundPass(graph, perturbation, "ibp", slopes, sound)


def ball(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> BoundPass:
    """As crown-ibp, of networks whose layers lie in balls. Raises ValueError for others."""
    if not Balls.fit(graph, perturbation):
        raise ValueError("method ball is for feed-forward networks and p = 2: one l_2 ball, and no recurrent cell")
    return BoundPass(graph, perturbation, "crown-ibp", slopes, sound)


def crown_ibp(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> BoundPass:
    return BoundPass(graph, perturbation, "crown-ibp", slopes, sound)
