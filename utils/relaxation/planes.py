"""Linear relaxations of the gate products x*sigmoid(y) and tanh(x)*sigmoid(y): any slopes, exact intercepts.

For any slopes (a, b) the tightest plane of these slopes under f on a box has the intercept

    c(a, b) = min over the box of f(x, y) - a x - b y.

The minimum is at one of a few points that have closed forms: corners, stationary points of the edges and, for
tanh(x)*sigmoid(y), one point inside. So a plane is sound however its slopes were found. Candidates are clipped into the
box, where they can only be redundant. Both products are odd in x, so the upper plane is the lower one of the box
mirrored in x:  f <= a x + b y + c on [lx, ux]  if and only if  f >= a x - b y - c on [-ux, -lx].

All functions are element-wise on tensors of one shape and differentiable in the slopes and the box.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..choices.tables import RELAXATIONS
from .lines import (
    Plane,
    Relaxation,
    guarded,
    least,
    tanh_chord,
    tanh_stationary_point,
    tanh_supporting_slope,
)


class Box(NamedTuple):
    """lx <= x <= ux, ly <= y <= uy."""

    lx: Tensor
    ux: Tensor
    ly: Tensor
    uy: Tensor

    @property
    def middle(self) -> tuple[Tensor, Tensor]:
        return 0.5 * (self.lx + self.ux), 0.5 * (self.ly + self.uy)

    def stacked_with_mirror(self) -> Box:
        """This box and the one mirrored in x, as [0] and [1] of a new first dimension."""
        return Box(
            torch.stack((self.lx, -self.ux)),
            torch.stack((self.ux, -self.lx)),
            torch.stack((self.ly, self.ly)),
            torch.stack((self.uy, self.uy)),
        )


Slopes = tuple[Tensor, Tensor]


def gate_stationary_point(factor: Tensor, b: Tensor) -> Tensor:
    """The y, of the opposite sign to factor, at which factor*sigmoid(y) - b*y has its inner minimum.

    There sigmoid'(y) = b / factor. Finite, and of no consequence, where there is none (also for factor = 0).
    """
    sign = torch.where(factor < 0, -1.0, 1.0)
    # Slopes steeper than the gate ever is, 4 |b| > |factor|, become the steepest: no quotient leaves [-1, 1].
    size = torch.maximum(factor.abs(), 4.0 * b.abs()).clamp(min=torch.finfo(factor.dtype).tiny)
    return 2.0 * tanh_stationary_point(4.0 * sign * b / size) * sign


# --- x * sigmoid(y) -------------------------------------------------------------------------------------------------


def linear_gate_intercept(slopes: Slopes, box: Box) -> Tensor:
    """min of x*sigmoid(y) - a x - b y over the box: linear in x, so x is at an end, and y at an end or stationary."""
    a, b = slopes
    ends = torch.stack((box.lx, box.ux))
    stationary = gate_stationary_point(ends, b).clamp(box.ly, box.uy)
    x = torch.cat((ends, ends, ends))
    y = torch.cat((box.ly.expand_as(ends), box.uy.expand_as(ends), stationary))
    return guarded(x * y.sigmoid(), a * x, b * y).amin(dim=0)


def linear_gate_contracting(box: Box) -> Slopes:
    """a = sigmoid(ly), the least that the gate can pass on of x, and the volume-optimal b for that a.

    With this a, x (sigmoid(y) - a) increases with x wherever y is, so the lower plane only has to stay under
    lx * sigmoid(y): a problem in y alone.
    """
    return box.ly.sigmoid(), _gate_slope(box.lx, box)


def _gate_slope(factor: Tensor, box: Box) -> Tensor:
    """Slope in y of the volume-optimal line under factor*sigmoid(y)."""
    upwards = factor >= 0  # else the line is over the gate: under the mirrored one
    left, right = torch.where(upwards, box.ly, -box.uy), torch.where(upwards, box.uy, -box.ly)
    return 0.25 * factor * tanh_supporting_slope(0.5 * left, 0.5 * right)


# --- tanh(x) * sigmoid(y) -------------------------------------------------------------------------------------------


def tanh_gate_intercept(slopes: Slopes, box: Box) -> Tensor:
    """min of tanh(x)*sigmoid(y) - a x - b y over the box: at a corner, on an edge, or at the one minimum inside."""
    a, b = slopes
    x_ends, y_ends = torch.stack((box.lx, box.ux)), torch.stack((box.ly, box.uy))
    t_ends, s_ends = x_ends.tanh(), y_ends.sigmoid()
    inner, error = _inner_candidate(slopes, box, t_ends[0])
    # Four corners, two edges with x fixed, two with y fixed, and the inside.
    y_stationary = gate_stationary_point(t_ends, b).clamp(box.ly, box.uy)
    x_stationary = _state_stationary_point(a, s_ends).clamp(box.lx, box.ux)
    x = torch.cat((x_ends, x_ends, x_ends, x_stationary, inner[0][None]))
    y = torch.cat((y_ends, y_ends.flip(0), y_stationary, y_ends, inner[1][None]))
    candidates = guarded(x.tanh() * y.sigmoid(), a * x, b * y)
    return torch.minimum(candidates[:-1].amin(dim=0), candidates[-1] - error)


def _inner_candidate(slopes: Slopes, box: Box, t_left: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A point of the box at, or almost at, the minimum inside, and by how much that may be lower than the point."""
    a, b = slopes
    y, lowest = _inner_minimum(a, b)
    y = torch.minimum(y, _gate_at_stationary_point(a, t_left)).clamp(box.ly, box.uy)
    s = y.sigmoid()
    x = _state_stationary_point(a, s)
    # The least value over x is convex in y from ``lowest`` on: what it may still fall by to the left of y.
    slope = (x.tanh() * s * (1.0 - s) - b).detach()
    error = slope.clamp(min=0.0) * (y - torch.maximum(lowest, box.ly)).detach().clamp(min=0.0)
    return (x.clamp(box.lx, box.ux), y), error


def _state_stationary_point(a: Tensor, s: Tensor) -> Tensor:
    """The x <= 0 at which tanh(x)*s - a*x has its inner minimum; finite, and of no consequence, unless 0 < a < s."""
    tiny = torch.finfo(s.dtype).tiny
    return tanh_stationary_point(a / torch.maximum(s, a.abs()).clamp(min=tiny))


@torch.no_grad()
def _gate_at_stationary_point(a: Tensor, t: Tensor) -> Tensor:
    """The y at which tanh(x)*sigmoid(y) - a*x is stationary in x where tanh(x) = t; inf where at none.

    That x falls as y grows: with t = tanh(lx), no minimum inside the box has a larger y.
    """
    steepness = ((1.0 - t) * (1.0 + t)).clamp(min=torch.finfo(t.dtype).tiny)
    return torch.logit((a / steepness).clamp(0.0, 1.0))


@torch.no_grad()
def _inner_minimum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where tanh(x)*sigmoid(y) - a x - b y has its inner minimum: y, at most a little too large, and a point below it.

    With t = tanh x and s = sigmoid y it needs t < 0, 0 < a < 1, b < 0 and s(1 - t^2) = a, t s (1 - s) = b. Eliminating
    t leaves F(s) = sqrt(1 - a/s) s (1 - s) = -b on the branch where F falls: from the larger root of
    4 s^2 - (2 + 3a) s + a, the second result, to 1. Minimised over x, the function of y is convex there with the
    derivative -b - F.

    At the branch's start F is flat and the minimum merges with a saddle, so Newton's method is applied to
    q = sqrt(F(start) - F), which is nearly linear in s; at last to F itself, which is concave: these steps end above
    the root. Where there is no such minimum both results are infinitely far to the right.
    """
    tiny = torch.finfo(a.dtype).eps
    exists = (a > 0) & (a < 1) & (b < 0)
    a, target = torch.where(exists, a, 0.5), torch.where(exists, -b, 0.05)
    start = ((2 + 3 * a) + ((2 + 3 * a) ** 2 - 16 * a).clamp(min=0).sqrt()) / 8

    def falling(s: Tensor) -> tuple[Tensor, Tensor]:
        root = (1 - a / s).clamp(min=tiny).sqrt()
        return root * s * (1 - s), (a / (2 * root)) * (1 - s) / s + root * (1 - 2 * s)

    highest = falling(start)[0]
    exists &= highest >= target
    aim = (highest - target).clamp(min=0).sqrt()
    s = start + (1 - start) * aim / highest.sqrt()
    for _ in range(2):
        value, slope = falling(s)
        q = (highest - value).clamp(min=0).sqrt()
        s = (s - 2 * q * (q - aim) / (-slope).clamp(min=tiny)).clamp(max=1 - tiny)
        s = torch.maximum(s, start)
    farthest = (start + 2 * (s - start) + 8 * tiny**0.5).clamp(max=1 - tiny)  # where rounding hides how flat F is
    for _ in range(2):
        value, slope = falling(s)
        s = torch.maximum(s - (value - target) / slope.clamp(max=-tiny), start)
        s = torch.minimum(s, farthest)
    y, lowest = torch.logit(s), torch.logit(start.clamp(tiny, 1 - tiny))
    return torch.where(exists, y, torch.inf), torch.where(exists, lowest, torch.inf)


def tanh_gate_contracting(box: Box) -> Slopes:
    """a = sigmoid(ly) times the chord of tanh, and the volume-optimal b for that a.

    With this a, tanh(x) sigmoid(y) - a x is least at x = lx or where tanh'(x) = a / sigmoid(y), whatever y is. What is
    left is R(y), the minimum over x, and b is the slope of the line that supports the convex envelope of R at the
    middle: a gate line times tanh(lx) for lx >= 0; else R falls, first concave, then convex, and the envelope is a line
    from (ly, R(ly)) to a point d where it touches R, and R from there on.
    """
    a = box.ly.sigmoid() * tanh_chord(box.lx, box.ux)

    def least_over_x(y: Tensor) -> tuple[Tensor, Tensor]:
        s = y.sigmoid()
        x = _state_stationary_point(a, s).clamp(box.lx, box.ux)
        t = x.tanh()
        return t * s - a * x, t * s * (1.0 - s)

    middle = box.middle[1]
    at_left = least_over_x(box.ly)[0]
    with torch.no_grad():
        d = _envelope_contact(least_over_x, at_left, box.ly, middle, box.uy)
    d = torch.where(d > middle, d, middle)  # the middle has a gradient; the slope of a chord does not change with d
    at_d, slope_at_d = least_over_x(d)
    width = d - box.ly
    chord = (at_d - at_left) / torch.where(width > 0, width, 1.0)
    falling = torch.where((d > middle) & (width > 0), chord.clamp(-0.25, 0.0), slope_at_d)
    return a, torch.where(box.lx >= 0, _gate_slope(box.lx.tanh(), box), falling)


def _envelope_contact(
    function, at_left: Tensor, left: Tensor, middle: Tensor, right: Tensor, sections: int = 8
) -> Tensor:
    """The d in [middle, right] that the chord from ``left`` touches, for a function first concave and then convex.

    The middle itself if the function is its own envelope there. The chord's slope is least at d, so an error of d
    costs only its square: the derivative's excess over the chord's slope is interpolated between points that are
    tried all at once. The function is convex nowhere below 0, and where it is nearly flat, beyond the logarithm
    of the interval's width, no chord touches it: the points are within these bounds.
    """
    low = torch.minimum(middle.clamp(min=0.0), right)
    high = torch.maximum(torch.minimum(2.0 + 2.0 * (right - left).log1p(), right), low)
    shares = torch.linspace(0.0, 1.0, sections + 1, dtype=low.dtype, device=low.device)
    points = torch.lerp(low[None], high[None], shares.reshape(-1, *[1] * low.dim()))
    value, slope = function(points)
    excess = slope * (points - left) - (value - at_left)  # times the chord's length
    # The function being first concave and then convex, the excess changes its sign once: from - to +.
    number = (excess[1:-1] <= 0).sum(dim=0, keepdim=True)
    (below, above), (start, end) = (
        (x.gather(0, number).squeeze(0), x.gather(0, number + 1).squeeze(0)) for x in (excess, points)
    )
    d = start + (below / (below - above)).nan_to_num(0.5).clamp(0.0, 1.0) * (end - start)
    return torch.where(excess[0] >= 0, middle, torch.where(excess[-1] <= 0, right, d))


# --- slopes by name -------------------------------------------------------------------------------------------------


class GateProduct(NamedTuple):
    """factor(x) * sigmoid(y): a state-like operand x and a gate."""

    factor: Callable[[Tensor], Tensor]
    lower_intercept: Callable[[Slopes, Box], Tensor]
    contracting: Callable[[Box], Slopes]

    def function(self, x: Tensor, y: Tensor) -> Tensor:
        return self.factor(x) * y.sigmoid()


PRODUCTS = {
    "x*sigmoid(y)": GateProduct(lambda x: x, linear_gate_intercept, linear_gate_contracting),
    "tanh(x)*sigmoid(y)": GateProduct(torch.tanh, tanh_gate_intercept, tanh_gate_contracting),
}


def relax_product(
    name: str, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], choice: str = "plane", slopes=None
) -> Relaxation:
    """Planes around a product on the box of its operands' intervals.

    Args:
        name: a key of ``PRODUCTS``.
        x, y: (lower, upper) of the operands, tensors of shapes that broadcast.
        choice: which slopes, a key of ``RELAXATIONS``, unless given.
        slopes: ((a, b) of the lower plane, (a, b) of the upper plane): any numbers.
    """
    product = PRODUCTS[name]
    box = Box(*torch.broadcast_tensors(*x, *y)).stacked_with_mirror()
    if slopes is None:
        a, b = RELAXATIONS[choice](product, box)
    else:
        (a_low, b_low), (a_up, b_up) = slopes
        a, b = (torch.stack(torch.broadcast_tensors(*pair, box.lx[0])[:2]) for pair in ((a_low, a_up), (b_low, -b_up)))
    c = product.lower_intercept((a, b), box)
    a_low = a[0]
    a_up = a_low if len(a) == 1 else a[1]  # one tensor if the planes share it: ``NonLinear.backward`` saves work then
    return Relaxation(Plane((a_low, b[0]), c[0]), Plane((a_up, -b[1]), -c[1]))


def contracting_slopes(product: GateProduct, box: Box) -> Slopes:
    """The slope in x that carries least of the state's uncertainty through time, and then the best in y.

    The former is the same for a box and its mirror image, so it has a first dimension of 1 where the box has both.
    """
    a, b = product.contracting(box)
    return a[:1], b


@torch.no_grad()
def volume_optimal_slopes(product: GateProduct, box: Box, steps: int = 60) -> Slopes:
    """Slopes of the plane with the least volume under f: the highest at the box's centre (mx, my).

    Its height a mx + b my + c(a, b) is concave in the slopes, with supergradient (mx, my) - contact point. The
    ellipsoid method shrinks the area in which the best slopes may lie by a fixed factor each step. Meant for
    comparisons: it costs ``steps`` evaluations of the intercept.
    """
    mx, my = box.middle
    # Slopes are optimised per half-width of the box, so that both have the unit of f. The best are no steeper than f,
    # and over half the box their plane rises by no more than f's range.
    hx, hy = (0.5 * (box.ux - box.lx)).clamp(min=1e-6), (0.5 * (box.uy - box.ly)).clamp(min=1e-6)
    steepest = 0.25 * torch.maximum(product.factor(box.lx).abs(), product.factor(box.ux).abs())
    corners = torch.stack([product.function(x, y) for x in box[:2] for y in box[2:]])
    range_ = corners.amax(dim=0) - corners.amin(dim=0)
    largest_p, largest_q = torch.minimum(hx, range_).clamp(min=1e-9), torch.minimum(steepest * hy, range_).clamp(1e-9)
    p, q = torch.zeros_like(mx), torch.zeros_like(mx)
    pp, pq, qq = 2 * largest_p**2, torch.zeros_like(mx), 2 * largest_q**2
    best = (p / hx, q / hy, torch.full_like(mx, -torch.inf))
    for _ in range(steps):
        height, gp, gq = _centre_height(product, box, (mx, my), (hx, hy), (p, q))
        better = height > best[2]
        best = tuple(torch.where(better, n, o) for n, o in zip((p / hx, q / hy, height), best, strict=True))
        vp, vq = pp * gp + pq * gq, pq * gp + qq * gq
        norm = (gp * vp + gq * vq).clamp(min=1e-30).sqrt()
        vp, vq = vp / norm, vq / norm
        p, q = p + vp / 3, q + vq / 3
        pp, pq, qq = (4 / 3 * (m - 2 / 3 * v) for m, v in ((pp, vp * vp), (pq, vp * vq), (qq, vq * vq)))
    return best[0], best[1]


def _centre_height(product: GateProduct, box: Box, middle, half, scaled: Slopes) -> tuple[Tensor, Tensor, Tensor]:
    """Height at the centre of the plane with slopes scaled / half, and its gradient in the scaled slopes."""
    with torch.enable_grad():
        p, q = (s.detach().requires_grad_() for s in scaled)
        a, b = p / half[0], q / half[1]
        height = product.lower_intercept((a, b), box) + a * middle[0] + b * middle[1]
        gp, gq = torch.autograd.grad(height.sum(), (p, q))
    return height.detach(), gp, gq


def constant_slopes(product: GateProduct, box: Box) -> Slopes:
    """No slopes: the product's range."""
    return torch.zeros_like(box.lx), torch.zeros_like(box.lx)


@torch.no_grad()
def line_slopes(product: GateProduct, box: Box) -> Slopes:
    """A slope in one operand alone, (a, 0) or (0, b), whichever gives the higher line at the centre.

    With a = 0 the product is least at x = lx, so b is a gate line's slope. With b = 0 it is least at an end of y that
    the sign of x tells, and the height of the line at the centre is concave in a, which is searched.
    """
    zero = torch.zeros_like(box.lx)
    mx, my = box.middle
    low_gate, high_gate = box.ly.sigmoid(), box.uy.sigmoid()

    def height(a: Tensor) -> Tensor:
        stationary = tanh_stationary_point(a / high_gate.clamp(min=torch.finfo(a.dtype).tiny))
        points = (box.lx, box.ux, stationary.clamp(box.lx, box.ux))
        return a * mx + least([product.factor(x) * torch.where(x < 0, high_gate, low_gate) - a * x for x in points])

    a = _golden_section(height, zero, zero + 1.0)
    b = _gate_slope(product.factor(box.lx), box)
    upright = height(a) > product.lower_intercept((zero, b), box) + b * my
    return torch.where(upright, a, zero), torch.where(upright, zero, b)


def _golden_section(concave: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int = 25) -> Tensor:
    """Where a concave function is highest in [low, high], element-wise, to (high - low) / 1.6^steps."""
    ratio = (5**0.5 - 1) / 2
    for _ in range(steps):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        rising = concave(right) > concave(left)
        low, high = torch.where(rising, left, low), torch.where(rising, high, right)
    return 0.5 * (low + high)


# How the slopes of a gate product are chosen; "plane" is the default, "line" and "constant" the paper's ablation.
