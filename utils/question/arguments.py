"""Arguments as users have them, lists, arrays and numbers, made tensors; what cannot be is named in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..network.state import usable_tensor

NORM_NAMES = {"0": 0.0, "1": 1.0, "2": 2.0, "inf": math.inf}


def as_tensor(value: Any, name: str, meaning: str) -> Tensor:
    """A tensor of numbers, an array, a list of tensors or numbers, or a number as a tensor."""
    if isinstance(value, Tensor):
        return usable_tensor(value)
    try:
        if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
            return torch.stack([usable_tensor(part) for part in value])
        array = np.asarray(value)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))  # as torch wants it; a copy
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name} must be {meaning}, not {_described(value)}") from None


def as_inputs(value: Any) -> Tensor:
    """Inputs, in float32 if they are lists of Python's numbers, which have no precision of their own."""
    x = as_tensor(value, "x", "a tensor or an array of numbers, (batch, T, n)")
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return x.to(torch.float32) if type(value) is float else x


def _described(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def as_classes(value: Any, name: str, meaning: str) -> Tensor:
    """Whole numbers as int64."""
    tensor = as_tensor(value, name, meaning)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be {meaning}, not {tuple(tensor.shape)} of {tensor.dtype}")
    return tensor.to(torch.int64)


def as_eps(value: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Radii of the samples of x, (batch, T, n), in a precision: (batch,) or (batch, T)."""
    meaning = f"a number, (batch,) or (batch, T) = {tuple(x.shape[:2])} of numbers"
    eps = as_tensor(value, "eps", meaning)
    if eps.dtype == torch.bool or eps.is_complex() or eps.dim() > 2 or eps.shape != x.shape[: eps.dim()]:
        raise ValueError(f"eps must be {meaning}, not {tuple(eps.shape)} of {eps.dtype}")
    if not bool(((eps >= 0) & eps.isfinite()).all()):
        raise ValueError("eps must be a finite number >= 0, or (batch,) or (batch, T) of these")
    eps = eps.to(x.device, dtype)
    return eps.expand(len(x)) if eps.dim() == 0 else eps


def check_precision(dtype: torch.dtype, what: str = "bounds are computed") -> None:
    """Raise ValueError for floats that are too short to bound anything, and for what are no floats."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{what} in torch.float32 or torch.float64, not {dtype}")


def as_norm(value: Any) -> float:
    """0, 1, 2 or inf, from a number or from "2", "l2", "linf" ..."""
    if isinstance(value, str):
        value = NORM_NAMES.get(value.lower().removeprefix("l").removeprefix("_"), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number not in NORM_NAMES.values():
        raise ValueError(f"norm: p must be 1, 2 or inf, or 0, not {value!r}")
    return number


def as_clip(value: Any) -> tuple[float, float] | None:
    """(lowest, highest)."""
    if value is None:
        return None
    try:
        low, high = map(float, value)
    except (TypeError, ValueError):
        raise ValueError(f"clip must be (lowest, highest), two numbers, not {_described(value)}") from None
    if not low <= high:
        raise ValueError(f"clip must be (lowest, highest), not {(low, high)}")
    return low, high


def check_names(threat: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError if there are arguments of other names."""
    for name in threat:
        if name not in known:
            raise ValueError(f"there is no argument {name!r} here; of a threat model there are {', '.join(known)}")
