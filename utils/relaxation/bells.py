"""Lines around derivatives of activations: tanh' and sigmoid', which are bells, arctan' and elu'.

As for other functions any slope is sound with its exact intercept (``lines``). Of the bell b(y) = tanh'(y) = 1 - t^2,
t = tanh y, what b(y) - s y is at most and at least over [l, u] is its value at an end or where

    b'(y) = -2 t (1 - t^2) = s,        t^3 - t - s / 2 = 0,

a cubic with three real roots for every slope that b has. So lines of several slopes are tried at once, and the ones
nearest to b at the midpoint are taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .derivatives import tanh_derivative
from .lines import GUARD_ULPS, Plane, Relaxation
from .shapes import Shape, relax_shape

STEEPEST = 4.0 / (3.0 * math.sqrt(3.0))  # slope of tanh', where t^2 = 1/3
TANGENTS = 12  # parts of the interval between which tangents are tried
FLAT_ULPS = 4.0  # roots of eps: less steep lines are horizontal, as the cubic's outer roots are not known well


def relax_bell(l: Tensor, u: Tensor) -> Relaxation:  # noqa: E741
    """Lines around tanh' on [l, u]."""
    slopes = _tried(l, u)
    inner = [y.clamp(l, u) for y in _stationary(slopes)]  # outside of the interval they can only be redundant
    points = torch.stack((l.expand_as(slopes), u.expand_as(slopes), *inner))
    value, rise = tanh_derivative(points), slopes * points
    room = GUARD_ULPS * torch.finfo(l.dtype).eps * (value + rise.abs()) + torch.finfo(l.dtype).tiny
    below, above = (value - rise - room).amin(dim=0), (value - rise + room).amax(dim=0)
    at_middle = 0.5 * (l + u) * slopes
    lower = _chosen((at_middle + below).detach().argmax(dim=0), slopes, below)
    return Relaxation(lower, _chosen((at_middle + above).detach().argmin(dim=0), slopes, above))


def _chosen(which: Tensor, slopes: Tensor, intercepts: Tensor) -> Plane:
    slope, intercept = (part.gather(0, which[None]).squeeze(0) for part in (slopes, intercepts))
    return Plane((slope,), intercept)


def _tried(l: Tensor, u: Tensor) -> Tensor:  # noqa: E741
    """Slopes of the chord and of some tangents, and 0, (number, ...)."""
    width = u - l
    chord = (tanh_derivative(u) - tanh_derivative(l)) / torch.where(width > 0, width, 1.0)
    shares = torch.arange(TANGENTS + 1, dtype=l.dtype, device=l.device) / TANGENTS
    points = l + shares.reshape(-1, *[1] * l.dim()) * width
    tangents = -2.0 * points.tanh() * tanh_derivative(points)
    first = torch.stack((torch.where(width > 0, chord, tangents[0]), torch.zeros_like(l)))
    slopes = torch.cat((first, tangents))
    flat = FLAT_ULPS * torch.finfo(l.dtype).eps ** 0.5
    return torch.where(slopes.abs() > flat, slopes.clamp(-STEEPEST, STEEPEST), 0.0)


@torch.no_grad()
def _stationary(slopes: Tensor) -> list[Tensor]:
    """The points at which b(y) - s y is stationary; b changes with these by nothing of first order."""
    angle = (slopes / STEEPEST).clamp(-1.0, 1.0).arccos() / 3.0
    most = 1.0 - torch.finfo(slopes.dtype).eps
    points = []
    for k in range(3):
        t = (2.0 / math.sqrt(3.0) * (angle - 2.0 * math.pi * k / 3.0).cos()).clamp(-most, most)
        points.append(0.5 * (t.log1p() - (-t).log1p()))
    return points


def relax_gate_bell(l: Tensor, u: Tensor) -> Relaxation:  # noqa: E741
    """Lines around sigmoid'(y) = tanh'(y / 2) / 4 on [l, u]."""
    planes = relax_bell(0.5 * l, 0.5 * u)
    return Relaxation(*(Plane((0.125 * plane.slopes[0],), 0.25 * plane.intercept) for plane in planes))


def _arctan_bend(y: Tensor) -> Tensor:
    return -2.0 * y / (1.0 + y * y) ** 2


TURN = 1.0 / math.sqrt(3.0)
ARCTAN_BELL = Shape(lambda y: 1.0 / (1.0 + y * y), _arctan_bend, (-TURN, TURN), (True, False, True))
ELU_STEP = Shape(  # exp y up to 0, then 1
    lambda y: y.clamp(max=0.0).exp(), lambda y: torch.where(y < 0, y.clamp(max=0.0).exp(), 0.0), (0.0,), (True, False)
)


def relax_arctan_bell(l: Tensor, u: Tensor) -> Relaxation:  # noqa: E741
    """Lines around arctan' on [l, u]."""
    return relax_shape(ARCTAN_BELL, l, u)


def relax_elu_step(l: Tensor, u: Tensor) -> Relaxation:  # noqa: E741
    """Lines around elu' = min(1, exp y) on [l, u]."""
    return relax_shape(ELU_STEP, l, u)
