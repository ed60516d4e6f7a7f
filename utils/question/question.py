"""A question: which margins of which network stay positive around which inputs, under which threat."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.graph import Graph
from ..network.reading import Network, check_network, num_classes, read_network
from .arguments import as_classes, as_eps, as_inputs
from .specification import margin_rows
from .threat import Threat


class Question:
    """A batch of inputs, their margins and a threat model, all checked; what bounds and attacks answer.

    Attributes:
        model: the network, as it was read.
        x: the inputs as frames, (batch, T, n).
        rows: the spec matrix C, (batch, n_specs, classes).
        threat: to this batch.
    """

    def __init__(
        self,
        model: nn.Module | Graph,
        x: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        threat: Threat | None = None,
    ):
        threat = threat or Threat()
        self.model, self.x = read_network(model, as_inputs(x))
        labels = as_classes(labels, "labels", f"({len(self.x)},) of integers")
        if targets is not None:
            targets = as_classes(targets, "targets", "(batch,) or (batch, n_specs) of integers, or one")
            targets = targets.expand(len(self.x)) if targets.dim() == 0 else targets
        if threat.lengths is not None:
            lengths = as_classes(threat.lengths, "lengths", f"({len(self.x)},) of integers")
            threat = replace(threat, lengths=lengths)
        check_inputs(self.model, self.x, labels, threat.lengths)
        self.rows = margin_rows(labels, num_classes(self.model), targets).to(self.x.device)
        self.threat = threat.to(self.x)

    def eps(self, value: Any, dtype: torch.dtype) -> Tensor:
        """Radii of the samples, (batch,) or (batch, T), from what a user gave. Raises ValueError if they do not fit."""
        return as_eps(value, self.x, dtype)

    def part(self, samples: Tensor | slice) -> Question:
        """The question about some samples."""
        part = copy.copy(self)
        part.x, part.rows, part.threat = self.x[samples], self.rows[samples], self.threat.part(samples)
        return part


def check_inputs(model: Network, x: Tensor, labels: Tensor, lengths: Tensor | None = None) -> None:
    """Raise ValueError, saying what is wrong, unless x, (batch, T, n), labels and lengths, (batch,), fit the model."""
    if x.dim() != 3 or x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, T, n) with at least one sample and frame, not {tuple(x.shape)}")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels must be ({x.shape[0]},) of integers, not {tuple(labels.shape)} of {labels.dtype}")
    if lengths is not None:
        if lengths.shape != x.shape[:1]:
            raise ValueError(
                f"lengths must be ({x.shape[0]},) of integers, not {tuple(lengths.shape)} of {lengths.dtype}"
            )
        if bool(((lengths < 1) | (lengths > x.shape[1])).any()):
            raise ValueError(f"lengths must be from 1 to the {x.shape[1]} frames of x")
    if not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError("x must be finite floating-point numbers")
    check_network(model, x, lengths)
