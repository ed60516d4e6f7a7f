"""Sentences as word numbers with their substitutes, in groups of one length: there is no padding and no mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.sst import Sentence, Synonyms, substitutes_of
from data.text import PADDING, Vocabulary


@dataclass(frozen=True)
class Group:
    """Sentences of one length T.

    Attributes:
        places: (N,) where they stand in the list they come from.
        numbers: (N, T) of their words; ``labels`` (N,).
        choices: (N, T, S) numbers of the words that each may become, the padding's where there are fewer than S.
    """

    places: Tensor
    numbers: Tensor
    labels: Tensor
    choices: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def valid(self) -> Tensor:
        """(N, T, S) of bool: where there is a substitute."""
        return self.choices != PADDING

    def to(self, device: torch.device) -> Group:
        return Group(*(values.to(device) for values in (self.places, self.numbers, self.labels, self.choices)))

    def part(self, rows: Tensor | slice) -> Group:
        """Some of the sentences, with no more substitutes a word than they need."""
        choices = self.choices[rows]
        most = int((choices != PADDING).sum(dim=-1).clamp(min=1).max()) if len(choices) else 1
        return Group(self.places[rows], self.numbers[rows], self.labels[rows], choices[..., :most])

    def batches(self, size: int) -> Iterator[Group]:
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))


def group_by_length(
    sentences: Sequence[Sentence], vocabulary: Vocabulary, synonyms: Synonyms, max_words: int | None = None
) -> list[Group]:
    """The sentences in groups, the shortest first; those longer than ``max_words`` are left out."""
    by_length: dict[int, list[int]] = {}
    words = [sentence.words for sentence in sentences]
    for place, row in enumerate(words):
        if max_words is None or len(row) <= max_words:
            by_length.setdefault(len(row), []).append(place)
    table = _padded([substitutes_of(vocabulary.words, vocabulary, synonyms)], vocabulary)[0]
    groups = []
    for _, places in sorted(by_length.items()):
        numbers = torch.tensor([vocabulary.encode(words[n]) for n in places])
        if all(sentences[n].candidates is None for n in places):
            choices = table[numbers]
        else:
            given = [substitutes_of(words[n], vocabulary, synonyms, sentences[n].candidates) for n in places]
            choices = _padded(given, vocabulary)
        labels = torch.tensor([sentences[n].label for n in places])
        groups.append(Group(torch.tensor(places), numbers, labels, choices))
    return groups


def _padded(lists: list[list[list[str]]], vocabulary: Vocabulary) -> Tensor:
    """(N, T, S) numbers of lists of lists of words; S is at least 1."""
    most = max(1, *(len(given) for row in lists for given in row))
    filled = [[vocabulary.encode(given) + [PADDING] * (most - len(given)) for given in row] for row in lists]
    return torch.tensor(filled)
