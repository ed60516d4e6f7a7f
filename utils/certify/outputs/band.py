"""Radii within which the outputs of a module stay inside a band: what a regression is asked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...choices.method import ALPHA_STEPS, CURVE_STEPS, Method
from ...graph.graph import Graph
from ...network.state import plain_state
from ...question.arguments import as_tensor
from ...question.question import OutputQuestion
from ...question.threat import Frames, Threat
from ..problem import MarginProblem
from ..radius import search_radius
from .bounds import as_rows


@plain_state()
@torch.no_grad()
def band_radius(
    model: nn.Module | Graph,
    x: Tensor,
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
    *,
    C: Tensor | None = None,
    output: Any = None,
    norm: float = 2.0,
    frames: Frames = None,
    clip: tuple[float, float] | None = None,
    ball: str = "frame",
    lengths: Tensor | None = None,
    features: Any = None,
    scales: Any = None,
    extra: Any = None,
    method: str = "crown",
    relaxation: str = "plane",
    alpha_steps: int = ALPHA_STEPS,
    curve_steps: int = CURVE_STEPS,
    **search: Any,
) -> Tensor:
    """Radius per sample, (batch,), within which no perturbation takes an output out of [low, high].

    Args:
        model, x, C, output and the rest: as for ``output_bounds``.
        low, high: numbers, or tensors that broadcast to the outputs, (batch, ...), or to C's rows, (batch, n_specs);
            None or an infinite number where there is no end. For a band around the model's own output, give that less
            and plus what it may move by.
        search: tol, eps0, max_eps, dtype, search_dtype, batch_size and progress, as for ``certified_radius``.

    Returns:
        The largest eps that certified, in the units of x; 0 where none did, as where an output lies outside by itself.
    """
    how = Method(method, relaxation, alpha_steps, curve_steps)
    question = OutputQuestion(model, x, Threat(norm, ball, frames, clip, lengths, features, scales), output, extra)
    batch, shape = len(question.x), question.shape
    rows = question.rows.double() if C is None else as_rows(C, question)
    shape = shape if C is None else rows.shape[1:2]
    ends = []
    for name, value, missing in (("low", low, -math.inf), ("high", high, math.inf)):
        end = as_tensor(missing if value is None else value, name, "a number or a tensor").to(question.x.device)
        try:
            ends.append(end.double().broadcast_to((batch, *shape)).reshape(batch, -1))
        except RuntimeError:
            raise ValueError(f"{name} must broadcast to {(batch, *shape)}, not {tuple(end.shape)}") from None
    if bool(torch.cat(ends).isnan().any()):
        raise ValueError("low and high must be numbers, or infinite where there is no end")
    question.rows, question.offsets = _rows_of_band(rows.expand(batch, -1, -1), *ends)
    return search_radius(MarginProblem(question, how), **search).radius


def _rows_of_band(rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and what is added to them, positive where y > low and y < high; an end that is infinite repeats another."""
    rows, offsets = torch.cat((rows, -rows), dim=1), torch.cat((-low, high), dim=1)
    asked = offsets.isfinite()
    if bool((offsets == -math.inf).any()):
        raise ValueError("low must be below inf, and high above -inf")
    if not bool(asked.any(dim=1).all()):
        raise ValueError("give low or high: a band without an end is never left")
    first = asked.int().argmax(dim=1)[:, None]
    index = torch.where(asked, torch.arange(rows.shape[1], device=rows.device), first)
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2])), offsets.gather(1, index)
