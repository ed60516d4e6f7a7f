"""Coefficients that the children of a node hand over, added up."""

from __future__ import annotations

import torch
from torch import Tensor

# Coefficients handed to a node: for its elements and its samples from these on; None for all elements.
Contribution = tuple[int | None, int, Tensor]


def spread(tensor: Tensor, first: int, batch: int | None) -> Tensor:
    """A tensor of some samples with zeros for the others of a batch; as it is for batch None."""
    after = 0 if batch is None else batch - first - tensor.shape[0]
    if first == 0 and after == 0:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (first, after))


def gather(contributions: list[Contribution], size: int, batch: int | None) -> Tensor:
    """Sum of what children handed over; slices are put side by side if they tile the node, else padded with zeros.

    With a ``batch``, children may have fewer samples than that.
    """
    if len(contributions) == 1 and contributions[0][0] is None:
        return spread(contributions[0][2], contributions[0][1], batch)
    whole = [spread(part, first, batch) for start, first, part in contributions if start is None]
    parts = sorted(((start, part) for start, _, part in contributions if start is not None), key=lambda part: part[0])
    if parts:
        whole.append(_tile(parts, size))
    return whole[0] if len(whole) == 1 else sum(whole[1:], start=whole[0])


def _tile(parts: list[tuple[int, Tensor]], size: int) -> Tensor:
    batch = max(part.shape[0] for _, part in parts)
    parts = [(start, part.expand(batch, -1, -1)) for start, part in parts]
    ends = [start + part.shape[-1] for start, part in parts]
    if [start for start, _ in parts] == [0, *ends[:-1]] and ends[-1] == size:
        return torch.cat([part for _, part in parts], dim=-1)
    return sum(torch.nn.functional.pad(part, (start, size - start - part.shape[-1])) for start, part in parts)
