"""The gradient of a graph's outputs as nodes of the same kinds, so that whatever bounds a graph bounds gradients too.

With rows C of the outputs, the adjoint of a node v is a_v, the gradient of C @ output with respect to v:

    a_output = C,    a_p = sum over the nodes v that read p of  (dv / dp)^T a_v.

A linear node hands back W^T a_v, a non-linear one kappa * a_v element-wise, with its derivative kappa: that is the one
new node (``Derivative``), relaxed over the range of kappa, or jointly with what kappa is taken at. The gradient with
respect to an input frame is W^T a_v for the linear nodes v that read it (Zhang et al., RecurJac, AAAI 2019, section
3.1, for multi-layer perceptrons).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph.convolution import MAX_MATRIX
from ..graph.graph import Graph
from ..graph.mixing import MatMul, Shape, Softmax
from ..graph.nodes import Bounds, Constant, Frame, Interval, Linear, Node, WeightedSum
from ..graph.nonlinear import NonLinear
from ..graph.picks import Concat, Slice
from ..graph.pooling import Pick
from ..relaxation.derivatives import factor_interval, relax_factor
from ..relaxation.joint import FACTORS, relax_jointly
from ..relaxation.lines import Relaxation


class Ranges:
    """Where derivatives lie over the boxes that one pass, or passes that share it, know of: each is found once."""

    def __init__(self):
        self._known: dict[tuple, tuple] = {}

    def __call__(self, of: NonLinear, *operands: Interval) -> tuple[Interval, ...]:
        """Of the derivative in each operand."""
        key = (of, *(id(end) for interval in operands for end in interval))
        if key not in self._known:
            # The operands are kept, so that their ids stay their own.
            self._known[key] = (of.derivative_ranges(*operands), operands)
        return self._known[key][0]


class Derivative(NonLinear):
    """``kappa * a``: the adjoint a of a non-linear node times its derivative in operand k, somewhere on its box."""

    def __init__(self, adjoint: Node, of: NonLinear, operand: int, chain: str, ranges: Ranges):
        super().__init__(of.size, (adjoint, *of.parents))
        self.of, self.operand, self.ranges = of, operand, ranges
        self.factors = FACTORS[of.name][operand] if chain == "joint" and of.name in FACTORS else None
        self.chain = "chord" if chain == "joint" else chain  # of those whose derivative has no lines

    @property
    def plane_operands(self) -> tuple[Node, ...]:
        return self.parents if self.factors else self.parents[:1]

    def factor(self, *operands: Interval) -> Interval:
        """Range of kappa over the box of the operands."""
        return self.ranges(self.of, *operands)[self.operand]

    def value(self, adjoint: Tensor, *operands: Tensor) -> Tensor:
        low, high = self.factor(*((point, point) for point in operands))
        return adjoint * (0.5 * (low + high))

    def interval(self, bounds: Bounds) -> Interval:
        adjoint, *operands = (bounds.interval(parent) for parent in self.parents)
        return factor_interval(*self.factor(*operands), adjoint)

    def relax(self, adjoint: Interval, *operands: Interval, slopes=None) -> Relaxation:
        known = self.factor(*operands)
        if self.factors:
            return relax_jointly(self.factors, known, adjoint, operands)
        return relax_factor(*known, adjoint, self.chain)


class Adjoint:
    """A graph with the adjoints of its nodes appended.

    Attributes:
        graph: the nodes of the given graph, which stays as it is, and then the adjoints.
        of: adjoint of each node that something perturbs, by that node.
        frames: per input frame that is perturbed, a node a and a weight W, (size of a, frame size): the gradient with
            respect to the frame is W^T a.
    """

    def __init__(
        self,
        graph: Graph,
        rows: Tensor,
        moving: Sequence[bool],
        chain: str = "joint",
        ranges: Ranges | None = None,
    ):
        """``rows`` are C, (batch or 1, classes), one a sample; ``moving`` says which nodes something perturbs."""
        if any(node.samples is not None for node in graph.nodes):
            raise ValueError("gradients are bounded for all samples of a batch: give the graph no ends of samples")
        self.network, self.graph, self.moving, self.chain = graph, Graph(), moving, chain
        self.ranges = ranges or Ranges()
        self.graph.nodes = list(graph.nodes)
        self.graph.recurrent = True  # gradients lie in no balls that ``bounds.balls`` knows
        self.graph.kept = graph.kept
        self.of: dict[Node, Node] = {}
        self.frames: dict[int, tuple[Node, Tensor]] = {}
        self._parts: list[list[tuple]] = [[] for _ in graph.nodes]
        self._parts[graph.output.index] = [("scaled", self.graph.add(Constant(rows)), 1.0)]
        for node in reversed(graph.nodes):
            parts = self._parts[node.index]
            if not moving[node.index] or not parts:
                continue
            if isinstance(node, Frame):
                self.frames[node.frame] = self._meet_frame(parts)
            else:
                self.of[node] = self._sum(node, parts)
                node.hand_back(self.of[node], self)

    @property
    def is_joint(self) -> bool:
        """Whether some derivative is bounded jointly with what it is taken at."""
        return any(isinstance(node, Derivative) and node.factors for node in self.graph.nodes)

    # --- what nodes hand back ---

    def linear(self, parent: Node, adjoint: Node, weight: Tensor) -> None:
        """W^T a for a parent that entered by W."""
        self._give(parent, "linear", adjoint, weight)

    def scaled(self, parent: Node, adjoint: Node, factor: float | Tensor = 1.0) -> None:
        """factor * a."""
        self._give(parent, "scaled", adjoint, factor)

    def sliced(self, parent: Node, adjoint: Node, start: int) -> None:
        """The adjoint of a slice of the parent: zeros elsewhere."""
        self._give(parent, "sliced", adjoint, start)

    def picked(self, parent: Node, adjoint: Node, start: int) -> None:
        """The parent's elements of an adjoint of several nodes side by side."""
        if self.moving[parent.index]:
            self.scaled(parent, self.graph.add(Slice(adjoint, start, parent.size)))

    def derivatives(self, node: NonLinear, adjoint: Node) -> None:
        """kappa * a for each operand."""
        for number, parent in enumerate(node.parents):
            if self.moving[parent.index]:
                self.scaled(parent, self.graph.add(Derivative(adjoint, node, number, self.chain, self.ranges)))

    def placed(self, parent: Node, adjoint: Node, places: Tensor) -> None:
        """The adjoint of elements that were picked: each goes to its place, of which several may be one."""
        if not self.moving[parent.index]:
            return
        order = places.argsort()
        if torch.equal(places[order], torch.arange(parent.size, device=places.device)):
            self.scaled(parent, self.graph.add(Pick(adjoint, order)))
            return
        if len(places) * parent.size > MAX_MATRIX:
            raise ValueError(
                "gradients through so many picked values are not bounded: take a method that follows values"
            )
        self.linear(parent, adjoint, torch.eye(parent.size).to(self._like)[places])

    def product(self, node: MatMul, adjoint: Node) -> None:
        """Of X Y they are a Y^T and X^T a: products again, in which the other factor is perturbed as well."""
        (x, y), shape = node.parents, node.shape
        count, rows, inner, columns = shape.count, shape.rows, shape.inner, shape.columns
        if self.moving[x.index]:
            turned = self._turned(y, count, inner, columns)
            self.scaled(x, self.graph.add(MatMul(adjoint, turned, Shape(count, rows, columns, inner))))
        if self.moving[y.index]:
            turned = self._turned(x, count, rows, inner)
            self.scaled(y, self.graph.add(MatMul(turned, adjoint, Shape(count, inner, rows, columns))))

    def _turned(self, node: Node, count: int, rows: int, columns: int) -> Node:
        """Matrices transposed."""
        if rows == 1 or columns == 1:
            return node
        places = torch.arange(node.size, device=self._like.device).reshape(count, rows, columns).mT.flatten()
        return self.graph.add(Pick(node, places))

    def softmax(self, node: Softmax, adjoint: Node) -> None:
        """p a - p sum(p a), for each row p."""
        if not self.moving[node.parents[0].index]:
            return
        each = Shape(node.size, 1, 1, 1)
        weighed = self.graph.add(MatMul(node, adjoint, each))
        if node.size**2 > MAX_MATRIX:
            raise ValueError("gradients through so large a softmax are not bounded: take a method that follows values")
        ones = torch.ones(node.width, node.width).to(self._like)
        sums = torch.block_diag(*[ones] * (node.size // node.width))
        total = self.graph.add(Linear((weighed,), (sums,), sums.new_zeros(node.size)))
        spread = self.graph.add(MatMul(node, total, each))
        self.scaled(node.parents[0], self.graph.add(WeightedSum((weighed, spread), (1.0, -1.0))))

    @property
    def _like(self) -> Tensor:
        """A tensor of the network's type."""
        return next(node for node in self.network.nodes if isinstance(node, Linear)).bias.detach()

    def _give(self, parent: Node, *part) -> None:
        if self.moving[parent.index]:
            self._parts[parent.index].append(part)

    # --- sums of what was handed back ---

    def _sum(self, node: Node, parts: list[tuple]) -> Node:
        terms = [(adjoint, factor) for kind, adjoint, factor in parts if kind == "scaled"]
        linear = [(adjoint, weight.T) for kind, adjoint, weight in parts if kind == "linear"]
        slices = sorted(((start, a) for kind, a, start in parts if kind == "sliced"), key=lambda part: part[0])
        if slices and _tiles(slices, node.size):
            terms.append((self.graph.add(Concat(tuple(a for _, a in slices))), 1.0))
        else:
            linear += [(a, self._places(a.size, start, node.size)) for start, a in slices]
        if linear:
            adjoints, weights = zip(*linear, strict=True)
            zero = weights[0].new_zeros(node.size)
            terms.append((self.graph.add(Linear(adjoints, weights, zero)), 1.0))
        if len(terms) == 1 and isinstance(terms[0][1], float) and terms[0][1] == 1.0:
            return terms[0][0]
        return self.graph.add(WeightedSum(*zip(*terms, strict=True)))

    def _meet_frame(self, parts: list[tuple]) -> tuple[Node, Tensor]:
        adjoints, weights = zip(*((adjoint, weight) for _, adjoint, weight in parts), strict=True)
        if len(adjoints) == 1:
            return adjoints[0], weights[0]
        whole = self.network.once(("stack",), weights, lambda: torch.cat(weights))
        return self.graph.add(Concat(adjoints)), whole

    def _places(self, size: int, start: int, whole: int) -> Tensor:
        """The matrix, (whole, size), that puts a vector at a place in a longer one."""
        like = self._like
        where = ("places", size, start, whole, like.dtype, like.device)
        return self.network.once(where, (), lambda: torch.eye(whole).to(like)[:, start : start + size])


def _tiles(slices: list[tuple[int, Node]], size: int) -> bool:
    ends = [start + adjoint.size for start, adjoint in slices]
    return [start for start, _ in slices] == [0, *ends[:-1]] and ends[-1] == size


def repeated(graph: Graph, times: int) -> Graph:
    """The graph for a batch in which every sample of its own batch stands ``times`` times in a row."""
    changed = [node.repeated(times) if times > 1 else {} for node in graph.nodes]
    if not any(changed):
        return graph
    new = Graph()
    new.recurrent = graph.recurrent
    new.kept = graph.kept  # the weights are the same
    for node, attributes in zip(graph.nodes, changed, strict=True):
        twin = copy.copy(node)
        vars(twin).update(attributes)
        twin.parents = tuple(new.nodes[parent.index] for parent in node.parents)
        new.nodes.append(twin)
    return new
