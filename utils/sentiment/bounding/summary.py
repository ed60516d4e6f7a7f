"""Shares of sentences that are right, stand the attack and are verified, by budget and method."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...runs.results import Record
from ...steps.word_summary import counted
from .rows import BOUNDS, CERTIFIED, FALSIFIED, WRONG, SentenceRow, column


def summarize(rows: Sequence[SentenceRow], methods: Sequence[str]) -> Record:
    """What run.json says of all rows. Shares are of all sentences, misclassified ones too.

    That of a method is what it and those before it verify; its loss of margin is left out unless all were asked.
    """
    budgets = list(dict.fromkeys(row.budget for row in rows))
    return {
        "sentences": len(rows) // len(budgets),
        "budgets": [_of_budget([row for row in rows if row.budget == budget], methods) for budget in budgets],
    }


def _of_budget(rows: list[SentenceRow], methods: Sequence[str]) -> Record:
    right = [row for row in rows if row.verdict != WRONG]
    tried = sum(row.attack > 0 for row in right) if all(row.attack == row.attack for row in right) else None
    share = {
        "clean": len(right) / len(rows),
        "attacked": None if tried is None else tried / len(rows),
        "verified": sum(row.verdict == CERTIFIED for row in right) / len(rows),
    }
    found: Record = {"budget": rows[0].budget, **share, "by_method": {}, "seconds": {}, "loss": {}}
    found["falsified"] = sum(row.verdict == FALSIFIED for row in right)
    found["open"] = len(right) - found["falsified"] - sum(row.verdict == CERTIFIED for row in right)
    used: list[str] = []
    found["loss"]["attack"] = None if tried is None else _mean([row.margin - row.attack for row in right])
    for method in methods:
        name = column(method)
        found["seconds"][method] = _mean([getattr(row, f"{name}_seconds") for row in right])
        used.append(method)
        found["by_method"][method] = sum(_proved(row, used) for row in right) / len(rows)
        if method in BOUNDS:
            lost = [row.margin - row.bound(method) for row in right]
            found["loss"][method] = _mean(lost) if all(map(math.isfinite, lost)) else None
    return found


def _proved(row: SentenceRow, methods: Sequence[str]) -> bool:
    """Whether one of these methods certifies the sentence: a later one may not have been asked any more."""
    bounds = [method for method in methods if method in BOUNDS]
    return any(row.bound(method) > 0 for method in bounds) or ("decide" in methods and row.decided == CERTIFIED)


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def summary_lines(summary: Record) -> list[str]:
    """The table of the console: percentages of all sentences, and seconds a sentence."""
    methods = list(summary["budgets"][0]["by_method"])
    names = ["clean", "attacked", *methods, "verified", "open"]
    of = counted(summary["sentences"], "sentence")
    lines = [f"{of}; right, not broken by the attack, verified by each method or one before it, in %"]
    lines.append(f"{'budget':<8}" + "".join(f"{name:>11}" for name in names))
    for row in summary["budgets"]:
        shares = [row["clean"], row["attacked"], *(row["by_method"][name] for name in methods), row["verified"]]
        cells = "".join(f"{'-':>11}" if value is None else f"{100 * value:>11.1f}" for value in shares)
        lines.append(f"{row['budget']:<8}{cells}{row['open']:>11}")
    lines.append("mean loss of margin: " + _by_budget(summary, "loss", ".3g"))
    lines.append("seconds a sentence: " + _by_budget(summary, "seconds", ".2g"))
    return lines


def _by_budget(summary: Record, what: str, form: str) -> str:
    names = list(summary["budgets"][0][what])
    parts = []
    for name in names:
        values = [row[what][name] for row in summary["budgets"]]
        parts.append(f"{name} " + " / ".join("-" if value is None else format(value, form) for value in values))
    return ", ".join(parts)
