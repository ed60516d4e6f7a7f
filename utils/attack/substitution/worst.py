"""The worst replacement of at most so many words: all of them tried where they are few, else greedily and by a beam.

Greedy: the words whose best substitute alone lowers the margin most are changed together. Beam: of all sentences with
j changed words that were seen, the best few are changed in every one word more. Every margin is that of a sentence that
is there, so the least is an upper bound of the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .sentence import Replaceable, all_choices, count_choices

BEAM = 8
EXHAUSTIVE = 5000  # sentences that are all tried


@dataclass(frozen=True)
class Worst:
    """The least margin that was found, and where.

    Attributes:
        budget: words that may change; None: every one.
        choice: (position, substitute's number from 0) of each changed word.
        exact: whether all sentences were tried, so that there is no worse one.
    """

    budget: int | None
    margin: float
    choice: tuple[tuple[int, int], ...]
    exact: bool


def worst_replacements(
    sentence: Replaceable, budgets: Sequence[int | None], *, beam: int = BEAM, exhaustive: int = EXHAUSTIVE
) -> list[Worst]:
    """The worst replacement for each budget, in their order.

    Args:
        beam: sentences that are gone on from at each number of changed words; 0: the greedy ones alone.
        exhaustive: all sentences are tried where there are at most so many.
    """
    positions = sentence.positions
    sizes = [len(sentence.substitutes(position)) for position in positions]
    limits = {budget: len(positions) if budget is None else min(budget, len(positions)) for budget in budgets}
    tried = [limit for limit in limits.values() if count_choices(sizes, limit) <= max(exhaustive, 1)]
    found = Levels(sentence, max(limits.values(), default=0))
    if tried:
        found.add(all_choices(sentence, max(tried)))
    if max(limits.values(), default=0) > max(tried, default=-1):
        found.search(max(tried, default=0), beam)
    results = []
    for budget, limit in limits.items():
        margin, choice = found.least(limit)
        changed = tuple((place, int(choice[place]) - 1) for place in choice.nonzero().squeeze(1).tolist())
        results.append(Worst(budget, margin, changed, limit in tried))
    return results


class Levels:
    """The sentences that were tried, the best of each number of changed words kept, up to ``limit`` of them."""

    def __init__(self, sentence: Replaceable, limit: int):
        self.sentence, self.limit = sentence, limit
        self.best: dict[int, tuple[Tensor, Tensor]] = {}  # margins in rising order, and choices
        self.add(torch.zeros(1, len(sentence.x), dtype=torch.long, device=sentence.x.device))

    def add(self, choices: Tensor, keep: int = BEAM) -> None:
        """Try choices, (rows, T), and keep the best ones."""
        changed, margins = (choices > 0).sum(dim=1), self.sentence.margins(choices)
        for level in changed.unique().tolist():
            rows = changed == level
            earlier = [self.best[level]] if level in self.best else []
            of_level = torch.cat([*(pair[0] for pair in earlier), margins[rows]])
            their = torch.cat([*(pair[1] for pair in earlier), choices[rows]])
            order = of_level.argsort()[: max(keep, 1)]
            self.best[level] = of_level[order], their[order]

    def least(self, limit: int) -> tuple[float, Tensor]:
        """The least margin with at most so many changed words, and its choice, (T,)."""
        levels = [self.best[level] for level in sorted(self.best) if level <= limit]
        margins, choices = min(levels, key=lambda pair: float(pair[0][0]))
        return float(margins[0]), choices[0]

    def search(self, start: int, beam: int) -> None:
        """Greedily, and by a beam from the level ``start`` on, up to which all were tried."""
        unchanged = self.best[0][1]
        singles = self._changed_once_more(unchanged)
        self.add(self._greedy(singles, self.sentence.margins(singles)), max(beam, 1))
        if start < 1:
            self.add(singles, max(beam, 1))
        for level in range(max(start, 1), self.limit if beam else 0):
            self.add(self._changed_once_more(self.best[level][1][:beam]), beam)

    def _greedy(self, singles: Tensor, margins: Tensor) -> Tensor:
        """Choices, (at most limit, T), of the words that lower the margin most, each by its best substitute."""
        clean, steps = float(self.best[0][0][0]), []
        for position in self.sentence.positions:
            rows = (singles[:, position] > 0).nonzero().squeeze(1)
            best = rows[margins[rows].argmin()]
            steps.append((float(margins[best]), position, int(singles[best, position])))
        choice, found = torch.zeros_like(singles[0]), []
        for margin, position, substitute in sorted(steps)[: self.limit]:
            if margin < clean or not found:
                choice = choice.clone()
                choice[position] = substitute
                found.append(choice)
        return torch.stack(found)

    def _changed_once_more(self, choices: Tensor) -> Tensor:
        """All different choices that change one word more than one of these, (rows, T)."""
        found = []
        for position in self.sentence.positions:
            substitutes = self.sentence.substitutes(position)
            grown = choices[choices[:, position] == 0].repeat_interleave(len(substitutes), dim=0)
            grown[:, position] = substitutes.repeat(len(grown) // len(substitutes))
            found.append(grown)
        return torch.cat(found).unique(dim=0)
