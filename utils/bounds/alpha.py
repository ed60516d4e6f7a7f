"""Optimised slopes: planes that are tuned by gradient for the margin of the sample at hand.

Any slopes are sound, so a few steps of gradient ascent on the certified margin can only help. What is moved is each
slope in units of the range that the derivative has on the operand's interval: a natural scale, in which one step size
fits all neurons, narrow or wide. One set of slopes a sample serves all the rows that are bounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..clock import Pace
from ..graph.graph import Graph
from ..graph.nonlinear import NonLinear
from ..perturbation.sets import Perturbation
from ..relaxation.lines import Relaxation
from .passes import BoundPass

STEP_SIZE = 0.02  # first step of a slope, in units of its range; measured against .005 ... .05
# Of the lower and upper lines of piecewise-linear functions, over that step; measured for relu. Lower lines start at an
# end of their range, upper ones at a chord, from which every move costs at first.
KINKED_PACE = (10.0, 0.3)
STEP_BOUNDS = 3.0  # that a gradient step takes as long as, about
BALL_PACE = (10.0, 2.0)  # likewise where layers lie in balls, whose upper lines are seldom best as chords
UNEVEN = ("log1p",)  # whose slopes differ by orders of magnitude: they move in units of themselves
WARM_UP = 3  # steps over which it grows to that: all slopes move at once, and some should not

# Per non-linear node in graph order: slopes of its lower and of its upper plane, one tensor (batch, size) an operand.
# None for a node that needs no planes, being exact.
SlopeTable = list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None]


def select(table: SlopeTable, rows: Tensor, dtype: torch.dtype | None = None) -> SlopeTable:
    """The slopes of some samples, in a precision, or the one that they have."""
    return [
        entry and tuple(tuple(slope[rows].to(dtype or slope.dtype) for slope in plane) for plane in entry)
        for entry in table
    ]


def store(table: SlopeTable, rows: Tensor, new: SlopeTable, batch: int) -> None:
    """Write the slopes of some samples into the table of a whole batch."""
    for k, entry in enumerate(new):
        if entry is None:
            continue
        if table[k] is None:
            table[k] = tuple(tuple(slope.new_zeros(batch, slope.shape[1]) for slope in plane) for plane in entry)
        for plane, tuned in zip(table[k], entry, strict=True):
            for slope, values in zip(plane, tuned, strict=True):
                slope[rows] = values.to(slope)


def default_slopes(bounds: BoundPass) -> SlopeTable:
    """The slopes of a pass without tuned ones; None for nodes that needed no planes."""
    return [_slopes(bounds.known_relaxation(node)) for node in nonlinear_nodes(bounds.graph)]


def nonlinear_nodes(graph: Graph) -> list[NonLinear]:
    """Those that a slope table has entries of, in order."""
    return [node for node in graph.nodes if isinstance(node, NonLinear)]


def slopes_pay(graph: Graph) -> bool:
    """Whether tuned slopes may gain much, and soon: where a function has kinks, or no curved bounds."""
    functions = [node.curved for node in nonlinear_nodes(graph)]
    return any(curved is None or not curved.smooth for curved in functions)


def _slopes(relaxation: Relaxation | None):
    return relaxation and (relaxation.lower.slopes, relaxation.upper.slopes)


def slope_ranges(bounds: BoundPass, node: NonLinear) -> list[tuple[tuple[Tensor, Tensor, Tensor], ...]]:
    """For each plane and operand: the unit in which the slope moves, and the ends between which it stays."""
    ends = node.slope_ends(*(bounds.interval(operand) for operand in node.parents))
    if node.curved is not None and node.curved.smooth:
        return [tuple((high - low, low - torch.inf, high + torch.inf) for low, high in ends)] * 2
    if node.name in UNEVEN:
        lines = bounds.known_relaxation(node)
        return [
            tuple((slope, low, high) for slope, (low, high) in zip(line.slopes, ends, strict=True)) for line in lines
        ]
    paces = BALL_PACE if bounds.balls else KINKED_PACE
    return [tuple((pace * (high - low), low, high) for low, high in ends) for pace in paces]


def tune_slopes(
    graph: Graph,
    perturbation: Perturbation,
    rows: Tensor,
    steps: int,
    start: SlopeTable | None = None,
    pace: Pace | None = None,
    method: str = "crown",
) -> tuple[SlopeTable, Tensor]:
    """Ascend the worst margin of every sample in the slopes of all planes, those of intermediate bounds too.

    Args:
        perturbation: the set for which the slopes are tuned; they are sound for any other.
        rows: the spec matrix C, (batch, n_specs, classes).
        steps: gradient steps; each costs about ``STEP_BOUNDS`` bounds.
        start: slopes to start from where they are better than those of "crown". These change with the perturbation:
            slopes tuned for a larger one may be worse here.
        pace: of gradient steps; none is begun that would end after its deadline.
        method: of the pass, a name of ``passes.METHODS``.

    Returns:
        The best slopes that were met and their worst margins, (batch,).
    """
    pace = pace or Pace()
    with torch.no_grad():
        with pace.work(1.0 / STEP_BOUNDS):
            first = BoundPass(graph, perturbation, method, sound=False)
            best_margin = first.margin(rows).amin(dim=1)
        origin = default_slopes(first)
        if start is not None:
            started = BoundPass(graph, perturbation, method, start, sound=False).margin(rows).amin(dim=1)
            origin, best_margin = keep_better(origin, best_margin, start, started)
        nodes = nonlinear_nodes(graph)
        ranges = [entry and slope_ranges(first, node) for node, entry in zip(nodes, origin, strict=True)]
    shifts = [entry and tuple(tuple(torch.zeros_like(s) for s in plane) for plane in entry) for entry in origin]
    leaves = [shift.requires_grad_() for entry in shifts if entry for plane in entry for shift in plane]
    if not leaves:
        return origin, best_margin
    optimizer = torch.optim.Adam(leaves, lr=STEP_SIZE, betas=(0.9, 0.99))
    best = origin
    for step in range(steps + 1):
        if not pace.allows():
            break
        with pace.work(), torch.enable_grad():
            slopes = shifted(origin, ranges, shifts)
            margin = BoundPass(graph, perturbation, method, slopes, sound=False).margin(rows).amin(dim=1)
            loss = -margin.sum()
            best, best_margin = keep_better(best, best_margin, slopes, margin)
            if step < steps:
                for group in optimizer.param_groups:
                    group["lr"] = STEP_SIZE * min(1.0, (step + 1) / WARM_UP) * _cosine(step / steps)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return best, best_margin


def _cosine(progress: float) -> float:
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress))


def shifted(origin: SlopeTable, ranges: list, shifts: list) -> SlopeTable:
    """Slopes moved by shifts, by node, plane and operand each, in the units and between ends of ``slope_ranges``."""
    return [
        entry
        and tuple(
            tuple(
                torch.minimum(torch.maximum(slope + unit * shift, low), high)
                for slope, (unit, low, high), shift in zip(plane, ranges, moved, strict=True)
            )
            for plane, ranges, moved in zip(entry, reaches, moves, strict=True)
        )
        for entry, reaches, moves in zip(origin, ranges, shifts, strict=True)
    ]


def keep_better(best: SlopeTable, best_margin: Tensor, slopes: SlopeTable, margin: Tensor) -> tuple[SlopeTable, Tensor]:
    """The slopes of each sample that have the greater margin, (batch,), and this; without gradients."""
    better = (margin > best_margin).detach()
    kept = [
        entry
        and tuple(
            tuple(torch.where(better[:, None], n.detach(), o) for n, o in zip(new, old, strict=True))
            for new, old in zip(tuned, entry, strict=True)
        )
        for entry, tuned in zip(best, slopes, strict=True)
    ]
    return kept, torch.maximum(best_margin, margin.detach())
