"""Paths that small nets do not take: frames wider than their layer (narrower l_2 weights), batches in several parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import utils.certify.problem
from utils.bounds.passes import BoundPass
from utils.certify import MarginProblem, certified_margin, certified_radius
from utils.graph.graph import Graph
from utils.network.models import SequenceClassifier
from utils.network.unroll import unroll
from utils.perturbation.sets import Perturbation
from utils.question import margin_rows

T, WIDTH, BATCH = 3, 40, 9
NETS = [(nn.RNN, {}), (nn.RNN, {"bidirectional": True}), (nn.LSTM, {}), (nn.GRU, {}), (nn.GRU, {"num_layers": 2})]


def network(cell: type[nn.RNNBase], options: dict) -> SequenceClassifier:
    torch.manual_seed(0)
    width = 3 * (2 if options.get("bidirectional") else 1)
    return SequenceClassifier(cell(WIDTH, 3, batch_first=True, **options), nn.Linear(width, 3)).double()


def sequences(model: SequenceClassifier) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(BATCH, T, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, model(x).argmax(dim=1).detach()


def bounds_of(model, x, labels, ball: str) -> torch.Tensor:
    graph = unroll(model, T).detach()
    perturbation = Perturbation(x, torch.full((BATCH, T), 0.1, dtype=torch.float64), 2.0, ball)
    return BoundPass(graph, perturbation).margin(margin_rows(labels, 3).double())


@pytest.mark.parametrize("ball", ["frame", "sequence"])
@pytest.mark.parametrize(("cell", "options"), NETS)
@torch.no_grad()
def test_narrower_weights_change_nothing(cell, options, ball, monkeypatch):
    model = network(cell, options)
    x, labels = sequences(model)
    graph = unroll(model, T)
    frame = graph.frames[0]
    assert graph.reduced_weight(frame, frame.child_weights[0]).shape[1] < WIDTH, "the net does not take this path"
    narrow = bounds_of(model, x, labels, ball)
    monkeypatch.setattr(BoundPass, "ball_weight", lambda self, frame, weight: weight)
    assert torch.allclose(narrow, bounds_of(model, x, labels, ball), rtol=0, atol=1e-12)


@torch.no_grad()
def steepest(model, x, labels, eps: float) -> torch.Tensor:
    """Least margins, (batch, n_specs), after steps of ascent that end on the boundary of every frame's l_2 ball."""
    rows = margin_rows(labels, 3).double()
    least = []
    for spec in range(rows.shape[1]):
        move = torch.zeros_like(x)
        for _ in range(20):
            point = (x + move).requires_grad_()
            with torch.enable_grad():
                margin = (rows[:, spec] * model(point)).sum()
            (gradient,) = torch.autograd.grad(margin, point)
            move = -eps * gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        least.append((rows[:, spec] * model(x + move)).sum(dim=1))
    return torch.stack(least, dim=1)


@pytest.mark.parametrize(("cell", "options"), NETS)
def test_narrower_weights_are_sound(cell, options):
    model = network(cell, options)
    x, labels = sequences(model)
    with torch.no_grad():
        assert (bounds_of(model, x, labels, "frame") <= steepest(model, x, labels, 0.1) + 1e-12).all()


@torch.no_grad()
def test_a_basis_that_misses_a_direction_is_caught(monkeypatch):
    model = network(nn.RNN, {})
    x, labels = sequences(model)
    whole = Graph.reduced_weight
    monkeypatch.setattr(Graph, "reduced_weight", lambda self, frame, weight: whole(self, frame, weight)[:, :1])
    assert not (bounds_of(model, x, labels, "frame") <= steepest(model, x, labels, 0.1) + 1e-12).all()


@pytest.fixture
def split(monkeypatch):
    """Makes batches be bounded in parts of 4; returns a list of the parts' sizes."""
    sizes, bound = [], MarginProblem._margins

    def start() -> list[int]:
        monkeypatch.setattr(utils.certify.problem, "CACHE_BYTES", 0)
        monkeypatch.setattr(utils.certify.problem, "INTERVAL_BYTES", 0)
        monkeypatch.setattr(
            MarginProblem, "_margins", lambda self, e, c, *how: (sizes.append(len(c)), bound(self, e, c, *how))[1]
        )
        return sizes

    return start


@pytest.mark.parametrize("method", ["crown", "ibp", "alpha"])
def test_parts_of_a_batch_give_what_the_whole_gives(method, split):
    model = network(nn.LSTM, {})
    x, labels = sequences(model)
    eps = torch.linspace(0.01, 0.2, BATCH, dtype=torch.float64)
    how = {"method": method, "alpha_steps": 2}
    whole = certified_margin(model, x, labels, eps, **how).detach()
    sizes = split()
    margins = certified_margin(model, x, labels, eps, **how)
    assert max(sizes) == 4, "the batch was not split"
    if method == "alpha":
        # Tuned slopes start where two contact points tie: rounding, which a part's size changes, chooses the
        # subgradient, and so the gain. Parts are like the same samples by themselves; neither is worse than untuned.
        untuned = certified_margin(model, x, labels, eps)
        assert (whole >= untuned - 1e-10).all() and (whole > untuned + 1e-10).any()
        parts = torch.arange(BATCH).split(4)
        whole = torch.cat([certified_margin(model, x[part], labels[part], eps[part], **how) for part in parts])
        assert (whole >= untuned - 1e-10).all() and (whole > untuned + 1e-10).any()
    assert torch.allclose(margins, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["crown", "ibp", "alpha"])
def test_parts_of_a_batch_have_its_radii(method, split):
    model = network(nn.LSTM, {})
    x, labels = sequences(model)
    how = {"method": method, "alpha_steps": 2, "search_dtype": torch.float64}
    radius = certified_radius(model, x, labels, **how)
    sizes = split()
    # Both are within tol below where the margin vanishes, which another gain of tuned slopes moves by much less.
    assert torch.allclose(certified_radius(model, x, labels, **how), radius, rtol=2e-3)
    assert max(sizes) == 4, "the batch was not split"


@pytest.mark.parametrize("method", ["crown", "curve"])
def test_gradients_of_a_net_of_which_one_direction_is_frozen(method):
    """Both directions read the same frames, so their weights are narrower together or not at all."""
    model = network(nn.RNN, {"bidirectional": True})
    x, labels = sequences(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        certified_margin(model, x[:2], labels[:2], 0.05, norm=2.0, method=method, curve_steps=0).sum().backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}

    everything = gradients()
    for name, parameter in model.rnn.named_parameters():
        parameter.requires_grad_("reverse" not in name)
    some = gradients()
    assert set(some) < set(everything)
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, everything[name], rtol=1e-6, atol=1e-9)
