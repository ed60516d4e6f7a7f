"""Local Lipschitz constants, sampled ones beside them, and balls without a stationary point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..choices.method import Method
from ..graph.graph import Graph
from ..jacobian.passes import JacobianPass
from ..jacobian.shells import values_pass
from ..network.outputs import VALUES
from ..network.state import plain_state
from ..perturbation.lp_ball import dual_norm
from ..question.question import Question
from ..question.threat import Frames, Threat
from .problem import MarginProblem
from .search import Bracket, largest_certified

SMALLEST_EPS = 1e-9  # what is asked at eps = 0 is answered for a ball of this size
AT_ONCE = 64  # samples and rows in one pass


@dataclass
class LocalLipschitz:
    """Upper bounds of how fast rows of the output change inside the balls around some samples.

    Attributes:
        constant: (batch, n_rows): |C f(x') - C f(x)| <= constant * size, where size is that of x' - x: the largest
            norm of a frame's part, or with ``ball="sequence"`` the norm of all.
        frames: (batch, n_rows, T): likewise of changes in one frame, wherever in their balls the others are; 0 for
            frames that are exact in the threat model.
    """

    constant: Tensor
    frames: Tensor


@plain_state()
@torch.no_grad()
def local_lipschitz(
    model: nn.Module | Graph,
    x: Tensor,
    eps: float | Tensor,
    rows: Tensor,
    *,
    norm: float = 2.0,
    frames: Frames = None,
    ball: str = "frame",
    chain: str = "joint",
    layers: str = "crown",
    direction: str = "backward",
    relaxation: str = "plane",
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> LocalLipschitz:
    """Local Lipschitz constants of rows of the output over balls around x.

    Args:
        model, x, norm, frames, ball, relaxation, lengths: as for ``utils.certify.certified_margin``.
        eps: radius of the balls in the units of x, a number or (batch,).
        rows: C, (batch or 1, n_rows, classes) or (n_rows, classes): which functions of the outputs. A row of the
            identity is an output, ``utils.certify.margin_rows`` gives margins.
        chain, layers: as for ``certified_margin``.
        direction: "both": entries of the gradient are bounded from the input on, too; slow where inputs are wide.
            "shift": of perceptrons, by RecurJac's shift 1 alone.
        dtype: precision.

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    threat = Threat(norm, ball, frames, None, lengths)
    problem = _problem(model, x, rows, threat, Method("crown", relaxation, chain=chain, layers=layers))
    eps = problem.question.eps(eps, dtype).clamp(min=SMALLEST_EPS)
    if eps.dim() != 1:
        raise ValueError("a Lipschitz constant has one eps a sample: give a number or (batch,)")
    size = max(1, AT_ONCE // problem.rows.shape[1])
    parts = [
        _constants(problem, part, eps[part], dtype, direction) for part in torch.arange(len(problem.x)).split(size)
    ]
    return LocalLipschitz(*(torch.cat([getattr(part, name) for part in parts]) for name in ("constant", "frames")))


def _problem(model, x: Tensor, rows: Tensor, threat: Threat, method: Method) -> MarginProblem:
    """The problem whose spec matrix is ``rows``, in place of margins of a label."""
    question = Question(model, x, torch.zeros(len(x), dtype=torch.long), None, threat, VALUES)
    rows = rows if rows.dim() == 3 else rows[None]
    if rows.shape[0] not in (1, len(question.x)) or rows.shape[2] != question.rows.shape[2]:
        wanted = f"(batch or 1, n_rows, {question.rows.shape[2]})"
        raise ValueError(f"rows must be {wanted}, one number an output, not {tuple(rows.shape)}")
    question.rows = rows.to(question.rows.device, torch.float64).expand(len(question.x), -1, -1)
    return MarginProblem(question, method)


def _pass(
    problem: MarginProblem, samples: Tensor, eps: Tensor, dtype: torch.dtype, direction: str = "backward"
) -> JacobianPass:
    graph, method = problem.graph(dtype, samples), problem.method
    perturbation = problem.threat.part(samples).around(problem.x[samples].to(dtype), eps.to(dtype))
    values = values_pass(graph, perturbation, method.layers)
    return JacobianPass(values, problem.rows[samples].to(dtype), method.chain, direction=direction)


def _constants(
    problem: MarginProblem, samples: Tensor, eps: Tensor, dtype: torch.dtype, direction: str
) -> LocalLipschitz:
    bounds = _pass(problem, samples, eps, dtype, direction)
    falls = bounds.frame_falls()
    together = bounds.perturbation.total_deviation([fall[:, None] for fall in falls.unbind(1)]).squeeze(-1)
    shape = (len(samples), -1)
    return LocalLipschitz(
        together.reshape(shape) / eps[:, None], falls.reshape(*shape, falls.shape[1]) / eps[:, None, None]
    )


@plain_state()
@torch.no_grad()
def sampled_lipschitz(
    model: nn.Module | Graph,
    x: Tensor,
    eps: float | Tensor,
    rows: Tensor,
    *,
    norm: float = 2.0,
    frames: Frames = None,
    ball: str = "frame",
    lengths: Tensor | None = None,
    samples: int = 100,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LocalLipschitz:
    """The largest of what gradients at random points of the balls give: lower bounds of ``local_lipschitz``'s.

    Half of the points are on the balls' boundary. ``frames`` of the result are of points where all frames move.
    """
    threat = Threat(norm, ball, frames, None, lengths)
    problem = _problem(model, x, rows, threat, Method())
    eps = problem.question.eps(eps, dtype).clamp(min=SMALLEST_EPS)
    moves = problem.threat.moves(problem.x.to(dtype))
    graph, specs, mask = problem.graph(dtype), problem.rows.to(dtype), problem.threat.frames
    constant = specs.new_zeros(specs.shape[:2])
    each = specs.new_zeros(*specs.shape[:2], problem.x.shape[1])
    starts = moves.random_starts(samples, torch.Generator().manual_seed(seed))
    for start in starts.unbind(1):
        at = problem.x.to(dtype) + moves.scaled(start, moves.per_group(eps))
        sizes = torch.stack([_gradient_sizes(graph, at, row, norm) for row in specs.unbind(1)], dim=1) * mask[:, None]
        each = torch.maximum(each, sizes)
        units = problem.threat.around(problem.x.to(dtype), torch.ones_like(eps))
        constant = torch.maximum(constant, units.total_deviation(list(sizes.unbind(2))))
    return LocalLipschitz(constant, each)


def _gradient_sizes(graph: Graph, x: Tensor, row: Tensor, norm: float) -> Tensor:
    """Dual norms of the gradient of ``row @ output`` in each frame, (batch, T)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((row * graph.evaluate(x)).sum(), x)
    return dual_norm(gradient, norm)


# --- balls without a stationary point ---------------------------------------------------------------------------------


@plain_state()
@torch.no_grad()
def radius_without_stationary_point(
    model: nn.Module | Graph,
    x: Tensor,
    rows: Tensor,
    *,
    norm: float = 2.0,
    frames: Frames = None,
    ball: str = "frame",
    chain: str = "joint",
    layers: str = "crown",
    relaxation: str = "plane",
    lengths: Tensor | None = None,
    directions: bool = True,
    tol: float = 1e-3,
    max_eps: float = 100.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Largest eps, (batch,), for which some function of the gradient surely is not 0 anywhere in the ball.

    That is an entry of the gradient whose bounds exclude 0 strictly or, with ``directions``, a direction d with
    d . gradient > 0: the gradient at x, and the signs of all entries that have one (RecurJac, section 4.3, has entries
    alone). Arguments as for ``local_lipschitz``, with one row a sample, and ``tol``, ``max_eps`` as for
    ``certified_radius``.
    """
    asked = {"norm": norm, "frames": frames, "ball": ball, "chain": chain, "layers": layers, "lengths": lengths}
    asked |= {"relaxation": relaxation, "directions": directions, "tol": tol, "max_eps": max_eps, "dtype": dtype}
    return search_without_stationary_point(model, x, rows, **asked).low


@plain_state()
@torch.no_grad()
def search_without_stationary_point(
    model: nn.Module | Graph,
    x: Tensor,
    rows: Tensor,
    *,
    norm: float,
    frames: Frames = None,
    ball: str = "frame",
    chain: str,
    layers: str,
    relaxation: str = "plane",
    lengths: Tensor | None = None,
    directions: bool,
    tol: float,
    max_eps: float,
    dtype: torch.dtype,
) -> Bracket:
    """``radius_without_stationary_point`` with all that the search found; its margins are of the surest function."""
    threat = Threat(norm, ball, frames, None, lengths)
    problem = _problem(model, x, rows, threat, Method("crown", relaxation, chain=chain, layers=layers))
    if problem.rows.shape[1] != 1:
        raise ValueError("a stationary point is one of a single function: give one row a sample")
    everyone = torch.arange(len(problem.x))
    parts = everyone.split(AT_ONCE)

    def surest(chosen: Tensor, eps: Tensor) -> Tensor:
        pieces = zip(chosen.split(AT_ONCE), eps.split(AT_ONCE), strict=True)
        return torch.cat([_surest(_pass(problem, own, size, dtype), directions) for own, size in pieces])

    at_zero = torch.cat([surest(part, torch.full((len(part),), SMALLEST_EPS, dtype=dtype)) for part in parts])
    first = torch.full_like(at_zero, 0.01)
    return largest_certified(surest, at_zero, first, tol, max_eps)


def _surest(bounds: JacobianPass, directions: bool) -> Tensor:
    """The greatest lower bound of |entry|, or of a unit direction's share of the gradient, (batch,)."""
    found = bounds.perturbation.x.new_full((len(bounds.perturbation.x),), -torch.inf)
    for frame in bounds.frames:
        low, high = bounds.frame_bounds(frame)
        found = torch.maximum(found, torch.maximum(low, -high).amax(dim=1))
        if not directions:
            continue
        node, weight = bounds.adjoint.frames[frame]
        signs = (low > 0).to(low) - (high < 0).to(low)
        for direction in (signs, 0.5 * (low + high)):
            direction = torch.nn.functional.normalize(direction, dim=1)
            found = torch.maximum(found, bounds.least(node, (direction @ weight.T)[:, None]).squeeze(-1))
    return found
