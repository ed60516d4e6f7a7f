"""The attack for p = 0: values, or groups of them, are chosen one by one, then all that are chosen move.

*Greedy.* In every ball, again and again the unit (``perturbation.changes``) that gains most by the gradient where the
attack stands, if it goes to the better end of the range, until as many have changed as may. *Ascent.* The chosen units
follow the sign of the gradient, in steps that fall from the whole range on; where a unit outside gains more than one
that is chosen, they change places. Restarts see gains that are multiplied by random numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..clock import Pace
from ..perturbation.changes import Changes
from .problem import VERDICT, AttackProblem, RadiusAttackResult, is_inside, margin_and_gradient

LAST_STEP = 0.03  # of the ascent, as a share of the range; the first is all of it
SMALLEST_SHARE = 0.3  # that random numbers leave of a gain
MOST_CHANGES = 100  # after which a sample counts as unbroken


class _Path:
    """Where the attack stands for every margin of some samples, and the best that it met.

    Perturbations are (m, n_specs, restarts, T, n); row i of the second dimension decreases the i-th margin.
    """

    def __init__(self, problem: AttackProblem, chosen: Tensor, restarts: int, seed: int, dtype: torch.dtype):
        self.problem, self.chosen = problem, chosen
        self.balls: Changes = problem.balls.select(chosen, dtype)
        x, specs = self.balls.x, problem.rows.shape[1]
        self.delta = x.new_zeros(len(x), specs, 1 + restarts, *x.shape[1:])
        self.best, self.best_delta = x.new_full((len(x),), torch.inf), torch.zeros_like(x)
        generator = torch.Generator().manual_seed(seed)
        units = self.balls.of_units(torch.ones_like(x[:1])).shape[1:]
        self.luck = torch.rand(1, 1, 1 + restarts, *units, generator=generator, dtype=torch.float64).to(x)
        self.luck = SMALLEST_SHARE + (1.0 - SMALLEST_SHARE) * self.luck
        self.luck[:, :, 0] = 1.0

    def look(self) -> Tensor:
        """The gradient where it stands; the best point is kept."""
        x = self.balls.x[:, None, None] + self.delta
        margins, gradient = margin_and_gradient(self.problem, x, self.chosen)
        worst, index = margins.amin(dim=-1).flatten(1).min(dim=1)
        better = worst < self.best
        points = self.delta.flatten(1, 2)[torch.arange(len(index), device=index.device), index]
        self.best = torch.where(better, worst, self.best)
        self.best_delta = torch.where(better[:, None, None], points, self.best_delta)
        return gradient

    def add(self, counts: Tensor) -> None:
        """In every ball whose number of changes is below ``counts``, (m, groups), one unit more goes to its ends."""
        balls, gradient = self.balls, self.look()
        ends, gains = balls.best_ends(gradient, self.delta)
        changed = balls.of_units((self.delta != 0).to(self.delta)) > 0
        gains = balls.of_units(gains) * self.luck
        room = changed.sum(dim=-1) < counts[:, None, None]
        best = balls.largest(gains.masked_fill(changed, -1.0), room.long())
        self.delta = torch.where(balls.of_elements(best & ~changed), ends, self.delta)

    def move(self, counts: Tensor, share: float) -> None:
        """The chosen units follow the gradient; units with the largest gains, of those and all others, are chosen."""
        balls, gradient = self.balls, self.look()
        width = balls.clip[1] - balls.clip[0]
        moved = balls.clip_range(self.delta - share * width * gradient.sign())
        ends, gains = balls.best_ends(gradient, self.delta)
        changed = self.delta != 0
        moved = torch.where(changed, moved, ends)
        # What a chosen unit has taken off, and may yet, against what another one may.
        worth = balls.of_units(torch.where(changed, (-gradient * self.delta).clamp(min=0.0), 0.0) + gains)
        kept = balls.largest(worth * self.luck, counts[:, None, None].expand(worth.shape[:-1]))
        self.delta = torch.where(balls.of_elements(kept) & balls._between(balls.may_move(), moved), moved, 0.0)


def _counts_of(problem: AttackProblem, eps: Tensor, balls: Changes) -> Tensor:
    """How many units of each ball may change, (m, groups), no more than there are."""
    return torch.minimum(eps, balls.sizes(balls.may_move().expand(balls.x.shape).to(balls.x))).floor()


def least_margins(
    problem: AttackProblem,
    chosen: Tensor,
    eps: Tensor,
    dtype: torch.dtype,
    steps: int = 50,
    restarts: int = 4,
    seed: int = 0,
    deadline: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Inputs (m, T, n) that differ in at most eps units of each ball, (m, groups), and their margins, in float64."""
    path = _Path(problem, chosen, restarts, seed, dtype)
    counts = _counts_of(problem, eps.to(dtype), path.balls)
    pace = Pace(deadline)
    for _ in range(int(counts.max())):
        if not pace.allows():
            break
        with pace.work():
            path.add(counts)
    for step in range(steps):
        if not pace.allows():
            break
        with pace.work():
            path.move(counts, LAST_STEP ** (step / max(steps - 1, 1)))
    path.look()
    return settle(problem, chosen, eps, path.best_delta)


def settle(problem: AttackProblem, chosen: Tensor, eps: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Perturbed inputs (m, T, n) that lie in the set, x itself where one does not, and their worst margins, float64."""
    balls = problem.balls.select(chosen, VERDICT)
    x = (balls.x + balls.clip_range(delta.to(VERDICT))).clamp(*balls.clip)
    x = torch.where(delta != 0, x, balls.x)
    x = torch.where(is_inside(balls, x, eps.to(VERDICT))[:, None, None], x, balls.x)
    return x, problem.worst_margin(x, chosen)


def fewest_changes(
    problem: AttackProblem,
    rows: Tensor,
    steps: int,
    restarts: int,
    seed: int,
    dtype: torch.dtype,
    result: RadiusAttackResult,
) -> None:
    """Write the smallest numbers of changes that break the rows, and how, into ``result``.

    Greedy choices alone say how many are enough; then fewer are tried, one less each time, until the attack fails.
    """
    left, counts = rows, torch.ones(len(rows), dtype=VERDICT, device=rows.device)
    path = _Path(problem, rows, restarts, seed, dtype)
    most = _counts_of(
        problem, torch.full_like(path.delta[:, 0, 0, :1, 0], MOST_CHANGES).expand(-1, path.balls.groups), path.balls
    )
    for _ in range(int(most.max()) + 1):
        path.look()
        if bool((path.best < 0).all()):
            break
        path.add(most)
    broken = (path.best < 0).nonzero().squeeze(-1)
    sizes = problem.balls.select(rows, VERDICT).size(path.best_delta.to(VERDICT))
    left, counts = rows[broken], sizes[broken]
    x, margin = settle(problem, left, _per_group(problem, left, counts), path.best_delta[broken])
    while len(left):
        success = margin < 0
        left, counts, x, margin = left[success], counts[success], x[success], margin[success]
        result.x[left], result.margin[left], result.radius[left] = x, margin, counts
        left, counts = left[counts > 1], counts[counts > 1] - 1.0
        if len(left):
            x, margin = least_margins(problem, left, _per_group(problem, left, counts), dtype, steps, restarts, seed)
            counts = torch.minimum(
                counts, problem.balls.select(left, VERDICT).size(x - problem.balls.x[left]).clamp(min=1.0)
            )


def _per_group(problem: AttackProblem, rows: Tensor, counts: Tensor) -> Tensor:
    return problem.balls.select(rows, VERDICT).per_group(counts)
