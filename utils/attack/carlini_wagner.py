"""Carlini and Wagner's attack, adapted to sequences: minimise the largest distortion of a frame.

The problem is  min over delta of  max_k ||delta_k||_p  such that  margin(x + delta) <= 0. The maximum has a gradient in
one frame only, so it becomes a variable of its own, v, with delta_k = v w_k and ||w_k||_p <= 1, which changes nothing
about the optimum, and the constraint becomes a penalty:

    minimise  v / v_0 + c max(0, margin(x + v w)) / margin(x)      over v > 0 and w in the product of unit balls,

by Adam on log v and by steps of steepest descent in l_p on w, with momentum and projection (Adam's own steps have about
the same length in every element, which suits p = inf alone). v_0 is the radius at which the margin would vanish were it
linear; the penalty is then exact for a linear margin at every c > 1. As in the original, c is searched for: lowered
after success, raised after failure. All distortions met on the way are candidates; the smallest is tightened and
verified in float64 as in ``utils.attack.pgd``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..network.models import SequenceClassifier
from ..network.state import plain_state
from ..perturbation.moves import FrameBalls
from .pgd import VERDICT, AttackProblem, RadiusAttackResult, settle, tighten

FIRST_C, LARGEST_C = 2.0, 1e4
RATE_V, RATE_W = 0.1, 1.0  # first step sizes, of log v and of w
LAST_RATE = 0.02  # final step sizes as a share of the first
MOMENTUM = 0.75


@plain_state()
def carlini_wagner(
    model: SequenceClassifier,
    x: Tensor,
    labels: Tensor,
    *,
    steps: int = 150,
    searches: int = 4,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
    **threat: Any,
) -> RadiusAttackResult:
    """The smallest perturbation per sample that the attack finds: an upper bound of the minimum distortion.

    Args:
        model, x, labels: as for ``utils.certify.certified_margin``.
        steps: Adam steps for each c.
        searches: how many values of c are tried.
        dtype: precision of the descent; verdicts are made in float64.
        batch_size: samples attacked at once.
        threat: norm, targets, frames, clip and ball, as for ``utils.attack.AttackProblem``.
    """
    problem = AttackProblem(model, x, labels, **threat)
    with torch.no_grad():
        clean = problem.margins(problem.balls.x)
    worst = clean.amin(dim=-1)
    result = RadiusAttackResult(
        problem.balls.x.clone(), worst, torch.zeros_like(worst).masked_fill(worst > 0, torch.inf)
    )
    for rows in (worst > 0).nonzero().squeeze(-1).split(batch_size):
        if len(rows):  # a split of nothing is one empty part
            _search_c(problem, rows, clean[rows].to(dtype), steps, searches, result)
    return result


def _search_c(
    problem: AttackProblem, rows: Tensor, clean: Tensor, steps: int, searches: int, result: RadiusAttackResult
) -> None:
    c = torch.full_like(clean, FIRST_C)
    low, high = torch.ones_like(c), torch.full_like(c, torch.inf)
    for _ in range(searches):
        delta, success = minimise(problem, rows, clean, c, steps)
        _keep_smallest(problem, rows, delta, success, result)
        low, high = torch.where(success, low, c), torch.where(success, c, high)
        c = torch.where(high.isinf(), 10.0 * c, (low * high).sqrt()).clamp(max=LARGEST_C)


def minimise(problem: AttackProblem, rows: Tensor, clean: Tensor, c: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """One descent for every sample and margin row at its own c, (m, n_specs).

    Returns:
        The smallest perturbation with a margin below 0 that was met, (m, n_specs, T, n), and whether one was met.
    """
    balls = problem.balls.select(rows, clean.dtype)
    x = balls.x[:, None].expand(-1, clean.shape[1], -1, -1)
    v_0, w = _start(problem, rows, balls, x)
    log_v = v_0.log().requires_grad_()
    w.requires_grad_()
    optimizer = torch.optim.Adam([log_v], lr=RATE_V)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1.0 / steps))
    unit = torch.ones_like(balls.per_group(v_0[:, 0].detach()))
    momentum = torch.zeros_like(w)
    best, best_size = torch.zeros_like(x), torch.full_like(v_0, torch.inf)
    with torch.enable_grad():
        for step in range(steps):
            delta = balls.clip_range(log_v.exp()[..., None, None] * w)
            margin = problem.margins(x + delta, rows).diagonal(dim1=-2, dim2=-1)
            loss = log_v.exp() / v_0 + c * margin.clamp(min=0.0) / clean
            log_v.grad, gradient = torch.autograd.grad(loss.sum(), (log_v, w))
            with torch.no_grad():
                size = balls.size(delta).masked_fill(margin >= 0, torch.inf)
                best = torch.where((size < best_size)[..., None, None], delta, best)
                best_size = torch.minimum(best_size, size)
                optimizer.step()
                schedule.step()
                momentum = MOMENTUM * momentum - (1.0 - MOMENTUM) * gradient
                rate = RATE_W * LAST_RATE ** (step / steps)
                w.copy_(_into_unit_balls(balls, w + rate * balls.steepest(momentum, delta), unit))
    return best, best_size.isfinite()


def _into_unit_balls(balls: FrameBalls, w: Tensor, unit: Tensor) -> Tensor:
    """w projected to the unit balls; the valid range concerns v w, not w."""
    return FrameBalls(balls.x, balls.mask, balls.norm, balls.ball, None, balls.stretch).project(w, unit)


def _start(problem: AttackProblem, rows: Tensor, balls: FrameBalls, x: Tensor) -> tuple[Tensor, Tensor]:
    """v_0, (m, n_specs), and the direction w, (m, n_specs, T, n), in which each margin falls fastest at x."""
    with torch.enable_grad():
        inputs = x.detach().clone().requires_grad_()
        margins = problem.margins(inputs, rows).diagonal(dim1=-2, dim2=-1)
        (gradient,) = torch.autograd.grad(margins.sum(), inputs)
    v_0 = (margins / balls.gradient_norms(gradient).sum(dim=-1)).detach()
    v_0 = torch.where(v_0.isfinite() & (v_0 > 0), v_0, 1.0)
    return v_0, balls.steepest(-gradient, torch.zeros_like(x)).detach()


@torch.no_grad()
def _keep_smallest(
    problem: AttackProblem, rows: Tensor, delta: Tensor, success: Tensor, result: RadiusAttackResult
) -> None:
    """Verify, tighten and keep the candidates, (m, n_specs, T, n), that are smaller than what ``result`` has."""
    for spec in range(delta.shape[1]):
        chosen = rows[success[:, spec]]
        candidate = delta[success[:, spec], spec].to(VERDICT)
        size = problem.balls.select(chosen, VERDICT).size(candidate)
        smaller = size < 1.05 * result.radius[chosen]
        chosen, candidate, size = chosen[smaller], candidate[smaller], size[smaller]
        x, found = _verified(problem, chosen, candidate, size)
        chosen, x = chosen[found], x[found]
        x, margin, size = tighten(problem, chosen, x)
        smaller = size < result.radius[chosen]
        chosen = chosen[smaller]
        result.x[chosen], result.margin[chosen], result.radius[chosen] = x[smaller], margin[smaller], size[smaller]


def _verified(problem: AttackProblem, chosen: Tensor, delta: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (m, T, n) and whether the attack succeeds there in float64, (m,).

    What succeeds in the descent's precision only is given a little more room, which tightening takes away again.
    """
    balls = problem.balls.select(chosen, VERDICT)
    best, found = balls.x.clone(), torch.zeros_like(size, dtype=torch.bool)
    for factor in (1.0, 1.01, 1.05):
        eps = balls.per_group(size * factor * (1.0 + 1e-6))
        x, margin = settle(problem, chosen, eps, factor * delta)
        first = (margin < 0) & ~found
        best[first], found = x[first], found | first
    return best, found
