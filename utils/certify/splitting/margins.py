"""Margins of a problem's only sample by a search over parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ...perturbation.sets import Perturbation
from ..problem import MarginProblem
from .question import TUNING, SplitQuestion, few_change_sides, has_pieces
from .search import split_rows


def can_split(problem: MarginProblem, eps: Tensor) -> bool:
    """Whether a problem's first sample has neurons that are worth splitting at eps, (1,) or (1, T).

    Of a recurrent network few may be open there, and the bounds of parts must be made for the set.
    """
    if problem.threat.norm == 0.0 or problem.threat.lengths is not None:
        return False
    planes, one = problem.by("alpha"), torch.zeros(1, dtype=torch.long, device=eps.device)
    graph = planes.graph(TUNING, one)
    if not has_pieces(graph):
        return False
    return not graph.recurrent or few_change_sides(planes.bounds(eps[:1].to(TUNING), one, TUNING))


@torch.no_grad()
def split_margins(problem: MarginProblem, eps: Tensor, margins: Tensor, enough: Tensor, deadline: float) -> Tensor:
    """Margins of a problem's only sample at eps, raised until all are above ``enough`` or time is up.

    Args:
        problem: of one sample; by method "alpha", with slopes tuned or none.
        eps: (1,) or (1, T), in the precision of the bounds.
        margins: lower bounds that are known, (n_specs,).
        enough, deadline: as for ``split_rows``.

    Returns:
        Lower bounds, (n_specs,).
    """
    offsets = problem.question.offsets
    offset = torch.zeros_like(margins) if offsets is None else offsets[0].to(margins)
    return split_rows(question_of(problem, eps), margins - offset, enough - offset, deadline) + offset


def question_of(problem: MarginProblem, eps: Tensor) -> SplitQuestion:
    """All rows of a problem's only sample over its set at eps."""
    dtype, one = eps.dtype, torch.zeros(1, dtype=torch.long, device=eps.device)

    def set_of(parts: int, kind: torch.dtype) -> Perturbation:
        same = one.expand(parts)
        return problem._perturbation(eps[same].to(kind), same, kind)

    whole = problem.bounds(eps, one, dtype)
    return SplitQuestion(problem.rows[0].to(dtype), whole, lambda kind: problem.graph(kind, one), set_of)
