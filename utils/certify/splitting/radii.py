"""A sample's certified radius, raised by splitting neurons at an eps a little above it, again and again."""

from __future__ import annotations

import torch

from ...clock import now, share_of
from ..problem import MarginProblem
from ..search import Bracket
from .margins import split_margins
from .question import TUNING

FIRST_STEP = 1.1  # over what is certified; half as far after each try in vain
TRY_SHARE = 0.3  # of the time left that one eps may take


@torch.no_grad()
def raise_radius(
    problem: MarginProblem, found: Bracket, dtype: torch.dtype, tol: float, max_eps: float, deadline: float
) -> None:
    """Raise the radius of a problem's only sample, ``found``'s, in place, until time is up or steps are below ``tol``.

    Args:
        problem: of one sample, that ``can_split``.
        found: what is known of it; nothing is tried where that is a radius of 0.
        dtype: precision of the bounds.
        tol: relative.
        max_eps: no larger eps is tried.
        deadline: ``clock.now()`` at which this ends.
    """
    planes, step = problem.by("alpha"), FIRST_STEP
    slack = planes.slack(dtype)[0]
    while 0 < float(found.low) < max_eps and step - 1.0 > tol and now() < deadline:
        aim = (step * found.low).clamp(max=max_eps).to(dtype)
        if planes.slopes is None:
            planes.tune(aim, TUNING, planes.method.alpha_steps)
        margins = planes.margins(aim, dtype)[0]
        if bool((margins <= slack).any()):
            margins = split_margins(planes, aim, margins, slack, share_of(deadline, TRY_SHARE))
        found.evaluations += 1
        least = (margins - slack).min()
        if bool(least > 0):
            found.low[0], found.margin[0] = aim[0], least
            found.high[found.high <= found.low] = torch.inf
        else:
            found.high[0] = torch.minimum(found.high[0], aim[0]) if found.high[0] > found.low[0] else aim[0]
            step = 1.0 + 0.5 * (step - 1.0)
