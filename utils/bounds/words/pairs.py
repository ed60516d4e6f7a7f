"""Products of matrices whose rows and columns read single words: scores of a first layer of attention.

Row i of X reads word w(i), column j of Y word w(j), so element (i, j) of X Y has a value for every pair of substitutes;
only for pairs of the same one if both read one word, and only for those with one of the two replaced if a single word
may be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph.mixing import MatMul
from ...graph.nodes import Interval
from .reads import NONE
from .values import WordValues


def lines_of(words: WordValues, node: MatMul) -> tuple[Tensor, Tensor] | None:
    """The word of every row of X, (count, rows), and column of Y; None if some read several, or are no leaf."""
    x, y = node.parents
    if not (words.is_leaf(x) and words.is_leaf(y)):
        return None
    rows, columns = node.left(words.word(x)), node.right(words.word(y)).mT
    found = []
    for line in (rows, columns):
        least = torch.where(line == NONE, line.shape[-1] + int(line.max()) + 1, line).amin(dim=-1)
        most = line.amax(dim=-1)
        if bool(((most != NONE) & (least != most)).any()):
            return None
        found.append(most)
    return tuple(found)


def _products(words: WordValues, node: MatMul, x: Tensor, y: Tensor) -> Tensor:
    """X^s Y^r for all pairs, (batch, S + 1, S + 1, count, rows, columns), from values (batch, S + 1, size)."""
    return node.left(x).unsqueeze(2) @ node.right(y).unsqueeze(1)


def _ends(words: WordValues, products: Tensor, lines: tuple[Tensor, Tensor]) -> Interval:
    """Least and greatest over the pairs that there are, (batch, size) each."""
    rows, columns = lines
    same = (rows.unsqueeze(-1) == columns.unsqueeze(-2)) & (rows != NONE).unsqueeze(-1)
    choices = products.shape[1]
    first = torch.arange(choices, device=products.device)
    together = (first[:, None] == first)[..., None, None, None]
    single = ((first[:, None] == 0) | (first == 0))[..., None, None, None]
    few = (words.perturbation.largest_budget <= 1).reshape(-1, 1, 1, 1, 1, 1)
    allowed = torch.where(same, together, ~few | single)
    low = products.masked_fill(~allowed, torch.inf).amin(dim=(1, 2))
    high = products.masked_fill(~allowed, -torch.inf).amax(dim=(1, 2))
    return low.flatten(1), high.flatten(1)


def product_range(words: WordValues, node: MatMul) -> Interval | None:
    lines = lines_of(words, node)
    if lines is None:
        return None
    x, y = (words.values(parent) for parent in node.parents)
    return _ends(words, _products(words, node, x, y), lines)


def remainder_range(words: WordValues, node: MatMul) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """C and D, (batch, parent size), and the interval of (X - C)(Y - D)."""
    lines = lines_of(words, node)
    if lines is None:
        return None
    x, y = (words.values(parent) for parent in node.parents)
    products = _products(words, node, x - x[:, :1], y - y[:, :1])
    return x[:, 0], y[:, 0], *_ends(words, products, lines)
