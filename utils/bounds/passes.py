"""Bounds of a graph's nodes over a perturbation set: IBP, CROWN and CROWN-IBP.

Only lower bounds are ever computed: an upper bound is minus the lower bound of minus the node, so the bounds of a node
are the rows [I; -I] of one backward pass.

- "ibp": intervals passed forward.
- "crown": every relaxed operand is bounded by a backward pass to the input, in topological order, and cut to its
  interval; then the specification rows.
- "crown-ibp": operands are bounded by their intervals, the specification rows by a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from ..graph.convolution import Convolution
from ..graph.graph import Graph
from ..graph.nodes import Frame, Interval, Linear, Node, intersect
from ..graph.nonlinear import NonLinear
from ..graph.sums import apply_rows
from ..perturbation.lp_ball import dual_norm
from ..perturbation.sets import Perturbation
from ..perturbation.substitutions import Substitutions
from ..relaxation.lines import Plane, Relaxation
from .backward import Contribution, FrameSources, JointSources, Sources, alike, gather, relaxed, spread
from .balls import Balls
from .neurons import is_exact_image, readers, tightened
from .rounding import Rounding
from .waves.shared import SharedSquares
from .words import Words

WORD_ROWS = 256  # of a sentence's nodes that are bounded at once: coefficients of more fit no cache
METHODS = ("crown", "ibp", "crown-ibp")  # of one pass; ``utils.certify.interface`` adds those that take several


class BoundPass:
    """Everything that is known of one graph's nodes over one perturbation set.

    Nothing outlives the object: intervals, values and relaxations are made once, when they are first asked for.
    """

    chooses = True  # the neurons that get rows

    def __init__(
        self,
        graph: Graph,
        perturbation: Perturbation,
        method: str = "crown",
        slopes: list | None = None,
        sound: bool = True,
        intervals: dict[Node, Interval] | None = None,
    ):
        """``slopes`` are those of the planes, by non-linear node (``SlopeTable``); None for the default.

        With ``sound=False`` nothing is taken off for rounding (``rounding``): no bound but an estimate. ``intervals``
        are bounds of some nodes, known from elsewhere, that need no others.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        self.graph, self.perturbation, self.method = graph, perturbation, method
        self._uneven = any(node.samples is not None for node in graph.nodes)
        self._values: dict[Node, Tensor] = {}
        self._exact = self._find_exact()
        self.words = Words(self) if isinstance(perturbation, Substitutions) else None
        self.rounding = Rounding(self) if sound else None
        self.balls = Balls(self) if Balls.fit(graph, perturbation) else None
        self._target: Node | None = None  # of the backward pass at work
        self.has_images = any(isinstance(node, Convolution) for node in graph.nodes)
        self._offsets: dict[Node, Tensor] = {}
        self._made: dict[Node, tuple[Tensor, ...]] = {}
        self._weights: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._intervals: dict[Node, Interval] = dict(intervals or {})
        self._known = frozenset(self._intervals)
        self._relaxations: dict[Node, Relaxation] = {}
        self._fitted: dict[Node, tuple[int | None, Relaxation]] = {}
        self._perturbations: dict[int, Perturbation] = {}
        nonlinear = [node for node in graph.nodes if isinstance(node, NonLinear)]
        self._slopes = dict(zip(nonlinear, slopes, strict=True)) if slopes is not None else {}
        self._samples: int | None = None  # how many samples the node at work has
        self._pending: list[list[Contribution]] = []
        self._sources: Sources | None = None
        self._parts: tuple[Tensor, Tensor, Tensor] | None = None
        if method == "crown":
            self._tighten_operands()

    # --- samples that end early ---

    def at(self, node: Node) -> AbstractContextManager:
        """What is asked for meanwhile is for the node's samples alone."""
        return self._among(node) if self._uneven else nullcontext()

    @contextmanager
    def _among(self, node: Node) -> Iterator[None]:
        before, self._samples = self._samples, node.samples
        yield
        self._samples = before

    def fit(self, tensor: Tensor) -> Tensor:
        """A tensor (batch or 1, ...) for the samples of the node at work."""
        if self._samples is None or tensor.shape[0] <= self._samples:
            return tensor
        return tensor[: self._samples]

    # --- what is exact ---

    def _find_exact(self) -> list[bool]:
        exact: list[bool] = []
        for node in self.graph.nodes:
            if isinstance(node, Frame):
                exact.append(self.perturbation.is_exact(node.frame))
            else:
                exact.append(all(exact[parent.index] for parent in node.parents))
        return exact

    def is_exact(self, node: Node) -> bool:
        """True if no perturbation of any sample reaches the node."""
        return self._exact[node.index]

    def exact_value(self, node: Node) -> Tensor:
        """Value of an exact node, (batch or 1, size)."""
        if node not in self._values:
            with self.at(node):
                if isinstance(node, Frame):
                    self._values[node] = self.perturbation.center(node.frame)
                else:
                    self._values[node] = node.value(*(self.exact_value(parent) for parent in node.parents))
        return self.fit(self._values[node])

    def known_part(self, node: Node) -> Tensor | None:
        """What a Linear child may add up beforehand: an exact node's value, a perturbed frame's centre, else None."""
        if isinstance(node, Frame):
            return self.fit(self.perturbation.center(node.frame))
        return self.exact_value(node) if self.is_exact(node) else None

    def offset(self, node: Node) -> Tensor:
        """``node.offset``, made once."""
        if node not in self._offsets:
            with self.at(node):
                self._offsets[node] = node.offset(self)
        return self.fit(self._offsets[node])

    def ball_weight(self, frame: Frame, weight: Tensor) -> Tensor:
        """A Linear child's weight for a frame's deviation from its centre, (size, frame size or less).

        An l_2 ball looks the same in any orthonormal coordinates, so the deviation is taken in a basis Q of the space
        that the frame's children look at: ||A W||_2 = ||A W Q||_2, and W Q has fewer columns if frames are wide.
        """
        # All children of a frame take the same coordinates: their coefficients are added.
        learnt = torch.is_grad_enabled() and any(child.requires_grad for child in frame.child_weights)
        if not self.perturbation.is_round or learnt:
            return weight
        return self.graph.reduced_weight(frame, weight)

    # --- intervals and relaxations ---

    def interval(self, node: Node) -> Interval:
        """Tightest known (lower, upper) of a node, (batch, size) each."""
        if node not in self._intervals:
            with self.at(node):
                value = self.exact_value(node) if self.is_exact(node) else None
                low, high = self._own_interval(node) if value is None else (value, value)
                if self.rounding:
                    lost = self.rounding.of_interval(node, low, high)
                    low, high = low - lost, high + lost
                box = self.balls.box(node) if self.balls else None
                self._intervals[node] = (low, high) if box is None else intersect((low, high), box)
        low, high = self._intervals[node]
        return self.fit(low), self.fit(high)

    def _own_interval(self, node: Node) -> Interval:
        return self.words.interval(node) if self.words and self.words.is_leaf(node) else node.interval(self)

    def known_interval(self, node: Node) -> Interval | None:
        """The interval of a node that is perturbed, if it was asked for before."""
        return self._intervals.get(node)

    def half_widths(self, frame: Frame) -> Tensor:
        """``Perturbation.half_widths`` for the samples of the node at work."""
        return self._narrowed().half_widths(frame.frame)

    def deviation(self, frame: Frame, coefficients: Tensor) -> Tensor:
        """``Perturbation.frame_deviation`` for the samples of the node at work."""
        return self._narrowed().frame_deviation(frame.frame, coefficients)

    def joint_deviation(self, coefficients: dict[int, Tensor]) -> Tensor:
        """``CutBalls.joint_deviation`` for the samples of the node at work."""
        return self._narrowed().joint_deviation(coefficients)

    def weight_reach(self, frame: Frame, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``Perturbation.frame_reach`` for a Linear child's weight; frames that share it share the work."""
        if self.words:
            return self.words.reach(frame, weight)
        perturbation = self._narrowed()
        if perturbation.norms_weights:
            norms = self._of_weight("norm", weight, lambda: dual_norm(weight, perturbation.norm))
            return (perturbation.eps[:, frame.frame, None] * norms,) * 2
        return perturbation.frame_reach(frame.frame, weight)

    def absolute(self, weight: Tensor) -> Tensor:
        """The absolute values of a weight, made once for the nodes that share it."""
        return self._of_weight("absolute", weight, weight.abs)

    def _of_weight(self, what: str, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        key = (what, id(weight))
        if key not in self._weights:
            self._weights[key] = (weight, make())  # the weight is kept, so that its id stays its own
        return self._weights[key][1]

    def map_reach(self, frame: Frame, node: Convolution) -> tuple[Tensor, Tensor]:
        """Most that each element of a convolution of the frame can fall and rise, (batch, size) each."""
        made_of = (node.weight,)

        def norms(norm: float) -> Tensor:
            what = ("rows", norm, node.windows, node.transposed)
            return self.graph.once(what, made_of, lambda: node.row_norms(norm))

        perturbation = self._narrowed()
        if perturbation.takes_windows and node.has_taps:
            return node.reach_by_taps(partial(perturbation.window_deviation, frame.frame))
        return perturbation.map_reach(frame.frame, node.apply, node.absolute, norms)

    def squared_radius(self, frames: Sequence[Frame]) -> Tensor:
        """``Perturbation.squared_radius`` for the samples of the node at work."""
        return self._narrowed().squared_radius([frame.frame for frame in frames])

    def lose(self, frames: Sequence[Frame], lost: Tensor) -> Tensor | None:
        """What rows lose by squares of moves of some frames (``SharedSquares.take``): a constant, if one by now."""
        if not self.perturbation.shares_squares:
            return -lost
        self._shared.take([frame for frame in frames if not self.is_exact(frame)], lost)
        return None

    def once(self, node: Node, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What a node makes of the perturbation set, (batch or 1, ...) each, for the samples of the node at work."""
        if node not in self._made:
            with self.at(node):
                self._made[node] = make()
        return tuple(map(self.fit, self._made[node]))

    def _narrowed(self) -> Perturbation:
        if self._samples is None:
            return self.perturbation
        if self._samples not in self._perturbations:
            self._perturbations[self._samples] = self.perturbation.of_first(self._samples)
        return self._perturbations[self._samples]

    def _tighten_operands(self) -> None:
        """Bound, by backward passes, every node that some relaxation needs bounds of."""
        needed = readers(self.graph)
        for node in sorted(needed.keys() - self._known, key=lambda operand: operand.index):
            if not self._is_known(node) and not (self.chooses and is_exact_image(self, node)):
                self._intervals[node] = intersect(self.interval(node), tightened(self, node, needed[node]))

    def bound_by_rows(self, node: Node) -> Interval:
        """Bounds of a node's elements as those of the rows [I; -I]."""
        rows = torch.eye(node.size).to(self.interval(node)[0])
        parts = torch.cat((rows, -rows))[None].split(WORD_ROWS if self.words else 2 * node.size, dim=1)
        bounds = torch.cat([self.lower_bound(node, part) for part in parts], dim=1)
        lower, minus_upper = bounds.split(node.size, dim=-1)
        return lower, -minus_upper

    def relaxation(self, node: NonLinear) -> Relaxation:
        """Planes around a non-linear node on the box of its operands' intervals."""
        if node not in self._relaxations:
            with self.at(node):
                for one, planes in relaxed(self, self._relaxed_with(node), self._relax):
                    self._relaxations[one] = self.widened(one, planes)
        if self._samples == node.samples:
            return self._relaxations[node]
        if node not in self._fitted or self._fitted[node][0] != self._samples:
            self._fitted[node] = (self._samples, self._fit_relaxation(self._relaxations[node]))
        return self._fitted[node][1]

    def _relaxed_with(self, node: NonLinear) -> list[NonLinear]:
        """The nodes whose planes are made together with a node's; it is one of them."""
        if self.method == "crown" or self._slopes or self._uneven or self._target is None:
            return [node]  # the others' operands have no bounds yet, or planes depend on more than these
        below = [one for one in self.graph.nodes[: self._target.index + 1] if isinstance(one, NonLinear)]
        fresh = [one for one in below if one not in self._relaxations and not self._is_known(one)]
        return alike(fresh, node, len(self.perturbation.x))

    def _is_known(self, node: Node) -> bool:
        """Whether no planes are put around a node."""
        return self.is_exact(node) or (self.words is not None and self.words.is_leaf(node))

    def _relax(self, node: NonLinear, operands: list[Interval]) -> Relaxation:
        return node.relax(*operands, slopes=self._slopes.get(node))

    def widened(self, node: NonLinear, relaxation: Relaxation) -> Relaxation:
        """Planes with room for the rounding of what passes through them."""
        return self.rounding.widen(node, relaxation) if self.rounding else relaxation

    def _fit_relaxation(self, relaxation: Relaxation) -> Relaxation:
        lower, upper = (Plane(tuple(map(self.fit, plane.slopes)), self.fit(plane.intercept)) for plane in relaxation)
        # Slopes that both planes share stay one tensor: ``NonLinear.backward`` saves work then.
        pairs = zip(relaxation.lower.slopes, relaxation.upper.slopes, lower.slopes, upper.slopes, strict=True)
        shared = tuple(low if a is b else high for a, b, low, high in pairs)
        return Relaxation(lower, Plane(shared, upper.intercept))

    def known_relaxation(self, node: NonLinear) -> Relaxation | None:
        """The planes that this pass has put around a node, if it needed any."""
        return self._relaxations.get(node)

    # --- lower bounds of rows ---

    def margin(self, rows: Tensor) -> Tensor:
        """Lower bounds of ``rows @ output``, (batch, n_rows), for rows (batch or 1, n_rows, output size)."""
        output = self.graph.output
        cheap = self.interval_lower_bound(output, rows)
        by_ball = self.balls.lower_bound(output, rows) if self.balls else None
        if by_ball is not None:
            cheap = torch.fmax(cheap, by_ball)
        if self.method == "ibp":
            return cheap
        return torch.maximum(cheap, self.lower_bound(output, rows))

    def interval_lower_bound(self, node: Node, rows: Tensor) -> Tensor:
        """Lower bound of ``rows @ node`` from intervals alone, with the rows folded into a Linear node."""
        if isinstance(node, Linear) and not self.is_exact(node):
            return self._lowered(node.lowest(self, rows), node, rows)
        low, high = self.interval(node)
        lowest = apply_rows(rows.clamp(min=0.0), low) + apply_rows(rows.clamp(max=0.0), high)
        return self._lowered(lowest, node, rows)

    def _lowered(self, bound: Tensor, node: Node, rows: Tensor) -> Tensor:
        return bound - self.rounding.lost(node, rows) if self.rounding else bound

    def lower_bound(self, node: Node, rows: Tensor) -> Tensor:
        """Lower bound of ``rows @ node`` over the perturbation set, (batch, n_rows), by a backward pass."""
        with self.at(node):
            lowest = apply_rows(rows, self.exact_value(node)) if self.is_exact(node) else self._pass_back(node, rows)
            return self._lowered(lowest, node, rows)

    def _pass_back(self, node: Node, rows: Tensor) -> Tensor:
        asked, self._target = self._samples, node
        everyone = len(self.perturbation.x) if asked is None and self._uneven else None
        self._shared = SharedSquares(everyone)
        self._pending = [[] for _ in range(node.index + 1)]
        self.pass_to(node, rows if everyone is None else rows.expand(everyone, -1, -1))
        constants: list[Tensor] = []
        sources = self._sources = self.sources()
        for current in reversed(self.graph.nodes[: node.index + 1]):
            contributions = self._pending.pop()
            if not contributions:
                continue
            batch = None
            if asked is None and current.samples is not None:  # fewer samples have this node than were asked for
                batch = self._samples = current.samples
            coefficients = gather(contributions, current.size, batch)
            gained = self._meet(current, coefficients)
            if gained is not None:
                constants.append(gained)
            if sources.takes(current):
                constant = sources.meet(current, coefficients, everyone)
            else:
                constant = current.backward(coefficients, self)
            if constant is not None:
                constants.append(constant)
        self._samples, self._parts = asked, None
        total = sum(spread(constant, 0, everyone) for constant in constants)
        for taken in (self._shared.most(), sources.deviation()):
            total = total if taken is None else total - taken
        return total

    def sources(self) -> Sources:
        """Where the next backward pass ends."""
        if self.words:
            return self.words.sources()
        return JointSources(self) if self.perturbation.is_joint else FrameSources(self)

    def _meet(self, node: Node, coefficients: Tensor) -> Tensor | None:
        """Called with a node and all its coefficients when a backward pass comes to it; what rows gain, (batch, rows).

        The rows that are bounded in the end take every layer as a ball, where that is better.
        """
        if self.balls and self._target is self.graph.output and isinstance(node, NonLinear):
            return self.balls.gain(node, coefficients)
        return None

    def signed_parts(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Positive and negative part; the last are kept: the terms of a sum share their coefficients."""
        if self._parts is None or self._parts[0] is not coefficients:
            self._parts = (coefficients, coefficients.clamp(min=0.0), coefficients.clamp(max=0.0))
        return self._parts[1:]

    def pass_to(self, node: Node, coefficients: Tensor, start: int | None = None, first_sample: int = 0) -> None:
        """Add coefficients to those of an inexact node, or of its elements or samples from some number on."""
        self._pending[node.index].append((start, first_sample, coefficients))

    def pass_through(self, node: Node, coefficients: Tensor, weight: Tensor) -> None:
        """Add ``coefficients @ weight`` to those of an inexact node."""
        if self.words and isinstance(node, Frame):
            self._sources.meet_moves(node, coefficients, weight)
        else:
            self.pass_to(node, coefficients @ weight)
