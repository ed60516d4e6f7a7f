"""Norm balls of feed-forward networks: how far a layer, as a whole, can be from its clean value.

Over an l_2 ball of radius rho_0 around an input, every layer lies in an l_2 ball around its clean value (hats):

    ||z - z^||  <=  ||W|| rho_h,        ||h - h^||  <=  L ||z - z^||,

for the spectral norm of the weights and the greatest derivative L of the activation. From that follow

- boxes,  |z_k - z^_k|  <=  ||W_k|| rho_h  for a row W_k of the weights;
- bounds of rows,  c.W h + c.b  >=  c.z^ - ||c W|| rho_h;
- of a row with coefficients c of f(z), any slopes a, and any lambda >= 0 (SDP-CROWN's, box constraints included),

      sum_k c_k f(z_k)  >=  sum_k c_k a_k z_k  +  sum_k min_z [c_k f(z) - c_k a_k z + lambda (z - z^_k)^2 / 2]
                            -  lambda rho_z^2 / 2,

  with lambda = 0 for planes. Each minimum is that of a curved bound (``relaxation.curves``), and the sum is concave in
  lambda, of which every row has one of its own a layer.

Recurrent cells are left out: their norms multiply from step to step, until the balls say nothing.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph.convolution import Convolution
from ..graph.graph import Graph
from ..graph.nodes import Bounds, Frame, Interval, Linear, Node
from ..graph.nonlinear import Activation, NonLinear
from ..graph.sums import apply_rows
from ..perturbation.budgets import most
from ..perturbation.sets import InputSet
from .squares import spectral_norm

LEVELS = 10  # multipliers that are tried at once, twice
LOWEST_LEVEL = -7.0  # log of the least of them, over the greatest that can be best


class Ball(NamedTuple):
    """A node's clean value as it was computed, by how much that is wrong, (batch or 1, size), and the ball's radius."""

    center: Tensor
    error: Tensor
    radius: Tensor


class Balls:
    """The balls of one pass."""

    @staticmethod
    def fit(graph: Graph, perturbation: InputSet) -> bool:
        """Whether there are any: a single l_2 ball, and no recurrent cell."""
        return perturbation.in_ball and len(graph.frames) == 1 and not graph.recurrent

    def __init__(self, bounds: Bounds):
        self.bounds = weakref.proxy(bounds)
        self._known: dict[Node, Ball | None] = {}

    @property
    def _gamma(self) -> float:
        return self.bounds.rounding.gamma if self.bounds.rounding else 0.0

    # --- balls ---

    def of(self, node: Node) -> Ball | None:
        """The node's ball; None if none is known."""
        if node not in self._known:
            self._known[node] = self._make(node)
        return self._known[node]

    def _make(self, node: Node) -> Ball | None:
        bounds = self.bounds
        if bounds.is_exact(node):
            value = bounds.exact_value(node)
            error = bounds.rounding.of(node)[1] if bounds.rounding else torch.zeros_like(value)
            return Ball(value, error, value.new_zeros(1))
        if isinstance(node, Frame):
            center = bounds.perturbation.center(node.frame)
            return Ball(center, torch.zeros_like(center), bounds.perturbation.ball_radius(node.frame))
        parents = [self.of(parent) for parent in node.parents]
        if any(parent is None for parent in parents):
            return None
        radius = node.ball_radius(self.norm, *(self._within(*pair) for pair in zip(node.parents, parents, strict=True)))
        if radius is None:
            return None
        center = node.value(*(parent.center for parent in parents))
        return Ball(center, self._error(node, center, parents), (1.0 + self._gamma) * radius)

    def _within(self, node: Node, ball: Ball) -> Tensor:
        """The ball's radius, or, around the box that is known of an operand, that of the ball around the box."""
        known = self.bounds.known_interval(node)
        if known is None:
            return ball.radius
        low, high = known
        reach = torch.maximum(high - ball.center, ball.center - low).clamp(min=0.0) + ball.error
        return torch.minimum(ball.radius, (1.0 + self._gamma) * torch.linalg.vector_norm(reach, dim=-1))

    @torch.no_grad()
    def _error(self, node: Node, center: Tensor, parents: list[Ball]) -> Tensor:
        """How far the computed value may be from the real one."""
        rounding = self.bounds.rounding
        if not rounding:
            return torch.zeros_like(center)
        if isinstance(node, NonLinear):
            steepest = node.ball_radius(self.norm, center.new_ones(1))
            return steepest * parents[0].error + rounding.ulp * center.abs() + rounding.tiny
        error = node.term_sizes(*(parent.error for parent in parents), own=False)
        if not node.rounds:
            return error
        return error + rounding.gamma * node.term_sizes(*(parent.center.abs() for parent in parents)) + rounding.tiny

    # --- norms ---

    def norm(self, weight: Tensor) -> Tensor:
        return self.bounds.graph.once(("norm", 2.0), (weight,), lambda: spectral_norm(weight))

    def _row_norms(self, weight: Tensor) -> Tensor:
        return self.bounds.graph.once(("rows",), (weight,), lambda: torch.linalg.vector_norm(weight, dim=-1))

    def _norms_of_places(self, node: Convolution) -> Tensor:
        what = ("rows", 2.0, node.windows, node.transposed)
        return self.bounds.graph.once(what, (node.weight,), lambda: node.row_norms(2.0))

    # --- what follows from them ---

    def box(self, node: Node) -> Interval | None:
        """Bounds of a linear node's elements, (batch, size) each."""
        ball = self.of(node) if isinstance(node, (Linear, Convolution)) else None
        if ball is None or any(isinstance(parent, Frame) for parent in node.parents):  # of which intervals are exact
            return None
        if isinstance(node, Convolution):
            reach = self._norms_of_places(node) * self._within(node.parents[0], self.of(node.parents[0]))[:, None]
        else:
            reach = self._deviation(node, lambda weight: self._row_norms(weight)[None])
        reach = (1.0 + self._gamma) * reach
        reach = reach + ball.error
        return ball.center - reach, ball.center + reach

    def lower_bound(self, node: Node, rows: Tensor) -> Tensor | None:
        """Lower bounds of ``rows @ node``, (batch, n_rows)."""
        ball = self.of(node)
        if ball is None:
            return None
        if isinstance(node, Linear):
            deviation = self._deviation(node, lambda weight: torch.linalg.vector_norm(rows @ weight, dim=-1))
        else:
            deviation = torch.linalg.vector_norm(rows, dim=-1) * ball.radius[:, None]
        bound = apply_rows(rows, ball.center) - deviation
        if not self._gamma:
            return bound
        lost = apply_rows(rows.abs(), ball.error + 2.0 * self._gamma * ball.center.abs())
        if isinstance(node, Linear):
            sizes = self._deviation(node, lambda w: torch.linalg.vector_norm(rows.abs() @ w.abs(), dim=-1))
            lost = lost + 2.0 * self._gamma * sizes
        return bound - lost - 2.0 * self._gamma * deviation

    def _deviation(self, node: Linear, norms) -> Tensor:
        """Sum over the parents of some norms, (batch or 1, rows), times the radii."""
        pairs = zip(node.parents, node.weights, strict=True)
        moved = [(parent, weight) for parent, weight in pairs if not self.bounds.is_exact(parent)]
        return sum(norms(weight) * self._within(parent, self.of(parent))[:, None] for parent, weight in moved)

    def radius_around(self, node: Node, center: Tensor) -> Tensor | None:
        """Radius, (batch,), of a node's ball around another point, (batch, size); None if no ball is known."""
        ball = self.of(node)
        if ball is None:
            return None
        away = (ball.center - center).abs() + ball.error
        return self._within(node, ball) + (1.0 + self._gamma) * torch.linalg.vector_norm(away, dim=-1)

    def gain(self, node: NonLinear, coefficients: Tensor) -> Tensor | None:
        """What rows gain, (batch, rows), if a node is bounded over its ball and box, by one lambda, not by planes."""
        ball = self.of(node.parents[0]) if isinstance(node, Activation) else None
        if ball is None or node.curved is None or node.curved.smooth:
            return None
        bounds, operand = self.bounds, node.parents[0]
        relaxation = bounds.relaxation(node)
        radius = self._within(operand, ball) + torch.linalg.vector_norm(ball.error, dim=-1)
        with torch.no_grad():
            size = coefficients.abs()
            size = torch.maximum(size, torch.finfo(size.dtype).tiny ** 0.5 * size.amax(dim=-1, keepdim=True))
            size = size.clamp(min=torch.finfo(size.dtype).tiny ** 0.5)
        up, down = bounds.signed_parts(coefficients)
        sign = torch.where(coefficients >= 0, 1.0, -1.0).to(coefficients)
        (low_slope,), (high_slope,) = relaxation.lower.slopes, relaxation.upper.slopes
        slope = torch.where(coefficients >= 0, low_slope.unsqueeze(-2), -high_slope.unsqueeze(-2))
        box = tuple(end.unsqueeze(-2) for end in bounds.interval(operand))
        center, spent = ball.center.unsqueeze(-2), 0.5 * (radius**2)[:, None]

        def heights(multiplier: Tensor) -> Tensor:
            """min over the box of  sign f(z) - slope z + lambda / |c| (z - z^)^2 / 2, (..., batch, rows, size)."""
            return node.curved.lowest(sign, (center,), (box,), (slope,), (multiplier.unsqueeze(-1) / size,))

        multiplier = self._best_multiplier(heights, size, slope, sign, node, radius)
        lowest = heights(multiplier)
        planes = apply_rows(up, relaxation.lower.intercept) + apply_rows(down, relaxation.upper.intercept)
        total = (coefficients.abs() * lowest).sum(dim=-1) - multiplier * spent - planes
        if bounds.rounding:
            total = total - self._lost(node, relaxation, coefficients, lowest) - 4.0 * self._gamma * multiplier * spent
        return torch.where(total.isfinite() & (total > 0), total, 0.0)

    def _lost(self, node: NonLinear, relaxation, coefficients: Tensor, lowest: Tensor) -> Tensor:
        """By the rounding of what passes through the node (as planes', ``Rounding.widen``) and of the sums here."""
        size, gamma = coefficients.abs(), 2.0 * self._gamma
        largest = torch.maximum(relaxation.lower.intercept.abs(), relaxation.upper.intercept.abs())
        through = self.bounds.rounding.through(node, relaxation) + gamma * largest
        return apply_rows(size, through) + gamma * (size * lowest.abs()).sum(dim=-1)

    @torch.no_grad()
    def _best_multiplier(self, heights, size: Tensor, slope: Tensor, sign: Tensor, node, radius: Tensor) -> Tensor:
        """About the best lambda, (batch, rows); any is sound.

        Where it is best, the minimisers' distances d make up the ball, ||d|| = rho, and no |d_k| is above
        |c_k| |f' - a_k| / lambda.
        """
        steepest = node.ball_radius(self.norm, slope.new_ones(1))
        mismatch = torch.maximum(slope.abs(), (sign * steepest - slope).abs())
        tiny = torch.finfo(size.dtype).tiny ** 0.5
        most = torch.linalg.vector_norm(size * mismatch, dim=-1) / radius.clamp(min=tiny)[:, None] + tiny
        spent = 0.5 * (radius**2)[:, None]
        low, high = torch.full_like(most, LOWEST_LEVEL), torch.zeros_like(most)
        shares = torch.linspace(0.0, 1.0, LEVELS, dtype=most.dtype, device=most.device)[:, None, None]
        for _ in range(2 if self.bounds.rounding else 1):  # estimates need not have the best
            levels = low + (high - low) * shares
            trials = most * levels.exp()
            values = (size * heights(trials)).sum(dim=-1) - trials * spent
            best = values.nan_to_num(-torch.inf).argmax(dim=0, keepdim=True)
            level, step = levels.gather(0, best).squeeze(0), (high - low) / (LEVELS - 1)
            low, high = level - step, level + step
        return most * level.exp()


def squares_in_ball(weights: Tensor, reach: Tensor, radius: Tensor) -> Tensor:
    """Upper bound of sum_k w_k d_k^2, (batch, rows), for |d_k| <= reach_k and ||d|| <= radius.

    For weights w >= 0, (batch, rows, size), reach (batch, size) and radius (batch,): the squares are moves that share
    a budget in l_1.
    """
    return most(weights, (reach**2).unsqueeze(-2), (radius**2)[:, None], 1.0)
