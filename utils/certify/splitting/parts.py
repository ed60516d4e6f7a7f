"""The open parts of one sample's perturbation set, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...bounds.alpha import SlopeTable, select
from ...bounds.splits import Cuts


@dataclass
class Parts:
    """A batch of parts, each about one row of the spec matrix.

    Attributes:
        row: its number, (parts,).
        bound: a lower bound of the row's margin over the part, (parts,), float64.
        cuts: which part it is.
        slopes: the planes' slopes to start from.
    """

    row: Tensor
    bound: Tensor
    cuts: Cuts
    slopes: SlopeTable

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, chosen: Tensor) -> Parts:
        return Parts(self.row[chosen], self.bound[chosen], self.cuts[chosen], select(self.slopes, chosen))

    def halves(self, neuron: Tensor, point: Tensor) -> Parts:
        """Both sides of one more cut for each part, those where neurons are at least ``point`` first, (2 parts,)."""
        twice = self[torch.arange(len(self), device=self.row.device).repeat(2)]
        side = torch.ones_like(point)
        cuts = twice.cuts.and_at(neuron.repeat(2), torch.cat((side, -side)), point.repeat(2))
        return Parts(twice.row, twice.bound, cuts, twice.slopes)

    def join(self, other: Parts) -> Parts:
        """Both batches as one."""
        mine, theirs = _filled(self.cuts, other.cuts)
        cuts = Cuts(*(torch.cat(pair) for pair in zip(vars(mine).values(), vars(theirs).values(), strict=True)))
        slopes = [_joined(a, b) for a, b in zip(self.slopes, other.slopes, strict=True)]
        return Parts(torch.cat((self.row, other.row)), torch.cat((self.bound, other.bound)), cuts, slopes)


def _joined(first, second):
    if first is None:
        return None
    return tuple(
        tuple(torch.cat(pair) for pair in zip(*planes, strict=True)) for planes in zip(first, second, strict=True)
    )


def _filled(first: Cuts, second: Cuts) -> tuple[Cuts, Cuts]:
    """With as many cuts a part in both."""
    count = max(first.neuron.shape[1], second.neuron.shape[1])

    def fill(cuts: Cuts) -> Cuts:
        missing = count - cuts.neuron.shape[1]
        neuron = torch.nn.functional.pad(cuts.neuron, (0, missing), value=-1)
        return Cuts(neuron, *(torch.nn.functional.pad(one, (0, missing)) for one in list(vars(cuts).values())[1:]))

    return fill(first), fill(second)
