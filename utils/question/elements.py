"""Which elements of the input move, and how far each: masks and scales as users have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import as_tensor

SHAPES = "(n,), (T, n), (batch, T, n) or of the input's shape"


def element_scales(features: Any, scales: Any, x: Tensor) -> Tensor | None:
    """By what each element's move is larger, (batch, T, n) in float64, 0 where it is exact; None where all are 1.

    Args:
        features: numbers of a frame's elements, or a mask of bool; None for all.
        scales: numbers of at least 0; None for 1.
        x: frames, (batch, T, n).

    Raises:
        ValueError: they do not fit; the message says why.
    """
    if features is None and scales is None:
        return None
    total = torch.ones(x.shape, dtype=torch.float64, device=x.device)
    if scales is not None:
        given = as_tensor(scales, "scales", f"numbers of at least 0, {SHAPES}").to(x.device)
        if given.is_complex() or not bool(((given >= 0) & given.isfinite()).all()):
            raise ValueError("scales must be finite numbers of at least 0")
        total = total * by_element(given.double(), "scales", x)
    if features is not None:
        total = total * _mask(features, x)
    return total


def _mask(features: Any, x: Tensor) -> Tensor:
    given = as_tensor(features, "features", "numbers of elements, or a mask of bool").to(x.device)
    if given.dtype == torch.bool:
        return by_element(given, "features", x)
    size, chosen = x.shape[2], given.reshape(-1).tolist()
    if not chosen or given.is_floating_point() or any(not 0 <= number < size for number in chosen):
        raise ValueError(f"features must be from 0 ... {size - 1}, or a mask of bool, not {chosen}")
    mask = torch.zeros(size, dtype=torch.bool, device=x.device)
    mask[chosen] = True
    return mask.expand(x.shape)


def by_element(given: Tensor, name: str, x: Tensor) -> Tensor:
    """A tensor of numbers a feature, an element or an element of every sample, as (batch, T, n)."""
    batch, frames, size = x.shape
    if given.dim() == 0 or given.shape == (size,):
        return given.expand(x.shape)
    if given.numel() == batch * frames * size and len(given) == batch:
        return given.reshape(x.shape)
    if given.numel() == frames * size:
        return given.reshape(frames, size).expand(x.shape)
    raise ValueError(f"{name} must be {SHAPES}, with x (batch, T, n) = {tuple(x.shape)}, not {tuple(given.shape)}")


def box_of(lower: Any, upper: Any) -> tuple[Tensor, Tensor]:
    """The centre of a box and half its sides, (batch, ...) each; rounded so that both ends are inside.

    ``certified_margin(model, x, labels, 1.0, norm=inf, scales=sides)`` is about the box then.
    """
    lower, upper = (as_tensor(end, name, "numbers") for end, name in ((lower, "lower"), (upper, "upper")))
    if not lower.is_floating_point() or not upper.is_floating_point() or lower.shape != upper.shape:
        raise ValueError("lower and upper must be floating-point numbers of one shape, that of the input")
    if not bool((lower <= upper).all()) or not bool(torch.stack((lower, upper)).isfinite().all()):
        raise ValueError("lower and upper must be finite, and lower nowhere above upper")
    center = 0.5 * (lower + upper)
    sides = torch.maximum(upper - center, center - lower)
    above = torch.nextafter(sides, torch.full_like(sides, torch.inf))
    return center, torch.where(upper > lower, above, 0.0)


def box_sides(box: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """How far below and above x, (batch, T, n), a box (lower, upper) reaches, (batch, T, n) each in float64, outwards.

    Raises:
        ValueError: the ends do not fit, or x does not lie between them; the message says why.
    """
    if not isinstance(box, (tuple, list)) or len(box) != 2:
        raise ValueError("box must be (lower, upper)")
    given = (as_tensor(end, name, f"numbers, {SHAPES}") for end, name in zip(box, ("lower", "upper"), strict=True))
    lower, upper = (
        by_element(end.to(x.device).double(), name, x) for end, name in zip(given, ("lower", "upper"), strict=True)
    )
    at = x.detach().double()
    if not bool(((lower <= at) & (at <= upper) & lower.isfinite() & upper.isfinite()).all()):
        raise ValueError("x must lie in the box, whose ends must be finite")
    sides = (at - lower, upper - at)
    # In the precision of x, in which the sets are.
    rounded = (torch.nextafter(side.to(x.dtype), torch.full_like(x, torch.inf).detach()) for side in sides)
    return tuple(torch.where(side > 0, up.double(), 0.0) for side, up in zip(sides, rounded, strict=True))


def group_numbers(together: Any, x: Tensor, shape: Sequence[int] | None = None) -> Tensor | None:
    """Numbers of the groups of values that change together, (T, n); None for each value by itself.

    Args:
        together: "pixel", all channels of a place of an image; "frame"; numbers, (n,), (T, n) or of an input's shape.
        x: frames, (batch, T, n).
        shape: of one input before it was taken as frames.

    Raises:
        ValueError: they do not fit; the message says why.
    """
    frames, size = x.shape[1:]
    if together is None:
        return None
    if isinstance(together, str):
        if together == "frame":
            return torch.arange(frames, device=x.device)[:, None].expand(frames, size)
        if together != "pixel" or shape is None or len(shape) != 3 or frames != 1:
            raise ValueError(
                f"together must be 'frame', numbers, or 'pixel' of images (channels, height, width), not {together!r}"
            )
        return torch.arange(size // shape[0], device=x.device).repeat(shape[0])[None]
    given = as_tensor(together, "together", "'pixel', 'frame' or numbers of groups").to(x.device)
    if given.is_floating_point() or given.dtype == torch.bool or given.numel() not in (size, frames * size):
        wanted = f"'pixel', 'frame' or whole numbers, ({size},) or {(frames, size)}"
        raise ValueError(f"together must be {wanted}, not {tuple(given.shape)} of {given.dtype}")
    return given.reshape(-1, size).expand(frames, size)
