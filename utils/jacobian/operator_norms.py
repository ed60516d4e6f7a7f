"""Norms of gradients by products of operator norms: no signs are followed, but cancellation inside a matrix counts.

In the dual norm q of a perturbation's norm, every node a of a gradient's graph (``utils.jacobian.adjoint``) has

    ||W a||_q <= ||W||_{q -> q} ||a||_q,    ||kappa * a||_q <= max |kappa| ||a||_q,

and the norm of what element-wise bounds of a allow, where they are known. The lesser of both is handed on. Norms of
matrices are column sums, row sums or, for q = 2, roots of proved bounds of eigenvalues.
"""

from __future__ import annotations

from functools import singledispatchmethod

import torch
from torch import Tensor

from ..bounds.passes import BoundPass
from ..bounds.squares import spectral_norm
from ..graph.graph import Graph
from ..graph.mixing import MatMul
from ..graph.nodes import Constant, Frame, Linear, Node, WeightedSum
from ..graph.picks import Concat, Slice
from ..graph.pooling import Pick
from ..perturbation.lp_ball import INF, dual_norm
from .adjoint import Derivative


@torch.no_grad()
def operator_norm(weight: Tensor, norm: float) -> Tensor:
    """Upper bound of ||W^T||_{q -> q}, which is ||W||_{p -> p}, for W (m, n); ``norm`` is p. In W's precision."""
    slack = 1.0 + 4.0 * max(weight.shape) * torch.finfo(weight.dtype).eps
    if norm == 1.0:
        return slack * weight.abs().sum(dim=0).amax()
    if norm == INF:
        return slack * weight.abs().sum(dim=1).amax()
    return spectral_norm(weight)


class NormPass:
    """Upper bounds of the dual norms of a gradient's nodes, (batch or 1,) each.

    ``known`` is a pass over the gradient's graph whose intervals count, or None: then derivatives lie anywhere in their
    global range. ``graph``, the network's, keeps the norms of matrices between passes.
    """

    def __init__(self, norm: float, known: BoundPass | None, graph: Graph):
        self.norm, self.known, self._graph = norm, known, graph
        self._of: dict[Node, Tensor] = {}

    def __call__(self, node: Node) -> Tensor:
        if node not in self._of:
            known = self._value(node)
            bound = self.by_product(node) if known is None else self._of_value(*known)
            if self.known is not None:
                low, high = self.known.interval(node)
                bound = torch.fmin(bound, dual_norm(torch.maximum(-low, high), self.norm))
            self._of[node] = bound
        return self._of[node]

    def _value(self, node: Node) -> tuple[Tensor, Tensor] | None:
        """The node's value and the size of its terms if no derivative has come in so far, else None.

        Such are rows times the last layer's weights: their norm is less than the product of both norms.
        """
        if isinstance(node, Constant):
            return node.vector, node.vector.abs()
        if isinstance(node, (Derivative, Frame)):
            return None
        parents = [self._value(parent) for parent in node.parents]
        if any(part is None for part in parents):
            return None
        values, sizes = zip(*parents, strict=True)
        return node.value(*values), node.term_sizes(*sizes)

    def _of_value(self, value: Tensor, size: Tensor) -> Tensor:
        lost = 4.0 * (max(node.size for node in self._graph.nodes) + 4) * torch.finfo(value.dtype).eps
        return dual_norm(value, self.norm) + lost * dual_norm(size, self.norm)

    def of_matrix(self, weight: Tensor) -> Tensor:
        """||W||_{p -> p}, kept."""
        return self._graph.once(("norm", self.norm), (weight,), lambda: operator_norm(weight, self.norm))

    def through(self, weight: Tensor, node: Node) -> Tensor:
        """Of W^T a, for the node a."""
        known = self._value(node)
        if known is not None:
            value, size = known
            return self._of_value(value @ weight, size @ weight.abs())
        return _times(self.of_matrix(weight), self(node))

    @singledispatchmethod
    def by_product(self, node: Node) -> Tensor:
        """From the norms of the parents."""
        raise NotImplementedError(f"norms of {type(node).__name__} are not bounded")

    @by_product.register
    def _(self, node: Constant) -> Tensor:
        return dual_norm(node.vector, self.norm)

    @by_product.register
    def _(self, node: Linear) -> Tensor:
        # The node is W^T a for the matrix W through which the network goes forward.
        pairs = zip(node.parents, node.weights, strict=True)
        return sum(self.through(weight.T, parent) for parent, weight in pairs)

    @by_product.register
    def _(self, node: WeightedSum) -> Tensor:
        total = 0.0
        for parent, factor in zip(node.parents, node.factors, strict=True):
            size = factor.abs().amax(dim=-1) if isinstance(factor, Tensor) else abs(factor)
            total = total + _times(size, self(parent))
        return total

    @by_product.register
    def _(self, node: Concat) -> Tensor:
        return dual_norm(torch.stack(torch.broadcast_tensors(*map(self, node.parents)), dim=-1), self.norm)

    @by_product.register
    def _(self, node: Slice) -> Tensor:
        return self(node.parents[0])

    @by_product.register
    def _(self, node: Pick) -> Tensor:
        return self(node.parents[0]) * float(torch.bincount(node.places).max())

    @by_product.register
    def _(self, node: MatMul) -> Tensor:
        like = next(one for one in self._graph.nodes if isinstance(one, Linear)).bias
        return like.new_full((1,), torch.inf)  # intervals say more, where there are any

    @by_product.register
    def _(self, node: Derivative) -> Tensor:
        adjoint, *operands = node.parents
        if self.known is not None:
            low, high = node.factor(*map(self.known.interval, operands))
        else:
            whole = self(adjoint).new_full((1, 1), torch.inf)
            low, high = node.factor(*[(-whole, whole)] * len(operands))
        return _times(torch.maximum(low.abs(), high.abs()).amax(dim=-1), self(adjoint))


def _times(factor: Tensor | float, size: Tensor) -> Tensor:
    """The product of sizes, of which an infinite one is any number: with 0 it gives 0."""
    product = factor * size
    return torch.where(product.isnan() & ((size == 0) | (factor == torch.zeros_like(size))), 0.0, product)
