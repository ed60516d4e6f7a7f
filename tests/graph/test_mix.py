"""Sums of products that share a gate: their intervals against grids, and which sums they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import normal
from torch import Tensor, nn

from utils.bounds.passes import BoundPass
from utils.certify import certified_margin
from utils.graph import Frame, GateSum, Graph, Linear, Negative, Product, WeightedSum, weighted_sum
from utils.network.models import SequenceClassifier
from utils.network.reading import read_network
from utils.perturbation.lp_ball import INF
from utils.perturbation.sets import Perturbation

SIZE = 40
NAMES = ("x*sigmoid(y)", "tanh(x)*sigmoid(y)")


def free_operands(count: int) -> tuple[Graph, list[Linear]]:
    """A graph whose operands vary freely of one another: each reads values of its own."""
    graph = Graph()
    frame = graph.add(Frame(count * SIZE, 0))
    eye = torch.eye(count * SIZE).double()
    pieces = eye.split(SIZE)
    return graph, [graph.add(Linear((frame,), (piece,), torch.zeros(SIZE).double())) for piece in pieces]


def mixed(signs: tuple[int, ...], factors: tuple[float, ...], kind=weighted_sum) -> tuple[Graph, WeightedSum]:
    """sum_i factors[i] f_i(x_i) sigmoid(signs[i] y)."""
    graph, (y, *states) = free_operands(1 + len(signs))
    closed = graph.add(Negative(y))
    products = [
        graph.add(Product(x, y if sign > 0 else closed, NAMES[i % 2], "plane"))
        for i, (x, sign) in enumerate(zip(states, signs, strict=True))
    ]
    return graph, graph.add(kind(tuple(products), factors))


def values_on_grid(graph: Graph, x: Tensor, eps: float, points: int) -> Tensor:
    """(points ** operands, SIZE): every operand takes all its grid points, whatever the others take."""
    operands = x.shape[-1] // SIZE
    steps = torch.linspace(-eps, eps, points).double()
    shifts = torch.tensor(list(itertools.product(steps.tolist(), repeat=operands))).double()
    return graph.evaluate((x + shifts.repeat_interleave(SIZE, dim=1))[:, None])


CASES = [((-1, 1), (1.0, 1.0)), ((1, 1), (1.0, 1.0)), ((-1, 1), (-2.0, 0.5)), ((1, -1, 1), (1.0, -1.0, 3.0))]


@pytest.mark.parametrize("signs, factors", CASES)
@pytest.mark.parametrize("scale, eps", [(1.0, 0.0), (1.0, 0.3), (3.0, 1.0), (50.0, 10.0)])
def test_intervals_are_exact(signs, factors, scale, eps):
    graph, node = mixed(signs, factors)
    assert isinstance(node, GateSum)
    x = scale * normal(1, (1 + len(signs)) * SIZE, seed=len(signs))
    low, high = BoundPass(graph, Perturbation(x[:, None], torch.full((1, 1), eps).double(), INF), "ibp").interval(node)
    values = values_on_grid(graph, x, eps, points=5)
    room = 1e-9 * (1.0 + values.abs().amax())
    assert (values >= low - 1e-12 * room).all() and (values <= high + 1e-12 * room).all()
    # The ends of the grid are the ends of the operands, where the sum is least and greatest.
    assert (values.amin(dim=0) <= low[0] + room).all() and (values.amax(dim=0) >= high[0] - room).all()


def test_they_are_tighter_than_sums_of_intervals():
    for signs, factors in CASES:
        x = normal(1, (1 + len(signs)) * SIZE, seed=3)
        ball = Perturbation(x[:, None], torch.full((1, 1), 0.5).double(), INF)
        widths = []
        for kind in (weighted_sum, WeightedSum):
            graph, node = mixed(signs, factors, kind)
            low, high = BoundPass(graph, ball, "ibp").interval(node)
            widths.append(high - low)
        assert (widths[0] <= widths[1] + 1e-12).all()
        assert widths[0].mean() < 0.97 * widths[1].mean()


def test_the_check_catches_one_end_of_the_gate(monkeypatch):
    """A sum that looks at one end of the gate alone."""
    monkeypatch.setattr(torch, "minimum", lambda first, second: first)
    with pytest.raises(AssertionError):
        test_intervals_are_exact((-1, 1), (1.0, 1.0), 1.0, 0.3)


def test_other_sums_stay_as_they_are():
    graph, (y, other, a, b) = free_operands(4)
    products = [graph.add(Product(x, gate, NAMES[0], "plane")) for x, gate in ((a, y), (b, other))]
    assert type(weighted_sum(tuple(products))) is WeightedSum
    assert type(weighted_sum((products[0],))) is WeightedSum
    assert type(weighted_sum((products[0], a))) is WeightedSum


class HandWritten(nn.Module):
    """A GRU written out, in two spellings of its last line."""

    def __init__(self, cell: nn.GRU, head: nn.Linear, spelling: str):
        super().__init__()
        self.cell, self.head, self.spelling = cell, head, spelling

    def forward(self, x: Tensor) -> Tensor:
        cell, h = self.cell, torch.zeros(x.shape[0], self.cell.hidden_size, dtype=x.dtype)
        for t in range(x.shape[1]):
            r, z, n = nn.functional.linear(x[:, t], cell.weight_ih_l0, cell.bias_ih_l0).chunk(3, dim=-1)
            hr, hz, hn = nn.functional.linear(h, cell.weight_hh_l0, cell.bias_hh_l0).chunk(3, dim=-1)
            z, n = torch.sigmoid(z + hz), torch.tanh(n + torch.sigmoid(r + hr) * hn)
            h = (1 - z) * n + z * h if self.spelling == "sum" else n + z * (h - n)
        return self.head(h)


@pytest.mark.parametrize("spelling", ["sum", "difference"])
def test_a_hand_written_gru_has_the_intervals_of_the_stock_one(spelling):
    torch.manual_seed(0)
    rnn, head = nn.GRU(3, 4, batch_first=True).double(), nn.Linear(4, 3).double()
    x, labels = normal(5, 3, 3, seed=1), torch.arange(5) % 3
    written = HandWritten(rnn, head, spelling)
    network, _ = read_network(written, x)
    stock = certified_margin(SequenceClassifier(rnn, head), x, labels, 0.1, method="ibp")
    torch.testing.assert_close(certified_margin(written, x, labels, 0.1, method="ibp"), stock)
