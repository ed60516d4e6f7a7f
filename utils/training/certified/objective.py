"""What a certified training minimises: the recipe's robust loss mixed with the clean one, and penalties."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..loop import Objective, accuracy
from .clean_pass import clean_pass
from .losses import Batch, robust_loss, rows_of
from .penalties import input_weights, tightness
from .recipe import Moment, Recipe, moment_of, rate_factor

WATCHED_AT_ONCE = 500
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
FIRST = "weight_ih(_l0(_reverse)?)?"


class Certified(Objective):
    """``kappa`` of the clean cross entropy, the rest of the recipe's bound of the worst one, and its penalties."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._checked: set[torch.Size] = set()  # shapes of inputs that the model was read for
        self.betas = (0.9, recipe.adam_beta2)

    @torch.no_grad()
    def prepare(self, model: nn.Module) -> None:
        """Start hidden-to-hidden weights so that the state is kept and boxes hardly grow."""
        for layer in model.modules():
            if isinstance(layer, RECURRENT):
                for name, weight in layer.named_parameters():
                    if name.startswith("weight_hh"):
                        start_shifted(weight, self.recipe.hidden_scale, self.recipe.hidden_shift)

    def batch(
        self, model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment, check: bool = True
    ) -> Batch:
        """Inputs as the losses take them; others override."""
        return Batch(model, x, y, recipe, moment, check)

    def rate(self, step: int, total_steps: int) -> float:
        return rate_factor(self.recipe, step / total_steps, self.recipe.falls)

    def rates(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """Weights that meet the input learn faster: the few that outweigh the ball have a long way to go."""
        layers = [layer for layer in model.modules() if isinstance(layer, RECURRENT)]
        named = [pair for layer in layers for pair in layer.named_parameters()]
        return {weight: self.recipe.input_rate for name, weight in named if re.fullmatch(FIRST, name)}

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> Tensor:
        moment = moment_of(self.recipe, progress)
        if moment.eps == 0.0:
            return super().loss(model, x, y, progress)
        with clean_pass(model, x) as logits:
            batch = self.batch(model, x, y, self.recipe, moment, check=x.shape[1:] not in self._checked)
            self._checked.add(x.shape[1:])
            total = (1.0 - moment.kappa) * robust_loss(batch).mean() + self._penalties(batch)
        if moment.kappa > 0.0:
            clean = nn.functional.cross_entropy(model(x) if logits is None else logits, y)
            total = total + moment.kappa * clean
        return total

    def _penalties(self, batch: Batch) -> Tensor | float:
        recipe, total = self.recipe, 0.0
        if recipe.input_penalty > 0.0:
            total = recipe.input_penalty * input_weights(batch.graph, recipe.p)
        if recipe.tightness > 0.0 and batch.moment.ramp < 1.0:
            total = total + recipe.tightness * (1.0 - batch.moment.ramp) * tightness(batch.bounds("ibp"))
        return total

    @torch.no_grad()
    def measure(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        """Clean accuracy, and the share that intervals (or backward bounds over them) verify at the recipe's eps."""
        model.eval()
        moment = Moment(self.recipe.eps, 0.0, 1.0, 1.0)
        method = "crown-ibp" if self.recipe.loss.startswith("crown") else "ibp"
        verified = 0
        for xb, yb in zip(x.split(WATCHED_AT_ONCE), y.split(WATCHED_AT_ONCE), strict=True):
            batch = self.batch(model, xb, yb, replace(self.recipe, overshoot=1.0), moment)
            bounds = batch.bounds(method, sound=True)
            verified += int((bounds.margin(rows_of(batch, bounds)) > 0).all(dim=1).sum())
        return {"accuracy": accuracy(model, x, y), "verified": verified / len(y)}


def start_shifted(weight: Tensor, scale: float, shift: float) -> None:
    """Scale a layer's W_hh, (gates * hidden, hidden), in place, and add ``shift`` from every unit to the next one.

    Rows of a shift have one entry: boxes do not grow by it, and a unit's state says what came, and how long ago. Of
    gated cells only the new values g and n (the third block of rows) take it.
    """
    hidden = weight.shape[1]
    new = weight[2 * hidden : 3 * hidden] if len(weight) > hidden else weight
    weight *= scale
    new += shift * torch.eye(hidden).to(weight).roll(1, dims=0)
