"""Branch and bound over words: whether any replacement of at most k words changes the decision, within a time limit.

A part of the search is a set of the same kind: some words have been decided (they stay, or have become a substitute),
the others may change within what is left of the budget. A part whose least margin is proved positive is done with, and
so is one of few sentences, which are all tried. Of others the word whose replacement alone lowers the margin most is
decided next. So the search ends, in single sentences at the latest.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...attack.substitution import Replaceable, all_choices, count_choices, worst_replacements
from ...clock import now
from ...graph.graph import Graph
from ...network.reading import graph_of, output_shape, read_network
from ...network.state import plain_state
from ...question.arguments import as_classes, as_inputs
from ...question.specification import output_rows
from .margins import AT_ONCE, Substitutes, bound_sets, one_for_all

FEW, MOST = 1024, 200_000  # sentences of a part that are all tried: always, and where that is as fast as to bound it
PARTS_AT_ONCE = 16
CERTIFIED, FALSIFIED, UNKNOWN = "certified", "falsified", "unknown"


@dataclass(frozen=True)
class Decision:
    """What was found of one sentence.

    Attributes:
        status: "certified", "falsified" or "unknown": the time was over.
        margin: a lower bound of the margins of all sentences if certified, the margin of the sentence that falsifies,
            or, of unknown ones, the least lower bound of the parts that are left.
        choice: (position, number of the substitute) of every changed word of the sentence that falsifies.
        parts: sets that were bounded or tried.
    """

    status: str
    margin: float
    choice: tuple[tuple[int, int], ...] = ()
    parts: int = 0


@dataclass
class Part:
    """A set of sentences: choices of the words that are decided, -1 of the others, and the changes that are left."""

    decided: Tensor
    budget: int

    def free(self, sentence: Replaceable) -> Replaceable:
        """The part's sentences, as those of one in which decided words are as they are."""
        table = torch.cat((sentence.x[:, None], sentence.vectors), dim=1)
        x = table[torch.arange(len(table)), self.decided.clamp(min=0)]
        valid = sentence.valid & (self.decided < 0)[:, None]
        return Replaceable(sentence.model, x, sentence.label, sentence.vectors, valid)


@plain_state()
@torch.no_grad()
def decide_substitution(
    model: nn.Module | Graph,
    x: Tensor,
    label: int | Tensor,
    substitutes: Substitutes,
    budget: int | None,
    *,
    method: str = "crown-ibp",
    time_limit: float = 60.0,
    dtype: torch.dtype = torch.float64,
) -> Decision:
    """Whether the label stays whatever at most ``budget`` words of one sentence, x (1, T, n), are replaced by.

    Args:
        model, substitutes, method: as for ``substitution_margins``.
        time_limit: seconds after which the answer is "unknown".

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    deadline = now() + time_limit
    AT_ONCE.check(method)
    network, frames = read_network(model, as_inputs(x))
    labels = as_classes(label, "label", "a class").reshape(-1)
    if len(frames) != 1 or len(labels) != 1:
        raise ValueError(f"one sentence and one label are decided at a time, not {len(frames)} and {len(labels)}")
    rows = output_rows(labels, output_shape(network)).to(frames.device, dtype)
    graph = one_for_all(graph_of(network, frames.shape[1], dtype, "plane")).detach()
    vectors, valid = substitutes.vectors[0].to(frames.device, dtype), substitutes.valid[0].to(frames.device)
    sentence = Replaceable(graph.evaluate, frames[0].to(dtype), int(labels), vectors, valid)
    return _Search(graph, sentence, rows, method, deadline).run(len(valid) if budget is None else budget)


class _Search:
    def __init__(self, graph: Graph, sentence: Replaceable, rows: Tensor, method: str, deadline: float):
        self.sentence, self.deadline, self.parts = sentence, deadline, 0
        self._bound = bound_sets(graph, rows, method)
        self._least = float("inf")  # of the bounds of what is done with
        self._few, self._rate = FEW, None  # sentences a second

    def run(self, budget: int) -> Decision:
        started = now()
        self.sentence.margins(torch.zeros(FEW, len(self.sentence.x), dtype=torch.long, device=self.sentence.x.device))
        self._rate = FEW / max(now() - started, 1e-6)
        found = worst_replacements(self.sentence, [budget], exhaustive=FEW)[0]
        if found.margin <= 0 or found.exact:
            status = FALSIFIED if found.margin <= 0 else CERTIFIED
            return Decision(status, found.margin, found.choice if found.margin <= 0 else (), 1)
        number = itertools.count()
        whole = Part(torch.where(self.sentence.valid.any(dim=1), -1, 0), budget)
        waiting = [(-float("inf"), next(number), whole)]
        while waiting:
            if now() > self.deadline:
                return Decision(UNKNOWN, min(waiting[0][0], self._least), parts=self.parts)
            batch = [heapq.heappop(waiting)[2] for _ in range(min(PARTS_AT_ONCE, len(waiting)))]
            falsified, open_parts = self._visit(batch)
            if falsified is not None:
                return falsified
            for bound, part in open_parts:
                for child in self._split(part):
                    heapq.heappush(waiting, (bound, next(number), child))
        return Decision(CERTIFIED, self._least, parts=self.parts)

    def _visit(self, batch: list[Part]) -> tuple[Decision | None, list[tuple[float, Part]]]:
        """Try or bound some parts: a sentence that falsifies, or the parts that stay open and their bounds."""
        self.parts += len(batch)
        large = []
        for part in batch:
            free = part.free(self.sentence)
            sizes = [len(free.substitutes(position)) for position in free.positions]
            if count_choices(sizes, part.budget) > self._few:
                large.append((part, free))
                continue
            choices = all_choices(free, part.budget)
            margins = free.margins(choices)
            worst = int(margins.argmin())
            if margins[worst] <= 0:
                return self._falsified(part, choices[worst], float(margins[worst])), []
            self._least = min(self._least, float(margins[worst]))
        if not large:
            return None, []
        x = torch.stack([free.x for _, free in large])
        vectors = self.sentence.vectors.expand(len(x), -1, -1, -1)
        valid = torch.stack([free.valid for _, free in large])
        budgets = torch.tensor([part.budget for part, _ in large], device=x.device)
        started = now()
        bounds = self._bound(x, Substitutes(vectors, valid), budgets).tolist()
        # In half the time that a part took here, so many sentences can be tried.
        self._few = min(MOST, max(FEW, int(0.5 * self._rate * (now() - started) / len(large))))
        self._least = min([self._least, *(bound for bound in bounds if bound > 0)])
        return None, [(bound, part) for bound, (part, _) in zip(bounds, large, strict=True) if not bound > 0]

    def _falsified(self, part: Part, choice: Tensor, margin: float) -> Decision:
        choice = torch.where(part.decided > 0, part.decided, choice)
        changed = tuple((place, int(choice[place]) - 1) for place in choice.nonzero().squeeze(1).tolist())
        return Decision(FALSIFIED, margin, changed, self.parts)

    def _split(self, part: Part) -> list[Part]:
        """The parts in which one more word stays, or becomes one of its substitutes."""
        free = part.free(self.sentence)
        places = [place for place in free.positions for _ in free.substitutes(place)]
        single = torch.zeros(len(places), len(free.x), dtype=torch.long, device=free.x.device)
        single[torch.arange(len(places)), places] = torch.cat([free.substitutes(place) for place in free.positions])
        word = places[int(free.margins(single).argmin())]
        children = []
        for choice in (0, *free.substitutes(word).tolist()):
            decided = part.decided.clone()
            decided[word] = choice
            left = part.budget - (choice > 0)
            children.append(Part(decided if left else decided.clamp(min=0), left))
        return children
