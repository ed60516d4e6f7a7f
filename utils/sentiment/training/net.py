"""What is trained: word vectors with dropout, and the classifier that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from data.text import PADDING, UNKNOWN

from ..words import Group


class SentimentNet(nn.Module):
    """Word vectors under a classifier of sequences, of word numbers (N, T).

    Dropout takes the same numbers from all vectors of a sentence and of its substitutes, so that what remains is
    again a finite set of vectors a word; and numbers from what the head reads, except while bounds are computed.
    """

    def __init__(self, embeddings: Tensor, classifier: nn.Module, dropout: float, word_dropout: float):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embeddings, freeze=False, padding_idx=PADDING)
        self.classifier, self.dropout, self.word_dropout = classifier, dropout, word_dropout
        self._bounding = False
        classifier.head.register_forward_pre_hook(self._drop_of_head)

    def _drop_of_head(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        drop = self.training and not self._bounding
        return (nn.functional.dropout(inputs[0], self.dropout, drop),)

    @contextmanager
    def bounding(self) -> Iterator[nn.Module]:
        """Gives the classifier, which meanwhile is a fixed function."""
        self._bounding = True
        try:
            yield self.classifier
        finally:
            self._bounding = False

    def forward(self, numbers: Tensor) -> Tensor:
        return self.classifier(self.embedding(self._with_unknown(numbers)) * self._mask(len(numbers)))

    def vectors(self, group: Group) -> tuple[Tensor, Tensor]:
        """Vectors of the words, (N, T, n), and of their substitutes, (N, T, S, n)."""
        mask = self._mask(len(group))
        return self.embedding(group.numbers) * mask, self.embedding(group.choices) * mask[:, None]

    def _with_unknown(self, numbers: Tensor) -> Tensor:
        """Some words are read as unknown in training, so that the unknown word's vector learns to say nothing."""
        if not (self.training and self.word_dropout):
            return numbers
        return numbers.masked_fill(torch.rand(numbers.shape, device=numbers.device) < self.word_dropout, UNKNOWN)

    def _mask(self, sentences: int) -> Tensor:
        ones = torch.ones(sentences, 1, self.embedding.embedding_dim, device=self.embedding.weight.device)
        return nn.functional.dropout(ones, self.dropout, self.training)
