"""What rounding can do to the bounds of a pass: an error of every node over the whole perturbation set.

A pass computes with rounded coefficients. Handing A_v of a node  v = sum_p W_p p + b  to its parents, it takes C with
|C - A_v W_p| <= gamma |A_v| |W_p|, which changes the bound by no more than gamma |A_v| |W_p| |p|. So a row A_v loses

    |A_v| error(v),    error(v) = gamma size(v) + sum_p |W_p| error(p),    size(v) = |b| + sum_p |W_p| size(p),

where size is that of a sum's terms, whatever is left when they cancel, and error(p) is 0 for a non-linear parent: its
planes are lowered and raised by what its own coefficients lose (``Rounding.widen``), and its size is that of its
interval. So errors are carried on by the coefficients of the rows themselves, not multiplied from layer to layer.

gamma is twice the bound for sums as long as the node's longest, in any order (``longest_sum``; sums over large nodes
are taken in blocks): the rest pays for what is not counted, such as the rounding of sizes and errors, of norms, and of
the functions' values, in units of their last place.

Nodes that nothing perturbs are evaluated, not bounded. Bounds of their errors would multiply by |W| from step to step.
They are estimated: the nodes are evaluated again with errors of the size above, of random signs, after every step, and
the greatest change counts ``NOISE_FACTOR`` times.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from ..graph.mixing import Mixing
from ..graph.nodes import Bounds, Constant, Frame, Linear, Node, WeightedSum
from ..graph.nonlinear import Activation, NonLinear, Product
from ..graph.picks import Negative, Slice
from ..graph.sums import apply_rows
from ..relaxation.lines import GUARD_ULPS, Plane, Relaxation

NOISE_RUNS, NOISE_FACTOR = 3, 8.0
BROADCASTING = (Linear, WeightedSum, Activation, Product, Slice, Negative)  # whose values are of (..., size)
RELAXED = (NonLinear, Mixing)  # whose planes take in what rows lose


class Points(Protocol):
    """Where ``Noise`` evaluates nodes."""

    def exact_value(self, node: Node) -> Tensor: ...

    def at(self, node: Node) -> AbstractContextManager: ...

    def fit(self, tensor: Tensor) -> Tensor: ...


class Rounding:
    """Sizes and errors of the nodes of one pass, without gradients."""

    def __init__(self, bounds: Bounds):
        self.bounds = weakref.proxy(bounds)  # nothing outlives a pass, not even until garbage is collected
        graph, precision = bounds.graph, torch.finfo(bounds.perturbation.x.dtype)
        self._others, self._unit = len(graph.nodes) + 16, precision.eps
        longest = max(node.size for node in graph.nodes)
        # For sums over whole nodes that others take; those of one node have a gamma of their own.
        self.gamma, self.tiny = (longest + self._others) * precision.eps, precision.tiny
        self.ulp = GUARD_ULPS * precision.eps
        self._known: dict[Node, tuple[Tensor, Tensor]] = {}
        self._noise = Noise(self.bounds, weakref.proxy(self).gamma_of)

    def gamma_of(self, node: Node) -> float:
        """gamma of the sums that the node's bounds and rows take."""
        return (node.longest_sum + self._others) * self._unit

    def of(self, node: Node) -> tuple[Tensor, Tensor]:
        """Size and error, (batch or 1, size) each, for the samples of the node at work."""
        if node not in self._known:
            with self.bounds.at(node):
                self._known[node] = self._measure(node)
        size, error = self._known[node]
        return self.bounds.fit(size), self.bounds.fit(error)

    def _measure(self, node: Node) -> tuple[Tensor, Tensor]:
        bounds = self.bounds
        if bounds.is_exact(node):
            value = bounds.exact_value(node).detach()
            return value.abs(), self._noise.error(node)
        if isinstance(node, Frame):
            size = bounds.known_part(node).detach().abs() + bounds.half_widths(node).detach()
            return size, torch.zeros_like(size)
        if bounds.words and bounds.words.is_leaf(node):
            return bounds.words.size_and_error(node)
        if isinstance(node, RELAXED):
            low, high = bounds.interval(node)
            size = torch.maximum(low.detach().abs(), high.detach().abs())
            return size, torch.zeros_like(size)
        sizes, errors = zip(*(self.of(parent) for parent in node.parents), strict=True)
        size = node.term_sizes(*sizes)
        free = not bounds.words and all(
            isinstance(parent, (Frame, *RELAXED)) and not bounds.is_exact(parent) for parent in node.parents
        )
        error = torch.zeros_like(size) if free else node.term_sizes(*errors, own=False)
        if node.rounds:
            error = error + self.gamma_of(node) * size + self.tiny
        return size, error

    def lost(self, node: Node, rows: Tensor) -> Tensor:
        """What a bound of ``rows @ node`` may lose, (batch or 1, n_rows), before the rows meet a non-linear node."""
        size, error = self.of(node)
        lost = apply_rows(rows.abs(), error + self.gamma_of(node) * size)
        return torch.where(lost.isnan(), torch.inf, lost)

    def of_interval(self, node: Node, low: Tensor, high: Tensor) -> Tensor:
        """What the ends of a node's interval, made from those of its parents, may be wrong by."""
        leaf = self.bounds.words and self.bounds.words.is_leaf(node)
        if leaf or self.bounds.is_exact(node) or not isinstance(node, RELAXED):
            return self.of(node)[1]
        if isinstance(node, Mixing):
            return self.gamma_of(node) * node.term_sizes(*(self.of(parent)[0] for parent in node.parents)) + self.tiny
        return self.ulp * torch.maximum(low.detach().abs(), high.detach().abs()) + self.tiny

    def widen(self, node: NonLinear, relaxation: Relaxation) -> Relaxation:
        """Planes apart by what rows lose that pass through them to the operands, and from there to non-linear nodes.

        Where sigmoid underflows, planes are wrong by the smallest number times the other operand.
        """
        lower, upper = relaxation
        lost = self.through(node, relaxation)
        return Relaxation(Plane(lower.slopes, lower.intercept - lost), Plane(upper.slopes, upper.intercept + lost))

    def through(self, node: NonLinear, relaxation: Relaxation) -> Tensor:
        """By how much ``widen`` moves the planes, (batch, size)."""
        lower, upper = relaxation
        gamma = self.gamma_of(node)
        lost = gamma * torch.maximum(lower.intercept.detach().abs(), upper.intercept.detach().abs()) + self.tiny
        for parent, low, high in zip(node.plane_operands, lower.slopes, upper.slopes, strict=True):
            size, error = self.of(parent)
            steepest = low.detach().abs() if low is high else torch.maximum(low.detach().abs(), high.detach().abs())
            lost = lost + torch.addcmul(self.tiny * size, steepest, torch.add(error, size, alpha=gamma))
        return lost


class Noise:
    """Errors of nodes that are evaluated, not bounded, estimated by errors of random signs after every step.

    ``points`` says where: by ``exact_value`` of a node, (points, size), and by ``at`` and ``fit``, as passes have them.
    """

    def __init__(self, points: Points, gamma: Callable[[Node], float]):
        """``gamma`` gives what a node's sums may be wrong by, relative to their size."""
        self._points, self._gamma = points, gamma
        self._noisy: dict[Node, Tensor] = {}

    @torch.no_grad()
    def error(self, node: Node) -> Tensor:
        """About the most that the node's computed values may be wrong by, (points, size)."""
        value = self._points.exact_value(node)
        if isinstance(node, (Constant, Frame)):
            return torch.zeros_like(value)
        return NOISE_FACTOR * (self._values(node) - value).abs().amax(dim=0)

    def _values(self, node: Node) -> Tensor:
        """The node's values with errors, (runs, points, size); its own value, and those before it, are known by now."""
        if node not in self._noisy:
            with self._points.at(node):
                self._noisy[node] = self._with_noise(node)
        return self._points.fit(self._noisy[node].transpose(0, 1)).transpose(0, 1)

    def _with_noise(self, node: Node) -> Tensor:
        value = self._points.exact_value(node)
        if isinstance(node, (Constant, Frame)):
            return value.expand(NOISE_RUNS, -1, -1)
        parents = [self._values(parent) for parent in node.parents]
        if isinstance(node, BROADCASTING):
            runs = node.value(*parents)
        else:
            runs = torch.stack([node.value(*run) for run in zip(*parents, strict=True)])
        if not node.rounds:
            return runs
        size = value.abs()
        if not isinstance(node, NonLinear):
            size = node.term_sizes(*(self._points.exact_value(parent).abs() for parent in node.parents))
        seed = torch.Generator().manual_seed(node.index)
        signs = torch.randint(0, 2, (NOISE_RUNS, 1, node.size), generator=seed).to(value) * 2.0 - 1.0
        return runs + self._gamma(node) * size * signs
