"""Linear relaxations of one-dimensional activations: any slope, exact intercept.

For every slope a the tightest line of that slope under f on [l, u] has the intercept

    c(a) = min over y in [l, u] of f(y) - a y,        so that  f(y) >= a y + c(a)  for all y in [l, u],

and the minimum is at an end of the interval or where f'(y) = a, which has a closed form. A line is therefore sound
however its slope was found: choosing slopes (``supporting_slope``) is about tightness alone. Stationary points are
clipped into [l, u], where they can only be redundant. Upper lines are lower lines of the mirrored function.

All functions are element-wise on tensors of one shape, differentiable in l and u, and keep no state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# An intercept is lowered by this many units of rounding of the two terms it is the difference of, because f(y) - a y
# is computed in floating point while the inequality is about real numbers.
GUARD_ULPS = 4.0


class Plane(NamedTuple):
    """``sum_i slopes[i] * operand_i + intercept``; one slope for an activation, two for a product of gates."""

    slopes: tuple[Tensor, ...]
    intercept: Tensor


class Relaxation(NamedTuple):
    """``lower(operands) <= f(operands) <= upper(operands)`` on the box that the relaxation was made for."""

    lower: Plane
    upper: Plane


def guarded_minimum(values: list[Tensor], linear_terms: list[Tensor]) -> Tensor:
    """The least ``value - linear_term`` over the candidates, each lowered by what rounding may have added to it."""
    ulp = GUARD_ULPS * torch.finfo(values[0].dtype).eps
    candidates = [v - a - ulp * (v.abs() + a.abs()) for v, a in zip(values, linear_terms, strict=True)]
    least = candidates[0]
    for candidate in candidates[1:]:
        least = torch.minimum(least, candidate)
    return least


def mirrored(lower: Callable[..., Plane], lower_bound: Tensor, upper_bound: Tensor, slopes=None) -> Relaxation:
    """Both lines of an odd function from its ``lower`` alone.

    f(y) <= a y + c on [l, u] if and only if f(y) >= a y - c on [-u, -l]. Both lines are made in one call, stacked.
    ``slopes`` is None or the pair (lower slope, upper slope).
    """
    left = torch.stack((lower_bound, -upper_bound))
    right = torch.stack((upper_bound, -lower_bound))
    if slopes is None:
        stacked = lower(left, right)
    else:
        stacked = lower(left, right, torch.stack(torch.broadcast_tensors(*slopes)))
    (slope,), intercept = stacked
    return Relaxation(Plane((slope[0],), intercept[0]), Plane((slope[1],), -intercept[1]))


# --- tanh -----------------------------------------------------------------------------------------------------------


def tanh_lower(l: Tensor, u: Tensor, slope: Tensor | None = None) -> Plane:  # noqa: E741
    """``tanh(y) >= slope * y + intercept`` on [l, u]; the volume-optimal slope unless one is given."""
    if slope is None:
        slope = tanh_supporting_slope(l, u)
    contact = tanh_stationary_point(slope).clamp(l, u)
    points = (l, u, contact)
    return Plane((slope,), guarded_minimum([y.tanh() for y in points], [slope * y for y in points]))


def tanh_stationary_point(slope: Tensor) -> Tensor:
    """The y <= 0 where tanh'(y) = slope, i.e. -artanh(sqrt(1 - slope)): the only inner minimum of tanh(y) - slope*y.

    For slopes outside (0, 1) there is none and the value, finite, is of no consequence.
    """
    tiny = torch.finfo(slope.dtype).tiny
    inside = slope.clamp(tiny, 1.0)
    # artanh(r) = log((1 + r) / sqrt(1 - r^2)) with 1 - r^2 = slope: no cancellation at either end of (0, 1).
    root = (1.0 - inside).clamp(min=tiny).sqrt()
    return 0.5 * inside.log() - root.log1p()


def tanh_supporting_slope(l: Tensor, u: Tensor) -> Tensor:  # noqa: E741
    """Slope of the line under tanh on [l, u] with the least volume between them.

    That line supports the convex envelope at the midpoint m. The envelope is tanh itself up to the point d < 0 whose
    tangent runs through (u, tanh u), and that tangent from there on; d >= l or the envelope is the chord.
    """
    middle = 0.5 * (l + u)
    d = tanh_tangent_point(u)
    tangent = 1.0 - torch.minimum(middle, d).tanh() ** 2
    width = u - l
    degenerate = width <= 0
    chord = (u.tanh() - l.tanh()) / torch.where(degenerate, 1.0, width)
    # Rounding must not make a slope of a very narrow interval leave the range of tanh'.
    slope = torch.where(d <= l, chord.clamp(0.0, 1.0), tangent)
    return torch.where(degenerate, 1.0 - middle.tanh() ** 2, slope)


def tanh_tangent_point(u: Tensor, newton_steps: int = 2) -> Tensor:
    """The d <= 0 whose tangent to tanh runs through (u, tanh u), for u > 0; u itself for u <= 0.

    Newton steps on tanh'(d) (u - d) = tanh(u) - tanh(d) from -asinh(u) / 2, which has the right limits, -u / 2 for
    small u and -log(2u) / 2 for large. The last step carries the gradient in u. Errors cost tightness, not soundness.
    """
    positive = u.clamp(min=torch.finfo(u.dtype).eps ** 0.5)
    target = positive.tanh()
    with torch.no_grad():
        d = -0.5 * positive.asinh()
        for _ in range(newton_steps - 1):
            d = d - _tangent_newton_step(d, positive, target)
    d = d - _tangent_newton_step(d, positive, target)
    return torch.where(u > 0, d.clamp(max=0.0), u)


def _tangent_newton_step(d: Tensor, u: Tensor, tanh_u: Tensor) -> Tensor:
    t = d.tanh()
    gap = u - d
    derivative = 1.0 - t * t
    residual = derivative * gap - (tanh_u - t)
    return residual / (-2.0 * t * derivative * gap)


def relax_tanh(l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around tanh on [l, u]; ``slopes`` may be any pair (lower, upper)."""
    return mirrored(tanh_lower, l, u, slopes)


# --- sigmoid: half of one plus tanh of the half ---------------------------------------------------------------------


def relax_sigmoid(l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around sigmoid(y) = 1/2 + tanh(y/2)/2 on [l, u], by those of tanh."""
    if slopes is not None:
        slopes = tuple(4.0 * slope for slope in slopes)
    lower, upper = relax_tanh(0.5 * l, 0.5 * u, slopes)
    ulp = GUARD_ULPS * torch.finfo(l.dtype).eps
    below = Plane((0.25 * lower.slopes[0],), 0.5 + 0.5 * lower.intercept - ulp)
    above = Plane((0.25 * upper.slopes[0],), 0.5 + 0.5 * upper.intercept + ulp)
    return Relaxation(below, above)


# --- relu -----------------------------------------------------------------------------------------------------------


def relax_relu(l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around relu on [l, u]: by default the chord above, and below the identity or zero, whichever is nearer."""
    if slopes is None:
        active = (l + u > 0).to(l.dtype)
        width = u - l
        chord = (u.relu() - l.relu()) / torch.where(width > 0, width, 1.0)
        slopes = (active, torch.where(width > 0, chord.clamp(0.0, 1.0), active))
    kink = torch.zeros_like(l).clamp(l, u)
    points = (l, u, kink)
    low, high = slopes
    below = guarded_minimum([y.relu() for y in points], [low * y for y in points])
    above = -guarded_minimum([-y.relu() for y in points], [-high * y for y in points])
    return Relaxation(Plane((low,), below), Plane((high,), above))


class Activation(NamedTuple):
    """A monotone activation and its relaxation."""

    function: Callable[[Tensor], Tensor]
    relax: Callable[..., Relaxation]


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, relax_tanh),
    "sigmoid": Activation(torch.sigmoid, relax_sigmoid),
    "relu": Activation(torch.relu, relax_relu),
}
