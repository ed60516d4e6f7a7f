"""Lines around arctan, softplus and elu: any slope, exact intercept, as in ``utils.relaxation.lines``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .lines import ACTIVATIONS, Activation, Plane, Relaxation, guarded, least, mirrored

# --- arctan: odd, convex and then concave, as tanh is -----------------------------------------------------------------


def relax_arctan(l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around arctan on [l, u]; ``slopes`` may be any pair (lower, upper)."""
    return mirrored(arctan_lower, l, u, slopes)


def arctan_lower(l: Tensor, u: Tensor, slope: Tensor | None = None) -> Plane:  # noqa: E741
    """``arctan(y) >= slope * y + intercept`` on [l, u]; the volume-optimal slope unless one is given."""
    if slope is None:
        slope = arctan_supporting_slope(l, u)
    points = (l, u, arctan_stationary_point(slope).clamp(l, u))
    return Plane((slope,), least([guarded(y.arctan(), slope * y) for y in points]))


def arctan_stationary_point(slope: Tensor) -> Tensor:
    """The y <= 0 where 1 / (1 + y^2) = slope; finite, and of no consequence, for slopes outside (0, 1)."""
    tiny = torch.finfo(slope.dtype).tiny
    inside = slope.clamp(tiny, 1.0)
    return -((1.0 - inside).clamp(min=tiny) / inside).sqrt()


def arctan_supporting_slope(l: Tensor, u: Tensor) -> Tensor:  # noqa: E741
    """As ``tanh_supporting_slope``: at the midpoint's tangent, or on the tangent through (u, arctan u)."""
    middle = 0.5 * (l + u)
    start = torch.maximum(arctan_tangent_point(u), l)
    width = u - start
    chord = (u.arctan() - start.arctan()) / torch.where(width > 0, width, 1.0)
    tangent = 1.0 / (1.0 + middle**2)
    return torch.where((middle < start) | (width <= 0), tangent, chord.clamp(0.0, 1.0))


@torch.no_grad()
def arctan_tangent_point(u: Tensor, halvings: int = 45) -> Tensor:
    """The d <= 0 whose tangent to arctan runs through (u, arctan u), for u > 0; u itself for u <= 0.

    It is about -u / 2 for small and -sqrt(u / pi) for large u. Errors cost tightness, not soundness.
    """
    positive = u.clamp(min=torch.finfo(u.dtype).eps ** 0.5)
    target, left = positive.arctan(), -torch.minimum(positive, positive.sqrt())
    right = torch.zeros_like(left)
    for _ in range(halvings):
        d = 0.5 * (left + right)
        below = (positive - d) / (1.0 + d * d) < target - d.arctan()
        left, right = torch.where(below, d, left), torch.where(below, right, d)
    return torch.where(u > 0, 0.5 * (left + right), u)


# --- convex functions: the chord above, a tangent below ---------------------------------------------------------------


def relax_convex(
    function: Callable[[Tensor], Tensor],
    derivative: Callable[[Tensor], Tensor],
    contact: Callable[[Tensor], Tensor],
    l: Tensor,  # noqa: E741
    u: Tensor,
    slopes=None,
) -> Relaxation:
    """Lines around a convex function whose derivative grows from 0 to 1; the volume-optimal ones unless given slopes.

    ``contact`` is a y at which the derivative has a value in (0, 1). There the function less a line is least; it is
    greatest at an end.
    """
    at_l, at_u = function(l), function(u)
    if slopes is None:
        width = u - l
        chord = (at_u - at_l) / torch.where(width > 0, width, 1.0)
        slopes = (derivative(0.5 * (l + u)), torch.where(width > 0, chord.clamp(0.0, 1.0), derivative(l)))
    low, high = slopes
    # Where the line touches, the derivative in the contact is 0.
    touching = contact(low.detach().clamp(torch.finfo(low.dtype).tiny, 1.0)).clamp(l, u)
    below = least([guarded(value, low * y) for y, value in ((l, at_l), (u, at_u), (touching, function(touching)))])
    above = -least([guarded(-at_l, -high * l), guarded(-at_u, -high * u)])
    return Relaxation(Plane((low,), below), Plane((high,), above))


TORCH_THRESHOLD = 20.0  # torch's softplus is the identity from here on


def softplus(y: Tensor) -> Tensor:
    """log(1 + exp(y)), to a few units of its own last place at any y."""
    return y.clamp(min=0.0) + (-y.abs()).exp().log1p()


def relax_softplus(l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around softplus on [l, u], and around what torch computes: above its threshold that is y, 2e-9 less."""
    lower, upper = relax_convex(softplus, torch.sigmoid, lambda a: a.log() - (-a).log1p(), l, u, slopes)
    low = lower.slopes[0]
    ends = [torch.maximum(l, torch.full_like(l, TORCH_THRESHOLD)), u]
    cut = torch.where(u > TORCH_THRESHOLD, least([guarded(y, low * y) for y in ends]), lower.intercept)
    return Relaxation(Plane((low,), torch.minimum(lower.intercept, cut)), upper)


def elu(y: Tensor) -> Tensor:
    """y where y > 0, exp(y) - 1 elsewhere."""
    return torch.where(y > 0, y, y.clamp(max=0.0).expm1())


def relax_elu(l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around elu, with its usual alpha of 1, on [l, u]."""
    return relax_convex(elu, lambda y: y.clamp(max=0.0).exp(), torch.log, l, u, slopes)


ACTIVATIONS |= {
    "arctan": Activation(torch.arctan, relax_arctan, 1.0),
    "softplus": Activation(softplus, relax_softplus, 1.0),
    "elu": Activation(elu, relax_elu, 1.0),
}
