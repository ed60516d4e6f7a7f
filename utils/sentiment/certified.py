"""What a certified training of sentences minimises: a bound of the worst replacement of words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..training.certified.losses import of_margins
from ..training.certified.objective import RECURRENT, start_shifted
from .bounds import EVERY, lowest_margins
from .net import SentimentNet
from .objective import WATCHED_AT_ONCE, Plain, accuracy
from .recipe import Moment, Recipe, moment_of, rate_factor
from .words import Group


class CertifiedWords(Plain):
    """``kappa`` of the clean cross entropy, the rest that of the recipe's lower bounds of margins."""

    selects = "verified"

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

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
        if moment.kappa > 0.0:
            loss = moment.kappa * super().group_loss(net, group, progress)
        if moment.eps > 0.0 and moment.kappa < 1.0:
            loss = loss + (1.0 - moment.kappa) * robust_loss(net, group, moment).mean()
        return loss

    @torch.no_grad()
    def watch(self, net: SentimentNet, groups: Sequence[Group]) -> dict[str, float]:
        """Accuracy, and the share that the bounds of the loss verify at the recipe's budget."""
        net.eval()
        method, budget = ("ibp", EVERY) if self.recipe.loss == "ibp" else ("crown-ibp", self.recipe.budget)
        verified = 0
        for group in groups:
            for part in group.batches(WATCHED_AT_ONCE):
                x, vectors = net.vectors(part)
                margins = lowest_margins(net.classifier, x, part.labels, vectors, part.valid, [budget], method)
                verified += int((margins > 0).sum())
        return {"accuracy": accuracy(net, groups), "verified": verified / sum(map(len, groups))}


def robust_loss(net: SentimentNet, group: Group, moment: Moment) -> Tensor:
    """Cross entropy, (N,), where all margins are as low as their bounds over the moment's set."""
    x, vectors = net.vectors(group)
    vectors = x[:, :, None] + moment.eps * (vectors - x[:, :, None])
    with net.bounding() as classifier:
        given = classifier, x, group.labels, vectors, group.valid
        margins = (1.0 - moment.beta) * lowest_margins(*given, [EVERY], "ibp") if moment.beta < 1.0 else 0.0
        if moment.beta > 0.0:
            margins = margins + moment.beta * lowest_margins(*given, [moment.budget], "crown-ibp")
    return of_margins(margins)
