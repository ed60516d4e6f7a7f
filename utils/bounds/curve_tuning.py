"""Slopes and curvatures of curved bounds tuned to a sample: gradient ascent on its worst margin, by estimates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..clock import Pace
from ..graph.graph import Graph
from ..perturbation.sets import Perturbation
from ..relaxation.curves import Curves
from .curve import CurvedPass, CurveTable, PassGuesses

STEP_SIZES = (0.06, 0.4)  # of slopes in units of their range, and of log curvatures; measured
BETAS = (0.5, 0.9)  # Adam's: with less memory of gradients than is usual a third of the steps do; measured
WARM_UP = 3
CURVED_STEP = 4.0  # bounds by planes that a gradient step takes as long as at least, until one is measured
VERDICT_STEPS = 6.0  # that a bound without estimates may take as long as, in double precision; 3 to 5 were measured


@torch.no_grad()
def tune_curves(
    graph: Graph,
    perturbation: Perturbation,
    rows: Tensor,
    steps: int,
    start: CurveTable | None = None,
    aim: float = math.inf,
    pace: Pace | None = None,
    guesses: PassGuesses | None = None,
) -> CurveTable:
    """Ascend every sample's worst margin, by estimates, in the slopes and curvatures of all nodes.

    Args:
        perturbation: the set for which they are tuned; they are sound for any other.
        rows: the spec matrix C, (batch, n_specs, classes).
        steps: gradient steps.
        start: curves to start from; ``START``'s if left out.
        aim: no more steps are taken once every sample's worst margin is certified to be above it,
        pace: of gradient steps; none is begun that would leave no time, ``VERDICT_STEPS``, to bound what they gain. If
            there is none from the start, that is for the caller to notice.
        guesses: what earlier passes over the same graph and samples found, for estimates.

    Returns:
        The best curves that were met, by estimates.
    """
    pace, guesses = pace or Pace(), {} if guesses is None else guesses
    with pace.work(_pieces(guesses)):
        first = CurvedPass(graph, perturbation, start, sound=False, guesses=guesses)
        estimates = first.margin(rows).amin(dim=1)
    origin, ranges = first.curves(), first.ranges()
    moves = [curves and _map(lambda t: torch.zeros_like(t).requires_grad_(), curves) for curves in origin]
    slopes = [t for move in moves if move for ts in move[:2] for t in ts]
    if not slopes:
        return origin
    bends = [t for move in moves if move for ts in move[2:] for t in ts]
    groups = [{"params": group, "lr": size} for group, size in zip((slopes, bends), STEP_SIZES, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    best, excess = origin, torch.zeros_like(estimates)
    for step in range(steps + 1):
        if not pace.allows(1.0 + VERDICT_STEPS):
            break
        if bool((estimates - excess > aim).all()):
            certified = CurvedPass(graph, perturbation, best).margin(rows).amin(dim=1)
            if bool((certified > aim).all()):
                break
            excess = estimates - certified
        with pace.work(_pieces(guesses)), torch.enable_grad():
            curves = [_moved(*parts) for parts in zip(origin, moves, ranges, strict=True)]
            margin = CurvedPass(graph, perturbation, curves, False, guesses).margin(rows).amin(dim=1)
            # A sample's scale of margins does not matter to Adam, but a few huge ones would to the sum.
            loss = -(margin / (1.0 + margin.detach().abs())).nan_to_num(0.0).sum()
            best, estimates = _keep_better(best, estimates, curves, margin.detach())
            if step < steps:
                rate = min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.475 * (1.0 + math.cos(math.pi * step / steps)))
                for group, size in zip(optimizer.param_groups, STEP_SIZES, strict=True):
                    group["lr"] = size * rate
                optimizer.zero_grad()
                loss.backward()
                for move in (*slopes, *bends):
                    move.grad.nan_to_num_(0.0, 0.0, 0.0)  # of bounds that overflow
                optimizer.step()
    return best


def _pieces(guesses: PassGuesses) -> float:
    """How many gradient steps the next pass takes as long as: several where it measures what estimates leave out."""
    return VERDICT_STEPS if not guesses or any(one.due for one in guesses.values()) else 1.0


def _map(function, *tables: Curves) -> Curves:
    """A function of corresponding tensors of several curves."""
    return Curves(
        *(tuple(function(*tensors) for tensors in zip(*parts, strict=True)) for parts in zip(*tables, strict=True))
    )


def _moved(origin: Curves | None, move: Curves | None, ranges: tuple[Tensor, ...] | None) -> Curves | None:
    """Slopes moved by shares of their ranges, curvatures by factors."""
    if origin is None:
        return None
    lower, upper = (
        tuple(slope + reach * shift for slope, shift, reach in zip(slopes, shifts, ranges, strict=True))
        for slopes, shifts in zip(origin[:2], move[:2], strict=True)
    )
    bends = (
        tuple(bend * shift.exp() for bend, shift in zip(bends, shifts, strict=True))
        for bends, shifts in zip(origin[2:], move[2:], strict=True)
    )
    return Curves(lower, upper, *bends)


def _keep_better(
    best: CurveTable, best_margin: Tensor, curves: CurveTable, margin: Tensor
) -> tuple[CurveTable, Tensor]:
    better = margin > best_margin
    kept = [
        old and _map(lambda o, n: torch.where(better[:, None], n.detach(), o), old, new)
        for old, new in zip(best, curves, strict=True)
    ]
    return kept, torch.where(better, margin, best_margin)
