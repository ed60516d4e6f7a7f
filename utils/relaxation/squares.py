"""Lines around squares and around log(1 + max(y, 0)): any slope, exact intercept, as in ``utils.relaxation.lines``."""

from __future__ import annotations

import torch
from torch import Tensor

from .lines import ACTIVATIONS, GUARD_ULPS, Activation, Plane, Relaxation, guarded, least


def relax_square(l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around y^2 on [l, u]: by default the tangent at the middle, and the chord, which has the same slope.

    y^2 - a y is least at a / 2 if that lies inside, else at an end, and greatest at an end.
    """
    low, high = (l + u, l + u) if slopes is None else slopes
    touching = (0.5 * low).clamp(l, u)
    below = least([guarded(y**2, low * y) for y in (l, u, touching)])
    above = -least([guarded(-(y**2), -high * y) for y in (l, u)])
    return Relaxation(Plane((low,), below), Plane((high,), above))


def log1p(y: Tensor) -> Tensor:
    """log(1 + max(y, 0)): of energies, which rounding may bring below 0."""
    return y.clamp(min=0.0).log1p()


def relax_log1p(l: Tensor, u: Tensor, slopes=None) -> Relaxation:  # noqa: E741
    """Lines around log(1 + max(y, 0)) on [l, u].

    It is 0 and then concave: it less a y is least at an end or at 0, and greatest there or where 1 / (1 + y) = a.
    By default the lines are of least volume: those that support the hull of the function at the middle.
    """
    zero = torch.zeros_like(l).clamp(l, u)
    values = [log1p(y) for y in (l, zero, u)]
    if slopes is None:
        slopes = _log1p_slopes(l, zero, u, values)
    low, high = slopes
    tiny = torch.finfo(l.dtype).tiny
    touching = torch.maximum(1.0 / high.detach().clamp(min=tiny) - 1.0, zero)
    touching = torch.minimum(torch.maximum(touching, l), u)
    points = list(zip((l, zero, u), values, strict=True))
    below = least([guarded(value, low * y) for y, value in points])
    above = -least([guarded(-value, -high * y) for y, value in (*points, (touching, log1p(touching)))])
    return Relaxation(Plane((low,), below), Plane((high,), above))


def _log1p_slopes(l: Tensor, zero: Tensor, u: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:  # noqa: E741
    middle = 0.5 * (l + u)
    lower = torch.where((l < 0) & (middle < 0), 0.0, _chord(zero, u, values[1], values[2]))
    start = torch.minimum(log1p_tangent_point(l), u)
    whole = _chord(l, start, values[0], log1p(start))
    return lower, torch.where((l < 0) & (middle <= start), whole, 1.0 / (1.0 + middle.clamp(min=0.0)))


@torch.no_grad()
def log1p_tangent_point(l: Tensor, newton_steps: int = 12) -> Tensor:  # noqa: E741
    """The t >= 0 whose tangent runs through (l, 0), for l < 0; 0 for other l.

    Newton steps on s log s - s + 1 = -l for s = 1 + t, a convex function, from a greater s. Errors cost tightness.
    """
    away = (-l).clamp(min=0.0)
    t = (2.0 * away).sqrt() + away
    for _ in range(newton_steps):
        log = t.log1p()
        t = t - ((1.0 + t) * log - t - away) / log.clamp(min=torch.finfo(l.dtype).tiny)
    return torch.where(l < 0, t.clamp(min=0.0), 0.0)


def _chord(left: Tensor, right: Tensor, at_left: Tensor, at_right: Tensor) -> Tensor:
    """Slope between two points, within the range of the derivative; the derivative where they meet."""
    width = right - left
    slope = (at_right - at_left) / torch.where(width > 0, width, 1.0)
    derivative = torch.where(left >= 0, 1.0 / (1.0 + left.clamp(min=0.0)), 0.0)
    return torch.where(width > 0, slope.clamp(0.0, 1.0), derivative)


def log1p_slopes(l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Bounds of the derivative, 0 below 0 and then 1 / (1 + y)."""
    unit = GUARD_ULPS * torch.finfo(l.dtype).eps
    low, high = ((1.0 + side * unit) / (1.0 + y.clamp(min=0.0)) for side, y in ((-1.0, u), (1.0, l)))
    return torch.where(l <= 0, 0.0, low), torch.where(u < 0, 0.0, high)


ACTIVATIONS |= {"log1p": Activation(log1p, relax_log1p, slopes=log1p_slopes)}
