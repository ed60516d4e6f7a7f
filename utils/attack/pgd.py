"""Attacks by projected gradient descent (PGD): perturbed inputs that break a classification, as small as possible.

What an attack finds is an upper bound of the minimum distortion, as a certificate is a lower one. Verdicts are made in
float64 on the perturbed input itself: an attack counts if the margin there is below 0 and the input lies in the set.

Own code, because the usual attack libraries are made for images: one ball around the whole input, without frames that
are exact or have balls of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..clock import Pace
from ..graph.graph import Graph
from ..network.state import plain_state
from .changes import fewest_changes, least_margins
from .problem import VERDICT, AttackProblem, AttackResult, RadiusAttackResult, is_inside, margin_and_gradient

# Perturbations end this share inside their ball, so that the rounding of x + delta does not take them out of it.
INSIDE = 1e-9
FIRST_STEP, LAST_STEP = 2.0, 0.03  # step sizes, as shares of eps
MAX_GROWTHS = 12  # doublings of eps without success after which a sample counts as unbroken


def descend(
    problem: AttackProblem, chosen: Tensor, eps: Tensor, start: Tensor, steps: int, deadline: float = math.inf
) -> tuple[Tensor, Tensor]:
    """PGD for the chosen samples from perturbations (m, n_specs, restarts, T, n); eps is (m, groups).

    Row i of the second dimension decreases the i-th margin. Step sizes fall geometrically. No step is begun that would
    end after the deadline, by ``utils.clock``.

    Returns:
        The perturbation with the least worst margin that any row met, (m, T, n), and that margin, (m,).
    """
    balls = problem.balls.select(chosen, start.dtype)
    eps = eps.to(start.dtype)
    x = balls.x[:, None, None]
    delta = balls.project(start, eps)
    best_delta, best = delta, torch.full_like(delta[..., 0, 0], torch.inf)
    pace = Pace(deadline)
    for step in range(steps + 1):
        with pace.work():
            margins, gradient = margin_and_gradient(problem, x + delta, chosen)
            worst = margins.amin(dim=-1)
            best_delta = torch.where((worst < best)[..., None, None], delta, best_delta)
            best = torch.minimum(best, worst)
            rate = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (step / max(steps, 1))
            delta = balls.project(delta + balls.scaled(balls.steepest(-gradient, delta), rate * eps), eps)
        if not pace.allows():
            break
    best, index = best.flatten(1).min(dim=1)
    rows = torch.arange(len(index), device=index.device)
    return best_delta.flatten(1, 2)[rows, index], best


def settle(problem: AttackProblem, chosen: Tensor, eps: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Perturbed inputs (m, T, n) that lie in the set, and their worst margins (m,), both in float64.

    What rounding takes out of the set (x' - x is measured anew) gives way to x itself.
    """
    balls = problem.balls.select(chosen, VERDICT)
    eps = eps.to(VERDICT)
    x = balls.x + balls.project(delta.to(VERDICT), eps * (1.0 - INSIDE))
    inside = is_inside(balls, x, eps)
    x = torch.where(inside[:, None, None], x, balls.x)
    return x, problem.worst_margin(x, chosen)


@plain_state()
def pgd(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    steps: int = 50,
    restarts: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
    deadline: float = math.inf,
    **threat: Any,
) -> AttackResult:
    """The least margins that PGD finds at eps.

    Args:
        model, x, labels: as for ``utils.certify.certified_margin``.
        eps: radius in the units of x: a number, (batch,), or (batch, T) for one radius a frame.
        steps: gradient steps of each restart.
        restarts: random starts for each target, beside the unperturbed input; half of them on the boundary.
        seed: of the random starts, which all samples share, so that a sample's result does not depend on the others.
        dtype: precision of the descent; verdicts are made in float64.
        batch_size: samples attacked at once.
        deadline: of ``utils.clock``; no step is begun that would end after it.
        threat: norm, targets, frames, clip and ball, as for ``AttackProblem``.
    """
    problem = AttackProblem(model, x, labels, **threat)
    eps = problem.balls.per_group(problem.question.eps(eps, VERDICT))
    how = {"steps": steps, "restarts": restarts, "seed": seed, "deadline": deadline}
    if problem.counts:
        samples = torch.arange(len(eps), device=eps.device).split(batch_size)
        found = [least_margins(problem, part, eps[part], dtype, **how) for part in samples]
        return AttackResult(*(torch.cat(part) for part in zip(*found, strict=True)))
    starts = _starts(problem, restarts, seed, dtype)
    parts = []
    for chosen in torch.arange(len(eps), device=eps.device).split(batch_size):
        first = _scaled(problem, chosen, eps[chosen], starts)
        delta, _ = descend(problem, chosen, eps[chosen], first, steps, deadline)
        parts.append(settle(problem, chosen, eps[chosen], delta))
    perturbed, margin = (torch.cat(part) for part in zip(*parts, strict=True))
    return AttackResult(perturbed, margin)


def _starts(problem: AttackProblem, restarts: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Perturbations of eps = 1, (1, 1, 1 + restarts, T, n); the first is none."""
    random = problem.balls.random_starts(restarts, torch.Generator().manual_seed(seed))
    return torch.cat((torch.zeros_like(random[:, :1]), random), dim=1)[:, None].to(dtype)


def _scaled(problem: AttackProblem, chosen: Tensor, eps: Tensor, starts: Tensor) -> Tensor:
    """Starts scaled to the samples' eps, for every margin row: (m, n_specs, starts, T, n)."""
    balls = problem.balls.select(chosen, starts.dtype)
    return balls.scaled(starts, eps.to(starts.dtype)).expand(-1, problem.rows.shape[1], -1, -1, -1)


@torch.no_grad()
def tighten(problem: AttackProblem, chosen: Tensor, x: Tensor, halvings: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Smaller perturbations from successful ones: inputs (m, T, n), margins and sizes (m,), all float64.

    Two paths from x' to the unperturbed input are bisected between success and failure: the straight line, and
    the projection to smaller and smaller balls, which leaves alone the frames that are not at the boundary.
    """
    balls = problem.balls.select(chosen, VERDICT)
    delta, size = x - balls.x, balls.size(x - balls.x)
    low, high = size.new_zeros(len(size), 2), size.new_ones(len(size), 2)

    def at(share: Tensor) -> Tensor:
        eps = (share[:, 1] * size)[:, None].expand(-1, balls.groups)
        paths = (share[:, 0, None, None] * delta, balls.project(delta, eps))
        return balls.x[:, None] + torch.where(share[..., None, None] == 1, delta[:, None], torch.stack(paths, dim=1))

    for _ in range(halvings):
        middle = 0.5 * (low + high)
        success = problem.worst_margin(at(middle), chosen) < 0
        low, high = torch.where(success, low, middle), torch.where(success, middle, high)
    candidates = at(high)
    sizes = balls.size(candidates - balls.x[:, None])
    size, index = sizes.min(dim=1)
    smallest = candidates[torch.arange(len(index), device=index.device), index]
    return smallest, problem.worst_margin(smallest, chosen), size


@plain_state()
def attack_radius(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    *,
    tol: float = 1e-2,
    steps: int = 50,
    restarts: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
    **threat: Any,
) -> RadiusAttackResult:
    """The smallest perturbation per sample that PGD finds to break it: an upper bound of the minimum distortion.

    Arguments as for ``pgd``, and:

    Args:
        tol: a sample is finished when an attack failed at an eps this relative distance below its radius.
    """
    if not 0 < tol < 1:
        raise ValueError(f"tol must be between 0 and 1, not {tol}")
    problem = AttackProblem(model, x, labels, **threat)
    starts = _starts(problem, restarts, seed, dtype)

    def attack(rows: Tensor, eps: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        per_group = problem.balls.select(rows, VERDICT).per_group(eps)
        random = _scaled(problem, rows, per_group, starts)
        known = (found - problem.balls.x[rows]).to(dtype)[:, None, None].expand_as(random[:, :, :1])
        delta, _ = descend(problem, rows, per_group, torch.cat((known, random), dim=2), steps)
        return settle(problem, rows, per_group, delta)

    with torch.no_grad():
        clean = problem.worst_margin(problem.balls.x)
    radius = torch.zeros_like(clean).masked_fill(clean > 0, torch.inf)
    result = RadiusAttackResult(problem.balls.x.clone(), clean, radius)
    if problem.counts:
        for rows in (clean > 0).nonzero().squeeze(-1).split(batch_size):
            fewest_changes(problem, rows, steps, restarts, seed, dtype, result)
        return result
    first = problem.linear_radius()
    for rows in (clean > 0).nonzero().squeeze(-1).split(batch_size):
        smallest_break(problem, rows, first[rows], attack, tol, result)
    return result


def smallest_break(
    problem: AttackProblem,
    rows: Tensor,
    first: Tensor,
    attack: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    tol: float,
    result: RadiusAttackResult,
) -> None:
    """Grow eps until ``attack`` succeeds, then bisect towards the eps where it fails; writes rows of ``result``.

    ``attack(rows, eps, found)`` gives inputs and margins; ``found`` are the smallest perturbed inputs so far. Every
    success is tightened and its own size is the new upper end, so the result is always a perturbation that was found.
    """
    failed = torch.zeros_like(first)
    eps = torch.where((first > 0) & first.isfinite(), first, 1.0)
    growths = torch.zeros_like(first)
    active = torch.arange(len(rows), device=rows.device)
    while active.numel():
        at = rows[active]
        x, margin = attack(at, eps[active], result.x[at])
        success = margin < 0
        if bool(success.any()):
            broken = at[success]
            x, margin, size = tighten(problem, broken, x[success])
            smaller = size < result.radius[broken]
            broken = broken[smaller]
            result.x[broken], result.margin[broken], result.radius[broken] = x[smaller], margin[smaller], size[smaller]
        failed[active] = torch.where(success, failed[active], eps[active])
        unbroken = result.radius[at].isinf()
        growths[active] += unbroken
        eps[active] = torch.where(unbroken, 2.0 * eps[active], 0.5 * (failed[active] + result.radius[at]))
        finished = torch.where(
            unbroken, growths[active] >= MAX_GROWTHS, result.radius[at] - failed[active] <= tol * result.radius[at]
        )
        active = active[~finished]
