"""The largest certified number of changes, where p = 0: whole numbers, doubled until one fails, then bisected."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import MarginProblem

ALPHA_ROUNDS = 3  # of slopes that are tuned one change beyond what is certified


class Counts:
    """What is known of some samples: the largest number that was certified, and the least that was not.

    Attributes:
        low, high, margin, evaluations: (m,), as in ``Bracket``.
    """

    def __init__(self, problem: MarginProblem, rows: Tensor, dtype: torch.dtype, most: float):
        self.problem, self.rows, self.dtype = problem, rows, dtype
        self.slack, clean = problem.slack(dtype, rows), problem.clean_margins(dtype, rows)
        self.margin = (clean - self.slack).amin(dim=1)
        self.low = torch.zeros_like(self.margin)
        self.high = torch.full_like(self.low, torch.inf).masked_fill(~(self.margin > 0), 0.0)
        self.evaluations = torch.zeros_like(self.low, dtype=torch.long)
        self.most = torch.minimum(changes(problem, rows).to(self.low), torch.full_like(self.low, most).floor())

    def search(self, first: float = 1.0) -> None:
        """Narrow every bracket until its ends are neighbours, beginning at ``first`` where nothing has failed yet."""
        step = torch.full_like(self.low, max(1.0, first))
        while len(left := (self.high - self.low > 1).logical_and(self.low < self.most).nonzero().squeeze(-1)):
            low, high = self.low[left], self.high[left]
            beyond = torch.minimum(low + step[left], self.most[left])
            middle = torch.where(high.isinf(), beyond, (0.5 * (low + high)).floor())
            self.see(left, middle)
            step[left] *= 2.0

    def see(self, left: Tensor, counts: Tensor) -> Tensor:
        """Bound some samples at counts, (m,), above ``low``; which of them are certified there."""
        margins = self.problem.margins(counts, self.dtype, self.rows[left])
        worst = (margins - self.slack[left]).amin(dim=1)
        passed = worst > 0
        self.low[left] = torch.where(passed, counts, self.low[left])
        self.margin[left] = torch.where(passed, worst, self.margin[left])
        self.high[left] = torch.where(passed, self.high[left], counts)
        self.evaluations[left] += 1
        return passed


def changes(problem: MarginProblem, rows: Tensor) -> Tensor:
    """How many values, or groups of these, of one ball may change at all, (m,)."""
    threat, x = problem.threat.part(rows), problem.x[rows]
    moved = threat.frames[..., None].expand(x.shape)
    if threat.scales is not None:
        moved = moved & (threat.scales > 0)
    whole = threat.ball == "sequence"
    if threat.together is None:
        counts = moved.sum(dim=2)
    else:
        numbers = threat.together
        one = numbers.flatten().unique(return_inverse=True)[1].reshape(numbers.shape)
        if whole:
            one, moved = one.reshape(1, -1), moved.flatten(1)[:, None]
        hit = torch.zeros(*moved.shape[:2], int(one.max()) + 1, device=x.device)
        hit.scatter_add_(2, one.expand(moved.shape), moved.to(hit))
        counts = (hit > 0).sum(dim=2)
    return counts.sum(dim=1) if whole else counts.amax(dim=1)


def search_counts(
    problem: MarginProblem, rows: Tensor, dtype: torch.dtype, most: float, first: float, tuning: torch.dtype
) -> tuple[Counts, Tensor]:
    """The largest certified numbers of changes of some samples, and what planes certify before slopes are tuned.

    Args:
        most: no larger number is tried.
        first: the number that is tried first.
        tuning: precision in which slopes are tuned.
    """
    problem.slopes = None
    found = Counts(problem, rows, dtype, most)
    found.search(first)
    if not problem.method.tuned:
        return found, torch.full_like(found.low, torch.nan)
    start = found.low.clone()
    for _ in range(ALPHA_ROUNDS):
        open_ = ((found.margin > 0) & (found.low < found.most)).nonzero().squeeze(-1)
        if not len(open_):
            break
        aim = found.low[open_] + 1.0
        problem.tune(aim, tuning, problem.method.alpha_steps, rows[open_])
        before = found.low.clone()
        again = open_[found.see(open_, aim)]
        found.high[again] = torch.inf  # what failed before may be certified now
        found.search()
        if not bool((found.low > before).any()):
            break
    return found, start
