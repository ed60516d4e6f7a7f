"""Legal but odd questions: nothing to relax, nothing that moves, frames that are not read, terms that cancel."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from utils.bounds import passes as bounds
from utils.certify import MarginProblem, bab, certified_margin, certified_radius, margin_problem
from utils.certify.bab import decide
from utils.certify.case_problem import DTYPE
from utils.choices import ATTACKS, METHODS
from utils.network.models import SequenceClassifier

QUICK = {"alpha_steps": 2, "curve_steps": 2, "time_limit": 0.5}


def recurrent(dtype: torch.dtype = torch.float64) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 3)).to(dtype)


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 2)).double().requires_grad_(False)


class LeavesOut(nn.Module):
    """Does not read the first frame."""

    def __init__(self):
        super().__init__()
        self.inner = recurrent()

    def forward(self, x):
        return self.inner(x[:, 1:])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "parabola"])
def test_a_model_without_nonlinearities(method):
    """Radii are exact: margin over the norm of its gradient."""
    model, x = linear(), torch.rand(3, 1, 8, dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    weight = model[1].weight[0] - model[1].weight[1]
    exact = (model(x)[:, 0] - model(x)[:, 1]).abs() / weight.norm()
    radius = certified_radius(model, x, labels, method=method, **QUICK)
    assert (radius <= exact).all() and torch.allclose(radius, exact, rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("ball", "fastlin", "parabola", "spectral")]
)
def test_a_sample_of_which_nothing_moves(method, batch_size):
    model, x = recurrent(), torch.rand(2, 4, 3, dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    mask = torch.tensor([[False, False, False, True], [False] * 4])
    search = {"batch_size": batch_size, "max_eps": 1e3}
    radius = certified_radius(model, x, labels, frames=mask, method=method, **search, **QUICK)
    assert 0.0 < radius[0] < 1e3 and radius[1] == 1e3


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
def test_a_frame_that_is_not_read(norm):
    model, x = LeavesOut(), torch.rand(2, 3, 3, dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    plain = certified_radius(model, x, labels, norm=norm)
    for method in ("alpha", "curve", "bab"):
        radius = certified_radius(model, x, labels, norm=norm, method=method, **QUICK | {"time_limit": 0.1})
        assert (radius >= plain * (1.0 - 2e-3)).all()
    inner = certified_radius(model.inner, x[:, 1:], labels, norm=norm)
    assert torch.allclose(plain, inner, rtol=2e-3)
    assert [found.verdict for found in decide(model, x, labels, 1.5 * plain, norm=norm, time_limit=0.2)]


def test_every_sample_has_its_own_mask_in_decide():
    model, x = recurrent(), torch.rand(2, 4, 3, dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    masks = torch.tensor([[True, False, False, False], [False, False, False, True]])
    eps = 4.0
    together = decide(model, x, labels, eps, frames=masks, time_limit=1.0)
    apart = [decide(model, x[n : n + 1], labels[n : n + 1], eps, frames=masks[n], time_limit=1.0)[0] for n in (0, 1)]
    assert [one.verdict for one in together] == [one.verdict for one in apart]
    for n, one in enumerate(together):
        if one.counterexample is not None:
            assert torch.equal(one.counterexample[~masks[n]], x[n][~masks[n]])


def test_a_valid_range_that_float32_rounds():
    """0.1 in float32 is above 0.1."""
    model, x = recurrent(torch.float32), torch.rand(2, 4, 3).clamp(max=0.1)
    labels = model(x).argmax(dim=1)
    threat = {"norm": math.inf, "clip": (0.0, 0.1)}
    assert (certified_radius(model, x, labels, **threat) > 0).all()
    assert certified_margin(model, x, labels, 0.01, dtype=torch.float64, **threat).isfinite().all()
    assert len(decide(model, x, labels, 0.01, time_limit=1.0, **threat)) == 2


@pytest.mark.parametrize("size", [1.0, 1e4, 1e7, 1.7e9])
def test_terms_that_cancel_do_not_certify(size):
    """A bias cancels W x, so that the margin's sign is lost in rounding: what is certified must be positive exactly."""
    model, certified = linear(), 0
    first = model[1]
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        first.weight[:] = torch.randn(2, 8, generator=generator, dtype=torch.float64)
        x = size * (1.0 + torch.rand(1, 1, 8, generator=generator, dtype=torch.float64))
        first.bias[:] = -(first.weight @ x.flatten())
        first.bias[0] += 4e-15 * size * torch.randn(1, generator=generator, dtype=torch.float64)[0]
        exact = Fraction(0)
        for row, sign in ((0, 1), (1, -1)):
            for w, v in zip(first.weight[row].tolist(), x.flatten().tolist(), strict=True):
                exact += sign * Fraction(w) * Fraction(v)
        exact += Fraction(float(first.bias[0])) - Fraction(float(first.bias[1]))
        label = torch.tensor([0])
        radius = float(certified_radius(model, x, label, norm=math.inf))
        verdict = decide(model, x, label, 1e-12 * size, norm=math.inf, time_limit=0.5)[0].verdict
        certified += radius > 0 or verdict == "certified"
        assert exact > 0 or (radius == 0 and verdict != "certified")
    assert certified == 0


def test_the_slack_grows_with_the_terms():
    model, x = recurrent(), torch.rand(2, 4, 3, dtype=torch.float64)
    problem = margin_problem(model, x, model(x).argmax(dim=1))
    slack, margins = problem.slack(DTYPE), problem.clean_margins(DTYPE)
    assert slack.shape == margins.shape and (slack >= 1e-9 * (1.0 + margins.abs())).all()
    with torch.no_grad():
        model.head.bias += 1e6
    assert (margin_problem(model, x, model(x).argmax(dim=1)).slack(DTYPE) >= slack).all()


def test_terms_are_those_of_the_last_layer():
    model, x = recurrent(), torch.rand(2, 4, 3, dtype=torch.float64)
    labels = model(x).argmax(dim=1)
    problem = margin_problem(model, x, labels)
    with torch.no_grad():
        state = model.rnn(x)[0][:, -1]
        factors = problem.rows.double() @ model.head.weight
        terms = (factors.abs() @ state.abs().unsqueeze(-1)).squeeze(-1)
        terms = terms + (problem.rows.double() * model.head.bias).abs().sum(dim=-1)
    assert torch.allclose(problem.slack(DTYPE), 1e-9 * (1.0 + terms), rtol=1e-12)


@pytest.mark.parametrize("eps", [0.1, 0.7])
def test_the_bounds_of_a_decision_hold_for_all_that_is_attacked(monkeypatch, eps):
    """Float32 rounds 0.7 down and 0.1 up."""
    model, x = recurrent(torch.float32), torch.rand(2, 4, 3)
    asked, attacked = [], []
    bound, attack = bab.certify_until, ATTACKS["pgd"]
    monkeypatch.setattr(bab, "certify_until", lambda *args: asked.append(args[1]) or bound(*args))
    monkeypatch.setitem(ATTACKS, "pgd", lambda *args, **how: attacked.append(args[3]) or attack(*args, **how))
    decide(model, x, model(x).argmax(dim=1), eps, frames=3, dtype=torch.float32, time_limit=1.0)
    assert len(attacked) == 2 and all(float(radius) == eps for radius in attacked)
    assert all(radius.dtype == torch.float32 and eps <= float(radius) < eps + 1e-7 for radius in asked)
    assert asked


def test_an_endless_search_is_refused():
    model, x = recurrent(), torch.rand(1, 4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="max_eps"):
        certified_radius(model, x, model(x).argmax(dim=1), max_eps=math.inf)


@pytest.mark.parametrize("dtype, spacing", [(torch.float32, 2.0**-23), (DTYPE, 2.0**-52)])
def test_a_radius_that_floats_do_not_resolve_is_none(monkeypatch, dtype, spacing):
    """The margin is 16 and falls by 2 in an eighth of the spacing of floats at x = 1; rounding is left aside."""
    monkeypatch.setattr(bounds, "Rounding", lambda passed: None)
    monkeypatch.setattr(MarginProblem, "slack", lambda *_: torch.full((1, 1), 2.0, dtype=DTYPE))
    model, x, label = linear(), torch.ones(1, 1, 8, dtype=dtype), torch.tensor([0])
    model[1].weight[:], model[1].bias[:] = 0.0, 0.0
    model[1].weight[0, 0], model[1].bias[0] = -16.0 / spacing, 16.0 / spacing + 16.0
    found = [decide(model, x, label, eps, time_limit=0.5)[0].verdict for eps in (0.5 * spacing, 0.0)]
    assert found == ["unknown", "certified"] and float(certified_radius(model, x, label)) == 0.0
    monkeypatch.setattr(MarginProblem, "resolution", lambda *_: torch.zeros(1))
    assert 0.87 * spacing < float(certified_radius(model, x, label)) < 0.875 * spacing
    assert decide(model, x, label, 0.5 * spacing, time_limit=0.5)[0].verdict == "certified"
