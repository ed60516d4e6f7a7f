"""Upper bounds, over a ball, of weighted sums of squares, with and without a line beside them.

All rows share the directions J of the squares, (J_k y)^2 for ||y|| <= 1 or another radius, and differ in their
weights w, so that work on J is done once for all of them. Of a row's form A = J^T diag(w) J, only the block B = V^T A V
is taken as it is, for an orthonormal basis V of a few leading directions. Of the others, Frobenius norms are enough.
For squares alone, as the greatest eigenvalue of a matrix that is split into B and the rest,

    lambda_max(A)^2  <=  ||B||_2^2 + ||A||_F^2 - ||B||_F^2,      ||A||_F^2 = sum over k, l of w_k w_l (J_k.J_l)^2,

and with a line, with the norms c (beside B) and f: lambda I - A is positive definite if lambda > f and nu I - B is,
with nu = lambda - c^2 / (lambda - f).

With ``sound=False`` the other blocks are left out: no bound but an estimate, with nearly the same gradient, at a
fraction of the cost. It is for tuning.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...precision import products_are_full
from .eigenvalues import eigh_guess, norm_by_powers

LEADING = 64  # directions in the basis, measured against 32, 128
LEADING_BESIDE_LINES = 32  # of estimates for squares with lines, which lie in the basis as well
REST_TIMES = 14  # that what is outside of the basis, as a share of its trace, is taken for what it was
DIRECTION_TIMES = 2  # that estimates take the directions of the one before
POWER_STEPS, KNOWN_STEPS = 8, 2  # of the power iteration, in estimates; and where nearly the vectors are known
GRAM_ROWS = 512  # of a part of J
GUARD_ULPS = 64.0  # of rounding, of sums as large as the form's trace, and of this many squares or fewer:
GUARD_TERMS = 512  # of more, guards grow with their number. Sums of k equal ones were seen to err by k / 60 units
LEVELS = 24  # multipliers that are tried at once, twice


class Guesses:
    """Directions and vectors that a call found: where the next one for nearly the same forms begins its iterations.

    Whatever they are, bounds are sound.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, int]] = {}
        self._most: dict[str, int] = {}

    @property
    def due(self) -> bool:
        """Whether something will be measured again that is seldom measured: the next estimate takes longer."""
        return not self._found or any(self._found[name][1] == most for name, most in self._most.items())

    def of(self, name: str, shape: torch.Size, times: int | None = None) -> Tensor | None:
        """What was found; None if it has not the shape, or has been taken as many times as it may be."""
        found, used = self._found.get(name, (None, 0))
        if times is not None and found is not None:
            self._most[name] = times
        if found is None or found.shape != shape or used == times:
            return None
        self._found[name] = found, used + 1
        return found

    def keep(self, name: str, found: Tensor) -> Tensor:
        self._found[name] = found.detach(), 0
        return found

    def of_samples(self, places: Tensor) -> Guesses:
        """A copy for the samples at some places of the batch."""
        copy = Guesses()
        copy._found = {name: (found[places], 0) for name, (found, _) in self._found.items()}
        return copy


class Rest(NamedTuple):
    """What the basis leaves of a form A, (batch, rows) each: c^2 and f."""

    beside: Tensor
    norm: Tensor

    def least(self, largest: Tensor) -> Tensor:
        """The lambda above f with  nu = ``largest``, the greatest eigenvalue of V^T A V, or more."""
        return 0.5 * (largest + self.norm) + (0.25 * (largest - self.norm) ** 2 + self.beside).sqrt()


def largest_eigenvalue(
    weights: Tensor,
    jacobian: Tensor,
    sound: bool = True,
    guesses: Guesses | None = None,
    with_rest: bool = False,
) -> Tensor:
    """Upper bound of the largest eigenvalue of J^T diag(w) J, (batch, rows), for w (batch, rows, k), J (batch, k, n).

    It is computed in single precision, with a guard against its rounding. ``with_rest`` lets estimates count about what
    the bound does for the rest outside of the basis; it pays where guesses are kept.
    """
    guesses = guesses or Guesses()
    w, j, unit = in_single(weights, jacobian)
    head = j @ leading_directions(w, j, LEADING, guesses, 0 if sound else DIRECTION_TIMES)
    estimate = weights.new_zeros(weights.shape[:2])
    if not sound or torch.is_grad_enabled():
        # At its eigenvector, the form has the eigenvalue's gradient too.
        estimate = (w * (_leading_vectors(w, head, guesses) @ head.mT) ** 2).sum(dim=-1)
        if with_rest and not sound:
            estimate = (estimate**2 + _likely_rest(w, j, head, guesses) ** 2 + torch.finfo(w.dtype).tiny).sqrt()
        estimate = (estimate * unit).to(weights)
    if not sound:
        return estimate
    with torch.no_grad():
        inner, guard = block(w, head), rounding_guard(w, j)
        bound = ((norm_by_powers(inner) ** 2 + _squared_rest(w, j, inner, guard)).sqrt() + guard) * unit
    return finished(bound, estimate)


def _squared_rest(weights: Tensor, jacobian: Tensor, inner: Tensor, guard: Tensor) -> Tensor:
    """||A||_F^2 - ||B||_F^2, (batch, rows), in double precision, but for rounding no less.

    ``guard`` is for the rounding of sums as large as the trace, which A's Frobenius norm is not above.
    Of forms far below the greatest w and J, squares vanish in single precision.
    """
    whole = _squared_norm(weights, jacobian).double()
    inside = torch.linalg.vector_norm(inner, dim=(-2, -1), dtype=torch.float64)
    trace = guard.double() / (GUARD_ULPS * torch.finfo(weights.dtype).eps)
    return (whole - inside**2).clamp(min=0.0) + 2.0 * guard * trace + _vanished(weights.dtype)


def _squared_norm(weights: Tensor, jacobian: Tensor) -> Tensor:
    """||A||_F^2, the sum over k, l of w_k w_l (J_k.J_l)^2, (batch, rows): over pairs of parts of J.

    Each pair is met once, and only in columns in which both parts have numbers: neurons of early steps see few frames.
    """
    used = (jacobian != 0).any(dim=0)
    parts, total = [], torch.zeros_like(weights[..., 0])
    for w, j, some in zip(
        weights.split(GRAM_ROWS, -1), jacobian.split(GRAM_ROWS, 1), used.split(GRAM_ROWS), strict=True
    ):
        columns = some.any(dim=0).nonzero()
        parts.append((w, j, int(columns.min()), int(columns.max()) + 1) if len(columns) else (w, j, 0, 0))
    for place, (w, j, first, last) in enumerate(parts):
        for number, (other_w, other_j, start, end) in enumerate(parts[: place + 1]):
            low, high = max(first, start), min(last, end)
            if low < high:
                gram = j[..., low:high] @ other_j[..., low:high].mT
                total = total + (1.0 if number == place else 2.0) * ((w @ gram.square_()) * other_w).sum(dim=-1)
    return total


def _likely_rest(weights: Tensor, jacobian: Tensor, head: Tensor, guesses: Guesses) -> Tensor:
    """About the root of ``_squared_rest``: a share, seldom measured, of the trace of what the basis leaves."""
    unseen = ((jacobian**2).sum(dim=-1) - (head**2).sum(dim=-1)).clamp(min=0.0).unsqueeze(-1)
    trace = (weights @ unseen).squeeze(-1)
    share = guesses.of("rest", trace.shape, REST_TIMES)
    if share is None:
        with torch.no_grad():
            rest = _squared_rest(weights, jacobian, block(weights, head), 0.0 * trace).sqrt()
            tiny = torch.finfo(trace.dtype).tiny
            share = guesses.keep("rest", (rest / (trace + tiny)).clamp(max=1.0).to(trace))
    return share * trace


@torch.no_grad()
def _leading_vectors(weights: Tensor, head: Tensor, guesses: Guesses) -> Tensor:
    """Nearly the rows' leading eigenvectors, (batch, rows, m), for J V, (batch, k, m)."""
    known = guesses.of("vectors", torch.Size((*weights.shape[:2], head.shape[-1])))
    vectors = torch.ones_like(weights[..., :1]).expand(-1, -1, head.shape[-1]) if known is None else known
    for _ in range(POWER_STEPS if known is None else KNOWN_STEPS):
        vectors = (weights * (vectors @ head.mT)) @ head
        vectors = vectors / (vectors.norm(dim=-1, keepdim=True) + torch.finfo(vectors.dtype).tiny ** 0.5)
    return guesses.keep("vectors", vectors)


def line_and_squares(
    lines: Tensor,
    weights: Tensor,
    jacobian: Tensor,
    size: Tensor,
    sound: bool = True,
    guesses: Guesses | None = None,
) -> Tensor:
    """Upper bound of the maximum of g.y + sum_k w_k (J_k y)^2 over ||y||^2 <= size, (batch, rows).

    Bounded apart, line and squares are each at their worst point. Together, for any lambda with lambda I - A positive
    definite (the S-lemma),

        g.y + y.A y  <=  size lambda + g.(lambda I - A)^-1 g / 4,

    and with the lines in the basis, g.(nu I - V^T A V)^-1 g is no less than the last term's.

    Args:
        lines: g, (batch, rows, n).
        weights: w >= 0, (batch, rows, k).
        jacobian: J, (batch, k, n).
        size: squared radius, (batch,).
        sound: see above.
    """
    count = LEADING if sound else LEADING_BESIDE_LINES
    basis = _basis_of_lines(lines.detach(), leading_directions(weights, jacobian, count, guesses))
    head, line = jacobian @ basis, lines @ basis
    form, guard = block(weights, head), rounding_guard(weights, jacobian)
    if sound:
        w, j, unit = in_single(weights, jacobian)
        rest = Rest(*(norm.to(unit) for norm in rest_of(w, j @ basis.to(j), j)))
        rest = Rest(rest.beside * unit**2, rest.norm * unit)
    else:
        rest = Rest(torch.zeros_like(guard), torch.zeros_like(guard))
    with torch.no_grad():
        multiplier = _best_multiplier(line, form, rest, size) + 2.0 * guard
    parts = (multiplier, line, form, guard, rest)
    if torch.is_grad_enabled():
        # What is not proved is left out beforehand: zeros times the gradient of a factor that is not finite are NaN.
        with torch.no_grad():
            proved = _with_multiplier(*parts, size).isfinite()
        none = (torch.ones_like(guard), *(torch.zeros_like(part) for part in (line, form, guard)))
        kept = (_where(proved, part, other) for part, other in zip(parts[:4], none, strict=True))
        bound = _with_multiplier(*kept, Rest(*(torch.where(proved, norm, 0.0) for norm in rest)), size)
        bound = torch.where(proved, bound, torch.inf)
    else:
        bound = _with_multiplier(*parts, size)
    # What rounding has left of the lines outside of the basis.
    lost = (lines.detach() - line.detach() @ basis.mT).norm(dim=-1)
    bound = bound + lost * size.sqrt()[:, None]
    return torch.where(bound.isfinite(), bound, torch.inf)


def _with_multiplier(multiplier: Tensor, line: Tensor, form: Tensor, guard: Tensor, rest: Rest, size: Tensor) -> Tensor:
    """The bound of the S-lemma for a lambda, (batch, rows); infinite where no factor proves it."""
    shift = multiplier - rest.beside / (multiplier - rest.norm)
    eye = torch.eye(form.shape[-1], dtype=form.dtype, device=form.device)
    factor, failed = torch.linalg.cholesky_ex((shift - guard)[..., None, None] * eye - form)
    solved = torch.linalg.solve_triangular(factor, line.unsqueeze(-1), upper=False).squeeze(-1)
    bound = size[:, None] * multiplier + 0.25 * (solved**2).sum(dim=-1)
    return torch.where((failed == 0) & (multiplier > rest.norm) & bound.isfinite(), bound, torch.inf)


def _where(chosen: Tensor, tensor: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen.reshape(*chosen.shape, *(1,) * (tensor.dim() - chosen.dim())), tensor, other)


# --- the form and its blocks ---


def block(weights: Tensor, head: Tensor) -> Tensor:
    """V^T A V, (batch, rows, m, m), for J V, (batch, k, m)."""
    m = head.shape[-1]
    first, second = torch.triu_indices(m, m, device=head.device)
    half = weights @ (head[..., first] * head[..., second])
    where = torch.empty(m, m, dtype=torch.long, device=head.device)
    where[first, second] = where[second, first] = torch.arange(len(first), device=head.device)
    return half[..., where]


def in_single(weights: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w and J of greatest number 1, in single precision, and the unit, (batch, rows), of the forms that they make.

    The unit is in double precision. Where products are less precise than single, as with TF32, w and J are double, too.
    """
    largest = weights.detach().amax(dim=-1, keepdim=True)
    longest = jacobian.detach().abs().amax(dim=(-2, -1))[:, None, None]
    unit = (largest.double() * longest.double() ** 2).squeeze(-1)
    largest, longest = (torch.where(one > 0, one, 1.0) for one in (largest, longest))
    single = torch.float32 if products_are_full() else torch.float64
    return (weights / largest).to(single), (jacobian / longest).to(single), unit


def finished(bound: Tensor, estimate: Tensor) -> Tensor:
    """A bound in the estimate's precision, and with the estimate's gradient; infinite where it is NaN."""
    precision = torch.finfo(estimate.dtype)
    bound = torch.where(bound > 0, bound * (1.0 + precision.eps) + precision.tiny, bound)
    bound = torch.where(bound.isnan(), torch.inf, bound).to(estimate)
    return bound + torch.where(estimate.isfinite(), estimate - estimate.detach(), 0.0)


def rest_of(weights: Tensor, head: Tensor, jacobian: Tensor) -> Rest:
    """From Gram matrices of J: ||sum_k w_k p_k q_k^T||^2 is the sum of w_k w_l (p_k.p_l) (q_k.q_l)."""
    inside = head @ head.mT
    outside = jacobian @ jacobian.mT - inside
    # ``outside`` is a difference, so the norms are wrong by rounding of sums as large as the trace.
    lost = _guard_of(jacobian) * _weighted_lengths(weights, jacobian) ** 2
    beside, square = (
        ((weights @ (one * outside)) * weights).sum(dim=-1).clamp(min=0.0) + lost for one in (inside, outside)
    )
    return Rest(beside, (square + _vanished(square.dtype)).sqrt())


def _vanished(dtype: torch.dtype) -> float:
    """More than the squares of numbers whose squares are 0, however many neurons there are."""
    return torch.finfo(dtype).tiny ** 0.75


def rounding_guard(weights: Tensor, directions: Tensor) -> Tensor:
    return _guard_of(directions) * _weighted_lengths(weights, directions)


def _guard_of(directions: Tensor) -> float:
    """Relative, for sums over (batch, k, n) along k or n."""
    return GUARD_ULPS * max(1.0, max(directions.shape[1:]) / GUARD_TERMS) * torch.finfo(directions.dtype).eps


def _weighted_lengths(weights: Tensor, directions: Tensor) -> Tensor:
    return (weights.detach() @ (directions.detach() ** 2).sum(dim=-1, keepdim=True)).squeeze(-1)


# --- the basis; any would be sound ---


@torch.no_grad()
def leading_directions(
    weights: Tensor, jacobian: Tensor, count: int, guesses: Guesses | None = None, again: int = 0
) -> Tensor:
    """Nearly the leading directions of the rows' mean form, orthonormal, (batch, n, m) with m <= ``count``.

    Directions of an earlier call are taken as they are so many times, ``again``, before a step is made from them.
    """
    guesses = guesses or Guesses()
    count = min(count, *jacobian.shape[-2:])
    shape = torch.Size((len(jacobian), jacobian.shape[-1], count))
    if again and (kept := guesses.of("directions", shape, again)) is not None:
        return kept.to(jacobian)
    known = guesses.of("directions", shape)
    mean = weights.mean(dim=-2)
    scaled = (mean + 1e-3 * mean.mean(dim=-1, keepdim=True)).sqrt().unsqueeze(-1) * jacobian
    if known is None:
        start = torch.randn(scaled.shape[-1], count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = start.to(scaled).expand(len(scaled), -1, -1)
    else:
        found = known.to(scaled)
    for _ in range(3 if known is None else 1):
        found = torch.linalg.qr(scaled.mT @ (scaled @ found))[0]
    return guesses.keep("directions", found)


@torch.no_grad()
def _basis_of_lines(lines: Tensor, directions: Tensor) -> Tensor:
    """An orthonormal basis, (batch, n, m), of lines, (batch, rows, n), and other directions."""
    length = lines.norm(dim=-1, keepdim=True)
    lines = (lines / torch.where(length > 0, length, 1.0)).mT
    return torch.linalg.qr(torch.cat((lines, directions), dim=-1))[0]


# --- the multiplier ---


def _best_multiplier(line: Tensor, form: Tensor, rest: Rest, size: Tensor) -> Tensor:
    """The lambda, (batch, rows), of the least bound among those tried."""
    values, vectors = eigh_guess(form, vectors=True)
    squares = (vectors.mT @ line.unsqueeze(-1)).squeeze(-1) ** 2
    least = rest.least(values[..., -1])
    unit = (squares.sum(dim=-1) / size[:, None]).sqrt() * 0.5 + 1e-6 * least + torch.finfo(form.dtype).tiny ** 0.5

    def bounds(gaps: Tensor) -> Tensor:
        """For lambda = least + gaps, (batch, rows, levels)."""
        trial = least.unsqueeze(-1) + gaps
        shift = trial - rest.beside.unsqueeze(-1) / (trial - rest.norm.unsqueeze(-1))
        room = (shift.unsqueeze(-1) - values.unsqueeze(-2)).clamp(min=torch.finfo(form.dtype).tiny ** 0.5)
        return size[:, None, None] * trial + 0.25 * (squares.unsqueeze(-2) / room).sum(dim=-1)

    low, high = torch.full_like(unit, -7.0), torch.full_like(unit, 1.0)  # of log gap / unit
    shares = torch.linspace(0.0, 1.0, LEVELS, dtype=form.dtype, device=form.device)
    for _ in range(2):
        levels = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * shares
        best = bounds(unit.unsqueeze(-1) * levels.exp()).argmin(dim=-1, keepdim=True)
        level, step = levels.gather(-1, best).squeeze(-1), (high - low) / (LEVELS - 1)
        low, high = level - step, level + step
    return least + unit * level.exp()
