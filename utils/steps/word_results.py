"""The result files of a word run: a row for every word, and a row for every text, which is made of those in the end."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

from ..runs.results import CSV_NAME, replacing
from ..runs.rows import KeyedRow, ResultError, read_rows

SENTENCES_NAME = "sentences.csv"


@dataclass(frozen=True)
class WordKey:
    """What a row is about.

    Attributes:
        index: number of the text in the test set, or among those given.
        position: of the word, from 0; ``words`` is the length of the text.
        known: 1 if the vocabulary has the word, 0 if it is read as the unknown word's vector.
    """

    index: int
    position: int
    words: int
    word: str
    known: int
    label: int
    prediction: int


@dataclass(frozen=True)
class WordRow(WordKey, KeyedRow):
    """What was found for one word; radii in units of the word vectors.

    Attributes:
        radius: the largest eps that was certified; ``failed_eps`` the smallest that was not.
        attack: size of the smallest change of this word's vector by which PGD changed the class; inf if none did.
        text_radius: that of the whole text, if all its words move, each within a ball of its own.
        covered: other words of the vocabulary inside the ball; ``examples`` names the nearest of them.
        nearest, distance: the nearest other word of the vocabulary.
        norm: that of the word's own vector.
        seconds: wall time of the bounds of the word's batch, divided by the number of words in it.
        plane_radius ... constant_seconds: the same by each relaxation, if they are compared.
    """

    KEY: ClassVar[type] = WordKey

    radius: float
    failed_eps: float
    attack: float
    text_radius: float
    covered: int
    examples: str
    nearest: str
    distance: float
    norm: float
    seconds: float
    plane_radius: float | None = None
    plane_seconds: float | None = None
    line_radius: float | None = None
    line_seconds: float | None = None
    constant_radius: float | None = None
    constant_seconds: float | None = None


@dataclass(frozen=True)
class SentenceRow:
    """A text and the radius for a change of all its words, each within a ball of its own."""

    index: int
    label: int
    prediction: int
    words: int
    radius: float
    text: str


def write_sentences(folder: Path, sentences: list[SentenceRow]) -> None:
    """Write sentences.csv, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(SentenceRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in sentences)
    with replacing(folder / SENTENCES_NAME) as path:
        path.write_text(text.getvalue(), encoding="utf-8", newline="")


def read_results(folder: Path) -> tuple[list[WordRow], list[SentenceRow]]:
    """The rows of both CSV files. Raises ResultError if one is damaged, OSError if it cannot be read."""
    return read_rows(folder / CSV_NAME, WordRow)[0], read_sentences(folder / SENTENCES_NAME)


def read_sentences(path: Path) -> list[SentenceRow]:
    """Inverse of ``write_sentences``; not by ``utils.runs.rows``, because a text may hold line breaks."""
    types = {field.name: {"int": int, "float": float, "str": str}[field.type] for field in fields(SentenceRow)}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if reader.fieldnames != list(types):
            raise ResultError(f"{path} is not a result of this project: its header is unknown")
        try:
            return [SentenceRow(**{key: types[key](value) for key, value in row.items()}) for row in reader]
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise ResultError(f"{path} is damaged in line {reader.line_num}") from error
