"""Nodes of an unrolled classifier: what they compute, their intervals and how coefficients pass back through them.

Each is a vector of ``size`` numbers a sample. Few kinds suffice for recurrent cells, bidirectional and deep stacks, and
feed-forward nets: those that are linear stand here, the others in ``utils.graph.nonlinear``. An architecture builds
them in ``utils.network.unroll``; ``utils.bounds.passes`` walks them.

Backward mode keeps, for each node v, coefficients A of shape (batch or 1, rows, size) in the lower bound
``sum_v A_v v + bias`` of the rows being bounded. Handing them to the parents, a non-linear node replaces itself by its
lower plane where a coefficient is positive and by its upper plane where it is negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..relaxation.lines import Relaxation
from .sums import apply_rows, sum_length

Interval = tuple[Tensor, Tensor]


def intersect(first: Interval, second: Interval) -> Interval:
    """Both intervals hold, so their intersection does; rounding must not turn a point inside out."""
    lower = torch.maximum(first[0], second[0])
    upper = torch.minimum(first[1], second[1])
    return torch.minimum(lower, upper), torch.maximum(lower, upper)


class Bounds(Protocol):
    """What a node may ask of the pass that walks it, and how it hands coefficients on; see ``utils.bounds``."""

    words: Any  # what is known of nodes that read single words; None unless the set replaces words
    rounding: Any

    def is_exact(self, node: Node) -> bool: ...

    def exact_value(self, node: Node) -> Tensor: ...

    def known_part(self, node: Node) -> Tensor | None: ...

    def interval(self, node: Node) -> Interval: ...

    def ball_weight(self, frame: Frame, weight: Tensor) -> Tensor: ...

    def deviation(self, frame: Frame, coefficients: Tensor) -> Tensor: ...

    def map_reach(self, frame: Frame, node: Node) -> tuple[Tensor, Tensor]: ...

    def offset(self, node: Node) -> Tensor: ...

    def absolute(self, weight: Tensor) -> Tensor: ...

    def half_widths(self, frame: Frame) -> Tensor: ...

    def squared_radius(self, frames: Sequence[Frame]) -> Tensor: ...

    def lose(self, frames: Sequence[Frame], lost: Tensor) -> Tensor | None: ...

    def once(self, node: Node, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]: ...

    def weight_reach(self, frame: Frame, weight: Tensor) -> tuple[Tensor, Tensor]: ...

    def relaxation(self, node: Node) -> Relaxation: ...

    def signed_parts(self, coefficients: Tensor) -> tuple[Tensor, Tensor]: ...

    def pass_to(self, node: Node, coefficients: Tensor, start: int | None = None, first_sample: int = 0) -> None: ...

    def pass_through(self, node: Node, coefficients: Tensor, weight: Tensor) -> None: ...


class Chain(Protocol):
    """What collects the parts of adjoints, from the output back; see ``utils.jacobian.adjoint``."""

    def linear(self, parent: Node, adjoint: Node, weight: Tensor) -> None: ...

    def scaled(self, parent: Node, adjoint: Node, factor: float | Tensor = 1.0) -> None: ...

    def sliced(self, parent: Node, adjoint: Node, start: int) -> None: ...

    def picked(self, parent: Node, adjoint: Node, start: int) -> None: ...

    def derivatives(self, node: Node, adjoint: Node) -> None: ...

    def placed(self, parent: Node, adjoint: Node, places: Tensor) -> None: ...
    def product(self, node: Node, adjoint: Node) -> None: ...
    def softmax(self, node: Node, adjoint: Node) -> None: ...


class Along(Protocol):
    """What derivatives along a vector are made of, from the input on; see ``utils.jacobian.forward``."""

    def moved(self, node: Node) -> list[int]: ...

    def of(self, node: Node) -> Node: ...

    def derivatives(self, node: Node) -> Node: ...


class Node:
    """One vector of the unrolled network.

    Attributes:
        index: its place in the graph.
        samples: how many samples have it, the first ones of the batch; None for all. It is bounded for these alone.
        rounds: whether it computes with its parents' elements, or only picks some.
        meets_frames: whether input frames may be its parents.
    """

    index: int = -1
    samples: int | None = None
    rounds: bool = True
    meets_frames: bool = False

    def __init__(self, size: int, parents: tuple[Node, ...]):
        self.size, self.parents = size, parents

    def value(self, *parents: Tensor) -> Tensor:
        """The node at exact parent values, (batch, size)."""
        raise NotImplementedError

    def interval(self, bounds: Bounds) -> Interval:
        """Bounds from the parents' intervals, (batch, size) each."""
        raise NotImplementedError

    def backward(self, coefficients: Tensor, bounds: Bounds) -> Tensor | None:
        """Hand coefficients to the parents by ``bounds.pass_to``; return the constant term, (batch, rows), if any."""
        raise NotImplementedError

    def term_sizes(self, *parents: Tensor, own: bool = True) -> Tensor:
        """Sums of the absolute values of the terms that make each element, from such sizes of the parents', (batch, n).

        Rounding is in proportion to these, not to what is left when terms cancel. ``own`` terms are those that come
        from no parent. Of nodes that only pick elements of their parents it is their value; others override it.
        """
        return self.value(*parents)

    def ball_radius(self, norm: Callable[[Tensor], Tensor], *radii: Tensor) -> Tensor | None:
        """Upper bound of the l_2 distance of the node from its value at a point, (batch,), from such of the parents'.

        ``norm`` gives an upper bound of a matrix's spectral norm. None where none is known.
        """
        return None

    @property
    def longest_sum(self) -> int:
        """Terms of the longest sum of its parents' elements, of coefficients of its own, or over its elements."""
        return sum_length(self.size)

    def detach(self) -> None:
        """Let the node's own tensors carry no gradients."""

    def repeated(self, times: int) -> dict[str, object]:
        """Attributes that have a row a sample, for a batch in which every sample stands ``times`` times in a row."""
        return {}

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        """Give the parents what the node's adjoint, the gradient with respect to it, contributes to theirs."""
        raise NotImplementedError(f"gradients through {type(self).__name__} are not bounded")

    def tangent(self, along: Along) -> Node:
        """The node's derivative along a vector of the input, of those of its parents."""
        raise NotImplementedError(f"derivatives of {type(self).__name__} are not bounded")

    @property
    def relaxed_operands(self) -> tuple[Node, ...]:
        """Parents whose bounds the node's relaxation needs."""
        return ()

    @property
    def bounded_through(self) -> Node:
        """The node whose bounds give this one's without loss: itself, or what a slice or negation is taken of."""
        return self


class Frame(Node):
    """The input of time step ``frame``.

    Its children are Linear nodes and convolutions only, which account for the ball's centre. ``whole`` is set where one
    of them has no matrix, ``child_weights`` are the others'.
    """

    rounds = False

    def __init__(self, size: int, frame: int):
        super().__init__(size, ())
        self.frame, self.whole = frame, False
        self.child_weights: list[Tensor] = []

    def detach(self) -> None:
        self.child_weights = [weight.detach() for weight in self.child_weights]


class Constant(Node):
    """A vector known beforehand, such as an initial state: (size,) or (batch, size)."""

    rounds = False

    def __init__(self, vector: Tensor):
        super().__init__(vector.shape[-1], ())
        self.vector = vector if vector.dim() == 2 else vector[None]

    def detach(self) -> None:
        self.vector = self.vector.detach()

    def repeated(self, times: int) -> dict[str, object]:
        return {} if self.vector.shape[0] == 1 else {"vector": _repeat(self.vector, times)}

    def value(self) -> Tensor:
        return self.vector


class Linear(Node):
    """``sum_i weights[i] @ parents[i] + bias``, weights (size, parent size), bias (size,).

    ``bias_size``, (size,), is the sum of the absolute values of the terms that made the bias, if several did.
    """

    meets_frames = True

    @property
    def longest_sum(self) -> int:
        return max(self.size, sum(parent.size for parent in self.parents))

    def __init__(
        self,
        parents: tuple[Node, ...],
        weights: tuple[Tensor, ...],
        bias: Tensor,
        bias_size: Tensor | None = None,
    ):
        super().__init__(bias.shape[0], tuple(parents))
        self.weights, self.bias = tuple(weights), bias
        self.bias_size = (bias if bias_size is None else bias_size).detach().abs()

    def detach(self) -> None:
        self.weights, self.bias = tuple(weight.detach() for weight in self.weights), self.bias.detach()

    def value(self, *parents: Tensor) -> Tensor:
        return self.bias + sum(v @ w.T for v, w in zip(parents, self.weights, strict=True))

    def term_sizes(self, *parents: Tensor, own: bool = True) -> Tensor:
        terms = [part @ weight.detach().abs().T for part, weight in zip(parents, self.weights, strict=True)]
        return sum(terms, start=self.bias_size.detach()) if own else sum(terms[1:], start=terms[0])

    def ball_radius(self, norm: Callable[[Tensor], Tensor], *radii: Tensor) -> Tensor:
        return sum(norm(weight) * radius for weight, radius in zip(self.weights, radii, strict=True))

    def offset(self, bounds: Bounds) -> Tensor:
        """Bias plus all that exact parents and the centres of perturbed frames contribute, (batch or 1, size)."""
        total = self.bias[None]
        for parent, weight in zip(self.parents, self.weights, strict=True):
            known = bounds.known_part(parent)
            if known is not None:
                total = total + known @ weight.T
        return total

    def inexact_parents(self, bounds: Bounds):
        """The (parent, weight) pairs through which the perturbation comes; of a frame, what acts on its deviation."""
        pairs = zip(self.parents, self.weights, strict=True)
        return [
            (parent, bounds.ball_weight(parent, weight) if isinstance(parent, Frame) else weight)
            for parent, weight in pairs
            if not bounds.is_exact(parent)
        ]

    def interval(self, bounds: Bounds) -> Interval:
        center, below = bounds.offset(self), 0.0
        above = below
        for parent, weight in self.inexact_parents(bounds):
            if isinstance(parent, Frame):
                down, up = bounds.weight_reach(parent, weight)
            else:
                low, high = bounds.interval(parent)
                center = center + apply_rows(weight[None], 0.5 * (low + high))
                down = up = apply_rows(bounds.absolute(weight)[None], 0.5 * (high - low))
            same = above is below and up is down
            below = below + down
            above = below if same else above + up
        return center - below, center + above

    def lowest(self, bounds: Bounds, rows: Tensor) -> Tensor:
        """Lower bound of ``rows @ node`` from the parents' intervals, (batch, n_rows).

        Rows are (batch or 1, n_rows, size). They are folded into the weights first: the interval of a difference, not
        the difference of intervals.
        """
        center, below = apply_rows(rows, bounds.offset(self)), 0.0
        for parent, weight in self.inexact_parents(bounds):
            folded = rows @ weight
            if isinstance(parent, Frame):
                below = below + bounds.deviation(parent, folded)
                continue
            low, high = bounds.interval(parent)
            center = center + apply_rows(folded, 0.5 * (low + high))
            below = below + apply_rows(folded.abs(), 0.5 * (high - low))
        return center - below

    def backward(self, coefficients: Tensor, bounds: Bounds) -> Tensor:
        for parent, weight in self.inexact_parents(bounds):
            bounds.pass_through(parent, coefficients, weight)
        return apply_rows(coefficients, bounds.offset(self))

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        for parent, weight in zip(self.parents, self.weights, strict=True):
            chain.linear(parent, adjoint, weight)

    def tangent(self, along: Along) -> Node:
        pairs = [(along.of(self.parents[k]), self.weights[k]) for k in along.moved(self)]
        return Linear(*zip(*pairs, strict=True), torch.zeros_like(self.bias))


class WeightedSum(Node):
    """``sum_i factors[i] * parents[i]``, element-wise: additions, means, and choices between states by a mask.

    A factor is a number or a tensor that broadcasts to (batch, size).
    """

    def __init__(self, parents: tuple[Node, ...], factors: tuple[float | Tensor, ...] | None = None):
        super().__init__(parents[0].size, tuple(parents))
        self.factors = (1.0,) * len(parents) if factors is None else tuple(factors)

    @property
    def longest_sum(self) -> int:
        return sum_length(self.size) + len(self.parents)

    def value(self, *parents: Tensor) -> Tensor:
        return sum(f * v for f, v in zip(self.factors, parents, strict=True))

    def term_sizes(self, *parents: Tensor, own: bool = True) -> Tensor:
        factors = [f.detach().abs() if isinstance(f, Tensor) else abs(f) for f in self.factors]
        return sum(factor * part for factor, part in zip(factors, parents, strict=True))

    def ball_radius(self, norm: Callable[[Tensor], Tensor], *radii: Tensor) -> Tensor:
        sizes = [f.abs().amax(dim=-1) if isinstance(f, Tensor) else abs(f) for f in self.factors]
        return sum(size * radius for size, radius in zip(sizes, radii, strict=True))

    def interval(self, bounds: Bounds) -> Interval:
        lower = upper = 0.0
        for parent, factor in zip(self.parents, self.factors, strict=True):
            low, high = (factor * end for end in bounds.interval(parent))
            lower, upper = lower + torch.minimum(low, high), upper + torch.maximum(low, high)
        return lower, upper

    def backward(self, coefficients: Tensor, bounds: Bounds) -> Tensor | None:
        constant = None
        for parent, factor in zip(self.parents, self.factors, strict=True):
            scaled = coefficients * _per_row(factor) if isinstance(factor, Tensor) or factor != 1.0 else coefficients
            if bounds.is_exact(parent):
                term = apply_rows(scaled, bounds.exact_value(parent))
                constant = term if constant is None else constant + term
            else:
                bounds.pass_to(parent, scaled)
        return constant

    def repeated(self, times: int) -> dict[str, object]:
        rows = [f.dim() > 1 if isinstance(f, Tensor) else False for f in self.factors]
        factors = (_repeat(f, times) if row else f for f, row in zip(self.factors, rows, strict=True))
        return {"factors": tuple(factors)} if any(rows) else {}

    def hand_back(self, adjoint: Node, chain: Chain) -> None:
        for parent, factor in zip(self.parents, self.factors, strict=True):
            chain.scaled(parent, adjoint, factor)

    def tangent(self, along: Along) -> Node:
        pairs = [(along.of(self.parents[k]), self.factors[k]) for k in along.moved(self)]
        return WeightedSum(*zip(*pairs, strict=True))


def _repeat(rows: Tensor, times: int) -> Tensor:
    """(batch or 1, ...) to (batch * times or 1, ...)."""
    return rows if rows.shape[0] == 1 else rows.repeat_interleave(times, dim=0)


def _per_row(factor: float | Tensor) -> float | Tensor:
    return factor.unsqueeze(-2) if isinstance(factor, Tensor) and factor.dim() > 1 else factor
