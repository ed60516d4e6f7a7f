"""Attention whose queries are not all read: the graph has those that are, computes the same, and is bounded alike."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from utils.certify import Substitutes, certified_margin, substitution_margins
from utils.graph import narrow
from utils.graph.mixing import MatMul
from utils.network.reading import graph_of, read_network

T, N, HEADS = 4, 6, 2


class Attention(nn.Module):
    """Logits of the rows ``read`` of a layer of attention, of which all queries are computed, or these ``only``."""

    def __init__(self, read: tuple[int, ...], only: bool):
        super().__init__()
        self.read, self.only = list(read), only
        self.query, self.key, self.value, self.out = (nn.Linear(N, N) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(N), nn.Linear(N, 3)

    def forward(self, x: Tensor) -> Tensor:
        asked = x[:, self.read] if self.only else x
        q, k, v = (
            layer(part).view(len(x), -1, HEADS, N // HEADS).transpose(1, 2)
            for layer, part in ((self.query, asked), (self.key, x), (self.value, x))
        )
        shares = (q @ k.transpose(-1, -2) / math.sqrt(N // HEADS)).softmax(dim=-1)
        context = (shares @ v).transpose(1, 2).reshape(len(x), -1, N)
        rows = (self.out(context) + asked).relu()
        return self.head(rows if self.only else rows[:, self.read]).sum(dim=1)


class Both(nn.Module):
    """Two layers, of whose second the first row is read."""

    def __init__(self):
        super().__init__()
        self.first = nn.TransformerEncoderLayer(N, HEADS, 8, dropout=0.0, batch_first=True)
        self.second = nn.TransformerEncoderLayer(N, HEADS, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(N, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x))[:, 0])


def made(make, seed: int = 0):
    torch.manual_seed(seed)
    return make().double().eval().requires_grad_(False)


def graph_over(net: nn.Module, x: Tensor):
    return graph_of(read_network(net, x)[0], x.shape[1], torch.float64, "plane").detach()


NETS = {
    "first": lambda: Attention((0,), only=False),
    "two rows": lambda: Attention((3, 1), only=False),
    "second layer": Both,
}


@pytest.mark.parametrize("name", NETS)
def test_the_graph_computes_what_the_module_does(name):
    net, x = made(NETS[name]), torch.randn(5, T, N, dtype=torch.float64)
    graph = graph_over(net, x[:1])
    rows = {node.shape.rows for node in graph.nodes if isinstance(node, MatMul)}
    assert name == "second layer" or rows == {len(net.read)}
    torch.testing.assert_close(graph.evaluate(x), net(x), rtol=1e-12, atol=1e-12)
    assert all(parent is graph.nodes[parent.index] for node in graph.nodes for parent in node.parents)


def test_where_all_rows_are_read_the_graph_stays_as_it_is():
    graph = graph_over(made(lambda: Attention((0, 1, 2, 3), only=False)), torch.randn(1, T, N, dtype=torch.float64))
    assert narrow.narrowed(graph) is graph


@pytest.mark.parametrize("read", [(0,), (3, 1)])
def test_bounds_are_those_of_a_module_that_computes_only_what_it_reads(read):
    nets = [made(lambda only=only: Attention(read, only)) for only in (False, True)]
    x = torch.randn(1, T, N, dtype=torch.float64)
    label = nets[0](x).argmax(dim=1)
    valid = torch.ones(1, T, 2, dtype=torch.bool)
    valid[0, 0] = False
    substitutes = Substitutes(x[:, :, None] + 0.5 * torch.randn(1, T, 2, N, dtype=torch.float64), valid)
    for method in ("ibp", "crown-ibp", "crown"):
        pair = [substitution_margins(net, x, label, substitutes, [1, 2], method=method) for net in nets]
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)
    pair = [certified_margin(net, x, label, 0.1, norm=2) for net in nets]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


def test_a_row_too_few_is_noticed(monkeypatch):
    honest = narrow._rows_read
    monkeypatch.setattr(narrow, "_rows_read", lambda node, own: honest(node, own).roll(1))
    with pytest.raises((AssertionError, ValueError)):
        test_the_graph_computes_what_the_module_does("two rows")
