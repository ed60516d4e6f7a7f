"""Points of a ball where the loss is high, found by a few steps of gradient ascent during a training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...perturbation.moves import FrameBalls


def worst_points(
    model: Callable[[Tensor], Tensor], balls: FrameBalls, labels: Tensor, eps: float, steps: int
) -> Tensor:
    """Inputs, (batch, T, n), in balls of radius eps where the cross entropy of the labels is high; no gradients.

    From a random start, some steps along the steepest direction of the norm.
    """
    radii = balls.per_group(balls.x.new_full((len(balls.x),), eps))
    delta = balls.project(balls.scaled(_noise(balls), radii), radii)
    for step in range(steps):
        x = (balls.x + delta).detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(x), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        size = 1.25 if steps == 1 else 2.0 * 0.3 ** (step / (steps - 1))
        delta = balls.project(delta + balls.scaled(balls.steepest(gradient, delta), size * radii), radii)
    found = (balls.x + delta).detach()
    return found if balls.clip is None else found.clamp(*balls.clip)  # the sum may be rounded out of the range


def _noise(balls: FrameBalls) -> Tensor:
    """Random perturbations, (batch, T, n), most of which reach the boundary of a ball of radius 1, or beyond."""
    return torch.randn_like(balls.x) if balls.norm == 2.0 else 2.0 * torch.rand_like(balls.x) - 1.0
