"""Moves of weights: where parameters stand, bounds against enumeration and descent, sharing, broken versions."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import torch
from reference import lower_bounds
from torch import nn
from torch.func import functional_call

from utils.bounds.passes import BoundPass
from utils.choices import Method
from utils.network.cnn import make_cnn
from utils.network.models import MLP, SequenceClassifier
from utils.question import Question
from utils.weights import (
    MovedWeights,
    WeightBalls,
    WeightProblem,
    Weights,
    attack_weights,
    certified_weight_margin,
    certified_weight_radius,
    passes,
    weight_problem,
)
from utils.weights.attack import evaluate_moved
from utils.weights.balls import Use, joint_norm
from utils.weights.moved import moved_graph
from utils.weights.places import chosen_parameters

INF = math.inf
METHODS = ("ibp", "crown-ibp", "crown")
DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def sequence_model(kind, seed=0, inputs=3, hidden=4, **options):
    cell = {"rnn": nn.RNN, "relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[kind]
    own = {name: options.pop(name) for name in ("num_layers", "bidirectional") if name in options}
    own |= {"nonlinearity": "relu"} if kind == "relu" else {}
    rnn = cell(inputs, hidden, batch_first=True, **own)
    head = nn.Linear(hidden * (2 if own.get("bidirectional") else 1), 3)
    model = SequenceClassifier(rnn, head, **options).double().requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(0.7 * normal(*parameter.shape, seed=100 * seed + number))
    return model


def image_model():
    torch.manual_seed(1)
    return make_cnn("small", 2, 8, 3, 2, False, [0.2, 0.4], [0.5, 0.3]).double().requires_grad_(False)


def mlp(sizes=(3, 4, 4, 3), activation="relu", seed=0):
    model = MLP(sizes, activation, dtype=DOUBLE).requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(0.8 * normal(*parameter.shape, seed=10 * seed + number))
    return model


MODELS = {
    "rnn": (lambda: sequence_model("rnn", mean=0.3, std=0.7), (4, 3)),
    "relu": (lambda: sequence_model("relu", pooling="mean"), (3, 3)),
    "lstm": (lambda: sequence_model("lstm", num_layers=2), (3, 3)),
    "gru": (lambda: sequence_model("gru", mean=torch.tensor([0.1, -0.2, 0.5]), bidirectional=True), (3, 3)),
    "mlp": (mlp, (3,)),
    "tanh": (lambda: mlp(activation="tanh"), (3,)),
    "cnn": (image_model, (2, 8, 8)),
}


def question(name, batch=2, seed=3):
    make, shape = MODELS[name]
    model, x = make(), normal(batch, *shape, seed=seed)
    return model, x, model(x).argmax(dim=1)


@functools.cache
def places_of(name):
    """Finding all parameters of a model takes longer than all else."""
    model, x, _ = question(name)
    return MovedWeights(model, x, Weights(bias=True))


def all_move(name, batch=2, method="crown", **weights):
    """All parameters of a model move; its problem, and its inputs."""
    moved = copy.copy(places_of(name))
    moved.weights = Weights(bias=True, **weights)
    _, x, labels = question(name, batch)
    return WeightProblem(Question(moved.model, x, labels), moved, Method(method)), x


def sampled_moves(problem, eps, count, seed):
    """Moves in the balls, most of them on the boundary or at corners, (count, *shape) by name."""
    balls = problem.moved.balls(torch.full((count,), eps, dtype=DOUBLE), DOUBLE)
    found = {}
    for number, name in enumerate(problem.moved.places(DOUBLE)):
        noise = normal(count, *problem.moved.model.get_parameter(name).shape, seed=seed + number)
        unit = balls.units[name]
        if problem.moved.weights.norm == INF:
            move = noise.sign() if seed % 2 else noise.clamp(-1.0, 1.0)
            found[name] = eps * move * (unit if unit.dim() == 0 else unit.reshape(noise.shape[1:]))
        else:
            found[name] = eps * unit * noise / noise.flatten(1).norm(dim=1).reshape(-1, *[1] * (noise.dim() - 1))
    return found


def margins_with(problem, moves, x, sample):
    """Margins of a sample, (count, n_specs), by the module itself with moved parameters."""
    model = problem.moved.model
    rows, found = problem.rows[sample].to(DOUBLE), []
    for number in range(len(next(iter(moves.values())))):
        own = {name: model.get_parameter(name) + move[number] for name, move in moves.items()}
        found.append(rows @ functional_call(model, own, (x[sample : sample + 1],))[0])
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_stand_where_the_graph_says(name):
    """Moved in the graph and moved in the module, all parameters at once, the outputs are the same."""
    problem, x = all_move(name)
    moves = sampled_moves(problem, 0.3, 4, seed=5)
    graph = moved_graph(problem.graph(DOUBLE), problem.moved.places(DOUBLE), problem.moved.balls(torch.ones(4), DOUBLE))
    found = evaluate_moved(graph, problem.x[:1].expand(4, -1, -1), moves) @ problem.rows[0].double().T
    assert set(moves) == set(dict(problem.moved.model.named_parameters()))
    assert torch.allclose(found, margins_with(problem, moves, x, 0), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "norm", "relative"),
    [*itertools.product(MODELS, (2, INF), (False,)), ("rnn", 2, True), ("mlp", INF, True), ("cnn", INF, True)],
)
def test_no_move_falls_below_the_bounds(name, norm, relative):
    problem, x = all_move(name, norm=norm, relative=relative)
    eps = 0.02 if norm == INF else 0.05
    least = attack_weights(problem, torch.full((2,), eps, dtype=DOUBLE), 8)
    for seed in (2, 3):
        moves = sampled_moves(problem, eps, 6, seed)
        sampled = torch.stack([margins_with(problem, moves, x, sample).amin(dim=0) for sample in range(2)])
        least = torch.minimum(least, sampled)
    clean = problem.clean_margins(DOUBLE)
    assert bool((least < clean).all())
    for method in METHODS:
        bound = problem.by(method).margins(torch.full((2,), eps, dtype=DOUBLE), DOUBLE)
        assert bool((bound <= least + 1e-9).all())
    # Over small moves the network is nearly linear, and so crown's bounds are nearly what descent finds.
    small = torch.full((2,), 0.01 * eps, dtype=DOUBLE)
    taken = clean - attack_weights(problem, small, 4)
    assert bool((clean - problem.margins(small, DOUBLE) <= 1.1 * taken).all())


@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_alone_is_exact(name, norm):
    model, x, labels = question(name)
    last = [key for key, value in model.named_parameters() if value.dim() > 1][-1]
    for method in METHODS:
        problem = weight_problem(model, x, labels, norm=norm, parameters=[last], method=method)
        eps = torch.tensor([0.1, 0.7], dtype=DOUBLE)
        gap = attack_weights(problem, eps, 3) - problem.margins(eps, DOUBLE)
        assert float(gap.abs().max()) < 1e-9


def test_every_corner_of_the_box_of_a_tiny_recurrent_net():
    """W_hh of two units, five times: its 16 corners and a grid between them."""
    model = sequence_model("rnn", inputs=2, hidden=2, seed=4)
    x = normal(3, 5, 2, seed=6)
    problem = weight_problem(model, x, model(x).argmax(1), parameters=["rnn.weight_hh_l0"])
    levels = torch.linspace(-1.0, 1.0, 3, dtype=DOUBLE)
    grid = torch.tensor(list(itertools.product(levels.tolist(), repeat=4)), dtype=DOUBLE).reshape(-1, 2, 2)
    for eps in (0.05, 0.3):
        every = {"rnn.weight_hh_l0": eps * grid}
        least = torch.stack([margins_with(problem, every, x, sample).amin(dim=0) for sample in range(3)])
        for method in METHODS:
            bound = problem.by(method).margins(torch.full((3,), eps, dtype=DOUBLE), DOUBLE)
            assert bool((bound <= least + 1e-9).all())
        if eps == 0.05:
            assert float((least - bound).max()) < 0.1


def test_the_joint_norm_is_that_of_the_worst_corner_or_more():
    """||sum_t a_t h_t^T|| is convex in h: its maximum over boxes is at a corner."""
    for seed in range(20):
        rows = [normal(1, 1, 2, seed=seed + 50 * t) for t in range(3)]
        centers = [normal(1, 2, seed=seed + 50 * t + 7) for t in range(3)]
        radius = 0.4 * normal(3, 2, seed=seed).abs() * (seed % 4 > 0)
        known = seed % 4 == 0
        uses = [Use(a, c, c) if known else Use(a, c - r, c + r) for a, c, r in zip(rows, centers, radius, strict=True)]
        worst = max(
            sum(
                a[0, 0][:, None] * (c[0] + torch.tensor(signs[2 * t : 2 * t + 2]) * r)
                for t, (a, c, r) in enumerate(zip(rows, centers, radius, strict=True))
            ).norm()
            for signs in itertools.product((-1.0, 1.0), repeat=6)
        )
        found = float(joint_norm(uses))
        apart = sum(float(joint_norm([use])) for use in uses)
        assert worst <= found + 1e-12 and found <= apart + 1e-12
        assert not known or abs(found - float(worst)) < 1e-9


class WithoutProducts(passes.WeightSources):
    """Broken: dW times what h moves is forgotten."""

    def collect(self, move, rows, low, high):
        super().collect(move, rows, 0.5 * (low + high), 0.5 * (low + high))

    def deviation(self):
        self._uses = {name: [Use(u.rows, u.low, u.low) for u in own] for name, own in self._uses.items()}
        return super().deviation()


class OneUse(passes.WeightSources):
    """Broken: only the last step's use of a parameter counts."""

    def deviation(self):
        self._uses = {name: own[:1] for name, own in self._uses.items()}
        return super().deviation()


def with_sources(monkeypatch, kind):
    def sources(self):
        self._collecting = kind(self, BoundPass.sources(self))
        return self._collecting

    monkeypatch.setattr(passes.WeightPass, "sources", sources)


@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize("kind", ["rnn", "gru"])
def test_a_shared_weight_is_one_ball(kind, norm):
    """Balls apart for every step are never better, and at five steps clearly worse."""
    model = sequence_model(kind)
    x = normal(4, 5, 3, seed=2)
    problem = weight_problem(model, x, model(x).argmax(1), norm=norm, parameters=["rnn.weight_hh_l0"])
    eps = torch.full((4,), 0.01, dtype=DOUBLE)
    clean, joint = problem.clean_margins(DOUBLE), problem.margins(eps, DOUBLE)
    problem.shared = False
    apart = problem.margins(eps, DOUBLE)
    assert bool((apart <= joint + 1e-9).all())
    assert float((clean - apart).sum()) > 1.02 * float((clean - joint).sum())


@pytest.mark.parametrize("broken", [WithoutProducts, OneUse])
def test_broken_sharing_is_caught(monkeypatch, broken):
    """Descent falls below bounds that forget the product of two moves, or a use."""
    model = mlp((3, 6, 6, 3)) if broken is WithoutProducts else sequence_model("rnn")
    x = normal(6, 3, seed=1) if broken is WithoutProducts else normal(6, 5, 3, seed=1)
    problem = weight_problem(model, x, model(x).argmax(1), norm=2)
    eps = torch.full((6,), 0.2 if broken is WithoutProducts else 0.05, dtype=DOUBLE)
    least = attack_weights(problem, eps, 20)
    assert bool((problem.margins(eps, DOUBLE) <= least).all())
    with_sources(monkeypatch, broken)
    assert bool((problem.margins(eps, DOUBLE) > least + 1e-6).any())


@pytest.mark.parametrize("name", ["rnn", "mlp", pytest.param("gru", marks=pytest.mark.full), "cnn"])
def test_no_move_gives_the_clean_margin_and_more_moves_less(name):
    for norm, method in itertools.product((2, INF), METHODS):
        problem, _ = all_move(name, norm=norm, method=method)
        margins = [problem.margins(torch.full((2,), eps, dtype=DOUBLE), DOUBLE) for eps in (0.0, 0.02, 0.05)]
        assert torch.allclose(margins[0], problem.clean_margins(DOUBLE), atol=1e-9)
        assert all(bool((more <= less + 1e-9).all()) for less, more in itertools.pairwise(margins))


@pytest.mark.parametrize("name", ["rnn", pytest.param("lstm", marks=pytest.mark.full), "cnn"])
def test_single_precision_is_below_double(name):
    for norm, method in itertools.product((2, INF), METHODS):
        problem, _ = all_move(name, norm=norm, method=method)
        eps = torch.full((2,), 0.02)
        single, double = problem.margins(eps, torch.float32), problem.margins(eps.double(), DOUBLE)
        assert bool((single <= double + 1e-6 * (1.0 + double.abs())).all())
        assert torch.allclose(single.double(), double, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", ["relu", "mlp"])
def test_weights_and_inputs_move_together(name):
    model, x, labels = question(name)
    for norm, input_norm in itertools.product((2, INF), (1, 2, INF)):
        options = {"norm": norm, "input_eps": 0.03, "input_norm": input_norm, "bias": True}
        problem = weight_problem(model, x, labels, **options)
        moves = sampled_moves(problem, 0.02, 5, seed=9)
        noise = normal(5, *x.shape[1:], seed=4)
        noise = noise.sign() if input_norm == INF else noise / noise.norm(p=input_norm, dim=-1, keepdim=True)
        found = torch.stack([margins_with(problem, moves, x + 0.03 * delta, 0).amin(dim=0) for delta in noise])
        for method in METHODS:
            both = problem.by(method).margins(torch.full((2,), 0.02, dtype=DOUBLE), DOUBLE)
            assert bool((both[0] <= found + 1e-9).all())
        alone = weight_problem(model, x, labels, **options | {"input_eps": 0.0})
        still = alone.margins(torch.full((2,), 0.02, dtype=DOUBLE), DOUBLE)
        assert bool((both <= still + 1e-9).all()) and bool((both < still - 1e-4).any())


def test_inputs_in_cut_balls_move_with_the_weights():
    model, _, _ = question("relu")
    x = normal(2, 3, 3, seed=3).sigmoid()
    options = {"norm": 2, "input_eps": 0.2, "input_norm": 2, "clip": (0.0, 1.0), "ball": "sequence"}
    problem = weight_problem(model, x, model(x).argmax(1), **options)
    moves, noise = sampled_moves(problem, 0.05, 4, seed=9), normal(6, 3, 3, seed=4)
    points = (x[0] + 0.2 * noise / noise.flatten(1).norm(dim=1)[:, None, None]).clamp(0.0, 1.0)
    every = [margins_with(problem, moves, torch.stack((point, x[1])), 0).amin(dim=0) for point in points]
    for method in METHODS:
        margins = problem.by(method).margins(torch.full((2,), 0.05, dtype=DOUBLE), DOUBLE)
        assert bool((margins[0] <= torch.stack(every).amin(dim=0) + 1e-9).all())


def test_the_radius_is_certified_and_not_broken():
    model, x, labels = question("rnn", batch=3)
    for norm in (2, INF):
        radius = certified_weight_radius(model, x, labels, norm=norm, parameters=["rnn.weight_hh_l0"])
        problem = weight_problem(model, x, labels, norm=norm, parameters=["rnn.weight_hh_l0"])
        assert bool((radius > 0).all()) and bool((problem.margins(radius, DOUBLE) > 0).all())
        assert bool((attack_weights(problem, radius, 10) > 0).all())
        assert bool((problem.margins(1.05 * radius, DOUBLE).amin(dim=1) <= 0).all())


@pytest.mark.parametrize(
    "name", ["rnn", pytest.param("mlp", marks=pytest.mark.full), pytest.param("cnn", marks=pytest.mark.full)]
)
def test_margins_have_gradients_in_the_weights(name):
    """As differences say, along a random direction in all weights."""
    for norm, method in itertools.product((2, INF), METHODS):
        model, eps = places_of(name).model, torch.full((2,), 0.02, dtype=DOUBLE)
        weights = [value.requires_grad_(True) for value in model.parameters()]
        problem, _ = all_move(name, norm=norm, method=method)
        slopes = torch.autograd.grad(problem.margins(eps, DOUBLE).sum(), weights)
        directions = [normal(*value.shape, seed=8 + k) for k, value in enumerate(weights)]
        slope = float(sum((a * b).sum() for a, b in zip(slopes, directions, strict=True)))
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5, 1e-5):
                for value, direction in zip(weights, directions, strict=True):
                    value += step * direction
                values.append(float(all_move(name, norm=norm, method=method)[0].margins(eps, DOUBLE).sum()))
        model.requires_grad_(False)
        assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-3 * (1.0 + abs(slope))


def test_margins_are_at_least_those_of_planes_for_each_product():
    """auto_LiRPA's formulas, on a net that has learnt to tell clusters of 30 values apart."""
    torch.manual_seed(0)
    means, model = normal(5, 30, seed=1), MLP((30, 24, 24, 5), dtype=DOUBLE)
    x, y = means.repeat(40, 1) + 0.8 * normal(200, 30, seed=2), torch.arange(5).repeat(40)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), y)
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.requires_grad_(False)
    x, layers = x[:20], [(layer.weight, layer.bias) for layer in model.layers]
    for norm, sizes in ((2, (0.01, 0.1)), (INF, (1e-3, 1e-2))):
        problem = weight_problem(model, x, y[:20], norm=norm)
        for eps in sizes:
            ours = problem.margins(torch.full((20,), eps, dtype=DOUBLE), DOUBLE)
            theirs = lower_bounds(layers, x, problem.rows.double(), eps, norm)
            least = attack_weights(problem, torch.full((20,), eps, dtype=DOUBLE), 5)
            assert bool((theirs <= ours + 1e-9).all()) and bool((ours <= least + 1e-9).all())


class Merged(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return nn.functional.linear(x, self.second.weight @ self.first.weight)


def test_what_cannot_be_told_apart_is_refused():
    x, labels = torch.rand(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"first\.weight is merged"):
        certified_weight_margin(Merged(), x, labels, 0.1)
    with pytest.raises(ValueError, match="does not depend on the parameter second"):
        certified_weight_margin(Merged(), x, labels, 0.1, parameters=["second.bias"])
    with pytest.raises(ValueError, match="no parameter 'third'"):
        certified_weight_margin(mlp().float(), x, labels, 0.1, parameters=["third"])
    with pytest.raises(ValueError, match="p = 2 or inf"):
        certified_weight_margin(mlp().float(), x, labels, 0.1, norm=1)
    with pytest.raises(ValueError, match="bounded by crown, ibp, crown-ibp"):
        certified_weight_margin(mlp().float(), x, labels, 0.1, method="alpha")
    with pytest.raises(ValueError, match="finite number"):
        WeightBalls(torch.tensor([-0.1]), 2.0, {})
    assert chosen_parameters(mlp()) == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
