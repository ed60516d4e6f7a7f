"""Training against moves of the weights: the worst loss over balls around every weight matrix, all at once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...network.reading import graph_of, read_for_step
from ...perturbation.sets import Perturbation
from ...question.specification import margin_rows
from ...weights import MovedWeights, WeightPass, Weights
from .. import lipschitz
from ..loop import Objective, accuracy
from .losses import of_margins

METHODS = ("ibp", "crown-ibp", "crown")
CLEAN, RAMP = 0.1, 0.6  # shares of the steps without moves, and after which eps has its full size
WATCHED_AT_ONCE = 500


@dataclass
class MovingWeights(Objective):
    """Upper bound of the worst cross entropy over balls of radius ``eps`` of all matrices, see ``utils.weights``.

    Attributes:
        eps, norm: of the balls, 2 or inf.
        method: how margins are bounded, one of ``METHODS``.
        clean: share of the clean cross entropy.
    """

    eps: float
    norm: float = 2.0
    method: str = "crown-ibp"
    clean: float = 0.5
    _moved: dict[torch.Size, MovedWeights] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        Weights(self.norm)  # raises what is wrong with the norm

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> Tensor:
        clean = super().loss(model, x, y, progress)
        share = min(1.0, max(0.0, (progress - CLEAN) / (RAMP - CLEAN)))
        if share == 0.0:
            return clean
        margins = self.margins(model, x, y, share * self.eps, sound=False)
        return self.clean * clean + (1.0 - self.clean) * of_margins(margins).mean()

    def margins(self, model: nn.Module, x: Tensor, y: Tensor, eps: float, sound: bool = True) -> Tensor:
        """Lower bounds of the margins above all other classes, (batch, classes - 1), over the balls."""
        if x.shape[1:] not in self._moved:  # where parameters stand does not depend on their values
            self._moved[x.shape[1:]] = MovedWeights(model, x[:1].detach(), Weights(self.norm))
        moved = self._moved[x.shape[1:]]
        network, frames = read_for_step(model, x, check=False)
        graph = graph_of(network, frames.shape[1], frames.dtype, "plane")
        still = Perturbation(frames, frames.new_zeros(frames.shape[:2]))
        balls = moved.balls(frames.new_full((len(x),), eps), frames.dtype)
        bounds = WeightPass(graph, still, balls, moved.places(frames.dtype), self.method, sound=sound)
        rows = margin_rows(y, graph.output.size).to(frames)
        return bounds.margin(rows) if sound or self.method == "ibp" else bounds.lower_bound(bounds.graph.output, rows)

    @torch.no_grad()
    def measure(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        """Clean accuracy, and the share that is verified at eps."""
        model.eval()
        parts = zip(x.split(WATCHED_AT_ONCE), y.split(WATCHED_AT_ONCE), strict=True)
        verified = sum(int((self.margins(model, xb, yb, self.eps) > 0).all(dim=1).sum()) for xb, yb in parts)
        return {"accuracy": accuracy(model, x, y), "verified": verified / len(y)}


def objective_of(args: argparse.Namespace) -> Objective:
    """The loss of --perturb, of --lipschitz-weight, or plain training. Raises ValueError if both are asked for."""
    if args.perturb is None:
        return lipschitz.objective_of(args)
    if args.lipschitz_weight:
        raise ValueError("--perturb weights and --lipschitz-weight are two losses: give one")
    return MovingWeights(args.perturb_eps, args.perturb_norm, args.perturb_method)
