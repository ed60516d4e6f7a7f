"""The largest eps that certifies, for every sample of a batch at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Margins of the samples ``rows`` (m,) at their eps (m,): positive means certified.
MarginOf = Callable[[Tensor, Tensor], Tensor]

MAX_EVALUATIONS = 100
MAX_STEP = 8.0  # most that eps grows or shrinks by in one step while it is bracketed on one side only
TYPICAL_ORDER = 2.8  # the loss of margin grows like this power of eps near the radius (measured on vanilla RNNs)


@dataclass
class Bracket:
    """Per sample, (batch,): ``low`` certified with ``margin``, ``high`` failed; 0 and inf where none did."""

    low: Tensor
    high: Tensor
    margin: Tensor
    evaluations: Tensor


class _Forecast:
    """Where the margin will vanish, from the points seen so far.

    The share of the clean margin that a perturbation takes, s(eps) = 1 - margin(eps) / margin(0), is close to a power
    of eps, so u = log eps is interpolated as a smooth function of w = log s; the radius is where w = 0.
    """

    def __init__(self, margin_at_zero: Tensor):
        self.margin_at_zero = margin_at_zero
        nothing = torch.full_like(margin_at_zero, torch.nan)
        # (u, w) of the largest certified eps, of the smallest failed one, and of the point seen before these.
        self.low, self.high, self.older = ((nothing.clone(), nothing.clone()) for _ in range(3))

    def see(self, rows: Tensor, eps: Tensor, margin: Tensor) -> None:
        u = eps.log()
        w = (1.0 - margin / self.margin_at_zero[rows]).clamp(min=1e-9, max=1e9).log()
        passed = margin > 0
        for kind in range(2):
            coordinate = (u, w)[kind]
            replaced = torch.where(passed, self.low[kind][rows], self.high[kind][rows])
            self.older[kind][rows] = torch.where(replaced.isnan(), self.older[kind][rows], replaced)
            self.low[kind][rows] = torch.where(passed, coordinate, self.low[kind][rows])
            self.high[kind][rows] = torch.where(passed, self.high[kind][rows], coordinate)

    def radius(self, rows: Tensor, evaluations: Tensor) -> Tensor:
        """The foretold radius; between the bracket's ends where there are two, else at least a least step away.

        The least step grows with the number of evaluations: a margin that stays near 0 foretells no step at all.
        """
        (u_low, w_low), (u_high, w_high), (u_old, w_old) = (
            (u[rows], w[rows]) for u, w in (self.low, self.high, self.older)
        )
        one_sided = u_low.isnan() | u_high.isnan()
        u_seen, w_seen = torch.where(u_low.isnan(), u_high, u_low), torch.where(w_low.isnan(), w_high, w_low)
        order = ((w_seen - w_old) / (u_seen - u_old)).clamp(0.5, 4.0)
        order = torch.where(order.isnan(), TYPICAL_ORDER, order)
        step = (-w_seen / order).clamp(-_log(MAX_STEP), _log(MAX_STEP))
        at_least = (_log(1.1) * 2.0 ** (evaluations - 3).clamp(0, 10)).clamp(max=_log(MAX_STEP))
        step = torch.where(u_low.isnan(), torch.minimum(step, -at_least), torch.maximum(step, at_least))
        secant = u_low - w_low * (u_high - u_low) / (w_high - w_low)
        secant = torch.where(w_high > w_low, secant, 0.5 * (u_low + u_high))
        quadratic = (
            u_low * w_high * w_old / ((w_low - w_high) * (w_low - w_old))
            + u_high * w_low * w_old / ((w_high - w_low) * (w_high - w_old))
            + u_old * w_low * w_high / ((w_old - w_low) * (w_old - w_high))
        )
        inside = (quadratic > u_low) & (quadratic < u_high)  # False where a point is missing
        return torch.where(one_sided, u_seen + step, torch.where(inside, quadratic, secant)).exp()


def _log(factor: float) -> float:
    return torch.tensor(factor).log().item()


def largest_certified(
    margin_of: MarginOf, margin_at_zero: Tensor, first: Tensor, tol: float, max_eps: float = math.inf
) -> Bracket:
    """Shrink a bracket per sample until its width is at most ``tol`` times its upper end.

    Every eps in ``low`` was certified by its own evaluation, so nothing depends on the margin being monotone or smooth;
    smoothness makes it quick. Samples with ``margin_at_zero`` <= 0 (misclassified) get 0 and cost nothing.

    Args:
        margin_of: the bound; finished samples leave the batch.
        margin_at_zero: margin of the clean input, (batch,).
        first: eps to try first, (batch,), > 0.
        tol: relative width (high - low) / high at which a sample is finished.
        max_eps: largest eps to try; a sample that is certified there is finished, with ``high`` = inf.

    Raises:
        ArithmeticError: a margin came out as NaN.
    """
    zeros = torch.zeros_like(margin_at_zero)
    bracket = Bracket(
        zeros.clone(), zeros + torch.inf, margin_at_zero.clone(), torch.zeros_like(zeros, dtype=torch.long)
    )
    forecast = _Forecast(margin_at_zero)
    aim = _Aim(zeros, tol)
    eps = first.clamp(max=max_eps)
    rows = (margin_at_zero > 0).nonzero().squeeze(-1)
    for _ in range(MAX_EVALUATIONS):
        if rows.numel() == 0:
            break
        margin = margin_of(rows, eps[rows])
        if bool(margin.isnan().any()):
            raise ArithmeticError(f"a bound is NaN at eps = {eps[rows][margin.isnan()][0]:.3g}: the numbers overflow")
        passed = margin > 0
        bracket.low[rows] = torch.where(passed, eps[rows], bracket.low[rows])
        bracket.high[rows] = torch.where(passed, bracket.high[rows], eps[rows])
        bracket.margin[rows] = torch.where(passed, margin, bracket.margin[rows])
        bracket.evaluations[rows] += 1
        forecast.see(rows, eps[rows], margin)
        eps[rows] = aim.next(bracket, rows, forecast.radius(rows, bracket.evaluations[rows])).clamp(max=max_eps)
        rows = rows[_unfinished(bracket, rows, tol) & (bracket.low[rows] < max_eps)]
    return bracket


class _Aim:
    """Chooses the next eps from the bracket and the foretold radius."""

    PATIENCE = 3  # evaluations in which the (logarithmic) bracket must halve, or it is bisected

    def __init__(self, like: Tensor, tol: float):
        self.tol = tol
        self.foretold = torch.full_like(like, torch.nan)
        self.goal, self.left = torch.zeros_like(like), torch.zeros_like(like)

    def next(self, bracket: Bracket, rows: Tensor, foretold: Tensor) -> Tensor:
        """Beside the foretold radius, by half a tolerance or the forecast's likely error, towards the farther end.

        If the forecast holds, the bracket's far end comes close; once both ends are close, the sample is finished.
        """
        low, high = bracket.low[rows], bracket.high[rows]
        error = (0.1 * (foretold - self.foretold[rows]).abs()).nan_to_num(0.0)
        self.foretold[rows] = foretold
        aside = torch.maximum(error, 0.4 * self.tol * foretold)
        aimed = torch.where(foretold / low > high / foretold, foretold - aside, foretold + aside)
        nearest = torch.minimum(0.4 * self.tol * low, 0.3 * (high - low))
        aimed = torch.minimum(torch.maximum(aimed, low + nearest), high - nearest)
        bracketed = (low > 0) & high.isfinite()
        return torch.where(
            bracketed, torch.where(self._stalled(rows, high / low), (low * high).sqrt(), aimed), foretold
        )

    def _stalled(self, rows: Tensor, ratio: Tensor) -> Tensor:
        width = ratio.log()
        halved = ~(width > self.goal[rows])
        left = torch.where(halved, self.PATIENCE, self.left[rows] - 1)
        stalled = left <= 0
        self.left[rows] = left
        self.goal[rows] = torch.where(halved | stalled, 0.5 * width, self.goal[rows])
        return stalled


def _unfinished(bracket: Bracket, rows: Tensor, tol: float) -> Tensor:
    low, high = bracket.low[rows], bracket.high[rows]
    representable = (high > torch.finfo(high.dtype).tiny / tol) & (low < torch.finfo(low.dtype).max * tol)
    return representable & ~(high.isfinite() & (high - low <= tol * high))
