"""What is asked of a batch of sentences: bounds by each method, the attack, and decisions where those leave it open."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...attack.substitution import Replaceable, Worst, worst_replacements
from ...runs.cli import ContradictionError
from .bounds import decide, lowest_margins
from .rows import BOUNDS, CERTIFIED, FALSIFIED, UNKNOWN, column

SLACK = 1e-9  # of the size of a margin's terms: what a certificate may stand above a margin by rounding


@dataclass(frozen=True)
class Settings:
    """How the questions are asked.

    Attributes:
        budgets: words that may change; None: every one.
        methods: of BOUNDS, and perhaps "decide", which gets ``time_limit`` seconds a sentence and budget.
        beam, exhaustive: of ``worst_replacements``.
        attack: whether to search for the worst replacement; without, margins found are NaN.
        every: ask every method of every sentence, not only of those that methods before it leave open at some budget.
    """

    budgets: Sequence[int | None]
    methods: Sequence[str]
    time_limit: float
    beam: int
    exhaustive: int
    attack: bool = True
    every: bool = False


@dataclass(frozen=True)
class Batch:
    """Sentences of one length that are classified rightly: (N, T, n) and (N, T, S, n) vectors, (N, T, S) of bool."""

    classifier: nn.Module
    x: Tensor
    labels: Tensor
    vectors: Tensor
    valid: Tensor

    def part(self, rows: Tensor | slice) -> Batch:
        parts = (part[rows] for part in (self.x, self.labels, self.vectors, self.valid))
        return Batch(self.classifier, *parts)


@dataclass(frozen=True)
class Answer:
    """Of one sentence and budget: the worst replacement found, and the columns of the methods."""

    worst: Worst
    columns: dict[str, float | str]


def strongest(methods: Sequence[str]) -> str:
    """The bound that a search rests on: the tightest that was asked for."""
    asked = [method for method in BOUNDS if method in methods]
    return asked[-1] if asked else "crown-ibp"


def ask(batch: Batch, settings: Settings) -> list[list[Answer]]:
    """An answer for each sentence and budget.

    Raises:
        ContradictionError: a bound lies above the margin of a sentence that it speaks of.
    """
    bounds = _bounds(batch, settings)
    answers = []
    for number in range(len(batch.labels)):
        one, started = batch.part(slice(number, number + 1)), time.perf_counter()
        worst = _attack(one, settings)
        seconds = (time.perf_counter() - started) / len(settings.budgets)
        row = []
        for place, found in enumerate(worst):
            columns = {name: values[number][place] for name, values in bounds.items()}
            _check(columns, found)
            if "decide" in settings.methods:
                found, decided = _decide(one, columns, found, settings)
                columns |= decided
            row.append(Answer(found, columns | {"attack_seconds": seconds}))
        answers.append(row)
    return answers


@torch.no_grad()
def _bounds(batch: Batch, settings: Settings) -> dict[str, list[list[float]]]:
    """Margins and seconds, (N, budgets), by column; NaN and 0 where a method is not asked."""
    found = {}
    best = torch.full((len(batch.labels), len(settings.budgets)), -torch.inf, dtype=batch.x.dtype)
    for method in (method for method in BOUNDS if method in settings.methods):
        rows = torch.arange(len(best)) if settings.every else (~(best > 0)).any(dim=1).nonzero().squeeze(1)
        margins, seconds = torch.full_like(best, torch.nan), torch.zeros_like(best)
        if len(rows):
            asked, started = batch.part(rows.to(batch.x.device)), time.perf_counter()
            given = asked.classifier, asked.x, asked.labels, asked.vectors, asked.valid
            margins[rows] = lowest_margins(*given, settings.budgets, method).to(best)
            seconds[rows] = (time.perf_counter() - started) / len(rows)
            best[rows] = torch.fmax(best[rows], margins[rows])
        found[column(method)], found[f"{column(method)}_seconds"] = margins.tolist(), seconds.tolist()
    return found


def _attack(one: Batch, settings: Settings) -> list[Worst]:
    if not settings.attack:
        return [Worst(budget, math.nan, (), False) for budget in settings.budgets]
    sentence = Replaceable(one.classifier, one.x[0], int(one.labels), one.vectors[0], one.valid[0])
    return worst_replacements(sentence, settings.budgets, beam=settings.beam, exhaustive=settings.exhaustive)


def _check(columns: dict[str, float | str], worst: Worst) -> None:
    for method in BOUNDS:
        bound = columns.get(column(method), -math.inf)
        if bound > worst.margin + SLACK * (1.0 + abs(worst.margin)):
            raise ContradictionError(f"{method} bounds the margin by {bound}, a sentence has {worst.margin}")


def _decide(
    one: Batch, columns: dict[str, float | str], worst: Worst, settings: Settings
) -> tuple[Worst, dict[str, float | str]]:
    """The verdict, by search only if neither bounds nor the attack settle it."""
    started = time.perf_counter()
    if any(columns.get(column(method), -math.inf) > 0 for method in BOUNDS):
        status = CERTIFIED
    elif worst.margin <= 0:
        status = FALSIFIED
    elif worst.exact:
        status = UNKNOWN if worst.margin <= SLACK else CERTIFIED  # all sentences were tried
    else:
        given = one.classifier, one.x, one.labels, one.vectors, one.valid
        status, margin, choice = decide(*given, worst.budget, strongest(settings.methods), settings.time_limit)
        if status == FALSIFIED and not worst.margin <= margin:
            worst = replace(worst, margin=margin, choice=choice)
    if status == CERTIFIED and worst.margin <= 0:
        raise ContradictionError(f"certified, but a sentence has the margin {worst.margin}")
    return worst, {"decided": status, "decided_seconds": time.perf_counter() - started}
