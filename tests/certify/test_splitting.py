"""Splitting neurons: bounds of parts hold, parts cover the set, and what ends up certified is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from utils.bounds.alpha import default_slopes, select
from utils.bounds.passes import BoundPass
from utils.bounds.splits import CutPass, Cuts, Narrowed, Neurons, knot_of, tune_parts
from utils.certify import certified_margin, certified_radius, margin_problem
from utils.certify.bab import decide
from utils.certify.splitting import can_split, search, split_margins
from utils.certify.splitting.margins import question_of
from utils.certify.splitting.search import _Search
from utils.clock import now
from utils.graph.convolution import Convolution
from utils.graph.pooling import Pick
from utils.network import SequenceClassifier
from utils.perturbation.lp_ball import INF

DTYPE = torch.float64


def network(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "conv":
        layers = (nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 6), nn.ReLU())
        return nn.Sequential(*layers, nn.Linear(6, 3))
    if kind == "rnn":
        return SequenceClassifier(nn.RNN(2, 6, nonlinearity="relu", batch_first=True), nn.Linear(6, 3), pooling="mean")
    activation = nn.LeakyReLU(0.2) if kind == "leaky" else nn.ReLU()
    return nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 6), activation, nn.Linear(6, 3))


def question(kind: str, norm: float = INF, seed: int = 0, clip=None):
    model = network(kind, seed)
    x = torch.rand((1, 2, 2) if kind == "rnn" else (1, 4))
    return model, margin_problem(model, x, model(x).argmax(dim=1), method="alpha", norm=norm, clip=clip)


def points(problem, eps: Tensor, count: int = 4000) -> Tensor:
    """Of the set: corners, boundary and inside, (count, 4)."""
    x, norm = problem.x[0].to(DTYPE), problem.threat.norm
    moves = torch.randn(count, *x.shape, dtype=DTYPE)
    moves = moves.sign() if norm == INF else moves / moves.norm(dim=2, keepdim=True)
    found = (x + float(eps) * moves * torch.rand(count, 1, 1, dtype=DTYPE).round(decimals=1)).flatten(1)
    return found if problem.threat.clip is None else found.clamp(*problem.threat.clip)


def values(problem, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Of all neurons that can be cut, (points, neurons), and of the margins, (points, n_specs)."""
    graph = problem.graph(DTYPE)
    known = graph._values(inputs.unflatten(1, problem.x.shape[1:]))
    neurons = torch.cat([known[node.index] for node in Neurons(graph).nodes], dim=1)
    return neurons, known[graph.output.index] @ problem.rows[0].to(DTYPE).T


def cut_pass(problem, eps, cuts, slopes=None, kind=CutPass):
    graph, parts = problem.graph(DTYPE), len(cuts.neuron)
    same = torch.zeros(parts, dtype=torch.long)
    whole = problem.bounds(eps, same[:1], DTYPE)
    whole.margin(problem.rows.to(DTYPE))
    neurons = Neurons(graph)
    known = Narrowed({node.index: whole.interval(node) for node in neurons.nodes})
    slopes = select(default_slopes(whole), same) if slopes is None else slopes
    return kind(graph, problem._perturbation(eps.expand(parts), same, DTYPE), neurons, known, cuts, slopes)


def random_cuts(problem, parts: int, count: int, multipliers: float) -> Cuts:
    total = Neurons(problem.graph(DTYPE)).total
    neuron = torch.stack([torch.randperm(total)[:count] for _ in range(parts)])
    side = torch.randint(0, 2, (parts, count)) * 2.0 - 1.0
    neuron[0, 0] = -1  # a part with fewer cuts
    shape = (parts, count)
    return Cuts(neuron, side.to(DTYPE), torch.zeros(shape, dtype=DTYPE), multipliers * torch.rand(shape, dtype=DTYPE))


def broken_promises(problem, eps, cuts, passed) -> int:
    """Points of parts whose margins are below the parts' bounds, or that lie in parts said to be empty."""
    neurons, margins = values(problem, points(problem, eps))
    bound, broken = passed.margin(problem.rows.to(DTYPE)), 0
    for part in range(len(cuts.neuron)):
        mine = cuts.neuron[part] >= 0
        sides = cuts.side[part, mine] * (neurons[:, cuts.neuron[part, mine]] - cuts.point[part, mine])
        inside = (sides >= 0).all(dim=1)
        broken += int((margins[inside] < bound[part] - 1e-12).any(dim=1).sum())
    return broken


@pytest.mark.parametrize("kind", ["relu", "leaky", "conv", "rnn"])
@pytest.mark.parametrize("norm", [INF, 2.0])
def test_bounds_of_parts_hold_for_any_multipliers(kind, norm):
    for seed in range(3):
        _, problem = question(kind, norm, seed)
        eps = torch.tensor([0.3], dtype=DTYPE)
        for multipliers in (0.0, 0.3, 3.0):
            cuts = random_cuts(problem, 12, 3, multipliers)
            assert broken_promises(problem, eps, cuts, cut_pass(problem, eps, cuts)) == 0


class TurnedMultipliers(CutPass):
    """Broken: multipliers count for the other side."""

    def _multiplied(self, rows):
        self.cuts.multiplier.neg_()
        return super()._multiplied(rows)


class TurnedCuts(CutPass):
    """Broken: intervals are cut on the other side."""

    def _cut(self, node):
        self.cuts.side.neg_()
        found = super()._cut(node)
        self.cuts.side.neg_()
        return found


@pytest.mark.parametrize("network", ["relu", "rnn"])
@pytest.mark.parametrize("kind", [TurnedMultipliers, TurnedCuts])
def test_broken_versions_would_be_noticed(kind, network):
    broken = 0
    for seed in range(6):
        _, problem = question(network, INF, seed)
        eps = torch.tensor([0.3], dtype=DTYPE)
        cuts = random_cuts(problem, 12, 3, 1.0)
        copies = Cuts(cuts.neuron, cuts.side.clone(), cuts.point, cuts.multiplier.clone())
        broken += broken_promises(problem, eps, cuts, cut_pass(problem, eps, copies, kind=kind))
    assert broken > 0


def test_without_cuts_the_bound_is_that_of_the_same_planes():
    _, problem = question("relu")
    eps = torch.tensor([0.2], dtype=DTYPE)
    passed = cut_pass(problem, eps, Cuts.none(1, torch.empty(0, dtype=DTYPE)))
    whole = BoundPass(problem.graph(DTYPE), passed.perturbation, "crown")
    rows = problem.rows.to(DTYPE)
    assert torch.allclose(passed.margin(rows), whole.margin(rows), atol=1e-12)


def test_multipliers_gain():
    """With one neuron cut, the multiplier's bound is above that without, on some part of some network."""
    gains = []
    for seed in range(2):
        _, problem = question("relu", INF, seed)
        eps = torch.tensor([0.3], dtype=DTYPE)
        cuts = random_cuts(problem, 12, 2, 0.0)
        rows = problem.rows.to(DTYPE)[:, :1].expand(12, -1, -1)
        plain = cut_pass(problem, eps, cuts).margin(rows)[:, 0]

        def make(cuts, slopes, problem=problem, eps=eps):
            return cut_pass(problem, eps, cuts, slopes)

        tuned, _, best = tune_parts(make, rows, cuts, None, 20, torch.full((12,), torch.inf, dtype=DTYPE))
        assert (tuned.multiplier >= 0).all()
        finite = plain.isfinite()
        gains.append((best - plain)[finite])
        assert broken_promises(problem, eps, tuned, cut_pass(problem, eps, tuned)) == 0
    assert torch.cat(gains).min() >= -1e-12
    assert torch.cat(gains).max() > 1e-3


def exact_margins(problem, eps: Tensor) -> Tensor:
    """The worst margins, by gradient descent from many starts."""
    best = torch.full((problem.rows.shape[1],), torch.inf, dtype=DTYPE)
    graph, x = problem.graph(DTYPE), problem.x[0].flatten().to(DTYPE)
    with torch.no_grad():
        starts = points(problem, eps, 2000)
    for row in range(len(best)):
        inputs = starts.clone()
        for step in range(60):
            inputs.requires_grad_()
            margin = graph.evaluate(inputs.unflatten(1, problem.x.shape[1:])) @ problem.rows[0, row].to(DTYPE)
            best[row] = min(best[row], margin.detach().min())
            (slope,) = torch.autograd.grad(margin.sum(), inputs)
            inputs = inputs.detach() - float(eps) * 0.2 * 0.95**step * slope.sign()
            inputs = torch.maximum(torch.minimum(inputs, x + eps), x - eps)
    return best


@pytest.mark.parametrize("kind", ["relu", "leaky", "conv", "rnn"])
def test_with_time_margins_become_the_exact_ones(kind):
    for seed in range(2):
        _, problem = question(kind, INF, seed)
        eps = torch.tensor([0.3], dtype=DTYPE)
        exact = exact_margins(problem, eps)
        start = problem.margins(eps, DTYPE)[0]
        assert (start <= exact + 1e-9).all()
        aim = exact - 0.02 * (1.0 + exact.abs())
        found = split_margins(problem, eps, start, aim, now() + 60.0)
        assert (found <= exact + 1e-9).all()
        assert (found >= aim).all()


def test_no_convolution_becomes_a_matrix_where_neurons_are_split(monkeypatch):
    def refused(self):
        raise AssertionError("a convolution's matrix was asked for")

    monkeypatch.setattr(Convolution, "matrix", refused)
    model = network("conv")
    x = torch.rand(2, 4)
    verdicts = {one.verdict for one in decide(model, x, model(x).argmax(dim=1), 0.05, norm=INF, time_limit=5.0)}
    assert verdicts == {"certified"}


class Turned(nn.Module):
    """Neurons that are read with another sign, in part, and cut elsewhere than at 0."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(torch.cat(((-h).clamp(min=0.3), torch.relu(-h[:, 2:4])), dim=1))


@torch.no_grad()
def test_neurons_are_found_through_what_moves_them():
    torch.manual_seed(1)
    model, x = Turned().requires_grad_(False), torch.rand(1, 4)
    problem = margin_problem(model, x, model(x).argmax(dim=1), method="alpha", norm=INF)
    bounds = cut_pass(problem, torch.tensor([0.5], dtype=DTYPE), Cuts.none(1, torch.empty(0, dtype=DTYPE)))
    known = {}
    for node in bounds.graph.nodes:
        known[node.index] = x.double() if not node.parents else node.value(*(known[p.index] for p in node.parents))
    all_neurons = torch.cat([known[node.index] for node in bounds.neurons.nodes], dim=1)
    operands = [node.parents[0] for node in bounds.graph.nodes if knot_of(node) is not None]
    assert len(operands) == 2 and all(operand not in bounds.neurons.nodes for operand in operands)
    for operand in operands:
        numbers, sign = bounds.neurons.read_by(operand)
        torch.testing.assert_close(sign * all_neurons[:, numbers], known[operand.index])
    picked = Pick(operands[1], torch.tensor([1, 0, 1]))
    assert bounds.neurons.read_by(picked)[0].tolist() == bounds.neurons.read_by(operands[1])[0][[1, 0, 1]].tolist()
    bounds.margin(problem.rows.to(DTYPE))
    asked = question_of(problem, torch.tensor([0.5], dtype=DTYPE))
    searched = _Search(asked, *torch.zeros(2, problem.rows.shape[1]).double(), now())
    numbers, points, losses = searched._candidates(bounds)
    low, high = (torch.cat([bounds.interval(node)[end] for node in bounds.neurons.nodes], dim=1) for end in (0, 1))
    chosen = losses[0] > 0
    assert chosen.any() and (low[0, numbers] < points)[chosen].all() and (high[0, numbers] > points)[chosen].all()


def test_what_is_asked_for_too_much_is_never_reached():
    """Above the exact margin no number of parts helps: the search must not say so."""
    for seed in range(4):
        _, problem = question("relu", INF, seed)
        eps = torch.tensor([0.3], dtype=DTYPE)
        exact = exact_margins(problem, eps)
        found = split_margins(problem, eps, problem.margins(eps, DTYPE)[0], exact + 1e-6, now() + 2.0)
        assert (found <= exact + 1e-9).all()


def broken_at(problem, eps: float) -> bool:
    """Whether a point of the set at eps is classified otherwise."""
    _, margins = values(problem, points(problem, torch.tensor(eps), count=20_000))
    return bool((margins < 0).any())


def test_radii_grow_by_splitting_and_no_attack_is_inside(monkeypatch):
    """Nearly to the exact radius; with bounds that are too high, attacks are inside."""
    model, problem = question("relu", INF, 1)
    x, label = problem.x[:, 0], problem.rows[:, 0].argmax(dim=1)
    how = {"norm": INF, "dtype": DTYPE, "tol": 2e-2}
    planes = certified_radius(model, x, label, method="alpha", **how)
    monkeypatch.setattr("utils.certify.radius.curves_pay", lambda problem: False)
    found = float(certified_radius(model, x, label, method="bab", time_limit=8.0, **how))
    assert found > 1.01 * float(planes)
    assert not broken_at(problem, found) and broken_at(problem, 1.1 * found)
    own = search.split_rows
    monkeypatch.setattr("utils.certify.splitting.margins.split_rows", lambda *given: own(*given) + 0.3)
    assert broken_at(problem, float(certified_radius(model, x, label, method="bab", time_limit=8.0, **how)))


def test_halves_cover_their_part():
    _, problem = question("relu", INF, 1)
    eps = torch.tensor([0.3], dtype=DTYPE)
    start = problem.margins(eps, DTYPE)[0]
    searched = _Search(question_of(problem, eps), start, torch.full_like(start, torch.inf), now() + 60.0)
    for _ in range(4):
        searched._round(4)
    neurons, _ = values(problem, points(problem, eps))
    cuts = searched.open.cuts
    for row in searched.open.row.unique():
        covered = torch.zeros(len(neurons), dtype=torch.bool)
        for part in (searched.open.row == row).nonzero().squeeze(1):
            mine = cuts.neuron[part] >= 0
            sides = cuts.side[part, mine] * (neurons[:, cuts.neuron[part, mine]] - cuts.point[part, mine])
            covered |= (sides >= 0).all(dim=1)
        assert covered.all()


def test_offsets_and_clip():
    model, problem = question("relu", INF, 2, clip=(0.0, 1.0))
    eps = torch.tensor([0.4], dtype=DTYPE)
    start = problem.margins(eps, DTYPE)[0]
    found = split_margins(problem, eps, start, torch.full_like(start, torch.inf), now() + 1.0)
    _, margins = values(problem, points(problem, eps))
    assert (found >= start).all()
    assert (found <= margins.amin(dim=0) + 1e-12).all()
    problem.question.offsets = torch.full_like(problem.rows[..., 0], 5.0)
    moved = split_margins(problem, eps, start + 5.0, torch.full_like(start, torch.inf), now() + 1.0)
    assert (moved <= margins.amin(dim=0) + 5.0 + 1e-12).all()
    assert (moved >= start + 5.0).all()


def test_bab_decides_what_tuned_planes_leave_open():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    x = torch.rand(8, 6)
    labels, settled = model(x).argmax(dim=1), 0
    for eps in (0.15, 0.3, 0.5):
        alpha = (certified_margin(model, x, labels, eps, norm=INF, method="alpha") > 0).all(dim=1)
        for known, decision in zip(alpha, decide(model, x, labels, eps, norm=INF, time_limit=30.0), strict=True):
            assert not known or decision.verdict == "certified"
            settled += decision.verdict == "certified" and not bool(known)
            assert decision.verdict != "unknown"
    assert settled > 0


def test_networks_that_cannot_be_split():
    smooth = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.rand(1, 4)
    problem = margin_problem(smooth, x, smooth(x).argmax(dim=1), method="bab")
    eps = torch.tensor([0.1], dtype=torch.float64)
    assert not can_split(problem, eps)
    assert can_split(question("leaky")[1], eps)


def test_recurrent_networks_are_split_where_few_neurons_are_open():
    _, problem = question("rnn")
    assert can_split(problem, torch.tensor([1e-3], dtype=DTYPE))
    assert not can_split(problem, torch.tensor([1.0], dtype=DTYPE))


def test_modules_of_ones_own_are_known_to_be_recurrent():
    """Whichever way a network is read: its graph says so, in every precision."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.stock = network("rnn")

        def forward(self, x: Tensor) -> Tensor:
            return self.stock.head(self.stock.rnn(x)[0].mean(dim=1))

    torch.manual_seed(0)
    x = torch.rand(1, 2, 2)
    for model in (network("rnn"), Reader()):
        problem = margin_problem(model, x, model(x).argmax(dim=1), method="bab")
        assert all(problem.graph(dtype).recurrent for dtype in (torch.float32, DTYPE))
        assert not can_split(problem, torch.tensor([1.0], dtype=DTYPE))


def test_radii_of_recurrent_networks_grow_by_splitting(monkeypatch):
    """Whatever share of the neurons is open; with bounds that are too high, attacks are inside."""
    model, problem = question("rnn", INF, 0)
    x, label = problem.x, problem.rows[:, 0].argmax(dim=1)
    how = {"norm": INF, "dtype": DTYPE, "tol": 2e-2}
    planes = float(certified_radius(model, x, label, method="alpha", **how))
    monkeypatch.setattr("utils.certify.splitting.question.FEW", 1.0)
    found = float(certified_radius(model, x, label, method="bab", time_limit=4.0, **how))
    assert found > 1.01 * planes
    assert not broken_at(problem, found) and broken_at(problem, 1.1 * found)
    own = search.split_rows
    monkeypatch.setattr("utils.certify.splitting.margins.split_rows", lambda *given: own(*given) + 0.3)
    assert broken_at(problem, float(certified_radius(model, x, label, method="bab", time_limit=4.0, **how)))
