"""Rows of result files: frozen dataclasses written as lines of CSV, and read again.

A row's class extends that of its key, which says what the row is about; both hold numbers and words only. Every line
ends with a line break, which no word may hold, so a last line without one is known to be half written.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Hashable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar


class ResultError(ValueError):
    """A result folder that cannot be read or continued; the message is one line that names it."""


class KeyedRow:
    """Mixin of row classes: ``key`` has the fields of the class ``KEY``, which the row's class extends."""

    KEY: ClassVar[type]

    @property
    def key(self) -> Hashable:
        return self.KEY(**{field.name: getattr(self, field.name) for field in fields(self.KEY)})


RowT = TypeVar("RowT", bound=KeyedRow)


def _word_or_number(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


# By annotation. A column that may be None is left out of a file if it is None in all rows.
PARSERS = {
    "int": int,
    "float": float,
    "str": str,
    "int | str": _word_or_number,
    "int | None": int,
    "float | None": float,
    "str | None": str,
}
OPTIONAL = " | None"


def column_names(kind: type[KeyedRow], keys: Sequence[Hashable], extra: Sequence[str] = ()) -> tuple[str, ...]:
    """Header of a file of rows with these keys; ``extra`` are columns that may be None in all rows, but are not."""

    def is_there(name: str) -> bool:
        return name in extra or any(getattr(key, name, None) is not None for key in keys)

    return tuple(field.name for field in fields(kind) if not str(field.type).endswith(OPTIONAL) or is_there(field.name))


def format_row(row: KeyedRow, names: Sequence[str]) -> str:
    """The row as a line of CSV; numbers in full precision, so that reading gives back the same, but for seconds."""
    values = [f"{getattr(row, n):.6f}" if n.endswith("seconds") else str(getattr(row, n)) for n in names]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="").writerow(values)
    line = text.getvalue()
    if "\n" in line or "\r" in line:
        raise ValueError(f"a word of a row holds a line break: {values}")
    return line + "\n"


def split_row(line: str) -> list[str]:
    """The values of a line of CSV. Raises ValueError if its quotes do not fit."""
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise ValueError(str(error)) from None


def parse_row(values: Sequence[str], names: Sequence[str], kind: type[RowT]) -> RowT:
    """Inverse of ``format_row``. Raises ValueError if the values are not those of a row."""
    if len(values) != len(names):
        raise ValueError(f"{len(values)} fields instead of {len(names)}")
    types = {field.name: str(field.type) for field in fields(kind)}
    parsed: dict[str, Any] = {name: PARSERS[types[name]](value) for name, value in zip(names, values, strict=True)}
    return kind(**parsed)


def read_rows(path: Path, kind: type[RowT]) -> tuple[list[RowT], int]:
    """The complete rows of a CSV file and how many bytes, header included, they take.

    A last line without its end, which an interruption can leave, does not count.

    Raises:
        ResultError: the file is no such CSV file or a complete line in it is damaged.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    size = content.rfind(b"\n") + 1
    try:
        lines = content[:size].decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError:
        raise ResultError(f"{path} is not a result of this project: it is no plain text") from None
    if not lines:
        return [], 0
    names = tuple(lines[0].split(","))
    known = [field.name for field in fields(kind)]
    needed = {field.name for field in fields(kind) if not str(field.type).endswith(OPTIONAL)}
    if list(names) != [name for name in known if name in names] or not needed <= set(names):
        raise ResultError(f"{path} is not a result of this project: its header is unknown")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(parse_row(split_row(line), names, kind))
        except ValueError as error:
            raise ResultError(f"{path} is damaged in line {number}: {error}") from None
    return rows, size
