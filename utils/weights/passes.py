"""Bounds over moves of weights, and of the input with them: a pass that ends at frames and at parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bounds.backward import Sources
from ..bounds.passes import BoundPass
from ..graph.graph import Graph
from ..graph.nodes import Frame, Node
from ..graph.sums import sum_length
from ..perturbation.sets import Perturbation
from ..perturbation.substitutions import Substitutions
from .balls import PART, Use, WeightBalls
from .moved import KernelMove, Move, Moved, moved_graph
from .places import Place

KernelUse = tuple[KernelMove, Tensor, Tensor, Tensor]  # with rows, and the ends of what it acts on


class WeightSources(Sources):
    """Ends where the pass would over the inputs alone, and collects what parameters meet on the way."""

    def __init__(self, bounds: WeightPass, inputs: Sources):
        self.bounds, self._inputs = bounds, inputs
        self._uses: dict[str, list[Use]] = {}
        self._kernels: dict[str, list[KernelUse]] = {}

    def takes(self, node: Node) -> bool:
        return self._inputs.takes(node)

    def meet(self, node: Node, coefficients: Tensor, batch: int | None) -> Tensor | None:
        return self._inputs.meet(node, coefficients, batch)

    def collect(self, move: Move, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Rows of a moved node, (batch or 1, n_rows, size), and the ends of what the weight acts on."""
        if isinstance(move, KernelMove):
            self._kernels.setdefault(move.name, []).append((move, rows, low, high))
        else:
            self._uses.setdefault(move.name, []).append(move.use(rows, low, high))

    def _groups(self) -> list[tuple[str, list[Use]]]:
        """Uses that make the same move."""
        if self.bounds.shared:
            return list(self._uses.items())
        return [(name, [use]) for name, uses in self._uses.items() for use in uses]

    def _kernel_groups(self) -> list[tuple[str, list[KernelUse]]]:
        if self.bounds.shared:
            return list(self._kernels.items())
        return [(name, [part]) for name, parts in self._kernels.items() for part in parts]

    def deviation(self) -> Tensor | None:
        balls, rounding = self.bounds.weight_balls, self.bounds.rounding
        total = self._inputs.deviation()
        for name, uses in self._groups():
            longest = sum(map(sum_length, (uses[0].rows.shape[-1], uses[0].low.shape[-1]))) + len(uses) ** 2
            gamma = (longest + 16) * torch.finfo(uses[0].low.dtype).eps if rounding else 0.0
            own = balls.deviation(name, uses, gamma)
            total = own if total is None else total + own
        for name, parts in self._kernel_groups():
            own = _of_kernels(balls, name, parts) * (1.0 + (4.0 * rounding.gamma if rounding else 0.0))
            total = own if total is None else total + own
        return total


def _of_kernels(balls: WeightBalls, name: str, parts: list[KernelUse]) -> Tensor:
    """Entry by entry: the sum of all places' coefficients at centres, and the sum of their sizes at half-widths."""
    batch = max(len(balls.eps), *(len(rows) for _, rows, _, _ in parts))
    size = max(1, PART // (batch * parts[0][0].place.scale.numel()))
    pieces = zip(*(rows.split(size, dim=1) for _, rows, _, _ in parts), strict=True)
    found = []
    for rows in pieces:
        center = spread = 0.0
        for (move, _, low, high), own in zip(parts, rows, strict=True):
            if low is high:
                center = center + move.coefficients(own, low)
                continue
            center = center + move.coefficients(own, 0.5 * (low + high))
            spread = spread + move.coefficients(own.abs(), 0.5 * (high - low), move.place.scale.abs())
        found.append(balls.of_kernel(name, center.abs() + spread))
    return torch.cat(found, dim=1)


class WeightPass(BoundPass):
    """A pass over a graph, a set of inputs and balls of weights; see ``BoundPass``."""

    def __init__(
        self,
        graph: Graph,
        perturbation: Perturbation,
        balls: WeightBalls,
        places: dict[str, list[Place]],
        method: str = "crown",
        slopes: list | None = None,
        sound: bool = True,
        shared: bool = True,
    ):
        """``shared``: all uses of a parameter make the same move; else each has a ball of its own: a larger set."""
        self.weight_balls, self.shared = balls, shared
        self._collecting: WeightSources | None = None
        if isinstance(perturbation, Substitutions):
            raise ValueError("weights move together with balls and boxes of inputs, not with words")
        super().__init__(moved_graph(graph, places, balls), perturbation, method, slopes, sound)

    def _find_exact(self) -> list[bool]:
        exact: list[bool] = []
        for node in self.graph.nodes:
            if isinstance(node, Frame):
                exact.append(self.perturbation.is_exact(node.frame))
            else:
                exact.append(not isinstance(node, Moved) and all(exact[parent.index] for parent in node.parents))
        return exact

    def _tighten_operands(self) -> None:
        """Intervals of moved nodes whose parents are known are exact: rows would add nothing."""
        moved = (node for node in self.graph.nodes if isinstance(node, Moved))
        self._known |= {node for node in moved if all(map(self.is_exact, node.parents))}
        super()._tighten_operands()

    def interval_lower_bound(self, node: Node, rows: Tensor) -> Tensor:
        if isinstance(node, Moved):
            return self._lowered(node.lowest(self, rows), node, rows)
        return super().interval_lower_bound(node, rows)

    def sources(self) -> WeightSources:
        self._collecting = WeightSources(self, super().sources())
        return self._collecting

    def collect(self, move: Move, rows: Tensor, low: Tensor, high: Tensor) -> None:
        self._collecting.collect(move, rows, low, high)
