"""A question: which margins of which network stay positive around which inputs, under which threat."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.graph import Graph
from ..network.constants.groups import SeveralReadings, groups_of
from ..network.outputs import SCORES, Outputs
from ..network.reading import Network, TracedModule, check_network, output_shape, read_network
from .arguments import as_classes, as_eps, as_inputs
from .specification import IGNORED, output_rows
from .threat import Threat


class Question:
    """A batch of inputs, their margins and a threat model, all checked; what bounds and attacks answer.

    Attributes:
        model: the network, as it was read.
        x: the inputs as frames, (batch, T, n).
        rows: the spec matrix C, (batch, n_specs, outputs).
        offsets: what is added to the margins, (batch, n_specs), or None.
        threat: to this batch.
        labels: (batch,), or (batch, T) of outputs of every step.
        picks_one: whether one of several classes has to win, and not one in every step, or a score to keep its sign.
    """

    offsets: Tensor | None = None
    labels: Tensor | None = None

    def __init__(
        self,
        model: nn.Module | Graph,
        x: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        threat: Threat | None = None,
        outputs: Outputs = SCORES,
        extra: Any = None,
    ):
        threat = threat or Threat()
        x = as_inputs(x)
        self.model, self.x = read_network(model, x, outputs, extra)
        labels = as_classes(labels, "labels", f"({len(self.x)},) of integers")
        if targets is not None:
            targets = as_classes(targets, "targets", "(batch,) or (batch, n_specs) of integers, or one")
            targets = targets.expand(len(self.x)) if targets.dim() == 0 else targets
        threat = self._checked(threat)
        if labels.shape[:1] != self.x.shape[:1]:
            raise ValueError(
                f"labels must be ({len(self.x)},) of integers, not {tuple(labels.shape)} of {labels.dtype}"
            )
        shape = output_shape(self.model)
        self.rows = output_rows(labels, shape, targets).to(self.x.device)
        self.labels = labels.to(self.x.device)
        self.threat = threat.to(self.x, x.shape[1:])
        self.picks_one = labels.dim() == 1 and shape.numel() > 1

    def _checked(self, threat: Threat) -> Threat:
        """The threat with lengths of whole numbers. Raises ValueError if inputs, model or lengths do not fit."""
        if threat.lengths is not None:
            lengths = as_classes(threat.lengths, "lengths", f"({len(self.x)},) of integers")
            threat = replace(threat, lengths=lengths)
        check_inputs(self.model, self.x, threat.lengths)
        return threat

    def check_picks_one(self, what: str) -> None:
        """Raise ValueError unless one of several classes has to win; ``what`` asks for it."""
        if not self.picks_one:
            raise ValueError(f"{what} are for models with a score for each of several classes, and one label a sample")

    @property
    def others(self) -> Tensor | None:
        """The classes that are compared with the label, (batch, n_specs), as targets; None of scores apart."""
        return self.rows.argmin(dim=2) if self.picks_one else None

    def arranged(self, margins: Tensor) -> Tensor:
        """Margins (batch, n_specs) as (batch, T, n_specs) where there is a label a step; inf of steps without one."""
        if self.labels.dim() == 1:
            return margins
        apart = margins.unflatten(1, (self.labels.shape[1], -1))
        return apart.masked_fill((self.labels == IGNORED).to(margins.device)[..., None], torch.inf)

    def eps(self, value: Any, dtype: torch.dtype) -> Tensor:
        """Radii of the samples, (batch,) or (batch, T), from what a user gave. Raises ValueError if they do not fit."""
        eps = as_eps(value, self.x, dtype)
        if self.threat.norm == 0.0 and bool((eps != eps.round()).any()):
            raise ValueError("eps counts what changes where p = 0: it must be whole numbers")
        return eps

    def part(self, samples: Tensor | slice) -> Question:
        """The question about some samples."""
        part = copy.copy(self)
        if isinstance(self.model, SeveralReadings):
            part.model = self.model.part(samples)
        part.x, part.rows, part.threat = self.x[samples], self.rows[samples], self.threat.part(samples)
        part.labels = None if self.labels is None else self.labels[samples]
        part.offsets = None if self.offsets is None else self.offsets[samples]
        return part

    def groups(self) -> list[tuple[Tensor, Question]]:
        """Samples that are computed alike, and the question about them: all, unless constants of theirs differ."""
        found = groups_of(self.model, len(self.x))
        if len(found) == 1:
            return [(found[0][0].to(self.x.device), self)]
        return [(members, self.part(members)) for members in (one.to(self.x.device) for one, _ in found)]

    def row_by_row(self) -> Question:
        """The question with a sample of its own for every row of every sample, in their order."""
        batch, count = self.rows.shape[:2]
        apart = self.part(torch.arange(batch, device=self.x.device).repeat_interleave(count))
        apart.rows = self.rows.reshape(batch * count, 1, -1)
        apart.offsets = None if self.offsets is None else self.offsets.reshape(-1, 1)
        return apart


class OutputQuestion(Question):
    """How large linear functions of a module's outputs can get, as margins; what need not be a classifier.

    Attributes:
        shape: of a sample's outputs.
    """

    picks_one = False

    def __init__(self, model: nn.Module | Graph, x: Tensor, threat: Threat, output: Any = None, extra: Any = None):
        x = as_inputs(x)
        self.model, self.x = read_network(model, x, Outputs(output, scores=False), extra)
        if output is not None and not isinstance(self.model, TracedModule):
            raise ValueError(f"the model returns one tensor: leave out output={output!r}")
        threat = self._checked(threat)
        self.shape = output_shape(self.model)
        self.rows, self.threat = (
            torch.eye(self.shape.numel(), device=self.x.device)[None],
            threat.to(self.x, x.shape[1:]),
        )

    def arranged(self, margins: Tensor) -> Tensor:
        return margins


def check_inputs(model: Network, x: Tensor, lengths: Tensor | None = None) -> None:
    """Raise ValueError, saying what is wrong, unless x, (batch, T, n), and lengths, (batch,), fit the model."""
    if x.dim() != 3 or x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, T, n) with at least one sample and frame, not {tuple(x.shape)}")
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
