"""What rows lose by squares of moves of frames that share a budget: not all of them can spend it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...graph.nodes import Frame
from ..backward.contributions import spread


class SharedSquares:
    """Losses  c |d|^2  of one backward pass, by frames: d are the moves of some frames, of which |d|^2 is the sum.

    A frame costs what all the losses do that it is in. As squares of all frames' moves add up to the budget at most,
    the losses together are at most what the dearest frame costs.
    """

    def __init__(self, batch: int | None):
        """``batch``: samples of the pass, where nodes may have fewer."""
        self._batch, self._costs = batch, {}

    def take(self, frames: Sequence[Frame], lost: Tensor) -> None:
        """``lost``, (batch, rows), is c times the budget."""
        own = spread(lost, 0, self._batch)
        for frame in frames:
            self._costs[frame] = self._costs[frame] + own if frame in self._costs else own

    def most(self) -> Tensor | None:
        """(batch, rows); None for nothing."""
        return torch.stack(torch.broadcast_tensors(*self._costs.values())).amax(dim=0) if self._costs else None
