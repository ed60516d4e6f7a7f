"""The largest eps that certifies, for every sample of a batch at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..clock import Pace

# Margins of the samples ``rows`` (m,) at their eps (m,): positive means certified. Samples may be asked for repeatedly.
MarginOf = Callable[[Tensor, Tensor], Tensor]

MAX_ROUNDS = 100
MAX_SCOUTING = 10  # rounds in the scout's precision; a sample that is not foretold by then is left to the verdict's
LANES = 2  # eps tried at once: few samples cost hardly more than one, and two points tell more than one after another
SPREAD = 2.5  # of the two first eps
MAX_STEP = math.log(8.0)  # most that log eps moves in a round while it is bracketed on one side only


@dataclass
class Bracket:
    """Per sample, (batch,): ``low`` certified with ``margin``, ``high`` failed; 0 and inf where none did."""

    low: Tensor
    high: Tensor
    margin: Tensor
    evaluations: Tensor

    @classmethod
    def unknown(cls, margin_at_zero: Tensor) -> Bracket:
        zeros = torch.zeros_like(margin_at_zero)
        return cls(zeros.clone(), zeros + torch.inf, margin_at_zero.clone(), torch.zeros_like(zeros, dtype=torch.long))

    def of(self, chosen: Tensor) -> Bracket:
        """Brackets of their own for some samples, chosen by a mask, without evaluations."""
        parts = (self.low[chosen], self.high[chosen], self.margin[chosen])
        return Bracket(*parts, torch.zeros_like(self.evaluations[chosen]))

    def see(self, rows: Tensor, eps: Tensor, margin: Tensor) -> None:
        """Narrow the brackets of ``rows`` by the points inside them, (m, LANES) with increasing eps.

        Points beyond one that failed say nothing that is used, even if they certify.
        """
        for point, value in zip(eps.unbind(1), margin.unbind(1), strict=True):
            inside = (point > self.low[rows]) & (point < self.high[rows])
            passed, failed = inside & (value > 0), inside & ~(value > 0)
            self.low[rows] = torch.where(passed, point, self.low[rows])
            self.margin[rows] = torch.where(passed, value, self.margin[rows])
            self.high[rows] = torch.where(failed, point, self.high[rows])
        self.evaluations[rows] += eps.shape[1]

    def replace(self, rows: Tensor, again: Bracket) -> None:
        """Another search of some samples, chosen by a mask, counts for more than the one before wherever it is better.

        What failed, failed at the last attempt.
        """
        better = again.low > self.low[rows]
        self.low[rows] = torch.where(better, again.low, self.low[rows])
        self.margin[rows] = torch.where(better, again.margin, self.margin[rows])
        self.high[rows] = torch.maximum(again.high, self.low[rows])
        self.evaluations[rows] += again.evaluations

    def unfinished(self, rows: Tensor, tol: float, max_eps: float, floor: Tensor | float = 0.0) -> Tensor:
        low, high = self.low[rows], self.high[rows]
        representable = (high > torch.finfo(high.dtype).tiny / tol) & (low < torch.finfo(low.dtype).max * tol)
        if isinstance(floor, Tensor):
            representable &= high > floor[rows]
        return representable & (low < max_eps) & ~(high.isfinite() & (high - low <= tol * high))


class _Forecast:
    """Where the margin will vanish, from the points seen so far.

    The share of the clean margin that a perturbation takes, s(eps) = 1 - margin(eps) / margin(0), begins as
    eps / linear and then grows faster, much like (eps / linear) exp(k eps). Every point (eps, s) has its own k, and so
    its own r with s(r) = 1. That r hardly changes from point to point, and the radius is its value where s = 1:
    polynomials of log r in w = log s, through the points nearest to w = 0, foretell it.
    """

    POINTS = 4
    CAUTION = 0.4  # the error of a forecast, as a share of its distance from the one with a point less
    DOUBT = 0.1  # likewise, for one with a point more that was not believed

    def __init__(self, margin_at_zero: Tensor, linear: Tensor):
        self.margin_at_zero, self.linear = margin_at_zero, linear
        self.points = margin_at_zero.new_empty(3, len(margin_at_zero), 0)  # log eps, w, log r; NaN where not evaluated

    def see(self, rows: Tensor, eps: Tensor, margin: Tensor) -> None:
        share = (1.0 - margin / self.margin_at_zero[rows, None]).clamp(min=1e-9, max=1e9)
        seen = self.points.new_full((3, self.points.shape[1], eps.shape[1]), torch.nan)
        seen[:, rows] = torch.stack((eps.log(), share.log(), _log_radius_through(eps, share, self.linear[rows, None])))
        self.points = torch.cat((self.points, seen), dim=2)

    def radius(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the radius, between the logs of a bracket's ends, and its likely error."""
        nearest = self.points[1, rows].abs().argsort(dim=1, stable=True)[:, : self.POINTS]
        u, w, log_r = self.points[:, rows].gather(2, nearest.expand(3, -1, -1))
        foretold, error = log_r[:, 0], torch.full_like(low, torch.inf)
        for points in range(2, w.shape[1] + 1):
            better = _interpolate_at_zero(w[:, :points], log_r[:, :points])
            distance = (better - foretold).abs()
            believed = (better > low) & (better < high) & (distance < error)  # False for NaN
            doubt = torch.maximum(error, self.DOUBT * distance.nan_to_num(0.0).clamp(max=1.0))
            foretold, error = torch.where(believed, better, foretold), torch.where(believed, distance, doubt)
        # Where eps hardly matters, as all is saturated, the radius is far away.
        flat = (w[:, 1] - w[:, 0]).abs() < 0.5 * (u[:, 1] - u[:, 0]).abs()
        foretold = torch.where(flat, u[:, 0] - w[:, 0].sign() * MAX_STEP, foretold)
        error = self.CAUTION * torch.where(flat, torch.inf, error)
        bracketed = low.isfinite() & high.isfinite()
        inside = (foretold > low) & (foretold < high)
        return torch.where(bracketed & ~inside, 0.5 * (low + high), foretold), error


def _log_radius_through(eps: Tensor, share: Tensor, linear: Tensor) -> Tensor:
    """Log of the r at which (eps / linear) exp(k eps) becomes 1, with the k that runs through a point.

    That is r = W(k linear) / k with Lambert's W: y + k exp(y) = log linear for y = log r. Without such a k > 0 a point
    is taken for one of a straight line.
    """
    straight = eps.log() - share.log()
    k = (straight < linear.log()) * (linear.log() - straight) / eps
    z = torch.where((k > 0) & k.isfinite(), k * linear, 1.0)
    w = z.log1p() * (1.0 - z.log1p().log1p() / (2.0 + z.log1p()))  # within 2 % of W(z)
    for _ in range(3):  # Newton steps on w + log w = log z
        w = w * (1.0 + z.log() - w.log()) / (1.0 + w)
    return torch.where((k > 0) & k.isfinite(), w.log() - k.log(), straight)


def _interpolate_at_zero(w: Tensor, values: Tensor) -> Tensor:
    """At w = 0, the polynomial through the points (w, value), (m, points); NaN or inf if some w are equal."""
    others = w[:, None, :] / (w[:, None, :] - w[:, :, None])
    others.diagonal(dim1=1, dim2=2).fill_(1.0)
    return (values * others.prod(dim=2)).sum(dim=1)


class _Search:
    """A bracket and a forecast that grow by rounds of ``LANES`` evaluations of every sample."""

    ASIDE = 0.4  # two eps this share of the tolerance on either side of the radius finish a sample
    PATIENCE = 2  # rounds in which the (logarithmic) bracket must halve, or it is cut into thirds

    def __init__(
        self,
        margin_at_zero: Tensor,
        first: Tensor,
        linear: Tensor,
        spread: float,
        tol: float,
        max_eps: float,
        floor: Tensor | float = 0.0,
    ):
        self.bracket, self.forecast = Bracket.unknown(margin_at_zero), _Forecast(margin_at_zero, linear)
        self.tol, self.max_eps, self.floor = tol, max_eps, floor
        self.sighted = torch.zeros_like(first, dtype=torch.bool)  # which the scout saw certified
        self.aside = self.ASIDE * tol
        self.eps = torch.stack((first, first * spread), dim=1).clamp(max=max_eps)
        # Log of the foretold radius and its likely error.
        self.foretold, self.error = first.log(), torch.full_like(first, torch.inf)
        self._restart(torch.arange(len(first), device=first.device))
        self.rows = (margin_at_zero > 0).nonzero().squeeze(-1)

    def _restart(self, rows: Tensor) -> None:
        self.rows = rows
        self.rounds = 0
        self.goal, self.left = torch.zeros_like(self.error), torch.zeros_like(self.error)

    def round(self, margin_of: MarginOf) -> None:
        """Evaluate, narrow the bracket and choose the next eps; finished samples leave."""
        rows, eps = self.rows, self.eps[self.rows]
        margin = margin_of(rows.repeat_interleave(LANES), eps.flatten()).reshape(eps.shape)
        if bool(margin.isnan().any()):
            raise ArithmeticError(f"a bound is NaN at eps = {eps[margin.isnan()][0]:.3g}: the numbers overflow")
        self.bracket.see(rows, eps, margin)
        self.forecast.see(rows, eps, margin)
        self.rounds += 1
        self.eps[rows] = self._next(rows).exp().clamp(max=self.max_eps)
        self.rows = rows[self.bracket.unfinished(rows, self.tol, self.max_eps, self.floor)]

    def _next(self, rows: Tensor) -> Tensor:
        """Logs of the next eps, (m, LANES): on both sides of the foretold radius, by its likely error."""
        low, high = self.bracket.low[rows].log(), self.bracket.high[rows].log()
        foretold, error = self.forecast.radius(rows, low, high)
        self.foretold[rows], self.error[rows] = foretold, error
        # On one side of all that was seen, the step grows from round to round: a margin that stays near 0 or that
        # does not react at all foretells none.
        least = min(self.aside * 8.0 ** (self.rounds - 1), MAX_STEP)
        only_low, only_high = high.isinf(), low.isinf()
        foretold = torch.where(only_low, foretold.clamp(low + least, low + MAX_STEP), foretold)
        foretold = torch.where(only_high, foretold.clamp(high - MAX_STEP, high - least), foretold)
        room = torch.where(only_low, foretold - low, torch.where(only_high, high - foretold, 0.5 * (high - low)))
        aside = torch.minimum(error, 0.5 * room).clamp(min=self.aside)
        nearest = torch.minimum(0.3 * (high - low), torch.full_like(low, self.aside))
        left = torch.maximum(foretold - aside, low + nearest)
        right = torch.minimum(foretold + aside, high - nearest)
        pair = torch.stack((torch.minimum(left, right), torch.maximum(left, right)), dim=1)
        thirds = torch.stack((low + (high - low) / 3, high - (high - low) / 3), dim=1)
        return torch.where(self._stalled(rows, high - low)[:, None], thirds, pair)

    def _stalled(self, rows: Tensor, width: Tensor) -> Tensor:
        halved = ~(width > self.goal[rows])
        left = torch.where(halved, self.PATIENCE, self.left[rows] - 1)
        stalled = (left <= 0) & width.isfinite()
        self.left[rows] = left
        self.goal[rows] = torch.where(halved | stalled, 0.5 * width, self.goal[rows])
        return stalled

    def rounds_in_time(self, margin_of: MarginOf, most: int, pace: Pace) -> Iterator[None]:
        """Rounds until all samples have left, at most so many; ``pace`` is of bounds of one sample at one eps."""
        while (bounds := LANES * self.rows.numel()) and self.rounds < most and pace.allows(bounds):
            with pace.work(bounds):
                self.round(margin_of)
            yield

    def scout(self, margin_of: MarginOf, pace: Pace) -> None:
        """Foretell the radii by margins that count as no verdict."""
        first, classified = self.eps.clone(), self.rows
        for _ in self.rounds_in_time(margin_of, MAX_SCOUTING, pace):
            self.rows = self.rows[self.error[self.rows] > self.aside]
        pair = torch.stack((self.foretold - self.aside, self.foretold + self.aside), dim=1).exp()
        self.sighted = self.bracket.low > 0
        self.eps = torch.where(self.sighted[:, None], pair.clamp(max=self.max_eps), first)
        unknown = Bracket.unknown(self.forecast.margin_at_zero)
        unknown.evaluations, self.bracket = self.bracket.evaluations, unknown
        # Where verdicts differ from the scout's margins, its points would lead astray.
        self.forecast = _Forecast(self.forecast.margin_at_zero, self.forecast.linear)
        self._restart(classified)


def largest_certified(
    margin_of: MarginOf,
    margin_at_zero: Tensor,
    first: Tensor,
    tol: float,
    max_eps: float = math.inf,
    *,
    scout: MarginOf | None = None,
    known: tuple[Tensor, Tensor, Tensor] | None = None,
    linear: Tensor | None = None,
    spread: float = SPREAD,
    floor: Tensor | float = 0.0,
    pace: Pace | None = None,
    scout_pace: Pace | None = None,
) -> Bracket:
    """Shrink a bracket per sample until its width is at most ``tol`` times its upper end.

    Every eps in ``low`` was certified by its own evaluation, so nothing depends on the margin being monotone or smooth;
    smoothness makes it quick. Samples with ``margin_at_zero`` <= 0 (misclassified) get 0 and cost nothing.

    Args:
        margin_of: the bound; finished samples leave the batch.
        margin_at_zero: margin of the clean input, (batch,).
        first: smallest eps to try first, (batch,), > 0.
        tol: relative width (high - low) / high at which a sample is finished.
        max_eps: largest eps to try; a sample that is certified there is finished, with ``high`` = inf.
        scout: a cheaper bound of nearly the same value. It finds out which eps to try, and decides nothing.
        known: what ``margin_of`` gave already: samples (m,), which may not be misclassified, their eps and margins.
        linear: eps at which the margin's linearisation at 0 vanishes, (batch,); it helps to foretell the radius.
        spread: the quotient of the two eps that are tried first.
        floor: a smaller eps, (batch,), is none: a sample that fails there is finished, and ``low`` is 0.
        pace: of bounds of one sample at one eps; where the next round would end too late, brackets stay wide.
        scout_pace: likewise, of ``scout``.

    Raises:
        ArithmeticError: a margin came out as NaN.
    """
    linear = torch.full_like(first, torch.inf) if linear is None else linear
    search = _Search(margin_at_zero, first, linear, spread, tol, max_eps, floor)
    if scout is not None:
        search.scout(scout, scout_pace or Pace())
    if known is not None:
        rows, eps, margin = known
        search.bracket.see(rows, eps[:, None], margin[:, None])
        search.forecast.see(rows, eps[:, None], margin[:, None])
    for _ in search.rounds_in_time(margin_of, MAX_ROUNDS, pace or Pace()):
        pass
    found = search.bracket
    none = found.low < floor
    found.low = torch.where(none, 0.0, found.low)
    found.margin = torch.where(none, margin_at_zero, found.margin)
    return found


def foretold_radius(
    margin_of: MarginOf,
    margin_at_zero: Tensor,
    first: Tensor,
    tol: float,
    max_eps: float = math.inf,
    *,
    linear: Tensor,
    spread: float = SPREAD,
    pace: Pace | None = None,
) -> Tensor:
    """The largest eps that ``margin_of`` makes out to certify, nearly, (batch,); 0 where it finds none.

    Arguments as for ``largest_certified``; nothing is decided by it.
    """
    search = _Search(margin_at_zero, first, linear, spread, tol, max_eps)
    search.scout(margin_of, pace or Pace())
    sure = search.sighted | (search.error <= search.aside)  # points that all failed can foretell where none does
    return torch.where(sure, search.foretold.exp().clamp(max=max_eps), 0.0)
