"""What a plain training of sentences minimises, and what is watched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...training.loop import Objective
from ..words import Group
from .net import SentimentNet

WATCHED_AT_ONCE = 200


class Plain(Objective):
    """Cross entropy."""

    selects = "accuracy"  # of the development set: the epoch in which it is highest is kept

    def group_loss(self, net: SentimentNet, group: Group, progress: float) -> Tensor:
        """Mean over the group, after a share ``progress`` of all steps."""
        return nn.functional.cross_entropy(net(group.numbers), group.labels)

    def settled(self, progress: float) -> bool:
        """Whether an epoch that ends here may be the one that is kept."""
        return True

    def watch(self, net: SentimentNet, groups: Sequence[Group]) -> dict[str, float]:
        """An epoch's entries in the history besides the loss, of the development set."""
        return {"accuracy": accuracy(net, groups)}


@torch.no_grad()
def accuracy(net: SentimentNet, groups: Sequence[Group]) -> float:
    """Share of the sentences that the network gives their label."""
    net.eval()
    right = sum(
        int((net(part.numbers).argmax(dim=1) == part.labels).sum())
        for group in groups
        for part in group.batches(WATCHED_AT_ONCE)
    )
    return right / sum(map(len, groups))
