"""Bounds of whole networks: sound for every method, threat model and mask, and equal to closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    THREATS,
    Threat,
    check_below,
    check_intervals,
    classifier,
    dense,
    framed,
    lowest_margins,
    margins_of,
    normal,
    random_points,
)
from torch import nn

from utils.bounds.passes import METHODS, BoundPass
from utils.certify import certified_margin
from utils.graph import Constant, Linear, Slice, WeightedSum
from utils.graph.graph import Graph
from utils.graph.nonlinear import Activation
from utils.network.models import SequenceClassifier
from utils.network.unroll import unroll
from utils.perturbation.lp_ball import INF, dual_norm
from utils.perturbation.sets import Perturbation
from utils.question import margin_rows
from utils.relaxation.lines import ACTIVATIONS, Plane, Relaxation

BATCH, FRAMES, SIZE, CLASSES = 3, 3, 3, 3
NETS = {
    "tanh": {},
    "relu": {"activation": "relu"},
    "two layers, mean": {"layers": 2, "pooling": "mean"},
    "bidirectional relu, normalised": {
        "activation": "relu",
        "bidirectional": True,
        "mean": 0.2,
        "std": torch.tensor([0.5, 1.0, 2.0]),
    },
    "deep bidirectional": {"layers": 2, "bidirectional": True, "hidden": 3},
}
MASKS = {
    "all": torch.ones(BATCH, FRAMES, dtype=torch.bool),
    "last": torch.tensor([[False, False, True]]).expand(BATCH, -1),
    "first": torch.tensor([[True, False, False]]).expand(BATCH, -1),
    "mixed": torch.tensor([[True, False, True], [False, False, False], [False, True, True]]),
}


def inputs(seed: int = 50, batch: int = BATCH, frames: int = FRAMES, size: int = SIZE) -> torch.Tensor:
    return (0.5 * normal(batch, frames, size, seed=seed)).clamp(-1.0, 1.0)


def all_rows(batch: int = BATCH, classes: int = CLASSES) -> torch.Tensor:
    return margin_rows(torch.arange(batch) % classes, classes).double()


def check_bounds(graph: Graph, x, eps, rows, threat: Threat, methods=METHODS, seed=0) -> None:
    """Fail unless margins and intervals hold at corners, boundary points, inside and where an attack leads."""
    found = lowest_margins(graph, x, eps, rows, threat, seed)
    points = random_points(x, eps, threat, 8, seed + 1)
    for method in methods:
        bounds = BoundPass(graph, threat.around(x, eps), method)
        margin = bounds.margin(rows)
        assert margin.isfinite().all()
        check_below(margin, found, f"{method} margin")
        check_intervals(bounds, points)


# --- the graph is the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_graph_computes_the_model(layers, bidirectional, activation):
    x = inputs(frames=4)
    directions = layers * (2 if bidirectional else 1)
    choices = itertools.product(
        (True, False),
        ("last", "mean"),
        ((0.0, 1.0), (0.3, 0.5), (normal(SIZE, seed=1), 0.5 + normal(SIZE, seed=2).abs())),
        (None, normal(directions, 4, seed=3)),
    )
    for bias, pooling, (mean, std), state in choices:
        model = classifier(
            layers=layers,
            bidirectional=bidirectional,
            activation=activation,
            bias=bias,
            pooling=pooling,
            mean=mean,
            std=std,
            state=state,
        )
        for frames in (1, 4):
            values = unroll(model, frames).evaluate(x[:, :frames])
            torch.testing.assert_close(values, model(x[:, :frames]), rtol=1e-12, atol=1e-12)


# --- soundness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("net", NETS)
def test_no_point_of_the_set_is_below_the_bounds(net, threat, mask):
    graph = unroll(classifier(**NETS[net]), FRAMES)
    x, rows = inputs(), all_rows()
    eps = torch.tensor([[0.15], [0.4], [0.8]]).double() * MASKS[mask]
    check_bounds(graph, x, eps, rows, threat)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_tiny_and_saturating_weights(activation, threat):
    for gain, size in ((1e-3, 0.5), (50.0, 1e-3), (50.0, 0.5), (1.0, 1e3), (1e4, 1.0)):
        graph = unroll(classifier(activation=activation, gain=gain), FRAMES)
        eps = torch.full((BATCH, FRAMES), size).double()
        check_bounds(graph, inputs(), eps, all_rows(), threat, seed=4)


@pytest.mark.parametrize("ball", ["frame", "sequence"])
def test_one_eps_a_frame(ball):
    graph = unroll(classifier(), FRAMES)
    eps = torch.tensor([[0.1, 0.5, 0.0], [0.3, 0.0, 0.2], [0.0, 0.0, 1.0]]).double()
    if ball == "sequence":
        eps = eps.amax(dim=1, keepdim=True) * (eps > 0)
    for norm in (1.0, 2.0, INF):
        check_bounds(graph, inputs(), eps, all_rows(), Threat(norm, ball))


def with_errors(name: str, low: float, high: float, monkeypatch) -> None:
    """Move the lines of an activation by these amounts."""
    good = ACTIVATIONS[name]

    def relax(l, u, slopes=None):  # noqa: E741
        lower, upper = good.relax(l, u, slopes)
        return Relaxation(Plane(lower.slopes, lower.intercept + low), Plane(upper.slopes, upper.intercept + high))

    monkeypatch.setitem(ACTIVATIONS, name, good._replace(relax=relax))


@pytest.mark.parametrize(("low", "high"), [(0.02, 0.0), (0.0, -0.02), (0.02, -0.02)])
@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_the_check_catches_a_broken_relaxation(name, low, high, monkeypatch):
    graph = unroll(classifier(activation=name), FRAMES)
    arguments = (graph, inputs(), torch.full((BATCH, FRAMES), 0.02).double(), all_rows(), Threat(2.0))
    check_bounds(*arguments)
    with_errors(name, low, high, monkeypatch)
    with pytest.raises(AssertionError, match="bound"):
        check_bounds(*arguments)


def test_the_check_catches_a_forgotten_slope(monkeypatch):
    """The tangent at the middle, for both lines, is no bound: the classic mistake."""

    def relax(l, u, slopes=None):  # noqa: E741
        middle = 0.5 * (l + u)
        slope = 1 - middle.tanh() ** 2
        line = Plane((slope,), middle.tanh() - slope * middle)
        return Relaxation(line, line)

    monkeypatch.setitem(ACTIVATIONS, "tanh", ACTIVATIONS["tanh"]._replace(relax=relax))
    graph = unroll(classifier(), FRAMES)
    with pytest.raises(AssertionError, match="bound"):
        check_bounds(graph, inputs(), torch.full((BATCH, FRAMES), 0.5).double(), all_rows(), Threat(2.0))


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_the_check_catches_the_wrong_norm(norm, monkeypatch):
    """A dual norm taken for the norm itself: too small for p = 1 and inf; a factor too small for p = 2."""
    wrong = {1.0: lambda a, p: 0.99 * dual_norm(a, p), 2.0: lambda a, p: 0.99 * dual_norm(a, p), INF: _euclidean}
    monkeypatch.setattr("utils.perturbation.sets.dual_norm", wrong[norm])
    graph = unroll(classifier(gain=0.3), FRAMES)
    with pytest.raises(AssertionError, match="bound"):
        check_bounds(graph, inputs(), torch.full((BATCH, FRAMES), 0.05).double(), all_rows(), Threat(norm))


def _euclidean(coefficients, norm):
    return coefficients.norm(dim=-1)


# --- exact cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("net", NETS)
def test_no_perturbation_gives_the_forward_pass(net, threat, method):
    model, x, rows = classifier(**NETS[net]), inputs(), all_rows()
    graph = unroll(model, FRAMES)
    exact = (rows @ model(x)[..., None]).squeeze(-1)
    for eps in (torch.zeros(BATCH, FRAMES), torch.tensor([[0.0], [0.3], [0.0]]).expand(BATCH, FRAMES)):
        margin = BoundPass(graph, threat.around(x, eps.double()), method).margin(rows)
        same = (eps == 0).all(dim=1)
        assert (margin[same] <= exact[same] + 1e-12).all()
        torch.testing.assert_close(margin[same], exact[same], rtol=1e-12, atol=1e-10)  # less for rounding


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_linear_regime_gives_the_closed_form(threat, method):
    """One frame and a relu net whose units are all active, or all but one dead: the margin is linear in the input."""
    model = classifier(activation="relu")
    for bias in (torch.full((4,), 20.0), torch.tensor([-20.0, -20.0, 20.0, -20.0])):
        model.rnn.bias_ih_l0.data = bias.double()
        model.rnn.bias_hh_l0.data.zero_()
        x, rows = inputs(frames=1), all_rows()
        eps = torch.tensor([[0.1], [0.5], [1.0]]).double()
        gate = (bias > 0).double()
        slope = rows @ (model.head.weight * gate) @ model.rnn.weight_ih_l0
        perturbation = threat.around(x, eps)
        exact = margins_of(unroll(model, 1), perturbation.center(0)[:, None], rows)
        exact = exact - perturbation.frame_deviation(0, slope)
        margin = BoundPass(unroll(model, 1), perturbation, method).margin(rows)
        if method == "ibp":  # an interval for every unit: exact only if one of them is left
            check_below(margin, exact)
            if gate.sum() > 1:
                continue
        torch.testing.assert_close(margin, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_one_tanh_unit_gives_the_exact_minimum(norm):
    """With one hidden unit and one frame the least margin is at an end of the unit's interval."""
    model = classifier(hidden=1)
    x, rows = inputs(frames=1), all_rows()
    eps = torch.tensor([[0.1], [0.5], [1.0]]).double()
    z = unroll(model, 1).nodes[-3]
    reach = eps * dual_norm(model.rnn.weight_ih_l0, norm)
    center = x[:, 0] @ model.rnn.weight_ih_l0.T + model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0
    assert z.size == 1
    ends = torch.stack([model.head((center + sign * reach).tanh()) for sign in (-1, 1)])
    exact = (rows @ ends[..., None]).squeeze(-1).amin(dim=0)
    for method in METHODS:
        margin = BoundPass(unroll(model, 1), Perturbation(x, eps, norm=norm), method).margin(rows)
        torch.testing.assert_close(margin, exact, rtol=1e-12, atol=1e-12)


# --- relations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_intervals_shrink_with_eps_and_margins_are_at_least_theirs(net):
    graph, x, rows = unroll(classifier(**NETS[net]), FRAMES), inputs(), all_rows()
    before = None
    for size in (1.0, 0.5, 0.1, 0.01):
        for norm in (1.0, 2.0, INF):
            perturbation = Perturbation(x, torch.full((BATCH, FRAMES), size).double(), norm=norm)
            margins = {method: BoundPass(graph, perturbation, method).margin(rows) for method in METHODS}
            check_below(margins["ibp"], margins["crown"])
            check_below(margins["ibp"], margins["crown-ibp"])
        if before is not None:
            check_below(before, margins["ibp"])
        before = margins["ibp"]


def test_smaller_sets_have_larger_interval_bounds():
    """l_1 within l_2 within l_inf, one common ball within a ball a frame, a cut box within a box."""
    graph, x, rows = unroll(classifier(), FRAMES), inputs(), all_rows()
    eps = torch.full((BATCH, FRAMES), 0.4).double()
    margins = [BoundPass(graph, threat.around(x, eps), "ibp").margin(rows) for threat in THREATS]
    one, _, two, _, box, _, cut = margins
    for larger, smaller in ((box, two), (two, one), (box, cut)):
        check_below(larger, smaller)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_batch_is_its_samples_and_nothing_is_kept(threat):
    model = classifier(layers=2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    graph, x, rows = unroll(model, FRAMES), inputs(), all_rows()
    eps = torch.tensor([[0.1], [0.5], [0.0]]).double() * MASKS["all"]
    for method in METHODS:
        bounds = BoundPass(graph, threat.around(x, eps), method)
        together = bounds.margin(rows)
        assert torch.equal(together, bounds.margin(rows))
        assert torch.equal(together, BoundPass(graph, threat.around(x, eps), method).margin(rows))
        for i in range(BATCH):
            alone = BoundPass(graph, threat.around(x[i : i + 1], eps[i : i + 1]), method).margin(rows[i : i + 1])
            # Less of what is taken off for rounding where a sample by itself is known not to move.
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("net", NETS)
def test_float32_is_near_float64(net):
    model, x, rows = classifier(**NETS[net]), inputs(), all_rows()
    for threat in THREATS:
        eps = torch.full((BATCH, FRAMES), 0.3)
        wide, narrow = (unroll(model, FRAMES), threat.around(x, eps.double())), unroll(model, FRAMES, torch.float32)
        double = BoundPass(*wide, "crown").margin(rows)
        estimate, single = (
            BoundPass(narrow, threat.around(x.float(), eps), "crown", sound=sound).margin(rows.float()).double()
            for sound in (False, True)
        )
        torch.testing.assert_close(estimate, double, rtol=1e-4, atol=1e-4)
        # What is taken off for rounding is more than rounding does, and little all the same.
        assert (single <= double).all() and (single >= double - 5e-3 * (1.0 + double.abs())).all()


def test_the_interface_gives_the_same_margins():
    model, x = classifier(), inputs()
    labels = torch.arange(BATCH) % CLASSES
    graph = unroll(model, FRAMES)
    for threat in THREATS:
        mask = MASKS["mixed"]
        eps = torch.tensor([0.1, 0.2, 0.3]).double()
        expected = BoundPass(graph, threat.around(x, eps[:, None] * mask)).margin(all_rows())
        options = {"norm": threat.norm, "ball": threat.ball, "clip": threat.clip, "frames": mask}
        torch.testing.assert_close(certified_margin(model, x, labels, eps, **options), expected)
        targets = (labels + 1) % CLASSES
        targeted = certified_margin(model, x, labels, eps, targets=targets, **options)
        others = [[c for c in range(CLASSES) if c != label].index(t) for label, t in zip(labels, targets, strict=True)]
        torch.testing.assert_close(targeted, expected[torch.arange(BATCH), others][:, None])


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_margins_are_differentiable(activation, method):
    model = classifier(activation=activation).requires_grad_(True)
    x, labels = inputs().requires_grad_(), torch.arange(BATCH) % CLASSES
    leaves = [x, *model.parameters()]

    def loss() -> torch.Tensor:
        return certified_margin(model, x, labels, 0.3, norm=2, method=method).sum()

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
        assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-3, abs=1e-5)


def test_gradients_are_finite_where_samples_are_exact_or_saturated():
    for gain, eps in ((1.0, torch.tensor([0.0, 0.3, 1e-9])), (1e4, torch.tensor([0.1, 1.0, 100.0]))):
        model = classifier(gain=gain).requires_grad_(True)
        for norm in (1, 2, INF):
            margin = certified_margin(model, inputs(), torch.arange(BATCH), eps.double(), norm=norm)
            for gradient in torch.autograd.grad(margin.sum(), list(model.parameters())):
                assert gradient.isfinite().all()


# --- graphs made by hand --------------------------------------------------------------------------------------------


def mlp() -> Graph:
    graph = Graph()
    frames = framed(graph, 2)
    h = graph.add(Activation(dense(graph, 5, *frames, seed=1), "relu"))
    h = graph.add(Activation(dense(graph, 4, h, seed=2), "sigmoid"))
    dense(graph, CLASSES, h, seed=3)
    return graph


def residual() -> Graph:
    """Additions with factors, of numbers, vectors and one value a sample; the output is no Linear node."""
    graph = Graph()
    (frame,) = framed(graph, 1)
    z = dense(graph, 4, frame, seed=1)
    h = graph.add(Activation(z, "tanh"))
    factors = (1.0, -0.7, normal(4, seed=2), normal(BATCH, 1, seed=3))
    s = graph.add(WeightedSum((h, z, h, z), factors))
    h = graph.add(Activation(s, "relu"))
    h = graph.add(WeightedSum((h, s), (normal(BATCH, 4, seed=4), 0.5)))
    out = dense(graph, CLASSES, h, seed=5)
    constant = graph.add(Constant(normal(BATCH, CLASSES, seed=6)))
    graph.add(WeightedSum((out, constant, out), (1.0, 2.0, -0.3)))
    return graph


def sliced(*starts: int) -> Graph:
    """Parts of a stacked Linear: side by side, overlapping, with gaps, out of order."""
    graph = Graph()
    gates = dense(graph, 6, *framed(graph, 2), seed=1)
    parts = [graph.add(Activation(graph.add(Slice(gates, start, 2)), "tanh")) for start in starts]
    h = graph.add(WeightedSum(tuple(parts), tuple(range(1, len(parts) + 1))))
    dense(graph, CLASSES, h, seed=2)
    return graph


def sliced_and_whole() -> Graph:
    """A slice of a slice, beside the whole that it is taken of."""
    graph = Graph()
    gates = dense(graph, 6, *framed(graph, 2), seed=1)
    inner = graph.add(Slice(graph.add(Slice(gates, 1, 4)), 1, 2))
    dense(graph, CLASSES, graph.add(Activation(inner, "sigmoid")), gates, seed=2)
    return graph


def with_constants() -> Graph:
    """Exact nodes in every place: shared and per-sample constants, and functions of them."""
    graph = Graph()
    (frame,) = framed(graph, 1)
    shared, own = graph.add(Constant(normal(4, seed=1))), graph.add(Constant(normal(BATCH, 4, seed=2)))
    state = graph.add(Activation(graph.add(WeightedSum((shared, own), (1.0, -2.0))), "tanh"))
    z = dense(graph, 4, frame, state, own, shared, seed=3)
    h = graph.add(WeightedSum((graph.add(Activation(z, "relu")), state, shared), (1.0, 0.5, normal(BATCH, 4, seed=7))))
    dense(graph, CLASSES, graph.add(Activation(h, "sigmoid")), state, seed=4)
    return graph


HAND_MADE = {
    "mlp": mlp,
    "residual": residual,
    "slices that tile": lambda: sliced(0, 2, 4),
    "slices out of order": lambda: sliced(4, 0, 2),
    "slices with a gap": lambda: sliced(0, 4),
    "slices that overlap": lambda: sliced(0, 1, 4),
    "the same slice twice": lambda: sliced(2, 2),
    "a slice of a slice and the whole": sliced_and_whole,
    "constants": with_constants,
}


@pytest.mark.parametrize("kind", HAND_MADE)
def test_graphs_made_by_hand(kind):
    graph = HAND_MADE[kind]()
    frames = len(graph.frames)
    x = inputs(frames=frames)
    for norm in (1.0, 2.0, INF):
        eps = torch.tensor([[0.0], [0.2], [0.6]]).double().expand(BATCH, frames)
        for mask in {(True,) * frames, (True,) + (False,) * (frames - 1)}:
            check_bounds(graph, x, eps * torch.tensor(mask), all_rows(), Threat(norm))


def test_a_graph_refuses_what_it_cannot_bound():
    graph = Graph()
    (frame,) = framed(graph, 1)
    with pytest.raises(ValueError, match="must enter through a Linear node"):
        graph.add(Activation(frame, "tanh"))
    with pytest.raises(ValueError, match="before it"):
        graph.add(Activation(Constant(torch.zeros(3)), "tanh"))
    with pytest.raises(ValueError, match="before it"):
        Graph().add(Linear((frame,), (torch.zeros(2, 3),), torch.zeros(2)))


def test_unknown_method():
    with pytest.raises(ValueError, match="method must be one of"):
        BoundPass(unroll(classifier(), 1), Perturbation(inputs(frames=1), torch.zeros(BATCH, 1).double()), "fast")


def test_a_stock_model_in_single_precision():
    torch.manual_seed(0)
    rnn, head = nn.RNN(SIZE, 8, batch_first=True), nn.Linear(8, CLASSES)
    model, x = SequenceClassifier(rnn, head), inputs().float()
    margin = certified_margin(model, x, torch.arange(BATCH), 0.1)
    assert margin.shape == (BATCH, CLASSES - 1) and margin.dtype == torch.float32
    assert certified_margin(model, x, torch.arange(BATCH), 0.1, dtype=torch.float64).dtype == torch.float64
