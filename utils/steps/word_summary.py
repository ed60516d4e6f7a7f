"""Which words are sensitive: statistics of the word radii by kind of word and by position.

Radii of different texts differ by a factor that the text's margin sets, so a word's radius is compared with the mean of
its own text: the relative radius, below 1 for a sensitive word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from itertools import groupby

import numpy as np

from ..runs.results import Record
from .word_results import SentenceRow, WordRow

KINDS = ("question word", "content word", "function word", "sign")
QUESTION_WORDS = frozenset(["what", "who", "whom", "whose", "which", "when", "where", "why", "how"])
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
        a an the this that these those some any each every no all both such other another i me my you your he him
        his she her it its we us our they them their one of in on at by for from to with without into onto over
        under about after before between during against through as than up down out off near and or but nor if
        because while though so yet is are was were be been being am do does did done has have had having can could
        may might must shall should will would not there here then also too very just only 's 're 've 'll 'd 'm 't
        """,
    )
)
BINS = 5


def kind_of(word: str) -> str:
    """One of KINDS."""
    if not any(sign.isalnum() for sign in word):
        return "sign"
    if word in QUESTION_WORDS:
        return "question word"
    return "function word" if word in FUNCTION_WORDS else "content word"


def counted(number: int, item: str) -> str:
    """1 question, 2 questions."""
    return f"{number} {item}" + ("" if number == 1 else "s")


def by_text(words: Iterable[WordRow]) -> list[list[WordRow]]:
    """Rows of one text after the other."""
    return [list(rows) for _, rows in groupby(words, key=lambda row: row.index)]


def relative(rows: list[WordRow], value: Callable[[WordRow], float]) -> list[float]:
    """Each word's value over the mean of its text; NaN where that is not finite or 0."""
    values = np.array([value(row) for row in rows])
    mean = values[np.isfinite(values)].mean() if np.isfinite(values).any() else math.nan
    return [float(v / mean) if np.isfinite(v) and mean > 0 else math.nan for v in values]


def place_bin(row: WordRow) -> int:
    """Fifth of the text that the word's middle lies in, from 0."""
    return int(BINS * (row.position + 0.5) / row.words)


def mean_and_error(values: Iterable[float]) -> dict[str, float | None]:
    """Mean of the finite values and its standard error (None where there are too few)."""
    finite = [value for value in values if math.isfinite(value)]
    mean = float(np.mean(finite)) if finite else None
    error = float(np.std(finite, ddof=1) / math.sqrt(len(finite))) if len(finite) > 1 else None
    return {"mean": mean, "error": error}


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, of at least three pairs without ties in a; NaN if b is constant."""
    order = np.argsort(np.argsort(a)), np.array([np.mean([(v > w) + 0.5 * (v == w) for w in b]) for v in b])
    if np.ptp(order[1]) == 0:
        return math.nan
    return float(np.corrcoef(*order)[0, 1])


def summarize(words: list[WordRow], sentences: list[SentenceRow], compared: list[Record]) -> Record:
    """Everything that run.json and the reports say about the words together."""
    texts = by_text(words)
    attacked = [row for row in words if math.isfinite(row.attack)]
    summary: Record = {
        "texts": len(texts),
        "words": len(words),
        "unknown_words": sum(not row.known for row in words),
        "radius": mean_and_error(row.radius for row in words),
        "sentence_radius": mean_and_error(row.radius for row in sentences),
        "attack": mean_and_error(row.attack for row in words),
        "radius_over_attack": mean_and_error(row.radius / row.attack for row in attacked if row.attack > 0),
        "covered_pairs": sum(row.covered for row in words),
        "words_with_covered": sum(row.covered > 0 for row in words),
        "seconds_per_word": float(np.mean([row.seconds for row in words])),
        "relaxations": compared,
    }
    for name, value in (("certified", lambda row: row.radius), ("attacked", lambda row: row.attack)):
        if name == "attacked" and not attacked:
            continue
        shares = [pair for rows in texts for pair in zip(rows, relative(rows, value), strict=True)]
        lowest = [min(rows, key=value) for rows in texts if len(rows) > 1]
        summary[name] = {
            "kinds": [_kind(kind, shares, lowest, texts) for kind in KINDS],
            "places": [
                mean_and_error(share for row, share in shares if row.words > 1 and place_bin(row) == place)
                for place in range(BINS)
            ],
            "position_correlation": _position_correlation(texts, value, KINDS),
            "position_correlation_content": _position_correlation(texts, value, ("content word",)),
        }
    return summary


def _kind(kind: str, shares: list[tuple[WordRow, float]], lowest: list[WordRow], texts: list[list[WordRow]]) -> Record:
    longer = [rows for rows in texts if len(rows) > 1]
    expected = [sum(kind_of(row.word) == kind for row in rows) / len(rows) for rows in longer]
    return {
        "kind": kind,
        "words": sum(kind_of(row.word) == kind for row, _ in shares),
        "relative_radius": mean_and_error(share for row, share in shares if kind_of(row.word) == kind),
        "most_sensitive_share": sum(kind_of(row.word) == kind for row in lowest) / max(1, len(lowest)),
        "share_by_chance": float(np.mean(expected)) if expected else 0.0,
    }


def _position_correlation(texts, value: Callable, kinds: tuple[str, ...]) -> Record:
    """Mean over texts of the rank correlation of position and radius, among words of some kinds."""
    found = []
    for rows in texts:
        chosen = [row for row in rows if kind_of(row.word) in kinds and math.isfinite(value(row))]
        if len(chosen) >= 3:
            found.append(rank_correlation([row.position for row in chosen], [value(row) for row in chosen]))
    return mean_and_error(found) | {"texts": sum(math.isfinite(v) for v in found)}
