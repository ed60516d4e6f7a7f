"""Lines around log, sqrt and 1 / y, which are functions on a half line only, and around sin and cos, which go on.

Each of the first has a number, ``least``, that its operand is known never to be below, whatever bounds of it say; below
that it is continued by a constant. With 0, nothing is known: then an interval that leaves the domain is refused, as no
line there says anything of what the network computes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .lines import ACTIVATIONS, MAKERS, Activation, Plane, Relaxation, guarded, least
from .shapes import GUARD_ULPS, Shape, activation_of, range_of, relax_shape, slopes_of


def _continued(function: Callable, derivative: Callable, convex: bool, floor: float) -> Activation:
    """A function of y >= floor > 0, constant below."""
    shape = Shape(
        lambda y: function(y.clamp(min=floor)),
        lambda y: torch.where(y >= floor, derivative(y.clamp(min=floor)), 0.0),
        (floor,),
        (convex, convex),
        float(derivative(torch.tensor(floor, dtype=torch.float64)).abs()),
    )
    return activation_of(shape)


def half_line(name: str, function: Callable, derivative: Callable, convex: bool) -> Callable[..., Activation]:
    """The maker of a family: of log(0.5), say, the logarithm of what is never below 0.5."""
    open_shape = Shape(function, derivative, (), (convex,))

    def inside(of: Callable, l: Tensor, *rest):  # noqa: E741
        check_domain(name, l, l <= 0)
        return of(open_shape, l, *rest)

    def make(floor: float = 0.0) -> Activation:
        if not floor >= 0:
            raise ValueError(f"{name} needs a least value of its operand of at least 0, not {floor}")
        if floor > 0:
            return _continued(function, derivative, convex, floor)
        relax, image, slopes = (functools.partial(inside, of) for of in (relax_shape, range_of, slopes_of))
        return Activation(function, relax, None, image, slopes)

    return make


def check_domain(name: str, l: Tensor, outside: Tensor) -> None:  # noqa: E741
    if bool(outside.any()):
        raise ValueError(
            f"{name} of values that may be as low as {float(l.detach().min()):.4g}, where it has no bound: take a "
            "smaller eps, or add a positive constant to what is never negative"
        )


# --- sqrt: its derivative has no bound at 0, so where it touches a line is solved for ---------------------------------


def sqrt(y: Tensor) -> Tensor:
    return y.clamp(min=0.0).sqrt()


def relax_sqrt(l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around sqrt(max(y, 0)): less a y least at an end or 0, and greatest there or at 1 / (4 a a)."""
    zero = torch.zeros_like(l).clamp(l, u)
    low, high = slopes or _sqrt_slopes(l, zero, u)
    # Of slopes so small that this overflows, it is the end that counts.
    touching = (0.5 / high.detach().clamp(min=torch.finfo(l.dtype).tiny)) ** 2
    points = (l, zero, u, torch.minimum(torch.maximum(touching, zero), u))
    below = least([guarded(sqrt(y), low * y) for y in points[:3]])
    above = -least([guarded(-sqrt(y), -high * y) for y in points])
    return Relaxation(Plane((low,), below), Plane((high,), above))


def _sqrt_slopes(l: Tensor, zero: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Of the least volume; the tangent through (l, 0), for l < 0, touches at -l."""
    middle, start = 0.5 * (l + u), torch.minimum((-l).clamp(min=0.0), u)

    def tangent(y: Tensor) -> Tensor:
        return torch.where(y > 0, 0.5 / sqrt(torch.where(y > 0, y, 1.0)), 0.0)

    def chord(left: Tensor, right: Tensor) -> Tensor:
        width = right - left
        return torch.where(width > 0, (sqrt(right) - sqrt(left)) / torch.where(width > 0, width, 1.0), tangent(right))

    lower = torch.where((l < 0) & (middle < 0), 0.0, chord(zero, u))
    return lower, torch.where((l < 0) & (middle <= start), chord(l, start), tangent(middle))


def sqrt_activation(known: float = 0.0) -> Activation:
    """sqrt(0): nothing is known of its operand; sqrt(1): it is never negative."""

    def inside(of: Callable, l: Tensor, u: Tensor, slopes=None):  # noqa: E741
        check_domain("sqrt", l, (l < 0) & (known == 0))
        return of(l, u, slopes)

    def ends(l: Tensor, u: Tensor, slopes=None) -> tuple[Tensor, Tensor]:  # noqa: E741
        unit = GUARD_ULPS * torch.finfo(l.dtype).eps
        return sqrt(l) * (1.0 - unit), sqrt(u) * (1.0 + unit)

    def steepness(l: Tensor, u: Tensor, slopes=None) -> tuple[Tensor, Tensor]:  # noqa: E741
        unit = GUARD_ULPS * torch.finfo(l.dtype).eps
        return (0.5 - unit) / sqrt(u), torch.where(l > 0, (0.5 + unit) / sqrt(l), torch.inf)

    function = sqrt if known else torch.sqrt
    relax, image, slopes = (functools.partial(inside, of) for of in (relax_sqrt, ends, steepness))
    return Activation(function, relax, None, image, slopes)


# --- sin and cos ------------------------------------------------------------------------------------------------------

TURN = 2.0 * math.pi
# Where they are negative they are convex; what is moved to around 0 lies within a turn of it, but for rounding.
SINE = Shape(torch.sin, torch.cos, tuple(k * math.pi for k in range(-2, 3)), (True, False) * 3, 1.0)
HALF_TURNS = tuple(k * math.pi / 2 for k in (-3, -1, 1, 3))
COSINE = Shape(torch.cos, lambda y: -y.sin(), HALF_TURNS, (False, True, False, True, False), 1.0)


def relax_wave(shape: Shape, l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around sin or cos; intervals of less than a turn are moved to around 0, wider ones have -1 and 1."""
    unit = GUARD_ULPS * torch.finfo(l.dtype).eps
    room = unit * (l.abs() + u.abs())
    wide = ~(u - l + 2.0 * room < 0.999 * TURN)
    moved = (0.5 * (l + u) / TURN).round().detach() * TURN
    left, right = (torch.where(wide, 0.0, end) for end in (l - moved - room, u - moved + room))
    found = relax_shape(shape, left, right, slopes)
    planes = []
    for sign, plane in zip((1.0, -1.0), found, strict=True):
        slope = plane.slopes[0] if slopes is not None else torch.where(wide, 0.0, plane.slopes[0])
        back = sign * slope * moved
        near = sign * (guarded(sign * plane.intercept, back) - unit * back.abs())
        far = sign * guarded(-torch.ones_like(l), torch.maximum(sign * slope * l, sign * slope * u))
        planes.append(Plane((slope,), torch.where(wide, far, near)))
    return Relaxation(*planes)


def wave_range(shape: Shape, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    flat = torch.zeros_like(l)
    lower, upper = relax_wave(shape, l, u, (flat, flat))
    return lower.intercept, upper.intercept


def wave(shape: Shape, slope: Shape) -> Activation:
    """Of sin or cos, and its derivative."""
    relax, image = (functools.partial(function, shape) for function in (relax_wave, wave_range))
    return Activation(shape.function, relax, 1.0, image, functools.partial(wave_range, slope))


MAKERS |= {
    "log": half_line("log", torch.log, lambda y: 1.0 / y, convex=False),
    "reciprocal": half_line("1 / y", torch.reciprocal, lambda y: -1.0 / (y * y), convex=True),
    "sqrt": sqrt_activation,
}
MINUS_SINE = SINE.negative()
ACTIVATIONS |= {"sin": wave(SINE, COSINE), "cos": wave(COSINE, MINUS_SINE)}
