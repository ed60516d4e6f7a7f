"""The result files of a word run: a row for every word, a row for every text, and run.json about the run."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from utils.results import CSV_NAME, Record, ResultError, replacing, write_record

SENTENCES_NAME = "sentences.csv"


@dataclass(frozen=True)
class WordRow:
    """What was found for one word; radii in units of the word vectors.

    Attributes:
        position: from 0; ``words`` is the length of the text.
        known: 1 if the vocabulary has the word, 0 if it is read as the unknown word's vector.
        radius: the largest eps that was certified; ``failed_eps`` the smallest that was not.
        attack: size of the smallest change of this word's vector by which PGD changed the class; inf if none did.
        covered: other words of the vocabulary inside the ball; ``examples`` names the nearest of them.
        nearest, distance: the nearest other word of the vocabulary.
        norm: that of the word's own vector.
        seconds: wall time of the bounds of the word's batch, divided by the number of words in it.
    """

    index: int
    position: int
    words: int
    word: str
    known: int
    label: int
    prediction: int
    radius: float
    failed_eps: float
    attack: float
    covered: int
    examples: str
    nearest: str
    distance: float
    norm: float
    seconds: float


@dataclass(frozen=True)
class SentenceRow:
    """A text and the radius for a change of all its words, each within a ball of its own."""

    index: int
    label: int
    prediction: int
    words: int
    radius: float
    text: str


def write_results(folder: Path, words: list[WordRow], sentences: list[SentenceRow], record: Record) -> None:
    """Replace the folder's CSV files and run.json, each whole or not at all."""
    for name, rows, kind in ((CSV_NAME, words, WordRow), (SENTENCES_NAME, sentences, SentenceRow)):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        with replacing(folder / name) as path:
            path.write_text(text.getvalue(), encoding="utf-8", newline="")
    write_record(folder, record)


def read_results(folder: Path) -> tuple[list[WordRow], list[SentenceRow]]:
    """Inverse of ``write_results``. Raises ResultError if a file is damaged, OSError if it cannot be read."""
    found = []
    for name, kind in ((CSV_NAME, WordRow), (SENTENCES_NAME, SentenceRow)):
        types = {field.name: {"int": int, "float": float, "str": str}[field.type] for field in fields(kind)}
        with (folder / name).open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames != list(types):
                raise ResultError(f"{folder / name} is not a result of this project: its header is unknown")
            try:
                found.append([kind(**{key: types[key](value) for key, value in row.items()}) for row in reader])
            except (ValueError, TypeError, KeyError, csv.Error) as error:
                raise ResultError(f"{folder / name} is damaged in line {reader.line_num}") from error
    return found[0], found[1]
