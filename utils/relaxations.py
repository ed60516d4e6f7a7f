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


def guarded(value: Tensor, *terms: Tensor) -> Tensor:
    """``value - sum(terms)``, lowered by what rounding may have added to it."""
    ulp = GUARD_ULPS * torch.finfo(value.dtype).eps
    difference, magnitude = value, value.abs()
    for term in terms:
        difference, magnitude = difference - term, magnitude + term.abs()
    return difference - ulp * magnitude


def least(candidates: list[Tensor]) -> Tensor:
    """Element-wise minimum of the candidates."""
    smallest = candidates[0]
    for candidate in candidates[1:]:
        smallest = torch.minimum(smallest, candidate)
    return smallest


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
    return Plane((slope,), least([guarded(y.tanh(), slope * y) for y in points]))


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
    tangent runs through (u, tanh u), and that tangent from there on; with d < l it is the chord.

    The tangent's slope is taken as that of its secant from d to u: it is stationary at the true d, so an error in d
    hardly matters, no gradient goes through d, and nothing cancels where tanh'(d) does not differ from 0 in floats.
    """
    middle = 0.5 * (l + u)
    start = torch.maximum(tanh_tangent_point(u), l)
    return torch.where(middle < start, 1.0 - middle.tanh() ** 2, tanh_chord(start, u))


def tanh_chord(l: Tensor, u: Tensor) -> Tensor:  # noqa: E741
    """Slope of the chord of tanh on [l, u]; tanh' where l = u."""
    width = u - l
    chord = (u.tanh() - l.tanh()) / torch.where(width > 0, width, 1.0)
    # Rounding must not make a slope of a very narrow interval leave the range of tanh'.
    return torch.where(width > 0, chord.clamp(0.0, 1.0), 1.0 - l.tanh() ** 2)


@torch.no_grad()
def tanh_tangent_point(u: Tensor, newton_steps: int = 2) -> Tensor:
    """The d <= 0 whose tangent to tanh runs through (u, tanh u), for u > 0; u itself for u <= 0. Without gradient.

    Newton steps on tanh'(d) (u - d) = tanh(u) - tanh(d) from -asinh(u) / 2, which has the right limits, -u / 2 for
    small u and -log(2u) / 2 for large. Errors cost tightness, not soundness.
    """
    smallest = torch.finfo(u.dtype).eps
    positive = u.clamp(min=smallest**0.5)
    target = positive.tanh()
    d = -0.5 * positive.asinh()
    for _ in range(newton_steps):
        t = d.tanh()
        gap = positive - d
        derivative = (1.0 - t * t).clamp(min=smallest)
        d = (d + (derivative * gap - (target - t)) / (2.0 * t * derivative * gap)).clamp(max=-0.5 * smallest)
    return torch.where(u > 0, d, u)


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
    below = least([guarded(y.relu(), low * y) for y in points])
    above = -least([guarded(-y.relu(), -high * y) for y in points])
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
