"""Images that are moved and mirrored at random while a network is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loop import Change


def random_change(shift: int, flip: bool) -> Change | None:
    """Moves each image by up to ``shift`` pixels along both axes, zeros coming in, and mirrors every second one.

    The change raises ValueError where that can leave nothing of an image.
    """
    if not shift and not flip:
        return None

    def change(images: Tensor, random: torch.Generator) -> Tensor:
        """(batch, channels, height, width)."""
        height, width = images.shape[2:]
        if shift >= min(height, width):
            raise ValueError(f"--shift {shift} moves images of {height} x {width} pixels out of their frame")
        rows, columns = (_places(images, random, shift, size) for size in (height, width))
        if flip:
            mirrored = torch.rand(len(images), generator=random).to(images.device) < 0.5
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        padded = F.pad(images, (shift,) * 4)
        samples = torch.arange(len(images), device=images.device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]]
        # In torch 2.13 the gradient of a convolution over images whose channels come last can end in a double free.
        return moved.permute(0, 3, 1, 2).contiguous()

    return change


def _places(images: Tensor, random: torch.Generator, shift: int, size: int) -> Tensor:
    """Rows or columns of the padded images that are taken, (batch, size)."""
    first = torch.randint(2 * shift + 1, (len(images), 1), generator=random)
    return (first + torch.arange(size)).to(images.device)
