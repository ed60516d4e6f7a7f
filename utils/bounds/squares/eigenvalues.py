"""Greatest eigenvalues of symmetric matrices, with a proof that does not rest on an eigenvalue routine.

Routines for eigenvalues fail on some matrices of graded entries or low rank: they raise an error for a whole batch, or,
in single precision, return NaN for some eigenvalues and numbers near 0 for others. So what they return is only a guess
mu here. With any matrix L, such as the Cholesky factor of mu I - A,

    A  =  mu I - L L^T - E,        hence        lambda_max(A) <= mu + ||E||_F,

for the E that is left, measured in double precision.

Where many matrices are asked for and a little tightness can be given up, powers need no guess: with Frobenius norms,

    ||A||_2  <=  ||A^p||_F^(1/p),        p = 2^s,

which is above it by a factor of m^(1/2p) at most, and A^p takes s products.
"""

from __future__ import annotations

import torch
from torch import Tensor

GUESS_ULPS = 32.0  # added to a guess, of the matrix's norm in the guess's precision: more than it errs as a rule
SQUARINGS = 6  # of a matrix of 64 rows: at most 3 % too much if all eigenvalues are equal, as a rule .1 %
WRONG = 1e-3  # a guess that is off by this share of the norm is made again in double precision


@torch.no_grad()
def eigenvalue_bound(matrices: Tensor) -> Tensor:
    """Upper bound, a little above it, of the greatest eigenvalue of (..., m, m), in double precision, (...).

    The matrices, or the symmetric parts of those that are not quite symmetric, are taken as they are, rounding errors
    included. Where a number is not finite, the bound is infinite.
    """
    size = _norm(matrices)
    guess = eigh_guess(matrices)[0][..., -1].double() + GUESS_ULPS * torch.finfo(matrices.dtype).eps * size
    bound = _proved(matrices, guess, size)
    again = size.isfinite() & ~(bound <= guess + WRONG * size)
    if matrices.dtype != torch.float64 and bool(again.any()):
        bound[again] = eigenvalue_bound(matrices[again].double())
    # The Frobenius norm is a bound, too.
    return torch.fmin(bound, size).masked_fill(~size.isfinite(), torch.inf)


def _norm(matrices: Tensor) -> Tensor:
    """Frobenius norms in double precision, rounded up."""
    rounding = matrices.shape[-1] ** 2 * torch.finfo(torch.float64).eps
    # Squares of the smallest numbers vanish.
    vanished = matrices.shape[-1] * torch.finfo(torch.float64).tiny ** 0.5
    return (1.0 + rounding) * torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=torch.float64) + vanished


def _proved(matrices: Tensor, guess: Tensor, size: Tensor) -> Tensor:
    left = -matrices.double()
    left.diagonal(dim1=-2, dim2=-1).add_(guess.unsqueeze(-1))
    factor, _ = torch.linalg.cholesky_ex(left)
    left -= factor @ factor.mT
    # Sums of m products round by at most m units of the sum of their absolute values.
    lost = 2.0 * matrices.shape[-1] * torch.finfo(left.dtype).eps * (_norm(factor) ** 2 + guess.abs() + size)
    return guess + _norm(left) + lost


@torch.no_grad()
def norm_by_powers(matrices: Tensor) -> Tensor:
    """Upper bound of the spectral norm of (..., m, m), in double precision; infinite where a number is not finite.

    Powers are taken in the matrices' precision. A product X X^T errs by at most m units of ||X||_F^2, in that norm, and
    errors of higher powers hardly count in the root. What is divided by need only be no less than the norm: after the
    first division there is nothing so small that its squares vanish, and the matrices' precision will do.
    """
    size, epsilon = matrices.shape[-1], torch.finfo(matrices.dtype).eps
    lost = 2.0 * (size + 4) * epsilon
    power, units = matrices, []
    for square in range(SQUARINGS):
        norm = torch.linalg.matrix_norm(power) * (1.0 + size**2 * epsilon) if square else _norm(power).to(power)
        unit = torch.where(norm.isfinite(), norm, 1.0).clamp(min=torch.finfo(power.dtype).tiny)
        power = power / unit[..., None, None]
        power = power @ power.mT
        units.append(unit.double())
    bound = _norm(power)
    for unit in reversed(units):
        bound = unit * (1.0 + lost) * (bound + lost).sqrt()
    return torch.where(bound.isnan(), torch.inf, bound)


def spectral_norm(weight: Tensor) -> Tensor:
    """Upper bound, a little above it, of a matrix's spectral norm, with the norm's gradient if the matrix has one.

    ||W||^2 is the greatest eigenvalue of W W^T. In double precision, that product of n terms errs by no more than n
    units of ||W||_F^2 in the Frobenius norm.
    """
    with torch.no_grad():
        unit = weight.abs().amax().double() if weight.numel() else weight.new_zeros((), dtype=torch.float64)
        scaled = weight.double() / torch.where(unit > 0, unit, 1.0)
        scaled = scaled if scaled.shape[0] <= scaled.shape[1] else scaled.T
        squares = scaled @ scaled.T
        rounding = 2.0 * (scaled.shape[1] + 4) * torch.finfo(torch.float64).eps
        bound = eigenvalue_bound(squares[None])[0] + rounding * torch.linalg.matrix_norm(scaled) ** 2
        bound = (unit * bound.clamp(min=0.0).sqrt()).to(weight) * (1.0 + 4.0 * torch.finfo(weight.dtype).eps)
    if not weight.requires_grad or not torch.is_grad_enabled():
        return bound
    estimate = torch.linalg.matrix_norm(weight, 2)
    return bound + (estimate - estimate.detach())


def eigh_guess(matrices: Tensor, vectors: bool = False) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues, and eigenvectors, as routines have them, without an error: they may be wrong, or not finite."""
    usable = matrices.isfinite().all(dim=-1).all(dim=-1)[..., None, None]
    matrices = torch.where(usable, matrices, 0.0)
    for precision in (matrices.dtype, torch.float64):
        try:
            if vectors:
                values, directions = torch.linalg.eigh(matrices.to(precision))
                return values.to(matrices), directions.to(matrices)
            return torch.linalg.eigvalsh(matrices.to(precision)).to(matrices), None
        except torch.linalg.LinAlgError:  # for the whole batch
            continue
    shape = matrices.shape[:-1]
    return matrices.new_full(shape, torch.nan), torch.full_like(matrices, torch.nan) if vectors else None
