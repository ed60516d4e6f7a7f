"""Sums over the values of nodes, in blocks, so that they round less."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 256  # terms that are added at once, at least: sums of sums round less than one long sum


def block_of(terms: int) -> int:
    return max(BLOCK, math.isqrt(terms))


def sum_length(terms: int) -> int:
    """Terms of the longest sum in a sum of blocks."""
    block = block_of(terms)
    return terms if terms <= block else block - (-terms // block)


def apply_rows(coefficients: Tensor, values: Tensor) -> Tensor:
    """A v for every row: (batch or 1, rows, n) and (batch or 1, n) to (batch, rows)."""
    if values.shape[-1] <= BLOCK:
        return _apply_rows(coefficients, values)
    block = block_of(values.shape[-1])
    parts = zip(coefficients.split(block, dim=-1), values.split(block, dim=-1), strict=True)
    return sum(_apply_rows(*part) for part in parts)


def _apply_rows(coefficients: Tensor, values: Tensor) -> Tensor:
    if coefficients.shape[0] == 1:
        return values @ coefficients[0].T
    if values.shape[0] == 1:
        return coefficients @ values[0]
    # As a row vector times a matrix: a batch of matrices times column vectors runs ten times slower.
    return torch.bmm(values.unsqueeze(1), coefficients.mT).squeeze(1)
