"""Where backward passes over replaced words end: at the nodes that read single words."""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph.nodes import Frame, Node
from ...graph.sums import apply_rows
from ..backward.sources import Sources
from .values import WordValues


class WordSources(Sources):
    """Adds up, word by word, what rows gain by each substitute, over all nodes that read the word."""

    def __init__(self, words: WordValues):
        self.words = words
        self._gains: dict[int, Tensor] = {}  # of a word: (batch, S + 1, rows)

    def takes(self, node: Node) -> bool:
        return self.words.is_leaf(node)

    def meet(self, node: Node, coefficients: Tensor, batch: int | None) -> Tensor | None:
        values = self.words.values(node)
        center = values[:, 0]
        moved = values - center[:, None]
        for word, places in self.words.places(node):
            part = coefficients if places is None else coefficients[..., places]
            self._gain(word, moved if places is None else moved[..., places], part)
        # Of a frame, what its children's offsets have added up already.
        return None if isinstance(node, Frame) else apply_rows(coefficients, center)

    def meet_moves(self, frame: Frame, coefficients: Tensor, weight: Tensor) -> None:
        """Take ``coefficients @ weight`` of a frame: substitutes are few, and meet the weight first."""
        self._gain(frame.frame, self.words.moves_through(frame, weight), coefficients)

    def _gain(self, word: int, moved: Tensor, coefficients: Tensor) -> None:
        gain = moved @ coefficients.mT  # the other way around it takes twice as long
        self._gains[word] = self._gains[word] + gain if word in self._gains else gain

    def deviation(self) -> Tensor | None:
        if not self._gains:
            return None
        least = [gain.amin(dim=1) for gain in self._gains.values()]
        return self.words.perturbation.largest(-torch.stack(torch.broadcast_tensors(*least), dim=-1))
