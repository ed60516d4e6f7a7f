"""Curved bounds, and what all neurons can do at once: tighter than planes where many neurons add their errors.

A plane pays for the worst point of its own neuron's box, and a sum over neurons pays as if all of them could be at
their worst point together. Bounds with a curvature (``relaxation.curves``) leave the function only with the distance
d_k of the neuron's operand from the middle of its range, so that a row with coefficients A loses

    sum_k w_k d_k^2,        w_k = |A_k| q_k / 2 >= 0,

and this sum has a bound over the whole perturbation set. With linear bounds of the operands in the perturbation
delta, d_k = J_k delta + rho_k and |rho_k| <= R_k, so that for any t_k > 0

    sum_k w_k d_k^2  <=  max over delta of sum_k w_k (1 + t_k) (J_k delta)^2  +  sum_k w_k (1 + 1/t_k) R_k^2,

and the maximum is at most the largest eigenvalue of the weighted Gram matrix of the J_k (in coordinates in which the
perturbation set lies in a ball of radius 1, ``quadratic``; for boxes there is better, ``box_quadratic``),
many times less than its trace, which planes pay. Of the output's rows, line and squares are bounded together: they
seldom are at their worst at the same point (but for p = 1, as lines lose more in a ball of l_2 around an l_1 ball than
is won).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph.graph import Graph
from ..graph.nodes import Frame, Interval, Node, intersect
from ..graph.nonlinear import NonLinear
from ..graph.picks import Negative, Slice
from ..perturbation.sets import Perturbation
from ..relaxation.curves import Curves, curved_relaxation
from ..relaxation.lines import Relaxation
from .balls import squares_in_ball
from .passes import BoundPass
from .squares import Guesses, largest_eigenvalue, line_and_squares, line_and_squares_over_box, squares_over_box
from .waves import Narrow

# Where tuning starts, by the number of operands: shares of the tangent's slopes, the rest being those of the planes,
# and of its curvatures.
START = {1: (0.7, 0.9), 2: (0.6, 0.9)}
OWN_SHARE = 0.5  # how far a neuron's linear part is taken to be from the middle, of the most it can be; measured
LINE_SHARE = 2.0  # how much a row's line counts beside its squares where scales are chosen

CurveTable = list[Curves | None]
PassGuesses = dict[Node, Guesses]


class Operand(NamedTuple):
    """An operand z of a neuron is in  centre + J delta -+ R,  and J delta is in  -+ width.

    J is (batch, size, n), width, R and the centre are (batch, size).
    """

    slopes: Tensor
    width: Tensor
    remainder: Tensor
    center: Tensor


class CurvedPass(BoundPass):
    """A "crown" pass whose nodes have curved bounds, with given curves or those that tuning starts from."""

    chooses = False

    def __init__(
        self,
        graph: Graph,
        perturbation: Perturbation,
        curves: CurveTable | None = None,
        sound: bool = True,
        guesses: PassGuesses | None = None,
    ):
        """With ``sound=False``, what neurons lose together is estimated: no bound, but good enough to tune by.

        ``guesses`` are taken from an earlier pass over the same graph and set, and kept for a later one.
        """
        self._sound, self._guesses = sound, guesses
        nonlinear = [node for node in graph.nodes if isinstance(node, NonLinear)]
        self._curves = dict(zip(nonlinear, curves or [None] * len(nonlinear), strict=True))
        self._chosen: dict[Node, Curves] = {}
        self._linear: dict[Node, Operand] = {}
        self._through: dict[Node, set[Frame]] = {}  # frames that an operand's rows have met
        self._met: tuple[dict[Frame, Tensor], list[tuple[Node, Tensor]]] = ({}, [])
        moved = [frame for frame in graph.frames if not perturbation.is_exact(frame.frame)]
        self._frames = [frame for frame in moved if frame.child_weights or frame.whole]  # a forward may leave some out
        self._narrow: Narrow | None = None
        super().__init__(graph, perturbation, "crown", sound=sound)

    # --- one backward pass ---

    def _meet(self, node: Node, coefficients: Tensor) -> None:  # curves have what balls could add
        frames, losses = self._met
        if isinstance(node, Frame):
            frames[node] = coefficients
        elif isinstance(node, NonLinear):
            self.relaxation(node)
            if node in self._chosen:
                curves = self._chosen[node]
                up, minus_down = self.signed_parts(coefficients)  # which the node itself asks for next
                for operand, low, high in zip(
                    node.parents, curves.lower_curvatures, curves.upper_curvatures, strict=True
                ):
                    bent = up * (0.5 * low).unsqueeze(-2)
                    losses.append((operand, torch.addcmul(bent, minus_down, (-0.5 * high).unsqueeze(-2))))

    def _pass_back(self, node: Node, rows: Tensor) -> Tensor:
        self._met = ({}, [])
        without_curvature = super()._pass_back(node, rows)
        losses = self._met[1]
        if not losses:
            return without_curvature
        together = node is self.graph.output and (self.perturbation.is_box or self.perturbation.is_round)
        lines = self._at_input(rows.shape[-2]) if together else None
        return without_curvature - self._joint_loss(losses, lines)

    def _at_input(self, num_rows: int) -> list[Tensor]:
        """Coefficients of the last pass's rows at every perturbed frame, (batch, rows, n) each."""
        batch = len(self.perturbation.x)
        found = self._met[0]
        return [
            found[frame].expand(batch, -1, -1)
            if frame in found
            else self.perturbation.x.new_zeros(batch, num_rows, self._width(frame))
            for frame in self._frames
        ]

    def _width(self, frame: Frame) -> int:
        return frame.size if frame.whole else self.ball_weight(frame, frame.child_weights[0]).shape[1]

    def _tighten_operands(self) -> None:
        if Narrow.fit(self, self._frames):
            self._narrow = Narrow(self, self._frames)
        super()._tighten_operands()

    def _deviation(self, coefficients: list[Tensor]) -> Tensor:
        pairs = zip(self._frames, coefficients, strict=True)
        return self.perturbation.total_deviation([self.deviation(frame, part) for frame, part in pairs])

    # --- operands: linear in the perturbation, but for R ---

    def bound_by_rows(self, node: Node) -> Interval:
        low, high = super().bound_by_rows(node)
        parts = [part.split(node.size, dim=1) for part in self._at_input(2 * node.size)]
        below, above = [part[0] for part in parts], [-part[1] for part in parts]
        least, most = low + self._deviation(below), high - self._deviation(above)  # at delta = 0
        middle = [0.5 * (a + b) for a, b in zip(below, above, strict=True)]
        slopes, lost = self._coordinates(middle)
        apart = self._deviation([0.5 * (a - b) for a, b in zip(above, below, strict=True)])
        remainder = (0.5 * (most - least)).clamp(min=0.0) + apart + lost
        center = 0.5 * (least + most)
        # Both are known of the node: its box is where they meet.
        lowest, highest = intersect(self.interval(node), (low, high))
        inside = torch.minimum(torch.maximum(center, lowest), highest)
        width = self._deviation(middle)
        self._through[node] = set(self._met[0])
        self._linear[node] = Operand(slopes, width, remainder + (inside - center).abs(), inside)
        return low, high

    def _coordinates(self, parts: list[Tensor]) -> tuple[Tensor, Tensor | float]:
        """Coefficients of all frames in one row, in few coordinates where these do, and the most that this loses."""
        if self._narrow is None:
            return torch.cat(parts, dim=-1), 0.0
        slopes, left = self._narrow.reduced(parts)
        return slopes, self._deviation(left)

    def _operand(self, node: Node) -> Operand | None:
        """What is known of an operand; None if no rows were bounded for it."""
        if node in self._linear or not isinstance(node, (Slice, Negative)):
            return self._linear.get(node)
        known = self._operand(node.parents[0])
        if known is None:
            return None
        if isinstance(node, Negative):
            return known._replace(slopes=-known.slopes, center=-known.center)
        return Operand(*(part[:, node.start : node.start + node.size] for part in known))

    # --- relaxations ---

    def relaxation(self, node: NonLinear) -> Relaxation:
        known = [self._operand(operand) for operand in node.parents]
        if node in self._relaxations or node.curved is None or any(one is None for one in known):
            return super().relaxation(node)
        box, centers = tuple(self.interval(operand) for operand in node.parents), tuple(one.center for one in known)
        curves = self._curves.get(node) or self._first_curves(node, centers, box)
        self._chosen[node] = curves
        planes = curved_relaxation(node.curved, centers, box, curves)
        self._relaxations[node] = self.widened(node, planes)
        return self._relaxations[node]

    def _first_curves(self, node: NonLinear, centers: tuple[Tensor, ...], box: tuple[Interval, ...]) -> Curves:
        tangent, planes = node.curved.tangent(centers, box), node.relax(*box)
        share, bend = START[len(node.parents)]
        slopes = (
            tuple(torch.lerp(plane, line, share) for plane, line in zip(own.slopes, lines, strict=True))
            for own, lines in zip(planes, (tangent.lower_slopes, tangent.upper_slopes), strict=True)
        )
        # A little curvature everywhere, that tuning can multiply.
        pairs = ((tangent[2], tangent[3]), (tangent[3], tangent[2]))
        bends = (tuple(bend * q + 0.02 * other for q, other in zip(*pair, strict=True)) for pair in pairs)
        return Curves(*slopes, *bends)

    def curves(self) -> CurveTable:
        """The curves of the pass; None for nodes that have planes."""
        return [self._chosen.get(node) for node in self._curves]

    def ranges(self) -> list[tuple[Tensor, ...] | None]:
        """How far the derivatives vary over the nodes' boxes: the unit in which slopes are tuned."""
        return [
            node.slope_ranges(*(self.interval(operand) for operand in node.parents)) if node in self._chosen else None
            for node in self._curves
        ]

    def margin(self, rows: Tensor) -> Tensor:
        """As of a plain pass; minus infinity where the numbers overflow, as they may far beyond what is certified."""
        margin = super().margin(rows)
        return torch.where(margin.isnan(), -torch.inf, margin)

    # --- the most that all neurons lose together ---

    def _joint_loss(self, losses: list[tuple[Node, Tensor]], lines: list[Tensor] | None = None) -> Tensor:
        """Upper bound of sum_k w_k d_k^2, (batch, rows), for weights (batch, rows, size) of operands.

        With ``lines``, the rows' coefficients at the input, it is what the squares add to the deviation of the lines,
        less if both cannot be at their worst at once.
        """
        weights: dict[Node, Tensor] = {}
        for operand, weight in losses:
            weights[operand] = weights[operand] + weight if operand in weights else weight
        w = torch.cat(list(weights.values()), dim=-1)
        frames = self._frames_behind(weights) if lines is None else self._frames
        operands = [one._replace(slopes=self._columns(one.slopes, frames)) for one in map(self._operand, weights)]
        known = Operand(*(torch.cat(parts, dim=1) for parts in zip(*operands, strict=True)))
        low, high = (torch.cat(ends, dim=1) for ends in zip(*(self.interval(one) for one in weights), strict=True))
        reach = torch.maximum(high - known.center, known.center - low)
        # (a + b)^2 <= (1 + t) a^2 + (1 + 1/t) b^2 for every t > 0; equal where a / b = 1 / t.
        remainder, likely = known.remainder.clamp(min=1e-6), OWN_SHARE * known.width.clamp(min=1e-6)
        t = remainder / likely
        # Bounds may be tighter than the linear ones: then a neuron is better left out of what is bounded together.
        joint = remainder + likely < reach
        apart = torch.where(joint, (1.0 + 1.0 / t) * known.remainder**2, reach**2).unsqueeze(-2)
        linear = self._joint_linear(w * torch.where(joint, 1.0 + t, 0.0).unsqueeze(-2), known.slopes, lines, frames)
        alone = (w * reach.unsqueeze(-2) ** 2).sum(dim=-1)
        least = torch.minimum(alone, linear + (w * apart).sum(dim=-1))
        if self.balls is not None:
            least = torch.minimum(least, sum(self._ball_loss(*pair) for pair in weights.items()))
        return least * (1.0 + w.shape[-1] * torch.finfo(w.dtype).eps)  # a sum of positive terms

    def _ball_loss(self, operand: Node, weights: Tensor) -> Tensor:
        """Upper bound of sum_k w_k d_k^2 of one operand, (batch, rows): see ``squares_in_ball``."""
        center, (low, high) = self._operand(operand).center, self.interval(operand)
        reach = torch.maximum(high - center, center - low)
        radius = self.balls.radius_around(operand, center)
        if radius is None:
            return (weights * reach.unsqueeze(-2) ** 2).sum(dim=-1)
        return squares_in_ball(weights, reach, radius)

    def _frames_behind(self, operands: Iterable[Node]) -> list[Frame]:
        """The frames that operands depend on: early steps of a recurrent network see few."""
        if self._narrow is not None:
            return self._frames
        behind: set[Frame] = set()
        for node in operands:
            while node not in self._through:  # picks of nodes that rows were bounded for
                (node,) = node.parents
            behind |= self._through[node]
        return [frame for frame in self._frames if frame in behind]

    def _columns(self, slopes: Tensor, frames: list[Frame]) -> Tensor:
        """The part of J that is of some frames."""
        if len(frames) == len(self._frames):
            return slopes
        parts = slopes.split([self._width(frame) for frame in self._frames], dim=-1)
        kept = [part for part, frame in zip(parts, self._frames, strict=True) if frame in frames]
        return torch.cat(kept, dim=-1) if kept else slopes[..., :0]

    def _joint_linear(
        self, weights: Tensor, jacobian: Tensor, lines: list[Tensor] | None, frames: list[Frame]
    ) -> Tensor:
        """Upper bound of the maximum of sum_k w_k (J_k delta)^2 over the perturbation set, which J has ``frames`` of.

        ``lines``, at the same frames, as above.
        """
        if not frames:
            return weights.new_zeros(weights.shape[:2])
        squares = (weights.detach().mean(dim=-2).unsqueeze(-1) * jacobian.detach() ** 2).sum(dim=1)
        box = self.perturbation.is_box and self._narrow is None
        guesses = None if self._guesses is None else self._guesses.setdefault(self._target, Guesses())
        if lines is None:
            scale, size = self._scales(squares, frames)
            scaled = (weights, jacobian * scale.unsqueeze(-2))
            if box:
                return squares_over_box(*scaled, size, self._sound, guesses)
            bound = size[:, None] * largest_eigenvalue(*scaled, self._sound, guesses, self._guesses is not None)
        else:
            (line, lost), deviation = self._coordinates(lines), self._deviation(lines)
            # A line is worth (g delta)^2 / (2 deviation) + deviation / 2, with equality at its worst point.
            tiny = torch.finfo(line.dtype).tiny ** 0.5
            shares = LINE_SHARE * line.detach() ** 2 / (2.0 * deviation.detach() + tiny).unsqueeze(-1)
            squares = squares + shares.mean(dim=-2)
            scale, size = self._scales(squares, frames)
            scaled = (line * scale.unsqueeze(-2), weights, jacobian * scale.unsqueeze(-2))
            function = line_and_squares_over_box if box else line_and_squares
            bound = function(*scaled, size, self._sound, guesses) - deviation + lost
            if self._narrow is not None and self.perturbation.is_box:  # a ball's lines lose more than the box's
                bound = torch.minimum(bound, self._joint_linear(weights, jacobian, None, frames))
        vertices = self.perturbation.most_of_squares([frame.frame for frame in frames], weights, jacobian)
        return bound if vertices is None else torch.minimum(bound, vertices)

    def _scales(self, squares: Tensor, frames: list[Frame]) -> tuple[Tensor, Tensor]:
        """Scales of the coordinates, (batch, n), and what the set lies in then: a box's sides, or a ball's size."""
        numbers = [frame.frame for frame in frames]
        if self._narrow is not None:
            return self._narrow.ellipsoid(self, squares)
        if self.perturbation.is_box:
            return self.perturbation.box(numbers, squares)
        return self.perturbation.ellipsoid(numbers, squares, [self._width(frame) for frame in frames])
