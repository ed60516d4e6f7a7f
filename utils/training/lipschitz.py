"""Training for small gradients: the local Lipschitz constant of margins as a part of the loss."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from ..bounds.passes import BoundPass
from ..jacobian.passes import JacobianPass
from ..network.reading import graph_of, read_network
from ..perturbation.sets import Perturbation
from ..question.specification import margin_rows


def local_constants(model: nn.Module, x: Tensor, labels: Tensor, eps: float, norm: float = 2.0) -> Tensor:
    """Upper bounds, (batch,), of the margin's local Lipschitz constant over balls around x, differentiable.

    The margin is that above the class that comes nearest at x. Ranges of derivatives and gradients are bounded by
    intervals, which cost little more than a forward pass and are tight where eps is small.
    """
    network, frames = read_network(model, x)
    graph = graph_of(network, frames.shape[1], frames.dtype, "plane")
    with torch.no_grad():
        others = model(x).scatter(1, labels[:, None], -torch.inf)
    rows = margin_rows(labels, others.shape[1], others.argmax(dim=1)).to(frames)
    around = Perturbation(frames, frames.new_full(frames.shape[:2], eps), norm)
    values = BoundPass(graph, around, "ibp", sound=False)
    return JacobianPass(values, rows, "interval", sound=False).fall() / eps


def objective_of(args: argparse.Namespace):
    """The loss of --lipschitz-weight, or None for the cross entropy alone."""
    if args.lipschitz_weight == 0.0:
        return None

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        constants = local_constants(model, x, y, args.lipschitz_eps, args.lipschitz_norm)
        return nn.functional.cross_entropy(model(x), y) + args.lipschitz_weight * constants.mean()

    return objective
