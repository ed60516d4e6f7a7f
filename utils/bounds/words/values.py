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

from ...graph.nodes import Bounds, Frame, Interval, Node
from ..rounding import Noise
from .reads import SEVERAL, reads_of, word_of

UNSEEN = 2.0  # errors at all substitutes, of those where they are estimated


class WordValues:
    """Values of the nodes of one pass that read single words, (batch, S + 1, size): at no substitute, then at each."""

    def __init__(self, bounds: Bounds):
        self.bounds, self.perturbation = weakref.proxy(bounds), bounds.perturbation
        if any(node.samples is not None for node in bounds.graph.nodes):
            raise ValueError("substitutions are for sequences of one length: bound those of each length by themselves")
        self._values: dict[Node, Tensor] = {}
        self._moves: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._places: dict[Node, list[tuple[int, Tensor | None]]] = {}
        graph, x = bounds.graph, bounds.perturbation.x
        moved = tuple(not bounds.perturbation.is_exact(word) for word in range(x.shape[1]))
        reads = graph.once(("reads",), (), lambda: reads_of(graph, x))
        self._words = graph.once(("words", moved), (), lambda: [word_of(part, moved) for part in reads])
        self._noise = Noise(Sampled(weakref.proxy(self)), lambda node: self.bounds.rounding.gamma_of(node))

    # --- which words nodes read ---

    def word(self, node: Node) -> Tensor:
        """The word that each element reads, (size,), or ``NONE`` or ``SEVERAL``."""
        word = self._words[node.index]
        return word if isinstance(word, Tensor) else torch.full((node.size,), word, device=self.perturbation.x.device)

    def is_leaf(self, node: Node) -> bool:
        """Whether the node is perturbed, and each of its elements by one word at most."""
        return self.reads_apart(node) and not self.bounds.is_exact(node)

    def reads_apart(self, node: Node) -> bool:
        word = self._words[node.index]
        return not bool((word == SEVERAL).any()) if isinstance(word, Tensor) else word != SEVERAL

    def places(self, node: Node) -> list[tuple[int, Tensor | None]]:
        """The words that a node reads, and which elements read each; None for all."""
        if node not in self._places:
            self._places[node] = self._find_places(self._words[node.index])
        return self._places[node]

    def _find_places(self, word: int | Tensor) -> list[tuple[int, Tensor | None]]:
        if isinstance(word, int):
            return [(word, None)] if word >= 0 else []
        read = [one for one in word.unique().tolist() if one >= 0]
        alone = len(read) == 1 and bool((word == read[0]).all())
        return [(one, None if alone else (word == one).nonzero().squeeze(-1)) for one in read]

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

    def moves_through(self, frame: Frame, weight: Tensor) -> Tensor:
        """What a frame's substitutes change ``weight`` times the frame by, (batch, S + 1, rows of the weight)."""
        key = (frame.frame, id(weight))
        if key not in self._moves:
            self._moves[key] = (weight, self.perturbation.moves[:, frame.frame] @ weight.mT)  # keeps the weight's id
        return self._moves[key][1]

    # --- what follows from them ---

    def reach(self, frame: Frame, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Most that ``weight`` times the frame can fall and rise, (batch, rows of the weight) each."""
        moves = self.moves_through(frame, weight)
        return -moves.amin(dim=1), moves.amax(dim=1)

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
