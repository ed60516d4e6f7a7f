"""What a training against the replacement of words is told, and how the set comes in gradually."""

from __future__ import annotations

from dataclasses import dataclass

from ..training.certified.ramp import between, check_recipe, ramp_share

LOSSES = ("ibp", "mixed")


@dataclass(frozen=True)
class Recipe:
    """A certified training, without what belongs to any training.

    Attributes:
        loss: "ibp", intervals alone, or "mixed", in which backward bounds over intervals have a share.
        budget: how many words change, of backward bounds; intervals do not see it.
        clean, ramp: shares of the steps: without replacements, and after which the set has its full size.
        kappa: share of the clean cross entropy in the loss, (when the ramp begins, from its end on).
        beta: likewise the share of backward bounds, of mixed.
        hidden_scale: factor of a recurrent layer's first hidden-to-hidden weights, by which intervals grow each step.
    """

    loss: str
    budget: int = 6
    clean: float = 0.1
    ramp: float = 0.6
    kappa: tuple[float, float] = (1.0, 0.3)
    beta: tuple[float, float] = (1.0, 0.3)
    hidden_scale: float = 0.3

    def __post_init__(self):
        check_recipe(self, LOSSES)


@dataclass(frozen=True)
class Moment:
    """Where a training is: how far substitutes are from their words, as a share; the budget; and the loss's shares."""

    eps: float
    budget: int
    kappa: float
    beta: float


def moment_of(recipe: Recipe, progress: float) -> Moment:
    """The moment at a share ``progress`` of all steps."""
    share = ramp_share(recipe, progress)
    beta = between(recipe.beta, share) if recipe.loss == "mixed" else 0.0
    return Moment(share, 1 + round(share * (recipe.budget - 1)), between(recipe.kappa, share), beta)
