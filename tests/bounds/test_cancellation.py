"""Weights and states that cancel, at every depth: a sign that is lost in rounding certifies nothing.

Two neurons are always equal, and enter the next sum by weights HUGE and -HUGE, with another one between them. Of its
share rounding leaves steps of 4e-6. The truth comes from 50 digits. The same checks are run on bounds without what is
taken off for rounding, and must fail.
"""

import math

import mpmath
import pytest
import torch
from torch import nn

from utils.bounds import passes as bounds
from utils.certify import certified_radius, decide
from utils.graph import Activation, Constant, Frame, Graph, Linear, Negative, Product, Slice, WeightedSum
from utils.models import SequenceClassifier
from utils.network.unroll import unroll

DTYPE = torch.float64
HUGE, DEFICIT = 3e10, -1e-6  # the margin at x, over the real numbers
SEEDS = range(10)
QUICK = {"alpha_steps": 2, "curve_steps": 2, "max_eps": 1e-4, "tol": 0.3}
RECURRENT = [
    *(("rnn", place) for place in ("weight_hh_l0", "weight_ih_l1", "weight_hh_l1", "bias", "head")),
    *((cell, place) for cell in ("tanh", "lstm", "gru") for place in ("weight_hh_l0", "weight_ih_l1", "head")),
]
BY_HAND = ("first sum", "factors", "products", "stack", "exact")
# Elsewhere the guards of planes, times HUGE, are in the way already, or those of the last layer's terms.
CAUGHT = [("rnn", "weight_hh_l1"), ("rnn", "bias"), "first sum", "stack", "exact"]


# --- networks that cancel -----------------------------------------------------------------------------------------


def recurrent(cell: str, place: str, seed: int) -> tuple[Graph, torch.Tensor]:
    """Two layers of three neurons, the first and the last of which are equal, over two frames."""
    torch.manual_seed(seed)
    kinds = {"rnn": nn.RNN, "tanh": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
    how = {"nonlinearity": "relu"} if cell == "rnn" else {}
    rnn = kinds[cell](2, 3, num_layers=2, batch_first=True, **how).double()
    model = SequenceClassifier(rnn, nn.Linear(3, 2).double()).requires_grad_(False)
    for name, parameter in rnn.named_parameters():
        rows = parameter.unflatten(0, (-1, 3))  # by gate
        rows.abs_()
        rows[:, 2] = rows[:, 0]
        if parameter.dim() == 2 and not name.startswith("weight_ih_l0"):
            rows[..., 0] = rows[..., 2] = 0.0
        if name == place:  # the middle neuron only, and of gates the last: outputs of an LSTM, a GRU's new state
            rows[-1, 1, 0], rows[-1, 1, 2] = HUGE, -HUGE
    model.head.weight[:] = torch.tensor([[0.0, 1.0, 0.0], [0.0] * 3])
    if place == "head":
        model.head.weight[0] = torch.tensor([HUGE, 0.7, -HUGE])
    if place == "bias":  # against a neuron that is 1 whatever comes
        for weight in (rnn.weight_ih_l0, rnn.weight_hh_l0):
            weight[0] = 0.0
        rnn.bias_ih_l0[0], rnn.bias_hh_l0[0] = 1.0, 0.0
        rnn.weight_ih_l1[1, 0], rnn.bias_ih_l1[1] = HUGE, -HUGE
    return unroll(model, 2), torch.rand(1, 2, 2, dtype=DTYPE)


def by_hand(place: str, seed: int) -> tuple[Graph, torch.Tensor]:
    """Graphs that no recurrent layer has."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=DTYPE)

    graph, x = Graph(), random(1, 2, 3)
    x[..., 2] = x[..., 0]
    frames = [graph.add(Frame(3, t)) for t in range(2)]
    copies, zero = random(3, 3), torch.zeros(1, dtype=DTYPE)
    copies[2] = copies[0]
    cancelling = torch.tensor([[HUGE, 0.7, -HUGE]], dtype=DTYPE)
    inputs = graph.add(Linear((frames[1],), (copies,), torch.zeros(3, dtype=DTYPE)))
    if place == "first sum":
        one = graph.add(Activation(graph.add(Linear((inputs,), (cancelling,), zero)), "relu"))
    elif place == "stack":  # of linear nodes
        one = graph.add(Linear((inputs,), (torch.eye(3, dtype=DTYPE),), torch.zeros(3, dtype=DTYPE)))
        one = graph.add(Linear((graph.add(Negative(one)),), (-cancelling,), zero))
    elif place == "exact":  # a frame that does not move
        one = graph.add(Activation(graph.add(Linear((frames[0],), (cancelling,), zero)), "tanh"))
        one = graph.add(WeightedSum((one, graph.add(Slice(inputs, 1, 1)))))
    else:
        gates = [graph.add(Slice(inputs, k, 1)) for k in range(3)]
        three = [graph.add(Activation(gate, "tanh")) for gate in gates]
        if place == "products":
            three = [graph.add(Product(a, b, "x*sigmoid(y)", "plane")) for a, b in zip(three, gates, strict=True)]
        one = graph.add(WeightedSum(tuple(three), (HUGE, 0.7, -HUGE)))
    one = graph.add(Activation(one, "relu"))
    graph.add(Linear((one,), (torch.tensor([[1.0], [0.0]], dtype=DTYPE),), torch.zeros(2, dtype=DTYPE)))
    return graph, x


def network(case: str | tuple[str, str], seed: int, margin: float = DEFICIT) -> tuple[Graph, torch.Tensor, dict]:
    """A graph whose margin at x is about ``margin`` over the real numbers, and which frames move."""
    graph, x = by_hand(case, seed) if isinstance(case, str) else recurrent(*case, seed)
    with mpmath.workdps(50):
        graph.output.bias[1] = float(true_margin(graph, x) + mpmath.mpf(float(graph.output.bias[1])) - margin)
    graph.output.bias_size = graph.output.bias.abs()
    assert abs(true_margin(graph, x) - margin) < 1e-3 * abs(margin)
    return graph, x, {"frames": 1} if case == "exact" else {}


# --- the truth ------------------------------------------------------------------------------------------------------


def true_values(graph: Graph, x: torch.Tensor) -> list[list[mpmath.mpf]]:
    """Every node's value at the only sample of x."""
    functions = {"relu": lambda v: max(v, mpmath.mpf(0)), "tanh": mpmath.tanh}
    values: list[list[mpmath.mpf]] = []
    for node in graph.nodes:
        parents = [values[parent.index] for parent in node.parents]
        if isinstance(node, (Frame, Constant)):
            own = [mpmath.mpf(v) for v in (x[0, node.frame] if isinstance(node, Frame) else node.vector[0]).tolist()]
        elif isinstance(node, Linear):
            own = [mpmath.mpf(b) for b in node.bias.tolist()]
            for parent, weight in zip(parents, node.weights, strict=True):
                own = [
                    o + mpmath.fdot(map(mpmath.mpf, row), parent) for o, row in zip(own, weight.tolist(), strict=True)
                ]
        elif isinstance(node, WeightedSum):
            own = [mpmath.fdot(map(mpmath.mpf, node.factors), part) for part in zip(*parents, strict=True)]
        elif isinstance(node, Slice):
            own = parents[0][node.start : node.start + node.size]
        elif isinstance(node, Negative):
            own = [-v for v in parents[0]]
        elif isinstance(node, Activation):
            own = [functions[node.name](v) for v in parents[0]]
        else:
            first = mpmath.tanh if node.name.startswith("tanh") else mpmath.mpf
            own = [first(v) / (1 + mpmath.exp(-gate)) for v, gate in zip(*parents, strict=True)]
        values.append(own)
    return values


def true_margin(graph: Graph, x: torch.Tensor) -> mpmath.mpf:
    with mpmath.workdps(50):
        first, second = true_values(graph, x)[-1]
        return first - second


# --- checks ---------------------------------------------------------------------------------------------------------


def without_rounding(monkeypatch) -> None:
    monkeypatch.setattr(bounds, "Rounding", lambda passed: None)


def certified_by(method: str, case, seeds=SEEDS, **how) -> int:
    """How many of the networks are certified at all, none of which should be."""
    label = torch.tensor([0])
    found = 0
    for seed in seeds:
        graph, x, threat = network(case, seed, **how)
        found += float(certified_radius(graph, x, label, norm=math.inf, method=method, **QUICK, **threat)) > 0
    return found


@pytest.mark.parametrize("method", ["ibp", "crown", "crown-ibp"])
@pytest.mark.parametrize("case", [*RECURRENT, *BY_HAND], ids=str)
def test_what_cancels_is_not_certified(case, method):
    assert certified_by(method, case) == 0


@pytest.mark.parametrize("method", ["alpha", "curve"])
@pytest.mark.parametrize("case", [("rnn", "weight_hh_l0"), ("tanh", "weight_ih_l1"), "products", "exact"], ids=str)
def test_tuning_does_not_certify_it_either(case, method):
    assert certified_by(method, case, SEEDS[:2]) == 0


@pytest.mark.parametrize("case", CAUGHT, ids=str)
def test_without_rounding_it_would_be(monkeypatch, case):
    without_rounding(monkeypatch)
    assert certified_by("crown", case) > 0


@pytest.mark.parametrize("case", [*(case for case in RECURRENT if case[1] != "head"), *BY_HAND], ids=str)
def test_what_cancels_and_leaves_enough_is_certified(case):
    assert certified_by("crown", case, SEEDS[:2], margin=0.3) == 2


@pytest.mark.parametrize("case", [("rnn", "weight_ih_l1"), ("lstm", "head"), "exact"], ids=str)
def test_decide(case):
    for seed in SEEDS[:6]:
        graph, x, threat = network(case, seed)
        (found,) = decide(graph, x, torch.tensor([0]), 1e-9, norm=math.inf, time_limit=0.5, **threat)
        assert found.verdict != "certified"
