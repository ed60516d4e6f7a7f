"""Attention of a query that cannot change: means of words' values, weighted by a softmax of their scores.

The score s_j and the value v_j of a place j are functions of one word. So a row a of the mean is a ratio of two sums
over words,

    a o  =  sum_j e^{s_j} a v_j / sum_j e^{s_j},

and is at least c over at most k replaced words if and only if (Dinkelbach)

    phi(c)  =  sum_j g_j  +  the sum of the k least  min_s (g_j^s - g_j),        g_j = e^{s_j} (a v_j - c),

is at least 0. No softmax and no product is relaxed then. phi falls in c; replacing c by the ratio that the minimum is
attained at comes down to the least ratio in a few steps. Heads, and queries, are minimised one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...graph.mixing import MatMul, Softmax
from .reads import NONE
from .values import WordValues

STEPS = 30  # towards the least ratio; a handful suffice
RETREATS = (1.0, 1e2, 1e4, 1e7)  # from what was found, in units of what rounding does, until phi is at least 0
ROW_ENTRIES = 2**22  # of rows that are worked on at once


class Places(NamedTuple):
    """Of every place of a mean at every substitute: (batch, rows, count, queries, places, S + 1)."""

    weight: Tensor
    value: Tensor
    room: Tensor  # what value - c may be wrong by, for c no larger than the values, relative to the weight


def mean_over_words(words: WordValues, node: MatMul, coefficients: Tensor) -> Tensor | None:
    """Lower bounds of ``coefficients @ node``, (batch, rows), for coefficients (batch or 1, rows, size)."""
    if not _fits(words, node):
        return None
    per_row = len(words.perturbation.x) * node.shape.count * node.shape.rows * node.shape.inner
    step = max(1, ROW_ENTRIES // (per_row * words.perturbation.moves.shape[2]))
    budgets = words.perturbation.budget.reshape(len(words.perturbation.x), -1)
    budgets = budgets.expand(-1, coefficients.shape[1])
    pairs = zip(coefficients.split(step, dim=1), budgets.split(step, dim=1), strict=True)
    parts = [_least_mean(words, node, part, budget) for part, budget in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _fits(words: WordValues, node: MatMul) -> bool:
    softmax, values = node.parents
    if not isinstance(softmax, Softmax) or softmax.width != node.shape.inner:
        return False
    if words.bounds.is_exact(softmax) or words.bounds.is_exact(values):
        return False  # linear
    scores = softmax.parents[0]
    if not words.reads_apart(scores) or not words.reads_apart(values):
        return False
    own = node.left(words.word(scores)).unsqueeze(-1)  # (count, queries, places, 1)
    read = torch.cat((own, node.right(words.word(values)).unsqueeze(-3).expand(*own.shape[:3], -1)), dim=-1)
    most = read.amax(dim=-1)
    if bool(((read != NONE) & (read != most[..., None])).any()):
        return False
    at = most.sort(dim=-1).values
    return not bool(((at[..., 1:] == at[..., :-1]) & (at[..., 1:] != NONE)).any())


def _least_mean(words: WordValues, node: MatMul, coefficients: Tensor, budget: Tensor) -> Tensor:
    """The budget is (batch, rows)."""
    places = _places(words, node, coefficients)
    budget = budget[..., None, None, None]
    with torch.no_grad():
        found = _sums(places, budget, None)[2]
        for _ in range(STEPS):
            _, _, ratio = _sums(places, budget, found)
            lower = torch.minimum(ratio, found)
            if torch.equal(lower, found):
                break
            found = lower
        sound = _proved(places, budget, found)
    if not coefficients.requires_grad and not places.value.requires_grad and not places.weight.requires_grad:
        return sound.sum(dim=(-1, -2))
    _, _, ratio = _sums(places, budget, found)
    return (sound + (ratio - ratio.detach())).sum(dim=(-1, -2))


def _places(words: WordValues, node: MatMul, coefficients: Tensor) -> Places:
    softmax, values = node.parents
    scores = node.left(words.values(softmax.parents[0]))  # (batch, S + 1, count, queries, places)
    vectors = node.right(words.values(values))  # (batch, S + 1, count, places, columns)
    scores = scores - scores.detach().amax(dim=(1, -1), keepdim=True)
    weight = scores.exp().movedim(1, -1).unsqueeze(1)
    rows = node.product(coefficients)  # (batch or 1, rows, count, queries, columns)
    value = torch.einsum("brhqd,bshjd->brhqjs", rows.expand(len(vectors), *rows.shape[1:]), vectors)
    with torch.no_grad():
        room = _room(words, node, scores, rows, vectors, value)
    return Places(weight, value, room)


def _room(words: WordValues, node: MatMul, scores: Tensor, rows: Tensor, vectors: Tensor, value: Tensor) -> Tensor:
    rounding = words.bounds.rounding
    if rounding is None:
        return torch.zeros_like(value)
    softmax, values = node.parents
    gamma = 4.0 * (rounding.gamma_of(node) + 16.0 * torch.finfo(value.dtype).eps)
    error = node.left(words.error(softmax.parents[0])).movedim(1, -1).unsqueeze(1)
    relative = gamma * (1.0 + scores.abs().movedim(1, -1).unsqueeze(1)) + 2.0 * error
    sizes = rows.abs().expand(len(vectors), *rows.shape[1:])
    size = torch.einsum("brhqd,bshjd->brhqjs", sizes, gamma * vectors.abs() + node.right(words.error(values)))
    largest = value.abs().amax(dim=(-1, -2), keepdim=True)
    return size + relative * (value.abs() + largest) + torch.finfo(value.dtype).tiny


def _sums(places: Places, budget: Tensor, ratio: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """phi at a ratio, what rounding may have added to it, and the ratio at its minimum; at no substitute for None."""
    weight, value, room = places
    if ratio is None:
        total = weight[..., 0].sum(dim=-1)
        start = (weight[..., 0] * value[..., 0]).sum(dim=-1) / total
        return start, start, start
    parts = weight * (value - ratio[..., None, None])
    first = parts[..., :1]
    least, which = (parts - first).min(dim=-1)
    order = least.argsort(dim=-1).argsort(dim=-1)
    which = torch.where(order < budget, which, 0).unsqueeze(-1)
    chosen, lost = parts.gather(-1, which).sum(dim=(-1, -2)), (weight * room).amax(dim=-1).sum(dim=-1)
    weights = weight.expand_as(parts).gather(-1, which)
    mean = (weights * value.gather(-1, which)).sum(dim=(-1, -2)) / weights.sum(dim=(-1, -2))
    return chosen, lost, mean


def _proved(places: Places, budget: Tensor, found: Tensor) -> Tensor:
    """A ratio that phi is at least 0 at, about the one that was found; else the least of all values."""
    least = (places.value - places.room).amin(dim=(-1, -2))
    phi, lost, _ = _sums(places, budget, found)
    unit = 2.0 * lost + torch.finfo(found.dtype).eps * found.abs()
    total = places.weight.amin(dim=-1).sum(dim=-1)  # phi falls at least as fast as that
    sound = least
    for retreat in RETREATS[::-1]:
        trial = found - retreat * unit / total
        phi, lost, _ = _sums(places, budget, trial)
        sound = torch.where((phi > lost) & (trial > sound), trial, sound)
    return sound
