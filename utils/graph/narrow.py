"""Graphs of attention without what nothing reads: rows of scores, shares and contexts of queries that do not count.

A classifier that reads one row of its last layer, such as [CLS]'s, needs the attention of that one query. Modules
compute that of all queries. Then the scores of the others would be bounded for nothing, and it would not be seen that
the row's own read one word each, which makes its context exact over replaced words.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from .graph import Graph
from .mixing import MatMul, Softmax
from .nodes import Frame, Node, WeightedSum
from .picks import Concat
from .pooling import Pick


def narrowed(graph: Graph) -> Graph:
    """The same function with the elements of products, softmax, sums and picks that are read; itself if all are."""
    if not any(isinstance(node, MatMul) for node in graph.nodes):
        return graph
    read = _read(graph)
    return graph if all(bool(own.all()) for own in read) else _Narrow(graph, read).graph


def _read(graph: Graph) -> list[Tensor]:
    """Of every node, the elements that it is to have, (size,) of bool."""
    read = [torch.zeros(node.size, dtype=torch.bool) for node in graph.nodes]
    read[graph.output.index][:] = True
    for node in reversed(graph.nodes):
        if isinstance(node, Frame):
            read[node.index][:] = True
        elif bool(read[node.index].any()):
            own = read[node.index] = _whole_rows(node, read[node.index])
            for parent, asked in zip(node.parents, _asked(node, own), strict=True):
                read[parent.index] |= asked
    return read


def _is_plain(node: Node) -> bool:
    """Whether a sum is of single elements, with numbers for factors."""
    return type(node) is WeightedSum and not any(isinstance(factor, Tensor) for factor in node.factors)


def _whole_rows(node: Node, own: Tensor) -> Tensor:
    if isinstance(node, (Pick, Concat)) or _is_plain(node):
        return own
    if isinstance(node, Softmax):
        rows = node.rows_of(own)
        return rows.any(dim=-1, keepdim=True).expand_as(rows).flatten()
    if isinstance(node, MatMul):
        products = node.product(own)
        return _rows_read(node, own)[:, None].expand_as(products).flatten()
    return torch.ones_like(own)


def _rows_read(node: MatMul, own: Tensor) -> Tensor:
    return node.product(own).any(dim=-1).any(dim=0)


def _asked(node: Node, own: Tensor) -> list[Tensor]:
    """The elements of each parent that are read, for the elements that the node is to have."""
    if isinstance(node, Pick):
        asked = torch.zeros(node.parents[0].size, dtype=torch.bool)
        asked[node.places.cpu()[own]] = True
        return [asked]
    if isinstance(node, Softmax) or _is_plain(node):
        return [own] * len(node.parents)
    if isinstance(node, MatMul):
        left = torch.zeros(node.parents[0].size, dtype=torch.bool)
        node.left(left)[:, _rows_read(node, own)] = True
        return [left, torch.ones(node.parents[1].size, dtype=torch.bool)]
    if isinstance(node, Concat):
        parts = own.split([parent.size for parent in node.parents])
        return [torch.full_like(part, bool(part.any())) for part in parts]
    return [torch.ones(parent.size, dtype=torch.bool) for parent in node.parents]


class _Narrow:
    """Builds the graph of the elements that are read."""

    def __init__(self, graph: Graph, read: list[Tensor]):
        self.graph, self._twins = Graph(), {}
        self.graph.recurrent = graph.recurrent
        self._kept: dict[int, Tensor] = {}  # by node: which of its elements its twin has
        for node in graph.nodes:
            own = read[node.index]
            if bool(own.any()):
                self._kept[node.index] = torch.cat(_asked(node, own)) if isinstance(node, Concat) else own
                self._twins[node.index] = self.graph.add(self._twin(node, own))

    def _twin(self, node: Node, own: Tensor) -> Node:
        if isinstance(node, Frame):
            return Frame(node.size, node.frame)
        if isinstance(node, Pick):
            (parent,) = node.parents
            return Pick(self._twins[parent.index], self._place(parent)[node.places.cpu()[own]].to(node.places.device))
        twin, asked = copy.copy(node), _asked(node, own)
        pairs = [(parent, part) for parent, part in zip(node.parents, asked, strict=True) if bool(part.any())]
        twin.parents = tuple(self._part(parent, part) for parent, part in pairs)
        twin.size = int(self._kept[node.index].sum())
        if isinstance(node, MatMul):
            twin.shape = replace(node.shape, rows=int(_rows_read(node, own).sum()))
            if isinstance(node.limit, Tensor) and node.limit.dim():
                twin.limit = node.limit[own.to(node.limit.device)]
        return twin

    def _place(self, node: Node) -> Tensor:
        """Where each element of a node stands in its twin."""
        return self._kept[node.index].cumsum(dim=0) - 1

    def _part(self, node: Node, asked: Tensor) -> Node:
        """The elements of a node that are asked for."""
        twin = self._twins[node.index]
        if torch.equal(self._kept[node.index], asked):
            return twin
        return self.graph.add(Pick(twin, self._place(node)[asked]))
