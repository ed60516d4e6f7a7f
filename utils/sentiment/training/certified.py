"""What a certified training of sentences minimises: a bound of the worst replacement of words.

What is taken off bounds for rounding is left out: a loss is no certificate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...bounds.passes import BoundPass
from ...network.reading import graph_of, read_for_step
from ...perturbation.substitutions import Substitutions
from ...question.specification import margin_rows
from ...training.certified.losses import of_margins
from ...training.certified.objective import RECURRENT, start_shifted
from ...training.certified.recipe import rate_factor
from ..recipe import Moment, Recipe, moment_of
from ..words import Group
from .net import SentimentNet
from .objective import WATCHED_AT_ONCE, Plain, accuracy

CLASSES = 2


class CertifiedWords(Plain):
    """``kappa`` of the clean cross entropy, the rest that of the recipe's lower bounds of margins."""

    selects = "verified"

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._checked: set[int] = set()  # lengths of sentences that the classifier was read for

    @torch.no_grad()
    def prepare(self, model: nn.Module) -> None:
        """Start a recurrent layer with small hidden-to-hidden weights: intervals grow by them every step."""
        for layer in model.modules():
            if isinstance(layer, RECURRENT):
                for name, weight in layer.named_parameters():
                    if name.startswith("weight_hh"):
                        start_shifted(weight, self.recipe.hidden_scale, 0.0)

    def rate(self, step: int, total_steps: int) -> float:
        return rate_factor(self.recipe, step / total_steps)

    def settled(self, progress: float) -> bool:
        return progress >= self.recipe.ramp

    def group_loss(self, net: SentimentNet, group: Group, progress: float) -> Tensor:
        moment = moment_of(self.recipe, progress)
        loss = 0.0
        if moment.kappa > 0.0 or moment.eps == 0.0:
            loss = (moment.kappa if moment.eps > 0.0 else 1.0) * super().group_loss(net, group, progress)
        if moment.eps > 0.0 and moment.kappa < 1.0:
            with net.bounding():
                robust = of_margins(self.margins(net, group, moment)).mean()
            loss = loss + (1.0 - moment.kappa) * robust
        return loss

    def margins(self, net: SentimentNet, group: Group, moment: Moment) -> Tensor:
        """Lower bounds, (N, classes - 1), over the moment's set: means of intervals' and of a backward pass's."""
        x, vectors = net.vectors(group)
        moved = x[:, :, None] + moment.eps * (vectors - x[:, :, None])
        network, frames = read_for_step(net.classifier, x, check=x.shape[1] not in self._checked)
        self._checked.add(x.shape[1])
        graph = graph_of(network, frames.shape[1], frames.dtype, "plane")
        rows = margin_rows(group.labels, CLASSES).to(frames)
        budget = moment.budget if moment.beta == 1.0 else None  # intervals are of sets in which every word may change
        bounds = BoundPass(graph, Substitutions(frames, moved, group.valid, budget), "crown-ibp", sound=False)
        margins = 0.0
        if moment.beta < 1.0:
            margins = (1.0 - moment.beta) * bounds.interval_lower_bound(graph.output, rows)
        if moment.beta > 0.0:
            bounds.perturbation.budget = torch.full_like(bounds.perturbation.budget, moment.budget)
            margins = margins + moment.beta * bounds.lower_bound(graph.output, rows)
        return margins

    @torch.no_grad()
    def watch(self, net: SentimentNet, groups: Sequence[Group]) -> dict[str, float]:
        """Accuracy, and the share that the bounds of the loss verify at the recipe's budget."""
        net.eval()
        moment = Moment(1.0, self.recipe.budget, 0.0, float(self.recipe.loss == "mixed"))
        verified = 0
        for group in groups:
            for part in group.batches(WATCHED_AT_ONCE):
                verified += int((self.margins(net, part, moment) > 0).all(dim=1).sum())
        return {"accuracy": accuracy(net, groups), "verified": verified / sum(map(len, groups))}
