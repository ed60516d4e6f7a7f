"""Where the derivatives of non-linearities lie over a box, and bounds of such a factor times a bounded value.

A gradient is carried back through a network by products  kappa * a  of derivatives kappa, of which all that is used is
that they lie in [low, high], and of values a in [l, u] that later layers hand down. Over such kappa,

    min(low a, high a)  <=  kappa a  <=  max(low a, high a),

where the right side is convex in a and the left one concave. So for any slope s the tightest line above is

    s a + c,    c = max over a in {l, u} of  max(low a, high a) - s a,

since a convex function less a line is greatest at an end. As with other relaxations slopes are about tightness alone;
``CHAINS`` are ways to choose them. Lines below are those above, mirrored in a.

All functions are element-wise on tensors of one shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .lines import ACTIVATIONS, GUARD_ULPS, Plane, Relaxation, guarded, pieces_of

Interval = tuple[Tensor, Tensor]

# --- ranges of derivatives --------------------------------------------------------------------------------------------


def outward(low: Tensor, high: Tensor) -> Interval:
    """The interval, wider by what rounding may have taken from it."""
    ulp, tiny = GUARD_ULPS * torch.finfo(low.dtype).eps, torch.finfo(low.dtype).tiny
    return low - ulp * low.abs() - tiny, high + ulp * high.abs() + tiny


def tanh_derivative(y: Tensor) -> Tensor:
    """1 / cosh^2, to a few units of its own last place at any y."""
    e = (-2.0 * y.abs()).exp()
    return 4.0 * e / (1.0 + e) ** 2


def bell_range(l: Tensor, u: Tensor, share: float = 1.0) -> Interval:  # noqa: E741
    """Range over [l, u] of ``tanh_derivative``(share * y), which falls with |y|."""
    nearest, farthest = torch.zeros_like(l).clamp(l, u), torch.maximum(l.abs(), u.abs())
    low, high = outward(tanh_derivative(share * farthest), tanh_derivative(share * nearest))
    return low.clamp(min=0.0), high.clamp(max=1.0)


def tanh_range(l: Tensor, u: Tensor) -> Interval:  # noqa: E741
    """Of tanh' over [l, u]."""
    return bell_range(l, u)


def sigmoid_range(l: Tensor, u: Tensor) -> Interval:  # noqa: E741
    """Of sigmoid'(y) = tanh'(y / 2) / 4 over [l, u]."""
    low, high = bell_range(l, u, 0.5)
    return 0.25 * low, 0.25 * high


def arctan_range(l: Tensor, u: Tensor) -> Interval:  # noqa: E741
    """Of 1 / (1 + y^2) over [l, u]."""
    nearest, farthest = torch.zeros_like(l).clamp(l, u), torch.maximum(l.abs(), u.abs())
    low, high = outward(*(1.0 / (1.0 + y * y) for y in (farthest, nearest)))
    return low.clamp(min=0.0), high.clamp(max=1.0)


def elu_range(l: Tensor, u: Tensor) -> Interval:  # noqa: E741
    """Of elu' = min(1, exp y) over [l, u]."""
    low, high = outward(*(y.clamp(max=0.0).exp() for y in (l, u)))
    return low.clamp(min=0.0), high.clamp(max=1.0)


def gate_range(l: Tensor, u: Tensor) -> Interval:  # noqa: E741
    """Of sigmoid itself over [l, u]."""
    low, high = outward(l.sigmoid(), u.sigmoid())
    return low.clamp(min=0.0), high.clamp(max=1.0)


def pieces_range(pieces, l: Tensor, u: Tensor) -> Interval:  # noqa: E741
    """Least and greatest slope of the pieces that [l, u] touches; at a knot both neighbours count."""
    ends = (-torch.inf, *pieces.knots, torch.inf)
    low, high = torch.full_like(l, torch.inf), torch.full_like(l, -torch.inf)
    for slope, left, right in zip(pieces.slopes, ends[:-1], ends[1:], strict=True):
        touched = (l <= right) & (u >= left)
        low = torch.where(touched, low.clamp(max=slope), low)
        high = torch.where(touched, high.clamp(min=slope), high)
    return low, high


def product_range(first: Interval, second: Interval) -> Interval:
    """Of products of a number of each interval; 0 times an infinite end, which stands for any number, is 0."""
    corners = torch.stack([x * y for x in first for y in second])
    corners = torch.where(corners.isnan() & _known(*first, *second), 0.0, corners)
    return outward(corners.amin(dim=0), corners.amax(dim=0))


def _known(*ends: Tensor) -> Tensor:
    """Where no end is NaN."""
    return ~torch.stack(torch.broadcast_tensors(*(end.isnan() for end in ends))).any(dim=0)


def tanh_interval(l: Tensor, u: Tensor) -> Interval:  # noqa: E741
    return outward(l.tanh(), u.tanh())


# For each non-linearity, of the intervals of its operands: the range of the derivative in each of them.
DERIVATIVES: dict[str, Callable[..., tuple[Interval, ...]]] = {
    "tanh": lambda y: (tanh_range(*y),),
    "sigmoid": lambda y: (sigmoid_range(*y),),
    "arctan": lambda y: (arctan_range(*y),),
    "softplus": lambda y: (gate_range(*y),),
    "elu": lambda y: (elu_range(*y),),
    "x*sigmoid(y)": lambda x, y: (gate_range(*y), product_range(x, sigmoid_range(*y))),
    "tanh(x)*sigmoid(y)": lambda x, y: (
        product_range(tanh_range(*x), gate_range(*y)),
        product_range(tanh_interval(*x), sigmoid_range(*y)),
    ),
}


def derivative_ranges(name: str, *operands: Interval) -> tuple[Interval, ...]:
    """Range of the derivative in each operand of a non-linearity over the box of the operands' intervals.

    Raises:
        ValueError: none is known of that name; one of your own is an entry of ``DERIVATIVES``.
    """
    if name in DERIVATIVES:
        return DERIVATIVES[name](*operands)
    pieces = pieces_of(name)
    if pieces is None:
        slopes = _slopes_of(name)
        if slopes is not None:
            return (slopes(*operands[0]),)
        raise ValueError(f"no range of the derivative of {name!r} is known: add one to utils.relaxation.DERIVATIVES")
    return (pieces_range(pieces, *operands[0]),)


def _slopes_of(name: str) -> Callable[[Tensor, Tensor], Interval] | None:
    try:
        return ACTIVATIONS[name].slopes
    except KeyError:
        return None


# --- a factor of known range times a bounded value --------------------------------------------------------------------


def chord_slope(low: Tensor, high: Tensor, l: Tensor, u: Tensor) -> Tensor:  # noqa: E741
    """Slope of the chord of max(low a, high a) over [l, u]; that of the function where l = u."""
    width = u - l
    rise = torch.maximum(low * u, high * u) - torch.maximum(low * l, high * l)
    chord = rise / torch.where(width > 0, width, 1.0)
    # Rounding must not make the slope of a very narrow interval leave the range.
    chord = torch.minimum(torch.maximum(chord, low), high)
    return torch.where(width > 0, chord, torch.where(l > 0, high, low))


def recurjac_slope(low: Tensor, high: Tensor, l: Tensor, u: Tensor) -> Tensor:  # noqa: E741
    """RecurJac's rule: a value of unknown sign is given up for its interval, unless the factor is known.

    Values often have 0 for an end, as products with factors that may be 0 do: rounding must not take their sign away.
    """
    nearly = torch.finfo(l.dtype).eps ** 0.5
    positive, negative = l >= -nearly * u, u <= -nearly * l
    sure = torch.where(positive, high, low)
    return torch.where(positive | negative | (low == high), sure, torch.zeros_like(low))


CHAINS: dict[str, Callable[..., Tensor]] = {"chord": chord_slope, "recurjac": recurjac_slope}


def relax_factor(low: Tensor, high: Tensor, value: Interval, chain: str = "chord") -> Relaxation:
    """Lines around kappa * a for every kappa in [low, high], over a in the interval ``value``."""
    l, u = value  # noqa: E741
    above, below = (_line_above(low, high, *ends, CHAINS[chain]) for ends in ((l, u), (-u, -l)))
    return Relaxation(Plane(below.slopes, -below.intercept), above)


def _line_above(low: Tensor, high: Tensor, l: Tensor, u: Tensor, choose: Callable[..., Tensor]) -> Plane:  # noqa: E741
    slope = choose(low, high, l, u)
    ends = [-guarded(-torch.maximum(low * a, high * a), -slope * a) for a in (l, u)]
    return Plane((slope,), torch.maximum(*ends))


def factor_interval(low: Tensor, high: Tensor, value: Interval) -> Interval:
    """Of kappa * a; the pass that asks rounds it outward."""
    corners = torch.stack([factor * end for factor in (low, high) for end in value])
    return corners.amin(dim=0), corners.amax(dim=0)
