"""One sentence whose words may be replaced, and which sentences come of that.

A choice is a row of T numbers: 0 where a word stays, s where its substitute number s - 1 takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Replaceable:
    """A sentence as vectors, with those of its words' substitutes.

    Attributes:
        model: logits, (rows, classes), of (rows, T, n).
        x: (T, n) its words; ``vectors``, (T, S, n), what they may become where ``valid``, (T, S).
        label: the class whose margin over the best other one is asked for.
        at_once: sentences in a forward pass.
    """

    model: Callable[[Tensor], Tensor]
    x: Tensor
    label: int
    vectors: Tensor
    valid: Tensor
    at_once: int = 512

    def __post_init__(self):
        self._table = torch.cat((self.x[:, None], self.vectors), dim=1)
        self._places = torch.arange(len(self.x), device=self.x.device)

    @property
    def positions(self) -> list[int]:
        """The words that can change."""
        return self.valid.any(dim=1).nonzero().squeeze(1).tolist()

    def substitutes(self, position: int) -> Tensor:
        """The choices at a position besides to stay, (number of them,)."""
        return self.valid[position].nonzero().squeeze(1) + 1

    def sentences(self, choices: Tensor) -> Tensor:
        """(rows, T, n) of choices, (rows, T)."""
        return self._table[self._places, choices]

    @torch.no_grad()
    def margins(self, choices: Tensor) -> Tensor:
        """Margins, (rows,), of choices, (rows, T)."""
        return torch.cat([self._margin(self.model(self.sentences(part))) for part in choices.split(self.at_once)])

    def _margin(self, logits: Tensor) -> Tensor:
        others = logits.clone()
        others[:, self.label] = -torch.inf
        return logits[:, self.label] - others.amax(dim=1)


def count_choices(sizes: Sequence[int], budget: int | None) -> int:
    """How many sentences differ from one in at most ``budget`` words (None: any number), of so many substitutes each.

    The sum of the elementary symmetric polynomials of the sizes, up to that of the budget's degree.
    """
    budget = len(sizes) if budget is None else min(budget, len(sizes))
    counts = [1] + [0] * budget
    for size in sizes:
        for changed in range(budget, 0, -1):
            counts[changed] += size * counts[changed - 1]
    return sum(counts)


def all_choices(sentence: Replaceable, budget: int | None) -> Tensor:
    """All choices, (rows, T), with at most ``budget`` changed words; the first changes none."""
    budget = len(sentence.x) if budget is None else budget
    rows = torch.zeros(1, len(sentence.x), dtype=torch.long, device=sentence.x.device)
    for position in sentence.positions:
        substitutes = sentence.substitutes(position)
        grown = rows[(rows > 0).sum(dim=1) < budget].repeat_interleave(len(substitutes), dim=0)
        grown[:, position] = substitutes.repeat(len(grown) // len(substitutes))
        rows = torch.cat((rows, grown))
    return rows
