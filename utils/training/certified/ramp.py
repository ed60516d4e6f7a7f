"""How a perturbation set and the shares of a loss come in gradually: clean steps, then a ramp, then all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Ramped(Protocol):
    """A recipe: the name of its loss, and shares of the steps: clean ones, and those after which the ramp is over."""

    loss: str
    clean: float
    ramp: float


def check_recipe(recipe: Ramped, losses: Sequence[str]) -> None:
    """Raise ValueError unless the loss is one of ``losses`` and the ramp lies within the training."""
    if recipe.loss not in losses:
        raise ValueError(f"the loss must be one of {', '.join(losses)}, not {recipe.loss!r}")
    if not (0.0 <= recipe.clean < recipe.ramp <= 1.0 or recipe.clean == recipe.ramp == 0.0):
        raise ValueError("the ramp must end after the clean steps, and before the training does, or both be 0")


def ramp_share(recipe: Ramped, progress: float) -> float:
    """How much of the ramp is over, all of one that has no length, at a share ``progress`` of all steps."""
    if recipe.ramp == 0.0:
        return 1.0
    return min(1.0, max(0.0, (progress - recipe.clean) / (recipe.ramp - recipe.clean)))


def between(ends: tuple[float, float], share: float) -> float:
    """The number on the way from the first to the last."""
    first, last = ends
    return first + share * (last - first)
