"""Curved bounds of tanh, sigmoid and the gate products: any slopes and curvatures, sound intercepts.

Around a point z0 of a box, with d = z - z0, any slopes a and curvatures q >= 0 have a highest intercept for which

    f(z) >= a z + c - q d^2 / 2        on the whole box,     c = min of  f(z) - a z + q d^2 / 2,

which with q = 0 is the plane of ``lines`` and ``planes``. With q > 0 the bound may touch f at z0 and
leave it towards the ends: worth having where not all neurons can be at an end at once (``bounds.curve``). That minimum
has no closed form. It is taken over a grid and lowered by the most that the function can dip between its points: the
error of linear interpolation, h^2 / 8 times the greatest second derivative, for each coordinate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .lines import GUARD_ULPS, Plane, Relaxation
from .planes import PRODUCTS

Interval = tuple[Tensor, Tensor]
Box = tuple[Interval, ...]  # an interval an operand

TANH_BEND = 4.0 / 27.0**0.5  # max |tanh''|
SIGMOID_BEND = TANH_BEND / 8.0  # max |sigmoid''|


class Curves(NamedTuple):
    """Slopes and curvatures of a node's lower and upper bound, a tensor (batch, size) an operand each."""

    lower_slopes: tuple[Tensor, ...]
    upper_slopes: tuple[Tensor, ...]
    lower_curvatures: tuple[Tensor, ...]
    upper_curvatures: tuple[Tensor, ...]


class CurvedFunction(NamedTuple):
    """A smooth function of one or two operands: what its curved bounds are made of.

    ``bends(box)``: the most that the second derivative in each operand alone can be, in absolute value, on the box.
    ``tangent(centers, box)``: the tangent (plane) at the centre and, nearly, the least curvatures with which it bounds
    the function.
    """

    function: Callable[..., Tensor]
    bends: Callable[[Box], tuple[Tensor | float, ...]]
    tangent: Callable[[tuple[Tensor, ...], Box], Curves]


# --- intercepts -----------------------------------------------------------------------------------------------------


def curved_relaxation(curved: CurvedFunction, centers: tuple[Tensor, ...], box: Box, curves: Curves) -> Relaxation:
    """The linear parts of the curved bounds, as a relaxation; to its planes belong -+ sum_i q_i d_i^2 / 2."""
    below = _lowest(curved, 1.0, centers, box, curves.lower_slopes, curves.lower_curvatures)
    negated = tuple(-slope for slope in curves.upper_slopes)
    above = -_lowest(curved, -1.0, centers, box, negated, curves.upper_curvatures)
    return Relaxation(Plane(tuple(curves.lower_slopes), below), Plane(tuple(curves.upper_slopes), above))


def _lowest(curved: CurvedFunction, sign: float, centers, box, slopes, curvatures) -> Tensor:
    """A lower bound of ``sign * f(z) - a z + q d^2 / 2`` over the box, at most a little below the minimum."""
    steps = 32 if len(box) == 1 else 12
    grid, terms = [], []
    for (low, high), center, slope, curvature in zip(box, centers, slopes, curvatures, strict=True):
        shares = torch.linspace(0.0, 1.0, steps + 1, dtype=low.dtype, device=low.device)
        points = low[..., None] + (high - low)[..., None] * shares
        grid.append(points)
        bowl = 0.5 * curvature[..., None] * (points - center[..., None]) ** 2
        terms.append(bowl - slope[..., None] * points)
    if len(grid) == 1:
        heights = sign * curved.function(grid[0]) + terms[0]
    else:
        x, y = grid[0][..., :, None], grid[1][..., None, :]
        heights = (sign * curved.function(x, y) + terms[0][..., :, None] + terms[1][..., None, :]).flatten(-2)
    lowest = heights.amin(dim=-1)
    for (low, high), bend, curvature in zip(box, curved.bends(box), curvatures, strict=True):
        lowest = lowest - (bend + curvature) * ((high - low) / steps) ** 2 / 8.0
    return lowest - _rounding(box, centers, slopes, curvatures)


def _rounding(box, centers, slopes, curvatures) -> Tensor:
    magnitude = torch.maximum(box[0][0].abs(), box[0][1].abs()).clamp(min=1.0)  # of f
    for (low, high), center, slope, curvature in zip(box, centers, slopes, curvatures, strict=True):
        size, distance = torch.maximum(low.abs(), high.abs()), torch.maximum(high - center, center - low)
        magnitude = magnitude + slope.abs() * size + curvature * (distance**2 + distance * size)
    return 4.0 * GUARD_ULPS * torch.finfo(magnitude.dtype).eps * magnitude


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


# --- by name ----------------------------------------------------------------------------------------------------------


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


CURVED = {
    "tanh": CurvedFunction(torch.tanh, lambda box: (TANH_BEND,), _tanh_tangent),
    "sigmoid": CurvedFunction(torch.sigmoid, lambda box: (SIGMOID_BEND,), _sigmoid_tangent),
    "x*sigmoid(y)": CurvedFunction(
        PRODUCTS["x*sigmoid(y)"].function, lambda box: (0.0, SIGMOID_BEND * _size(box[0])), _linear_gate_tangent
    ),
    "tanh(x)*sigmoid(y)": CurvedFunction(
        PRODUCTS["tanh(x)*sigmoid(y)"].function,
        lambda box: (TANH_BEND, SIGMOID_BEND * _size(box[0]).clamp(max=1.0)),
        _tanh_gate_tangent,
    ),
}
