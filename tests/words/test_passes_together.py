"""What passes over replaced words do at once gives what it gives one by one: sentences, budgets, planes, reads."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from word_nets import NETS, N, T, made, normal, words

from utils.bounds import passes
from utils.bounds.backward import together
from utils.bounds.passes import BoundPass
from utils.bounds.words import WordValues, means, reads
from utils.certify.substitution import Substitutes, decide_substitution, margins, substitution_margins
from utils.graph.graph import Graph
from utils.graph.mixing import MatMul
from utils.graph.nodes import Constant, Frame, Linear, WeightedSum
from utils.graph.nonlinear import Activation
from utils.network.reading import graph_of, read_network
from utils.perturbation.sets import Perturbation
from utils.perturbation.substitutions import Substitutions
from utils.question.specification import margin_rows
from utils.relaxation.lines import Plane, Relaxation

METHODS = ("ibp", "crown-ibp", "crown")
BUDGETS = (0, 1, 2, 3)
SLOW = ("two layers, standard", "torch's layer")
LABELS = torch.tensor([0, 2])


def graph_over(net, x: Tensor):
    return graph_of(read_network(net, x)[0], x.shape[1], torch.float64, "plane").detach()


def one_by_one(net, x, vectors, valid, method: str) -> Tensor:
    """A backward pass a sentence and budget; planes node by node, for the largest budget and for one word."""
    graph, rows = graph_over(net, x), margin_rows(LABELS, 3).double()
    apart = method == "crown" or any(isinstance(node, MatMul) for node in graph.nodes)
    found = []
    for own in (slice(sample, sample + 1) for sample in range(len(x))):
        of_budgets, bounds = [], None
        for budget in BUDGETS[::-1]:
            if bounds is None or budget == 0 or (budget == 1 and apart):
                bounds = BoundPass(graph, Substitutions(x[own], vectors[own], valid[own], budget), method)
            bounds.perturbation.budget = torch.full_like(bounds.perturbation.budget, budget)
            of_budgets.append(bounds.margin(rows[own]))
        found.append(torch.stack(of_budgets, dim=-1).cummax(dim=-1).values.flip(-1))
    return torch.cat(found)


def check_margins(name: str, monkeypatch) -> None:
    net, (x, vectors, valid) = made(name), words()
    for method in METHODS[: 2 if name in SLOW else 3]:
        found = substitution_margins(net, x, LABELS, Substitutes(vectors, valid), BUDGETS, method=method)
        with monkeypatch.context() as patch:
            patch.setattr(passes, "alike", lambda nodes, first, batch: [first])
            patch.setattr(BoundPass, "pass_through", lambda self, node, rows, weight: self.pass_to(node, rows @ weight))
            expected = one_by_one(net, x, vectors, valid, method)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_margins_are_those_of_passes_one_by_one(name, monkeypatch):
    check_margins(name, monkeypatch)


def test_lists_without_any_substitute():
    net, (x, vectors, valid) = made("gru"), words()
    own, logits = Substitutes(vectors[:, :, :0], valid[:, :, :0]), net(x)
    margins_of = (logits.gather(1, LABELS[:, None]) - logits)[torch.arange(3) != LABELS[:, None]].reshape(2, 2, 1)
    for method in METHODS:
        found = substitution_margins(net, x, LABELS, own, [0, 2], method=method)
        torch.testing.assert_close(found, margins_of.expand(-1, -1, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["constant", "factor"])
def test_constants_of_each_sample_are_refused(kind, rows):
    """Batches are divided and repeated: a sentence would be bounded with another one's constants."""
    graph, zero = Graph(), torch.zeros(1).double()
    frames = [graph.add(Frame(N, frame)) for frame in range(T)]
    first = graph.add(Linear((frames[0],), (normal(N, N),), zero.expand(N)))
    own = normal(rows, N)
    if kind == "constant":
        first = graph.add(WeightedSum((first, graph.add(Constant(own)))))
    else:
        first = graph.add(WeightedSum((first,), (own,)))
    graph.add(Linear((graph.add(Activation(first, "tanh")),), (normal(3, N),), zero.expand(3)))
    x, vectors, valid = words()
    for ask in (
        lambda: substitution_margins(graph, x, LABELS, Substitutes(vectors, valid), [1, 2]),
        lambda: decide_substitution(graph, x[:1], LABELS[:1], Substitutes(vectors[:1], valid[:1]), 1),
    ):
        with pytest.raises(ValueError, match="of each sample") if rows > 1 else nullcontext():
            ask()


class Steep(Activation):
    """tanh of so many times the operand."""

    def __init__(self, parent, factor: float):
        super().__init__(parent, "tanh")
        self.factor = factor

    def value(self, parent: Tensor) -> Tensor:
        return super().value(self.factor * parent)

    def relax(self, operand, slopes=None) -> Relaxation:
        planes = super().relax(tuple(self.factor * end for end in operand), slopes)
        return Relaxation(*(Plane((self.factor * plane.slopes[0],), plane.intercept) for plane in planes))


def test_activations_with_settings_of_their_own_are_relaxed_by_themselves():
    graph = Graph()
    frame = graph.add(Frame(1, 0))
    parts = [graph.add(Linear((frame,), (torch.eye(1).double(),), torch.zeros(1).double())) for _ in range(2)]
    steep = tuple(graph.add(Steep(part, factor)) for part, factor in zip(parts, (1.0, 3.0), strict=True))
    one = torch.ones(2, 1).double()
    graph.add(Linear(steep, (one, one), torch.zeros(2).double()))
    rows, x = (
        torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64),
        torch.full((1, 1, 1), 0.3, dtype=torch.float64),
    )
    grid = torch.linspace(0.1, 0.5, 101, dtype=torch.float64)
    reached = (grid.tanh() + (3.0 * grid).tanh())[:, None] * torch.tensor([1.0, -1.0])
    ball = Perturbation(x, torch.full((1, 1), 0.2, dtype=torch.float64), math.inf)
    bounds = BoundPass(graph, ball, "crown-ibp").lower_bound(graph.output, rows)
    assert (bounds[0] <= reached.amin(dim=0) + 1e-12).all()


def planes_in_another_order(monkeypatch):
    honest = together._apart
    monkeypatch.setattr(together, "_apart", lambda planes, sizes: honest(planes, sizes)[::-1])


def rows_of_another_budget(monkeypatch):
    honest = Substitutions.largest

    def largest(self, deviations):
        budget, self.budget = self.budget, self.budget.flip(-1) if self.budget.dim() > 1 else self.budget
        found = honest(self, deviations)
        self.budget = budget
        return found

    monkeypatch.setattr(Substitutions, "largest", largest)


def budgets_of_other_rows(monkeypatch):
    honest = means._least_mean
    monkeypatch.setattr(means, "_least_mean", lambda *given: honest(*given[:3], given[3].flip(-1)))


def moves_without_the_last_substitute(monkeypatch):
    honest = WordValues.moves_through
    monkeypatch.setattr(WordValues, "moves_through", lambda self, frame, weight: honest(self, frame, weight)[:, :-1])


def all_sentences_together(monkeypatch):
    monkeypatch.setattr(margins, "sentences_alike", lambda graph, x, moved: [torch.arange(len(x))])


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (planes_in_another_order, "lstm, both directions"),
        (rows_of_another_budget, "gru"),
        (budgets_of_other_rows, "transformer"),
        (moves_without_the_last_substitute, "gru"),
        (all_sentences_together, "lstm, both directions"),
    ],
)
def test_broken_versions_are_noticed(damage, name, monkeypatch):
    expected = {method: one_by_one(made(name), *words(), method) for method in METHODS}
    monkeypatch.setattr(f"{__name__}.one_by_one", lambda net, x, vectors, valid, method: expected[method])
    damage(monkeypatch)
    with pytest.raises(AssertionError):
        check_margins(name, monkeypatch)


@pytest.mark.parametrize("name", NETS)
def test_words_that_nodes_read_are_those_of_a_table(name, monkeypatch):
    net, (x, _, _) = made(name), words()
    graph = graph_over(net, x)
    bits = reads.reads_of(graph, x)
    monkeypatch.setattr(reads, "_is_even", lambda node, full: False)
    tables = reads.reads_of(graph, x)
    assert any(isinstance(own, int) for own in bits)
    for node, own, table in zip(graph.nodes, bits, tables, strict=True):
        assert torch.equal(reads._table(own, node.size, x), reads._table(table, node.size, x))
        for moved in itertools.product((True, False), repeat=T):
            count = (reads._table(table, node.size, x) & torch.tensor(moved)[:, None]).sum(dim=0)
            for part in (own, table):
                word = torch.as_tensor(reads.word_of(part, moved)).expand(node.size)
                assert ((word >= 0) == (count == 1)).all() and ((word == reads.SEVERAL) == (count > 1)).all()
