"""Balls of weights: how far a product with a moving weight, dP h, can come, for one parameter that acts many times.

Each parameter P moves by a dP in a ball of its own, of radius eps times its unit: every entry |dP_ij| <= eps unit_ij
(l_inf), or ||dP||_F <= eps unit (l_2). Where it acts several times, as W_hh at every step, it is the same dP. A
backward pass has rows a_t at its uses, whose parents h_t lie in boxes, and

    sum_t a_t dP h_t  =  <dP, sum_t a_t h_t^T>,

so the coefficients of dP add up before the norm. With the entries H_st of  h_s . h_t,

    ||sum_t a_t h_t^T||_F^2  =  sum_st (a_s . a_t) H_st  <=  sum_st max of (a_s . a_t) H_st over the interval of H_st:

no matrix of the shape of P is made. Around the middles m_t of the boxes, of half-widths r_t, the norm is also at most
||sum_t a_t m_t^T|| + (sum_st |a_s . a_t| r_s . r_t)^(1/2), and at most sum_t ||a_t|| max ||h_t||; the least holds. For
l_inf the sum over t is made, a part of the rows at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..graph.sums import apply_rows
from ..perturbation.lp_ball import INF

PART = 1 << 22  # numbers of sums of outer products that are worked on at once


class Use(NamedTuple):
    """A parameter at one place in a backward pass, in its own rows and columns.

    Attributes:
        rows: coefficients of P's rows, (batch or 1, rows, rows of P).
        low, high: of what P's columns meet, (batch or 1, columns of P); one tensor where it is known.
    """

    rows: Tensor
    low: Tensor
    high: Tensor


class WeightBalls:
    """Balls of some parameters.

    Attributes:
        eps: (batch,).
        norm: 2 or inf.
        units: by parameter: for l_inf radii of the entries at eps = 1, broadcasting to the parameter's shape as a place
            has it; for l_2 a number.
    """

    def __init__(self, eps: Tensor, norm: float, units: dict[str, Tensor]):
        if norm not in (2.0, INF):
            raise ValueError(f"weights move in balls of p = 2 or inf, not {norm}")
        if not bool(((eps >= 0) & eps.isfinite()).all()):
            raise ValueError("eps must be a finite number >= 0")
        self.eps, self.norm, self.units = eps, norm, units

    @property
    def entrywise(self) -> bool:
        return self.norm == INF

    def deviation(self, name: str, uses: list[Use], gamma: float = 0.0) -> Tensor:
        """Most that  sum_t a_t dP h_t  can be, (batch, rows), over the ball and the boxes.

        ``gamma`` is a relative error of sums.
        """
        unit = self.units[name]
        size = _entrywise(uses, unit) if self.entrywise else unit * joint_norm(uses, gamma)
        return self.eps[:, None] * size * (1.0 + 4.0 * gamma)

    def of_kernel(self, name: str, size: Tensor) -> Tensor:
        """Most that <dP, A> can be for |A| <= size, (batch, rows, entries of P), entry by entry."""
        if self.entrywise:
            unit = self.units[name]
            return self.eps[:, None] * (size * unit.expand(unit.shape).reshape(-1)).sum(dim=-1)
        return self.eps[:, None] * self.units[name] * torch.linalg.vector_norm(size, dim=-1)


def _largest(use: Use) -> Tensor:
    """Greatest absolute values of what the columns meet."""
    return use.low.abs() if use.low is use.high else torch.maximum(use.low.abs(), use.high.abs())


def _entrywise(uses: list[Use], unit: Tensor) -> Tensor:
    """sum_ij unit_ij max |sum_t a_ti h_tj|, (batch, rows), by centres and half-widths."""
    if len(uses) == 1:
        (use,) = uses
        return apply_rows(use.rows.abs(), _per_row(_largest(use), unit, use.rows.shape[-1]))
    centers, radii = zip(*(_center_radius(use) for use in uses), strict=True)
    batch = max(tensor.shape[0] for use in uses for tensor in (use.rows, use.low))
    values = torch.stack([center.expand(batch, -1) for center in centers], dim=1)  # (batch, T, columns)
    rows = torch.stack([use.rows.expand(batch, -1, -1) for use in uses], dim=-1)  # (batch, rows, rows of P, T)
    size = max(1, PART // (batch * rows.shape[2] * values.shape[2]))
    parts = [((part @ values[:, None]).abs() * unit).sum(dim=-1).sum(dim=-1) for part in rows.split(size, dim=1)]
    total = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    for use, radius in zip(uses, radii, strict=True):
        if radius is not None:
            total = total + apply_rows(use.rows.abs(), _per_row(radius, unit, use.rows.shape[-1]))
    return total


def _per_row(sizes: Tensor, unit: Tensor, rows: int) -> Tensor:
    """sum_j unit_ij sizes_j, (batch, rows of P)."""
    if unit.dim() == 0:
        return (unit * sizes.sum(dim=-1, keepdim=True)).expand(-1, rows)
    return sizes @ unit.mT


def _center_radius(use: Use) -> tuple[Tensor, Tensor | None]:
    if use.low is use.high:
        return use.low, None
    return 0.5 * (use.low + use.high), 0.5 * (use.high - use.low)


def joint_norm(uses: list[Use], gamma: float = 0.0) -> Tensor:
    """Upper bound of  max over the boxes of ||sum_t a_t h_t^T||_F, (batch, rows)."""
    lengths = [torch.linalg.vector_norm(use.rows, dim=-1) for use in uses]
    sizes = [torch.linalg.vector_norm(_largest(use), dim=-1)[:, None] for use in uses]
    apart = sum(length * size for length, size in zip(lengths, sizes, strict=True))
    if len(uses) == 1:
        return apart
    gram = _gram(uses)
    lost = 2.0 * gamma * apart**2
    low, high = _products(uses)
    joint = _root((gram.clamp(min=0.0) * high + gram.clamp(max=0.0) * low).sum(dim=(-2, -1)) + lost)
    if all(use.low is use.high for use in uses):
        return torch.minimum(joint, apart)
    centers, radii = zip(*(_center_radius(use) for use in uses), strict=True)
    radii = [
        torch.zeros_like(center) if radius is None else radius for center, radius in zip(centers, radii, strict=True)
    ]
    middle = _root((gram * _outer(centers)).sum(dim=(-2, -1)) + lost)
    around = _root((gram.abs() * _outer(radii)).sum(dim=(-2, -1)) + lost)
    return torch.minimum(torch.minimum(joint, apart), middle + around)


def _gram(uses: list[Use]) -> Tensor:
    """a_s . a_t, (batch or 1, rows, T, T)."""
    batch = max(use.rows.shape[0] for use in uses)
    rows = torch.stack([use.rows.expand(batch, -1, -1) for use in uses], dim=-2)
    return rows @ rows.mT


def _products(uses: list[Use]) -> tuple[Tensor, Tensor]:
    """Bounds of h_s . h_t, (batch, 1, T, T) each."""
    lows, highs = (_stacked([getattr(use, end) for use in uses]) for end in ("low", "high"))
    if all(use.low is use.high for use in uses):
        return (_outer([use.low for use in uses]),) * 2
    low, high = [], []
    for one_low, one_high in zip(lows.unbind(1), highs.unbind(1), strict=True):  # one s with all t at a time
        ends = torch.stack([a[:, None] * b for a in (one_low, one_high) for b in (lows, highs)])
        low.append(ends.amin(dim=0).sum(dim=-1))
        high.append(ends.amax(dim=0).sum(dim=-1))
    return torch.stack(low, dim=1)[:, None], torch.stack(high, dim=1)[:, None]


def _stacked(vectors: list[Tensor]) -> Tensor:
    batch = max(vector.shape[0] for vector in vectors)
    return torch.stack([vector.expand(batch, -1) for vector in vectors], dim=1)


def _outer(vectors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """v_s . v_t, (batch, 1, T, T)."""
    stacked = _stacked(list(vectors))
    return (stacked @ stacked.mT)[:, None]


def _root(squares: Tensor) -> Tensor:
    """The root, 0 of what is rounded to less than 0; it has no gradient there."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
