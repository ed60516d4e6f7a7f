"""Time limits hold, on a clock that counts what bounds cost: a slow machine changes nothing."""

from __future__ import annotations

import time

import pytest
import torch
from test_alpha import network, sequences
from torch import nn

from utils import clock
from utils.bounds.curve import CurvedPass
from utils.bounds.passes import BoundPass
from utils.certify import certified_margin, certified_radius, decide, margin_problem, search_radius
from utils.certify.bab import best_margins
from utils.network.models import SequenceClassifier

# Seconds of a bound of one sample by planes, of an estimate by curves and of a bound by curves; with gradients thrice.
PLANES, ESTIMATE, BOUND = 0.05, 1.0, 12.0


@pytest.fixture
def spent(monkeypatch):
    """The seconds that bounds took, by their cost, in a list of one."""
    seconds, inner = [0.0], BoundPass.margin

    def margin(self, rows):
        cost = (BOUND if self._sound else ESTIMATE) if isinstance(self, CurvedPass) else PLANES
        seconds[0] += len(self.perturbation.x) * cost * (3.0 if torch.is_grad_enabled() else 1.0)
        return inner(self, rows)

    monkeypatch.setattr(BoundPass, "margin", margin)
    monkeypatch.setattr(clock, "CLOCK", lambda: seconds[0])
    return seconds


def ask(question: str, limit: float, **how) -> object:
    torch.manual_seed(0)
    model = network(nn.LSTM)
    x, labels = sequences(model)
    how = {"time_limit": limit} | how
    if question == "radius":
        return certified_radius(model, x[:2], labels[:2], method="bab", **how)
    if question == "margin":
        return certified_margin(model, x[:2], labels[:2], 0.2, method="bab", **how)
    return decide(model, x[:2], labels[:2], 0.25, **how)


@pytest.mark.parametrize("question", ["radius", "margin", "decide"])
@pytest.mark.parametrize("limit", [2.0, *(pytest.param(limit, marks=pytest.mark.full) for limit in (8.0, 60.0))])
def test_limits_hold_whatever_part_of_the_work_they_fall_in(question, limit, spent):
    ask(question, limit)
    assert spent[0] <= 2 * max(1.1 * limit, limit + 1.0)


@pytest.mark.parametrize(("question", "limit"), [("radius", 8.0), pytest.param("margin", 20.0, marks=pytest.mark.full)])
def test_a_pace_that_is_not_kept_is_noticed(question, limit, spent, monkeypatch):
    monkeypatch.setattr(clock.Pace, "allows", lambda self, pieces=1.0: clock.now() < self.deadline)
    ask(question, limit)
    assert spent[0] > 2 * max(1.1 * limit, limit + 1.0)


def test_more_time_gives_larger_radii_and_a_little_time_those_of_planes(spent):
    model = network(nn.LSTM)
    x, labels = sequences(model)
    plain = certified_radius(model, x[:1], labels[:1])
    found = [plain] + [
        certified_radius(model, x[:1], labels[:1], method="bab", time_limit=limit) for limit in (0.1, 30.0)
    ]
    assert found[0] == found[1] < found[2]


@pytest.mark.parametrize("method", ["alpha", "curve"])
@pytest.mark.parametrize("limit", [0.4, 1.5, pytest.param(60.0, marks=pytest.mark.full)])
def test_slopes_that_may_be_tuned_to_the_end_leave_time_to_bound_what_they_gain(method, limit, spent):
    model = network(nn.LSTM)
    x, labels = sequences(model)
    problem = margin_problem(model, x[:2], labels[:2], method=method, time_limit=limit)
    eps = torch.full((2,), 0.2, dtype=torch.float64)
    found = best_margins(problem, eps, torch.float64, alpha_share=1.0)
    assert spent[0] <= 2 * max(1.1 * limit, limit + 1.0)
    plain = certified_margin(model, x[:2], labels[:2], 0.2)
    assert (found >= plain).all() and (found > plain).any()


def test_a_limit_is_counted_from_the_start_of_each_sample(spent):
    model = network(nn.LSTM)
    x, labels = sequences(model)
    started = spent[0]
    problem = margin_problem(model, x[:2], labels[:2], method="bab", time_limit=26.0)
    search_radius(problem)
    assert 2 * 13.0 < spent[0] - started <= 2 * 28.6


@pytest.mark.full
def test_limits_hold_on_the_machines_own_clock():
    """A network whose curved bounds take a moment; what is measured depends on the machine, what is asked does not."""
    torch.manual_seed(0)
    lstm, head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 4)
    model = SequenceClassifier(lstm, head)
    x = torch.randn(1, 6, 8)
    labels = model(x).argmax(dim=1)
    for limit in (1.0, 6.0):
        started = time.perf_counter()
        certified_radius(model, x[:1], labels[:1], method="bab", time_limit=limit)
        assert time.perf_counter() - started <= max(1.1 * limit, limit + 1.0)
