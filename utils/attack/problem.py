"""What attacks work on: margins and their gradients under one threat model, and what they hand back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.graph import Graph
from ..network.constants.groups import SeveralReadings, groups_of
from ..network.models import SequenceClassifier
from ..network.reading import Network, graph_of
from ..perturbation.moves import FrameBalls
from ..precision import without_cudnn
from ..question.question import Question
from ..question.threat import threat_of

VERDICT = torch.float64


class AttackProblem:
    """Margins, and their gradients, of a batch under one threat model.

    Arguments as for ``utils.certify.certified_margin``, but that an attack's inputs can be clipped for every p.
    """

    def __init__(
        self,
        model: nn.Module | Graph,
        x: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        extra: Any = None,
        **threat: Any,
    ):
        told = threat_of(**threat)
        if told.lengths is not None:
            raise ValueError(
                "attacks take sequences of one length: leave out lengths, and cut x to the frames that count"
            )
        question = Question(model, x, labels, targets, told, extra=extra)
        self.question, self.rows, self._model = question, question.rows, question.model
        self.balls = question.threat.moves(question.x.detach().to(VERDICT))
        self._models: dict[tuple, Callable[[Tensor], Tensor]] = {}

    @property
    def counts(self) -> bool:
        """Whether eps counts what changes: p = 0."""
        return self.balls.norm == 0.0

    def __len__(self) -> int:
        return len(self.rows)

    def model(self, dtype: torch.dtype, network: Network | None = None) -> Callable[[Tensor], Tensor]:
        """The network, or that of one group of samples, in another precision: logits of (batch, T, n)."""
        network = network or self._model
        key = (dtype, id(network))
        if key not in self._models and isinstance(network, SequenceClassifier):
            self._models[key] = copy.deepcopy(network).to(dtype).eval().requires_grad_(False)
        elif key not in self._models:
            graph = graph_of(network, self.balls.x.shape[1], dtype, "plane")
            self._models[key] = graph.detach().evaluate
        return self._models[key]

    def _logits(self, x: Tensor, chosen: Tensor | slice) -> Tensor:
        """Of inputs (m, ..., T, n) of the chosen samples, (m, ..., outputs)."""
        outputs, network = self.rows.shape[-1], self._model
        if not isinstance(network, SeveralReadings):
            return self.model(x.dtype)(x.flatten(0, -3)).reshape(*x.shape[:-2], outputs)
        logits = x.new_zeros(*x.shape[:-2], outputs)
        for members, own in groups_of(network.part(chosen), len(x)):
            members = members.to(x.device)
            part = x[members]
            found = self.model(x.dtype, own)(part.flatten(0, -3)).reshape(*part.shape[:-2], outputs)
            logits = logits.index_copy(0, members, found)
        return logits

    def logits(self, x: Tensor) -> Tensor:
        """The outputs of all samples at inputs x, (batch, T, n), in the precision of x, (batch, outputs)."""
        return self._logits(x, slice(None))

    def margins(self, x: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        """All margins (m, ..., n_specs) of the chosen samples at inputs x, (m, ..., T, n), in the precision of x."""
        rows = self.rows[chosen].to(x.dtype)
        with without_cudnn():
            logits = self._logits(x, chosen)
        margins, offsets = torch.einsum("b...c,bsc->b...s", logits, rows), self.question.offsets
        if offsets is None:
            return margins
        return margins + offsets[chosen].to(margins).reshape(len(rows), *[1] * (margins.dim() - 2), -1)

    def worst_margin(self, x: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        return self.margins(x, chosen).amin(dim=-1)

    def linear_radius(self) -> Tensor:
        """eps at which the first margin to vanish would do so if all were linear, (batch,); 0 if one has already."""
        x = self.balls.x[:, None].expand(-1, self.rows.shape[1], -1, -1).detach().clone()
        margins, gradient = margin_and_gradient(self, x, slice(None))
        slope = self.balls.gradient_norms(gradient).sum(dim=-1)
        radius = (margins.diagonal(dim1=-2, dim2=-1).clamp(min=0.0) / slope).nan_to_num(nan=0.0, posinf=torch.inf)
        return radius.amin(dim=1)


def margin_and_gradient(problem: AttackProblem, x: Tensor, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Margins (m, n_specs, ..., n_specs) at x, (m, n_specs, ..., T, n), and the gradient of row i's own at x[:, i]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        margins = problem.margins(x, chosen)
        own = margins.movedim(1, -2).diagonal(dim1=-2, dim2=-1)
        (gradient,) = torch.autograd.grad(own.sum(), x)
    return margins.detach(), gradient


@dataclass
class AttackResult:
    """What an attack found.

    Attributes:
        x: perturbed inputs, (batch, T, n), float64: those with the least margin.
        margin: worst margin there, (batch,), float64; below 0 where the attack succeeded.
    """

    x: Tensor
    margin: Tensor


@dataclass
class RadiusAttackResult(AttackResult):
    """``radius``, (batch,): size max_t ||x'_t - x_t||_p of the smallest perturbation that succeeded; inf if none did.

    0 where the input is misclassified (margin <= 0) as it is. ``x`` and ``margin`` belong to that perturbation; x is
    unperturbed where there is none.
    """

    radius: Tensor


def is_inside(balls: FrameBalls, x: Tensor, eps: Tensor) -> Tensor:
    """Whether x, (m, T, n), lies in the set of radii eps, (m, groups), as float64 has it, (m,)."""
    delta = x.to(VERDICT) - balls.x.to(VERDICT)
    inside = (balls.sizes(delta) <= eps).all(dim=-1)
    inside &= (delta == 0).logical_or(balls.may_move()).flatten(1).all(dim=1)
    if balls.clip is not None:
        inside &= ((x >= balls.clip[0]) & (x <= balls.clip[1])).flatten(1).all(dim=1)
    return inside
