"""Upper bounds, over a ball, of weighted sums of squares, with and without a line beside them.

All rows share the directions J of the squares, (J_k y)^2 for ||y|| <= 1 or another radius, and differ in their
weights, so that work on the Gram matrix J J^T is done once for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

POWER_STEPS = 3  # of the power iteration that finds a v; any v is sound; measured against 1, 2
LEADING = 32  # directions in which a quadratic form is taken as it is, the rest by its Frobenius norm
GUARD_ULPS = 64.0  # of rounding, of sums as large as the form's trace
LEVELS = 24  # multipliers that are tried at once, twice


def largest_eigenvalue(weights: Tensor, jacobian: Tensor) -> Tensor:
    """Upper bound of the largest eigenvalue of J^T diag(w) J, (batch, rows), for w (batch, rows, k), J (batch, k, n).

    It is that of sqrt(w_k w_l) J_k J_l^T, at most that of the absolute values, at most max_k (M v)_k / v_k for any
    positive v (Collatz and Wielandt).
    """
    gram = (jacobian @ jacobian.mT).abs()
    small = 1e-14 * weights.detach().amax(dim=-1, keepdim=True) + torch.finfo(weights.dtype).tiny ** 0.75
    root = (weights + small).sqrt()
    with torch.no_grad():
        v = root
        for _ in range(POWER_STEPS):
            v = root * ((root * v) @ gram)
            largest = v.amax(dim=-1, keepdim=True)
            v = v / torch.where(largest > 0, largest, 1.0) + 1e-6
    return (root * ((root * v) @ gram) / v).amax(dim=-1)


def line_and_squares(lines: Tensor, weights: Tensor, jacobian: Tensor, size: Tensor) -> Tensor:
    """Upper bound of the maximum of g.y + sum_k w_k (J_k y)^2 over ||y||^2 <= size, (batch, rows).

    Bounded apart, line and squares are each at their worst point. Together, for A = J^T diag(w) J and any lambda with
    lambda I - A positive definite (the S-lemma),

        g.y + y.A y  <=  size lambda + g.(lambda I - A)^-1 g / 4.

    An orthonormal basis V of the lines and the leading directions of the squares cuts A into blocks. Only V^T A V is
    taken as it is; of the others, the Frobenius norms c (beside it) and f are enough: lambda I - A is positive definite
    if nu I - V^T A V is, with nu = lambda - c^2 / (lambda - f) and lambda > f; g.(nu I - V^T A V)^-1 g is no less.

    Args:
        lines: g, (batch, rows, n).
        weights: w >= 0, (batch, rows, k).
        jacobian: J, (batch, k, n).
        size: squared radius, (batch,).
    """
    basis = _leading_basis(lines.detach(), weights.detach(), jacobian.detach())
    head, line = jacobian @ basis, lines @ basis
    inside = head @ head.mT
    outside = jacobian @ jacobian.mT - inside
    form = (weights @ (head[..., :, None] * head[..., None, :]).flatten(-2)).unflatten(-1, (head.shape[-1],) * 2)
    trace = (weights.detach() @ (jacobian.detach() ** 2).sum(dim=-1, keepdim=True)).squeeze(-1)
    guard = GUARD_ULPS * torch.finfo(form.dtype).eps * trace
    # ``outside`` is a difference, so the norms are wrong by rounding of sums as large as the trace.
    beside, square = (
        ((weights @ (one * outside)) * weights).sum(dim=-1).clamp(min=0.0) + guard * trace for one in (inside, outside)
    )
    rest = (square + torch.finfo(square.dtype).tiny ** 0.75).sqrt()
    with torch.no_grad():
        multiplier = _best_multiplier(line, form, beside, rest, size) + 2.0 * guard
    shift = multiplier - beside / (multiplier - rest)
    eye = torch.eye(form.shape[-1], dtype=form.dtype, device=form.device)
    factor, failed = torch.linalg.cholesky_ex((shift - guard)[..., None, None] * eye - form)
    sound = (failed == 0) & (multiplier > rest)
    factor = torch.where(sound[..., None, None], factor, eye)
    solved = torch.linalg.solve_triangular(factor, line.unsqueeze(-1), upper=False).squeeze(-1)
    bound = size[:, None] * multiplier + 0.25 * (solved**2).sum(dim=-1)
    # What rounding has left of the lines outside of the basis.
    lost = (lines.detach() - line.detach() @ basis.mT).norm(dim=-1)
    bound = bound + lost * size.sqrt()[:, None]
    return torch.where(sound & bound.isfinite(), bound, torch.inf)


def _leading_basis(lines: Tensor, weights: Tensor, jacobian: Tensor) -> Tensor:
    """An orthonormal basis, (batch, n, m), of the lines and, nearly, of the leading directions of the squares."""
    with torch.no_grad():
        mean = weights.mean(dim=-2)
        scaled = (mean + 1e-3 * mean.mean(dim=-1, keepdim=True)).sqrt().unsqueeze(-1) * jacobian
        count = min(LEADING, *scaled.shape[-2:])
        generator = torch.Generator().manual_seed(0)
        found = torch.randn(scaled.shape[-1], count, generator=generator, dtype=torch.float64)
        found = found.to(scaled).expand(len(scaled), -1, -1)
        for _ in range(3):
            found = torch.linalg.qr(scaled.mT @ (scaled @ found))[0]
        length = lines.norm(dim=-1, keepdim=True)
        directions = (lines / torch.where(length > 0, length, 1.0)).mT
        return torch.linalg.qr(torch.cat((directions, found), dim=-1))[0]


def _best_multiplier(line: Tensor, form: Tensor, beside: Tensor, rest: Tensor, size: Tensor) -> Tensor:
    """The lambda, (batch, rows), of the least bound among those tried."""
    finite = form.isfinite().all(dim=-1).all(dim=-1)
    values, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], form, 0.0))
    squares = (vectors.mT @ line.unsqueeze(-1)).squeeze(-1) ** 2
    largest = values[..., -1]
    least = 0.5 * (largest + rest) + (0.25 * (largest - rest) ** 2 + beside).sqrt()
    unit = (squares.sum(dim=-1) / size[:, None]).sqrt() * 0.5 + 1e-6 * least + torch.finfo(form.dtype).tiny ** 0.5

    def bounds(gaps: Tensor) -> Tensor:
        """For lambda = least + gaps, (batch, rows, levels)."""
        trial = least.unsqueeze(-1) + gaps
        shift = trial - beside.unsqueeze(-1) / (trial - rest.unsqueeze(-1))
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
