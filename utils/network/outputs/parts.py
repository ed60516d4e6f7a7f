"""What of a module's result is meant: a part of a tuple or dict, as the scores of classes or as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...graph.nonlinear import Activation
from ..symbolic import Builder, Symbol, UnsupportedError

# What a classifier's forward may end with, and the graph leaves out, since it changes no order and no sign.
ENDS = {
    "": lambda scores: scores,
    "softmax": lambda scores: scores.softmax(dim=-1),
    "log_softmax": lambda scores: scores.log_softmax(dim=-1),
    "sigmoid": torch.sigmoid,
}


class SeveralOutputs(UnsupportedError):
    """The forward returns a tuple or dict, of which no part is named; ``keys`` are its parts, ``kind`` its type."""

    def __init__(self, output: tuple | list | Mapping):
        self.keys = tuple(output) if isinstance(output, Mapping) else tuple(range(len(output)))
        self.keys = tuple(key for key in self.keys if output[key] is not None)
        self.kind = dict if isinstance(output, Mapping) else list if isinstance(output, list) else tuple
        name = type(output).__name__
        super().__init__(
            f"the forward must return the scores of the classes alone, not a {name}: let a small module around it "
            f"return one of its parts, {list(self.keys)}"
        )


@dataclass(frozen=True)
class Outputs:
    """What of a forward's result is meant.

    Attributes:
        path: key of a part of a tuple or dict, or a tuple of keys one inside the other; None for the result itself.
        scores: whether they are scores of classes, whose order alone matters: a softmax at the end is left out.
        signs: whether, of scores, the sign of each decides, or their order: a sigmoid at the end is left out, too.
    """

    path: Any = None
    scores: bool = True
    signs: bool = True

    @property
    def keys(self) -> tuple:
        return () if self.path is None else self.path if isinstance(self.path, tuple) else (self.path,)

    def of(self, output: Any) -> Tensor:
        """The part that is meant. Raises UnsupportedError if there is none, or one of several would have to be."""
        for key in self.keys:
            try:
                output = output[key]
            except (KeyError, IndexError, TypeError):
                raise UnsupportedError(f"the forward's result, a {type(output).__name__}, has no {key!r}") from None
        if isinstance(output, (tuple, list, Mapping)):
            raise SeveralOutputs(output)
        return output

    def without_end(self, builder: Builder, symbol: Symbol) -> tuple[Symbol, str]:
        """Scores without the softmax or sigmoid that they end with, and its name; values are as they are."""
        if symbol.softmax:
            return symbol, symbol.softmax
        before = _before_sigmoid(builder, symbol) if self.scores and self.signs else None
        return (symbol, "") if before is None else (before, "sigmoid")


SCORES = Outputs()  # all that the forward returns, as scores of classes
VALUES = Outputs(signs=False)  # likewise, with a sigmoid at the end, if there is one


def _before_sigmoid(builder: Builder, symbol: Symbol) -> Symbol | None:
    """What sigmoids were taken of, if all elements of a symbol are sigmoids as they come."""
    if not symbol.is_plain:
        return None
    nodes = builder.nodes_of(symbol)
    if not all(isinstance(node, Activation) and node.name == "sigmoid" for node in set(nodes)):
        return None
    moves = [builder.start_of(node.parents[0]) - builder.start_of(node) for node in nodes]
    ids = symbol.ids + torch.tensor(moves).reshape(symbol.shape)
    return Symbol(ids, symbol.scale, symbol.shift)
