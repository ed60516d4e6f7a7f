"""The result files of a bound run: a row for every sentence and budget, and a row for every sentence."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar

from ...runs.results import replacing
from ...runs.rows import KeyedRow, ResultError

SENTENCES_NAME = "sentences.csv"
BOUNDS = ("ibp", "crown-ibp", "crown")  # methods that give a margin
CERTIFIED, FALSIFIED, UNKNOWN, WRONG = "certified", "falsified", "unknown", "misclassified"


@dataclass(frozen=True)
class SentenceKey:
    """What a row is about.

    Attributes:
        index: number of the sentence in its part of the data, or among those given.
        words: how many it has; ``replaceable``, how many of them have substitutes.
        budget: how many may be replaced; "all": every one.
    """

    index: int
    words: int
    replaceable: int
    label: int
    prediction: int
    budget: int | str


@dataclass(frozen=True)
class SentenceRow(SentenceKey, KeyedRow):
    """What was found; margins are the logit of the label less the largest other one.

    Attributes:
        margin: of the sentence itself; not above 0 if it is misclassified, and then nothing else is asked.
        attack: the least margin that was found among the replacements, ``exact`` 1 if all of them were tried; NaN if
            none was looked for.
        replaced: where it was found, as "position:word position:word".
        ibp, crown_ibp, crown: lower bounds of all these margins by each method, of those that were asked for.
        decided: certified, falsified or unknown, where the bounds left it open.
        ..._seconds: wall time; that of bounds is the batch's, all budgets together, divided by its sentences.
    """

    KEY: ClassVar[type] = SentenceKey

    margin: float
    attack: float
    exact: int
    replaced: str
    attack_seconds: float
    ibp: float | None = None
    ibp_seconds: float | None = None
    crown_ibp: float | None = None
    crown_ibp_seconds: float | None = None
    crown: float | None = None
    crown_seconds: float | None = None
    decided: str | None = None
    decided_seconds: float | None = None

    def bound(self, method: str) -> float:
        """The margin by a method; -inf where it was not asked for or is NaN."""
        value = getattr(self, column(method))
        return -math.inf if value is None or math.isnan(value) else value

    @property
    def best_bound(self) -> float:
        return max(map(self.bound, BOUNDS))

    @property
    def verdict(self) -> str:
        """What is known of the sentence at this budget."""
        if self.margin <= 0:
            return WRONG
        if self.best_bound > 0 or self.decided == CERTIFIED:
            return CERTIFIED
        return FALSIFIED if self.attack <= 0 else UNKNOWN


def column(method: str) -> str:
    return "decided" if method == "decide" else method.replace("-", "_")


def columns_of(methods: Iterable[str]) -> tuple[str, ...]:
    """The columns that some methods fill."""
    return tuple(name for method in methods for name in (column(method), f"{column(method)}_seconds"))


def by_sentence(rows: Iterable[SentenceRow]) -> list[list[SentenceRow]]:
    """The rows of one sentence after the other."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row.index)]


@dataclass(frozen=True)
class Shown:
    """A sentence with the substitutes of its words, as sentences.csv has it."""

    index: int
    words: list[str]
    known: list[bool]
    substitutes: list[list[str]]


def write_sentences(folder: Path, sentences: Iterable[Shown]) -> None:
    """Write sentences.csv, whole or not at all; lists are JSON."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("index", "words", "known", "substitutes"))
    for sentence in sentences:
        lists = (sentence.words, sentence.known, sentence.substitutes)
        writer.writerow((sentence.index, *(json.dumps(part, ensure_ascii=False) for part in lists)))
    with replacing(folder / SENTENCES_NAME) as path:
        path.write_text(text.getvalue(), encoding="utf-8", newline="")


def read_sentences(folder: Path) -> list[Shown]:
    """Inverse of ``write_sentences``. Raises ResultError if the file is damaged."""
    path = folder / SENTENCES_NAME
    with path.open(encoding="utf-8", newline="") as file:
        try:
            rows = list(csv.DictReader(file, strict=True))
            return [
                Shown(int(row["index"]), *(json.loads(row[name]) for name in ("words", "known", "substitutes")))
                for row in rows
            ]
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise ResultError(f"{path} is damaged") from error
