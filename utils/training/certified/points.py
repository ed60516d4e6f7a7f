"""Points of a ball where the loss is high, found by a few steps of gradient ascent during a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...perturbation.moves import FrameBalls

if TYPE_CHECKING:
    from .losses import Batch


def worst_points(batch: Batch, share: float) -> Tensor:
    """Inputs, (batch, T, n), in balls of a share of the moment's eps where the cross entropy is high; no gradients.

    From a random start, ``attack_steps`` steps along the steepest direction of the norm.
    """
    balls = batch.threat.moves(batch.frames)
    eps = balls.per_group(batch.frames.new_full((len(batch.frames),), share * batch.moment.eps))
    delta = balls.project(balls.scaled(_noise(balls), eps), eps)
    steps = batch.recipe.attack_steps
    for step in range(steps):
        x = (batch.frames + delta).detach().requires_grad_()
        loss = nn.functional.cross_entropy(batch.model(x), batch.y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        size = 1.25 if steps == 1 else 2.0 * 0.3 ** (step / (steps - 1))
        delta = balls.project(delta + balls.scaled(balls.steepest(gradient, delta), size * eps), eps)
    return (batch.frames + delta).detach()


def _noise(balls: FrameBalls) -> Tensor:
    """Random perturbations, (batch, T, n), most of which reach the boundary of a ball of radius 1, or beyond."""
    return torch.randn_like(balls.x) if balls.norm == 2.0 else 2.0 * torch.rand_like(balls.x) - 1.0
