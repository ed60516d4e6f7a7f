"""Bounds of margins over all replacements of words, of sentences of one length, and decisions by search."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...certify.substitution import Substitutes, decide_substitution, substitution_margins

EVERY = None  # the budget of a set in which every word may change


def lowest_margins(
    classifier: nn.Module,
    x: Tensor,
    labels: Tensor,
    vectors: Tensor,
    valid: Tensor,
    budgets: Sequence[int | None],
    method: str,
) -> Tensor:
    """Lower bounds, (N, budgets), of the least margin of the labels over all other classes.

    Args:
        x: (N, T, n) vectors of the words; ``vectors``, (N, T, S, n), of their substitutes where ``valid``.
        budgets: how many words change at most; None: every one may.
        method: "ibp", "crown-ibp" or "crown".
    """
    margins = substitution_margins(classifier, x, labels, Substitutes(vectors, valid), list(budgets), method=method)
    return margins.amin(dim=1)


def decide(
    classifier: nn.Module,
    x: Tensor,
    label: Tensor,
    vectors: Tensor,
    valid: Tensor,
    budget: int | None,
    method: str,
    time_limit: float,
) -> tuple[str, float, tuple[tuple[int, int], ...]]:
    """Verdict of one sentence, (1, T, n), and what falsifies it: the margin, and (position, substitute's number)."""
    substitutes = Substitutes(vectors, valid)
    found = decide_substitution(classifier, x, label, substitutes, budget, method=method, time_limit=time_limit)
    return found.status, float(found.margin), tuple(tuple(pair) for pair in found.choice or ())
