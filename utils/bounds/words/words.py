"""All that a pass asks of words: ``WordValues``, where its backward passes end, and what products of them are."""

from __future__ import annotations

from torch import Tensor

from ...graph.mixing import MatMul
from ...graph.nodes import Interval
from .means import mean_over_words
from .pairs import product_range, remainder_range
from .sources import WordSources
from .values import WordValues


class Words(WordValues):
    """See ``WordValues``."""

    def sources(self) -> WordSources:
        return WordSources(self)

    def products(self, node: MatMul) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Operands of a product of matrices without substitutes, and the interval of the rest; see ``MatMul``."""
        return remainder_range(self, node)

    def pair_range(self, node: MatMul) -> Interval | None:
        """Interval of a product of matrices, from its values for all pairs of words; None for other operands."""
        return product_range(self, node)

    def mean(self, node: MatMul, coefficients: Tensor) -> Tensor | None:
        """Lower bounds of rows of means of words, weighted by a softmax of scores that read single words; else None."""
        return mean_over_words(self, node, coefficients)
