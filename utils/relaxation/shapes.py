"""Lines around functions that are convex or concave piece by piece: any slope, exact intercept, from one table.

For a slope a the tightest line under f on [l, u] has the intercept  min over y of g(y) = f(y) - a y. Between points
where f changes from convex to concave, a concave g is least at an end, and a convex one where g' changes its sign,
which bisection brackets: with g'(p) <= 0 at the left end p of a bracket [p, q],

    g(y) >= g(p) + g'(p) (q - p)        for all y in [p, q], since a tangent is below a convex function,

so the intercept ends on the sound side, however wide the bracket is left. A line above f is one under -f. The range of
f over an interval is its lines of slope 0.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .lines import ACTIVATIONS, MAKERS, Activation, Plane, Relaxation

# Functions here are computed in several steps, each rounded; and a derivative that is rounded may end a bracket early.
GUARD_ULPS = 8.0
SLOPE_ULPS = 64.0  # of derivatives: in some, terms of about 1 cancel
HALVINGS = {torch.float64: 56, torch.float32: 30}
BESIDE = 1e-6  # of a turn
ROUNDS, TRIED = 3, 7  # of the search for the default slopes, and slopes tried in each


class Shape(NamedTuple):
    """A function, and where it bends which way.

    Attributes:
        function: the function; values are right to a few units in the last place of f or y.
        derivative: of the function; at a kink that of either side.
        turns: where it changes from convex to concave or back, or has a kink, increasing.
        convex: whether each piece is convex, one more than there are turns; either way where a piece is straight.
        steepest: the greatest absolute value of the derivative; None if there is none.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    turns: tuple[float, ...]
    convex: tuple[bool, ...]
    steepest: float | None = None

    def negative(self) -> Shape:
        return Shape(
            lambda y: -self.function(y),
            lambda y: -self.derivative(y),
            self.turns,
            tuple(not bent for bent in self.convex),
            self.steepest,
        )


def relax_shape(shape: Shape, l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around the function on [l, u]; those nearest to it at the midpoint unless a pair of slopes is given."""
    below, above = slopes or (None, None)
    lower = line_below(shape, l, u, below)
    upper = line_below(shape.negative(), l, u, None if above is None else -above)
    return Relaxation(lower, Plane((-upper.slopes[0],), -upper.intercept))


def range_of(shape: Shape, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Bounds of the function over [l, u]: its lines of slope 0."""
    flat = torch.zeros_like(l)
    return intercept_below(shape, l, u, flat), -intercept_below(shape.negative(), l, u, flat)


def slopes_of(shape: Shape, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Bounds of the derivative over [l, u]: it is monotone between turns, and may jump at one that is touched."""
    points = [l, u]
    for turn in shape.turns:
        at = torch.full_like(l, turn)
        touched = (l <= at) & (u >= at)
        beside = (torch.nextafter(at, at - 1.0), at, torch.nextafter(at, at + 1.0))
        points += [torch.where(touched, point, l) for point in beside]
    found = torch.stack([shape.derivative(point) for point in points])
    room = SLOPE_ULPS * torch.finfo(l.dtype).eps
    low, high = found.amin(dim=0), found.amax(dim=0)
    return low - room * (1.0 + low.abs()), high + room * (1.0 + high.abs())


def line_below(shape: Shape, l: Tensor, u: Tensor, slope: Tensor | None) -> Plane:  # noqa: E741
    if slope is None:
        slope = supporting_slope(shape, l, u)
    return Plane((slope,), intercept_below(shape, l, u, slope))


def intercept_below(shape: Shape, l: Tensor, u: Tensor, slope: Tensor, halvings: int | None = None) -> Tensor:  # noqa: E741
    """The least of f(y) - slope * y over [l, u], less what rounding may add; slopes may have an axis in front."""
    unit = GUARD_ULPS * torch.finfo(l.dtype).eps
    ends = [torch.full_like(l, turn).clamp(l, u) for turn in shape.turns]
    ends = [l, *ends, u]

    def least_at(y: Tensor, fall: Tensor | float = 0.0, room: Tensor | float = 0.0) -> Tensor:
        value = shape.function(y)
        return value - slope * y + fall - unit * (value.abs() + (slope * y).abs() + y.abs() + room)

    found = [least_at(y) for y in ends]
    for (left, right), convex in zip(itertools.pairwise(ends), shape.convex, strict=True):
        if convex:
            found.append(least_at(*_touching(shape, left, right, slope, halvings or HALVINGS[l.dtype])))
    return functools.reduce(torch.minimum, found)


@torch.no_grad()
def _touching(shape: Shape, left: Tensor, right: Tensor, slope: Tensor, halvings: int) -> tuple[Tensor, Tensor, Tensor]:
    """A point where f' is about the slope, what the line can still fall below it, and room for the derivative."""
    p, q = (end.expand(torch.broadcast_shapes(end.shape, slope.shape)) for end in (left, right))
    width = (q - p).abs()
    for _ in range(halvings):
        middle = p + 0.5 * (q - p)
        falls = shape.derivative(middle) < slope
        p, q = torch.where(falls, middle, p), torch.where(falls, q, middle)
    steep = shape.derivative(p)
    return p, (steep - slope).clamp(max=0.0) * (q - p), (steep.abs() + slope.abs()) * width


@torch.no_grad()
def supporting_slope(shape: Shape, l: Tensor, u: Tensor) -> Tensor:  # noqa: E741
    """The slope of the line under f that is highest at the midpoint: of the least volume. Nearly so is sound as well.

    How high a line reaches there is concave in its slope. Slopes are tried side by side, then nearer to the best.
    """
    middle, width = 0.5 * (l + u), u - l
    beside = (turn + side for turn in shape.turns for side in (-BESIDE, BESIDE))  # the derivative may jump at a turn
    ends = [l, *(torch.full_like(l, turn).clamp(l, u) for turn in beside), u]
    steepness = torch.stack([shape.derivative(y) for y in ends])
    low, high = steepness.amin(dim=0), steepness.amax(dim=0)  # the derivative is monotone in between
    chord = (shape.function(u) - shape.function(l)) / torch.where(width > 0, width, 1.0)
    tangent = shape.derivative(middle)
    extra = torch.stack((torch.where(width > 0, chord.clamp(low, high), tangent), tangent))
    shares = torch.linspace(0.0, 1.0, TRIED, dtype=l.dtype, device=l.device).reshape(-1, *[1] * l.dim())
    step = (high - low) / (TRIED - 1)
    tried = torch.cat((extra, low + (high - low) * shares))
    for _ in range(ROUNDS):
        heights = intercept_below(shape, l, u, tried, HALVINGS[torch.float32]) + tried * middle
        best = tried.gather(0, heights.nan_to_num(-torch.inf).argmax(dim=0, keepdim=True))
        tried = torch.cat((best, best + step * (2.0 * shares - 1.0))).clamp(low, high)
        step = 2.0 * step / (TRIED - 1)
    return best.squeeze(0)


# --- the table --------------------------------------------------------------------------------------------------------

SQRT2, ROOT_PI = math.sqrt(2.0), math.sqrt(math.pi)
SILU_TURN = 2.3993572805154677
MISH_TURNS = (-2.2563763963607931, 1.4905711794854285)


def softplus(y: Tensor) -> Tensor:
    return y.clamp(min=0.0) + (-y.abs()).exp().log1p()


def _silu_slope(y: Tensor) -> Tensor:
    return y.sigmoid() * (1.0 + y * (-y).sigmoid())


def _gelu(y: Tensor) -> Tensor:
    """y times the normal distribution's share below y, which erfc gives without cancelling."""
    return 0.5 * y * torch.special.erfc(-y / SQRT2)


def _gelu_slope(y: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-y / SQRT2) + y * (-0.5 * y * y).exp() / (SQRT2 * ROOT_PI)


def _mish_slope(y: Tensor) -> Tensor:
    t = softplus(y).tanh()
    return t + y * (1.0 - t * t) * y.sigmoid()


def _sign(y: Tensor) -> Tensor:
    return torch.where(y > 0, 1.0, -1.0).to(y)


def elu_shape(alpha: float = 1.0, scale: float = 1.0, width: float = 1.0) -> Shape:
    """scale * y where y > 0, scale * alpha * (exp(y / width) - 1) elsewhere."""
    if not (alpha >= 0 and scale > 0 and width > 0):
        raise ValueError(f"elu needs alpha >= 0 and positive scales, not {alpha}, {scale} and {width}")

    def function(y: Tensor) -> Tensor:
        return scale * torch.where(y > 0, y, alpha * (y.clamp(max=0.0) / width).expm1())

    def derivative(y: Tensor) -> Tensor:
        return scale * torch.where(y > 0, 1.0, alpha / width * (y.clamp(max=0.0) / width).exp())

    return Shape(function, derivative, (0.0,), (True, True), scale * max(1.0, alpha / width))


def power_shape(exponent: float) -> Shape:
    """y to the power of a whole number of at least 2."""
    n = int(exponent)
    if n != exponent or n < 2:
        raise ValueError(f"a power needs a whole exponent of at least 2, not {exponent}")
    turns, convex = ((), (True,)) if n % 2 == 0 else ((0.0,), (False, True))
    return Shape(lambda y: y**n, lambda y: n * y ** (n - 1), turns, convex)


def softshrink_shape(width: float = 0.5) -> Shape:
    if width < 0:
        raise ValueError(f"softshrink needs a width of at least 0, not {width}")
    shrink = torch.nn.functional.softshrink
    return Shape(lambda y: shrink(y, width), lambda y: (y.abs() > width).to(y), (-width, width), (False,) * 3, 1.0)


def rsqrt_shape(eps: float = 1e-5) -> Shape:
    """1 / sqrt(y + eps) where y >= 0, as of a variance; a little below 0, where rounding may lead, it is straight."""
    if not eps > 0:
        raise ValueError(f"rsqrt needs a positive number beside the variance, not {eps}")
    least = -0.5 * eps

    def derivative(y: Tensor) -> Tensor:
        return torch.where(y >= least, -0.5 * (y.clamp(min=least) + eps) ** -1.5, 0.0)

    steepest = 0.5 * (eps + least) ** -1.5
    return Shape(lambda y: (y.clamp(min=least) + eps) ** -0.5, derivative, (least,), (True, True), steepest)


SHAPES = {
    "silu": Shape(lambda y: y * y.sigmoid(), _silu_slope, (-SILU_TURN, SILU_TURN), (False, True, False), 1.1),
    "gelu": Shape(_gelu, _gelu_slope, (-SQRT2, SQRT2), (False, True, False), 1.13),
    "mish": Shape(lambda y: y * softplus(y).tanh(), _mish_slope, MISH_TURNS, (False, True, False), 1.09),
    "hardswish": Shape(
        lambda y: y * (y + 3.0).clamp(0.0, 6.0) / 6.0,
        lambda y: torch.where(y <= -3, 0.0, torch.where(y >= 3, 1.0, (2.0 * y + 3.0) / 6.0)).to(y),
        (-3.0, 3.0),
        (False, True, False),
        1.5,
    ),
    "softsign": Shape(lambda y: y / (1.0 + y.abs()), lambda y: (1.0 + y.abs()) ** -2, (0.0,), (True, False), 1.0),
    "tanhshrink": Shape(lambda y: y - y.tanh(), lambda y: y.tanh() ** 2, (0.0,), (False, True), 1.0),
    "logsigmoid": Shape(lambda y: -softplus(-y), lambda y: (-y).sigmoid(), (), (False,), 1.0),
    "exp": Shape(torch.exp, torch.exp, (), (True,)),
    "abs": Shape(torch.abs, _sign, (0.0,), (False, False), 1.0),
    "erf": Shape(torch.erf, lambda y: 2.0 / ROOT_PI * (-y * y).exp(), (0.0,), (True, False), 1.13),
}
SHAPE_FAMILIES = {"elu": elu_shape, "power": power_shape, "softshrink": softshrink_shape, "rsqrt": rsqrt_shape}


def activation_of(shape: Shape) -> Activation:
    relax, image, slopes = (functools.partial(function, shape) for function in (relax_shape, range_of, slopes_of))
    return Activation(shape.function, relax, shape.steepest, image, slopes)


ACTIVATIONS |= {name: activation_of(shape) for name, shape in SHAPES.items()}
MAKERS |= {name: lambda *numbers, make=make: activation_of(make(*numbers)) for name, make in SHAPE_FAMILIES.items()}
