"""Upper bounds, over a box, of weighted sums of squares, with and without a line beside them.

The ball around a box holds more of such a sum than the box, pi/2 times as much for one random direction. So every row
gets an ellipsoid of its own: for the sum y.A y, A = J^T diag(w) J, and any diagonal matrix D > 0,

    y.A y  <=  lambda sum_j D_j e_j^2      for all |y_j| <= e_j,

lambda being the greatest eigenvalue of D^-1/2 A D^-1/2 (the dual of the semidefinite relaxation of the maximum). A
good D comes from its primal: columns v_j of length e_j that make tr V A V^T large are met by repeating
v_j <- e_j (V A)_j / |(V A)_j|, and D_j is |(V A)_j| / e_j then. Few columns and steps do, as any D is sound.

Hundreds of rows, each with its own D, share the directions J. So of A, as in ``quadratic``, a block in a few
common directions F is taken as it is, and with it the squares of a few neurons that matter to this row and are not
seen there, such as those of the state whose bounds are asked for; of the others Frobenius norms c (beside the block)
and f. For any tau > 0,

    A  <=  F (M + tau) F^T  +  sum of own w_k J_k^T J_k  +  g (1 - F F^T),        g = f + c^2 / tau,

and g sum_j e_j^2 is charged apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .eigenvalues import eigenvalue_bound
from .quadratic import (
    DIRECTION_TIMES,
    GUARD_ULPS,
    Guesses,
    block,
    finished,
    in_single,
    leading_directions,
    rest_of,
    rounding_guard,
)

LEADING = 64  # common directions
OWN = 16  # squares of neurons of its own that a row keeps
COLUMNS, STEPS, ESTIMATE_STEPS = 3, 12, 2  # of V; measured
CROSS_SHARE = 0.6  # tau / c
FLOORS, LINE_FLOORS = (0.1,), (0.003, 0.03)  # of D, in units of its mean
LEVELS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)  # of a line's multiplier that are tried
EXCESS_TIMES, MOST_EXCESS = 9, 3.0  # that a factor between bounds and estimates is taken for what it was; its most
PART_NUMBERS = 2**23  # of rows' own directions that are held at once


class _Form(NamedTuple):
    """What is taken as it is of the rows' forms, F (batch, n, m), M (batch, rows, m, m), own J and w, and lines."""

    directions: Tensor
    block: Tensor | tuple[Tensor, Tensor]  # M, or w (batch, rows, k) and J F (batch, k, m) that make it
    own: Tensor  # (batch, rows, x, n)
    own_weights: Tensor  # (batch, rows, x)
    lines: Tensor | None  # (batch, rows, n)


def squares_over_box(
    weights: Tensor, jacobian: Tensor, radii: Tensor, sound: bool = True, guesses: Guesses | None = None
) -> Tensor:
    """Upper bound of the maximum of sum_k w_k (J_k y)^2 over |y_j| <= e_j, (batch, rows).

    It is computed in single precision, with guards against its rounding.

    Args:
        weights: w >= 0, (batch, rows, k).
        jacobian: J, (batch, k, n).
        radii: e >= 0, (batch, n).
        sound: if False an estimate from below, with a gradient to w and J.
    """
    w, j, unit = in_single(weights, jacobian)
    longest = radii.amax(dim=-1, keepdim=True)
    longest = torch.where(longest > 0, longest, 1.0)
    unit = unit * longest.double() ** 2
    estimate, bound = _maximum(w, j, (radii / longest).to(w), None, sound, guesses)
    estimate = (estimate * unit).to(weights)
    return finished(bound * unit, estimate) if sound else estimate


def line_and_squares_over_box(
    lines: Tensor,
    weights: Tensor,
    jacobian: Tensor,
    radii: Tensor,
    sound: bool = True,
    guesses: Guesses | None = None,
) -> Tensor:
    """Upper bound of the maximum of g.y + sum_k w_k (J_k y)^2 over the box, for lines g (batch, rows, n); as above.

    The line is a product with one more coordinate, in [-1, 1], with a D of its own.
    """
    estimate, bound = _maximum(weights, jacobian, radii, lines, sound, guesses)
    return finished(bound, estimate) if sound else estimate


def _maximum(
    weights: Tensor, jacobian: Tensor, radii: Tensor, lines: Tensor | None, sound: bool, known: Guesses | None
) -> tuple[Tensor, Tensor | None]:
    """An estimate and, if it is asked for, a bound."""
    guesses = known or Guesses()
    directions = leading_directions(weights, jacobian, LEADING, guesses, 0 if sound else DIRECTION_TIMES)
    head = jacobian @ directions
    if not sound or torch.is_grad_enabled():
        estimate = _estimate(weights, jacobian, radii, lines, directions, head, guesses)
    else:
        estimate = radii.new_zeros(weights.shape[:2])
    dual = functools.partial(_dual, weights, jacobian, radii, lines, directions, head)
    if not sound:
        return estimate if known is None else estimate * _excess(estimate, dual, known), None
    with torch.no_grad():
        return estimate, dual()


@torch.no_grad()
def _excess(estimate: Tensor, bound: Callable[[], Tensor], guesses: Guesses) -> Tensor:
    """By what factor bounds are above estimates, (batch, rows), as it was measured not long ago."""
    factor = guesses.of("excess", estimate.shape, EXCESS_TIMES)
    if factor is not None:
        return factor
    tiny = torch.finfo(estimate.dtype).tiny ** 0.5
    return guesses.keep("excess", ((bound() + tiny) / (estimate + tiny)).nan_to_num(1.0).clamp(1.0, MOST_EXCESS))


def _estimate(
    weights: Tensor,
    jacobian: Tensor,
    radii: Tensor,
    lines: Tensor | None,
    directions: Tensor,
    head: Tensor,
    guesses: Guesses,
) -> Tensor:
    """At the V of the primal's maximum, the value has the maximum's gradient."""
    nothing = weights.new_zeros(*weights.shape[:2], 0)
    own = jacobian.new_zeros(*weights.shape[:2], 0, jacobian.shape[-1])
    form = _Form(directions, (weights, head), own, nothing, lines)
    columns, beside, _, _ = _primal(form, radii, ESTIMATE_STEPS, guesses)
    value = (weights.unsqueeze(2) * (_times(columns, directions) @ head.mT.unsqueeze(1)) ** 2).sum(dim=(-1, -2))
    return value if lines is None else value + ((columns @ lines.unsqueeze(-1)).squeeze(-1) * beside).sum(dim=-1)


# --- the primal: where to look for D ---


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """(batch, rows, q, n) times a common (batch, n, m)."""
    return (rows.flatten(1, 2) @ matrix).unflatten(1, rows.shape[1:3])


def _image(block: Tensor | tuple[Tensor, Tensor], inside: Tensor) -> Tensor:
    """(batch, rows, q, m) times M. Few products are cheaper without M."""
    if isinstance(block, Tensor):
        return inside @ block
    weights, head = block
    return _times(weights.unsqueeze(2) * _times(inside, head.mT), head)


@torch.no_grad()
def _primal(
    form: _Form, radii: Tensor, steps: int, guesses: Guesses | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """V (batch, rows, q, n) and the line's own column (batch, rows, q), and the lengths of their images, D e."""
    n = radii.shape[-1]
    rows = form.own_weights.shape[:2]
    start = torch.randn(COLUMNS, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(radii)
    columns = (start / start.norm(dim=0)).expand(*rows, -1, -1) * radii[:, None, None]
    beside = torch.full_like(columns[..., 0], COLUMNS**-0.5)
    length = torch.zeros_like(beside[..., 0])
    tiny = torch.finfo(radii.dtype).tiny ** 0.5
    guesses = guesses or Guesses()
    known, side = guesses.of("columns", columns.shape), guesses.of("beside", beside.shape)
    if known is not None and side is not None:
        columns, beside, steps = known.to(columns), side.to(beside), 1
    for _ in range(steps if form.lines is None else 3 * steps):
        images = _times(_image(form.block, _times(columns, form.directions)), form.directions.mT)
        if form.own.shape[2]:
            images = images + ((columns @ form.own.mT) * form.own_weights.unsqueeze(2)) @ form.own
        if form.lines is not None:
            half = 0.5 * (columns @ form.lines.unsqueeze(-1)).squeeze(-1)
            images = images + 0.5 * beside.unsqueeze(-1) * form.lines.unsqueeze(2)
            length = half.norm(dim=-1)
            turned = half + length.unsqueeze(-1) * beside
            beside = turned / (turned.norm(dim=-1, keepdim=True) + tiny)
        lengths = (images**2).sum(dim=2).sqrt()
        columns = images * (radii[:, None] / (lengths + tiny)).unsqueeze(2)
    guesses.keep("columns", columns)
    guesses.keep("beside", beside)
    return columns, beside, lengths, length


# --- the dual: a proof ---


def _dual(
    weights: Tensor, jacobian: Tensor, radii: Tensor, lines: Tensor | None, directions: Tensor, head: Tensor
) -> Tensor:
    unseen = ((jacobian - head @ directions.mT) ** 2).sum(dim=-1)
    own = (weights * unseen.unsqueeze(1)).topk(min(OWN, weights.shape[-1]), dim=-1)[1]
    shared = weights.scatter(-1, own, 0.0)
    rest = rest_of(shared, head, jacobian)
    tau = CROSS_SHARE * rest.beside.sqrt() + torch.finfo(weights.dtype).tiny ** 0.5
    apart = rest.norm + rest.beside / tau
    eye = torch.eye(head.shape[-1], dtype=head.dtype, device=head.device)
    middle = block(shared, head) + (tau - apart)[..., None, None] * eye
    size = (radii**2).sum(dim=-1)
    several = torch.arange(len(weights), device=own.device)[:, None, None]
    found, rows = [], max(1, PART_NUMBERS // (len(weights) * max(1, own.shape[-1]) * radii.shape[-1]))
    for first in range(0, weights.shape[1], rows):
        chosen = own[:, first : first + rows]
        part = _Form(
            directions,
            middle[:, first : first + rows],
            jacobian[several, chosen],
            weights[:, first : first + rows].gather(-1, chosen),
            None if lines is None else lines[:, first : first + rows],
        )
        found.append(_dual_of(part, radii))
    rounding = 1.0 + GUARD_ULPS * torch.finfo(size.dtype).eps  # of radii and sums
    apart = apart + rounding_guard(shared, jacobian)  # of the whole form, in the common directions too
    bound = rounding * (torch.cat(found, dim=1) + apart * size[:, None])
    return torch.where(bound.isfinite(), bound, torch.inf)


def _dual_of(form: _Form, radii: Tensor) -> Tensor:
    """The least bound of the forms among D with several floors."""
    _, _, lengths, beside = _primal(form, radii, STEPS)
    size, known = (radii**2).sum(dim=-1)[:, None], radii[:, None] > 0
    mean = ((lengths * radii[:, None]).sum(dim=-1) / size.clamp(min=torch.finfo(radii.dtype).tiny)).unsqueeze(-1)
    unit = torch.where(mean > 0, mean, 1.0)
    # Where the box has no width, a large D costs nothing.
    flat = 1.0 / torch.finfo(radii.dtype).eps
    shares = torch.where(known, lengths / (unit * radii[:, None].clamp(min=torch.finfo(radii.dtype).tiny)), flat)
    beside = (beside / unit.squeeze(-1)).clamp(min=1e-6 * size)
    floors = FLOORS if form.lines is None else LINE_FLOORS
    return torch.stack([_bound_with(form, radii, shares + floor, beside) for floor in floors]).amin(dim=0)


def _bound_with(form: _Form, radii: Tensor, d: Tensor, beside: Tensor) -> Tensor:
    """lambda sum_j D_j e_j^2, (batch, rows), for D = ``d``, (batch, rows, n), and about ``beside`` for the line.

    With Y = [F, own J, g] and N so that the form is Y N Y^T, lambda is the greatest eigenvalue of C^T N C for any
    C C^T >= Y^T D^-1 Y.
    """
    m, x = form.directions.shape[-1], form.own.shape[2]
    several = form.own if form.lines is None else torch.cat((form.own, form.lines.unsqueeze(2)), dim=2)
    factor, failed = _root_of_gram(form.directions, several, 1.0 / d)
    inner = factor.new_zeros(factor.shape)
    inner[..., :m, :m] = form.block
    place = torch.arange(m, m + x, device=d.device)
    inner[..., place, place] = form.own_weights
    turned = factor.mT @ inner @ factor
    reach = torch.linalg.vector_norm(factor, dim=-1, keepdim=True)
    guard = GUARD_ULPS * torch.finfo(d.dtype).eps * (reach.mT @ inner.abs() @ reach)[..., 0, 0]
    cost = (d * (radii**2)[:, None]).sum(dim=-1)
    if form.lines is None:
        bound = (_greatest(turned) + guard) * cost
    else:
        bound = _bound_beside(turned, 0.5 * factor[..., -1, :], guard, cost, beside)
    return torch.where(failed, torch.inf, bound)


def _greatest(matrices: Tensor) -> Tensor:
    return eigenvalue_bound(matrices).clamp(min=0.0).to(matrices)


def _root_of_gram(directions: Tensor, several: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """C with  C C^T >= Y^T diag(inverse) Y  for Y = [F, others], and where none was found."""
    scaled = several * inverse.unsqueeze(2)
    cross = _times(scaled, directions)
    gram = torch.cat(
        (
            torch.cat((block(inverse, directions), cross.mT), dim=-1),
            torch.cat((cross, scaled @ several.mT), dim=-1),
        ),
        dim=-2,
    )
    diagonal = torch.diagonal(gram, dim1=-1, dim2=-2)
    # Rounding errors E have |E_ij| <= u (G_ii G_jj)^1/2, so that p u diag(G) is more than E.
    slack = GUARD_ULPS * gram.shape[-1] * torch.finfo(gram.dtype).eps * diagonal + torch.finfo(gram.dtype).tiny ** 0.5
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(slack))
    return factor, failed != 0


def _bound_beside(turned: Tensor, line: Tensor, guard: Tensor, cost: Tensor, beside: Tensor) -> Tensor:
    """With one more coordinate, whose products are the line, and the best of several D for it."""
    size = turned.shape[-1]
    levels = beside.unsqueeze(-1) * torch.tensor(LEVELS, dtype=beside.dtype, device=beside.device)
    whole = turned.new_zeros(*levels.shape, size + 1, size + 1)
    whole[..., 1:, 1:] = turned.unsqueeze(2)
    whole[..., 0, 1:] = whole[..., 1:, 0] = line.unsqueeze(2) / levels.sqrt().unsqueeze(-1)
    extra = GUARD_ULPS * torch.finfo(line.dtype).eps * line.norm(dim=-1).unsqueeze(-1) / levels.sqrt()
    largest = _greatest(whole) + guard.unsqueeze(-1) + extra
    return torch.where(largest.isfinite(), largest * (cost.unsqueeze(-1) + levels), torch.inf).amin(dim=-1)
