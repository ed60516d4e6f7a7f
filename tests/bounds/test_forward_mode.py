"""Forward mode: linear bounds of every node against samples, margins against an attack and other methods."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import INF, THREATS, Threat, lowest_margins, node_values, normal, random_points
from torch import nn

from utils.bounds.forward import ForwardPass
from utils.bounds.passes import BoundPass
from utils.certify import certified_margin, certified_radius
from utils.graph.nodes import Frame
from utils.network import unroll
from utils.network.cnn import make_cnn
from utils.network.models import MLP, SequenceClassifier
from utils.network.trace import trace
from utils.question.specification import margin_rows

DOUBLE = torch.float64


def sequence_model(kind, seed=0, **options):
    cell, own = {"rnn": (nn.RNN, {}), "relu": (nn.RNN, {"nonlinearity": "relu"})}.get(kind, (None, {}))
    cell = cell or {"lstm": nn.LSTM, "gru": nn.GRU}[kind]
    own |= {name: options.pop(name) for name in ("num_layers", "bidirectional") if name in options}
    head = nn.Linear(4 * (2 if own.get("bidirectional") else 1), 3)
    model = SequenceClassifier(cell(3, 4, batch_first=True, **own), head, **options).double().requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(0.7 * normal(*parameter.shape, seed=100 * seed + number))
    return model


def graph_of(name):
    """A graph, its inputs, (batch, T, n), and how far they move."""
    if name in ("mlp", "elu", "cnn"):
        torch.manual_seed(3)
        model = {
            "mlp": lambda: MLP((6, 5, 5, 3)),
            "elu": lambda: MLP((6, 5, 5, 3), "elu"),
            "cnn": lambda: nn.Sequential(make_cnn("small", 1, 8, 6, 2, False), nn.ReLU(), nn.Linear(6, 3)),
        }[name]().double()
        shape = (1, 8, 8) if name == "cnn" else (6,)
        x = normal(2, *shape, seed=4)
        return trace(model.requires_grad_(False), x).detach(), x.flatten(1)[:, None], 0.05
    options = {"lstm": {"num_layers": 2}, "gru": {"bidirectional": True, "mean": 0.2, "std": 0.5}}.get(name, {})
    model = sequence_model(name, pooling="mean" if name == "relu" else "last", **options)
    return unroll(model, 3), normal(2, 3, 3, seed=5), 0.1


NAMES = ("rnn", "relu", "lstm", "gru", "mlp", "elu", "cnn")


def passes(graph, perturbation, sound=True):
    return {backward: ForwardPass(graph, perturbation, backward, sound=sound) for backward in (False, True)}


@pytest.mark.parametrize("name", NAMES)
def test_no_point_falls_below_the_margins(name):
    graph, x, eps = graph_of(name)
    rows = margin_rows(torch.tensor([0, 2]), 3).double()
    threats = THREATS if name == "rnn" else [Threat(2.0), Threat(INF, clip=(-1.0, 1.0))][: 1 if name == "cnn" else 2]
    for threat in threats:
        start = x.clamp(*threat.clip) if threat.clip else x
        radii = torch.full(x.shape[:2], eps, dtype=DOUBLE)
        perturbation = threat.around(start, radii)
        least = lowest_margins(graph, start, radii, rows, threat)
        crude = BoundPass(graph, perturbation, "ibp").margin(rows)
        for bounds in passes(graph, perturbation).values():
            margins = bounds.margin(rows)
            assert bool((margins <= least + 1e-9).all()), threat
            assert bool((margins >= crude - 1e-9).all()), threat


def holds(bounds, graph, points) -> bool:
    """Whether the linear bounds of all nodes hold at points, (count, batch, T, n)."""
    for point in points:
        values = node_values(graph, point)
        moved = torch.cat([point[:, f.frame] - bounds.perturbation.center(f.frame) for f in graph.frames], dim=1)
        for node, line in bounds._lines.items():
            width = line.slope.shape[-1]
            middle = line.center + (line.slope @ moved[:, :width, None]).squeeze(-1)
            if line.spread is not None:
                width = line.spread.shape[-1]
                spread = line.radius + (line.spread @ moved[:, :width, None]).squeeze(-1)
            else:
                spread = line.radius
            value = values[node.index]
            if not bool(((middle - spread <= value + 1e-9) & (value <= middle + spread + 1e-9)).all()):
                return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_every_node_lies_between_its_functions(name):
    graph, x, eps = graph_of(name)
    radii = torch.full(x.shape[:2], eps, dtype=DOUBLE)
    threat = Threat(INF)
    bounds = ForwardPass(graph, threat.around(x, radii), False)
    assert len(bounds._lines) == sum(not (isinstance(n, Frame) or bounds.is_exact(n)) for n in graph.nodes)
    assert holds(bounds, graph, random_points(x, radii, threat, 24, seed=1))


def test_functions_without_absolute_values_are_caught(monkeypatch):
    """Broken: R' = W R, as if lower functions stayed lower ones whatever the sign of the weight."""
    graph, x, eps = graph_of("rnn")
    radii = torch.full(x.shape[:2], 5 * eps, dtype=DOUBLE)
    points = random_points(x, radii, Threat(INF), 24, seed=1)
    assert holds(ForwardPass(graph, Threat(INF).around(x, radii), False), graph, points)
    monkeypatch.setattr(ForwardPass, "absolute", lambda self, weight: weight)
    assert not holds(ForwardPass(graph, Threat(INF).around(x, radii), False), graph, points)


def test_one_layer_is_bounded_as_by_crown_and_linear_networks_exactly():
    torch.manual_seed(1)
    x, labels = normal(3, 6, seed=2), torch.tensor([0, 1, 2])
    for norm in (1, 2, INF):
        hidden = MLP((6, 8, 3)).double()
        by_crown, by_both = (certified_margin(hidden, x, labels, 0.1, norm=norm, method=m) for m in METHODS[::-1])
        assert torch.allclose(by_crown, by_both, atol=1e-9)
        linear = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
        found = certified_margin(linear, x, labels, 0.1, norm=norm, method="forward")
        assert torch.allclose(found, certified_margin(linear, x, labels, 0.1, norm=norm), atol=1e-9)


METHODS = ("forward-backward", "crown")


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_one_frame_of_sequences_that_end_early(kind):
    """As words are bounded: the first frame moves, samples are in the order of their ends."""
    model = sequence_model(kind, seed=2)
    x, labels, lengths = normal(4, 5, 3, seed=3), torch.tensor([0, 1, 2, 0]), torch.tensor([5, 4, 4, 2])
    options = {"frames": 0, "norm": 2, "lengths": lengths}
    for method in ("forward", "forward-backward"):
        together = certified_margin(model, x, labels, 0.2, method=method, **options)
        graph = unroll(model, 5, lengths=lengths, falling=True)
        perturbation = Threat(2.0).around(x, 0.2 * torch.eye(5, dtype=DOUBLE)[0].expand(4, -1))
        uneven = ForwardPass(graph, perturbation, method != "forward").margin(margin_rows(labels, 3).double())
        for sample, length in enumerate(lengths.tolist()):
            own = slice(sample, sample + 1)
            alone = certified_margin(model, x[own, :length], labels[own], 0.2, frames=0, method=method)
            # A state that others read once more has its interval cut to what its functions say.
            for found in (together[own], uneven[own]):
                assert bool((found >= alone - 1e-9).all()) and torch.allclose(found, alone, atol=0.05)


@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_single_precision_gradients_no_eps_and_radii(kind):
    model = sequence_model(kind)
    x, labels = normal(2, 3, 3, seed=7), torch.tensor([1, 2])
    for method in ("forward", "forward-backward"):
        margins = [certified_margin(model, x, labels, eps, method=method) for eps in (0.0, 0.05, 0.1)]
        clean = (margin_rows(labels, 3).double() @ model(x)[..., None]).squeeze(-1)
        assert torch.allclose(margins[0], clean, atol=1e-9)
        assert all(bool((more <= less).all()) for less, more in itertools.pairwise(margins))
        single = certified_margin(model, x, labels, 0.1, method=method, dtype=torch.float32).double()
        assert bool((single <= margins[2] + 1e-6).all()) and torch.allclose(single, margins[2], atol=2e-2)
        if kind == "lstm":  # whose planes' slopes are in part taken as given
            continue
        point = x.clone().requires_grad_(True)
        certified_margin(model, point, labels, 0.1, method=method).sum().backward()
        step = 1e-6 * normal(*x.shape, seed=9)
        ends = [certified_margin(model, x + sign * step, labels, 0.1, method=method).sum() for sign in (1, -1)]
        slope = (point.grad * step).sum()
        assert abs(float((ends[0] - ends[1]) / 2 - slope)) < 1e-2 * float(slope.abs())
    radii = [certified_radius(model, x, model(x).argmax(1), method=m, tol=1e-2) for m in ("ibp", "forward", *METHODS)]
    assert all(bool((low <= high * 1.02).all()) for low, high in itertools.pairwise(radii))


class Attention(nn.Module):
    """Three values a frame: products and a softmax have no planes of single values, and go by rows."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.head = (nn.Linear(3, n) for n in (3, 3, 3, 3))

    def forward(self, x):
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), dim=-1)
        return self.head(torch.relu(weights @ self.value(x)).mean(dim=1))


def test_attention():
    torch.manual_seed(2)
    model, x = Attention().double().requires_grad_(False), normal(2, 3, 3, seed=5)
    labels = model(x).argmax(dim=1)
    rows = margin_rows(labels, 3).double()
    for threat in (Threat(INF), Threat(2.0, "sequence")):
        radii = torch.full((2, 3), 0.2, dtype=DOUBLE)
        points = random_points(x, radii, threat, 40, seed=3)
        least = torch.stack([(rows @ model(point)[..., None]).squeeze(-1) for point in points]).amin(dim=0)
        for method in ("forward", "forward-backward"):
            margins = certified_margin(model, x, labels, 0.2, norm=threat.norm, ball=threat.ball, method=method)
            assert bool((margins <= least + 1e-9).all())
        assert bool((margins >= certified_margin(model, x, labels, 0.2, norm=threat.norm, method="ibp") - 1e-9).all())


def test_counted_changes_and_cut_balls():
    """Every change of one or two of four values to 0 or 1; and points of a ball around a sequence, cut to [0, 1]."""
    torch.manual_seed(4)
    model, x = MLP((4, 6, 3), "tanh").double().requires_grad_(False), normal(3, 4, seed=1).sigmoid()
    labels = model(x).argmax(dim=1)
    rows = margin_rows(labels, 3).double()
    for method, count in itertools.product(("forward", "forward-backward"), (1, 2)):
        margins = certified_margin(model, x, labels, count, norm=0, clip=(0.0, 1.0), method=method)
        for places in itertools.combinations(range(4), count):
            for values in itertools.product((0.0, 1.0), repeat=count):
                changed = x.clone()
                changed[:, places] = torch.tensor(values, dtype=DOUBLE)
                assert bool((margins <= (rows @ model(changed)[..., None]).squeeze(-1) + 1e-9).all())
    net = sequence_model("rnn")
    x = normal(2, 3, 3, seed=8).sigmoid()
    labels = net(x).argmax(dim=1)
    rows, noise = margin_rows(labels, 3).double(), normal(60, 2, 9, seed=2)
    moved = (x + (0.4 * noise / noise.norm(dim=-1, keepdim=True)).reshape(60, 2, 3, 3)).clamp(0.0, 1.0)
    least = torch.stack([(rows @ net(point)[..., None]).squeeze(-1) for point in moved]).amin(dim=0)
    for method in ("forward", "forward-backward"):
        cut = certified_margin(net, x, labels, 0.4, norm=2, ball="sequence", clip=(0.0, 1.0), method=method)
        assert bool((cut <= least + 1e-9).all())
        assert bool((cut >= certified_margin(net, x, labels, 0.4, norm=2, ball="sequence", method=method) - 1e-9).all())
