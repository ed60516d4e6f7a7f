"""The radius search on margin functions that are smooth, stubborn or broken."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from utils.certify import MarginProblem, margin_problem, search_radius
from utils.certify.search import Bracket, foretold_radius, largest_certified
from utils.network.models import SequenceClassifier

TOL = 1e-3
RADII = torch.tensor([1e-12, 1e-5, 0.03, 1.0, 7.7, 1e5, 1e12], dtype=torch.float64)


class Recorder:
    """A margin function that remembers what it was asked, per sample."""

    def __init__(self, function, batch: int):
        self.function, self.seen = function, [[] for _ in range(batch)]

    def __call__(self, rows, eps):
        assert eps.shape == rows.shape and (eps > 0).all()
        margins = self.function(eps, rows)
        for row, e, margin in zip(rows.tolist(), eps.tolist(), margins.tolist(), strict=True):
            self.seen[row].append((e, margin))
        return margins


def search(function, radii=RADII, *, first=1.0, tol=TOL, **options) -> tuple[Bracket, Recorder]:
    """Search for every radius, and check that the bracket is made of evaluated points."""
    margin_of = Recorder(lambda eps, rows: function(eps, radii[rows]), len(radii))
    bracket = largest_certified(margin_of, torch.ones_like(radii), torch.full_like(radii, first), tol, **options)
    for low, high, margin, count, seen in zip(
        *(v.tolist() for v in (bracket.low, bracket.high, bracket.margin, bracket.evaluations)),
        margin_of.seen,
        strict=True,
    ):
        assert count == len(seen)
        assert low < high
        assert (low, margin) in seen if low > 0 else all(m <= 0 for _, m in seen)
        assert any(e == high and m <= 0 for e, m in seen) if high < math.inf else all(m > 0 for _, m in seen)
        assert low == 0.0 or margin > 0
    return bracket, margin_of


SMOOTH = {
    "linear": lambda eps, r: 1 - eps / r,
    "square": lambda eps, r: 1 - (eps / r) ** 2,
    "typical": lambda eps, r: 1 - (eps / r) ** 2.8,
    "slow and fast": lambda eps, r: 1 - 0.5 * (eps / r) - 0.5 * (eps / r) ** 4,
    "exponential": lambda eps, r: 1 - ((eps / r).clamp(max=500).exp() - 1) / (math.e - 1),
}
STUBBORN = {
    "step": lambda eps, r: torch.where(eps < r, 1.0, -1.0).double(),
    "cliff after a plateau": lambda eps, r: torch.where(eps < r, 1.0, -math.inf).double(),
    "hardly positive, hardly negative": lambda eps, r: torch.where(eps < r, 1.0, -1.0).double() * 1e-300,
    "root": lambda eps, r: 1 - (eps / r) ** 0.1,
    "very steep": lambda eps, r: 1 - (eps / r) ** 40,
    "zero is not certified": lambda eps, r: torch.where(eps < r, 0.3, 0.0).double(),
    "rises before it falls": lambda eps, r: 1 + eps / r - 2 * (eps / r) ** 6,
    "plateau at a tiny margin": lambda eps, r: torch.where(eps < 0.01 * r, 1.0, 1e-9 * (1 - eps / r)),
}


@pytest.mark.parametrize("first", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", [*SMOOTH, *STUBBORN])
def test_the_bracket_holds_the_radius_and_is_narrow(shape, first):
    bracket, _ = search({**SMOOTH, **STUBBORN}[shape], first=first)
    assert (bracket.low <= RADII).all() and (bracket.high >= RADII * (1 - 1e-12)).all()
    assert (bracket.high - bracket.low <= TOL * bracket.high).all()


@pytest.mark.parametrize("shape", SMOOTH)
def test_smooth_margins_take_few_evaluations(shape):
    radii = torch.linspace(1.0, 30.0, 50, dtype=torch.float64)
    bracket, _ = search(SMOOTH[shape], radii, first=1.0)
    assert bracket.evaluations.max() <= 12 and bracket.evaluations.double().mean() <= 10


def test_the_linearisation_saves_evaluations_and_a_scout_decides_nothing():
    radii = torch.linspace(1.0, 30.0, 50, dtype=torch.float64)
    linear = 3.0 * radii  # share = (eps / linear) exp(k eps)
    share = lambda eps, rows: eps / linear[rows] * (math.log(3.0) * eps / radii[rows]).exp()  # noqa: E731
    verdicts = Recorder(lambda eps, rows: 1.0 - share(eps, rows), 50)
    scouts = Recorder(lambda eps, rows: 1.0 - 1.0001 * share(eps, rows), 50)
    bracket = largest_certified(verdicts, torch.ones(50).double(), 0.1 * linear, TOL, scout=scouts, linear=linear)
    assert (bracket.high - bracket.low <= TOL * bracket.high).all()
    for low, high, seen in zip(bracket.low.tolist(), bracket.high.tolist(), verdicts.seen, strict=True):
        assert len(seen) == 2 and low in [e for e, m in seen if m > 0] and high in [e for e, m in seen if m <= 0]
    assert bracket.evaluations.double().mean() <= 7


@pytest.mark.parametrize("tol", [0.5, 1e-2, 1e-6, 1e-9])
def test_the_tolerance_is_kept(tol):
    for function in (SMOOTH["typical"], STUBBORN["step"]):
        bracket, _ = search(function, tol=tol)
        assert (bracket.high - bracket.low <= tol * bracket.high).all()


def test_a_margin_that_recovers_gives_a_point_that_certified():
    """Nothing is assumed of the margin: certified and failed points may alternate."""
    bracket, _ = search(lambda eps, r: torch.sin(10 * eps / r) + 0.2)
    assert (bracket.high - bracket.low <= TOL * bracket.high).all()


def test_noise_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    bracket, _ = search(lambda eps, r: 1 - eps / r + 0.02 * torch.randn(eps.shape, generator=generator).double())
    assert (bracket.high - bracket.low <= TOL * bracket.high).all()
    assert ((bracket.low / RADII - 1).abs() < 0.2).all()


def test_margins_that_never_fail_stop_at_the_largest_eps():
    bracket, _ = search(lambda eps, r: torch.ones_like(eps), max_eps=50.0)
    assert (bracket.low == 50.0).all() and bracket.high.isinf().all()
    bracket, _ = search(lambda eps, r: torch.ones_like(eps), first=100.0, max_eps=50.0)
    assert (bracket.low == 50.0).all() and (bracket.evaluations == 2).all()
    bracket, _ = search(lambda eps, r: torch.ones_like(eps))  # no limit: it ends all the same
    assert bracket.low.isfinite().all() and (bracket.low > 1e50).all()


def test_margins_that_never_certify_give_zero():
    bracket, _ = search(lambda eps, r: -torch.ones_like(eps))
    assert (bracket.low == 0).all() and (bracket.high < 1e-50).all()
    assert (bracket.margin == 1).all()


def test_a_radius_above_the_largest_eps():
    bracket, _ = search(SMOOTH["linear"], max_eps=1.0)
    above = RADII > 1.0
    assert (bracket.low[above] == 1.0).all() and bracket.high[above].isinf().all()
    assert (bracket.low <= 1.0).all() and bracket.high[~above].isfinite().all()


def test_misclassified_samples_cost_nothing():
    radii = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    at_zero = torch.tensor([1.0, 0.0, -1.0, 1.0]).double()
    margin_of = Recorder(lambda eps, rows: 1 - eps / radii[rows], 4)
    bracket = largest_certified(margin_of, at_zero, torch.ones(4).double(), TOL)
    assert bracket.low[1:3].tolist() == [0, 0] and bracket.evaluations[1:3].tolist() == [0, 0]
    assert bracket.margin[1:3].tolist() == [0, -1]
    assert not margin_of.seen[1] and not margin_of.seen[2]
    assert (bracket.low[[0, 3]] > 0.99 * radii[[0, 3]]).all()


def test_samples_do_not_affect_each_other():
    together, _ = search(SMOOTH["typical"])
    for number in range(len(RADII)):
        alone, _ = search(SMOOTH["typical"], RADII[number : number + 1])
        # Sums over one sample or many may round otherwise, which a forecast multiplies by little.
        torch.testing.assert_close(alone.low, together.low[number : number + 1], rtol=1e-9, atol=0.0)
        assert torch.equal(alone.evaluations, together.evaluations[number : number + 1])


def test_finished_samples_leave_the_batch():
    sizes = []

    def margin_of(rows, eps):
        sizes.append(len(rows))
        return torch.where(rows == 0, 1 - eps, torch.where(eps < 1e9, 1.0, -1.0).double())

    largest_certified(margin_of, torch.ones(5).double(), torch.ones(5).double(), TOL)
    assert sizes[0] == 10 and sizes[-1] == 8  # two eps a sample


def test_nan_is_an_error():
    with pytest.raises(ArithmeticError, match="NaN at eps = 2.5"):
        search(lambda eps, r: torch.where(eps < 2, 1.0, math.nan).double(), torch.ones(2).double())
    with pytest.raises(ArithmeticError, match="NaN"):
        search(lambda eps, r: torch.where(r > 1, math.nan, 1 - eps).double())


def test_an_empty_batch():
    bracket, _ = search(SMOOTH["linear"], RADII[:0])
    assert bracket.low.shape == (0,)


@pytest.mark.parametrize("shape", SMOOTH)
def test_radii_are_foretold_roughly_and_none_where_nothing_certifies(shape):
    radii = torch.tensor([0.03, 1.0, 7.7, 1e5], dtype=torch.float64)
    everything = {"linear": radii, "spread": 1.2}
    ones = torch.ones_like(radii)
    foretold = foretold_radius(lambda rows, eps: SMOOTH[shape](eps, radii[rows]), ones, 0.7 * radii, 1e-2, **everything)
    assert torch.allclose(foretold, radii, rtol=2e-2)
    assert (foretold_radius(lambda rows, eps: -eps, ones, radii, 1e-2, **everything) == 0.0).all()
    assert (foretold_radius(lambda rows, eps: 1.0 - eps, -ones, radii, 1e-2, **everything) == 0.0).all()


def test_calibrations_are_verdicts_that_count_and_are_left_out_for_misclassified_samples(monkeypatch):
    torch.manual_seed(0)
    model = SequenceClassifier(nn.RNN(3, 4, batch_first=True), nn.Linear(4, 3)).double()
    x = torch.randn(3, 3, 3, dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    labels[1] = (labels[1] + 1) % 3
    bounded, inner = [], MarginProblem._margins

    def counted(self, eps, chosen, dtype, sound):
        bounded.extend(chosen.tolist() if self.curves is not None and sound else [])
        return inner(self, eps, chosen, dtype, sound)

    monkeypatch.setattr(MarginProblem, "_margins", counted)
    how = {"alpha_steps": 1, "curve_steps": 3}
    curve = search_radius(margin_problem(model, x, labels, method="curve", **how))
    crown = search_radius(margin_problem(model, x, labels))
    assert 1 not in bounded and curve.evaluations[1] == crown.evaluations[1]
    bounds = torch.tensor([bounded.count(sample) for sample in range(3)])
    assert (curve.evaluations - crown.evaluations >= bounds).all() and bounds[0] % 2 == bounds[2] % 2 == 1
    assert torch.equal(curve.start, crown.radius) and (curve.radius >= curve.start).all()


def test_curve_is_not_behind_tuned_slopes_where_curves_gain_little(monkeypatch):
    torch.manual_seed(1)
    model = SequenceClassifier(nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 3)).double()
    model.rnn.weight_hh_l0.data.mul_(2.0)
    x = torch.randn(4, 4, 3, dtype=torch.float64)
    labels = model(x).argmax(dim=1)

    def radius(method: str) -> Tensor:
        return search_radius(margin_problem(model, x, labels, method=method, curve_steps=0)).radius

    tuned = radius("alpha")
    assert (radius("curve") >= tuned / 1.001).all()
    monkeypatch.setattr("utils.certify.radius.SURE_GAIN", 0.0)
    assert (radius("curve") < tuned / 1.001).any()  # curves alone do less


@pytest.mark.parametrize(("norm", "gain"), [(2.0, 1.5), (float("inf"), 1.3)])
def test_curve_is_not_behind_tuned_slopes_where_these_gain_much(norm, gain):
    """Deep relu networks, where slopes gain more than curves do, or than these begin with."""
    torch.manual_seed(1)
    layers, sizes = [nn.Flatten()], [10, *[15] * 6, 3]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        layers[-2].weight.data = gain * (2.0 / inputs) ** 0.5 * torch.randn(outputs, inputs)
        layers[-2].bias.data -= 0.3 * torch.rand(outputs)
    model = nn.Sequential(*layers[:-1]).double().requires_grad_(False)
    x = torch.randn(6, 1, 10, dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    crown, alpha, curve = (
        search_radius(margin_problem(model, x, labels, method=method, norm=norm)).radius
        for method in ("crown", "alpha", "curve")
    )
    assert (curve >= alpha / 1.001).all() and (curve > 1.01 * alpha).any() and (alpha > 1.1 * crown).any()


def test_estimates_take_what_tuning_found_of_their_own_samples_alone():
    torch.manual_seed(0)
    model = SequenceClassifier(nn.RNN(3, 4, batch_first=True), nn.Linear(4, 3)).double()
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        problem = margin_problem(model, x, model(x).argmax(dim=1), method="curve", norm=float("inf"))
        samples = torch.tensor([0, 2, 3])
        problem.tune_curves(torch.full((3,), 0.05, dtype=torch.float64), torch.float32, 2, samples)
        assert problem._guesses_of(torch.tensor([0, 1]), torch.float32) is None
        assert problem._guesses_of(torch.tensor([0]), torch.float64) is None  # another graph
        for node, guesses in problem._guesses_of(torch.tensor([3, 3, 0]), torch.float32).items():
            for name, (found, _) in problem._guessed[1][node]._found.items():
                assert torch.equal(guesses._found[name][0], found[[2, 2, 0]])
        assert problem.part(samples)._guessed is None
