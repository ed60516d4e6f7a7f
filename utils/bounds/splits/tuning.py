"""Slopes and multipliers of parts, tuned by gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...clock import Pace
from ...graph.nonlinear import NonLinear
from ...relaxation.lines import pieces_of
from ..alpha import KINKED_PACE, SlopeTable, default_slopes, keep_better, nonlinear_nodes, shifted, slope_ranges
from .cut_pass import CutPass, knot_of
from .cuts import Cuts

SLOPE_STEP, MULTIPLIER_STEP = 0.02, 0.1  # first steps of Adam; slopes in units of their range, see ``alpha``
FADING = 0.97  # of both, after every step; more slowly where there are more than ``FEW`` of them
FEW = 40
LEAD = 0.1  # by which a linear part's bound is to be above what is asked for, as a share of what it lacks


def tune_parts(
    make: Callable[[Cuts, SlopeTable | None], CutPass],
    rows: Tensor,
    cuts: Cuts,
    slopes: SlopeTable | None,
    steps: int,
    enough: Tensor,
    pace: Pace | None = None,
) -> tuple[Cuts, SlopeTable, Tensor]:
    """Ascend the lower bounds of parts in their slopes and multipliers; both are kept where they were best.

    Args:
        make: gives the pass over the parts with these multipliers and slopes.
        rows: (parts, 1, classes), the row that is bounded in each part.
        cuts, slopes: to start from; None for the default slopes.
        steps: gradient steps.
        enough: (parts,): bounds that need not be raised. Tuning ends when no part needs it.
        pace: of gradient steps; none is begun that would end after its deadline.

    Returns:
        The cuts with the best multipliers, the best slopes and their bounds, (parts,): estimates.
    """
    with torch.no_grad():
        first = make(cuts, slopes)
        best = first.margin(rows).squeeze(1)
        origin, nodes = default_slopes(first), nonlinear_nodes(first.graph)
        ranges = [entry and _ranges(first, node) for node, entry in zip(nodes, origin, strict=True)]
    shifts = [entry and tuple(tuple(torch.zeros_like(s) for s in plane) for plane in entry) for entry in origin]
    moving = [entry if knot_of(node) is None else entry[:1] for node, entry in zip(nodes, shifts, strict=True) if entry]
    leaves = [shift.requires_grad_() for planes in moving for plane in planes for shift in plane]
    multiplier = cuts.multiplier.clone().requires_grad_()
    groups = [{"params": leaves, "lr": SLOPE_STEP}, {"params": [multiplier], "lr": MULTIPLIER_STEP}]
    groups = [group for group in groups if any(leaf.numel() for leaf in group["params"])]
    if not groups:
        return cuts, origin, best
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    kept, table, pace = cuts, origin, pace or Pace()
    for _ in range(steps):
        if bool((best > enough).all()) or not pace.allows():
            break
        with pace.work(), torch.enable_grad():
            moved, now = shifted(origin, ranges, shifts), cuts.with_multiplier(multiplier)
            passed = make(now, moved)
            bound = passed.lower_bound(passed.graph.output, rows).squeeze(1)
            optimizer.zero_grad()
            (-bound.sum()).backward()
        with torch.no_grad():
            better = bound > best
            kept = kept.with_multiplier(torch.where(better[:, None], multiplier.detach(), kept.multiplier))
            table, best = keep_better(table, best, moved, bound)
            optimizer.step()
            multiplier.clamp_(min=0.0)
            for group in optimizer.param_groups:
                group["lr"] *= FADING ** min(1.0, FEW / steps)
    return kept, table, best


def raise_linear(
    make: Callable[[Cuts, None], CutPass], rows: Tensor, cuts: Cuts, steps: int, enough: Tensor, pace: Pace
) -> Cuts:
    """Better multipliers of parts in which the network is linear: no slope matters there.

    The bound is a concave function of the multipliers, with the greatest value known that is asked for: so each step is
    as long as would reach it were the bound linear (Polyak, 1969).
    """
    multiplier, kept, best = cuts.multiplier, cuts, torch.full_like(enough, -torch.inf)
    for _ in range(steps):
        with pace.work(), torch.enable_grad():
            leaf = multiplier.detach().requires_grad_()
            passed = make(cuts.with_multiplier(leaf), None)
            bound = passed.lower_bound(passed.graph.output, rows).squeeze(1)
            slope = None
            if bound.requires_grad:
                (slope,) = torch.autograd.grad(bound.sum(), leaf, allow_unused=True)
        if slope is None:  # no cuts in any of the parts
            return cuts
        with torch.no_grad():
            bound, better = bound.detach(), bound > best
            best = torch.where(better, bound, best)
            kept = kept.with_multiplier(torch.where(better[:, None], multiplier, kept.multiplier))
            if bool((best > enough).all()) or not pace.allows():
                break
            aim = enough + LEAD * (enough - best).clamp(min=0.0) + LEAD * enough.abs()
            length = (aim - bound).clamp(min=0.0) / slope.square().sum(dim=1).clamp(min=torch.finfo(bound.dtype).tiny)
            multiplier = (multiplier + length[:, None] * slope).clamp(min=0.0)
    return kept


def _ranges(bounds: CutPass, node: NonLinear) -> list:
    """As ``slope_ranges``, of which lines above convex functions of two pieces need none."""
    if knot_of(node) is None:
        return slope_ranges(bounds, node)
    low, high = (torch.tensor(slope, device=bounds.cuts.neuron.device) for slope in pieces_of(node.name).slopes)
    return [((KINKED_PACE[0] * (high - low), low, high),), ((high, low, high),)]
