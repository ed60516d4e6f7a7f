"""Radii by integrated gradients: sweeps over shells in place of a search, see ``utils.jacobian.shells``.

Bounds of the margin over growing balls come from one sweep, so the radius is where they end: inside the first shell in
which the margin may vanish (``Shells.ends``). Sweeps with few shells in the search's precision find out where that is;
the last one, in the verdict's precision, has its shells there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..jacobian.shells import margins_at, shells_of
from .problem import MarginProblem
from .search import Bracket

SCOUT_SHARES = (0.003, 0.006, 0.012, 0.025, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
GRADING = 0.75  # the power by which shells of the last sweep are denser at its end
SCOUTS = 10  # shells of the sweep before it
ROOM = 1.06  # how far the last sweep goes beyond what was reached before it
EXTENSIONS = 3  # how often it may go as far again, where its bounds do not end
GROWTH = 16.0  # of the scouts' limit, where their bounds do not end
AT_ONCE = 64  # samples and shells in one pass


class Precision(Protocol):
    """How radii are searched: precisions of the search and of the verdict, and the largest eps to try."""

    search_dtype: torch.dtype
    dtype: torch.dtype
    max_eps: float


def sweep_radii(problem: MarginProblem, rows: Tensor, search: Precision) -> Bracket:
    """Radii of some samples of a problem, (m,), by its method "jacobian" or "shell"."""
    scouted = _scout(problem, rows, search)
    even = torch.arange(1, SCOUTS + 1, device=problem.x.device, dtype=search.search_dtype) / SCOUTS
    limit = torch.where(scouted.high > 0, scouted.high, 1.0).clamp(max=search.max_eps)
    nearer = _sweep(problem, rows, limit, even, search.search_dtype, sound=False)
    count = torch.arange(1, problem.method.shells + 1, device=problem.x.device, dtype=search.dtype)
    shares = (count / problem.method.shells) ** GRADING
    limit = (ROOM * torch.maximum(scouted.low, nearer.low)).to(search.dtype)
    limit = torch.where(limit > 0, limit, scouted.high.to(limit)).clamp(max=search.max_eps)
    found = _sweep(problem, rows, limit, shares, search.dtype)
    found.evaluations += scouted.evaluations + len(even)
    for _ in range(EXTENSIONS):
        through = found.high.isinf() & (limit < search.max_eps)
        if not bool(through.any()):
            break
        limit = torch.where(through, (ROOM * limit).clamp(max=search.max_eps), limit)
        found.replace(through, _sweep(problem, rows[through], limit[through], shares, search.dtype))
    return found


def _scout(problem: MarginProblem, rows: Tensor, search: Precision) -> Bracket:
    """Roughly where bounds end: from the radius of the linearisation on, farther where they do not end within it."""
    shares = torch.tensor(SCOUT_SHARES, dtype=search.search_dtype, device=problem.x.device)
    limit = problem.linear_radius(search.search_dtype, rows).clamp(max=search.max_eps)
    found = _sweep(problem, rows, limit, shares, search.search_dtype, sound=False)
    while bool((beyond := found.high.isinf() & (limit < search.max_eps)).any()):
        limit = torch.where(beyond, (GROWTH * limit).clamp(max=search.max_eps), limit)
        again = _sweep(problem, rows[beyond], limit[beyond], shares, search.search_dtype, sound=False)
        found.replace(beyond, again)
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
    largest = problem.threat.part(rows).around(problem.x[rows].to(dtype), limit).uncut
    specs = problem.rows[rows].to(dtype)
    how = {"chain": method.chain, "layers": method.layers, "direct": method.name == "shell"}
    shells = shells_of(graph, largest, specs, shares, sound=sound, **how)
    start = margins_at(graph, largest, specs, sound) - problem.slack(dtype, rows)
    radius = torch.where((start > 0).all(dim=1), shells.ends(start).amin(dim=1), 0.0)
    failed = torch.where(radius < 1.0, _next_share(shares, radius), torch.inf)
    margin = torch.where(radius > 0, 0.0, start.amin(dim=1))
    evaluations = torch.full_like(rows, len(shares))
    return Bracket(radius * limit, torch.where(start.amin(dim=1) > 0, failed * limit, 0.0), margin, evaluations)


def _next_share(shares: Tensor, radius: Tensor) -> Tensor:
    """The first share above each radius, (m,)."""
    return shares[torch.searchsorted(shares, radius, right=True).clamp(max=len(shares) - 1)]
