"""Radii by integrated gradients: sweeps over shells in place of a search, see ``utils.jacobian.shells``.

Bounds of the margin over growing balls come from one sweep, so the radius is where they end: inside the first shell in
which the margin may vanish, at e_{k-1} + B(e_{k-1}) / L(e_k) with the shell's slope L. Sweeps with few shells in the
search's precision find out where that is; the last one, in the verdict's precision, has its shells there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..jacobian.shells import Shells, margins_at, shells_of
from .problem import MarginProblem
from .search import Bracket

SCOUT_SHARES = (0.003, 0.006, 0.012, 0.025, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
GRADING = 0.75  # the power by which shells of the last sweep are denser at its end
ROOM = 1.06  # how far the last sweep goes beyond what the sweep before it reached
NEARLY = 1.0 - 1e-6
AT_ONCE = 64  # samples and shells in one pass


class Precision(Protocol):
    """How radii are searched: precisions of the search and of the verdict, and the largest eps to try."""

    search_dtype: torch.dtype
    dtype: torch.dtype
    max_eps: float


def sweep_radii(problem: MarginProblem, rows: Tensor, search: Precision) -> Bracket:
    """Radii of some samples of a problem, (m,), by its method "jacobian" or "shell"."""
    coarse = torch.tensor(SCOUT_SHARES, dtype=search.search_dtype, device=problem.x.device)
    limit = problem.linear_radius(search.search_dtype, rows).clamp(max=search.max_eps)
    scouted = _sweep(problem, rows, limit, coarse, search.search_dtype, sound=False)
    limit = scouted.high.to(search.search_dtype).clamp(max=search.max_eps)
    limit = torch.where(limit.isfinite() & (limit > 0), limit, search.max_eps)
    even = torch.arange(1, len(coarse) + 1, device=coarse.device).to(coarse) / len(coarse)
    nearer = _sweep(problem, rows, limit, even, search.search_dtype, sound=False)
    limit = (ROOM * nearer.low).to(search.dtype)
    limit = torch.where(limit > 0, limit, scouted.high.to(limit)).clamp(max=search.max_eps)
    shells = problem.method.shells
    count = torch.arange(1, shells + 1, device=coarse.device, dtype=search.dtype)
    found = _sweep(problem, rows, limit, (count / shells) ** GRADING, search.dtype)
    found.evaluations += 2 * len(coarse)
    return found


def direct_problem(problem: MarginProblem) -> MarginProblem:
    """The problem with the method that bounds the layers in place of gradients."""
    return MarginProblem(problem.question, replace(problem.method, name=problem.method.layers))


def _sweep(
    problem: MarginProblem, rows: Tensor, limit: Tensor, shares: Tensor, dtype: torch.dtype, sound: bool = True
) -> Bracket:
    """Bounds at shares of each sample's limit, (m,), and where they end."""
    size = max(1, AT_ONCE // (len(shares) * problem.rows.shape[1]))
    parts = [
        _sweep_part(problem, part, end.to(dtype), shares, dtype, sound)
        for part, end in zip(rows.split(size), limit.split(size), strict=True)
    ]
    return Bracket(*(torch.cat([getattr(part, name) for part in parts]) for name in Bracket.__annotations__))


def _sweep_part(problem, rows: Tensor, limit: Tensor, shares: Tensor, dtype: torch.dtype, sound: bool) -> Bracket:
    method, graph = problem.method, problem.graph(dtype, rows)
    largest = problem.threat.part(rows).around(problem.x[rows].to(dtype), limit)
    specs = problem.rows[rows].to(dtype)
    how = {"chain": method.chain, "layers": method.layers, "direct": method.name == "shell"}
    shells = shells_of(graph, largest, specs, shares, sound=sound, **how)
    start = margins_at(graph, largest, specs, sound) - problem.slack(dtype, rows)
    reached = _end(shells, start)
    radius = torch.where((start > 0).all(dim=1), reached.amin(dim=1), 0.0)
    failed = torch.where(radius < 1.0, _next_share(shares, radius), torch.inf)
    margin = torch.where(radius > 0, 0.0, start.amin(dim=1))
    evaluations = torch.full_like(rows, len(shares))
    return Bracket(radius * limit, torch.where(start.amin(dim=1) > 0, failed * limit, 0.0), margin, evaluations)


def _end(shells: Shells, start: Tensor) -> Tensor:
    """The share up to which each row's bound is positive, (batch, n_rows)."""
    bounds = shells.bounds(start)
    inner = torch.cat((torch.zeros_like(shells.shares[:1]), shells.shares[:-1]))
    before = torch.cat((start[:, None], bounds[:, :-1]), dim=1)
    slopes = shells.falls / shells.shares[:, None]
    ends = torch.minimum(inner[:, None] + NEARLY * before / slopes, shells.shares[:, None].expand_as(slopes))
    passed = (bounds > 0).long().cumprod(dim=1).sum(dim=1)  # shells before the first in which the margin may vanish
    last = passed.clamp(max=bounds.shape[1] - 1)[:, None]
    return torch.where(passed == bounds.shape[1], shells.shares[-1], ends.gather(1, last).squeeze(1).clamp(min=0.0))


def _next_share(shares: Tensor, radius: Tensor) -> Tensor:
    """The first share above each radius, (m,)."""
    return shares[torch.searchsorted(shares, radius, right=True).clamp(max=len(shares) - 1)]
