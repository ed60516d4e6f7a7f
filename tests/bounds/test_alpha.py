"""Tuned slopes: never looser than the slopes they start from, sound whatever they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.bounds.alpha import default_slopes, select, store, tune_slopes
from utils.bounds.passes import BoundPass
from utils.certify import certified_margin, certified_radius, margin_problem, radius
from utils.network.models import SequenceClassifier
from utils.network.unroll import unroll
from utils.perturbation.lp_ball import INF
from utils.perturbation.sets import Perturbation
from utils.question import margin_rows

T, N, BATCH = 3, 3, 4


def network(cell: type[nn.RNNBase], seed: int = 0, **options) -> SequenceClassifier:
    torch.manual_seed(seed)
    model = SequenceClassifier(cell(N, 5, batch_first=True, **options), nn.Linear(5, 3)).double()
    for parameter in model.parameters():
        parameter.data *= 1.5
    return model


def sequences(model: SequenceClassifier, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(BATCH, T, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, model(x).argmax(dim=1)


def sampled_margins(model, x, labels, eps, norm, count=300):
    """Least margins over random points on the boundary and corners of the frames' balls, (batch, n_specs)."""
    rows = margin_rows(labels, 3).double()
    generator = torch.Generator().manual_seed(1)
    least = torch.full(rows.shape[:2], torch.inf, dtype=torch.float64)
    for number in range(count):
        move = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if norm == INF:
            move = move.sign()
        elif norm == 1 and number % 2:
            move = nn.functional.one_hot(move.abs().argmax(-1), N) * move.sign()
        move = eps * move / torch.linalg.vector_norm(move, ord=norm, dim=-1, keepdim=True)
        with torch.no_grad():
            least = torch.minimum(least, (rows @ model(x + move)[..., None]).squeeze(-1))
    return least


CELLS = [(nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"}), (nn.LSTM, {}), (nn.GRU, {}), (nn.LSTM, {"num_layers": 2})]


@pytest.mark.parametrize(("cell", "options"), CELLS)
@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_alpha_is_at_least_crown_and_sound(cell, options, norm):
    model = network(cell, **options)
    x, labels = sequences(model)
    eps = 0.15
    crown = certified_margin(model, x, labels, eps, norm=norm)
    alpha = certified_margin(model, x, labels, eps, norm=norm, method="alpha", alpha_steps=10)
    assert (alpha >= crown).all()
    assert (alpha.amin(dim=1) > crown.amin(dim=1)).any(), "ten steps gained nothing on any sample"
    assert (alpha <= sampled_margins(model, x, labels, eps, norm) + 1e-12).all()


@pytest.mark.parametrize(("cell", "options"), CELLS)
def test_any_slopes_are_sound(cell, options):
    model = network(cell, **options)
    x, labels = sequences(model)
    graph = unroll(model, T)
    perturbation = Perturbation(x, torch.full((BATCH, T), 0.2, dtype=torch.float64), INF)
    rows = margin_rows(labels, 3).double()
    with torch.no_grad():
        first = BoundPass(graph, perturbation)
        first.margin(rows)
        table = default_slopes(first)
        sampled = sampled_margins(model, x, labels, 0.2, INF)
        for seed in range(10):
            torch.manual_seed(seed)
            noisy = [
                entry and tuple(tuple(s + 0.3 * seed * torch.randn_like(s) for s in plane) for plane in entry)
                for entry in table
            ]
            bounds = BoundPass(graph, perturbation, slopes=noisy).margin(rows)
            assert bounds.isfinite().all()
            assert (bounds <= sampled + 1e-12).all()


def test_a_wrong_intercept_of_tuned_planes_is_caught(monkeypatch):
    """The checks above have teeth: intercepts that are a little too high certify what is not so."""
    model = network(nn.LSTM)
    x, labels = sequences(model)
    product = BoundPass.relaxation

    def raised(self, node):
        relaxation = product(self, node)
        lower = relaxation.lower._replace(intercept=relaxation.lower.intercept + 0.3)
        return relaxation._replace(lower=lower)

    monkeypatch.setattr(BoundPass, "relaxation", raised)
    alpha = certified_margin(model, x, labels, 0.15, norm=INF, method="alpha", alpha_steps=5)
    assert not (alpha <= sampled_margins(model, x, labels, 0.15, INF) + 1e-12).all()


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU])
def test_radius_is_at_least_that_of_crown_and_certified(cell):
    model = network(cell)
    x, labels = sequences(model)
    crown = certified_radius(model, x, labels, batch_size=3)
    alpha = certified_radius(model, x, labels, method="alpha", alpha_steps=10, batch_size=3)
    assert (alpha >= crown).all() and (alpha > crown).any()
    for sample in range(BATCH):
        least = sampled_margins(model, x[[sample]], labels[[sample]], alpha[sample], 2.0)
        assert (least > 0).all()


def test_misclassified_samples_and_masks_of_their_own():
    model = network(nn.LSTM)
    x, labels = sequences(model)
    labels[0] = (labels[0] + 1) % 3
    mask = torch.tensor([[1, 1, 1], [0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)
    radius = certified_radius(model, x, labels, frames=mask, method="alpha", alpha_steps=4, batch_size=2)
    crown = certified_radius(model, x, labels, frames=mask, batch_size=2)
    assert radius[0] == 0
    assert (radius >= crown).all()


def test_table_keeps_samples_apart():
    model = network(nn.GRU)
    x, labels = sequences(model)
    graph = unroll(model, T).detach()
    perturbation = Perturbation(x, torch.full((BATCH, T), 0.1, dtype=torch.float64), 2.0)
    tuned, margin = tune_slopes(graph, perturbation, margin_rows(labels, 3).double(), 3)
    table = [None] * len(tuned)
    rows = torch.tensor([2, 0])
    store(table, rows, select(tuned, rows, torch.float64), BATCH)
    for entry, kept in zip(tuned, select(table, rows, torch.float64), strict=True):
        for plane, same in zip(entry, kept, strict=True):
            assert all(torch.equal(slope[rows], copy) for slope, copy in zip(plane, same, strict=True))
    again = BoundPass(graph, perturbation, slopes=tuned).margin(margin_rows(labels, 3).double()).amin(dim=1)
    assert torch.allclose(again, margin)


def test_gradients_of_the_model_pass_and_weights_stay():
    model = network(nn.LSTM)
    x, labels = sequences(model)
    before = [parameter.clone() for parameter in model.parameters()]
    margins = certified_margin(model, x, labels, 0.05, method="alpha", alpha_steps=2)
    margins.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_steps_must_be_positive():
    model = network(nn.RNN)
    x, labels = sequences(model)
    with pytest.raises(ValueError, match="alpha_steps"):
        margin_problem(model, x, labels, method="alpha", alpha_steps=0)


def test_slopes_of_relu_are_tuned_and_stay_between_those_of_its_pieces():
    """Its default lines lie at kinks of the margin, where steps that suit smooth functions gain nothing."""
    torch.manual_seed(0)
    model = SequenceClassifier(nn.RNN(20, 30, nonlinearity="relu", batch_first=True), nn.Linear(30, 3)).double()
    x = torch.randn(6, 4, 20, dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    graph = unroll(model, x.shape[1], torch.float64).detach()
    perturbation = Perturbation(x, torch.full(x.shape[:2], 0.3, dtype=torch.float64))
    rows = margin_rows(labels, 3).double()
    plain = BoundPass(graph, perturbation).margin(rows).amin(dim=1)
    slopes, margin = tune_slopes(graph, perturbation, rows, 20)
    assert (margin >= plain).all()
    assert float(((margin - plain) / plain.abs()).mean()) > 0.02
    for planes in filter(None, slopes):
        for plane in planes:
            assert all(bool(((slope >= 0) & (slope <= 1)).all()) for slope in plane)
    assert (margin <= sampled_margins(model, x, labels, 0.3, 2.0).amin(dim=1) + 1e-9).all()


def test_rounds_that_gain_nothing_are_followed_by_a_nearer_one(monkeypatch):
    """Planes of gates change with eps: tuned 3 % above the radius they are worse there than those of "crown"."""
    torch.manual_seed(0)
    model = SequenceClassifier(nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 3))
    x = torch.randn(1, 5, 4)
    label = model(x).argmax(dim=1)
    plain, tuned = (certified_radius(model, x, label, method=method, alpha_steps=20) for method in ("crown", "alpha"))
    assert tuned > 1.002 * plain
    monkeypatch.setattr(radius, "ALPHA_NEAR", radius.ALPHA_OVERSHOOT)
    assert certified_radius(model, x, label, method="alpha", alpha_steps=20) < tuned
