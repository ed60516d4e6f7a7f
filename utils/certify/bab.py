"""As far as a time limit goes: curved bounds tuned further, then a branch with bounds of its own for every target.

All targets share most of the work, so their common bounds are tuned as long as that gains. But such bounds are a
compromise: then each row of the spec matrix C becomes a problem of its own. A sample's radius is the least of its
branches', so the branch with the least is tuned further, at an eps a little above what it has reached, until time is up
or that branch gains no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..bounds.alpha import STEP_BOUNDS
from ..bounds.curve_tuning import CURVED_STEP, VERDICT_STEPS
from ..choices.method import TIME_LIMIT
from ..choices.tables import ATTACKS
from ..clock import Pace, now, share_of
from ..graph.convolution import Convolution
from ..graph.graph import Graph
from ..network.constants.extra import Extra
from ..network.state import plain_state
from ..question.arguments import as_inputs, as_tensor
from ..question.elements import by_element
from ..question.question import Question
from ..question.threat import threat_of
from .problem import SLACK, MarginProblem, margin_problem
from .search import Bracket
from .splitting import can_split, split_margins

ROUND_STEPS = 40  # gradient steps of a branch before it is looked at again; twice as many after each try in vain
OVERSHOOTS = (1.06, 1.03, 1.01)  # eps at which a branch is tuned, over what it has reached; one for each try in vain
TUNING = torch.float32  # precision in which bounds of margins are tuned; any curves are sound in another
ALPHA_SHARE = 0.15  # of the time left that slopes of planes are tuned in: curves gain more in the rest
TUNED_SHARE = 0.7  # of the time left in which curves are tuned: a search by their bounds follows
CURVE_SHARE = 0.5  # of the time that is left after planes where neurons can be split as well
ENOUGH = 1.002  # a branch that gains less than this factor gains nothing

VERDICTS = ("certified", "falsified", "unknown")


class Search(Protocol):
    """Searches the radii of some samples of a problem; bounds are tuned in ``search_dtype``."""

    search_dtype: torch.dtype

    def __call__(self, problem: MarginProblem, rows: Tensor, first: Tensor, spread: float, pace: Pace) -> Bracket: ...


@torch.no_grad()
def refine_radii(problem: MarginProblem, rows: Tensor, found: Bracket, search: Search, pace: Pace) -> None:
    """Raise the certified radius of one sample, ``found``'s, in place, if it has curves.

    ``pace`` is that of gradient steps of its curves.
    """
    if problem.curves is not None and 0 < float(found.low) < torch.inf:
        for branches in _together_and_apart(problem.part(rows)):
            _refine_radius(branches, found, search, pace)


def _together_and_apart(together: MarginProblem) -> Iterator[MarginProblem]:
    """The problem of one sample, and after that, with all that was tuned, its branches if it has several targets."""
    yield together
    if together.rows.shape[1] > 1:
        yield together.branches()


def _refine_radius(branches: MarginProblem, found: Bracket, search: Search, pace: Pace) -> None:
    """Raise a sample's radius, the least of some branches', as long as there is time and the worst of them gains."""
    low, high, margin = (getattr(found, name)[0].repeat(len(branches.x)) for name in ("low", "high", "margin"))
    in_vain, deadline = [0] * len(low), pace.deadline
    tuned = [len(low) == 1] * len(low)  # by itself; before that, a branch may have more room than all together
    while pace.allows(1.0 + VERDICT_STEPS):
        worst = int(low.argmin())
        if in_vain[worst] == len(OVERSHOOTS):
            break
        own = torch.tensor([worst], device=low.device)
        aim = low[own] * OVERSHOOTS[in_vain[worst]]
        if tuned[worst]:
            steps = ROUND_STEPS << in_vain[worst]
            pace.deadline = share_of(deadline, TUNED_SHARE)
            branches.tune_curves(aim, search.search_dtype, steps, own, pace=pace)
            pace.deadline = deadline
        bounds = Pace(deadline, VERDICT_STEPS * pace.longest)
        bracket = search(branches, own, aim, OVERSHOOTS[in_vain[worst]], bounds)
        found.evaluations[0] += int(bracket.evaluations)
        grown = bool(bracket.low > ENOUGH * low[own])
        in_vain[worst] = 0 if grown or not tuned[worst] else in_vain[worst] + 1
        tuned[worst] = True
        if bracket.low > low[own]:
            low[own], high[own], margin[own] = bracket.low, bracket.high, bracket.margin
    worst = int(low.argmin())
    # Sets of smaller eps lie in those of larger: each branch's margin holds at the least radius too.
    found.low[0], found.high[0], found.margin[0] = low[worst], high[worst], margin.min()


@torch.no_grad()
def best_margins(problem: MarginProblem, eps: Tensor, dtype: torch.dtype, alpha_share: float = ALPHA_SHARE) -> Tensor:
    """Lower bounds of the margins at eps, (batch, n_specs), as high as they get in the time limit of each sample.

    ``alpha_share``: of the time in which slopes of planes may be tuned, before what follows them.
    """
    found = []
    for sample in torch.arange(len(problem.x), device=eps.device).split(1):
        deadline = now() + problem.method.time_limit
        found.append(_raise_margins(problem.part(sample), eps[sample].to(dtype), deadline, alpha_share=alpha_share))
    return torch.stack(found)


def _raise_margins(
    problem: MarginProblem,
    eps: Tensor,
    deadline: float,
    enough: float = torch.inf,
    alpha_share: float = ALPHA_SHARE,
) -> Tensor:
    """One sample's margins, (n_specs,), bounded ever more tightly until all are above ``enough`` or time is up.

    Layers as balls, where they are, and planes come first, with no look at the clock, then tuned slopes, curved bounds
    of all targets together, and of each by itself, unless the problem's method is "curve" or, of slopes alone, "alpha".
    By "bab", neurons of two linear pieces are split at last, where ``splitting.can_split``.
    """
    splits = problem.method.branches and can_split(problem, eps)
    problem = problem.by("alpha") if splits and not curves_pay(problem) else problem
    problem.slopes, dtype, bounds = None, eps.dtype, Pace(deadline)
    best = _margins_by_balls(problem, eps, deadline, enough)
    if float(best.min()) > enough:
        return best
    with bounds.work():
        best = torch.maximum(best, problem.margins(eps, dtype)[0])
    until = min(share_of(deadline, alpha_share), deadline - 2.0 * bounds.longest)  # what is tuned is to be bounded
    tuning = Pace(until, bounds.longest * STEP_BOUNDS)
    if float(best.min()) <= enough and tuning.allows():
        problem.tune(eps, TUNING, problem.method.alpha_steps, pace=tuning)
        if bounds.allows():
            best = torch.maximum(best, problem.margins(eps, dtype)[0])
    if problem.method.curved and float(best.min()) <= enough:
        until = share_of(deadline, CURVE_SHARE) if splits else deadline
        best = _raise_by_curves(problem, eps, best, until, enough, bounds)
    if splits and float(best.min()) <= enough and Pace(deadline, bounds.longest).allows(VERDICT_STEPS):
        planes = problem.by("alpha")
        planes.slopes = problem.slopes
        best = split_margins(planes, eps, best, torch.full_like(best, enough), deadline)
    return best


def curves_pay(problem: MarginProblem) -> bool:
    """Whether curved bounds come before neurons are split: in networks without cells or convolutions.

    Of recurrent ones few neurons are open where they are split at all, and convolutions would become matrices.
    """
    graph = problem.by("alpha").graph(TUNING, slice(0, 1))
    return not graph.recurrent and not any(isinstance(node, Convolution) for node in graph.nodes)


def _raise_by_curves(
    problem: MarginProblem, eps: Tensor, best: Tensor, deadline: float, enough: float, bounds: Pace
) -> Tensor:
    """Margins by curved bounds of all targets together and, by method "bab", of each by itself; ``best`` is known."""
    steps = Pace(deadline, CURVED_STEP * bounds.longest)
    if not steps.allows(1.0 + VERDICT_STEPS):
        return best
    aim = enough * SLACK[TUNING] / SLACK[eps.dtype]  # above what rounding in the precision of tuning may hide
    problem.tune_curves(eps, TUNING, problem.method.curve_steps, aim=aim, pace=steps)
    if steps.allows(VERDICT_STEPS):
        bounds = Pace(deadline)
        with bounds.work():
            best = torch.maximum(best, problem.margins(eps, eps.dtype)[0])
        for branches in _together_and_apart(problem) if problem.method.branches else ():
            _refine_margins(branches, eps, eps.dtype, best, aim, enough, steps, bounds)
    return best


def _margins_by_balls(problem: MarginProblem, eps: Tensor, deadline: float, enough: float) -> Tensor:
    """The same by method "ball", which needs no backward pass for middle layers; -inf where there are no balls."""
    dtype, bounds = eps.dtype, Pace(deadline)
    if not problem.in_balls(dtype):
        return torch.full_like(problem.clean_margins(dtype)[0], -torch.inf)
    balls = problem.by("ball")
    with bounds.work():
        best = balls.margins(eps, dtype)[0]
    tuning = Pace(share_of(deadline, ALPHA_SHARE), bounds.longest * STEP_BOUNDS)
    if float(best.min()) <= enough and tuning.allows():
        balls.tune(eps, TUNING, problem.method.alpha_steps, pace=tuning)
        if bounds.allows():
            best = torch.maximum(best, balls.margins(eps, dtype)[0])
    return best


def _refine_margins(
    branches: MarginProblem,
    eps: Tensor,
    dtype: torch.dtype,
    best: Tensor,
    aim: float,
    enough: float,
    steps: Pace,
    bounds: Pace,
) -> None:
    """Raise one sample's ``best`` margins in place until all are above ``enough``, time is up or nothing gains.

    ``branches`` are all of them together, or each by itself: then the least comes first. ``steps`` and ``bounds`` are
    the paces of gradient steps, of which each round has more, and of bounds, of which it needs one.
    """
    together = branches.rows.shape[1] == len(best)
    targets = [slice(None)] if together else range(len(best))
    in_vain = [0] * len(targets)
    while bounds.allows() and float(best.min()) <= enough:
        worst = min(range(len(targets)), key=lambda k: float(best[targets[k]].min()))
        if in_vain[worst] == len(OVERSHOOTS):
            break
        own, before = torch.tensor([worst], device=best.device), float(best[targets[worst]].min())
        branches.tune_curves(eps, TUNING, ROUND_STEPS << in_vain[worst], own, aim=aim, pace=steps)
        if not bounds.allows():
            break
        with bounds.work():
            found = branches.margins(eps, dtype, own)[0]
        best[targets[worst]] = torch.maximum(best[targets[worst]], found if together else found[0])
        gain = float(best[targets[worst]].min()) - before
        in_vain[worst] = 0 if gain > (ENOUGH - 1.0) * (1.0 + abs(before)) else in_vain[worst] + 1


@dataclass
class Decision:
    """The verdict on one sample at one eps.

    Attributes:
        verdict: "certified": no perturbation changes the classification; "falsified": ``counterexample`` does;
            "unknown": neither was found in time.
        margins: lower bounds of the margins, (n_specs,); of the branches that were still open when time was up, too.
        counterexample: (T, n), float64, or None.
        seconds: how long it took.
    """

    verdict: str
    margins: Tensor
    counterexample: Tensor | None
    seconds: float


@plain_state()
@torch.no_grad()
def decide(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    targets: Tensor | None = None,
    lengths: Tensor | None = None,
    relaxation: str = "plane",
    time_limit: float = TIME_LIMIT,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attack: str = "pgd",
    extra: Any = None,
    **threat: Any,
) -> list[Decision]:
    """Certify or falsify every sample at eps, one after the other; arguments as for ``utils.certify.certified_margin``.

    First PGD looks for a counter-example, then come bounds, the cheapest first, until one settles the question: layers
    as balls where they are (``bounds.balls``), planes, planes with tuned slopes, curved bounds of all targets together,
    and of each open target by itself.

    Args:
        eps, lengths, relaxation: likewise. Sequences are cut to their lengths; methods and their steps are the
            function's own choice.
        time_limit: seconds a sample, attack and tuning included.
        dtype: precision of the bounds.
        seed: of PGD's random starts.
        extra: further arguments of a module's forward, as for ``certified_margin``.
        attack: what looks for a counter-example, a key of ``utils.choices.ATTACKS``.
        threat: norm, frames, clip, ball and together.
    """
    for name in ("method", "alpha_steps", "curve_steps"):
        if name in threat:
            raise ValueError(f"decide goes from one method to the next by itself: leave out {name}")
    asked = Question(model, x, labels, targets, threat_of(lengths=lengths, **threat), extra=extra)
    eps, x = asked.eps(eps, torch.float64), as_inputs(x)
    # The set that bounds hold for must not be smaller than the attack's.
    outer = eps.to(dtype)
    outer = torch.where(outer < eps, torch.nextafter(outer, outer + 1.0), outer)
    if asked.picks_one:
        targets = asked.others
    elif targets is not None:
        targets = as_tensor(targets, "targets", "whole numbers")
    search, decisions, extra = ATTACKS[attack], [], Extra.of(extra, len(x))
    for n in range(len(x)):
        own = slice(n, n + 1)
        end = asked.x.shape[1] if asked.threat.lengths is None else int(asked.threat.lengths[n])
        mine = x[own] if asked.threat.lengths is None else x[own, :end]
        radii = [part[own] if part.dim() == 1 else part[own, :end] for part in (eps, outer)]
        aims = None if targets is None else targets[own]
        question = threat | {"targets": aims, "frames": asked.threat.frames[own, :end], "features": None}
        question["scales"] = None if asked.threat.scales is None else asked.threat.scales[own, :end]
        if question.get("box") is not None:
            ends = [
                by_element(as_tensor(side, "box", "numbers").to(asked.x), "box", asked.x) for side in question["box"]
            ]
            question |= {"scales": None, "box": tuple(side[own, :end] for side in ends)}
        question |= {"extra": extra.part(own)} if extra else {}
        question["together"] = None if asked.threat.together is None else asked.threat.together[:end]
        started = now()
        deadline = started + time_limit
        found = search(model, mine, asked.labels[own], radii[0], seed=seed, deadline=deadline, **question)
        last = "alpha" if asked.threat.norm == 0.0 else "bab"  # curved bounds know no set of p = 0
        how = {"method": last, "relaxation": relaxation, "time_limit": time_limit}
        problem = margin_problem(model, mine, asked.labels[own], **how, **question)
        broken = float(found.margin) < 0
        if broken:
            verdict, margins = "falsified", problem.clean_margins(dtype)[0]
        else:
            certified, margins = certify_until(problem, radii[1], deadline)
            verdict = "certified" if certified else "unknown"
        example = found.x[0] if broken else None
        decisions.append(Decision(verdict, margins, example, now() - started))
    return decisions


def certify_until(problem: MarginProblem, eps: Tensor, deadline: float) -> tuple[bool, Tensor]:
    """Whether a problem's only sample is certified at eps, (1,) or (1, T), before the deadline, and its margins.

    Its method is "alpha", "curve" or "bab"; cheaper bounds come first. Nothing is certified at an eps, other than 0,
    that the floats of x do not resolve.
    """
    dtype = eps.dtype
    if now() > deadline:
        return False, torch.full_like(problem.clean_margins(dtype)[0], -torch.inf)
    enough = float(problem.slack(dtype).max())
    best = _raise_margins(problem, eps, deadline, enough)
    resolved = bool(((eps == 0) | (eps >= problem.resolution(dtype))).all())
    return resolved and float(best.min()) > enough, best
