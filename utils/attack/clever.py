"""CLEVER for sequences: an estimate, not a bound, of the minimum distortion from sampled gradients.

A margin g that is positive at x stays so while every frame moves by less than

    g(x) / sum_t L_t,        L_t = max over the set of radius eps_0 of ||grad_{x_t} g||_q,   1/p + 1/q = 1,

as long as that is at most eps_0. The maxima are estimated by extreme-value theory: the largest gradient norm of a batch
of random points follows a reverse Weibull distribution, whose location, fitted by maximum likelihood, is L_t. The score
is min(g / sum_t L_t, eps_0); with several margins, the least. The set is the product of the frames' balls (all frames
move at once), and for a ball around the sequence it is that ball, with one gradient norm.

Points drawn evenly from a ball of many dimensions, as the original draws them, hardly change the margin when p is 1 or
inf: their gradients look like the one at x, and the score often exceeds the size of an attack. So every other point is
moved, by a random share of the way, towards a point of the set's boundary to which the margin falls
(``sampling="directed"``; "even" is the original).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

from ..network.models import SequenceClassifier
from ..network.state import plain_state
from ..perturbation.lp_ball import random_in_ball
from ..perturbation.moves import FrameBalls
from .pgd import VERDICT, AttackProblem, margin_and_gradient

SAMPLINGS = ("directed", "even")
HALVINGS = 6  # of the interval that holds the balanced radius
AIMS = 4  # points towards which the directed ones move
FIRST_SHAPES = (1.0, 10.0)  # where the likelihood's maximisation starts
# The likelihood can grow without end as shape and location do; what lies this many times the maxima's spread above
# the largest of them says nothing any more.
FARTHEST = 2.0


@plain_state()
def clever(
    model: SequenceClassifier,
    x: Tensor,
    labels: Tensor,
    *,
    eps0: float | None = None,
    batches: int = 30,
    points: int = 64,
    seed: int = 0,
    sampling: str = "directed",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 10,
    **threat: Any,
) -> Tensor:
    """CLEVER score of every sample, (batch,), float64; 0 where the input is misclassified.

    Args:
        model, x, labels: as for ``utils.certify.certified_margin``.
        eps0: radius in which gradients are sampled, the largest score. Left out, it is, per margin, near the one for
            which the score is largest (``balanced_radius``).
        batches, points: how many maxima are fitted, and of how many gradients each is the maximum.
        seed: of the points, which all samples share, so that a sample's score does not depend on the others.
        sampling: "directed" or "even".
        dtype: precision of the gradients.
        batch_size: samples handled at once.
        threat: norm, targets, frames and ball, as for ``utils.attack.AttackProblem``; inputs are not clipped.
    """
    if threat.get("clip") is not None:
        raise ValueError("CLEVER has no clipped inputs: leave out clip")
    if eps0 is not None and not 0 < eps0 < torch.inf:
        raise ValueError(f"eps0 must be a positive number, not {eps0}")
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, not {sampling!r}")
    if batches < 1 or points < 1:
        raise ValueError(f"batches and points must be at least 1, not {batches} and {points}")
    problem = AttackProblem(model, x, labels, **threat)
    problem.question.threat.check_even("CLEVER scores")
    parts = [
        _scores(problem, rows, eps0, PointSource(batches, points, seed, sampling), dtype)
        for rows in torch.arange(len(problem), device=problem.balls.x.device).split(batch_size)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class PointSource:
    """Draws ``batches`` times ``points`` perturbations from sets of radius 1, the same ones for every sample."""

    batches: int
    points: int
    seed: int
    sampling: str

    def draw(self, balls: FrameBalls, aims: Tensor) -> Iterator[Tensor]:
        """Batches of perturbations, (m, n_specs, points, T, n), some moved to ``aims``, (m, n_specs, a, T, n)."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (1, 1, self.points, balls.groups, balls.x.shape[1:].numel() // balls.groups)
        for _ in range(self.batches):
            unit = balls.frames(random_in_ball(shape, balls.norm, generator)).to(balls.x)
            unit = unit.expand(*aims.shape[:2], -1, -1, -1)
            if self.sampling == "directed":
                share = torch.rand(self.points, 1, 1, generator=generator, dtype=VERDICT).to(balls.x)
                share[::2] = 0.0
                aim = torch.randint(aims.shape[2], (self.points,), generator=generator).to(aims.device)
                unit = (1.0 - share) * unit + share * aims[:, :, aim]
            yield unit * balls.mask[:, None, None, :, None]


def _scores(problem: AttackProblem, rows: Tensor, eps0: float | None, source: PointSource, dtype) -> Tensor:
    balls = problem.balls.select(rows, VERDICT)
    at_x = balls.x[:, None].expand(-1, problem.rows.shape[1], -1, -1)
    margins, gradient = margin_and_gradient(problem, at_x, rows)
    margins = margins.diagonal(dim1=-2, dim2=-1)
    norms = balls.gradient_norms(gradient)
    if eps0 is None:
        radius = balanced_radius(problem, rows, margins.to(dtype), gradient.to(dtype), source)
    else:
        radius = torch.full_like(margins, eps0)
    maxima = gradient_maxima(problem, rows, radius.to(dtype), gradient.to(dtype), source)
    maxima = torch.maximum(maxima.to(norms), norms[:, :, None]).cpu().numpy()
    lipschitz = torch.from_numpy(np.apply_along_axis(reverse_weibull_location, 2, maxima)).to(margins)
    score = torch.minimum(margins / lipschitz.sum(dim=-1), radius.to(margins))
    return torch.where(margins > 0, score, 0.0).amin(dim=1)


def balanced_radius(
    problem: AttackProblem, rows: Tensor, margins: Tensor, gradient: Tensor, source: PointSource
) -> Tensor:
    """Per margin the least eps_0, (m, n_specs), at which g / sum_t L_t <= eps_0, by a few points without a fit.

    A larger set makes L_t larger, a smaller one limits the score. The search starts from the radius at which the margin
    would vanish were it linear: the score is at most that, as no L_t is below the gradient at x.
    """
    at_x = problem.balls.select(rows, gradient.dtype).gradient_norms(gradient)
    high = (margins.clamp(min=0.0) / at_x.sum(dim=-1)).nan_to_num(posinf=1.0)
    low = torch.zeros_like(high)
    few = replace(source, batches=2)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        largest = gradient_maxima(problem, rows, middle, gradient, few).amax(dim=2)
        above = margins / torch.maximum(largest, at_x).sum(dim=-1) > middle
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high


def gradient_maxima(
    problem: AttackProblem, rows: Tensor, radius: Tensor, gradient: Tensor, source: PointSource
) -> Tensor:
    """Largest ||grad g||_q of each batch of random points, (m, n_specs, batches, groups).

    The sets' radii are (m, n_specs); ``gradient`` is that at x, (m, n_specs, T, n).
    """
    balls = problem.balls.select(rows, radius.dtype)
    found = []
    for unit in source.draw(balls, falling_points(problem, rows, radius, gradient)):
        _, gradient = margin_and_gradient(problem, balls.x[:, None, None] + radius[:, :, None, None, None] * unit, rows)
        found.append(balls.gradient_norms(gradient).amax(dim=2))
    return torch.stack(found, dim=2)


def falling_points(problem: AttackProblem, rows: Tensor, radius: Tensor, gradient: Tensor) -> Tensor:
    """Points of the sets of radius 1 to which the margin falls, (m, n_specs, AIMS, T, n).

    Each is the mean of the corners in which the margin fell fastest at the ones before it and at x (the first steps of
    the Frank-Wolfe method).
    """
    balls = problem.balls.select(rows, radius.dtype)
    corner = balls.steepest(-gradient, torch.zeros_like(gradient))
    aims = [corner]
    for number in range(2, AIMS + 1):
        x = balls.x[:, None] + radius[:, :, None, None] * aims[-1]
        _, gradient = margin_and_gradient(problem, x, rows)
        corner = balls.steepest(-gradient, torch.zeros_like(gradient))
        aims.append(aims[-1] + (corner - aims[-1]) / number)
    return torch.stack(aims, dim=2)


def reverse_weibull_location(maxima: np.ndarray) -> float:
    """The location (right end point) of the reverse Weibull distribution fitted to maxima; at least the largest one.

    The fit starts from several shapes and the most likely end is taken. If the maxima are all the same, or no fit makes
    sense, the answer is the largest.
    """
    largest, spread = maxima.max(), maxima.std()
    if len(maxima) < 3 or spread <= 1e-9 * abs(largest):
        return float(largest)
    scaled = (maxima - largest) / spread  # in units in which the optimiser's steps make sense
    best, location = -np.inf, 0.0
    for shape in FIRST_SHAPES:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                fit = stats.weibull_max.fit(
                    scaled, shape, loc=0.1, scale=0.1 - scaled.mean(), optimizer=_minimise_roughly
                )
                likelihood = stats.weibull_max.logpdf(scaled, *fit).sum()
            except (stats.FitError, ValueError):
                continue
        if np.isfinite(likelihood) and likelihood > best and fit[1] >= 0.0:
            best, location = likelihood, fit[1]
    return float(largest + spread * min(location, FARTHEST))


def _minimise_roughly(function, start, args=(), disp=0) -> np.ndarray:
    """The location matters to a hundredth of the maxima's spread, no more."""
    return optimize.fmin(function, start, args=args, disp=disp, xtol=1e-2, ftol=1e-2)
