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


IGNORED = -100  # label of a step that asks for nothing, as in torch's losses


def output_rows(labels: Tensor, shape: torch.Size, targets: Tensor | None = None) -> Tensor:
    """The spec matrix of a classifier by the shape of its outputs for a sample, (batch, n_specs, outputs).

    Scores of classes, (K,), have the rows of ``margin_rows``. One score, () or (1,), stands for class 1 where it is
    positive and for class 0 elsewhere: the row is the score, or minus it. Scores of every step, (T, K), or one score of
    every step, (T,) or (T, 1), have labels (batch, T), and the rows of all steps one after the other. A step whose
    label is ``IGNORED`` repeats the rows of the sample's first step that has one.

    Raises:
        ValueError: labels or targets do not fit the outputs.
    """
    if labels.dim() == 1 and shape.numel() == 1:
        return _sign_rows(labels, targets)
    if labels.dim() == 1:
        if len(shape) != 1:
            raise ValueError(f"a sample has outputs {tuple(shape)}: labels must be (batch, {shape[0]}), one a step")
        return margin_rows(labels, shape.numel(), targets)
    if labels.dim() != 2 or not shape or labels.shape[1] != shape[0] or len(shape) > 2:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit outputs {tuple(shape)} of a sample")
    asked = labels != IGNORED
    if not bool(asked.any(dim=1).all()):
        raise ValueError(f"every step of a sample has the label {IGNORED}, which asks for nothing")
    batch, steps = labels.shape
    scores = shape[1] if len(shape) == 2 else 1
    flat = torch.where(asked, labels, 0).flatten()
    if scores == 1:
        per_step = _sign_rows(flat, targets)
    else:
        if targets is not None:
            targets = torch.where(asked, targets, 1).flatten() if targets.shape == labels.shape else targets
            if len(targets) != len(flat):
                raise ValueError(f"targets must be (batch, T) = {(batch, steps)}, one a step")
        per_step = margin_rows(flat, scores, targets)
    count = per_step.shape[1]
    per_step = per_step.reshape(batch, steps, count, scores)
    rows = per_step.new_zeros(batch, steps, count, steps, scores)
    at = torch.arange(steps, device=labels.device)
    rows[:, at, :, at] = per_step.transpose(0, 1)
    first = rows[torch.arange(batch, device=labels.device), asked.int().argmax(dim=1)]
    rows = torch.where(asked[:, :, None, None, None], rows, first[:, None])
    return rows.reshape(batch, steps * count, steps * scores)


def _sign_rows(labels: Tensor, targets: Tensor | None) -> Tensor:
    """Plus or minus the only score, (batch, 1, 1)."""
    if bool(((labels != 0) & (labels != 1)).any()):
        raise ValueError("the model has one score, which says whether the class is 1: labels must be 0 or 1")
    if targets is not None:
        raise ValueError("the model has one score, and so no targets: leave them out")
    return torch.where(labels == 1, 1.0, -1.0)[:, None, None]
