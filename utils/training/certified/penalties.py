"""What keeps intervals small: few and small weights where the ball enters, and boxes that do not grow on their way."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ...bounds.passes import BoundPass
from ...graph.graph import Graph
from ...graph.nonlinear import NonLinear
from ...perturbation.lp_ball import dual_norm

SHRUNK = 0.5  # of the input's relative radius: what a layer may shrink or grow to without a penalty


def input_weights(graph: Graph, norm: float) -> Tensor:
    """Sum of the dual norms of the rows of weights that meet a frame: the mean of all frames', which mostly share them.

    A ball of radius eps reaches a neuron as eps times the norm of its row, the l_1 norm for boxes.
    """
    frames = graph.frames
    weights = [weight for frame in frames for weight in frame.child_weights]
    shared = {id(weight): weight for weight in weights}
    uses = Counter(map(id, weights))
    return sum(uses[key] * dual_norm(weight, norm).sum() for key, weight in shared.items()) / len(frames)


def tightness(bounds: BoundPass) -> Tensor:
    """How much wider boxes are than at the first non-linear node, of all others, a mean over the batch and nodes.

    Shi et al. (2021) compare with the input in this way: relu(tau - first / own) of mean half-widths.
    """
    widths = []
    for node in bounds.graph.nodes:
        if isinstance(node, NonLinear) and not bounds.is_exact(node):
            low, high = bounds.interval(node)
            widths.append((high - low).mean(dim=1))
    ratios = [(SHRUNK - widths[0] / width.clamp(min=1e-12)).clamp(min=0.0) for width in widths[1:]]
    return torch.stack(ratios).mean() if ratios else torch.zeros(())
