"""Sentences that are bounded together: those of which the same is known of every node.

What reads a single word that may be replaced is evaluated. In a batch that is only what does so in all sentences. So a
batch is made of sentences for which that is the same as of each by itself: a sentence's bounds do not depend on the
others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph.graph import Graph
from .reads import Reads, reads_of

Pattern = frozenset[int]  # sets of words, as bits, that a node's elements read


def sentences_alike(graph: Graph, x: Tensor, moved: Tensor) -> list[Tensor]:
    """Numbers of sentences, by batches; x is (batch, T, n), and ``moved``, (batch, T), which words may be replaced."""
    patterns = graph.once(("patterns",), (), lambda: _patterns(graph, x))
    groups: dict[tuple[bool, ...], list[tuple[int, list[int]]]] = {}
    for number, words in enumerate(_bits(moved.T.cpu())):
        state = _state(patterns, words)
        same = groups.setdefault(state, [])
        for place, (union, members) in enumerate(same):
            if _state(patterns, union | words) == state:
                same[place] = (union | words, [*members, number])
                break
        else:
            same.append((words, [number]))
    return [torch.tensor(members) for same in groups.values() for _, members in same]


def _state(patterns: list[Pattern], moved: int) -> tuple[bool, ...]:
    """Of every pattern, whether no element reads two words that may be replaced."""
    return tuple(all((read & moved) & ((read & moved) - 1) == 0 for read in pattern) for pattern in patterns)


def _patterns(graph: Graph, x: Tensor) -> list[Pattern]:
    reads = graph.once(("reads",), (), lambda: reads_of(graph, x))
    return list(dict.fromkeys(map(_sets, reads)))


def _sets(reads: Reads) -> Pattern:
    return frozenset([reads]) if isinstance(reads, int) else frozenset(_bits(reads.cpu()))


def _bits(table: Tensor) -> list[int]:
    """The columns of a table of bool as numbers, the first row the lowest bit."""
    found = [0] * table.shape[1]
    for start in range(0, len(table), 62):  # what one integer holds
        part = table[start : start + 62].long()
        column = (part << torch.arange(len(part))[:, None]).sum(dim=0).tolist()
        found = [own | more << start for own, more in zip(found, column, strict=True)]
    return found
