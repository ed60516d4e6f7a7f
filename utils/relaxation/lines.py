"""Linear relaxations of one-dimensional activations: any slope, exact intercept.

For every slope a the tightest line of that slope under f on [l, u] has the intercept

    c(a) = min over y in [l, u] of f(y) - a y,        so that  f(y) >= a y + c(a)  for all y in [l, u],

and the minimum is at an end of the interval or where f'(y) = a, which has a closed form. A line is therefore sound
however its slope was found: choosing slopes (``supporting_slope``) is about tightness alone. Stationary points are
clipped into [l, u], where they can only be redundant. Upper lines are lower lines of the mirrored function.

All functions are element-wise on tensors of one shape, differentiable in l and u, and keep no state.
"""

from __future__ import annotations

import functools
import itertools
import math
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


# --- piecewise-linear functions: relu, leaky relu, clamps -------------------------------------------------------------


class Pieces(NamedTuple):
    """A continuous function that is linear between its knots and grows nowhere downwards.

    Attributes:
        function: the function itself.
        knots: where the slope changes, increasing.
        slopes: one more than there are knots.
    """

    function: Callable[[Tensor], Tensor]
    knots: tuple[float, ...]
    slopes: tuple[float, ...]


def relax_pieces(pieces: Pieces, l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around a piecewise-linear function on [l, u]; the volume-optimal slopes unless a pair is given.

    f(y) - a y is least at an end or a knot, so those are the only candidates for the intercept. Knots outside the
    interval are clipped into it.
    """
    points = (l, u, *(torch.full_like(l, knot).clamp(l, u) for knot in pieces.knots))
    values = [pieces.function(point) for point in points]
    low, high = supporting_slopes(pieces, points, values) if slopes is None else slopes
    below = least([guarded(value, low * y) for y, value in zip(points, values, strict=True)])
    above = -least([guarded(-value, -high * y) for y, value in zip(points, values, strict=True)])
    return Relaxation(Plane((low,), below), Plane((high,), above))


def supporting_slopes(pieces: Pieces, points, values) -> tuple[Tensor, Tensor]:
    """Slopes of the lines under and over the function with the least volume: those nearest to it at the midpoint.

    The convex envelope of the points has the slope of a piece or of a chord between two points. All are tried, and of
    equally good ones the first is taken, pieces in the order of their slopes before chords.
    """
    middle = 0.5 * (points[0] + points[1])
    candidates = [torch.full_like(middle, slope) for slope in sorted(set(pieces.slopes))]
    for (p, at_p), (q, at_q) in itertools.combinations(zip(points, values, strict=True), 2):
        width = (q - p).abs()
        chord = (at_q - at_p).abs() / torch.where(width > 0, width, 1.0)
        # Rounding must not make the slope of a very narrow interval leave the range of those of the pieces.
        chord = chord.clamp(min(pieces.slopes), max(pieces.slopes))
        candidates.append(torch.where(width > 0, chord, candidates[0]))
    stacked = torch.stack(candidates)
    chosen = []
    for sign in (1.0, -1.0):
        heights = torch.stack(
            [sign * (value - stacked * (y - middle)) for y, value in zip(points, values, strict=True)]
        )
        index = heights.detach().amin(dim=0).argmax(dim=0, keepdim=True)
        chosen.append(stacked.gather(0, index).squeeze(0))
    return chosen[0], chosen[1]


def leaky_relu_pieces(negative_slope: float = 0.01) -> Pieces:
    """y where y > 0, negative_slope * y elsewhere."""
    if not 0.0 <= negative_slope < math.inf:
        raise ValueError(f"leaky relu needs a finite negative slope of at least 0, not {negative_slope}")
    return Pieces(lambda y: torch.nn.functional.leaky_relu(y, negative_slope), (0.0,), (negative_slope, 1.0))


def hardtanh_pieces(lowest: float = -1.0, highest: float = 1.0) -> Pieces:
    """y cut to [lowest, highest]; an end may be infinite."""
    if not lowest < highest:
        raise ValueError(f"hardtanh needs a lowest value below its highest, not {lowest} and {highest}")
    ends = [(lowest, 0.0)] * math.isfinite(lowest) + [(highest, 1.0)] * math.isfinite(highest)
    slopes = (*([0.0] if math.isfinite(lowest) else []), 1.0, *([0.0] if math.isfinite(highest) else []))
    return Pieces(lambda y: y.clamp(lowest, highest), tuple(end for end, _ in ends), slopes)


RELU = Pieces(torch.relu, (0.0,), (0.0, 1.0))


def relax_relu(l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around relu on [l, u]: by default the chord above, and below the identity or zero, whichever is nearer."""
    if slopes is None:
        active = (l + u > 0).to(l.dtype)
        width = u - l
        chord = (u.relu() - l.relu()) / torch.where(width > 0, width, 1.0)
        slopes = (active, torch.where(width > 0, chord.clamp(0.0, 1.0), active))
    return relax_pieces(RELU, l, u, slopes)


# --- by name ----------------------------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """An activation, its relaxation, and its greatest absolute derivative (None: not known).

    ``image`` gives bounds of its values over intervals, from their ends; None if it grows: then these are at the ends.
    ``slopes`` likewise gives bounds of its derivative; None if ``derivatives.DERIVATIVES`` has them, or nothing has.
    """

    function: Callable[[Tensor], Tensor]
    relax: Callable[..., Relaxation]
    steepest: float | None = None
    image: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    slopes: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


MAKERS: dict[str, Callable[..., Activation]] = {}  # of other families, by name; called with the numbers behind it
FAMILIES = {"leaky_relu": leaky_relu_pieces, "hardtanh": hardtanh_pieces}


def pieces_of(name: str) -> Pieces | None:
    """The piecewise-linear function of a name such as "relu" or "leaky_relu(0.2)", a family's name with numbers."""
    if name == "relu":
        return RELU
    family, numbers = _family_of(name)
    return FAMILIES[family](*numbers) if family in FAMILIES else None


def _family_of(name: str) -> tuple[str, list[float]]:
    family, _, numbers = name.removesuffix(")").partition("(")
    try:
        return family, [float(number) for number in numbers.split(",") if number]
    except ValueError:  # a product's name
        return name, []


class Activations(dict):
    """Activations by name; members of families are made when they are asked for."""

    def __missing__(self, name: str) -> Activation:
        pieces = pieces_of(name)
        if pieces is None:
            family, numbers = _family_of(name)
            if family not in MAKERS:
                raise KeyError(name)
            self[name] = MAKERS[family](*numbers)
            return self[name]
        self[name] = Activation(pieces.function, functools.partial(relax_pieces, pieces), max(pieces.slopes))
        return self[name]


ACTIVATIONS = Activations(
    {
        "tanh": Activation(torch.tanh, relax_tanh, 1.0),
        "sigmoid": Activation(torch.sigmoid, relax_sigmoid, 0.25),
        "relu": Activation(torch.relu, relax_relu, 1.0),
    }
)
for family in FAMILIES:
    ACTIVATIONS[family]  # with the family's default numbers
