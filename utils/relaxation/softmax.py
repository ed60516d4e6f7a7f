"""One relaxation of a whole row of a softmax, p_i = exp(s_i) / sum_j exp(s_j), for scores s_j in [l_j, u_j].

The planes are those of Wei et al. (2023), in all scores of the row: a number for the score itself and a number times a
vector that the whole row shares, so that a row of T values costs O(T), not O(T^2), a value.

Lower: exp is at most its chord, exp(s_j) <= k_j s_j + b_j, so  p_i >= L_i(s) = exp(s_i) / sum_j (k_j s_j + b_j), and
that is convex (exp(y) / z is log-convex in (y, z) for z > 0): a tangent lies below. With S the sum of the chords there,

    dL_i / ds = L_i e_i - (L_i / S) k.

Upper: t = log p_i = s_i - log sum_j exp(s_j) is concave, and exp(t) at most the line of slope c >= 0 that touches it at
an end of [t_l, t_u] and lies above at the other one, so a tangent of t gives

    p_i <= h + c t(s),        dt / ds = e_i - softmax(s).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowPlane(NamedTuple):
    """``own_i s_i + shared_i sum_j direction_j s_j + intercept_i`` for every i of a row; all are (..., T)."""

    own: Tensor
    shared: Tensor
    direction: Tensor
    intercept: Tensor


def log_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest log p_i over the box, (..., T) each, but for rounding: exact."""
    itself = torch.eye(low.shape[-1], dtype=torch.bool, device=low.device)
    above = (high.unsqueeze(-2) - low.unsqueeze(-1)).masked_fill(itself, 0.0)  # (..., i, j): s_j - s_i at most
    below = (low.unsqueeze(-2) - high.unsqueeze(-1)).masked_fill(itself, 0.0)
    return -above.logsumexp(dim=-1), -below.logsumexp(dim=-1)


def softmax_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest p_i over the box, (..., T) each, with room for rounding."""
    least, most = (end.exp() for end in _outward(*log_range(low, high)))
    return least, most.clamp(max=1.0)


def _outward(least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms moved apart by what rounding may have done to them, and to what is made of them."""
    unit = (least.shape[-1] + 32) * torch.finfo(least.dtype).eps
    return least - unit * (1.0 + least.abs()), most + unit * (1.0 + most.abs())


def relax_softmax(low: Tensor, high: Tensor) -> tuple[RowPlane, RowPlane]:
    """Planes below and above p on the box, scores (..., T); for exact arithmetic (``terms`` says what rounds)."""
    middle = 0.5 * (low + high)
    return _plane_below(low, high, middle), _plane_above(low, high, middle)


def _plane_below(low: Tensor, high: Tensor, middle: Tensor) -> RowPlane:
    top = high.amax(dim=-1, keepdim=True)  # the softmax knows no shift of its scores
    left, point = (low - top).exp(), (middle - top).exp()
    width = high - low
    right, wide = (high - top).exp(), width > 1.0
    # (e^u - e^l) / (u - l); of narrow intervals e^u, which is a little more: chords may lie too high.
    narrow = left * torch.expm1(width.clamp(max=1.0)) / torch.where(width > 1e-6, width, 1.0)
    chord = torch.where(wide, (right - left) / torch.where(wide, width, 1.0), narrow)
    chord = torch.where(width > 1e-6, chord, right)
    total = (left + chord * (middle - low)).sum(dim=-1, keepdim=True)
    value = point / total
    shared = -value / total
    intercept = value - value * middle - shared * (chord * middle).sum(dim=-1, keepdim=True)
    return RowPlane(value, shared, chord, intercept)


def _plane_above(low: Tensor, high: Tensor, middle: Tensor) -> RowPlane:
    least, most = _outward(*log_range(low, high))
    width = most - least
    slope = most.exp() * -torch.expm1(-width) / width
    height = torch.maximum(least.exp() - slope * least, most.exp() - slope * most)
    share = middle.softmax(dim=-1)
    at = middle.log_softmax(dim=-1)  # t at the point
    intercept = height + slope * (at - middle + (share * middle).sum(dim=-1, keepdim=True))
    return RowPlane(slope, -slope, share, intercept)


def terms(plane: RowPlane, sizes: Tensor) -> Tensor:
    """Sums of the absolute values of the terms that a plane takes of scores of such sizes, (..., T)."""
    shared = plane.shared.abs() * (plane.direction.abs() * sizes).sum(dim=-1, keepdim=True)
    return plane.own.abs() * sizes + shared


def mean_below(low: Tensor, high: Tensor, values: Tensor) -> Tensor:
    """Least  sum_j p_j v_j  over scores in the box, (..., T), and v_j >= values, (..., T, d): (..., d).

    Its derivative by s_j is p_j (v_j - mean), so where it is least the scores of all v_j below it are at their highest
    and the others at their lowest: of T choices, in the order of the values, the least is exact.
    """
    ordered, order = values.sort(dim=-2)
    top = high.amax(dim=-1, keepdim=True)
    heavy, light = ((end - top).exp().unsqueeze(-1).expand_as(values).gather(-2, order) for end in (high, low))
    change = heavy - light
    weight = light.sum(dim=-2, keepdim=True) + change.cumsum(dim=-2)
    sums = (light * ordered).sum(dim=-2, keepdim=True) + (change * ordered).cumsum(dim=-2)
    reliable = weight > torch.finfo(values.dtype).tiny ** 0.75  # what underflows says nothing
    means = torch.where(reliable, sums / torch.where(reliable, weight, 1.0), ordered[..., :1, :])
    largest = values.abs().amax(dim=-2)
    room = (64 * values.shape[-2] + 512) * torch.finfo(values.dtype).eps * largest
    return torch.maximum(means.amin(dim=-2) - room, ordered[..., 0, :])
