"""Rows of the table of methods: radii and times by image and method, and which must not fall behind which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...choices.method import TUNED_METHODS
from ...runs.rows import KeyedRow
from ..tables import norm_text

# Each of these begins with what the one before it does, so it must not certify less, if there is time for that.
NESTED = ("crown", *TUNED_METHODS)
TOL = 1e-3  # the search's: a radius is at most this share below what its method could certify


@dataclass(frozen=True)
class MethodKey:
    """A test image, the class to keep away from ("all" for every other), a model, a norm and a method."""

    model: str
    norm: float
    index: int
    label: int
    target: int | str
    method: str


@dataclass(frozen=True)
class MethodRow(MethodKey, KeyedRow):
    """The method's radius and the attack's, in pixel values, and times, shared evenly among the images of a batch.

    ``seconds`` are those of the clock, ``processor_seconds`` those of all of the process's threads. The attack is made
    once for all methods of an image.
    """

    KEY: ClassVar[type] = MethodKey

    radius: float
    attack: float
    seconds: float
    processor_seconds: float
    attack_seconds: float

    @property
    def share(self) -> float:
        return self.radius / self.attack


Group = dict[str, list[MethodRow]]  # rows of a model and a norm by method, images in the same order


def cheaper_method(method: str, methods: Sequence[str]) -> str | None:
    """The next cheaper of ``methods``, which ``method`` begins with; None if there is none."""
    before = [name for name in NESTED if name in methods]
    return before[before.index(method) - 1] if method in before[1:] else None


def least_method(method: str, methods: Sequence[str]) -> str | None:
    """That which ``method`` must not fall behind: the next cheaper one.

    For bab that is the cheapest: its limit counts all that it does, and may leave no time for curves.
    """
    if method == "bab":
        return NESTED[0] if NESTED[0] in methods else None
    return cheaper_method(method, methods)


def falls_short(row: MethodRow, cheaper: MethodRow) -> bool:
    """Whether a radius is below the cheaper method's by more than the ends of two searches can lie apart."""
    return row.radius < cheaper.radius / (1.0 + TOL)


def shortfalls(rows: Sequence[MethodRow], methods: Sequence[str]) -> list[str]:
    """A line for every radius that falls short of the cheaper method's on the same image."""
    place = {row.key: row for row in rows}
    lines = []
    for row in rows:
        method = least_method(row.method, methods)
        cheaper = method and place[MethodKey(**vars(row.key) | {"method": method})]
        if cheaper and falls_short(row, cheaper):
            where = f"{row.model}, {norm_text(row.norm)}, image {row.index}"
            lines.append(f"{where}: {row.method} certifies {row.radius:.6g}, {method} {cheaper.radius:.6g}")
    return lines
