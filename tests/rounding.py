"""A pretended processor whose kernels round otherwise, by chance: what a test says must not rest on the last bits.

Matrix kernels order their sums by the instructions that a processor has, by the number of threads and by the sizes of
the matrices, so a sample can have other last bits in a batch than by itself. ``round_otherwise`` puts kernels in the
place of PyTorch's whose results differ by up to a unit of rounding of the sum of absolute terms, always alike for
operands of the same shapes and otherwise for any other.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

_kept: list[torch.library.Library] = []  # kernels live as long as these


def _noise(shape: tuple[int, ...], seed: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (np.finfo(dtype).eps * generator.uniform(-1.0, 1.0, size=shape)).astype(dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point():
        return torch.from_numpy(np.asarray(np.matmul(a.detach().numpy(), b.detach().numpy())))
    left, right = a.detach().numpy(), b.detach().numpy()
    with np.errstate(all="ignore"):
        exact, terms = np.matmul(left, right), np.matmul(np.abs(left), np.abs(right))
        moved = exact + np.where(np.isfinite(terms), terms, 0) * _noise(exact.shape, (*a.shape, *b.shape), exact.dtype)
    return torch.from_numpy(np.asarray(moved, dtype=exact.dtype))


def _plus_product(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = _product(a, b)
    product = product if alpha == 1 else alpha * product
    return product if beta == 0 else product + (total if beta == 1 else beta * total)


def round_otherwise() -> None:
    """Replace the CPU's matrix products for the rest of the process."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden is the purpose
        for name in ("mm", "bmm", "mv", "dot"):
            library.impl(name, _product, "CPU")
        for name in ("addmm", "baddbmm", "addmv"):
            library.impl(name, _plus_product, "CPU")
    _kept.append(library)
