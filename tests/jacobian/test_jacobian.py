"""Bounds of gradients of all kinds of graphs: autograd's at a point, above all others in the set, RecurJac's, exact."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from helpers import THREATS, Threat, check_below, normal, random_points
from nets import (
    NETS,
    check_gradients,
    frames_of,
    gradients_of,
    jacobian_of,
    perceptron,
    points_within,
    tangled,
)

from utils.bounds.passes import BoundPass
from utils.graph import Graph, Linear
from utils.graph.nodes import Frame, WeightedSum
from utils.graph.nonlinear import Activation
from utils.graph.picks import Negative
from utils.jacobian import CHAINS, JacobianPass, passes
from utils.network.symbolic import as_graph
from utils.perturbation.lp_ball import INF, dual_norm
from utils.perturbation.sets import Perturbation
from utils.question import margin_rows
from utils.relaxation.derivatives import derivative_ranges

BATCH = 3
ROWS = margin_rows(torch.arange(BATCH), 3).double()
MIXED = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])


@pytest.fixture(autouse=True)
def no_gradients():
    """Falls are the least of what they can be made of only then."""
    with torch.no_grad():
        yield


@functools.cache
def net(name: str) -> Graph:
    return NETS[name]()


def inputs(graph: Graph, seed: int = 50) -> torch.Tensor:
    return (0.5 * normal(BATCH, frames_of(graph), graph.frames[0].size, seed=seed)).clamp(-1.0, 1.0)


def radii(graph: Graph, sizes=(0.3, 0.0, 0.7)) -> torch.Tensor:
    """A sample that nothing perturbs beside others."""
    return torch.tensor(sizes).double()[:, None].expand(-1, frames_of(graph)).contiguous()


# --- at a point -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", NETS)
def test_of_a_tiny_ball_it_is_the_gradient(name, chain):
    graph = net(name)
    x = inputs(graph)
    jacobian = jacobian_of(graph, Threat(2.0), x, radii(graph, (1e-9, 1e-9, 1e-9)), ROWS, chain)
    gradients = gradients_of(graph, x, ROWS)
    assert set(jacobian.frames) == {f for f in range(x.shape[1]) if gradients[:, :, f].abs().amax() > 0}
    for frame in jacobian.frames:
        for side in jacobian.frame_bounds(frame):
            torch.testing.assert_close(side.view(BATCH, 2, -1), gradients[:, :, frame], rtol=1e-6, atol=1e-6)
    sizes = dual_norm(gradients, 2.0)
    torch.testing.assert_close(jacobian.frame_falls().view_as(sizes), 1e-9 * sizes, rtol=1e-5, atol=1e-15)


def test_graphs_with_ends_of_samples_are_refused():
    graph = Graph()
    graph.samples = 1
    graph.add(Linear((graph.add(Frame(2, 0)),), (torch.ones(3, 2).double(),), torch.zeros(3).double()))
    with pytest.raises(ValueError, match="give the graph no ends of samples"):
        jacobian_of(graph, Threat(2.0), torch.zeros(1, 1, 2).double(), torch.ones(1, 1).double(), ROWS[:1])
    with pytest.raises(ValueError, match="must be one of joint, chord"):
        jacobian_of(net("tanh"), Threat(2.0), inputs(net("tanh")), radii(net("tanh")), ROWS, "cord")


# --- over a set -------------------------------------------------------------------------------------------------------


def check(name: str, threat: Threat, mask=None, chain="joint", layers="crown", sizes=(0.3, 0.0, 0.7)) -> None:
    graph = net(name)
    x, eps = inputs(graph), radii(graph, sizes)
    eps = eps if mask is None else eps * mask[:, : x.shape[1]]
    points = points_within(graph, x, eps, ROWS, threat)
    check_gradients(jacobian_of(graph, threat, x, eps, ROWS, chain, layers), graph, x, eps, ROWS, threat, points)


MOST_THREATS = [
    pytest.param(threat, marks=pytest.mark.full) if str(threat) == "l1-sequence" else threat for threat in THREATS
]


@pytest.mark.parametrize("threat", MOST_THREATS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_no_gradient_of_the_set_is_outside(name, threat):
    if frames_of(net(name)) == 1 and threat.ball == "sequence":
        pytest.skip("of one frame both balls are the same")
    check(name, threat)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", ["relu", "lstm, both ways, lengths", "tangled"])
def test_nor_where_samples_have_frames_of_their_own_that_move(name, threat):
    check(name, threat, MIXED, sizes=(0.3, 0.4, 0.7))


@pytest.mark.parametrize(
    ("chain", "layers"), [("recurjac", "ibp"), ("interval", "crown"), ("chord", "crown"), ("joint", "crown-ibp")]
)
@pytest.mark.parametrize("threat", [Threat(2.0, "sequence"), Threat(INF, clip=(-1.0, 1.0))], ids=str)
@pytest.mark.parametrize("name", ["two layers, mean", "gru, reset first", "tangled", "perceptron, hardtanh(-0.7, 0.9)"])
def test_nor_by_other_chains_and_layers(name, threat, chain, layers):
    check(name, threat, MIXED, chain, layers, sizes=(0.3, 0.4, 0.7))


def middles(name, *operands):
    ranges = derivative_ranges(name, *operands)
    return tuple((0.5 * (low + high),) * 2 for low, high in ranges)


def one_sided(self, frame, low, high):
    return self.most(frame, dual_norm(high, self.norm))


def flipped(self, frame, low, high, whole=JacobianPass._box_fall):
    return whole(self, frame, -high, -low)


def no_reflection(triangle, point, whole=passes._reflected):
    return 0.5 * triangle + 0.5 * whole(triangle, point)


SMALL = (0.01, 0.03, 0.1)  # balls in which bounds are near to what they bound
BROKEN = {
    "range of a derivative": ("tangled", 2.0, "utils.graph.nonlinear.derivative_ranges", middles),
    "one side of the gradient": ("tanh", 2.0, "utils.perturbation.sets.Perturbation.frame_fall", one_sided),
    "sign of known entries": ("relu", INF, "utils.jacobian.passes.JacobianPass._box_fall", flipped),
    "sign of a negative": (
        "gru",
        1.0,
        "utils.graph.picks.Negative.hand_back",
        lambda self, adjoint, chain: chain.scaled(self.parents[0], adjoint, 1.0),
    ),
    "factors of a sum": (
        "two layers, mean",
        1.0,
        "utils.graph.nodes.WeightedSum.hand_back",
        lambda self, adjoint, chain: [chain.scaled(parent, adjoint) and None for parent in self.parents],
    ),
    "places of slices": (
        "lstm",
        1.0,
        "utils.graph.picks.Slice.hand_back",
        lambda self, adjoint, chain: chain.sliced(self.parents[0], adjoint, 0),
    ),
    "a reflection that is none": ("tanh", 2.0, "utils.jacobian.passes._reflected", no_reflection),
    "norms of matrices": (
        "perceptron, tanh",
        INF,
        "utils.jacobian.operator_norms.NormPass.of_matrix",
        lambda self, weight: 0.1 * torch.linalg.matrix_norm(weight, 2),
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_broken_is_noticed(fault, monkeypatch):
    name, norm, place, broken = BROKEN[fault]
    check(name, Threat(norm), sizes=SMALL)
    monkeypatch.setattr(place, broken)
    with pytest.raises(AssertionError, match="above value"):
        check(name, Threat(norm), sizes=SMALL)


def test_slices_negatives_and_sums_are_in_the_graphs_that_notice():
    kinds = {type(node) for node in (*net("gru").nodes, *net("two layers, mean").nodes, *tangled().nodes)}
    assert {Negative, WeightedSum} <= kinds


@pytest.mark.parametrize("chain", CHAINS)
def test_rows_of_a_sample_are_samples(chain):
    """Bounds of several rows at once are those of each by itself, and of a sample those without the others."""
    graph = net("lstm, both ways, lengths")
    x, eps, threat = inputs(graph), radii(graph, (0.3, 0.1, 0.5)), Threat(2.0)
    rows = torch.cat((ROWS, torch.eye(3).double().expand(BATCH, -1, -1)), dim=1)
    falls = jacobian_of(graph, threat, x, eps, rows, chain).fall().view(BATCH, 5)
    for k in (0, 3):
        alone = jacobian_of(graph, threat, x, eps, rows[:, k : k + 1], chain).fall()
        torch.testing.assert_close(falls[:, k], alone, rtol=1e-9, atol=1e-12)


def test_float32_is_hardly_above_float64():
    for name, norm in itertools.product(("relu", "lstm", "perceptron, tanh"), (1.0, 2.0, INF)):
        graph = net(name)
        x, eps = inputs(graph), radii(graph)
        exact = jacobian_of(graph, Threat(norm), x, eps, ROWS).fall()
        single = (
            jacobian_of(as_graph(graph, torch.float32), Threat(norm), x.float(), eps.float(), ROWS.float())
            .fall()
            .double()
        )
        check_below(exact * (1.0 - 1e-6), single, "fall in float32")
        torch.testing.assert_close(single, exact, rtol=1e-2, atol=1e-4)


def test_huge_balls_are_no_nan():
    for name in ("tanh", "lstm", "gru, reset first", "perceptron, sigmoid"):
        graph = net(name)
        for size, norm in ((1e6, INF), (1e30, 1.0), (1e30, 2.0)):
            jacobian = jacobian_of(graph, Threat(norm), inputs(graph), radii(graph, (size, size, 0.0)), ROWS)
            assert not jacobian.fall().isnan().any() and not jacobian.frame_falls().isnan().any()


# --- kinks ------------------------------------------------------------------------------------------------------------


def layers_of(graph: Graph) -> tuple[list, list]:
    linear = [node for node in graph.nodes if isinstance(node, Linear)]
    return linear, [node for node in graph.nodes if isinstance(node, Activation)]


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_every_pattern_that_the_layers_allow_is_inside(norm):
    """Of one hidden layer the patterns' least and greatest entries are the bounds; of two they are within them."""
    for widths in ((5,), (3, 4)):
        graph = perceptron("relu", widths, seed=4)
        x, eps = inputs(graph), radii(graph, (0.2, 0.6, 2.0))
        threat = Threat(norm)
        bounds = BoundPass(graph, threat.around(x, eps))
        jacobian = jacobian_of(graph, threat, x, eps, ROWS)
        low, high = (side.view(BATCH, 2, -1) for side in jacobian.frame_bounds(0))
        falls = jacobian.fall().view(BATCH, 2)
        linear, active = layers_of(graph)
        for sample, k in itertools.product(range(BATCH), range(2)):
            choices = []
            for node in active:
                below, above = (side[sample].tolist() for side in bounds.interval(node.parents[0]))
                pairs = zip(below, above, strict=True)
                choices += [(1.0,) if b > 0 else (0.0,) if a < 0 else (0.0, 1.0) for b, a in pairs]
            found = []
            for pattern in itertools.product(*choices):
                gradient, signs = ROWS[sample, k] @ linear[-1].weights[0], torch.tensor(pattern).double()
                for node, part in zip(linear[-2::-1], reversed(signs.split(widths)), strict=True):
                    gradient = (gradient * part) @ node.weights[0]
                found.append(gradient)
            found = torch.stack(found)
            check_below(low[sample, k], found, "a pattern's gradient")
            check_below(-high[sample, k], -found, "minus a pattern's gradient")
            check_below(eps[sample] * dual_norm(found, norm), falls[sample, k], "a pattern's fall")
            if len(widths) == 1:
                torch.testing.assert_close(low[sample, k], found.amin(dim=0), rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(high[sample, k], found.amax(dim=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "perceptron, relu", "perceptron, hardtanh(-0.7, 0.9)"])
def test_differences_across_kinks_are_below_the_fall(name):
    graph = net(name)
    x, eps, threat = inputs(graph), radii(graph, (0.4, 0.8, 1.6)), Threat(INF)
    falls = jacobian_of(graph, threat, x, eps, ROWS).fall().view(BATCH, 2)
    points = random_points(x, eps, threat, 16, 1)
    values = [torch.einsum("brc,bc->br", ROWS, graph.evaluate(point)) for point in points]
    for (point, at_point), (other, at_other) in itertools.combinations(zip(points, values, strict=True), 2):
        share = ((point - other).abs() / eps[..., None]).flatten(1).amax(dim=1, keepdim=True)
        check_below((at_point - at_other).abs(), share * falls, "difference of margins")


def test_a_kink_at_an_interval_s_end_counts():
    """z lies in [0, 2 eps]: below its end relu is flat, and rounding may go there."""
    graph = Graph()
    frame = graph.add(Frame(1, 0))
    one = torch.ones(1, 1).double()
    z = graph.add(Linear((frame,), (one,), torch.tensor([0.5]).double()))
    graph.add(Linear((graph.add(Activation(z, "relu")),), (-one,), torch.zeros(1).double()))
    x = torch.zeros(1, 1, 1).double()
    low, high = jacobian_of(graph, Threat(INF), x, torch.full((1, 1), 0.5).double(), one[None]).frame_bounds(0)
    assert low <= -1.0 and high >= 0.0


# --- RecurJac and Fast-Lip, as they are written -----------------------------------------------------------------------


def recursion(weights, ranges, row, known, keep_symbols: bool):
    """Least and greatest entries of W_1^T v_1, v_i = g_i * a_i, a_{i-1} = W_i^T v_i, a_{n-1} = row, by layers.

    RecurJac's rule, from the output back: a value of known sign is kept as a symbol; Fast-Lip's keeps none. ``known``
    are the intervals of a_i, filled from the last layer on.
    """

    def highest(coefficients, layer):
        constant = 0.0
        for i in range(layer, len(ranges)):
            (gl, gh), (low, high) = ranges[i], known[i]
            up, down = coefficients.clip(0, None), coefficients.clip(None, 0)
            most = np.maximum(gl * high, gh * high), np.minimum(gl * low, gh * low)
            positive, negative = up * gh + down * gl, up * gl + down * gh
            sure = (low >= 0) | (high <= 0) | (gl == gh)
            if not keep_symbols and i < len(ranges) - 1:
                sure = np.zeros_like(sure)
            constant = constant + (~sure * (up * most[0] + down * most[1])).sum(axis=1)
            coefficients = sure * np.where(gl == gh, coefficients * gl, np.where(low >= 0, positive, negative))
            if i < len(ranges) - 1:
                coefficients = coefficients @ weights[i + 1].T
        return constant + coefficients @ row

    for i in reversed(range(len(ranges))):
        if i == len(ranges) - 1:
            known[i] = (row, row)
        else:
            columns = weights[i + 1].T
            known[i] = (-highest(-columns, i + 1), highest(columns, i + 1))
    return -highest(-weights[0].T, 0), highest(weights[0].T, 0)


@pytest.mark.parametrize("chain", ["recurjac", "interval"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.2)", "tanh"])
def test_chains_are_recurjac_and_fast_lip(activation, chain):
    graph = perceptron(activation, (5, 6, 5, 4), inputs=4, seed=6)
    x, eps, threat = inputs(graph), radii(graph, (0.1, 0.4, 1.2)), Threat(INF)
    bounds = BoundPass(graph, threat.around(x, eps))
    low, high = (s.view(BATCH, 2, -1) for s in jacobian_of(graph, threat, x, eps, ROWS, chain).frame_bounds(0))
    linear, active = layers_of(graph)
    weights = [node.weights[0].numpy() for node in linear[:-1]]
    different = 0
    for sample, k in itertools.product(range(BATCH), range(2)):
        ranges = [derivative_ranges(activation, bounds.interval(node.parents[0]))[0] for node in active]
        ranges = [tuple(side[sample].numpy() for side in pair) for pair in ranges]
        row = (ROWS[sample, k] @ linear[-1].weights[0]).numpy()
        by_rule = {keep: recursion(weights, ranges, row, {}, keep) for keep in (True, False)}
        for ours, theirs in zip((low, high), by_rule[chain == "recurjac"], strict=True):
            np.testing.assert_allclose(ours[sample, k].numpy(), theirs, rtol=1e-6, atol=1e-6)
        different += not np.allclose(by_rule[True], by_rule[False], rtol=1e-3)
    assert different  # the two rules are told apart


# --- l_2 --------------------------------------------------------------------------------------------------------------


def test_the_lesser_of_reflected_and_entry_wise_rows_counts():
    """Where entries vary by themselves, the vertex of their box is the longest gradient: reflected rows are above."""
    graph = Graph()
    (z,) = (graph.add(Linear((graph.add(Frame(3, 0)),), (torch.eye(3).double(),), torch.zeros(3).double())),)
    graph.add(Linear((graph.add(Activation(z, "tanh")),), (torch.ones(1, 3).double(),), torch.zeros(1).double()))
    x, eps = torch.zeros(1, 1, 3).double(), torch.full((1, 1), 1.5).double()
    jacobian = jacobian_of(graph, Threat(2.0), x, eps, torch.ones(1, 1, 1).double())
    low, high = jacobian.frame_bounds(0)
    entries = eps[0] * dual_norm(torch.maximum(-low, high), 2.0)
    assert (jacobian._round_fall(0) > 1.05 * entries).all()
    torch.testing.assert_close(jacobian.fall(), entries, rtol=1e-9, atol=0.0)


def normalised_only(triangle, point):
    """As it was: vectors shorter than 1e-12 do not get length 1."""
    image = point @ triangle.T
    axis = torch.zeros_like(image)
    axis[:, 0] = torch.linalg.vector_norm(image, dim=1) * torch.where(image[:, 0] > 0, -1.0, 1.0)
    normal = torch.nn.functional.normalize(image - axis, dim=1)
    return triangle - 2.0 * normal[:, :, None] * (normal @ triangle)[:, None]


def check_reflection(reflected) -> None:
    triangle = normal(4, 6, seed=1)
    for size in (1e6, 1.0, *(10.0**-k for k in range(11, 16)), 1e-160, 1e-300, 0.0):
        turned = reflected(triangle, size * normal(5, 6, seed=2))
        lengths = (turned @ normal(6, 7, seed=3)).norm(dim=1)
        torch.testing.assert_close(lengths, (triangle @ normal(6, 7, seed=3)).norm(dim=0).expand(5, -1))


def test_reflections_keep_lengths_however_short_the_gradient():
    check_reflection(passes._reflected)
    with pytest.raises(AssertionError, match="not close"):
        check_reflection(normalised_only)


# --- what passes keep -------------------------------------------------------------------------------------------------


def test_what_is_kept_of_a_matrix_is_never_taken_for_that_of_another():
    """Matrices are known by their place in memory: one that is kept must not make room for another."""
    graph = Graph()
    for seed in range(50):
        weight = normal(3, 3, seed=seed)
        kept = graph.once(("sum",), (weight,), lambda weight=weight: weight.sum())
        assert kept == weight.sum()
        del weight


def test_frames_with_weights_of_their_own():
    """Stacks of the weights that meet a frame are made by a pass and gone after it."""
    graph = Graph()
    frames = [graph.add(Frame(2, t)) for t in range(3)]
    parts = []
    for t, frame in enumerate(frames):
        for k in range(2):
            weight = 10.0**t * normal(3, 2, seed=10 * t + k)
            parts.append(graph.add(Activation(graph.add(Linear((frame,), (weight,), normal(3, seed=k))), "relu")))
    graph.add(Linear(tuple(parts), tuple(normal(3, 3, seed=30 + k) for k in range(6)), torch.zeros(3).double()))
    x = normal(BATCH, 3, 2, seed=40)
    for norm, moved in itertools.product((1.0, 2.0, INF), (0, 1, 2, 0)):
        threat, eps = Threat(norm), 5.0 * torch.eye(3).double()[moved].expand(BATCH, -1)
        points = points_within(graph, x, eps, ROWS, threat)
        check_gradients(jacobian_of(graph, threat, x, eps, ROWS), graph, x, eps, ROWS, threat, points)


def test_sides_of_cut_boxes_are_exact():
    x = torch.tensor([[[0.0, 0.3, 1.0 - 2.0**-31]]], dtype=torch.float64)
    sides = Perturbation(x, torch.full((1, 1), 1e-9, dtype=torch.float64), INF, clip=(0.0, 1.0)).sides(0)
    torch.testing.assert_close(sides[0], torch.tensor([[0.0, 1e-9, 1e-9]], dtype=torch.float64), rtol=0.0, atol=0.0)
    torch.testing.assert_close(
        sides[1], torch.tensor([[1e-9, 1e-9, 2.0**-31]], dtype=torch.float64), rtol=0.0, atol=0.0
    )
