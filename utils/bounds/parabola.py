"""Quadratic lower bounds of a relu network's last two layers (Zhang et al., CROWN, NeurIPS 2018, section 3.4).

Below an unsure neuron, l < 0 < u, lies not only every line through 0 of a slope in [0, 1] but also the parabola

    z (z - l) / (u - l)  <=  relu(z)        on [l, u],

which meets relu at l, 0 and u. Where a row's coefficient is positive and no line is plainly better, it takes the
parabola, where it is negative the chord above. What is left is a convex quadratic function phi of z, the operand of the
last hidden layer, and for any z*

    min phi  >=  phi(z*) - grad phi(z*) . z* + min over the set of grad phi(z*) . z,

by convexity: the dual value, a proof however far z* is from the minimiser. The last term is a row of the layer, which
a backward pass bounds: exactly if the layer reads the input. Then z* comes from projected gradient steps with momentum.
In deeper networks it comes from steps of Frank and Wolfe towards the z at which the backward pass has its minimum, and
layers before have their lines. Curved bounds of every layer are ``curve``; these are for comparison with CROWN's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..graph.graph import Graph
from ..graph.nodes import Frame, Linear, Node
from ..graph.nonlinear import Activation
from ..perturbation.lp_ball import project
from ..perturbation.sets import Perturbation
from .passes import BoundPass

STEPS = 200
DEEP_STEPS = 10  # of Frank and Wolfe, each a backward pass
LINE_ABOVE = 2.0  # the identity is the lower bound where u is this many times -l or more, zero where -l is above u


class Quadratic(NamedTuple):
    """``sum_i curvature_i z_i^2 + slope_i z_i + constant`` below rows of the output, (batch, n_rows, size or none)."""

    curvature: Tensor
    slope: Tensor
    constant: Tensor


class ParabolaPass(BoundPass):
    """As "crown", and by parabolas where they are better. Raises ValueError for other networks."""

    def __init__(self, graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True):
        self._output, self._hidden, self._source = _layers(graph)
        if perturbation.stretch is not None and not perturbation.is_box:
            raise ValueError("method parabola is for balls in which all elements count alike: leave out scales")
        super().__init__(graph, perturbation, "crown", slopes, sound)

    def margin(self, rows: Tensor) -> Tensor:
        """Lower bounds of ``rows @ output``, (batch, n_rows), for rows (batch or 1, n_rows, classes)."""
        lines = super().margin(rows)
        if self.is_exact(self._hidden):
            return lines
        return torch.fmax(lines, self._by_parabolas(rows.expand(len(self.perturbation.x), -1, -1)))

    def _by_parabolas(self, rows: Tensor) -> Tensor:
        below = quadratic_below(rows @ self._output.weights[0], *(end[:, None] for end in self.interval(self._hidden)))
        with torch.no_grad():
            z = self._nearest_input(below) if isinstance(self._source, Frame) else self._by_steps(below)
        value = (below.curvature * z**2 + below.slope * z).sum(dim=-1) + below.constant + rows @ self._output.bias
        gradient = 2.0 * below.curvature * z + below.slope
        terms = (below.curvature * z**2 + (below.slope * z).abs()).sum(dim=-1) + below.constant.abs()
        lost = self._room(terms + (gradient * z).abs().sum(dim=-1)) if self.rounding else 0.0
        lowest = value - (gradient * z).sum(dim=-1) + self._least(gradient) - lost
        return self._lowered(lowest, self.graph.output, rows)

    def _least(self, rows: Tensor) -> Tensor:
        """Lower bounds of rows of the hidden layer's operand."""
        by_interval = self.interval_lower_bound(self._hidden, rows)
        return torch.maximum(by_interval, self.lower_bound(self._hidden, rows))

    def _nearest_input(self, below: Quadratic) -> Tensor:
        """z, (batch, n_rows, size), of the input for which the function is nearly least."""
        (weight,) = (weight for _, weight in self._hidden.inexact_parents(self))
        center = self.offset(self._hidden)
        return center[:, None] + self._minimise(below, weight.detach(), center.detach()) @ weight.T

    def _by_steps(self, below: Quadratic) -> Tensor:
        """z for which the dual value is large: it is concave, and steps go towards the z that rows are least at."""
        z = (0.5 * sum(self.interval(self._hidden)))[:, None].expand_as(below.slope)
        for step in range(DEEP_STEPS):
            with torch.enable_grad():
                rows = (2.0 * below.curvature * z + below.slope).detach().requires_grad_()
                (towards,) = torch.autograd.grad(self._least(rows).sum(), rows)
            z = torch.lerp(z, towards, 2.0 / (step + 2.0))
        return z

    def _room(self, terms: Tensor) -> Tensor:
        """For the rounding of sums of such terms."""
        return 4.0 * self.rounding.gamma * terms.detach()

    def _minimise(self, below: Quadratic, weight: Tensor, center: Tensor) -> Tensor:
        """A deviation, (batch, n_rows, n), where the function is nearly least: accelerated projected steps."""
        steepest = 2.0 * below.curvature.amax(dim=-1) * torch.linalg.matrix_norm(weight, ord=2) ** 2
        step = 1.0 / steepest.clamp(min=torch.finfo(steepest.dtype).tiny ** 0.5)[..., None]
        at = ahead = center.new_zeros(*below.slope.shape[:2], weight.shape[1])
        momentum = 1.0
        for _ in range(STEPS):
            z = center[:, None] + ahead @ weight.T
            moved = self._project(ahead - step * ((2.0 * below.curvature * z + below.slope) @ weight))
            following = 0.5 * (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5)
            ahead = moved + (momentum - 1.0) / following * (moved - at)
            at, momentum = moved, following
        return at

    def _project(self, deviations: Tensor) -> Tensor:
        if self.perturbation.is_box:
            sides = self.half_widths(self._source)[:, None]
            return torch.minimum(torch.maximum(deviations, -sides), sides)
        eps = self.perturbation.eps[:, self._source.frame, None].expand(deviations.shape[:2])
        return project(deviations, eps, self.perturbation.norm)


def quadratic_below(rows: Tensor, l: Tensor, u: Tensor) -> Quadratic:  # noqa: E741
    """Below ``rows @ relu(z)`` on the box [l, u]; rows are (batch, n_rows, size), l and u (batch, 1, size)."""
    unsure = (l < 0) & (u > 0)
    width = torch.where(unsure, u - l, 1.0)
    active = (l >= 0) | (unsure & (u >= -LINE_ABOVE * l))
    bent = unsure & ~active & (-l < u)
    chord, zero = torch.where(unsure, u / width, (l >= 0).to(u)), torch.zeros_like(rows)
    up, down = rows.clamp(min=0.0), rows.clamp(max=0.0)
    curvature = torch.where(bent, up / width, zero)
    slope = torch.where(active, up, torch.where(bent, -up * l / width, zero)) + down * chord
    constant = torch.where(unsure, -down * l * u / width, zero).sum(dim=-1)
    return Quadratic(curvature, slope, constant)


def _layers(graph: Graph) -> tuple[Linear, Linear, Node]:
    """Output and last hidden layer of a network that ends in linear - relu - linear, and what that layer reads."""
    output = graph.output
    relu = output.parents[0] if isinstance(output, Linear) and len(output.parents) == 1 else None
    hidden = relu.parents[0] if isinstance(relu, Activation) and relu.name == "relu" else None
    if not isinstance(hidden, Linear) or len(hidden.parents) != 1:
        raise ValueError(
            "parabolas are for feed-forward networks whose last hidden layer is of relu: take curve for others"
        )
    return output, hidden, hidden.parents[0]


def parabola(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> ParabolaPass:
    return ParabolaPass(graph, perturbation, slopes, sound)
