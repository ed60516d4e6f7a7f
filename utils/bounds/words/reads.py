"""Which words each element of a node depends on.

Where all elements of a node depend on the same words, as those of a state do, these are the bits of one number: long
sequences cost next to nothing then. Else there is a table, (T, size) of bool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph.graph import Graph
from ...graph.mixing import Mixing
from ...graph.nodes import Frame, Linear, Node, WeightedSum
from ...graph.nonlinear import NonLinear
from ...graph.picks import Negative, Slice

Reads = int | Tensor

NONE, SEVERAL = -1, -2  # words that an element reads


@torch.no_grad()
def reads_of(graph: Graph, like: Tensor) -> list[Reads]:
    """The words of every node's elements, for inputs like (batch, T, n)."""
    full: dict[int, bool] = {}  # by weight: whether every row reads something
    found: list[Reads] = []
    for node in graph.nodes:
        parents = [found[parent.index] for parent in node.parents]
        if isinstance(node, Frame):
            found.append(1 << node.frame)
        elif not parents:
            found.append(0)
        elif all(isinstance(part, int) for part in parents) and _is_even(node, full):
            found.append(_union(parents))
        else:
            tables = [_table(part, parent.size, like) for part, parent in zip(parents, node.parents, strict=True)]
            found.append(_table_of(node, tables, like))
    return found


def word_of(reads: Reads, moved: tuple[bool, ...]) -> int | Tensor:
    """The one word of those that may change which each element reads, (size,) or a number for all, or a constant."""
    if isinstance(reads, int):
        reads &= sum(1 << word for word, moves in enumerate(moved) if moves)
        return NONE if reads == 0 else SEVERAL if reads & (reads - 1) else reads.bit_length() - 1
    reads = reads & torch.tensor(moved, device=reads.device)[:, None]
    first, count = reads.int().argmax(dim=0), reads.sum(dim=0)
    return torch.where(count == 0, NONE, torch.where(count == 1, first, SEVERAL))


def _is_even(node: Node, full: dict[int, bool]) -> bool:
    """Whether every element reads something of each parent, whose elements are alike."""
    if isinstance(node, Linear):
        for weight in node.weights:
            if id(weight) not in full:
                full[id(weight)] = bool((weight != 0).any(dim=1).all())
        return all(full[id(weight)] for weight in node.weights)
    if isinstance(node, WeightedSum):
        return all(isinstance(factor, float) and factor != 0.0 for factor in node.factors)
    return isinstance(node, (NonLinear, Slice, Negative))


def _union(parents: list[int]) -> int:
    total = 0
    for part in parents:
        total |= part
    return total


def _table(reads: Reads, size: int, like: Tensor) -> Tensor:
    if isinstance(reads, Tensor):
        return reads
    rows = [bool(reads >> word & 1) for word in range(like.shape[1])]
    return torch.tensor(rows, device=like.device)[:, None].expand(-1, size)


def _table_of(node: Node, parents: list[Tensor], like: Tensor) -> Tensor:
    if isinstance(node, Mixing):
        return node.reads(*parents)
    if isinstance(node, NonLinear):  # element by element
        return torch.stack(parents).any(dim=0)
    return node.term_sizes(*(part.to(like.dtype) for part in parents), own=False) > 0
