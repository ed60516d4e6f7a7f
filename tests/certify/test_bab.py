"""Verdicts within a time limit: never wrong, a counter-example that holds, and time that is kept."""

from __future__ import annotations

import time

import pytest
import torch
from helpers import normal
from test_alpha import network, sequences
from torch import nn

from utils.attack.pgd import pgd
from utils.certify import certified_margin, certified_radius, margin_problem, search_radius
from utils.certify.bab import VERDICTS, decide
from utils.perturbation.lp_ball import INF


@pytest.mark.parametrize(("cell", "norm"), [(nn.RNN, 2.0), (nn.LSTM, INF), (nn.GRU, 1.0)])
def test_verdicts_agree_with_radii_and_attacks(cell, norm):
    model = network(cell)
    x, labels = sequences(model)
    radius = certified_radius(model, x, labels, norm=norm)
    for share in (0.5, 1.15, 30.0):
        eps, limit = share * radius, 1.0 if share < 1 else 0.3
        for decision, sample, label, size in zip(
            decide(model, x, labels, eps, norm=norm, time_limit=limit), x, labels, eps, strict=True
        ):
            assert decision.verdict in VERDICTS
            attacked = pgd(model, sample[None], label[None], float(size), norm=norm, restarts=8, seed=5).margin
            if decision.verdict == "certified":
                assert float(attacked) > 0
                assert float(decision.margins.min()) > 0
            if decision.verdict == "falsified":
                move = torch.linalg.vector_norm(decision.counterexample - sample, ord=norm, dim=-1)
                assert float(move.max()) <= float(size) * (1 + 1e-9)
                assert int(model(decision.counterexample[None]).argmax()) != int(label)
            else:
                assert decision.counterexample is None
            if share < 1:
                assert decision.verdict == "certified"


def test_one_score_is_decided_as_two_of_which_one_is_0():
    torch.manual_seed(4)
    one = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 1)).double().eval()
    pair = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 2)).double().eval()
    pair[1], last = one[1], pair[3]
    with torch.no_grad():
        last.weight.copy_(torch.cat((torch.zeros(1, 6), one[3].weight)))
        last.bias.copy_(torch.cat((torch.zeros(1), one[3].bias)))
    x = normal(8, 3, 3, seed=4)
    labels = (one(x)[:, 0] > 0).long()
    labels[0] = 1 - labels[0]
    how = {"norm": float("inf"), "time_limit": 0.5}
    verdicts = [[found.verdict for found in decide(model, x, labels, 0.1, **how)] for model in (one, pair)]
    assert verdicts[0] == verdicts[1] and {"certified", "falsified"} <= set(verdicts[0])
    for found, label in zip(decide(one, x, labels, 0.1, **how), labels, strict=True):
        if found.counterexample is not None:
            assert bool(one(found.counterexample[None]) > 0) != bool(label)


def test_a_misclassified_sample_is_its_own_counterexample():
    model = network(nn.RNN)
    x, labels = sequences(model)
    (decision,) = decide(model, x[:1], (labels[:1] + 1) % 3, 0.1, time_limit=1.0)
    assert decision.verdict == "falsified"
    assert float(decision.margins.min()) < 0


def test_time_that_is_up_leaves_the_question_open():
    model = network(nn.LSTM)
    x, labels = sequences(model)
    radius = certified_radius(model, x, labels)
    attack_free = next(
        n
        for n in range(len(x))
        if float(pgd(model, x[n : n + 1], labels[n : n + 1], 1.5 * float(radius[n])).margin) > 0
    )
    chosen = slice(attack_free, attack_free + 1)
    (decision,) = decide(model, x[chosen], labels[chosen], 1.5 * radius[chosen], time_limit=1e-9)
    assert decision.verdict == "unknown"


def test_radius_keeps_its_time_and_with_enough_of_it_is_that_of_curves():
    model = network(nn.GRU)
    x, labels = sequences(model)
    how = {"norm": INF, "alpha_steps": 4, "curve_steps": 6}
    curve = certified_radius(model, x[:1], labels[:1], method="curve", **how)
    started = time.perf_counter()
    bab = certified_radius(model, x[:1], labels[:1], method="bab", time_limit=6.0, **how)
    assert time.perf_counter() - started < 20.0  # what the limit is for takes a moment
    assert (bab >= 0.95 * curve).all()  # both are tuned, from then on not at the same eps
    assert (pgd(model, x[:1], labels[:1], bab, norm=INF).margin > 0).all()


def test_branches_are_the_rows_of_one_sample():
    model = network(nn.LSTM)
    x, labels = sequences(model)
    problem = margin_problem(model, x, labels, method="bab")
    branches = problem.part(torch.tensor([2])).branches()
    eps = torch.full((2,), 0.1, dtype=torch.float64)
    whole = problem.margins(eps[:1], torch.float64, torch.tensor([2]))
    assert torch.allclose(branches.margins(eps, torch.float64)[:, 0], whole[0], atol=1e-12)
    assert problem.x.shape == x.shape


def test_wrong_samples_have_radius_zero():
    model = network(nn.RNN)
    x, labels = sequences(model)
    problem = margin_problem(model, x[:1], (labels[:1] + 1) % 3, method="bab", time_limit=1.0, curve_steps=1)
    assert float(search_radius(problem).radius) == 0.0


def test_margins_are_refined_within_the_limit():
    model = network(nn.LSTM)
    x, labels = sequences(model)
    how = {"norm": 2.0, "alpha_steps": 2, "curve_steps": 2}
    curve = certified_margin(model, x[:1], labels[:1], 0.4, method="curve", **how)
    bab = certified_margin(model, x[:1], labels[:1], 0.4, method="bab", time_limit=6.0, **how)
    assert (bab >= curve).all()
    assert bool(bab.min() > curve.min())
    with pytest.raises(ValueError, match="time_limit"):
        decide(model, x, labels, 0.1, time_limit=0.0)
