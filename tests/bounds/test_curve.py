"""Curved bounds: sound on dense grids and over whole networks, never less tight than what comes before them."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from helpers import THREATS, Threat, node_values, random_points, steepest
from test_alpha import CELLS, network, sampled_margins, sequences
from torch import nn

from utils.attack.pgd import pgd
from utils.bounds import curve
from utils.bounds.curve import CurvedPass
from utils.bounds.curve_tuning import tune_curves
from utils.bounds.squares import quadratic
from utils.certify import certified_margin, certified_radius, margin_problem, search_radius
from utils.clock import Pace
from utils.graph.nodes import Constant
from utils.graph.nonlinear import Activation, Product
from utils.network.unroll import unroll
from utils.perturbation.lp_ball import INF
from utils.perturbation.sets import Perturbation
from utils.question import margin_rows
from utils.relaxation.curves import Curves, curved_relaxation


def random_box(count: int, seed: int, width: float):
    generator = torch.Generator().manual_seed(seed)
    center = 3.0 * torch.randn(count, generator=generator, dtype=torch.float64)
    reach = width * torch.rand(count, generator=generator, dtype=torch.float64)
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    return center, (center - share * reach, center + (1.0 - share) * reach)


def random_curves(operands: int, count: int, seed: int) -> Curves:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        return tuple(scale * torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(operands))

    return Curves(draw(0.7), draw(0.7), *(tuple(q.abs() for q in draw(0.6)) for _ in range(2)))


def violation(node, centers, box, curves, relaxation, points: int = 161) -> float:
    """Most that the function leaves its curved bounds by, over a dense grid of every box."""
    shares = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
    axes = [low[:, None] + (high - low)[:, None] * shares for low, high in box]
    if len(axes) == 2:
        axes = [axes[0][:, :, None], axes[1][:, None, :]]

    def wide(tensor):
        return tensor.reshape(-1, *[1] * (axes[0].dim() - 1))

    below, above = wide(relaxation.lower.intercept), wide(relaxation.upper.intercept)
    for axis, center, *own in zip(axes, centers, *curves, strict=True):
        low, high, bend_low, bend_high = (wide(one) for one in own)
        square = 0.5 * (axis - wide(center)) ** 2
        below, above = below + low * axis - bend_low * square, above + high * axis + bend_high * square
    value = node.value(*axes)
    return max(float((below - value).max()), float((value - above).max()))


KINKED = ("relu", "leaky_relu(0.2)", "hardtanh", "hardtanh(0,6)")


def nodes():
    x, y = Constant(torch.zeros(1)), Constant(torch.zeros(1))
    return [
        Activation(x, "tanh"),
        Activation(x, "sigmoid"),
        Product(x, y, "x*sigmoid(y)", "plane"),
        Product(x, y, "tanh(x)*sigmoid(y)", "plane"),
        *(Activation(x, name) for name in KINKED),
    ]


@pytest.mark.parametrize("node", nodes(), ids=lambda node: node.name)
@pytest.mark.parametrize("width", [0.0, 1e-6, 0.3, 2.0, 20.0, 1e3])
def test_curved_bounds_hold_on_a_dense_grid(node, width):
    count, operands = 150, len(node.parents)
    centers, box = zip(*(random_box(count, seed, width) for seed in range(operands)), strict=True)
    for curves in (random_curves(operands, count, 7), node.curved.tangent(centers, box)):
        relaxation = curved_relaxation(node.curved, centers, box, curves)
        room = 1e-13 * width if node.name in KINKED else 0.0  # exact intercepts; the grid's own sums round
        assert violation(node, centers, box, curves, relaxation) <= room


@pytest.mark.parametrize("node", nodes(), ids=lambda node: node.name)
def test_the_grid_test_catches_an_intercept_of_grid_points_alone(node):
    count, operands = 150, len(node.parents)
    centers, box = zip(*(random_box(count, seed, 4.0) for seed in range(operands)), strict=True)
    curves = random_curves(operands, count, 7)
    relaxation = curved_relaxation(node.curved, centers, box, curves)
    raised = relaxation.lower._replace(intercept=relaxation.lower.intercept + 0.02)
    assert violation(node, centers, box, curves, relaxation._replace(lower=raised)) > 0.0


@pytest.mark.parametrize("node", [node for node in nodes() if node.curved.smooth], ids=lambda node: node.name)
def test_tangents_touch_at_the_centre(node):
    """The curvatures of the tangent lose next to nothing at the centre, the point of having them."""
    count, operands = 150, len(node.parents)
    centers, box = zip(*(random_box(count, seed, 1.0) for seed in range(operands)), strict=True)
    curves = node.curved.tangent(centers, box)
    lower, upper = curved_relaxation(node.curved, centers, box, curves)
    height = lower.intercept + sum(a * z for a, z in zip(curves.lower_slopes, centers, strict=True))
    top = upper.intercept + sum(a * z for a, z in zip(curves.upper_slopes, centers, strict=True))
    value = node.value(*centers)
    assert float((value - height).max()) < 0.02
    assert float((top - value).max()) < 0.02


SETS = [
    {"norm": 1.0},
    {"norm": 2.0},
    {"norm": INF},
    {"norm": INF, "clip": (-4.0, 4.0)},
    {"norm": 2.0, "ball": "sequence"},
    {"norm": 1.0, "ball": "sequence"},
]


@pytest.mark.parametrize("threat", SETS, ids=str)
def test_joint_bound_is_above_every_point_of_the_set(threat):
    """What the neurons lose together at points of the boundary and corners is never more than the bound says."""
    model = network(nn.LSTM)
    x, _ = sequences(model)
    graph = unroll(model, x.shape[1], torch.float64).detach()
    eps = torch.full(x.shape[:2], 0.2, dtype=torch.float64)
    bounds = CurvedPass(graph, Perturbation(x, eps, **threat))
    operands = [node for node in bounds._linear if bounds._linear[node][0].abs().sum() > 0]
    jacobian = torch.cat([bounds._linear[node][0] for node in operands], dim=1)
    weights = torch.rand(len(x), 6, jacobian.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lines = [5.0 * torch.randn(len(x), 6, n, dtype=torch.float64) for n in map(bounds._width, graph.frames)]
    deviation = bounds._deviation(lines)
    bound = bounds._joint_linear(weights, jacobian, None, bounds._frames)
    beside = bounds._joint_linear(weights, jacobian, lines, bounds._frames)
    if threat["norm"] != 1.0:
        assert float((beside / bound).min()) < 0.9  # the point of bounding both together
    generator = torch.Generator().manual_seed(1)
    for number in range(400):
        move = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if threat["norm"] == INF:
            move = move.sign()
        elif threat["norm"] == 1.0 and number % 2:
            move = nn.functional.one_hot(move.abs().argmax(-1), x.shape[2]) * move.sign()
        own = move if threat.get("ball") != "sequence" else move.flatten(1)[:, None]
        size = torch.linalg.vector_norm(own, ord=threat["norm"], dim=-1)
        move = 0.2 * move / (size[..., None] if size.shape[1] > 1 else size[..., None])
        if bounds.perturbation.norm == 2.0:  # in the basis of what the network looks at
            weight = graph.frames[0].child_weights[0]
            basis = (
                torch.linalg.qr(weight.T)[0] if bounds._width(graph.frames[0]) < x.shape[2] else torch.eye(x.shape[2])
            )
            move = move @ basis.to(move.dtype)
        d = (jacobian @ move.flatten(1)[..., None]).squeeze(-1)
        squares = (weights * d[:, None] ** 2).sum(-1)
        assert (squares <= bound * (1 + 1e-9)).all()
        line = (torch.cat(lines, dim=-1) @ move.flatten(1)[..., None]).squeeze(-1).abs()
        assert (line + squares <= (deviation + beside) * (1 + 1e-9)).all()


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM])
@pytest.mark.parametrize("threat", [one for one in THREATS if one.clip is None], ids=str)
def test_joint_loss_is_above_what_linear_parts_and_remainders_reach(cell, threat):
    """Rows of one neuron, of some and of all; of every operand in two parts, as two nodes may have it."""
    model = network(cell)
    x, _ = sequences(model)
    eps = torch.full(x.shape[:2], 0.3, dtype=torch.float64)
    bounds = CurvedPass(unroll(model, x.shape[1], torch.float64).detach(), threat.around(x, eps))
    nodes = list(bounds._linear)
    known = [torch.cat(parts, dim=1) for parts in zip(*map(bounds._operand, nodes), strict=True)]
    jacobian, _, remainder, center = known
    low, high = (torch.cat(ends, dim=1) for ends in zip(*map(bounds.interval, nodes), strict=True))
    size = jacobian.shape[1]
    some = torch.rand(9, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = torch.cat((torch.eye(size, dtype=torch.float64), some, some**8, torch.ones_like(some[:1])))
    weights = weights.expand(len(x), -1, -1)
    parts = list(zip(nodes, weights.split([node.size for node in nodes], dim=-1), strict=True))
    bound = bounds._joint_loss([(node, share * w) for share in (0.7, 0.3) for node, w in parts])
    reach = torch.maximum(high - center, center - low)
    for row in range(weights.shape[1]):
        delta = random_points(torch.zeros_like(x), eps, threat, 1, seed=row)[0]
        for _ in range(8):
            linear = (jacobian @ delta.flatten(1)[..., None]).squeeze(-1)
            away = linear.abs() + remainder
            reached = (weights[:, row] * torch.minimum(away, reach) ** 2).sum(dim=-1)
            assert (reached <= bound[:, row] * (1 + 1e-9)).all()
            gradient = ((weights[:, row] * away * linear.sign()).unsqueeze(-1) * jacobian).sum(dim=1)
            delta = -steepest(gradient.view_as(x), eps, threat)


@pytest.mark.parametrize(("cell", "options"), CELLS)
@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
@pytest.mark.parametrize("eps", [0.1, 0.6])
def test_curved_bounds_of_networks_are_sound(cell, options, norm, eps):
    """Of first curves and of random ones: points of the boundary, corners and PGD stay above."""
    model = network(cell, **options)
    x, labels = sequences(model)
    graph = unroll(model, x.shape[1], torch.float64).detach()
    perturbation = Perturbation(x, torch.full(x.shape[:2], eps, dtype=torch.float64), norm)
    rows = margin_rows(labels, 3).double()
    least = sampled_margins(model, x, labels, eps, norm)
    attacked = pgd(model, x, labels, eps, norm=norm).margin
    first = CurvedPass(graph, perturbation)
    wild = wild_curves(first)
    for bounds in (first, CurvedPass(graph, perturbation, wild)):
        margin = bounds.margin(rows)
        assert margin.isfinite().all()
        assert (margin <= least + 1e-9).all()
        assert (margin.amin(dim=1) <= attacked + 1e-9).all()
        for node in bounds._linear:
            low, high = bounds.interval(node)
            assert (low <= high).all()


def wild_curves(first: CurvedPass, seed: int = 5) -> list[Curves | None]:
    """The curves of a pass with other slopes above than below, and other curvatures."""
    generator = torch.Generator().manual_seed(seed)

    def moved(t):
        return t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype)

    def scaled(t):
        return t * (2 * torch.rand(t.shape, generator=generator, dtype=t.dtype))

    return [
        own and Curves(*(tuple(map(moved, ts)) for ts in own[:2]), *(tuple(map(scaled, ts)) for ts in own[2:]))
        for own in first.curves()
    ]


def farthest_from_linear(bounds: CurvedPass, points: torch.Tensor) -> float:
    """Most that an operand is from  centre + J delta  at points of the set, (count, batch, T, n), in units of its R."""
    operands = {operand for node in bounds._chosen for operand in node.parents}
    most = 0.0
    for point in points:
        delta = (point - bounds.perturbation.x).flatten(1)
        values = node_values(bounds.graph, point)
        for node in operands:
            known = bounds._operand(node)
            away = (values[node.index] - known.center - (known.slopes @ delta[..., None]).squeeze(-1)).abs()
            most = max(most, float((away / (known.remainder + 1e-12)).max()))
    return most


@pytest.mark.parametrize(("cell", "options"), CELLS)
@pytest.mark.parametrize(("norm", "eps"), [(1.0, 0.3), (2.0, 0.3), (INF, 0.3), (2.0, 20.0)])
def test_operands_are_linear_but_for_what_remains(cell, options, norm, eps):
    """Also where the lines above operands have other slopes than those below, and centres were moved into boxes."""
    model = network(cell, **options)
    x, _ = sequences(model)
    eps = torch.full(x.shape[:2], eps, dtype=torch.float64)
    perturbation, graph = Perturbation(x, eps, norm), unroll(model, x.shape[1], torch.float64).detach()
    points = random_points(x, eps, Threat(norm), 60, seed=3)
    first = CurvedPass(graph, perturbation)
    for bounds in (first, CurvedPass(graph, perturbation, wild_curves(first))):
        assert 0.01 < farthest_from_linear(bounds, points) <= 1.0 + 1e-9


def test_the_network_test_catches_a_joint_bound_that_forgets_the_remainders(monkeypatch):
    """Without R, what is left of the operands beside their linear part, some network's bound is too high."""
    monkeypatch.setattr(CurvedPass, "_joint_loss", lambda self, losses, lines=None: 0.0 * losses[0][1].sum(dim=-1))
    with pytest.raises(AssertionError):
        for cell in (nn.RNN, nn.LSTM, nn.GRU):
            for norm in (1.0, 2.0, INF):
                test_curved_bounds_of_networks_are_sound(cell, {}, norm, 0.6)


@pytest.mark.parametrize(("cell", "options"), CELLS)
@pytest.mark.parametrize(
    "norm", [pytest.param(1.0, marks=pytest.mark.full), pytest.param(2.0, marks=pytest.mark.full), INF]
)
def test_every_method_is_at_least_as_tight_as_the_cheaper_one(cell, options, norm):
    model = network(cell, **options)
    x, labels = sequences(model)
    how = {"norm": norm, "alpha_steps": 2, "curve_steps": 3, "time_limit": 0.1}
    margins = [
        certified_margin(model, x[:2], labels[:2], 0.2, method=method, **how)
        for method in ("crown", "alpha", "curve", "bab")
    ]
    least = sampled_margins(model, x, labels, 0.2, norm)[:2]
    # What "bab" has time for depends on the machine: planes, whatever the limit.
    for cheaper, dearer in ((margins[0], margins[1]), (margins[1], margins[2]), (margins[0], margins[3])):
        assert (dearer >= cheaper - 1e-12).all()  # "bab" takes one sample after the other
        assert (dearer <= least + 1e-9).all()


def test_curves_certify_more_where_many_neurons_add_their_errors():
    torch.manual_seed(0)
    model = network(nn.RNN)
    model.rnn, model.head = nn.RNN(20, 30, batch_first=True).double(), nn.Linear(30, 3).double()
    x = torch.randn(4, 5, 20, dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    steps = {"alpha_steps": 8, "curve_steps": 30}
    radii = [certified_radius(model, x, labels, method=method, **steps) for method in ("crown", "alpha", "curve")]
    assert (radii[1] >= radii[0]).all() and (radii[2] >= radii[1]).all()
    assert float((radii[2] / radii[0]).mean()) > 1.1
    attacked = pgd(model, x, labels, radii[2]).margin
    assert (attacked > 0).all()


@pytest.mark.parametrize("factor", [0.0, pytest.param(0.5, marks=pytest.mark.full), 100.0])
@pytest.mark.parametrize("norm", [pytest.param(2.0, marks=pytest.mark.full), INF])
def test_no_estimate_is_a_verdict(monkeypatch, factor, norm):
    """Estimates that are far too good or bad lead tuning and the forecast of radii astray, but radii stay certified."""
    ball, box = ("largest_eigenvalue", "line_and_squares"), ("squares_over_box", "line_and_squares_over_box")
    for name in box if norm == INF else ball:
        honest = getattr(curve, name)

        def estimate(*parts, honest=honest):
            sound = inspect.signature(honest).bind(*parts).arguments["sound"]
            return honest(*parts) if sound else factor * honest(*parts)

        monkeypatch.setattr(curve, name, estimate)
    model = network(nn.LSTM)
    x, labels = sequences(model)
    how = {"norm": norm, "alpha_steps": 2}
    planes, by_planes = (certified_radius(model, x, labels, method=method, **how) for method in ("crown", "alpha"))
    for method in ("curve", "bab") if factor == 0.0 else ("curve",):
        problem = margin_problem(model, x, labels, method=method, curve_steps=6, time_limit=0.5, **how)
        radius = search_radius(problem).radius
        least = by_planes if method == "curve" else 0.998 * planes  # "bab" may have no time for slopes
        assert (radius >= least).all()
        assert (pgd(model, x, labels, radius, norm=norm).margin > 0).all()
        if method == "curve":
            certified = problem.margins(radius, torch.float64).amin(dim=1) > 0
            assert (certified | (radius == by_planes)).all()


def test_bounds_that_overflow_certify_nothing():
    model = network(nn.LSTM)
    x, labels = sequences(model)
    graph = unroll(model, x.shape[1], torch.float32).detach()
    perturbation = Perturbation(x.float(), torch.full(x.shape[:2], 1e12), INF)
    margin = CurvedPass(graph, perturbation).margin(margin_rows(labels, 3))
    assert not margin.isnan().any()
    assert not (margin > 0).any()


def test_radii_of_samples_of_different_lengths():
    model = network(nn.LSTM)
    x, labels = sequences(model)
    lengths = torch.tensor([1, 3, 2, 3])
    radius = certified_radius(model, x, labels, lengths=lengths, method="curve", curve_steps=3, alpha_steps=2)
    crown = certified_radius(model, x, labels, lengths=lengths)
    assert (radius >= crown).all()


def test_tuning_keeps_the_best_and_leaves_the_model_alone():
    model = network(nn.GRU)
    x, labels = sequences(model)
    graph = unroll(model, x.shape[1], torch.float64).detach()
    perturbation = Perturbation(x, torch.full(x.shape[:2], 0.2, dtype=torch.float64))
    rows = margin_rows(labels, 3).double()
    margins = {}
    for steps in (0, 2, 8):
        curves = tune_curves(graph, perturbation, rows, steps)
        for sound in (True, False):
            margins[steps, sound] = CurvedPass(graph, perturbation, curves, sound).margin(rows).amin(dim=1)
    assert (margins[8, False] >= margins[0, False]).all()
    assert (margins[8, True] > margins[0, True]).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tuning_stops_at_its_aim_and_at_its_deadline():
    model = network(nn.LSTM)
    x, labels = sequences(model)
    graph = unroll(model, x.shape[1], torch.float64).detach()
    perturbation = Perturbation(x, torch.full(x.shape[:2], 0.2, dtype=torch.float64))
    rows = margin_rows(labels, 3).double()

    def reached(steps, **until):
        curves = tune_curves(graph, perturbation, rows, steps, **until)
        return CurvedPass(graph, perturbation, curves).margin(rows).amin()

    start, later = reached(0), reached(8)
    assert reached(8, pace=Pace(0.0)) == start
    aim = float(0.5 * (start + later))
    assert aim < reached(1000, aim=aim) <= later + 0.1 * (later - start)


POINTS, BOXES = (30.0, 1e-9), (30.0, 0.05)
ALWAYS = {(1.0, torch.float64, BOXES), (2.0, torch.float64, POINTS), (INF, torch.float64, BOXES)}
ALWAYS |= {(1.0, torch.float32, POINTS), (2.0, torch.float32, BOXES), (INF, torch.float32, POINTS)}  # every pair once


@pytest.mark.parametrize(
    ("norm", "dtype", "scale", "eps"),
    [
        pytest.param(norm, dtype, *size, marks=[] if (norm, dtype, size) in ALWAYS else pytest.mark.full)
        for size in (BOXES, POINTS, (1.0, 1e-9))
        for dtype in (torch.float64, torch.float32)
        for norm in (1.0, 2.0, INF)
    ],
)
def test_curved_bounds_hold_where_gates_saturate_and_boxes_are_points(norm, dtype, scale, eps):
    model = network(nn.LSTM, num_layers=2)
    for parameter in model.rnn.parameters():
        parameter.data *= scale
    x, labels = sequences(model)
    least = sampled_margins(model, x, labels, eps, norm)
    how = {"norm": norm, "dtype": dtype}
    margin = certified_margin(model, x.to(dtype), labels, eps, method="curve", alpha_steps=2, curve_steps=2, **how)
    crown = certified_margin(model, x.to(dtype), labels, eps, **how)
    assert (margin >= crown).all()
    slack = 1e-9 if dtype == torch.float64 else 1e-3
    assert (margin <= least + slack * (1.0 + least.abs())).all()


@pytest.mark.parametrize("norm", [2.0, INF])
def test_curves_of_relu_certify_more_than_planes(norm):
    torch.manual_seed(0)
    model = network(nn.RNN)
    model.rnn, model.head = nn.RNN(20, 30, batch_first=True, nonlinearity="relu").double(), nn.Linear(30, 3).double()
    x = torch.randn(4, 5, 20, dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    alpha, curved = (
        certified_radius(model, x, labels, method=m, alpha_steps=8, curve_steps=20, norm=norm)
        for m in ("alpha", "curve")
    )
    assert (curved >= alpha).all() and float((curved / alpha).mean()) > 1.1
    assert (pgd(model, x, labels, curved, norm=norm).margin > 0).all()


PIECEWISE = {"relu": nn.ReLU(), "leaky relu": nn.LeakyReLU(0.2), "hardtanh": nn.Hardtanh(), "relu6": nn.ReLU6()}


def kinked_network(activation: nn.Module) -> nn.Module:
    """Of two hidden layers, some of whose neurons cannot bend."""
    torch.manual_seed(0)
    layers = nn.Linear(12, 9), activation, nn.Linear(9, 8), activation, nn.Linear(8, 3)
    return nn.Sequential(nn.Flatten(), *layers).double().requires_grad_(False)


@pytest.mark.parametrize("activation", PIECEWISE)
@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
@pytest.mark.parametrize(("frames", "dtype"), [(None, torch.float64), (1, torch.float64), (None, torch.float32)])
def test_curves_of_layers_with_kinks_are_sound(activation, norm, frames, dtype):
    """First, tuned and wild curves, from radii where few neurons bend to such where all do."""
    model = kinked_network(PIECEWISE[activation])
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    for eps in (0.0, 0.05, 0.5, 20.0):
        problem = margin_problem(model, x.to(dtype), labels, norm=norm, frames=frames, method="curve")
        sizes = torch.full((4,), eps, dtype=dtype)
        attacked = pgd(model, x, labels, eps, norm=norm, frames=frames).margin if eps else problem.clean_margins(dtype)
        room = (1e-9 if dtype == torch.float64 else 1e-4) * (1.0 + attacked.abs().amax())
        for steps in (0, 5):
            problem.tune_curves(sizes, torch.float32, steps)
            assert (problem.margins(sizes, dtype).amin(dim=1) <= attacked.reshape(4, -1).amin(dim=1) + room).all()
        wild = [
            own and Curves(*(tuple(3.0 * t - 0.4 for t in ts) for ts in own[:2]), *own[2:]) for own in problem.curves
        ]
        problem.curves = wild
        assert (problem.margins(sizes, dtype).amin(dim=1) <= attacked.reshape(4, -1).amin(dim=1) + room).all()


def test_the_check_of_kinks_catches_curvature_that_costs_nothing(monkeypatch):
    monkeypatch.setattr(CurvedPass, "_joint_loss", lambda self, losses, lines=None: 0.0 * losses[0][1].sum(dim=-1))
    with pytest.raises(AssertionError):
        for activation in PIECEWISE:
            test_curves_of_layers_with_kinks_are_sound(activation, 2.0, None, torch.float64)


def test_neurons_that_do_not_bend_have_no_curvature():
    model = network(nn.RNN, nonlinearity="relu")
    x, _ = sequences(model)
    graph = unroll(model, x.shape[1], torch.float64).detach()
    bounds = CurvedPass(graph, Perturbation(x, torch.full(x.shape[:2], 0.2, dtype=torch.float64)))
    bent = 0
    for node in bounds.graph.nodes:
        if node in bounds._chosen:
            low, high = bounds.interval(node.parents[0])
            still, curves = (low >= 0) | (high <= 0), bounds._chosen[node]
            assert all((part[0][still] == 0).all() and (part[0][~still] > 0).all() for part in curves[2:])
            bent += int((~still).sum())
    assert bent


def test_frames_that_are_exact_and_bad_arguments():
    model = network(nn.LSTM)
    x, labels = sequences(model)
    radius = certified_radius(model, x, labels, frames=1, method="curve", curve_steps=2, alpha_steps=2)
    assert (radius >= certified_radius(model, x, labels, frames=1)).all()
    with pytest.raises(ValueError, match="curve_steps"):
        margin_problem(model, x, labels, method="curve", curve_steps=-1)
    with pytest.raises(ValueError, match="time_limit"):
        margin_problem(model, x, labels, method="bab", time_limit=math.nan)


def gradients_where_nothing_moves(ball: str, eps: tuple[float, float], mask: list[bool]) -> list[torch.Tensor]:
    """Of the weights, from a batch of two samples; the second may not move."""
    model = network(nn.RNN)
    x, labels = (part[:2] for part in sequences(model))
    frames = torch.tensor([[True] * x.shape[1], mask * x.shape[1]])
    eps = torch.tensor(eps, dtype=torch.float64)
    margin = certified_margin(model, x, labels, eps, ball=ball, frames=frames, method="curve", curve_steps=0)
    assert margin.isfinite().all()
    return torch.autograd.grad(margin.sum(), list(model.parameters()))


@pytest.mark.parametrize("ball", ["frame", "sequence"])
@pytest.mark.parametrize(("eps", "mask"), [((0.05, 0.05), [False]), ((0.05, 0.0), [True]), ((0.05, 1e3), [True])])
def test_gradients_are_finite_where_nothing_moves_or_nothing_is_proved(ball, eps, mask):
    assert all(gradient.isfinite().all() for gradient in gradients_where_nothing_moves(ball, eps, mask))


def test_gradients_through_factors_that_failed_are_noticed(monkeypatch):
    monkeypatch.setattr(quadratic, "_where", lambda chosen, tensor, other: tensor)
    found = gradients_where_nothing_moves("frame", (0.05, 0.0), [True])
    assert not all(gradient.isfinite().all() for gradient in found)


def test_centres_of_operands_lie_in_their_boxes(monkeypatch):
    def outside() -> float:
        model = network(nn.RNN)
        x, _ = sequences(model)
        eps = torch.full(x.shape[:2], 20.0, dtype=torch.float64)
        with torch.no_grad():
            bounds = CurvedPass(unroll(model, x.shape[1]), Perturbation(x, eps, 2.0))
            most = 0.0
            for node, operand in bounds._linear.items():
                low, high = bounds.interval(node)
                most = max(most, float((operand.center - high).max()), float((low - operand.center).max()))
        return most

    assert outside() == 0.0
    monkeypatch.setattr(curve, "intersect", lambda first, second: second)
    assert outside() > 0.0
