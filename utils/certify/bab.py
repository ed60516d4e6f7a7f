"""As far as a time limit goes: curved bounds tuned further, then a branch with bounds of its own for every target.

All targets share most of the work, so their common bounds are tuned as long as that gains. But such bounds are a
compromise: then each row of the spec matrix C becomes a problem of its own. A sample's radius is the least of its
branches', so the branch with the least is tuned further, at an eps a little above what it has reached, until time is up
or that branch gains no more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..choices.method import TIME_LIMIT
from ..choices.tables import ATTACKS
from ..graph.graph import Graph
from ..network.state import plain_state
from ..question.arguments import as_inputs
from ..question.question import Question
from ..question.threat import threat_of
from .problem import SLACK, MarginProblem, margin_problem
from .search import Bracket

ROUND_STEPS = 40  # gradient steps of a branch before it is looked at again; twice as many after each try in vain
OVERSHOOTS = (1.06, 1.03, 1.01)  # eps at which a branch is tuned, over what it has reached; one for each try in vain
TUNING = torch.float32  # precision in which bounds of margins are tuned; any curves are sound in another
ALPHA_SHARE = 0.15  # of the time left that ``decide`` gives to slopes of planes: curves gain more in the rest
ENOUGH = 1.002  # a branch that gains less than this factor gains nothing

VERDICTS = ("certified", "falsified", "unknown")


class Search(Protocol):
    """Searches the radii of some samples of a problem; bounds are tuned in ``search_dtype``."""

    search_dtype: torch.dtype

    def __call__(self, problem: MarginProblem, rows: Tensor, first: Tensor, spread: float) -> Bracket: ...


@torch.no_grad()
def refine_radii(problem: MarginProblem, rows: Tensor, found: Bracket, search: Search, seconds: float) -> None:
    """Raise the certified radii of some samples, ``found``'s, in place, within some seconds each."""
    for n, sample in enumerate(rows.split(1)):
        if 0 < float(found.low[n]) < torch.inf:
            deadline = time.perf_counter() + seconds
            for branches in _together_and_apart(problem.part(sample)):
                _refine_radius(branches, found, n, search, deadline)


def _together_and_apart(together: MarginProblem) -> Iterator[MarginProblem]:
    """The problem of one sample, and after that, with all that was tuned, its branches if it has several targets."""
    yield together
    if together.rows.shape[1] > 1:
        yield together.branches()


def _refine_radius(branches: MarginProblem, found: Bracket, n: int, search: Search, deadline: float) -> None:
    """Raise a sample's radius, the least of some branches', as long as there is time and the worst of them gains."""
    low, high, margin = (getattr(found, name)[n].repeat(len(branches.x)) for name in ("low", "high", "margin"))
    in_vain = [0] * len(low)
    tuned = [len(low) == 1] * len(low)  # by itself; before that, a branch may have more room than all together
    while time.perf_counter() < deadline:
        worst = int(low.argmin())
        if in_vain[worst] == len(OVERSHOOTS):
            break
        own = torch.tensor([worst], device=low.device)
        aim = low[own] * OVERSHOOTS[in_vain[worst]]
        if tuned[worst]:
            steps = ROUND_STEPS << in_vain[worst]
            branches.tune_curves(aim, search.search_dtype, steps, own, deadline=deadline)
        bracket = search(branches, own, aim, OVERSHOOTS[in_vain[worst]])
        found.evaluations[n] += int(bracket.evaluations)
        grown = bool(bracket.low > ENOUGH * low[own])
        in_vain[worst] = 0 if grown or not tuned[worst] else in_vain[worst] + 1
        tuned[worst] = True
        if bracket.low > low[own]:
            low[own], high[own], margin[own] = bracket.low, bracket.high, bracket.margin
    worst = int(low.argmin())
    # Sets of smaller eps lie in those of larger: each branch's margin holds at the least radius too.
    found.low[n], found.high[n], found.margin[n] = low[worst], high[worst], margin.min()


@torch.no_grad()
def refine_margins(problem: MarginProblem, eps: Tensor, dtype: torch.dtype, margins: Tensor) -> Tensor:
    """Raise lower bounds of the margins at eps, (batch, n_specs), as far as the method's time limit goes for each."""
    margins = margins.detach().clone()
    for n in range(len(margins)):
        sample = torch.tensor([n], device=margins.device)
        _refine_margins(
            problem.part(sample), eps[sample], dtype, margins[n], time.perf_counter() + problem.method.time_limit
        )
    return margins


def _refine_margins(
    together: MarginProblem,
    eps: Tensor,
    dtype: torch.dtype,
    best: Tensor,
    deadline: float,
    aim: float = torch.inf,
    cost: float = 0.0,
) -> None:
    """Raise one sample's ``best`` margins in place until all are above ``aim``, time is up or nothing gains.

    All of them together first, then each by itself, the least first. No round is begun in which a bound, of ``cost``
    seconds, would end after the deadline.
    """
    for branches in _together_and_apart(together):
        targets = [slice(None)] if branches is together else range(len(best))
        in_vain = [0] * len(targets)
        while time.perf_counter() + cost < deadline and float(best.min()) <= aim:
            worst = min(range(len(targets)), key=lambda k: float(best[targets[k]].min()))
            if in_vain[worst] == len(OVERSHOOTS):
                break
            own, before = torch.tensor([worst], device=best.device), float(best[targets[worst]].min())
            # Above what rounding in the precision of tuning may hide.
            until = {"aim": aim * SLACK[TUNING] / SLACK[dtype], "deadline": deadline}
            branches.tune_curves(eps, TUNING, ROUND_STEPS << in_vain[worst], own, **until)
            if time.perf_counter() > deadline:
                break
            began = time.perf_counter()
            found = branches.margins(eps, dtype, own)[0]
            cost = time.perf_counter() - began
            best[targets[worst]] = torch.maximum(best[targets[worst]], found if branches is together else found[0])
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
    **threat: Any,
) -> list[Decision]:
    """Certify or falsify every sample at eps, one after the other; arguments as for ``utils.certify.certified_margin``.

    First PGD looks for a counter-example, then come bounds, the cheapest first, until one settles the question: layers
    as balls where they are (``bounds.balls``), planes, planes with tuned slopes, curved bounds of all targets together,
    and of each open target by itself.

    Args:
        eps, lengths, relaxation: likewise. Sequences are cut to their lengths; methods and their steps are the
            function's own choice.
        time_limit: seconds a sample; a gradient step that was begun is finished.
        dtype: precision of the bounds.
        seed: of PGD's random starts.
        attack: what looks for a counter-example, a key of ``utils.choices.ATTACKS``.
        threat: norm, frames, clip and ball.
    """
    for name in ("method", "alpha_steps", "curve_steps"):
        if name in threat:
            raise ValueError(f"decide goes from one method to the next by itself: leave out {name}")
    asked = Question(model, x, labels, targets, threat_of(lengths=lengths, **threat))
    eps, x = asked.eps(eps, torch.float64), as_inputs(x)
    # The set that bounds hold for must not be smaller than the attack's.
    outer = eps.to(dtype)
    outer = torch.where(outer < eps, torch.nextafter(outer, outer + 1.0), outer)
    labels, targets = asked.rows[:, 0].argmax(dim=1), asked.rows.argmin(dim=2)
    search, decisions = ATTACKS[attack], []
    for n in range(len(x)):
        own = slice(n, n + 1)
        end = asked.x.shape[1] if asked.threat.lengths is None else int(asked.threat.lengths[n])
        mine = x[own] if asked.threat.lengths is None else x[own, :end]
        radii = [part[own] if part.dim() == 1 else part[own, :end] for part in (eps, outer)]
        question = threat | {"targets": targets[own], "frames": asked.threat.frames[own, :end]}
        started = time.perf_counter()
        deadline = started + time_limit
        found = search(model, mine, labels[own], radii[0], seed=seed, deadline=deadline, **question)
        how = {"method": "bab", "relaxation": relaxation, "time_limit": time_limit}
        problem = margin_problem(model, mine, labels[own], **how, **question)
        broken = float(found.margin) < 0
        verdict, margins = (
            ("falsified", problem.clean_margins(dtype)[0]) if broken else _bound(problem, radii[1], started)
        )
        example = found.x[0] if broken else None
        decisions.append(Decision(verdict, margins, example, time.perf_counter() - started))
    return decisions


def _bound(problem: MarginProblem, eps: Tensor, started: float) -> tuple[str, Tensor]:
    """Whether a problem's only sample is certified at eps, (1,), or "unknown", and its margins.

    It is unknown at an eps, other than 0, that the floats of x do not resolve.
    """
    deadline, dtype = started + problem.method.time_limit, eps.dtype
    clean = problem.clean_margins(dtype)[0]
    enough, spare = (float(problem.slack(precision).max()) for precision in (dtype, TUNING))
    best, cost = torch.full_like(clean, -torch.inf), 0.0

    def tune_planes(of: MarginProblem) -> None:
        of.tune(eps, TUNING, of.method.alpha_steps, deadline=_share(deadline, ALPHA_SHARE))

    stages = [
        (problem, lambda _: None),
        (problem, tune_planes),
        (problem, lambda of: of.tune_curves(eps, TUNING, ROUND_STEPS, aim=spare, deadline=deadline)),
    ]
    if problem.in_balls(dtype):  # no backward pass for middle layers
        balls = problem.by("ball")
        stages = [(balls, lambda _: None), (balls, tune_planes), *stages]
    for stage, (of, tune) in enumerate(stages):
        if float(best.min()) <= enough and time.perf_counter() < deadline:
            tune(of)
            began = time.perf_counter()
            if stage == 0 or began < deadline:
                best = torch.maximum(best, of.margins(eps, dtype)[0])
                cost = time.perf_counter() - began
    _refine_margins(problem, eps, dtype, best, deadline, enough, cost)
    resolved = bool(((eps == 0) | (eps >= problem.resolution(dtype))).all())
    return ("certified" if resolved and float(best.min()) > enough else "unknown"), best


def _share(deadline: float, share: float) -> float:
    """A deadline that leaves the rest of the time."""
    now = time.perf_counter()
    return now + share * (deadline - now)
