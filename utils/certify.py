"""Certified margins and radii of a classifier: the Python interface."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.alpha import ALPHA_STEPS
from utils.graph import Graph
from utils.problem import METHODS, Frames, MarginProblem, check_inputs, frame_mask, margin_rows
from utils.search import SPREAD, Bracket, largest_certified

__all__ = [
    "ALPHA_STEPS",
    "METHODS",
    "SLACK",
    "Frames",
    "MarginProblem",
    "RadiusResult",
    "certified_margin",
    "certified_radius",
    "check_inputs",
    "frame_mask",
    "margin_rows",
    "search_radius",
]

# A margin counts as positive if it exceeds this share of 1 + |clean margin|: room for the rounding of sums and
# products, which the bounds, statements about real numbers, do not account for.
SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}

# Smallest first eps of a search, as a share of the radius at which the margin's linearisation vanishes.
FIRST_SHARE = 0.04

# Slopes are tuned in this many rounds, each at an eps a little above the radius reached.
ALPHA_ROUNDS = 2
ALPHA_OVERSHOOT = 1.03

# No larger eps is tried unless asked for: a sample of a saturating network can be certified at any.
MAX_EPS = 1e6


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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Lower bounds of the margins over all perturbations of size eps; differentiable in the model and in x.

    Args:
        model: the classifier, any module whose forward ``utils.trace`` can read, or a graph; its weights are read,
            never changed.
        x: (batch, T, n) sequences in the model's input units. Inputs of a module may also be (batch, T) whole numbers
            of words, whose vectors are perturbed then, or of another shape, (batch, ...), which is one frame.
        labels: (batch,) classes that must win.
        eps: radius in the units of x: a number, (batch,), or (batch, T) for one radius a frame.
        norm: p of the l_p balls: 1, 2 or inf.
        targets: (batch,) or (batch, n_specs) classes to beat; None for every other class.
        frames: which frames are perturbed (``frame_mask``); the others are exact. None for all.
        clip: valid input range (lowest, highest) to which l_inf boxes are cut.
        ball: "frame" for a ball around every frame, "sequence" for one around the whole sequence.
        method: "crown", "ibp" or "crown-ibp" (``utils.bounds``), or "alpha": "crown" with slopes tuned to the sample.
        relaxation: of an LSTM's or GRU's gate products: "plane", "volume", "line" or "constant" (``utils.planes``).
        lengths: (batch,) number of frames that count in each sample; those after are padding. None for all.
        alpha_steps: gradient steps of "alpha", each at the price of about three bounds.
        dtype: precision of the computation; that of x if left out.

    Returns:
        (batch, n_specs); a positive row cannot change sign inside the perturbation set (up to rounding; ``SLACK``).

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    threat = {"norm": norm, "frames": frames, "clip": clip, "ball": ball, "lengths": lengths}
    how = {"method": method, "relaxation": relaxation, "alpha_steps": alpha_steps}
    problem = MarginProblem(model, x, labels, targets=targets, **how, **threat)
    x = problem.x
    eps = torch.as_tensor(eps, dtype=dtype or x.dtype, device=x.device)
    if eps.dim() > 2 or (eps.dim() > 0 and eps.shape != x.shape[: eps.dim()]):
        raise ValueError(f"eps must be a number, (batch,) or (batch, T), not {tuple(eps.shape)}")
    eps = eps.expand(len(x)) if eps.dim() == 0 else eps
    margins = problem.margins(eps, dtype or x.dtype)
    if method == "alpha":
        problem.tune(eps.detach(), dtype or x.dtype, alpha_steps)
        margins = torch.maximum(margins, problem.margins(eps, dtype or x.dtype))
    return margins


@dataclass
class RadiusResult:
    """What a radius search found, (batch,) each.

    Attributes:
        radius: the largest eps that was certified in the verdict's precision; 0 if none was.
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
    if not max_eps > 0:
        raise ValueError(f"max_eps must be a positive number, not {max_eps}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    for precision in (dtype, search_dtype):
        if precision not in SLACK:
            raise ValueError(f"a radius is searched in torch.float32 or torch.float64, not {precision}")
    parts = [
        _search_rows(problem, rows, tol, eps0, max_eps, dtype, search_dtype)
        for rows in torch.arange(len(problem.x), device=problem.x.device).split(batch_size)
    ]
    return RadiusResult(*(torch.cat([getattr(part, name) for part in parts]) for name in RadiusResult.__annotations__))


def _search_rows(problem, rows: Tensor, tol: float, eps0, max_eps: float, dtype, search_dtype) -> RadiusResult:
    clean = problem.clean_margins(dtype, rows).amin(dim=1)
    slack = SLACK[dtype] * (1.0 + clean.abs())

    def margin_in(precision: torch.dtype):
        def margin_of(chosen: Tensor, eps: Tensor) -> Tensor:
            margins = problem.margins(eps, precision, rows[chosen])
            return margins.amin(dim=1).to(dtype) - slack[chosen]

        return margin_of

    problem.slopes = None
    linear = problem.linear_radius(search_dtype, rows).to(dtype)

    def search(first: Tensor, spread: float = SPREAD) -> Bracket:
        scout = None if search_dtype == dtype else margin_in(search_dtype)
        aims = {"scout": scout, "linear": linear, "spread": spread}
        return largest_certified(margin_in(dtype), clean - slack, first, tol, max_eps, **aims)

    first = FIRST_SHARE * linear if eps0 is None else torch.full_like(clean, eps0)
    found = search(first)
    if problem.method == "alpha":
        for _ in range(ALPHA_ROUNDS):
            aim = torch.where(found.low > 0, ALPHA_OVERSHOOT * found.low, first)
            problem.tune(aim, search_dtype, -(-problem.alpha_steps // ALPHA_ROUNDS), rows)
            found = _better(found, search(aim, ALPHA_OVERSHOOT))
    failed = torch.where(clean > slack, found.high, 0.0)
    return RadiusResult(found.low, failed, found.margin, found.evaluations)


def _better(first: Bracket, second: Bracket) -> Bracket:
    """Of two searches, per sample, the one that certified more; evaluations add up."""
    higher = second.low > first.low
    low, high, margin = (
        torch.where(higher, getattr(second, name), getattr(first, name)) for name in ("low", "high", "margin")
    )
    return Bracket(low, high, margin, first.evaluations + second.evaluations)


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
        tol: the smallest eps that failed is at most this relative distance above the radius.
        eps0: first eps of the search; found from the gradient if left out. It does not change what is certified.
        max_eps: largest eps to try, and the radius of a sample that is certified even there.
        dtype: precision of the verdict, in which every returned radius was certified.
        search_dtype: precision of the search before it.
        batch_size: samples bounded at once; less needs less memory.

    Returns:
        The largest eps that certified, in the units of x; 0 where none did (a misclassified sample).
    """
    threat = {"norm": norm, "frames": frames, "clip": clip, "ball": ball, "lengths": lengths}
    how = {"method": method, "relaxation": relaxation, "alpha_steps": alpha_steps}
    problem = MarginProblem(model, x, labels, targets=targets, **how, **threat)
    search = {
        "tol": tol,
        "eps0": eps0,
        "max_eps": max_eps,
        "dtype": dtype,
        "search_dtype": search_dtype,
        "batch_size": batch_size,
    }
    return search_radius(problem, **search).radius
