"""What a training against the replacement of words is told, and how the set comes in gradually."""

from __future__ import annotations

from dataclasses import dataclass

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
        if self.loss not in LOSSES:
            raise ValueError(f"the loss must be one of {', '.join(LOSSES)}, not {self.loss!r}")
        if not 0.0 <= self.clean < self.ramp <= 1.0:
            raise ValueError("the ramp must end after the clean steps, and before the training does")


@dataclass(frozen=True)
class Moment:
    """Where a training is: how far substitutes are from their words, as a share; the budget; and the loss's shares."""

    eps: float
    budget: int
    kappa: float
    beta: float


def moment_of(recipe: Recipe, progress: float) -> Moment:
    """The moment at a share ``progress`` of all steps."""
    share = min(1.0, max(0.0, (progress - recipe.clean) / (recipe.ramp - recipe.clean)))
    kappa, beta = (first + share * (last - first) for first, last in (recipe.kappa, recipe.beta))
    return Moment(share, 1 + round(share * (recipe.budget - 1)), kappa, beta if recipe.loss == "mixed" else 0.0)
