"""Lower and upper bounds of whatever a module returns, or of any linear functions of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...choices.method import ALPHA_STEPS, CURVE_STEPS, Method
from ...graph.graph import Graph
from ...network.outputs import SeveralOutputs
from ...network.state import plain_state
from ...perturbation.lp_ball import INF
from ...question.arguments import as_tensor, check_precision
from ...question.elements import box_of
from ...question.question import OutputQuestion, Question
from ...question.threat import Frames, Threat
from ..interface import tuned_margins
from ..problem import MarginProblem
from ..results.progress import Progress, reported


class OutputBounds(NamedTuple):
    """``lower <= output <= upper`` at every input of the perturbation set."""

    lower: Tensor
    upper: Tensor


@plain_state()
def output_bounds(
    model: nn.Module | Graph,
    x: Tensor | None = None,
    eps: float | Tensor | None = None,
    *,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    C: Tensor | None = None,
    output: Any = None,
    norm: float = 2.0,
    frames: Frames = None,
    clip: tuple[float, float] | None = None,
    ball: str = "frame",
    method: str = "crown",
    relaxation: str = "plane",
    lengths: Tensor | None = None,
    features: Any = None,
    scales: Any = None,
    alpha_steps: int = ALPHA_STEPS,
    curve_steps: int = CURVE_STEPS,
    chain: str = "joint",
    layers: str = "crown",
    extra: Any = None,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 100,
    progress: Progress = None,
) -> OutputBounds | dict | tuple | list:
    """Bounds of a module's outputs over all perturbations of size eps, whatever they mean: differentiable in x.

    Arguments as for ``certified_margin``, and:

    Args:
        model: any module that can be read, with outputs (batch, ...) of any shape, or tuples and dicts of such.
        lower, upper: in place of x and eps a box, of the shape of the input: lower <= x' <= upper, for every element.
        C: linear functions of the outputs: (n_specs, outputs) for all samples or (batch, n_specs, outputs), where the
            outputs may be one axis or as many as the model has. The difference of two outputs is bounded tighter by
            a row of C than by their bounds. None for every output by itself.
        output: which part of a tuple (a number) or a dict (a key) is meant; a tuple of these for what lies deeper.
            None for all: the result is a tuple or dict of bounds then, without what is None.
        dtype: precision of the bounds.
        batch_size: samples bounded at once, after which ``progress`` hears of them: True for a bar on a terminal, or a
            function of the number of samples done and of all. Each part of a tuple or dict counts anew.

    Returns:
        Lower and upper, in the shape of the outputs, (batch, ...), or (batch, n_specs) with C. Room for rounding is
        taken off and added (``SLACK``), as where a radius is certified.

    Raises:
        ValueError: an argument does not fit; the message says which. ``UnsupportedError``, if what the forward does,
            such as a softmax at its end, has no bound.
    """
    how = Method(method, relaxation, alpha_steps, curve_steps, chain=chain, layers=layers)
    if how.branches:
        raise ValueError("method bab decides signs of margins: take curve for bounds of outputs")
    check_precision(dtype)
    if lower is not None or upper is not None:
        if x is not None or eps is not None or lower is None or upper is None or scales is not None:
            raise ValueError("give x and eps, or lower and upper")
        (x, scales), eps, norm = box_of(lower, upper), 1.0, INF
    elif x is None or eps is None:
        raise ValueError("give x and eps, or lower and upper")
    threat = Threat(norm, ball, frames, clip, lengths, features, scales)

    def bounds_of(path: Any) -> OutputBounds | dict | tuple | list:
        try:
            question = OutputQuestion(model, x, threat, path, extra)
        except SeveralOutputs as several:
            if C is not None:
                raise ValueError(f"C is of one output: say which by output=, one of {list(several.keys)}") from None
            before = () if path is None else path if isinstance(path, tuple) else (path,)
            parts = {key: bounds_of((*before, key)) for key in several.keys}
            return parts if several.kind is dict else several.kind(parts.values())
        rows, shape = question.rows, (-1, *question.shape)
        if C is not None:
            rows, shape = as_rows(C, question), (len(question.x), -1)
        sides = _in_parts(question, rows, question.eps(eps, dtype), how, dtype, batch_size, progress)
        return OutputBounds(*(part.reshape(shape) for part in sides))

    return bounds_of(output)


def as_rows(C: Any, question: OutputQuestion) -> Tensor:
    """Rows of a user as (batch or 1, n_specs, outputs)."""
    outputs, batch = question.shape.numel(), len(question.x)
    meaning = f"(n_specs, {outputs}) or ({batch}, n_specs, {outputs}) of numbers"
    rows = as_tensor(C, "C", meaning).to(question.x.device)
    own = len(question.shape)
    if own != 1 and rows.dim() > own and rows.shape[rows.dim() - own :] == question.shape:
        rows = rows.flatten(-own) if own else rows[..., None]
    rows = rows[None] if rows.dim() == 2 else rows
    if rows.dim() != 3 or len(rows) not in (1, batch) or rows.shape[2] != outputs or rows.shape[1] == 0:
        raise ValueError(f"C must be {meaning}, not {tuple(rows.shape)}")
    if rows.is_complex() or not bool(rows.isfinite().all()):
        raise ValueError("C must be finite numbers")
    return rows.double()


def _in_parts(
    question: Question, rows: Tensor, eps: Tensor, how: Method, dtype: torch.dtype, at_once: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """``_both_sides`` of so many samples at once that are computed alike, put together in their order."""
    if at_once < 1:
        raise ValueError(f"batch_size must be at least 1, not {at_once}")
    question.rows = rows = rows.expand(len(question.x), -1, -1)
    parts, order = [], []
    with reported(progress, len(question.x)) as done:
        for members, group in question.groups():
            for own in torch.arange(len(members), device=members.device).split(at_once):
                chosen = members[own]
                parts.append(_both_sides(group.part(own), rows[chosen], eps[chosen], how, dtype))
                order.append(chosen)
                done(len(own))
    if len(parts) == 1:
        return parts[0]
    back = torch.cat(order).argsort()
    return tuple(torch.cat(side)[back] for side in zip(*parts, strict=True))


def _both_sides(
    question: Question, rows: Tensor, eps: Tensor, how: Method, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Bounds of rows @ outputs, (batch, n_specs) each: minus an upper bound is a lower one of the negative row."""
    count = rows.shape[1]
    question.rows = torch.cat((rows, -rows), dim=1).expand(len(question.x), -1, -1)
    if how.tuned:  # to each bound by itself: there is no worst of them
        eps, question = eps.repeat_interleave(2 * count, dim=0), question.row_by_row()
    problem = MarginProblem(question, how)
    least = tuned_margins(problem, eps, dtype) - problem.slack(dtype)
    least = torch.where(least.isnan(), -torch.inf, least)  # of numbers that overflow nothing is known
    lower, minus_upper = least.reshape(-1, 2 * count).split(count, dim=1)
    return lower, -minus_upper
