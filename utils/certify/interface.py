"""Certified margins and radii of a classifier: the Python interface."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..choices.method import ALPHA_STEPS, CURVE_STEPS, TIME_LIMIT, Method
from ..graph.graph import Graph
from ..network.state import plain_state
from ..question.question import Question
from ..question.threat import Frames, Threat
from .bab import TUNING, refine_margins, refine_radii
from .problem import SLACK, MarginProblem
from .search import SPREAD, Bracket, MarginOf, foretold_radius, largest_certified
from .sweep import direct_problem, sweep_radii

# Smallest first eps of a search, as a share of the radius at which the margin's linearisation vanishes.
FIRST_SHARE = 0.04

# Slopes are tuned in two rounds, each at an eps a little above the radius reached. The planes of "crown" change with
# eps, tuned ones do not: where the first round gains less than that costs, the second is nearer, and takes all steps.
ALPHA_OVERSHOOT, ALPHA_NEAR = 1.03, 1.004

# Curved bounds are tuned in this many rounds, at these multiples of the radius reached: they gain more, and at first
# less is known of how much.
CURVE_OVERSHOOTS = (1.2, 1.1, 1.03)

# Radii are foretold to these relative tolerances by estimates: in between, and before bounds are asked for. Bounds come
# to a little less than estimates; how much less is measured once. Then a search begins with two eps this far apart.
ROUGH_TOL, FORETOLD_TOL = 2e-2, 5e-3
CURVE_EXCESS, CURVE_SPREAD, EXCESS_POWER = 1.03, 1.06, 7

# No larger eps is tried unless asked for: a sample of a saturating network can be certified at any.
MAX_EPS = 1e6


@plain_state()
def certified_margin(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    norm: float = 2.0,
    targets: Tensor | None = None,
    frames: Frames = None,
    clip: tuple[float, float] | None = None,
    ball: str = "frame",
    method: str = "crown",
    relaxation: str = "plane",
    lengths: Tensor | None = None,
    alpha_steps: int = ALPHA_STEPS,
    curve_steps: int = CURVE_STEPS,
    time_limit: float = TIME_LIMIT,
    chain: str = "chord",
    layers: str = "crown",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Lower bounds of the margins over all perturbations of size eps; differentiable in the model and in x.

    Arrays and lists are as good as tensors, of x, labels and everything else.

    Args:
        model: the classifier, any module whose forward ``utils.network`` can read, or a graph; its weights are read,
            never changed.
        x: (batch, T, n) sequences in the model's input units. Inputs of a module may also be (batch, T) whole numbers
            of words, whose vectors are perturbed then, or of another shape, (batch, ...), which is one frame.
        labels: (batch,) classes that must win.
        eps: radius in the units of x: a number, (batch,), or (batch, T) for one radius a frame.
        norm: p of the l_p balls: 1, 2 or inf, also as "l1", "l2", "linf".
        targets: classes to beat, one for all, (batch,) or (batch, n_specs); None for every other class.
        frames: which frames are perturbed (``frame_mask``); the others are exact. None for all.
        clip: valid input range (lowest, highest) to which l_inf boxes are cut.
        ball: "frame" for a ball around every frame, "sequence" for one around the whole sequence.
        method: "crown", "ibp" or "crown-ibp" (``utils.bounds``); "alpha": "crown" with slopes tuned to the sample;
            "curve": curved bounds as well, slopes and curvatures tuned (``bounds.curve``); "bab": after these, curved
            bounds of every target class by itself, until ``time_limit`` (``utils.certify.bab``).
        relaxation: of an LSTM's or GRU's gate products: "plane", "volume", "line" or "constant" (``utils.relaxation``).
        lengths: (batch,) number of frames that count in each sample; those after are padding. None for all.
        alpha_steps: gradient steps of "alpha", each at the price of about three bounds.
        curve_steps: gradient steps of "curve", each at the price of a dozen bounds by planes or more.
        time_limit: seconds that "bab" may take for a sample.
        chain: of "jacobian" and "shell": how gradients are bounded, "chord", "recurjac" or "interval".
        layers: likewise: the method, of one pass, by which the network's layers are bounded.
        dtype: precision of the bounds; that of x if left out. They are tuned in float32.

    Returns:
        (batch, n_specs); a positive row cannot change sign inside the perturbation set (up to rounding; ``SLACK``).

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    threat = Threat(norm, ball, frames, clip, lengths)
    how = Method(method, relaxation, alpha_steps, curve_steps, time_limit, chain, layers)
    problem = MarginProblem(Question(model, x, labels, targets, threat), how)
    x = problem.x
    eps = problem.question.eps(eps, dtype or x.dtype)
    margins = problem.margins(eps, dtype or x.dtype)
    if how.tuned:
        problem.tune(eps.detach(), TUNING, alpha_steps)
        margins = torch.maximum(margins, problem.margins(eps, dtype or x.dtype))
    if how.curved:
        problem.tune_curves(eps.detach(), TUNING, curve_steps)
        margins = torch.maximum(margins, problem.margins(eps, dtype or x.dtype))
    if how.branches:
        margins = refine_margins(problem, eps, dtype or x.dtype, margins)
    return margins


@dataclass
class RadiusResult:
    """What a radius search found, (batch,) each.

    Attributes:
        radius: the largest eps that was certified in the verdict's precision; 0 if none was, or none that the floats
            of the input resolve (``MarginProblem.resolution``).
        failed: the smallest eps that was not certified in that precision; 0 if the clean input is not.
        margin: worst lower bound at ``radius`` less the slack for rounding (the clean one where radius is 0).
        evaluations: how many bounds were computed.
    """

    radius: Tensor
    failed: Tensor
    margin: Tensor
    evaluations: Tensor


def search_radius(
    problem: MarginProblem,
    *,
    tol: float = 1e-3,
    eps0: float | None = None,
    max_eps: float = MAX_EPS,
    dtype: torch.dtype = torch.float64,
    search_dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
) -> RadiusResult:
    """Largest certified eps of every sample: a search in ``search_dtype``, the verdict in ``dtype``.

    Bounds in ``search_dtype`` foretell the radius; then both ends of the bracket are found in ``dtype``.
    No eps above ``max_eps`` is tried: some samples, of saturating networks, are certified at any.
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
        if precision not in SLACK:
            raise ValueError(f"a radius is searched in torch.float32 or torch.float64, not {precision}")
    search = _Searcher(tol, eps0, max_eps, dtype, search_dtype)
    parts = [
        _search_rows(problem, rows, search)
        for rows in torch.arange(len(problem.x), device=problem.x.device).split(batch_size)
    ]
    return RadiusResult(*(torch.cat([getattr(part, name) for part in parts]) for name in RadiusResult.__annotations__))


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
        scout: MarginOf | None = None,
    ) -> Tensor:
        """Roughly the radii, by estimates of the margins; 0 where none is in sight."""
        scout = self.margin_of(problem, rows, self.search_dtype, sound=False) if scout is None else scout
        clean = problem.clean_margins(self.dtype, rows).amin(dim=1)
        linear = problem.linear_radius(self.search_dtype, rows).to(self.dtype)
        return foretold_radius(scout, clean, first, tol, self.max_eps, linear=linear, spread=spread)

    def calibrated(self, problem: MarginProblem, rows: Tensor, eps: Tensor) -> MarginOf:
        """Estimates of the margins, corrected by what bounds take more than they do at eps.

        That is a share of what estimates take, which grows with eps, about as its power ``EXCESS_POWER``.
        """
        everyone = torch.arange(len(rows), device=rows.device)
        estimate = self.margin_of(problem, rows, self.search_dtype, sound=False)
        clean = problem.clean_margins(self.dtype, rows).amin(dim=1)
        taken = clean - self.margin_of(problem, rows, self.dtype)(everyone, eps)
        excess = taken / (clean - estimate(everyone, eps)) - 1.0  # that of a misclassified sample does not matter
        excess, at = torch.where(excess.isfinite() & (excess > -1.0), excess, 0.0), eps

        def margin_of(chosen: Tensor, eps: Tensor) -> Tensor:
            share = 1.0 + excess[chosen] * (eps / at[chosen]) ** EXCESS_POWER
            return clean[chosen] - share * (clean[chosen] - estimate(chosen, eps))

        return margin_of

    def __call__(self, problem: MarginProblem, rows: Tensor, first: Tensor, spread: float = SPREAD) -> Bracket:
        """Search some samples of a problem, with the bounds it has by now, from their first eps on."""
        scout = None
        if problem.curves is not None:
            foretold = self.foretell(problem, rows, first, spread, FORETOLD_TOL)
            first = torch.where(foretold > 0, foretold / CURVE_EXCESS, first)
            scout = self.calibrated(problem, rows, first)
            first, spread = first / CURVE_SPREAD, CURVE_SPREAD
        elif self.search_dtype != self.dtype:
            scout = self.margin_of(problem, rows, self.search_dtype, sound=False)
        verdict = self.margin_of(problem, rows, self.dtype)
        clean = (problem.clean_margins(self.dtype, rows) - problem.slack(self.dtype, rows)).amin(dim=1)
        linear = problem.linear_radius(self.search_dtype, rows).to(self.dtype)
        aims = {"scout": scout, "linear": linear, "spread": spread, "floor": problem.resolution(self.dtype, rows)}
        found = largest_certified(verdict, clean, first, self.tol, self.max_eps, **aims)
        found.high = torch.where(clean > 0, found.high, 0.0)
        return found


def _search_rows(problem: MarginProblem, rows: Tensor, search: _Searcher) -> RadiusResult:
    """One method after the other, from the cheapest on; each begins where the one before it came to."""
    if problem.method.integrates:
        return _sweep_rows(problem, rows, search)
    started = time.perf_counter()
    problem.slopes = problem.curves = None
    first = search.first(problem, rows)
    found = search(problem, rows, first)
    if problem.method.tuned:
        overshoot, steps = torch.full_like(found.low, ALPHA_OVERSHOOT), -(-problem.method.alpha_steps // 2)
        for _ in range(2):
            aim, reached = torch.where(found.low > 0, overshoot * found.low, first), found.low
            problem.tune(aim, search.search_dtype, steps, rows)
            found = _better(found, search(problem, rows, aim, ALPHA_OVERSHOOT))
            in_vain = (found.low <= reached) & (found.low > 0)
            overshoot = torch.where(in_vain, ALPHA_NEAR, ALPHA_OVERSHOOT)
            steps = problem.method.alpha_steps if bool(in_vain.any()) else steps
    if problem.method.curved:
        steps, reached = -(-problem.method.curve_steps // len(CURVE_OVERSHOOTS)), found.low
        for overshoot in CURVE_OVERSHOOTS:
            aim = torch.where(reached > 0, overshoot * reached, first)
            problem.tune_curves(aim, search.search_dtype, steps, rows)
            reached = torch.maximum(reached, search.foretell(problem, rows, aim, overshoot, ROUGH_TOL))
        found = _better(
            found, search(problem, rows, torch.where(reached > 0, reached, first) / CURVE_EXCESS, CURVE_EXCESS)
        )
    if problem.method.branches:
        left = problem.method.time_limit - (time.perf_counter() - started) / len(rows)
        refine_radii(problem, rows, found, search, left)
    return RadiusResult(found.low, found.high, found.margin, found.evaluations)


def _sweep_rows(problem: MarginProblem, rows: Tensor, search: _Searcher) -> RadiusResult:
    """By integrated gradients; the shell rule is never below what the bounds it takes in certify by themselves."""
    found = sweep_radii(problem, rows, search)
    if problem.method.name == "shell":
        by_layers = direct_problem(problem)
        found = _better(search(by_layers, rows, search.first(by_layers, rows)), found)
    none = found.low < problem.resolution(search.dtype, rows)
    return RadiusResult(torch.where(none, 0.0, found.low), found.high, found.margin, found.evaluations)


def _better(first: Bracket, second: Bracket) -> Bracket:
    """Of two searches, per sample, the one that certified more; evaluations add up."""
    higher = second.low > first.low
    low, high, margin = (
        torch.where(higher, getattr(second, name), getattr(first, name)) for name in ("low", "high", "margin")
    )
    return Bracket(low, high, margin, first.evaluations + second.evaluations)


@plain_state()
@torch.no_grad()
def certified_radius(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    *,
    norm: float = 2.0,
    targets: Tensor | None = None,
    frames: Frames = None,
    clip: tuple[float, float] | None = None,
    ball: str = "frame",
    method: str = "crown",
    relaxation: str = "plane",
    lengths: Tensor | None = None,
    alpha_steps: int = ALPHA_STEPS,
    curve_steps: int = CURVE_STEPS,
    time_limit: float = TIME_LIMIT,
    chain: str = "chord",
    layers: str = "crown",
    tol: float = 1e-3,
    eps0: float | None = None,
    max_eps: float = MAX_EPS,
    dtype: torch.dtype = torch.float64,
    search_dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
) -> Tensor:
    """Radius per sample, (batch,), within which no perturbation changes the classification (or reaches the target).

    Arguments as for ``certified_margin``, and:

    Args:
        tol: the smallest eps that failed is at most this relative distance above the radius. "jacobian" ends inside a
            shell of its own last sweep (``utils.certify.sweep``) instead.
        eps0: first eps of the search; found from the gradient if left out. It does not change what is certified.
        max_eps: largest eps to try, and the radius of a sample that is certified even there.
        dtype: precision of the verdict, in which every returned radius was certified.
        search_dtype: precision of the search before it.
        batch_size: samples bounded at once; less needs less memory.

    Returns:
        The largest eps that certified, in the units of x; 0 where none did (a misclassified sample), or none that the
        floats of x resolve.
    """
    threat = Threat(norm, ball, frames, clip, lengths)
    how = Method(method, relaxation, alpha_steps, curve_steps, time_limit, chain, layers)
    problem = MarginProblem(Question(model, x, labels, targets, threat), how)
    search = {
        "tol": tol,
        "eps0": eps0,
        "max_eps": max_eps,
        "dtype": dtype,
        "search_dtype": search_dtype,
        "batch_size": batch_size,
    }
    return search_radius(problem, **search).radius
