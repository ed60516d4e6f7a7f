"""Element-wise bounds of rows of the Jacobian over a perturbation set: a backward pass over the gradient's graph.

That graph (``utils.jacobian.adjoint``) differs from others only in its non-linear nodes, products of a derivative of
known range and an adjoint. So a pass over it bounds the gradient with respect to every frame:

- "joint": the product is kept as a plane in the adjoint and in what the derivative is taken at, where it has lines; the
  better of that and "chord", the default.
- "chord": as a line in the adjoint, the chord of max(low a, high a), the derivative being anywhere in its range.
- "recurjac": RecurJac's rule, which keeps the adjoint's symbol where its sign is known, else its interval.
- "interval": intervals alone. For piecewise-linear activations that is Fast-Lip.

Ranges of derivatives come from the intervals of any pass over the network itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bounds.passes import BoundPass
from ..choices.method import CHAINS, DIRECTIONS
from ..graph.nodes import Interval, Node, intersect
from ..perturbation.lp_ball import dual_norm
from .adjoint import Adjoint, Ranges, repeated
from .forward import first_layer_bounds, forward_bounds, known_operands
from .operator_norms import NormPass

ROW_BYTES = 2**20  # of coefficients that a backward pass works on at once


class JacobianPass(BoundPass):
    """Bounds of the gradients of ``rows @ output``, each row of a sample being a sample of its own.

    Attributes:
        adjoint: the gradient's graph.
    """

    def __init__(
        self,
        values: BoundPass,
        rows: Tensor,
        chain: str = CHAINS[0],
        sound: bool = True,
        direction: str = "backward",
        beside: JacobianPass | None = None,
    ):
        """``values`` is a pass over the network, whose perturbation set counts; rows are (batch, n_rows, classes).

        ``direction`` is "backward", or "both": then entries are bounded from the input on as well (``forward``),
        or "shift": by RecurJac's shift 1 alone.
        ``beside`` is a pass of another chain over the same, which has found where derivatives lie.
        """
        if chain not in CHAINS:
            raise ValueError(f"the bound of a Jacobian must be one of {', '.join(CHAINS)}, not {chain!r}")
        if direction not in DIRECTIONS or (direction != "backward" and chain == "interval"):
            known = ", ".join(DIRECTIONS)
            raise ValueError(f"the direction must be one of {known}, with lines, not {direction!r}")
        self._of_values, self._asked = values, rows.expand(len(values.perturbation.x), -1, -1)
        self.direction, self.rows_each = direction, rows.shape[1]
        rows = self._asked.flatten(0, 1)
        moving = [not values.is_exact(node) for node in values.graph.nodes]
        graph = beside.adjoint.network if beside else repeated(values.graph, self.rows_each)
        self._operands = beside._operands if beside else known_operands(values, graph, self.rows_each)
        ranges = beside.adjoint.ranges if beside else Ranges()
        self.adjoint = Adjoint(graph, rows, moving, "chord" if chain == "interval" else chain, ranges)
        by_intervals, known = chain == "interval" or direction == "shift", self._operands
        if direction == "shift":  # from that layer to the input go intervals
            first, bounds = first_layer_bounds(values, self._asked, chain, sound)
            moved = self.adjoint.of.get(graph.nodes[first.index])
            known = known if moved is None else known | {moved: bounds}
        super().__init__(
            self.adjoint.graph,
            values.perturbation.repeated(self.rows_each),
            "ibp" if by_intervals else "crown",
            None,
            sound,
            known,
        )
        self.chain, self._network = chain, values.graph
        self._widest = max(node.size for node in self.graph.nodes[len(values.graph.nodes) :])
        self._norms = NormPass(self.perturbation.norm, self, values.graph)
        # Where balls are wide, lines around derivatives say less than their ranges: the better of both counts.
        self._by_chord = None
        if self.adjoint.is_joint:
            self._by_chord = JacobianPass(values, self._asked, "chord", sound, direction, self)
        self._bounds: dict[tuple[int, bool], Interval] = {}

    @property
    def frames(self) -> list[int]:
        """The frames that something perturbs and the output depends on."""
        return sorted(self.adjoint.frames)

    def frame_bounds(self, frame: int) -> Interval:
        """Lower and upper bounds of the gradient with respect to a frame, (batch * n_rows, n) each."""
        asked = frame, torch.is_grad_enabled()
        if asked not in self._bounds:
            self._bounds[asked] = self._find_bounds(frame)
        return self._bounds[asked]

    def _find_bounds(self, frame: int) -> Interval:
        found = self._own_bounds(frame)
        if self._by_chord:
            low, high = self._by_chord.frame_bounds(frame)
            found = torch.fmax(low, found[0]), torch.fmin(high, found[1])  # whichever is a number
        return intersect(found, found)

    def _own_bounds(self, frame: int) -> Interval:
        node, weight = self.adjoint.frames[frame]
        columns = weight.T[None]
        lower, minus_upper = self._own_least(node, torch.cat((columns, -columns), dim=1)).split(weight.shape[1], dim=-1)
        found = (lower, -minus_upper)
        if self.direction == "both":
            sound = self.rounding is not None
            found = intersect(found, forward_bounds(self._of_values, self._asked, frame, self.chain, sound))
        return found

    def least(self, node: Node, rows: Tensor) -> Tensor:
        """Lower bounds of ``rows @ node``, the best of intervals and backward passes, (batch * n_rows, rows)."""
        found = self._own_least(node, rows)
        if self._by_chord is None:
            return found
        return torch.fmax(found, self._by_chord.least(self._by_chord.graph.nodes[node.index], rows))

    def _own_least(self, node: Node, rows: Tensor) -> Tensor:
        """By this chain alone, in parts that fit a cache: elements of wide inputs are many rows."""
        each = rows.element_size() * len(self.perturbation.x) * self._widest
        parts = rows.split(max(1, ROW_BYTES // each), dim=1)
        return torch.cat([self._least_of(node, part) for part in parts], dim=1)

    def _least_of(self, node: Node, rows: Tensor) -> Tensor:
        by_interval = self.interval_lower_bound(node, rows)
        if self.method == "ibp":
            return by_interval
        return torch.maximum(by_interval, self.lower_bound(node, rows))

    # --- how far the rows can fall over the set ---

    def fall(self) -> Tensor:
        """Most that a row of the output can fall below its value at x, anywhere in the set, (batch * n_rows,).

        By the mean value theorem that is at most the most that -J (x' - x) can be for a Jacobian J within its bounds.
        """
        if not self.frames:
            return self.perturbation.x.new_zeros(len(self.perturbation.x))
        apart = [self.frame_fall(frame)[:, None] for frame in self.frames]
        return self._raised(self.perturbation.total_deviation(apart).squeeze(-1))

    def frame_falls(self) -> Tensor:
        """Likewise, if only one frame moves, (batch * n_rows, T); 0 for frames that are exact."""
        falls = self.perturbation.x.new_zeros(self.perturbation.x.shape[:2])
        for frame in self.frames:
            falls[:, frame] = self._raised(self.frame_fall(frame))
        return falls

    def _raised(self, fall: Tensor) -> Tensor:
        """With room for the rounding of products and sums of positive numbers; any number where nothing is known."""
        room = self.rounding.gamma if self.rounding else 0.0
        return torch.where(fall.isnan(), torch.inf, (1.0 + room) * fall)

    def frame_fall(self, frame: int) -> Tensor:
        """The least of what entries, their row sums or lengths, and products of norms allow, (batch * n_rows,)."""
        if torch.is_grad_enabled():
            return self.perturbation.frame_fall(frame, *self.frame_bounds(frame))
        low, high = self.frame_bounds(frame)
        fall = torch.fmin(self.perturbation.frame_fall(frame, low, high), self._fall_by_norms(frame))
        if self.perturbation.is_round and self.chain in ("joint", "chord"):
            fall = torch.fmin(fall, self._round_fall(frame))
        if self.perturbation.is_box and self.chain != "interval":
            fall = torch.fmin(fall, self._box_fall(frame, low, high))
        return torch.fmin(fall, self._by_chord.frame_fall(frame)) if self._by_chord else fall

    def _box_fall(self, frame: int, low: Tensor, high: Tensor) -> Tensor:
        """Along all coordinates whose derivative has a known sign, the fall is one row; the others are added.

        This is RecurJac's bound of row sums, for boxes that need not be symmetric.
        """
        node, weight = self.adjoint.frames[frame]
        down, up = self.perturbation.sides(frame)
        zero = torch.zeros_like(low)
        direction = torch.where(low > 0, down, torch.where(high < 0, -up, zero))
        unsure = (low <= 0) & (high >= 0)
        rest = torch.where(unsure, torch.maximum(-low * up, high * down), zero).sum(dim=-1)
        known = rest - self._own_least(node, -(direction @ weight.T)[:, None]).squeeze(-1)
        known = known + self._lost(direction.abs() @ weight.abs().T, weight, self.interval(node))
        return torch.where((low <= high).all(dim=-1), known, torch.nan)  # NaN has no sign

    def _lost(self, rows: Tensor, weight: Tensor, of: Interval) -> Tensor:
        """What rounding of rows may change of their products with a node; ``rows`` are the sizes of their terms."""
        if not self.rounding:
            return torch.zeros_like(of[0][:, 0])
        most = torch.maximum(-of[0], of[1])
        return 2.0 * max(weight.shape) * torch.finfo(weight.dtype).eps * (rows * most).sum(dim=-1)

    def _round_fall(self, frame: int) -> Tensor:
        """In l_2 the gradient W^T a is as long as R a, W^T = Q R, and as H R a for the reflection H that turns the
        centre's gradient into the first axis: there it is long, and in all others it is only what it may differ by.
        """
        node, weight = self.adjoint.frames[frame]
        columns = _reflected(self._triangle(weight), 0.5 * sum(self.interval(node)))
        low, minus_high = self._own_least(node, torch.cat((columns, -columns), dim=1)).split(columns.shape[1], dim=1)
        length = dual_norm(torch.maximum(-low, -minus_high), 2.0)
        lost = 8.0 * self._lost(torch.linalg.vector_norm(weight, dim=1), weight, self.interval(node))
        return self.perturbation.most(frame, length + lost)

    def _triangle(self, weight: Tensor) -> Tensor:
        """R, (k, size of the node), of W^T = Q R, kept."""
        return self._network.once(("triangle",), (weight,), lambda: torch.linalg.qr(weight.T, mode="r").R)

    def _fall_by_norms(self, frame: int) -> Tensor:
        """By products of norms, of all that the gradient is made of or of how far it is from its centre."""
        node, weight = self.adjoint.frames[frame]
        norm, size = self.perturbation.norm, self._norms.of_matrix(weight)
        low, high = self.interval(node)
        center, radius = 0.5 * (low + high), 0.5 * (high - low)
        lost = 2.0 * weight.shape[0] * torch.finfo(weight.dtype).eps * dual_norm(center.abs() @ weight.abs(), norm)
        apart = dual_norm(center @ weight, norm) + lost + size * dual_norm(radius, norm)
        return self.perturbation.most(frame, torch.fmin(apart, self._norms.through(weight, node)))


def _reflected(triangle: Tensor, point: Tensor) -> Tensor:
    """H R for the Householder reflection H that maps R a, for the point a, onto the first axis, (batch, k, size)."""
    image = point @ triangle.T
    axis = torch.zeros_like(image)
    # Its negative half or its positive one, whichever is farther away: then nothing cancels.
    axis[:, 0] = torch.linalg.vector_norm(image, dim=1) * torch.where(image[:, 0] > 0, -1.0, 1.0)
    normal = image - axis
    # Scaled first: squares of small numbers vanish, and no reflection is left of a normal that is not of length 1.
    largest = normal.abs().amax(dim=1, keepdim=True)
    normal = normal / torch.where(largest > 0, largest, 1.0)
    normal = normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True).clamp(min=1.0)
    return triangle - 2.0 * normal[:, :, None] * (normal @ triangle)[:, None]
