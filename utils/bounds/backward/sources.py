"""Where a backward pass ends: what takes the coefficients of nodes that are known over the whole set."""

from __future__ import annotations

from torch import Tensor

from ...graph.nodes import Bounds, Frame, Node
from .contributions import spread


class Sources:
    """Collects the coefficients of one backward pass at the nodes where it ends."""

    def takes(self, node: Node) -> bool:
        """Whether the pass goes no further than this node."""
        raise NotImplementedError

    def meet(self, node: Node, coefficients: Tensor, batch: int | None) -> Tensor | None:
        """Take a node's coefficients, (batch or 1, rows, size); return a constant term, (batch, rows), if any.

        With a ``batch``, the node may have fewer samples than that; then what is kept has zeros for the others.
        """
        raise NotImplementedError

    def deviation(self) -> Tensor | None:
        """Most that what was taken can lie below its value at the set's centre, (batch, rows); None for nothing."""
        raise NotImplementedError


class FrameSources(Sources):
    """Ends at the input frames, whose deviations the set adds up."""

    def __init__(self, bounds: Bounds):
        self.bounds, self._deviations = bounds, []

    def takes(self, node: Node) -> bool:
        return isinstance(node, Frame)

    def meet(self, node: Node, coefficients: Tensor, batch: int | None) -> None:
        self._deviations.append(spread(self.bounds.deviation(node, coefficients), 0, batch))

    def deviation(self) -> Tensor | None:
        return self.bounds.perturbation.total_deviation(self._deviations) if self._deviations else None


class JointSources(Sources):
    """Ends at input frames that share a budget: the set takes the coefficients of all of them at once."""

    def __init__(self, bounds: Bounds):
        self.bounds, self._coefficients = bounds, {}

    def takes(self, node: Node) -> bool:
        return isinstance(node, Frame)

    def meet(self, node: Node, coefficients: Tensor, batch: int | None) -> None:
        self._coefficients[node.frame] = spread(coefficients, 0, batch)

    def deviation(self) -> Tensor | None:
        return self.bounds.joint_deviation(self._coefficients) if self._coefficients else None
