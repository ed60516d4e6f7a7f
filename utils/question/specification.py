"""Specifications: which linear functions of the outputs have to stay positive."""

from __future__ import annotations

import torch
from torch import Tensor


def margin_rows(labels: Tensor, num_classes: int, targets: Tensor | None = None) -> Tensor:
    """The spec matrix C, (batch, n_specs, classes), with rows e_label - e_other.

    Args:
        labels: (batch,) classes that must win.
        targets: (batch,) or (batch, n_specs) classes they must beat; None for all others, in increasing order.

    Raises:
        ValueError: a label or target is no class, or a target is the label itself.
    """
    if targets is None:
        others = torch.arange(num_classes - 1, device=labels.device).expand(len(labels), -1)
        targets = others + (others >= labels[:, None])
    elif targets.is_floating_point() or targets.dim() not in (1, 2) or len(targets) != len(labels):
        raise ValueError(f"targets must be (batch,) or (batch, n_specs) of integers, not {tuple(targets.shape)}")
    targets = targets.to(labels.device).reshape(len(labels), -1)
    if targets.shape[1] == 0:
        raise ValueError("there is no class to compare the label with")
    for name, classes in (("label", labels), ("target", targets)):
        if bool(((classes < 0) | (classes >= num_classes)).any()):
            raise ValueError(f"a {name} is not one of the classes 0 ... {num_classes - 1}")
    if bool((targets == labels[:, None]).any()):
        raise ValueError("a target is the sample's own label")
    identity = torch.eye(num_classes, device=labels.device)
    return identity[labels][:, None] - identity[targets]
