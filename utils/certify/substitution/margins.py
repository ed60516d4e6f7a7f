"""Lower bounds of margins over all sequences in which at most k frames are replaced, each by one of its own list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...bounds.passes import BoundPass
from ...bounds.words import sentences_alike
from ...choices.registry import Registry
from ...graph.graph import Graph
from ...graph.mixing import MatMul
from ...graph.nodes import Node
from ...network.constants.groups import groups_of
from ...network.reading import Network, graph_of, output_shape, read_for_step, read_network
from ...network.state import plain_state
from ...perturbation.substitutions import Substitutions
from ...question.arguments import as_classes, as_inputs
from ...question.specification import output_rows

# Samples that are bounded at once, of those that are alike; backward passes to every layer gain nothing from several.
AT_ONCE = Registry("method of substitutions", {"crown-ibp": 32, "ibp": 32, "crown": 1})


@dataclass(frozen=True)
class Substitutes:
    """What frames may become, in the model's input units: where ``valid``, (batch, T, S) of bool, one of ``vectors``,
    (batch, T, S, n).
    """

    vectors: Tensor
    valid: Tensor

    @classmethod
    def of_words(cls, table: nn.Embedding | Tensor, numbers: Tensor, valid: Tensor) -> Substitutes:
        """From the numbers of words, (batch, T, S), and the vectors of all, (words, n), as a model looks them up."""
        return cls((table.weight if isinstance(table, nn.Embedding) else table)[numbers], valid)

    @property
    def frames_shape(self) -> torch.Size:
        """Of the sequences, (batch, T, n); there may be no substitute at all."""
        return self.vectors.shape[:2] + self.vectors.shape[3:]

    def set_around(self, x: Tensor, budget: int | Tensor | None) -> Substitutions:
        """The set of x, (batch, T, n), for a number, (batch,) of these, or None: every frame may change."""
        return Substitutions(x, self.vectors.to(x), self.valid.to(x.device), budget)

    def part(self, samples: slice | Tensor) -> Substitutes:
        return Substitutes(self.vectors[samples], self.valid[samples])


@plain_state()
def substitution_margins(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    substitutes: Substitutes,
    budgets: Sequence[int | None],
    *,
    targets: Tensor | None = None,
    method: str = "crown-ibp",
    dtype: torch.dtype = torch.float64,
    check: bool = True,
    extra: Any = None,
) -> Tensor:
    """Lower bounds of the margins, (batch, n_specs, budgets): differentiable in the model, in x and in the substitutes.

    Args:
        model, x, labels, targets: as for ``certified_margin``; x is (batch, T, n), the frames all sequences of one
            length.
        substitutes: of every frame of x.
        budgets: how many frames may be replaced at most; None: every one.
        method: "ibp", "crown-ibp" (intervals within, one pass back from the margins) or "crown".
        dtype: precision of the bounds, which have room for rounding.
        check: whether a module that gradients are asked of is compared with what was read of it.
        extra: as for ``certified_margin``. These, and what the forward computes from word numbers, such as masks, stay
            as they are: a substitute is another vector in its word's place.

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    AT_ONCE.check(method)
    network, frames = _read(model, as_inputs(x), check, extra)
    if frames.shape != substitutes.frames_shape:
        raise ValueError(f"the frames are {tuple(frames.shape)}, the substitutes {tuple(substitutes.vectors.shape)}")
    rows = output_rows(as_classes(labels, "labels", "(batch,) of integers"), output_shape(network), targets)
    frames, rows = frames.to(dtype), rows.to(frames.device, dtype)
    parts, order = [], []
    for members, reading in groups_of(network, len(frames)):
        graph = one_for_all(graph_of(reading, frames.shape[1], dtype, "plane"))
        graph = graph if torch.is_grad_enabled() else graph.detach()
        moved = substitutes.valid[members.to(substitutes.valid.device)].any(dim=2)
        for alike in sentences_alike(graph, frames, moved):
            for own in members[alike].to(frames.device).split(AT_ONCE[method]):
                parts.append(budget_margins(graph, frames[own], rows[own], substitutes.part(own), budgets, method))
                order.append(own)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _read(model: nn.Module | Graph, x: Tensor, check: bool, extra: Any) -> tuple[Network, Tensor]:
    learnt = isinstance(model, nn.Module) and torch.is_grad_enabled() and extra is None
    if learnt and any(parameter.requires_grad for parameter in model.parameters()):
        return read_for_step(model, x, check)
    return read_network(model, x, extra=extra)


def one_for_all(graph: Graph) -> Graph:
    """The graph itself. Raises ValueError if nodes have numbers of each sample: batches are divided and repeated."""
    vectors = (part for node in graph.nodes for part in _rows_of(node))
    if any(part.dim() > 1 and part.shape[0] > 1 for part in vectors):
        raise ValueError(
            "constants of each sample are in the graph: ask for each sequence by itself, with a graph of its own"
        )
    return graph


def _rows_of(node: Node) -> Iterator[Tensor]:
    """A node's numbers that have a row a sample, among others."""
    for value in node.repeated(1).values():
        parts = value if isinstance(value, tuple) else (value,)
        yield from (part for part in parts if isinstance(part, Tensor))


def budget_margins(
    graph: Graph, x: Tensor, rows: Tensor, substitutes: Substitutes, budgets: Sequence[int | None], method: str
) -> Tensor:
    """Lower bounds of ``rows @ output``, (batch, n_specs, budgets); what holds for a budget holds for smaller ones.

    Planes are made once for all budgets of more than one word: for the largest, which holds for the others. Of a single
    word more is known where planes are of bounds that see the budget, or of products of words. What passes back through
    the planes ends anew for every budget.
    """
    frames = x.shape[1]
    counts = [frames if budget is None else min(budget, frames) for budget in budgets]
    falling = sorted(set(counts), reverse=True)
    apart = method == "crown" or any(isinstance(node, MatMul) for node in graph.nodes)
    single = [1] if apart and 1 in falling else []
    several = [count for count in falling if count > 0 and count not in single]
    found, sets = [], [part for part in (several, single) if part]
    if sets:
        found.append(_margins_of(graph, x, rows, substitutes, sets, method))
    if falling[-1] <= 0:
        found.append(BoundPass(graph, substitutes.set_around(x, falling[-1]), method).margin(rows)[..., None])
    best = torch.cat(found, dim=-1).cummax(dim=-1).values
    return best[..., [falling.index(count) for count in counts]]


def _margins_of(
    graph: Graph, x: Tensor, rows: Tensor, substitutes: Substitutes, sets: list[list[int]], method: str
) -> Tensor:
    """Lower bounds, (batch, n_specs, budgets), by one pass: planes for the first budget of every list.

    A sample stands in it once a list, and a row once a budget, as many times as the longest list has.
    """
    most = max(map(len, sets))
    budgets = torch.tensor([own + own[-1:] * (most - len(own)) for own in sets], device=x.device)
    set_ = substitutes.set_around(x, sets[0][0]).repeated(len(sets))
    set_.budget = budgets[:, 0].repeat(len(x))
    bounds = BoundPass(graph, set_, method)
    specs = rows.shape[1]
    set_.budget = budgets.repeat_interleave(specs, dim=1).repeat(len(x), 1)
    found = bounds.margin(rows.expand(len(x), -1, -1).repeat_interleave(len(sets), dim=0).repeat(1, most, 1))
    found = found.reshape(len(x), len(sets), most, specs).movedim(-1, 1)
    return torch.cat([found[:, :, place, : len(own)] for place, own in enumerate(sets)], dim=-1)


def bound_sets(graph: Graph, rows: Tensor, method: str) -> Callable[[Tensor, Substitutes, Tensor], Tensor]:
    """Least margins, (batch,), of sets with budgets of their own, (batch,)."""

    def of_part(x: Tensor, substitutes: Substitutes, budgets: Tensor) -> Tensor:
        set_ = substitutes.set_around(x, budgets)
        return BoundPass(graph, set_, method).margin(rows.expand(len(x), -1, -1)).amin(dim=1)

    def bounds(x: Tensor, substitutes: Substitutes, budgets: Tensor) -> Tensor:
        parts = torch.arange(len(x)).split(AT_ONCE[method])
        return torch.cat([of_part(x[own], substitutes.part(own), budgets[own]) for own in parts])

    return bounds
