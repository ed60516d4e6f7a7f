"""Margins and radii by integrated gradients: no attack inside, never below what they are made of, and refusals."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import THREATS, Threat, attack, check_below, classifier, dense, framed, lowest_margins, normal
from nets import NETS, frames_of, gated, gradients_of, perceptron
from torch import nn

from utils.certify import certified_margin, certified_radius, sweep
from utils.certify.certificate import write_certificates
from utils.certify.problem import margin_problem
from utils.graph import Graph, Linear
from utils.graph.nonlinear import Activation
from utils.jacobian.shells import Shells
from utils.network.symbolic import as_graph
from utils.perturbation.lp_ball import INF

METHODS = ("jacobian", "shell", "fastlin", "spectral")
TOL = 1e-3


@functools.cache
def net(name: str) -> Graph:
    return NETS[name]()


def inputs(graph: Graph, batch: int = 3) -> torch.Tensor:
    return (0.4 * normal(batch, frames_of(graph), graph.frames[0].size, seed=60)).clamp(-1.0, 1.0)


def winners(graph: Graph, x: torch.Tensor) -> torch.Tensor:
    return graph.evaluate(x).argmax(dim=1)


def arguments(threat: Threat) -> dict:
    return {"norm": threat.norm, "ball": threat.ball, "clip": threat.clip}


def check_radius(graph: Graph, x, labels, radius, threat: Threat) -> None:
    """Fail if an attack finds a point of the ball of that radius at which another class is as likely."""
    eps = radius[:, None].expand(x.shape[:2])
    rows = margin_problem(graph, x, labels).rows.double()
    found = lowest_margins(graph, x, eps, rows, threat)
    for row in rows.unbind(1):
        points = attack(lambda y, row=row: (row * graph.evaluate(y)).sum(-1), x, eps, threat, steps=30, starts=2)
        found = torch.minimum(found, torch.einsum("brc,bc->br", rows, graph.evaluate(points)))
    assert (found[radius > 0] > 0).all(), "an attack inside the radius"


# --- radii ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "threat"),
    [
        *(("relu", threat) for threat in THREATS),
        *(("perceptron, hardtanh(-0.7, 0.9)", threat) for threat in THREATS if threat.ball == "frame"),
        ("lstm", Threat(2.0, "sequence")),
    ],
    ids=str,
)
def test_no_attack_inside_a_radius_and_shell_is_above_what_it_takes_in(name, threat):
    graph = net(name)
    x = inputs(graph)
    labels = winners(graph, x)
    radii = {m: certified_radius(graph, x, labels, method=m, **arguments(threat)) for m in ("crown", *METHODS[:2])}
    for radius in radii.values():
        assert (radius > 0).all() and radius.isfinite().all()
    for method in METHODS[:2]:
        check_radius(graph, x, labels, radii[method], threat)
    assert (radii["shell"] >= radii["crown"] * (1.0 - TOL)).all()
    assert (radii["shell"] >= radii["jacobian"] * (1.0 - 0.02)).all()  # their shells are not the same


def uncut(self, start, whole=Shells.ends):
    return whole(self._replace(scaled=True), start)


def test_cut_boxes_are_no_shares_of_each_other(monkeypatch):
    """A margin that falls by a step near the range's end falls at once, not evenly: a straight line is no bound."""
    linear = nn.Linear(2, 2, bias=False).double().requires_grad_(False)
    linear.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    x, labels = torch.tensor([[0.04, 1.0]]).double(), torch.tensor([0])
    for method in METHODS[:2]:
        radius = certified_radius(linear, x, labels, norm=INF, clip=(0.0, 1.0), method=method)
        assert (radius > 0.9).all() and (radius < 1.0).all()
    problem = margin_problem(linear, x, labels, norm=INF, clip=(0.0, 1.0), method="jacobian")
    coarse = (problem, torch.tensor([0]), torch.tensor([10.0]), torch.tensor([0.05, 1.0]).double(), torch.float64)
    assert sweep._sweep(*coarse).low <= 1.0
    monkeypatch.setattr(Shells, "ends", uncut)
    assert sweep._sweep(*coarse).low > 5.0


@pytest.mark.parametrize("method", METHODS[:2])
def test_whole_range_of_pixels(method):
    graph = perceptron("relu", (6, 5), inputs=5, seed=9)
    x = (0.5 + 0.3 * normal(4, 1, 5, seed=61)).clamp(0.0, 1.0)
    labels, threat = winners(graph, x), Threat(INF, clip=(0.0, 1.0))
    radius = certified_radius(graph, x, labels, method=method, **arguments(threat))
    check_radius(graph, x, labels, radius, threat)
    uncut_radius = certified_radius(graph, x, labels, method=method, norm=INF)
    assert (radius >= uncut_radius * 0.95).all()  # a smaller set, bounded with coarser ends


@pytest.mark.parametrize("method", METHODS[:2])
def test_an_end_that_is_too_far_is_noticed(method, monkeypatch):
    graph = net("perceptron, tanh")
    x = inputs(graph)
    labels, threat = winners(graph, x), Threat(2.0)
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "shells_of", lambda *a, whole=sweep.shells_of, **k: lowered(whole(*a, **k)))
        radius = certified_radius(graph, x, labels, method=method)
        with pytest.raises(AssertionError, match="inside the radius"):
            check_radius(graph, x, labels, radius, threat)


def lowered(shells: Shells) -> Shells:
    return shells._replace(falls=0.3 * shells.falls)


@pytest.mark.parametrize("method", METHODS)
def test_misclassified_samples_have_radius_zero(method):
    graph = net("relu")
    x = inputs(graph, 4)
    labels = winners(graph, x)
    labels[1::2] = (labels[1::2] + 1) % 3
    radius = certified_radius(graph, x, labels, method=method)
    assert (radius[1::2] == 0).all() and (radius[::2] > 0).all()


@pytest.mark.parametrize("method", METHODS[:2])
def test_dead_nets_are_certified_up_to_max_eps(method):
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardtanh(), nn.Linear(4, 2)).double().requires_grad_(False)
    model[2].weight.zero_()
    model[2].bias.copy_(torch.tensor([1.0, 0.0]))
    x, labels = normal(2, 3, seed=62), torch.tensor([0, 1])
    radius = certified_radius(model, x, labels, method=method, max_eps=50.0)
    torch.testing.assert_close(radius, torch.tensor([50.0, 0.0]).double())
    tight = certified_radius(net("relu"), inputs(net("relu")), winners(net("relu"), inputs(net("relu"))), max_eps=1e-4)
    torch.testing.assert_close(tight, torch.full((3,), 1e-4).double())


def test_radii_do_not_end_at_the_linear_radius():
    """Where the gradient at x is 0, that says nothing of how far bounds reach."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double().requires_grad_(False)
    for parameter, value in zip(model.parameters(), ([[1.0]], [-30.0], [[-1.0], [0.0]], [1.0, 0.0]), strict=True):
        parameter.copy_(torch.tensor(value))
    radius = certified_radius(model, torch.zeros(1, 1).double(), torch.tensor([0]), method="jacobian")
    assert 30.0 <= radius.item() <= 31.0


def test_wide_inputs():
    graph = perceptron("relu", (8, 8), inputs=300, seed=3)
    x = 0.3 * normal(2, 1, 300, seed=63)
    labels = winners(graph, x)
    for norm in (1.0, 2.0, INF):
        threat = Threat(norm)
        radii = {m: certified_radius(graph, x, labels, method=m, norm=norm) for m in METHODS[:2]}
        for radius in radii.values():
            check_radius(graph, x, labels, radius, threat)
        assert (radii["shell"] >= radii["jacobian"] * 0.98).all()


def test_lengths_and_targets_and_float32():
    model = classifier(pooling="mean")
    x, lengths = 0.4 * normal(3, 3, 3, seed=64), torch.tensor([3, 1, 2])
    alone = [model(x[k : k + 1, :length]).argmax().item() for k, length in enumerate(lengths.tolist())]
    labels = torch.tensor(alone)
    for method in METHODS[:2]:
        whole = certified_radius(model, x, labels, method=method, lengths=lengths)
        parts = [
            certified_radius(model, x[k : k + 1, :n], labels[k : k + 1], method=method)
            for k, n in enumerate(lengths.tolist())
        ]
        torch.testing.assert_close(whole, torch.cat(parts), rtol=2e-2, atol=0.0)
        targets = (labels[:, None] + torch.arange(1, 3)) % 3
        each = [certified_radius(model, x, labels, method=method, lengths=lengths, targets=t) for t in targets.T]
        torch.testing.assert_close(torch.stack(each).amin(dim=0), whole, rtol=2e-2, atol=0.0)
        single = certified_radius(model, x, labels, method=method, lengths=lengths, dtype=torch.float32)
        torch.testing.assert_close(single.double(), whole, rtol=5e-2, atol=0.0)
        # Frames after the end do not count.
        changed = x + 9.0 * (torch.arange(3) >= lengths[:, None])[..., None]
        torch.testing.assert_close(certified_radius(model, changed, labels, method=method, lengths=lengths), whole)


# --- margins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["relu", "perceptron, leaky_relu(0.2)"])
def test_margins_are_below_what_an_attack_finds(name, method):
    graph = net(name)
    x = inputs(graph)
    labels = winners(graph, x)
    rows = margin_problem(graph, x, labels).rows.double()
    eps = torch.tensor([[0.3, 0.0, 0.1], [0.0, 0.0, 0.0], [0.05, 0.2, 0.4]]).double()[:, : frames_of(graph)]
    for threat in (Threat(1.0), Threat(2.0), Threat(INF), Threat(INF, clip=(-1.0, 1.0))):
        for dtype in (torch.float32, torch.float64):
            margins = certified_margin(graph, x, labels, eps, method=method, dtype=dtype, **arguments(threat))
            assert margins.dtype == dtype and margins.isfinite().all()
            found = lowest_margins(graph, x, eps, rows, threat)
            room = 1e-4 if dtype == torch.float32 else 0.0
            check_below(margins.detach().double() - room, found, f"{method} margin")


def test_margins_of_the_shell_rule_are_the_greater_ones():
    graph = net("lstm")
    x = inputs(graph)
    for eps in (0.05, 0.3):
        crown, integrated, both = (
            certified_margin(graph, x, winners(graph, x), eps, method=m) for m in ("crown", "jacobian", "shell")
        )
        check_below(torch.maximum(crown, integrated), both + 1e-9, "crown or jacobian")


def test_more_shells_are_nearer_to_the_integral():
    """D(s) = s^2: the sum of shares of (k / n)^2 goes to the integral of s, which takes off a half."""
    start = torch.ones(1, 1).double()
    errors = []
    for count in (5, 50, 500):
        shares = torch.arange(1, count + 1).double() / count
        shells = Shells(shares, (shares**2)[None, :, None], None, True)
        bounds = shells.bounds(start)
        assert (bounds[0, :, 0] <= 1.0 - 0.5 * shares**2).all()
        errors.append((0.5 - bounds[0, -1, 0]).item())
    assert 0 < errors[2] < errors[1] < errors[0] < 0.2


def test_falls_that_are_not_known_certify_nothing():
    shares = torch.tensor([0.5, 1.0]).double()
    for scaled in (True, False):
        for fall in (torch.nan, torch.inf):
            falls = torch.tensor([0.1, fall]).double()[None, :, None]
            ends = Shells(shares, falls, None, scaled).ends(torch.ones(1, 1).double())
            torch.testing.assert_close(ends, torch.full((1, 1), 0.5).double())


# --- fastlin ----------------------------------------------------------------------------------------------------------


def test_fastlin_is_crown_where_slopes_agree_and_below_it_elsewhere():
    """A tiny ball leaves no neuron unsure; in larger ones lower lines differ."""
    graph = net("perceptron, relu")
    x = inputs(graph)
    labels = winners(graph, x)
    tiny = [certified_margin(graph, x, labels, 1e-6, method=m) for m in ("fastlin", "crown")]
    torch.testing.assert_close(*tiny, rtol=1e-9, atol=1e-12)
    large = [certified_margin(graph, x, labels, 0.8, method=m) for m in ("fastlin", "crown")]
    assert not torch.allclose(*large, rtol=1e-3)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    (line,) = str(error.value).splitlines()
    return line


def test_what_does_not_fit_is_refused_in_a_line(tmp_path):
    model, x, labels = classifier(), 0.4 * normal(3, 3, 3, seed=64), torch.tensor([0, 1, 2])
    assert "take crown" in refused(lambda: certified_margin(model, x, labels, 0.1, method="fastlin"))
    assert "take crown" in refused(lambda: certified_radius(gated(nn.LSTM), x, labels, method="fastlin"))
    assert "chain must be one of" in refused(lambda: certified_margin(model, x, labels, 0.1, chain="cord"))
    assert "layers must be one of" in refused(lambda: certified_margin(model, x, labels, 0.1, layers="alpha"))
    for method in METHODS:
        problem = margin_problem(model, x, labels, method=method)
        line = refused(lambda problem=problem: write_certificates(tmp_path, problem, torch.full((3,), 0.1), ["a"] * 3))
        assert f"no rules for {method}" in line
    assert not list(tmp_path.iterdir())


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
@pytest.mark.parametrize(("activation", "method"), [("tanh", "jacobian"), ("relu", "jacobian"), ("tanh", "shell")])
def test_margins_are_differentiable(activation, method, norm):
    """In weights that two frames share, and in x."""
    x, labels = 0.4 * normal(1, 2, 2, seed=65), torch.tensor([1])

    def margins(weight, x):
        graph = Graph()
        frames = framed(graph, 2, 2)
        z = graph.add(Linear((frames[0],), (weight,), normal(2, seed=66)))
        z = graph.add(Linear((frames[1], graph.add(Activation(z, activation))), (weight, weight), normal(2, seed=67)))
        dense(graph, 2, graph.add(Activation(z, activation)), seed=68)
        return certified_margin(graph, x, labels, 0.5, norm=norm, method=method)

    weight = normal(2, 2, seed=71).requires_grad_()
    assert torch.autograd.gradcheck(margins, (weight, x.requires_grad_()), atol=1e-5, rtol=1e-3)
    parts = torch.autograd.grad(margins(weight, x).sum(), (weight, x))
    assert all(part.isfinite().all() and part.abs().amax() > 0 for part in parts)


@pytest.mark.parametrize("name", ["relu", "lstm", "gru, reset first", "tangled", "perceptron, sigmoid"])
def test_gradients_are_finite_also_where_nothing_moves(name):
    graph = as_graph(net(name), torch.float64)
    x = inputs(graph).requires_grad_()
    for norm in (1.0, 2.0, INF):
        for eps in (0.0, 0.2):
            margins = certified_margin(graph, x, winners(graph, x), eps, norm=norm, method="jacobian")
            (gradient,) = torch.autograd.grad(margins.sum(), x)
            assert gradient.isfinite().all() and gradient.abs().amax() > 0
    clean = gradients_of(graph, x, margin_problem(graph, x, winners(graph, x)).rows.double()).sum(1)
    margins = certified_margin(graph, x, winners(graph, x), 0.0, method="jacobian")
    torch.testing.assert_close(torch.autograd.grad(margins.sum(), x)[0], clean)
