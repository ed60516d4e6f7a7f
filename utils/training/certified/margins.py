"""Intervals of all differences z_i - z_y of a sample's outputs, without a spec matrix: for many classes.

The last layer z = W v + b gives  z_i - z_y = (w_i - w_y) v + b_i - b_y,  of radius  |w_i - w_y| r  where v has the
half-widths r. That is a number for every sample, class and column of W, which is summed in parts of the classes; in a
backward pass each part is made once more, so that no more than one is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...bounds.passes import BoundPass
from ...graph.nodes import Frame, Linear
from ...question.specification import margin_rows

PART_BYTES = 2**26  # of differences of weights that are made at once


def difference_intervals(bounds: BoundPass, y: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of z_i - z_y, (batch, classes), 0 for the label's own, without room for rounding."""
    output = bounds.graph.output
    pairs = output.inexact_parents(bounds) if isinstance(output, Linear) else None
    if not pairs or any(isinstance(parent, Frame) for parent, _ in pairs):
        return _by_rows(bounds, y)
    center, radius = bounds.offset(output), 0.0
    for parent, weight in pairs:
        low, high = bounds.interval(parent)
        center = center + 0.5 * (low + high) @ weight.T
        radius = radius + _radius(weight, y, 0.5 * (high - low))
    center = center.expand(len(y), -1)
    center = center - center.gather(1, y[:, None])
    return center - radius, center + radius


def _radius(weight: Tensor, y: Tensor, half: Tensor) -> Tensor:
    """|w_i - w_y| r, (batch, classes)."""
    size = max(1, PART_BYTES // (len(y) * weight.shape[1] * weight.element_size()))
    if size >= len(weight):
        return _part(weight, weight, y, half)
    return torch.cat([checkpoint(_part, part, weight, y, half, use_reentrant=False) for part in weight.split(size)], 1)


def _part(some: Tensor, weight: Tensor, y: Tensor, half: Tensor) -> Tensor:
    return ((some - weight[y][:, None]).abs() @ half[..., None]).squeeze(-1)


def _by_rows(bounds: BoundPass, y: Tensor) -> tuple[Tensor, Tensor]:
    output = bounds.graph.output
    rows = margin_rows(y, output.size).to(bounds.perturbation.x)
    lower, upper = bounds.interval_lower_bound(output, -rows), -bounds.interval_lower_bound(output, rows)
    places, zero = other_classes(y, output.size), lower.new_zeros(len(y), output.size)
    return zero.scatter(1, places, lower), zero.scatter(1, places, upper)


def other_classes(y: Tensor, classes: int) -> Tensor:
    """All classes but the label, (batch, classes - 1), in increasing order."""
    others = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    return others + (others >= y[:, None])
