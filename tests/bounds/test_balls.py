"""Norm balls of feed-forward networks: against attacks, 60 digits and grids, in degenerate cases, and broken ones."""

from __future__ import annotations

import mpmath
import pytest
import torch
from helpers import INF, classifier, normal, seeded
from torch import nn

from utils.bounds import balls
from utils.bounds.alpha import tune_slopes
from utils.bounds.balls import Balls, spectral_norm, squares_in_ball
from utils.bounds.curve import CurvedPass
from utils.bounds.passes import BoundPass
from utils.certify import certified_margin, certified_radius, decide
from utils.certify.certificate import save_certificates
from utils.certify.problem import margin_problem
from utils.network.unroll import unroll
from utils.perturbation.sets import Perturbation

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.Tanh, nn.Sigmoid)


def net_of(activation=nn.ReLU, seed: int = 0, layers: int = 3, width: int = 8, turns=False) -> nn.Sequential:
    """6 - width - ... - 3, float64; with ``turns``, weights of norm 1 that turn what they do not drop."""
    sizes = (6, *[width] * layers, 3)
    parts: list[nn.Module] = []
    for k in range(layers + 1):
        linear = nn.Linear(sizes[k], sizes[k + 1]).double()
        linear.weight.data = normal(sizes[k + 1], sizes[k], seed=100 * seed + k) / sizes[k] ** 0.5
        if turns:
            nn.init.orthogonal_(linear.weight, generator=seeded(seed + k))
        linear.bias.data = 0.3 * normal(sizes[k + 1], seed=100 * seed + 50 + k)
        parts += [linear, activation()]
    return nn.Sequential(*parts[:-1])


def question(net: nn.Module, count: int = 4, dtype=torch.float64):
    x = normal(count, 6, seed=7).to(dtype)
    with torch.no_grad():
        return x, net(x).argmax(dim=1)


def passes(net: nn.Module, x, labels, eps, method="crown-ibp", dtype=torch.float64, kind=BoundPass):
    problem = margin_problem(net, x, labels)
    with torch.no_grad():
        graph = problem.graph(dtype)
        eps = torch.as_tensor(eps, dtype=dtype).expand(len(x))
        perturbation = problem._perturbation(eps, torch.arange(len(x)), dtype)
        made = kind(graph, perturbation, method) if kind is BoundPass else kind(graph, perturbation)
    return made, problem.rows.to(dtype)


@torch.no_grad()
def attacked(net: nn.Module, x, labels, eps, steps: int = 60):
    """The least margins that gradient steps on the sphere find, (batch, 2), and all points that were met."""
    eps = torch.as_tensor(eps, dtype=x.dtype).expand(len(x))[:, None]
    others = torch.tensor([[k for k in range(3) if k != label] for label in labels.tolist()])
    least, met = torch.full((len(x), 2), torch.inf, dtype=x.dtype), [x]
    for row in range(2):
        for start in range(4):
            delta = torch.randn(x.shape, generator=seeded(start), dtype=torch.float64).to(x)
            for _ in range(steps):
                point = x + delta / delta.norm(dim=1, keepdim=True) * eps
                met.append(point)
                with torch.enable_grad():
                    at = point.clone().requires_grad_()
                    scores = net(at)
                    margin = (scores.gather(1, labels[:, None]) - scores.gather(1, others[:, row : row + 1])).squeeze(1)
                    (slope,) = torch.autograd.grad(margin.sum(), at)
                least[:, row] = torch.minimum(least[:, row], margin.detach())
                steepest = slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-9)
                delta = (point - x) / eps.clamp(min=1e-30) - 0.3 * steepest
    return least, torch.stack(met)


@torch.no_grad()
def check_sound(net: nn.Module, eps, x=None, labels=None) -> None:
    """Balls, boxes and margins of all kinds hold at points that an attack meets."""
    if x is None:
        x, labels = question(net)
    least, met = attacked(net, x, labels, eps)
    slack = 1e-12 * (1.0 + net(x).abs().amax())
    for method in ("ibp", "crown-ibp", "crown"):
        bounds, rows = passes(net, x, labels, eps, method)
        assert bounds.balls is not None
        assert (bounds.margin(rows) <= least + slack).all(), method
        values = bounds.graph._values(met.flatten(0, 1)[:, None])
        for node, value in zip(bounds.graph.nodes, values, strict=True):
            value = value.unflatten(0, met.shape[:2])
            ball = bounds.balls.of(node)
            distance = (value - ball.center).norm(dim=-1)
            assert (distance <= ball.radius * (1 + 1e-12) + ball.error.norm(dim=-1) + 1e-300).all(), (method, node)
            box = bounds.balls.box(node)
            if box is not None:
                assert ((value >= box[0]) & (value <= box[1])).all(), (method, node)
    bounds, rows = passes(net, x, labels, eps, kind=CurvedPass)
    assert (bounds.margin(rows) <= least + slack).all()
    values = bounds.graph._values(met.flatten(0, 1)[:, None])
    for node, operand in bounds._linear.items():
        weights = torch.cat((torch.eye(node.size), torch.ones(1, node.size))).to(x).expand(len(x), -1, -1)
        away = (values[node.index].unflatten(0, met.shape[:2]) - operand.center) ** 2
        reached = (weights @ away.unsqueeze(-1)).squeeze(-1).amax(dim=0)
        assert (reached <= bounds._ball_loss(node, weights) * (1 + 1e-9) + 1e-300).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("eps", [1e-3, 0.3, 3.0])
def test_nothing_is_broken_on_the_sphere(activation, eps):
    check_sound(net_of(activation, seed=1), eps)


@pytest.mark.parametrize("broken", ["norm", "multiplier", "share"])
def test_a_broken_version_is_caught(monkeypatch, broken):
    """A norm by half; a ball that costs nothing; a share that leaves out what the reaches add."""
    if broken == "norm":
        monkeypatch.setattr(balls, "spectral_norm", lambda weight: 0.5 * spectral_norm(weight))
    elif broken == "multiplier":
        inside = Balls._within
        monkeypatch.setattr(Balls, "_within", lambda self, node, ball: 0.3 * inside(self, node, ball))
    else:
        monkeypatch.setattr("utils.bounds.curve.squares_in_ball", lambda w, reach, radius: 0.0 * w.sum(dim=-1))
    with pytest.raises(AssertionError):
        for seed in range(6):
            check_sound(net_of(seed=seed), 0.7)


# --- degenerate cases -------------------------------------------------------------------------------------------------


def test_without_a_perturbation_margins_are_the_clean_ones():
    net = net_of()
    x, labels = question(net)
    eps = torch.tensor([0.0, 0.1, 0.0, 0.2], dtype=torch.float64)
    margins = certified_margin(net, x, labels, eps, method="ball")
    clean = certified_margin(net, x, labels, 0.0)
    assert torch.allclose(margins[::2], clean[::2], rtol=1e-9) and (margins[1::2] < clean[1::2]).all()
    check_sound(net, 0.0)


@pytest.mark.parametrize("kind", ["dead", "alive", "zero weights", "zero layer"])
def test_dead_neurons_and_zero_weights(kind):
    net = net_of(seed=2)
    with torch.no_grad():
        if kind == "zero weights":
            net[2].weight[3:] = 0.0
        elif kind == "zero layer":
            net[2].weight.zero_()
        else:
            net[2].bias += -50.0 if kind == "dead" else 50.0
    check_sound(net, 0.5)


@pytest.mark.parametrize("scale", [1e-100, 1e-8, 1e8, 1e60])
def test_huge_and_tiny_scales(scale):
    net = net_of(seed=3)
    x, labels = question(net)
    net[0].weight.data *= scale
    net[2].weight.data /= scale
    net[0].bias.data *= scale
    check_sound(net, 0.5, x, labels)
    bounds, rows = passes(net, x, labels, 0.5)
    reference, _ = passes(net_of(seed=3), x, labels, 0.5)
    if 1e-10 < scale < 1e10:
        assert torch.allclose(bounds.margin(rows), reference.margin(rows), rtol=1e-2)


def test_numbers_that_overflow_prove_nothing():
    net = net_of(seed=3)
    x, labels = question(net)
    net[0].weight.data *= 1e150
    net[2].weight.data *= 1e150
    margins = certified_margin(net, x, labels, 0.5, method="ball")
    assert not (margins > 0).any()


# --- norms, multipliers and shares ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (40, 3), (60, 60)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_are_above_the_truth_and_near(shape, scale, dtype):
    weight = (scale * normal(*shape, seed=5)).to(dtype)
    truth, bound = torch.linalg.matrix_norm(weight.double(), 2), spectral_norm(weight).double()
    assert truth <= bound * (1 + 1e-15) <= truth * (1 + (1e-5 if dtype == torch.float32 else 1e-10))
    assert spectral_norm(torch.zeros(shape, dtype=dtype)) == 0.0


def test_a_norm_against_sixty_digits():
    weight = normal(4, 6, seed=9)
    squares = mpmath.matrix(weight.tolist()) * mpmath.matrix(weight.tolist()).T
    truth = mpmath.sqrt(max(mpmath.eigsy(squares, eigvals_only=True)))
    assert truth <= mpmath.mpf(spectral_norm(weight).item())


def test_norms_have_the_gradient_of_norms():
    weight = normal(5, 7, seed=4).requires_grad_()
    (ours,) = torch.autograd.grad(spectral_norm(weight), weight)
    (theirs,) = torch.autograd.grad(torch.linalg.matrix_norm(weight, 2), weight)
    assert torch.allclose(ours, theirs)


def test_rows_of_three_neurons_against_a_dense_grid():
    """Of a layer that turns a ball of three dimensions: never above the least value, seldom far below it."""
    turn = torch.linalg.qr(normal(3, 3, seed=2))[0]
    ways = nn.functional.normalize(normal(20000, 3, seed=3), dim=-1)
    for seed in range(4):
        net = nn.Sequential(nn.Linear(3, 3).double(), nn.ReLU(), nn.Linear(3, 3).double())
        net[0].weight.data, net[0].bias.data = turn.clone(), 0.05 * normal(3, seed=seed)
        x = torch.zeros(1, 3, dtype=torch.float64)
        bounds, _ = passes(net, x, net(x).argmax(dim=1), 0.4)
        _, first, relu, _ = bounds.graph.nodes
        coefficients = normal(1, 50, 3, seed=seed)
        gain = bounds.balls.gain(relu, coefficients)[0]
        lower, upper = bounds.relaxation(relu)
        up, down = coefficients[0].clamp(min=0), coefficients[0].clamp(max=0)
        planes = up @ lower.intercept[0] + down @ upper.intercept[0]
        slopes = up * lower.slopes[0] + down * upper.slopes[0]
        points = first.value(x) + torch.cat((0.4 * ways, 0.2 * ways))
        least = (points.relu() @ coefficients[0].T - points @ slopes.T).amin(dim=0)
        assert (planes + gain <= least + 1e-12).all()
        good = gain > 1e-3
        assert (gain[good] / (least - planes)[good]).mean() > 0.95
        with pytest.raises(AssertionError):
            assert (planes + 2.0 * gain <= least + 1e-12).all()


def test_shares_of_a_ball_against_a_dense_search():
    """The bound is the greatest sum of squares itself: attained at the point that fills the heaviest first."""
    generator = seeded(1)
    for _ in range(30):
        weights = torch.rand(1, 4, 6, generator=generator, dtype=torch.float64)
        weights[..., 0] = 0.0
        reach = torch.rand(1, 6, generator=generator, dtype=torch.float64)
        radius = 2.0 * torch.rand(1, generator=generator, dtype=torch.float64)
        bound = squares_in_ball(weights, reach, radius)
        points = radius * nn.functional.normalize(normal(5000, 6, seed=3), dim=-1)
        points = torch.minimum(torch.maximum(points, -reach), reach)
        found = (weights[0] @ (points**2).mT).amax(dim=-1)
        assert (found <= bound[0] + 1e-12).all()
        left, exact = radius**2, torch.zeros(4, dtype=torch.float64)
        for row in range(4):
            left = float(radius**2)
            for k in weights[0, row].argsort(descending=True).tolist():
                taken = min(left, float(reach[0, k] ** 2))
                exact[row] += weights[0, row, k] * taken
                left -= taken
        assert torch.allclose(bound[0], exact)
    assert squares_in_ball(weights, reach, torch.zeros(1, dtype=torch.float64)).max() == 0.0


# --- what is gained, and where there are balls ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_never_looser_than_without(method, monkeypatch):
    net = net_of(seed=4, width=30, turns=True)
    x, labels = question(net)
    with_balls, rows = passes(net, x, labels, 0.5, method)
    monkeypatch.setattr(Balls, "fit", staticmethod(lambda *_: False))
    without, _ = passes(net, x, labels, 0.5, method)
    assert without.balls is None
    ours, theirs = with_balls.margin(rows), without.margin(rows)
    assert (ours >= theirs - 1e-12).all() and (ours > theirs + 1e-3).any()


def test_tuning_gains_and_ball_is_a_method():
    net = net_of(seed=5)
    x, labels = question(net)
    bounds, rows = passes(net, x, labels, 0.4)
    slopes, tuned = tune_slopes(bounds.graph, bounds.perturbation, rows, 10, method="crown-ibp")
    first = BoundPass(bounds.graph, bounds.perturbation, "crown-ibp", sound=False).margin(rows).amin(dim=1)
    assert (tuned >= first).all() and (tuned > first + 1e-4).any()
    margins = certified_margin(net, x, labels, 0.4, method="ball", alpha_steps=10)
    assert (margins.amin(dim=1) > bounds.margin(rows).amin(dim=1) + 1e-4).any()
    radii = certified_radius(net, x, labels, method="ball", tol=0.01)
    assert (radii > 0).all() and (attacked(net, x, labels, radii)[0] > 0).all()


def test_verdicts_by_balls():
    net = net_of(seed=5)
    x, labels = question(net)
    radii = certified_radius(net, x, labels, method="ball", tol=0.01)
    for k, decision in enumerate(decide(net, x, labels, 0.98 * radii, time_limit=20)):
        assert decision.verdict == "certified", k


def test_other_norms_and_networks_have_none():
    net = net_of()
    x, labels = question(net)
    for norm in (1.0, INF):
        problem = margin_problem(net, x, labels, norm=norm)
        assert problem.bounds(torch.ones(4).double(), torch.arange(4), torch.float64).balls is None
        with pytest.raises(ValueError, match="p = 2"):
            certified_margin(net, x, labels, 0.1, norm=norm, method="ball")
    for frames in (1, 3):
        rnn = classifier(activation="relu")
        sequences = normal(2, frames, 3, seed=0)
        perturbation = Perturbation(sequences, torch.ones(2, frames, dtype=torch.float64))
        assert not Balls.fit(unroll(rnn, frames), perturbation)
        with pytest.raises(ValueError, match="no recurrent cell"):
            certified_margin(rnn, sequences, rnn(sequences).argmax(dim=1), 0.1, method="ball")


def test_no_certificates_of_balls(tmp_path):
    rnn = classifier(activation="relu")
    x = normal(2, 1, 3, seed=0)
    with pytest.raises(ValueError, match="no rules for ball") as raised:
        save_certificates(tmp_path, rnn, x, rnn(x).argmax(dim=1), 0.01, method="ball")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_weights_get_gradients_through_balls():
    net = net_of(seed=6)
    x, labels = question(net)
    margins = certified_margin(net, x, labels, 0.3, method="ibp")
    with torch.no_grad():
        assert torch.allclose(margins, certified_margin(net, x, labels, 0.3, method="ibp"))
    (slope,) = torch.autograd.grad(margins.sum(), net[2].weight)
    move = normal(8, 8, seed=1)
    with torch.no_grad():
        changed = []
        for sign in (1.0, -1.0):
            net[2].weight += sign * 1e-6 * move
            changed.append(certified_margin(net, x, labels, 0.3, method="ibp").sum())
            net[2].weight -= sign * 1e-6 * move
    assert torch.allclose((slope * move).sum(), (changed[0] - changed[1]) / 2e-6, rtol=1e-3)
