"""Training for small gradients: the local Lipschitz constant of margins as a part of the loss."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bounds.passes import BoundPass
from ..jacobian.passes import JacobianPass
from ..network.reading import graph_of, read_network
from ..perturbation.sets import Perturbation
from ..question.specification import margin_rows
from .loop import Objective


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


@dataclass
class SmallGradients(Objective):
    """The cross entropy plus ``weight`` times the mean local constant over balls of radius ``eps``."""

    weight: float
    eps: float
    norm: float

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> Tensor:
        constants = local_constants(model, x, y, self.eps, self.norm)
        return super().loss(model, x, y, progress) + self.weight * constants.mean()


def objective_of(args: argparse.Namespace) -> Objective:
    """The loss of --lipschitz-weight, or plain training."""
    if args.lipschitz_weight == 0.0:
        return Objective()
    return SmallGradients(args.lipschitz_weight, args.lipschitz_eps, args.lipschitz_norm)
