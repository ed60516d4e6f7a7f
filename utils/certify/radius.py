"""Certified radii: how the largest eps that certifies is searched, one method after the other.

Each method begins where the one before it came to. "bab" takes one sample after the other, each within the time limit
from its own start: tuning takes a share of the time that is left, and neither a round of a search nor a step of tuning
is begun that would end too late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bounds.alpha import STEP_BOUNDS, slopes_pay
from ..bounds.curve_tuning import CURVED_STEP, VERDICT_STEPS
from ..clock import Pace, now, share_of
from ..precision import full_precision
from ..question.arguments import check_precision
from .bab import ALPHA_SHARE, CURVE_SHARE, TUNED_SHARE, curves_pay, refine_radii
from .counts import search_counts
from .problem import MarginProblem
from .results.progress import Progress, reported
from .search import SPREAD, Bracket, MarginOf, foretold_radius, largest_certified
from .splitting import can_split, raise_radius
from .sweep import direct_problem, sweep_radii

# Smallest first eps of a search, as a share of the radius at which the margin's linearisation vanishes.
FIRST_SHARE = 0.04

# Slopes are tuned in two rounds, each at an eps a little above the radius reached. The planes of "crown" change with
# eps, tuned ones do not: where the first round gains less than that costs, the second is nearer, and takes all steps.
ALPHA_OVERSHOOT, ALPHA_NEAR = 1.03, 1.004

# Curved bounds are tuned in two rounds, far above the radius reached and near it: they gain more, and at first less is
# known of how much. Where the first aim was about all that they reach, the second one is nearer.
CURVE_ROUNDS, CURVE_OVERSHOOT = 2, 1.3
CURVE_ALMOST, CURVE_NEAR, CURVE_NEARER = 1.03, 1.05, 1.02

# Tuned slopes of smooth functions gain less than this factor over planes, as a rule: where curves gain more, "curve"
# leaves them out. Those of functions with kinks may gain any factor.
SURE_GAIN = 1.25

# Radii are foretold to these relative tolerances by estimates: in between, and before bounds are asked for. Bounds come
# to a little less than estimates; how much less is measured once. Then a search begins with two eps this far apart.
ROUGH_TOL, FORETOLD_TOL = 2e-2, 5e-3
CURVE_EXCESS, CURVE_SPREAD, EXCESS_POWER = 1.03, 1.06, 7

# No larger eps is tried unless asked for: a sample of a saturating network can be certified at any.
MAX_EPS = 1e6


@dataclass
class RadiusResult:
    """What a radius search found, (batch,) each.

    Attributes:
        radius: the largest eps that was certified in the verdict's precision; 0 if none was, or none that the floats
            of the input resolve (``MarginProblem.resolution``).
        failed: the smallest eps that was not certified in that precision; 0 if the clean input is not; inf if none was
            met, up to ``max_eps``, or before time was up.
        margin: worst lower bound at ``radius`` less the slack for rounding (the clean one where radius is 0).
        evaluations: how many bounds were computed; estimates that only say where curved bounds begin do not count.
        start: of a tuned method, the radius of the method that it starts from: of "alpha" and "curve" that is "crown",
            of "bab" what "curve" reached in the time that it had, or "alpha" where neurons are split instead. NaN of
            the others.
    """

    radius: Tensor
    failed: Tensor
    margin: Tensor
    evaluations: Tensor
    start: Tensor


@full_precision()
def search_radius(
    problem: MarginProblem,
    *,
    tol: float = 1e-3,
    eps0: float | None = None,
    max_eps: float = MAX_EPS,
    dtype: torch.dtype = torch.float64,
    search_dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
    progress: Progress = None,
) -> RadiusResult:
    """Largest certified eps of every sample: a search in ``search_dtype``, the verdict in ``dtype``.

    Bounds in ``search_dtype`` foretell the radius; then both ends of the bracket are found in ``dtype``.
    No eps above ``max_eps`` is tried: some samples, of saturating networks, are certified at any. ``progress``: see
    ``certified_radius``.
    """
    if not 0 < tol < 1:
        raise ValueError(f"tol must be between 0 and 1, not {tol}")
    if eps0 is not None and not 0 < eps0 < torch.inf:
        raise ValueError(f"eps0 must be a positive number, not {eps0}")
    if not 0 < max_eps < torch.finfo(torch.float32).max:
        raise ValueError(f"max_eps must be a positive number that float32 can hold, not {max_eps}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    for precision in (dtype, search_dtype):
        check_precision(precision, "a radius is searched")
    search = _Searcher(tol, eps0, max_eps, dtype, search_dtype)
    by_rows = _count_rows if problem.threat.norm == 0.0 else _search_rows
    at_once = 1 if problem.method.branches else batch_size  # a time limit is that of one sample
    parts, order = [], []
    with reported(progress, len(problem.x)) as done:
        for members, own in problem.groups():
            for rows in torch.arange(len(own.x), device=problem.x.device).split(at_once):
                parts.append(by_rows(own, rows, search))
                order.append(members[rows])
                done(len(rows))
    back = torch.cat(order).argsort()
    names = RadiusResult.__annotations__
    return RadiusResult(*(torch.cat([getattr(part, name) for part in parts])[back] for name in names))


@dataclass
class _Searcher:
    """How radii are searched; see ``search_radius``."""

    tol: float
    eps0: float | None
    max_eps: float
    dtype: torch.dtype
    search_dtype: torch.dtype

    def first(self, problem: MarginProblem, rows: Tensor) -> Tensor:
        linear = problem.linear_radius(self.search_dtype, rows).to(self.dtype)
        return FIRST_SHARE * linear if self.eps0 is None else torch.full_like(linear, self.eps0)

    def margin_of(self, problem: MarginProblem, rows: Tensor, precision: torch.dtype, sound: bool = True) -> MarginOf:
        """Worst margins less the slack for rounding."""
        slack = problem.slack(self.dtype, rows)

        def margin_of(chosen: Tensor, eps: Tensor) -> Tensor:
            margins = problem.margins(eps, precision, rows[chosen], sound=sound)
            return (margins.to(self.dtype) - slack[chosen]).amin(dim=1)

        return margin_of

    def foretell(
        self,
        problem: MarginProblem,
        rows: Tensor,
        first: Tensor,
        spread: float,
        tol: float,
        pace: Pace,
    ) -> Tensor:
        """Roughly the radii, by estimates of the margins; 0 where none is in sight."""
        scout = self.margin_of(problem, rows, self.search_dtype, sound=False)
        clean = problem.clean_margins(self.dtype, rows).amin(dim=1)
        linear = problem.linear_radius(self.search_dtype, rows).to(self.dtype)
        return foretold_radius(scout, clean, first, tol, self.max_eps, linear=linear, spread=spread, pace=pace)

    def calibrated(
        self, problem: MarginProblem, rows: Tensor, eps: Tensor, pace: Pace
    ) -> tuple[MarginOf, tuple[Tensor, Tensor, Tensor]]:
        """Estimates of the margins, corrected by what bounds take more than they do at eps; and these bounds.

        That is a share of what estimates take, which grows with eps, about as its power ``EXCESS_POWER``. The bounds
        are verdicts: which of the rows, all that are not misclassified, their eps and margins.
        """
        clean = problem.clean_margins(self.dtype, rows).amin(dim=1)
        right = (clean > 0).nonzero().squeeze(-1)
        estimate, excess = self.margin_of(problem, rows, self.search_dtype, sound=False), torch.zeros_like(clean)
        with pace.work(max(1, len(right))):
            bounds = self.margin_of(problem, rows, self.dtype)(right, eps[right])
        taken, taken_roughly = clean[right] - bounds, clean[right] - estimate(right, eps[right])
        more = taken / taken_roughly - 1.0
        excess[right], at = torch.where(more.isfinite() & (more > -1.0), more, 0.0), eps

        def margin_of(chosen: Tensor, eps: Tensor) -> Tensor:
            share = 1.0 + excess[chosen] * (eps / at[chosen]) ** EXCESS_POWER
            return clean[chosen] - share * (clean[chosen] - estimate(chosen, eps))

        return margin_of, (right, eps[right], bounds)

    def __call__(
        self, problem: MarginProblem, rows: Tensor, first: Tensor, spread: float = SPREAD, pace: Pace | None = None
    ) -> Bracket:
        """Search some samples of a problem, with the bounds it has by now, from their first eps on.

        ``pace`` is of bounds of one sample at one eps; a first guess is replaced by what curved bounds really take.
        """
        scout, known, pace = None, None, pace or Pace()
        clean = (problem.clean_margins(self.dtype, rows) - problem.slack(self.dtype, rows)).amin(dim=1)
        if problem.curves is not None:
            foretold = self.foretell(problem, rows, first, spread, FORETOLD_TOL, Pace(pace.deadline))
            if not pace.allows(len(rows)):
                return Bracket.unknown(clean)
            first = torch.where(foretold > 0, foretold / CURVE_EXCESS, first)
            pace = Pace(pace.deadline)
            scout, known = self.calibrated(problem, rows, first, pace)
            first, spread = first / CURVE_SPREAD, CURVE_SPREAD
        elif self.search_dtype != self.dtype:
            scout = self.margin_of(problem, rows, self.search_dtype, sound=False)
        verdict = self.margin_of(problem, rows, self.dtype)
        linear = problem.linear_radius(self.search_dtype, rows).to(self.dtype)
        aims = {"scout": scout, "known": known, "linear": linear, "spread": spread}
        aims |= {"floor": problem.resolution(self.dtype, rows), "pace": pace, "scout_pace": Pace(pace.deadline)}
        found = largest_certified(verdict, clean, first, self.tol, self.max_eps, **aims)
        found.high = torch.where(clean > 0, found.high, 0.0)
        return found


def _search_rows(problem: MarginProblem, rows: Tensor, search: _Searcher) -> RadiusResult:
    """One method after the other, from the cheapest on; each begins where the one before it came to."""
    if problem.method.integrates:
        return _sweep_rows(problem, rows, search)
    deadline = now() + problem.method.time_limit if problem.method.branches else math.inf
    problem.slopes = problem.curves = None
    first, planes = search.first(problem, rows), Pace()
    found = search(problem, rows, first, pace=planes)  # whatever the limit
    start, planes.deadline = torch.full_like(found.low, torch.nan), deadline
    curves_alone, begun = problem.method.curved and not problem.method.branches, replace(found)
    if problem.method.tuned and not curves_alone:
        start = found.low.clone()
        _tune_slopes(problem, rows, search, found, first, planes)
    splits = problem.method.branches and can_split(problem.part(rows), found.low)
    start = found.low.clone() if splits else start
    if problem.method.curved and not (splits and not curves_pay(problem)):
        until = share_of(deadline, CURVE_SHARE) if splits else deadline
        start, steps = found.low.clone(), Pace(until, CURVED_STEP * planes.longest)
        _tune_curves(problem, rows, search, found, first, steps)
        if problem.method.branches:
            start = found.low.clone()
            refine_radii(problem, rows, found, search, steps)
    if curves_alone:
        left = found.low < SURE_GAIN * start
        if slopes_pay(problem.graph(search.dtype, rows[:1])):
            left = start > 0
        _tune_slopes_of(left, problem, rows, search, found, begun, first, planes)
    if splits:
        raise_radius(problem.part(rows), found, search.dtype, search.tol, search.max_eps, deadline)
    return RadiusResult(found.low, found.high, found.margin, found.evaluations, start)


def _count_rows(problem: MarginProblem, rows: Tensor, search: _Searcher) -> RadiusResult:
    """Numbers of changes, where p = 0."""
    found, start = search_counts(problem, rows, search.dtype, search.max_eps, search.eps0 or 1.0, search.search_dtype)
    return RadiusResult(found.low, found.high, found.margin, found.evaluations, start)


def _sweep_rows(problem: MarginProblem, rows: Tensor, search: _Searcher) -> RadiusResult:
    """By integrated gradients; the shell rule is never below what the bounds it takes in certify by themselves."""
    found = sweep_radii(problem, rows, search)
    if problem.method.name == "shell":
        by_layers = direct_problem(problem)
        first = search(by_layers, rows, search.first(by_layers, rows))
        _take_better(first, found)
        found = first
    none = found.low < problem.resolution(search.dtype, rows)
    nothing = torch.full_like(found.low, torch.nan)
    return RadiusResult(torch.where(none, 0.0, found.low), found.high, found.margin, found.evaluations, nothing)


def _tune_slopes(
    problem: MarginProblem, rows: Tensor, search: _Searcher, found: Bracket, first: Tensor, bounds: Pace
) -> None:
    """Raise what was found, in place, by tuned slopes; ``bounds`` is the pace of bounds by planes."""
    overshoot, steps = torch.full_like(found.low, ALPHA_OVERSHOOT), -(-problem.method.alpha_steps // 2)
    tuning = Pace(share_of(bounds.deadline, ALPHA_SHARE), bounds.longest * STEP_BOUNDS)
    for _ in range(2):
        if not tuning.allows():
            return
        aim, reached = torch.where(found.low > 0, overshoot * found.low, first), found.low.clone()
        problem.tune(aim, search.search_dtype, steps, rows, pace=tuning)
        _take_better(found, search(problem, rows, aim, ALPHA_OVERSHOOT, bounds))
        in_vain = (found.low <= reached) & (found.low > 0)
        overshoot = torch.where(in_vain, ALPHA_NEAR, ALPHA_OVERSHOOT)
        steps = problem.method.alpha_steps if bool(in_vain.any()) else steps


def _tune_slopes_of(
    chosen: Tensor,
    problem: MarginProblem,
    rows: Tensor,
    search: _Searcher,
    found: Bracket,
    begun: Bracket,
    first: Tensor,
    bounds: Pace,
) -> None:
    """Likewise, of some samples, chosen by a mask, as if there were no curves: from where planes came to, ``begun``."""
    if not bool(chosen.any()):
        return
    curves, problem.curves = problem.curves, None
    by_slopes, best = begun.of(chosen), found.of(chosen)
    _tune_slopes(problem, rows[chosen], search, by_slopes, first[chosen], bounds)
    _take_better(best, by_slopes)
    found.replace(chosen, best)
    problem.curves = curves


def _tune_curves(
    problem: MarginProblem, rows: Tensor, search: _Searcher, found: Bracket, first: Tensor, pace: Pace
) -> None:
    """Raise what was found, in place, by tuned curved bounds; ``pace`` is that of gradient steps."""
    steps, reached, deadline = -(-problem.method.curve_steps // CURVE_ROUNDS), found.low, pace.deadline
    pace.deadline = share_of(deadline, TUNED_SHARE)
    overshoot = torch.full_like(reached, CURVE_OVERSHOOT)
    for _ in range(CURVE_ROUNDS):
        if not pace.allows(1.0 + VERDICT_STEPS):
            break
        aim = torch.where(reached > 0, overshoot * reached, first)
        problem.tune_curves(aim, search.search_dtype, steps, rows, pace=pace)
        guessed = search.foretell(problem, rows, aim, CURVE_OVERSHOOT, ROUGH_TOL, Pace(pace.deadline))
        reached = torch.maximum(reached, guessed)
        overshoot = torch.where(guessed > CURVE_ALMOST * aim, CURVE_NEAR, CURVE_NEARER)
    pace.deadline = deadline
    if problem.curves is not None:
        aim = torch.where(reached > 0, reached, first) / CURVE_EXCESS
        bounds = Pace(deadline, VERDICT_STEPS * pace.longest)
        _take_better(found, search(problem, rows, aim, CURVE_EXCESS, bounds))


def _take_better(found: Bracket, other: Bracket) -> None:
    """Write what another search certified more, sample by sample, into the first; evaluations add up."""
    higher = other.low > found.low
    for name in ("low", "high", "margin"):
        setattr(found, name, torch.where(higher, getattr(other, name), getattr(found, name)))
    found.evaluations = found.evaluations + other.evaluations
