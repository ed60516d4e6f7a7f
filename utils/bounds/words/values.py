"""Nodes whose elements read one word each: they have finitely many values, which are all taken.

Let every element of a node depend on one word at most. When all words become their s-th substitutes at once, each
element has the value that it has when its own word does, so S + 1 evaluations give all values of all elements. A
backward pass ends at such a node: rows A v of it are least, over at most k replaced words, at

    A v(x)  +  the sum of the k least  min_s sum_{i reads t} A_i (v_i(x^s) - v_i(x)),        t = 1 ... T,

where the coefficients of all nodes that read word t are added first. That is exact, at any depth, whatever lies between
the word and the node.
"""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import Tensor

from ...graph.graph import Graph
from ...graph.mixing import Mixing
from ...graph.nodes import Bounds, Frame, Interval, Node
from ...graph.nonlinear import NonLinear
from ..rounding import Noise

NONE, SEVERAL = -1, -2  # words that an element reads
UNSEEN = 2.0  # errors at all substitutes, of those where they are estimated


class WordValues:
    """Values of the nodes of one pass that read single words, (batch, S + 1, size): at no substitute, then at each."""

    def __init__(self, bounds: Bounds):
        self.bounds, self.perturbation = weakref.proxy(bounds), bounds.perturbation
        if any(node.samples is not None for node in bounds.graph.nodes):
            raise ValueError("substitutions are for sequences of one length: bound those of each length by themselves")
        self._values: dict[Node, Tensor] = {}
        self._places: dict[Node, list[tuple[int, Tensor | None]]] = {}
        graph, x = bounds.graph, bounds.perturbation.x
        moved = tuple(not bounds.perturbation.is_exact(word) for word in range(x.shape[1]))
        self._words, self._apart = graph.once(("words", moved), (), lambda: _words(graph, x, moved))
        self._noise = Noise(Sampled(weakref.proxy(self)), lambda node: self.bounds.rounding.gamma_of(node))

    # --- which words nodes read ---

    def word(self, node: Node) -> Tensor:
        """The word that each element reads, (size,), or ``NONE`` or ``SEVERAL``."""
        return self._words[node.index]

    def is_leaf(self, node: Node) -> bool:
        """Whether the node is perturbed, and each of its elements by one word at most."""
        return self._apart[node.index] and not self.bounds.is_exact(node)

    def reads_apart(self, node: Node) -> bool:
        return self._apart[node.index]

    def places(self, node: Node) -> list[tuple[int, Tensor | None]]:
        """The words that a node reads, and which elements read each; None for all."""
        if node not in self._places:
            word = self.word(node)
            read = [one for one in word.unique().tolist() if one >= 0]
            alone = len(read) == 1 and bool((word == read[0]).all())
            self._places[node] = [(one, None if alone else (word == one).nonzero().squeeze(-1)) for one in read]
        return self._places[node]

    # --- values ---

    def values(self, node: Node) -> Tensor:
        """(batch, S + 1, size)."""
        return self.exact_value(node).unflatten(0, (len(self.perturbation.x), -1))

    def exact_value(self, node: Node) -> Tensor:
        """``values`` as those of so many points, (batch * (S + 1), size)."""
        if node not in self._values:
            self._values[node] = self._evaluate(node)
        return self._values[node]

    def _evaluate(self, node: Node) -> Tensor:
        moves = self.perturbation.moves
        if isinstance(node, Frame):
            return (self.perturbation.x[:, None, node.frame] + moves[:, node.frame]).flatten(0, 1)
        if self.bounds.is_exact(node):
            value = self.bounds.exact_value(node).expand(len(moves), -1)
            return value.repeat_interleave(moves.shape[2], dim=0)
        return node.value(*map(self.exact_value, node.parents))

    # --- what follows from them ---

    def interval(self, node: Node) -> Interval:
        values = self.values(node)
        return values.amin(dim=1), values.amax(dim=1)

    def error(self, node: Node) -> Tensor:
        """About the most that the values may be wrong by, (batch, 1, size)."""
        error = self._noise.error(node).unflatten(0, (len(self.perturbation.x), -1))
        return UNSEEN * error.amax(dim=1, keepdim=True)

    def size_and_error(self, node: Node) -> tuple[Tensor, Tensor]:
        """See ``Rounding.of``."""
        return self.values(node).detach().abs().amax(dim=1), self.error(node).squeeze(1)


class Sampled:
    """Values where errors are estimated: without substitutes, and at the first and the last of them."""

    def __init__(self, words: WordValues):
        self.words = words

    def exact_value(self, node: Node) -> Tensor:
        return self.words.values(node)[:, [0, 1, -1]].flatten(0, 1)

    def at(self, node: Node) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def fit(self, tensor: Tensor) -> Tensor:
        return tensor


@torch.no_grad()
def _words(graph: Graph, like: Tensor, moved: tuple[bool, ...]) -> tuple[list[Tensor], list[bool]]:
    """Of every node, the word that each element reads, and whether none reads several."""
    reads = graph.once(("reads",), (), lambda: _reads(graph, like))
    together = torch.cat(reads, dim=1) & torch.tensor(moved, device=like.device)[:, None]
    first, count = together.int().argmax(dim=0), together.sum(dim=0)
    words = torch.where(count == 0, NONE, torch.where(count == 1, first, SEVERAL))
    several = torch.nn.functional.pad((words == SEVERAL).cumsum(dim=0), (1, 0))
    ends = torch.tensor([part.shape[1] for part in reads], device=like.device).cumsum(dim=0)
    starts = ends - torch.tensor([part.shape[1] for part in reads], device=like.device)
    apart = several[ends] == several[starts]
    return list(words.split([part.shape[1] for part in reads])), apart.tolist()


def _reads(graph: Graph, like: Tensor) -> list[Tensor]:
    """Which frames each node's elements depend on, (T, size) of bool each."""
    found: list[Tensor] = []
    total = like.shape[1]
    for node in graph.nodes:
        if isinstance(node, Frame):
            own = torch.zeros(total, node.size, dtype=torch.bool, device=like.device)
            own[node.frame] = True
        elif not node.parents:
            own = torch.zeros(total, node.size, dtype=torch.bool, device=like.device)
        else:
            own = _reads_of(node, [found[parent.index] for parent in node.parents], like)
        found.append(own)
    return found


def _reads_of(node: Node, parents: list[Tensor], like: Tensor) -> Tensor:
    if isinstance(node, Mixing):
        return node.reads(*parents)
    if isinstance(node, NonLinear):  # element by element
        return torch.stack(parents).any(dim=0)
    return node.term_sizes(*(part.to(like.dtype) for part in parents), own=False) > 0
