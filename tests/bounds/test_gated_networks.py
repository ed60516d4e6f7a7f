"""LSTM and GRU classifiers: the graph is the model, bounds are sound, padding and batching change nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    THREATS,
    Threat,
    check_below,
    check_intervals,
    lowest_margins,
    margins_of,
    node_values,
    normal,
    random_points,
)
from torch import nn

from utils.bounds.passes import METHODS, BoundPass
from utils.certify import certified_margin, certified_radius, margin_problem, search_radius
from utils.choices import RELAXATIONS
from utils.graph.graph import Graph
from utils.graph.nodes import Frame
from utils.network.models import SequenceClassifier
from utils.network.unroll import unroll
from utils.perturbation.lp_ball import INF
from utils.perturbation.sets import Perturbation
from utils.question import margin_rows
from utils.relaxation.lines import Plane, Relaxation
from utils.relaxation.planes import PRODUCTS, relax_product

BATCH, FRAMES, SIZE, CLASSES, HIDDEN = 3, 3, 3, 3, 3
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}
LENGTHS = torch.tensor([2, 4, 1])


def gated(
    cell: str,
    *,
    layers=1,
    bidirectional=False,
    bias=True,
    gain=1.0,
    state=False,
    seed=0,
    hidden=HIDDEN,
    dtype=torch.float64,
    **options,
) -> SequenceClassifier:
    """A small random LSTM or GRU classifier; ``state`` gives it an initial state that is not 0."""
    rnn = CELLS[cell](SIZE, hidden, layers, bias=bias, batch_first=True, bidirectional=bidirectional)
    directions = 2 if bidirectional else 1
    head = nn.Linear(hidden * directions, CLASSES, bias=bias)
    for number, parameter in enumerate((*rnn.parameters(), *head.parameters())):
        scale = gain * (0.9 if parameter.dim() == 2 else 0.5)
        parameter.data = scale * normal(*parameter.shape, seed=1000 * seed + number)
    if state:
        h0, c0 = (normal(layers * directions, hidden, seed=seed + k) for k in (7, 8))
        options["state"] = (h0.tanh(), c0) if cell == "lstm" else h0.tanh()
    return SequenceClassifier(rnn, head, **options).to(dtype).requires_grad_(False)


def inputs(seed: int = 50, batch: int = BATCH, frames: int = FRAMES) -> torch.Tensor:
    return (0.5 * normal(batch, frames, SIZE, seed=seed)).clamp(-1.0, 1.0)


def all_rows(batch: int = BATCH) -> torch.Tensor:
    return margin_rows(torch.arange(batch) % CLASSES, CLASSES).double()


NETS = {
    "lstm": ("lstm", {}),
    "gru": ("gru", {}),
    "deep bidirectional lstm": ("lstm", {"layers": 2, "bidirectional": True, "hidden": 2, "state": True}),
    "bidirectional gru, mean": ("gru", {"bidirectional": True, "pooling": "mean", "hidden": 2, "state": True}),
    "normalised lstm without bias": ("lstm", {"bias": False, "mean": 0.2, "std": 0.5}),
    "deep gru": ("gru", {"layers": 2, "hidden": 2}),
}
MASKS = {
    "all": torch.ones(BATCH, FRAMES, dtype=torch.bool),
    "last": torch.tensor([[False, False, True]]).expand(BATCH, -1),
    "first": torch.tensor([[True, False, False]]).expand(BATCH, -1),
    "mixed": torch.tensor([[True, False, True], [False, False, False], [False, True, True]]),
}


def net(name: str, **options) -> SequenceClassifier:
    cell, known = NETS[name]
    return gated(cell, **(known | options))


# --- the graph is the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_graph_computes_the_model(cell, layers, bidirectional):
    x = inputs(frames=4)
    statistics = ((0.0, 1.0), (normal(SIZE, seed=1), 0.5 + normal(SIZE, seed=2).abs()))
    choices = itertools.product((True, False), ("last", "mean"), statistics, (False, True), (None, LENGTHS))
    for bias, pooling, (mean, std), state, lengths in choices:
        options = {"bias": bias, "pooling": pooling, "mean": mean, "std": std, "state": state}
        model = gated(cell, layers=layers, bidirectional=bidirectional, **options)
        values = unroll(model, 4, lengths=lengths).evaluate(x)
        torch.testing.assert_close(values, model(x, lengths), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(unroll(model, 1).evaluate(x[:, :1]), model(x[:, :1]), rtol=1e-12, atol=1e-12)


def test_the_reset_gate_covers_the_hidden_bias():
    """n = W_in x + b_in + sigmoid(r) (W_hn h + b_hn): with b_hn alone, one frame and h_0 = 0, by hand."""
    model = gated("gru")
    h = HIDDEN
    for name, parameter in model.rnn.named_parameters():
        if name != "bias_hh_l0":
            parameter.data.zero_()
    model.rnn.bias_hh_l0.data[: 2 * h] = torch.tensor([-1.0, 0.0, 2.0, 0.5, -0.5, 1.5]).double()
    model.rnn.bias_hh_l0.data[2 * h :] = torch.tensor([1.0, -2.0, 0.3]).double()
    r, z, m = model.rnn.bias_hh_l0.split(h)
    expected = model.head((1 - z.sigmoid()) * (r.sigmoid() * m).tanh())
    x = inputs(frames=1)
    torch.testing.assert_close(unroll(model, 1).evaluate(x), expected.expand(BATCH, -1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(model(x), expected.expand(BATCH, -1), rtol=1e-14, atol=1e-14)


def test_projections_are_refused_in_one_line():
    with pytest.raises(ValueError, match="proj_size is not supported") as caught:
        SequenceClassifier(nn.LSTM(SIZE, 4, proj_size=2, batch_first=True), nn.Linear(2, CLASSES))
    assert "\n" not in str(caught.value)


# --- soundness ------------------------------------------------------------------------------------------------------


def check_bounds(graph: Graph, x, eps, rows, threat: Threat, methods=METHODS, points: int = 8) -> None:
    """Fail unless margins and the intervals of all nodes hold at corners, on the boundary, inside and under attack."""
    found = lowest_margins(graph, x, eps, rows, threat)
    sampled = random_points(x, eps, threat, points, seed=1)
    for method in methods:
        bounds = BoundPass(graph, threat.around(x, eps), method)
        margin = bounds.margin(rows)
        assert margin.isfinite().all()
        check_below(margin, found, f"{method} margin")
        check_intervals(bounds, sampled)


@pytest.mark.parametrize("mask", ["all", "last", pytest.param("first", marks=pytest.mark.full), "mixed"])
@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_no_point_of_the_set_is_below_the_bounds(name, threat, mask):
    graph = unroll(net(name), FRAMES)
    eps = torch.tensor([[0.05], [0.3], [0.8]]).double() * MASKS[mask]
    check_bounds(graph, inputs(), eps, all_rows(), threat)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", NETS)
def test_no_point_is_below_the_bounds_of_any_relaxation(name, relaxation):
    """Attacks do not depend on the relaxation: they are made once for all threat models."""
    if relaxation == "volume" and name not in ("lstm", "gru"):
        pytest.skip("slow: the slopes are searched")
    graph, x, rows = unroll(net(name), FRAMES, relaxation=relaxation), inputs(), all_rows()
    for number, threat in enumerate((Threat(2.0), Threat(INF, clip=(-1.0, 1.0)), Threat(1.0, "sequence"))):
        mask = list(MASKS.values())[number]
        eps = torch.tensor([[0.05], [0.2], [0.6]]).double() * mask
        points = random_points(x, eps, threat, 60, seed=number)
        found = torch.stack([margins_of(graph, point, rows) for point in points]).amin(dim=0)
        for method in ("crown", "crown-ibp"):
            bounds = BoundPass(graph, threat.around(x, eps), method)
            check_below(bounds.margin(rows), found, f"{relaxation}, {method}")
            check_intervals(bounds, points[:8])


@pytest.mark.parametrize("gain", [1e-3, 5.0, 50.0])
@pytest.mark.parametrize("cell", CELLS)
def test_tiny_and_saturating_weights(cell, gain):
    for size, threat in ((1e-3, Threat(2.0)), (0.5, Threat(INF)), (1e3, Threat(1.0))):
        graph = unroll(gated(cell, gain=gain), FRAMES)
        eps = torch.full((BATCH, FRAMES), size).double()
        check_bounds(graph, inputs(), eps, all_rows(), threat)
        single = Perturbation(inputs().float(), eps.float(), norm=threat.norm, ball=threat.ball)
        for method in METHODS:
            bounds = BoundPass(unroll(gated(cell, gain=gain), FRAMES, torch.float32), single, method)
            assert bounds.margin(all_rows().float()).isfinite().all()


def test_no_attack_inside_a_certified_radius():
    for name, threat in itertools.product(("lstm", "gru"), (Threat(2.0), Threat(INF), Threat(1.0, "sequence"))):
        model, x = net(name), inputs()
        labels = model(x).argmax(dim=1)
        options = {"norm": threat.norm, "ball": threat.ball}
        radius = search_radius(margin_problem(model, x, labels, **options), tol=1e-2).radius
        assert (radius > 0).all()
        rows = margin_rows(labels, CLASSES).double()
        eps = radius[:, None].expand(-1, FRAMES)
        assert (lowest_margins(unroll(model, FRAMES), x, eps, rows, threat) > 0).all()


def broken_product(monkeypatch, name: str, low: float, high: float) -> None:
    """Move the planes of a product by these amounts."""

    def relax(product, *arguments, **options):
        lower, upper = relax_product(product, *arguments, **options)
        if product != name:
            return Relaxation(lower, upper)
        return Relaxation(Plane(lower.slopes, lower.intercept + low), Plane(upper.slopes, upper.intercept + high))

    monkeypatch.setattr("utils.graph.nonlinear.relax_product", relax)


@pytest.mark.parametrize(("low", "high"), [(0.02, 0.0), (0.0, -0.02)])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("cell", CELLS)
def test_the_check_catches_broken_planes(cell, product, low, high, monkeypatch):
    # Without c_0 and h_0, the kept part of the first step would be exact.
    graph = unroll(gated(cell, state=True), FRAMES)
    arguments = (graph, inputs(), torch.full((BATCH, FRAMES), 0.01).double(), all_rows(), Threat(2.0))
    check_bounds(*arguments)
    broken_product(monkeypatch, product, low, high)
    with pytest.raises(AssertionError, match="bound"):
        check_bounds(*arguments)


def test_the_check_catches_an_upper_plane_that_is_not_mirrored(monkeypatch):

    def relax(*arguments, **options):
        lower, (slopes, intercept) = relax_product(*arguments, **options)
        return Relaxation(lower, Plane((slopes[0], -slopes[1]), intercept))

    monkeypatch.setattr("utils.graph.nonlinear.relax_product", relax)
    for cell in CELLS:
        graph = unroll(gated(cell), FRAMES)
        with pytest.raises(AssertionError, match="bound"):
            check_bounds(graph, inputs(), torch.full((BATCH, FRAMES), 0.3).double(), all_rows(), Threat(2.0))


# --- exact cases and relations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_no_perturbation_gives_the_forward_pass(name, method):
    model, x, rows = net(name), inputs(), all_rows()
    expected = (rows @ model(x)[..., None]).squeeze(-1)
    for eps in (0.0, 1e-12):
        perturbation = Perturbation(x, torch.full((BATCH, FRAMES), eps).double())
        margin = BoundPass(unroll(model, FRAMES), perturbation, method).margin(rows)
        torch.testing.assert_close(margin, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
def test_margins_fall_with_eps_and_are_at_least_those_of_intervals(cell):
    graph, x, rows = unroll(gated(cell), FRAMES), inputs(), all_rows()
    before = torch.full((BATCH, 2), INF).double()
    for size in (0.01, 0.1, 0.5, 1.0):
        perturbation = Perturbation(x, torch.full((BATCH, FRAMES), size).double())
        margins = {method: BoundPass(graph, perturbation, method).margin(rows) for method in METHODS}
        check_below(margins["ibp"], margins["crown"])
        check_below(margins["ibp"], margins["crown-ibp"])
        check_below(margins["ibp"], before)
        before = margins["ibp"]


@pytest.mark.parametrize("name", NETS)
def test_a_batch_is_its_samples_and_nothing_is_kept(name):
    model, x, rows = net(name), inputs(), all_rows()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    graph = unroll(model, FRAMES)
    eps = torch.tensor([[0.1], [0.5], [0.0]]).double() * MASKS["all"]
    for method, threat in itertools.product(METHODS, (Threat(2.0), Threat(INF, clip=(-1.0, 1.0)))):
        together = BoundPass(graph, threat.around(x, eps), method).margin(rows)
        assert torch.equal(together, BoundPass(graph, threat.around(x, eps), method).margin(rows))
        for i in range(BATCH):
            alone = BoundPass(graph, threat.around(x[i : i + 1], eps[i : i + 1]), method).margin(rows[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("relaxation", ["plane", "line", "constant"])
@pytest.mark.parametrize("cell", CELLS)
def test_float32_is_near_float64(cell, relaxation):
    model, x, rows = gated(cell), inputs(), all_rows()
    for threat in THREATS:
        eps = torch.full((BATCH, FRAMES), 0.1)
        double = BoundPass(unroll(model, FRAMES, None, relaxation), threat.around(x, eps.double())).margin(rows)
        graph = unroll(model, FRAMES, torch.float32, relaxation)
        estimate, single = (
            BoundPass(graph, threat.around(x.float(), eps), sound=sound).margin(rows.float()).double()
            for sound in (False, True)
        )
        torch.testing.assert_close(estimate, double, rtol=1e-3, atol=1e-3)
        # What is taken off for rounding is more than rounding does, and little all the same.
        assert (single <= double + 1e-6).all() and (single >= double - 2e-2 * (1.0 + double.abs())).all()


def test_planes_beat_lines_and_lines_beat_constants_on_average():
    for cell in CELLS:
        model, x = gated(cell), inputs(batch=8)
        labels = model(x).argmax(dim=1)
        plane, line, constant = (
            certified_radius(model, x, labels, relaxation=name, tol=1e-2).mean()
            for name in ("plane", "line", "constant")
        )
        assert plane > line > constant > 0


# --- lengths --------------------------------------------------------------------------------------------------------


def padded(frames: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of different lengths, and the same ones with garbage after their ends."""
    x = inputs(frames=frames)
    after = torch.arange(frames) >= LENGTHS[:, None]
    return x.masked_fill(after[..., None], 0.0), torch.where(after[..., None], 1e3 * normal(*x.shape, seed=5), x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name == "deep bidirectional lstm" else name for name in NETS]
)
def test_what_comes_after_the_end_does_not_count(name, method):
    model, (x, garbage) = net(name), padded()
    assert torch.equal(
        unroll(model, 4, lengths=LENGTHS).evaluate(x), unroll(model, 4, lengths=LENGTHS).evaluate(garbage)
    )
    labels = torch.arange(BATCH) % CLASSES
    for threat in THREATS:
        options = {"norm": threat.norm, "ball": threat.ball, "clip": threat.clip, "method": method}
        clean = certified_margin(model, x, labels, 0.1, lengths=LENGTHS, **options)
        assert torch.equal(clean, certified_margin(model, garbage, labels, 0.1, lengths=LENGTHS, **options))
        for i, length in enumerate(LENGTHS.tolist()):
            alone = certified_margin(model, x[i : i + 1, :length], labels[i : i + 1], 0.1, **options)
            # A GRU's last state is bounded by rows if a later step needs it, which may gain on its interval.
            loose = 2e-3 if name == "deep gru" and method == "crown" else 1e-10
            torch.testing.assert_close(clean[i : i + 1], alone, rtol=loose, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_bounds_of_every_node_hold_with_lengths(name):
    graph, (x, _) = unroll(net(name), 4, lengths=LENGTHS), padded()
    valid = torch.arange(4) < LENGTHS[:, None]
    eps = torch.tensor([[0.05], [0.2], [0.5]]).double() * valid
    check_bounds(graph, x, eps, all_rows(), Threat(2.0))


def test_radii_of_a_batch_of_lengths_are_those_of_its_samples():
    for name in ("lstm", "bidirectional gru, mean"):
        model, (x, garbage) = net(name), padded()
        labels = model(x, LENGTHS).argmax(dim=1)
        radius = certified_radius(model, garbage, labels, lengths=LENGTHS, tol=1e-4)
        for i, length in enumerate(LENGTHS.tolist()):
            alone = certified_radius(model, x[i : i + 1, :length], labels[i : i + 1], tol=1e-4)
            torch.testing.assert_close(radius[i : i + 1], alone, rtol=1e-3, atol=0)


def test_the_check_catches_padding_that_counts():
    """The same bounds with the lengths forgotten."""
    model, (_, garbage) = net("lstm"), padded()
    labels = torch.arange(BATCH) % CLASSES
    right = certified_margin(model, garbage, labels, 0.1, lengths=LENGTHS)
    assert not torch.allclose(right, certified_margin(model, garbage, labels, 0.1), atol=1e-3)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell", CELLS)
def test_margins_are_differentiable(cell, method):
    """Against finite differences, roughly: contact points that slopes depend on are found only roughly."""
    model = gated(cell, layers=2, hidden=2).requires_grad_(True)
    x, labels = inputs().requires_grad_(), torch.arange(BATCH) % CLASSES
    leaves = [x, *model.parameters()]

    def loss() -> torch.Tensor:
        return certified_margin(model, x, labels, 0.05, method=method).sum()

    gradients = torch.autograd.grad(loss(), leaves)
    for number, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        assert gradient.isfinite().all()
        direction = normal(*leaf.shape, seed=number)
        values = []
        for step in (1e-6, -2e-6):
            leaf.data += step * direction
            values.append(loss().item())
        leaf.data += 1e-6 * direction
        numeric = (values[0] - values[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=3e-2, abs=2e-2)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_finite_where_samples_are_exact_or_saturated(cell, relaxation):
    for gain, eps in ((1.0, [0.0, 0.3, 1e-9]), (50.0, [0.1, 1.0, 100.0])):
        for dtype in (torch.float64, torch.float32):
            if relaxation == "volume" and dtype == torch.float64:
                continue  # slow
            model = gated(cell, gain=gain, state=True, dtype=dtype, hidden=2).requires_grad_(True)
            labels = torch.arange(BATCH)
            options = {"norm": 2, "relaxation": relaxation}
            margin = certified_margin(model, inputs(frames=2).to(dtype), labels, torch.tensor(eps), **options)
            for gradient in torch.autograd.grad(margin.sum(), list(model.parameters())):
                assert gradient.isfinite().all()


def test_every_node_is_checked():
    """``check_intervals`` sees all nodes of a gated graph: products, sums, slices and negations."""
    graph = unroll(net("gru"), FRAMES)
    kinds = {type(node).__name__ for node in graph.nodes if not isinstance(node, Frame)}
    assert kinds == {"Linear", "Slice", "Negative", "Product", "GateSum", "WeightedSum", "Constant"}
    assert len(node_values(graph, inputs())) == len(graph.nodes)
