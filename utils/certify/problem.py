"""The margins of a batch under one threat model, bounded at any eps: what certified margins and radii are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds.alpha import select, store, tune_slopes
from ..bounds.balls import Balls
from ..bounds.curve import CurvedPass, CurveTable, PassGuesses
from ..bounds.curve_tuning import tune_curves
from ..bounds.memory import PER_NEURON, Parts, samples_at_once
from ..bounds.passes import BoundPass
from ..choices.method import OF_ANY_SET, Method
from ..choices.tables import METHODS
from ..clock import Pace
from ..graph.convolution import Convolution
from ..graph.graph import Graph
from ..jacobian.shells import SHELLS, ShellPass
from ..network.reading import Network, graph_of
from ..perturbation.sets import Perturbation
from ..precision import full_precision
from ..question.question import Question
from ..question.threat import Threat, threat_of
from ..relaxation.curves import Curves

# A margin counts as positive if it exceeds this share of 1 + the sum of the absolute values of its terms: room for the
# rounding of sums and products, which the bounds, statements about real numbers, do not account for.
SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}

# Bytes of a sample's Gram matrix of neurons that "curve" may work on at once.
GRAM_BYTES = 2**26

# Bytes of coefficients of gradients that may be worked on at once.
GRADIENT_BYTES = 2**26

# Bytes of coefficients that are worked on at once, on a CPU: more fall out of its cache, less pay for Python.
CACHE_BYTES = 5 * 2**20
VALUE_BYTES = 64 * 2**20  # of values of a layer at once, in a forward pass
INTERVAL_BYTES = 64 * 2**20  # of what intervals are made of: fewer and larger operations pay more than a cache


class MarginProblem:
    """The margins that a question is about, for any eps, and how they are bounded."""

    def __init__(self, question: Question, method: Method | None = None):
        self.question, self.method = question, method or Method()
        self.slopes = self.curves = None
        self._graphs: dict[tuple[torch.dtype, bool, bool], Graph] = {}
        self._widest: int | None = None
        self._parts = Parts()
        self._guessed: tuple[Tensor, PassGuesses] | None = None
        self.threat.around(self.x, torch.ones_like(self.x[:, 0, 0]))  # raises what is wrong with the threat model
        self._check_method()

    def _check_method(self) -> None:
        if self.threat.norm == 0.0 and self.method.name not in OF_ANY_SET:
            known = ", ".join(OF_ANY_SET)
            raise ValueError(f"method {self.method.name} knows no set of p = 0: take one of {known}")

    @property
    def model(self) -> Network:
        return self.question.model

    @property
    def x(self) -> Tensor:
        """(batch, T, n)"""
        return self.question.x

    @property
    def rows(self) -> Tensor:
        """The spec matrix C, (batch, n_specs, classes)."""
        return self.question.rows

    @property
    def threat(self) -> Threat:
        return self.question.threat

    def graph(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None), bounded: bool = True) -> Graph:
        """The model unrolled, over the chosen samples' own lengths if these differ.

        With ``bounded=False`` it is only for values: convolutions stay what they are, whatever the method asks for.
        """
        dense = bounded and not self.method.takes_convolutions
        if self.threat.lengths is not None:
            return self._unroll(dtype, self.threat.lengths[chosen], dense)
        key = (dtype, torch.is_grad_enabled(), dense)
        if key not in self._graphs:
            self._graphs[key] = self._unroll(dtype, None, dense)
        return self._graphs[key]

    def _unroll(self, dtype: torch.dtype, lengths: Tensor | None, dense: bool) -> Graph:
        graph = graph_of(self.model, self.x.shape[1], dtype, self.method.relaxation, lengths)
        graph = graph if torch.is_grad_enabled() else graph.detach()
        return graph.dense() if dense else graph

    @full_precision()
    def clean_margins(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Margins of the chosen samples' unperturbed input, (m, n_specs)."""
        return self._in_parts(lambda own: self._margins_at(self.x[own].to(dtype), dtype, own), dtype, chosen)

    def _in_parts(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype, chosen: Tensor | slice) -> Tensor:
        """What a function of samples gives for those chosen, of as many at a time as have few values."""
        samples = torch.arange(len(self.x), device=self.x.device)[chosen]
        widest = max(node.size for node in self.graph(dtype, slice(0, 1), bounded=False).nodes)
        return self._parts(function, max(1, VALUE_BYTES // (widest * dtype.itemsize)), samples)

    def _margins_at(self, x: Tensor, dtype: torch.dtype, chosen: Tensor | slice) -> Tensor:
        logits = self.graph(dtype, chosen, bounded=False).evaluate(x)
        return self._shifted((self.rows[chosen].to(dtype) @ logits[..., None]).squeeze(-1), chosen)

    def _shifted(self, margins: Tensor, chosen: Tensor | slice) -> Tensor:
        """With what the question adds to its rows."""
        offsets = self.question.offsets
        return margins if offsets is None else margins + offsets[chosen].to(margins)

    @full_precision()
    def slack(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """What the chosen samples' margins must exceed to count as positive, (m, n_specs); see ``SLACK``."""

        def sizes(own: Tensor) -> Tensor:
            graph = self.graph(dtype, own, bounded=False)
            return graph.term_sizes(self.x[own].to(dtype), self.rows[own].to(dtype))

        total = 1.0 + self._in_parts(sizes, dtype, chosen)
        offsets = self.question.offsets
        return SLACK[dtype] * (total if offsets is None else total + offsets[chosen].to(total).abs())

    def resolution(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """The spacing of floats of x's precision at the greatest number that moves, (m,): no smaller eps certifies."""
        x = self.x[chosen].detach()
        size, scales = x.abs(), self.threat.scales
        if self.threat.box is not None:
            scales = torch.maximum(scales, self.threat.box)
        if scales is not None:
            size = torch.where(scales[chosen] > 0, size / scales[chosen].clamp(min=1e-300), 0.0)
        return torch.finfo(x.dtype).eps * (size.amax(dim=2) * self.threat.frames[chosen]).amax(dim=1).to(dtype)

    @full_precision()
    def margins(
        self, eps: Tensor, dtype: torch.dtype, chosen: Tensor | slice = slice(None), sound: bool = True
    ) -> Tensor:
        """Lower bounds of the margins, (m, n_specs), of the chosen samples at eps, (m,) or (m, T).

        With ``sound=False`` estimates, without what is taken off for rounding; of curved bounds they are much cheaper,
        and mostly a little too high.
        """
        samples = torch.arange(len(self.x), device=self.x.device)[chosen]
        size = self.at_once(dtype)
        return self._parts(lambda *part: self._margins(*part, dtype, sound), size, eps, samples)

    def at_once(self, dtype: torch.dtype) -> int:
        if self.method.integrates:
            return self._integrated_at_once(dtype)
        return self._samples_at_once(dtype) if self.curves is None else self._curved_at_once(dtype)

    def _integrated_at_once(self, dtype: torch.dtype) -> int:
        """Every spec row of a sample is a sample of its own in every shell, with rows for a whole frame."""
        nodes = self.graph(dtype, slice(0, 1)).nodes
        widest = max((operand.size for node in nodes for operand in node.relaxed_operands), default=1)
        rows = 2 * max(self.x.shape[2], widest)
        return max(1, GRADIENT_BYTES // (SHELLS * self.rows.shape[1] * rows * widest * dtype.itemsize))

    def _samples_at_once(self, dtype: torch.dtype) -> int:
        """As many as a processor's cache takes, more at once would be slower, or as many as a GPU's memory takes."""
        if self.x.device.type != "cpu":
            graph = self.graph(dtype, slice(0, 1))
            return samples_at_once(graph, self.rows.shape[1], dtype, self.x.device) or len(self.x)
        if self.method.name in ("ibp", "crown-ibp"):
            # Intervals are read once, whatever a cache holds; coefficients are those of the specification alone.
            sizes = [node.size for node in self.graph(dtype, slice(0, 1)).nodes]
            numbers = max(PER_NEURON * sum(sizes) // 8, self.method.name != "ibp" and self.rows.shape[1] * max(sizes))
            return max(4, INTERVAL_BYTES // (numbers * dtype.itemsize))
        if self._widest is None:
            nodes = self.graph(dtype, slice(0, 1)).nodes
            operands = {operand.bounded_through for node in nodes for operand in node.relaxed_operands}
            # Windows of convolutions are worked on in parts of their own.
            rows = max((one.size for one in operands if not isinstance(one, Convolution)), default=1)
            self._widest = rows * max(rows, *(one.size for one in operands), 1)
        # An operand of n neurons has 2 n rows of coefficients, of about n columns, or of those of the widest layer.
        return max(4, CACHE_BYTES // (2 * self._widest * dtype.itemsize))

    def _margins(self, eps: Tensor, chosen: Tensor, dtype: torch.dtype, sound: bool) -> Tensor:
        return self._shifted(self.bounds(eps, chosen, dtype, sound).margin(self.rows[chosen].to(dtype)), chosen)

    def bounds(self, eps: Tensor, chosen: Tensor, dtype: torch.dtype, sound: bool = True) -> BoundPass | ShellPass:
        """The pass that bounds some samples' margins, with what is tuned by now."""
        graph, perturbation = self.graph(dtype, chosen), self._perturbation(eps, chosen, dtype)
        if self.curves is not None:
            guesses = None if sound else self._guesses_of(chosen, dtype)
            return CurvedPass(graph, perturbation.uncut, select_curves(self.curves, chosen, dtype), sound, guesses)
        if self.method.integrates:
            how = {"chain": self.method.chain, "layers": self.method.layers, "direct": self.method.name == "shell"}
            how["shells"] = self.method.shells
            return ShellPass(graph, perturbation, sound=sound, **how)
        slopes = None if self.slopes is None else select(self.slopes, chosen, dtype)
        return METHODS[self.method.name](graph, perturbation, slopes, sound)

    def _perturbation(self, eps: Tensor, chosen: Tensor, dtype: torch.dtype) -> Perturbation:
        perturbation = self.threat.part(chosen).around(self.x[chosen].to(dtype), eps)
        return perturbation if self.method.takes_any_set else perturbation.uncut

    @full_precision()
    @torch.no_grad()
    def tune(
        self,
        eps: Tensor,
        dtype: torch.dtype,
        steps: int,
        chosen: Tensor | slice = slice(None),
        pace: Pace | None = None,
    ) -> None:
        """Tune the slopes of the chosen samples at eps, (m,) or (m, T), from those they have; ``margins`` uses them.

        ``pace``: see ``utils.bounds.tune_slopes``.
        """
        samples, size = torch.arange(len(self.x), device=self.x.device)[chosen], self._samples_at_once(dtype)
        table = self.slopes
        for part_eps, part in zip(eps.split(size), samples.split(size), strict=True):
            start = None if self.slopes is None else select(self.slopes, part, dtype)
            perturbation, rows = self._perturbation(part_eps, part, dtype), self.rows[part].to(dtype)
            kind = "crown-ibp" if self.method.name == "ball" else "crown"
            tuned, _ = tune_slopes(self.graph(dtype, part), perturbation, rows, steps, start, pace, kind)
            table = [None] * len(tuned) if table is None else table
            store(table, part, tuned, len(self.x))
        self.slopes = table

    @full_precision()
    @torch.no_grad()
    def tune_curves(
        self, eps: Tensor, dtype: torch.dtype, steps: int, chosen: Tensor | slice = slice(None), **until: Any
    ) -> None:
        """Tune the curved bounds of the chosen samples at eps, (m,) or (m, T), from those they have.

        From then on ``margins`` uses them in place of planes, until ``curves`` is set to None. ``until``: an
        aim, a pace, see ``utils.bounds.tune_curves``.
        """
        samples, size = torch.arange(len(self.x), device=self.x.device)[chosen], self._curved_at_once(dtype)
        table = self.curves
        for part_eps, part in zip(eps.split(size), samples.split(size), strict=True):
            start = None if self.curves is None else select_curves(self.curves, part, dtype)
            perturbation, rows = self._perturbation(part_eps, part, dtype).uncut, self.rows[part].to(dtype)
            known = self._guesses_of(part, dtype) or {}
            tuned = tune_curves(self.graph(dtype, part), perturbation, rows, steps, start, guesses=known, **until)
            self._guessed = part, known
            table = [None] * len(tuned) if table is None else table
            store(table, part, tuned, len(self.x))
        self.curves = table

    def _guesses_of(self, chosen: Tensor, dtype: torch.dtype) -> PassGuesses | None:
        """What tuning of these samples found, for estimates; None where there is nothing of the same graph."""
        if self._guessed is None or self.threat.lengths is not None:
            return None
        samples, found = self._guessed
        places = (chosen[:, None] == samples).nonzero()[:, 1]
        if len(places) != len(chosen) or next(iter(found), None) not in self.graph(dtype, chosen).nodes:
            return None
        return {node: guesses.of_samples(places) for node, guesses in found.items()}

    def _curved_at_once(self, dtype: torch.dtype) -> int:
        """Samples with curved bounds at once: their Gram matrices are large, and each has its own length."""
        if self.threat.lengths is not None:
            return 1
        nodes = self.graph(dtype, slice(0, 1)).nodes
        neurons = sum(operand.size for operand in {one for node in nodes for one in node.relaxed_operands})
        return max(1, GRAM_BYTES // (max(neurons, 1) ** 2 * dtype.itemsize))

    def part(self, samples: Tensor) -> MarginProblem:
        """The problem of some samples, with copies of what is tuned."""
        part = copy.copy(self)
        part.question, part.slopes, part._guessed = self.question.part(samples), None, None
        part.curves = self.curves and select_curves(self.curves, samples)
        return part

    def by(self, name: str) -> MarginProblem:
        """The same problem by another method, with nothing tuned."""
        other = copy.copy(self)
        other.method, other.slopes, other.curves = replace(self.method, name=name), None, None
        other._guessed = None
        other._check_method()
        return other

    def in_balls(self, dtype: torch.dtype) -> bool:
        """Whether every layer lies in an l_2 ball, so that method "ball" can be asked for."""
        one = slice(0, 1)
        return Balls.fit(self.graph(dtype, one), self._perturbation(torch.zeros_like(self.x[one, 0, 0]), one, dtype))

    def groups(self) -> list[tuple[Tensor, MarginProblem]]:
        """Samples that are computed alike, and the problem of them, with nothing tuned; see ``Question.groups``."""
        found = []
        for members, question in self.question.groups():
            one = self
            if question is not self.question:
                one = copy.copy(self)
                one.question, one.slopes, one.curves, one._graphs, one._widest = question, None, None, {}, None
                one._guessed = None
            found.append((members, one))
        return found

    def branches(self) -> MarginProblem:
        """A problem with a sample of its own for every spec row of the only sample, and its curves to start from."""
        branches = self.part(torch.zeros(self.rows.shape[1], dtype=torch.long, device=self.x.device))
        branches.question.rows = self.rows[0].unsqueeze(1)
        return branches

    def linear_radius(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """eps at which the worst margin's linearisation at x vanishes, (m,): above the true radius as a rule."""
        with torch.enable_grad():
            x = self.x[chosen].detach().to(dtype).requires_grad_()
            worst = self._margins_at(x, dtype, chosen).amin(dim=1)
            (gradient,) = torch.autograd.grad(worst.sum(), x)
        total = self.threat.part(chosen).around(x.detach(), torch.ones_like(worst)).linear_deviation(gradient)
        radius = worst.detach().clamp(min=0) / total
        # Saturated activations have no gradient; any positive number starts the search.
        return torch.where(radius.isfinite() & (radius > 0), radius, torch.ones_like(radius))


def select_curves(table: CurveTable, rows: Tensor, dtype: torch.dtype | None = None) -> CurveTable:
    """The curves of some samples, in a precision, or the one that they have."""
    return [entry and Curves(*entry) for entry in select(table, rows, dtype)]


@full_precision()  # a network is read here
def margin_problem(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    extra: Any = None,
    **arguments: Any,
) -> MarginProblem:
    """The problem of ``certified_margin``'s arguments: those of a threat model and those of a method."""
    of_method = {"method" if field.name == "name" else field.name for field in fields(Method)}
    threat = threat_of(**{name: value for name, value in arguments.items() if name not in of_method})
    how = {"name" if name == "method" else name: value for name, value in arguments.items() if name in of_method}
    return MarginProblem(Question(model, x, labels, targets, threat, extra=extra), Method(**how))
