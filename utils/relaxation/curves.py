"""Curved bounds of activations and gate products: any slopes and curvatures, sound intercepts.

Around a point z0 of a box, with d = z - z0, any slopes a and curvatures q >= 0 have a highest intercept for which

    f(z) >= a z + c - q d^2 / 2        on the whole box,     c = min of  f(z) - a z + q d^2 / 2,

which with q = 0 is the plane of ``lines`` and ``planes``. With q > 0 the bound may touch f at z0 and
leave it towards the ends: worth having where not all neurons can be at an end at once (``bounds.curve``).

Of a piecewise-linear function that minimum is at an end, at a knot, or where the parabola of a piece is least: a closed
form. Of tanh, sigmoid and the gate products there is none. It is taken over a grid and lowered by the most that the
function can dip between its points: the error of linear interpolation, h^2 / 8 times the greatest second derivative,
for each coordinate.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .lines import GUARD_ULPS, Pieces, Plane, Relaxation, least, pieces_of
from .planes import PRODUCTS

Interval = tuple[Tensor, Tensor]
Box = tuple[Interval, ...]  # an interval an operand

TANH_BEND = 4.0 / 27.0**0.5  # max |tanh''|
SIGMOID_BEND = TANH_BEND / 8.0  # max |sigmoid''|
KNOT_SHARE = 0.3  # of the reach, how far from its knot a piecewise-linear function is met as a rule


class Curves(NamedTuple):
    """Slopes and curvatures of a node's lower and upper bound, a tensor (batch, size) an operand each."""

    lower_slopes: tuple[Tensor, ...]
    upper_slopes: tuple[Tensor, ...]
    lower_curvatures: tuple[Tensor, ...]
    upper_curvatures: tuple[Tensor, ...]


class CurvedFunction(NamedTuple):
    """What curved bounds of a function of one or two operands are made of.

    ``lowest(sign, centers, box, slopes, curvatures)``: a number below ``sign * f(z) - a z + q d^2 / 2`` on the box.
    ``tangent(centers, box)``: curves to start from; of a smooth function the tangent (plane) at the centre and, nearly,
    the least curvatures with which it bounds the function.
    ``smooth``: whether the function has a derivative everywhere.
    """

    lowest: Callable[..., Tensor]
    tangent: Callable[[tuple[Tensor, ...], Box], Curves]
    smooth: bool = True


# --- intercepts -----------------------------------------------------------------------------------------------------


def curved_relaxation(curved: CurvedFunction, centers: tuple[Tensor, ...], box: Box, curves: Curves) -> Relaxation:
    """The linear parts of the curved bounds, as a relaxation; to its planes belong -+ sum_i q_i d_i^2 / 2."""
    below = curved.lowest(1.0, centers, box, curves.lower_slopes, curves.lower_curvatures)
    negated = tuple(-slope for slope in curves.upper_slopes)
    above = -curved.lowest(-1.0, centers, box, negated, curves.upper_curvatures)
    return Relaxation(Plane(tuple(curves.lower_slopes), below), Plane(tuple(curves.upper_slopes), above))


def _lowest_smooth(function: Callable[..., Tensor], bends, sign: float, centers, box, slopes, curvatures) -> Tensor:
    """At most a little below the minimum; ``bends`` as for ``smooth_curves``."""
    steps = 32 if len(box) == 1 else 12
    grid, terms = [], []
    for (low, high), center, slope, curvature in zip(box, centers, slopes, curvatures, strict=True):
        shares = torch.linspace(0.0, 1.0, steps + 1, dtype=low.dtype, device=low.device)
        points = low[..., None] + (high - low)[..., None] * shares
        grid.append(points)
        bowl = 0.5 * curvature[..., None] * (points - center[..., None]) ** 2
        terms.append(bowl - slope[..., None] * points)
    if len(grid) == 1:
        heights = sign * function(grid[0]) + terms[0]
    else:
        x, y = grid[0][..., :, None], grid[1][..., None, :]
        heights = (sign * function(x, y) + terms[0][..., :, None] + terms[1][..., None, :]).flatten(-2)
    lowest = heights.amin(dim=-1)
    for (low, high), bend, curvature in zip(box, bends(box), curvatures, strict=True):
        lowest = lowest - (bend + curvature) * ((high - low) / steps) ** 2 / 8.0
    return lowest - _rounding(box, centers, slopes, curvatures)


def _rounding(box, centers, slopes, curvatures) -> Tensor:
    magnitude = torch.maximum(box[0][0].abs(), box[0][1].abs()).clamp(min=1.0)  # of f
    return _guard(magnitude, box, centers, slopes, curvatures)


def _guard(magnitude: Tensor, box, centers, slopes, curvatures) -> Tensor:
    """For the rounding of f, of no more than some magnitude, less lines, and of parabolas."""
    for (low, high), center, slope, curvature in zip(box, centers, slopes, curvatures, strict=True):
        size, distance = torch.maximum(low.abs(), high.abs()), torch.maximum(high - center, center - low)
        magnitude = magnitude + slope.abs() * size + curvature * (distance**2 + distance * size)
    return 4.0 * GUARD_ULPS * torch.finfo(magnitude.dtype).eps * magnitude


def _lowest_pieces(pieces: Pieces, sign: float, centers, box, slopes, curvatures) -> Tensor:
    """The minimum, but for rounding: at an end, at a knot, or where the parabola of a piece is least."""
    ((low, high),), (center,), (slope,), (bend,) = box, centers, slopes, curvatures
    knots = [torch.full_like(low, knot).clamp(low, high) for knot in pieces.knots]
    points = [low, *knots, high]
    steepness = bend.clamp(min=torch.finfo(bend.dtype).tiny)
    turns = [
        torch.minimum(torch.maximum(center + (slope - sign * p) / steepness, left), right)
        for p, (left, right) in zip(pieces.slopes, itertools.pairwise(points), strict=True)
    ]
    values = [sign * pieces.function(point) for point in points + turns]
    heights = [
        value - slope * point + 0.5 * bend * (point - center) ** 2
        for point, value in zip(points + turns, values, strict=True)
    ]
    largest = torch.maximum(values[0].detach().abs(), values[len(knots) + 1].detach().abs())  # at an end: f is monotone
    return least(heights) - _guard(largest, box, centers, slopes, curvatures)


# --- slopes and curvatures to start from ------------------------------------------------------------------------------


class Bend(NamedTuple):
    """A function of one variable around a point: value, slope, greatest curvatures of the residual, steepest secant."""

    value: Tensor
    slope: Tensor
    below: Tensor
    above: Tensor
    secant: Tensor


def _product_tangent(state: Bend, gate: Bend, centers: tuple[Tensor, ...], box: Box) -> Curves:
    """Of a product (t0 + dt)(s0 + ds) of a state-like factor and a gate.

    The bends of both factors and |dt ds| <= T S |dx| |dy| for their steepest secants T and S, are shared between dx^2
    and dy^2 in the proportion of the box's sides.
    """
    reach_x, reach_y = (
        torch.maximum(high - z, z - low).clamp(min=1e-6) for z, (low, high) in zip(centers, box, strict=True)
    )
    both, ratio = state.secant * gate.secant, reach_y / reach_x
    up, down = state.value.clamp(min=0.0), (-state.value).clamp(min=0.0)
    slopes = (state.slope * gate.value, state.value * gate.slope)
    below = (gate.value * state.below + both * ratio, up * gate.below + down * gate.above + both / ratio)
    above = (gate.value * state.above + both * ratio, up * gate.above + down * gate.below + both / ratio)
    return Curves(slopes, slopes, below, above)


def _tangent(bend: Bend) -> Curves:
    return Curves((bend.slope,), (bend.slope,), (bend.below,), (bend.above,))


def _straight_bend(z0: Tensor, low: Tensor, high: Tensor) -> Bend:
    """Of the identity."""
    one, zero = torch.ones_like(z0), torch.zeros_like(z0)
    return Bend(z0, one, zero, zero, one)


def _tanh_bend(z0: Tensor, low: Tensor, high: Tensor, steps: int = 16) -> Bend:
    """Extremes over a grid of 2 r(d) / d^2, r the residual of tanh's tangent at z0, and of its secants' slopes."""
    d = (low - z0)[..., None] + (high - low)[..., None] * torch.linspace(0.0, 1.0, steps, dtype=z0.dtype).to(z0.device)
    d = torch.where(d.abs() < 1e-2, 1e-2, d)
    t = z0.tanh()
    slope = 1.0 - t * t
    change = (z0[..., None] + d).tanh() - t[..., None]
    bend = 2.0 * (change - slope[..., None] * d) / (d * d)
    zero = torch.zeros_like(t)
    below, above = torch.maximum(-bend.amin(dim=-1), zero), torch.maximum(bend.amax(dim=-1), zero)
    return Bend(t, slope, below, above, (change / d).amax(dim=-1))


def _sigmoid_bend(z0: Tensor, low: Tensor, high: Tensor) -> Bend:
    half = _tanh_bend(0.5 * z0, 0.5 * low, 0.5 * high)
    return Bend(0.5 + 0.5 * half.value, 0.25 * half.slope, 0.125 * half.below, 0.125 * half.above, 0.25 * half.secant)


def _size(interval: Interval) -> Tensor:
    return torch.maximum(interval[0].abs(), interval[1].abs())


@torch.no_grad()
def _tanh_tangent(centers: tuple[Tensor, ...], box: Box) -> Curves:
    return _tangent(_tanh_bend(centers[0], *box[0]))


@torch.no_grad()
def _sigmoid_tangent(centers: tuple[Tensor, ...], box: Box) -> Curves:
    return _tangent(_sigmoid_bend(centers[0], *box[0]))


@torch.no_grad()
def _linear_gate_tangent(centers: tuple[Tensor, ...], box: Box) -> Curves:
    return _product_tangent(_straight_bend(centers[0], *box[0]), _sigmoid_bend(centers[1], *box[1]), centers, box)


@torch.no_grad()
def _tanh_gate_tangent(centers: tuple[Tensor, ...], box: Box) -> Curves:
    return _product_tangent(_tanh_bend(centers[0], *box[0]), _sigmoid_bend(centers[1], *box[1]), centers, box)


@torch.no_grad()
def _pieces_tangent(pieces: Pieces, centers: tuple[Tensor, ...], box: Box) -> Curves:
    """A line for both sides, and parabolas that bend away from it.

    The function is a line and a multiple of |t|, t = z - k, for each knot k between the ends. For every s > 0,

        |t|  <=  t^2 / (2 s) + s / 2  =  (t0 / s) d + d^2 / (2 s) + a constant,        t0 = z0 - k,

    which touches at t = -+s. The bound of the other side has the same slope, and no curvature.
    """
    (low, high), center = box[0], centers[0]
    reach = KNOT_SHARE * torch.maximum(high - center, center - low)
    slope, below, above = torch.full_like(center, pieces.slopes[0]), torch.zeros_like(center), torch.zeros_like(center)
    for knot, (before, after) in zip(pieces.knots, itertools.pairwise(pieces.slopes), strict=True):
        away, turn = center - knot, 0.5 * (after - before)
        nearest = (away**2 + reach**2).sqrt().clamp(min=torch.finfo(center.dtype).tiny)
        inside = (low < knot) & (knot < high)
        slope = slope + turn * torch.where(inside, 1.0 + away / nearest, torch.where(low >= knot, 2.0, 0.0))
        bend = torch.where(inside, abs(turn) / nearest, 0.0)
        below, above = (below, above + bend) if turn > 0 else (below + bend, above)
    return Curves((slope,), (slope,), (below,), (above,))


# --- by name ----------------------------------------------------------------------------------------------------------


def smooth_curves(
    function: Callable[..., Tensor],
    bends: Callable[[Box], tuple[Tensor | float, ...]],
    tangent: Callable[[tuple[Tensor, ...], Box], Curves],
) -> CurvedFunction:
    """Of a smooth function: intercepts over a grid; ``bends(box)`` is the most that the second derivative in each
    operand alone can be, in absolute value, on the box."""
    return CurvedFunction(functools.partial(_lowest_smooth, function, bends), tangent)


class CurvedFunctions(dict):
    """By name; of piecewise-linear activations, members of families such as "leaky_relu(0.2)" too."""

    def __missing__(self, name: str) -> CurvedFunction:
        pieces = pieces_of(name)
        if pieces is None:
            raise KeyError(name)
        lowest, tangent = (functools.partial(function, pieces) for function in (_lowest_pieces, _pieces_tangent))
        self[name] = CurvedFunction(lowest, tangent, smooth=False)
        return self[name]

    def get(self, name: str, default: CurvedFunction | None = None) -> CurvedFunction | None:
        try:
            return self[name]
        except KeyError:
            return default


CURVED = CurvedFunctions(
    {
        "tanh": smooth_curves(torch.tanh, lambda box: (TANH_BEND,), _tanh_tangent),
        "sigmoid": smooth_curves(torch.sigmoid, lambda box: (SIGMOID_BEND,), _sigmoid_tangent),
        "x*sigmoid(y)": smooth_curves(
            PRODUCTS["x*sigmoid(y)"].function, lambda box: (0.0, SIGMOID_BEND * _size(box[0])), _linear_gate_tangent
        ),
        "tanh(x)*sigmoid(y)": smooth_curves(
            PRODUCTS["tanh(x)*sigmoid(y)"].function,
            lambda box: (TANH_BEND, SIGMOID_BEND * _size(box[0]).clamp(max=1.0)),
            _tanh_gate_tangent,
        ),
    }
)
