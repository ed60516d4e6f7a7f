"""The cascade: every outcome is checked by independent calls, and broken cascades are caught by the same checks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import classifier, normal
from torch import nn

from utils.attack.pgd import AttackProblem, pgd
from utils.certify import Effort, cascade, certified_margin, decide, margin_problem
from utils.certify.cascade import CLEAN, DEFAULT_STAGES, OUTCOMES, STAGES, CascadeResult, run
from utils.certify.problem import MarginProblem
from utils.network.models import SequenceClassifier

INF = math.inf
DTYPE = torch.float64
QUICK = Effort(time_limit=0.1, total_limit=0.4, alpha_steps=4, curve_steps=4)
THREATS = {
    "inf": ({"norm": INF}, 0.1),
    "clip": ({"norm": INF, "clip": (-1.0, 1.0)}, 0.12),
    "sequence": ({"norm": 2.0, "ball": "sequence"}, 0.3),
    "one frame": ({"norm": 1.0, "frames": 1}, 0.6),
}


def question(batch=45, seed=3):
    """A net, inputs, and labels of which some are wrong."""
    model = classifier(seed=seed, hidden=6, gain=1.5)
    x = 0.5 * normal(batch, 3, 3, seed=seed).clamp(-2, 2)
    labels = model(x).argmax(dim=1)
    labels[::7] = (labels[::7] + 1) % 3
    return model, x, labels


def sizes(delta, norm, ball):
    parts = delta.flatten(1)[:, None] if ball == "sequence" else delta
    return parts.norm(p=norm, dim=-1).amax(dim=1)


def check(result, model, x, labels, eps, norm=2.0, ball="frame", frames=None, clip=None):
    """Fail unless every outcome is true: by the network itself, by an attack, and by a call of certified_margin."""
    threat = {"norm": norm, "ball": ball, "frames": frames, "clip": clip}
    right = model(x).argmax(dim=1) == labels
    assert len(result.outcomes) == len(x) and set(result.outcomes) <= set(OUTCOMES)
    for sample, (outcome, stage) in enumerate(zip(result.outcomes, result.settled_by, strict=True)):
        own = slice(sample, sample + 1)
        assert (outcome == "wrong") == (not right[sample]) == (stage == CLEAN)
        assert (outcome == "undecided") == (stage == "")
        if outcome == "broken":
            example = result.examples[sample][None]
            worst = AttackProblem(model, x[own], labels[own]).worst_margin(example)
            delta = example - x[own]
            assert float(worst) <= float(result.margins[sample]) + 1e-12 < 0  # a runner-up's, where that is broken
            assert float(sizes(delta, norm, ball)) <= eps and (frames is None or not delta[0, 0].any())
            assert clip is None or (clip[0] <= float(example.min()) and float(example.max()) <= clip[1])
    assert sorted(result.examples) == [n for n, outcome in enumerate(result.outcomes) if outcome == "broken"]
    for stage in {"ibp", "crown-ibp", "crown"} & set(result.settled_by):
        own = torch.tensor([name == stage for name in result.settled_by])
        bound = certified_margin(model, x[own], labels[own], eps, method=stage, **threat)
        slack = margin_problem(model, x[own], labels[own], **threat).slack(DTYPE)
        assert bool((bound > slack).all()), stage
        assert torch.allclose(result.margins[own], bound.amin(dim=1), rtol=1e-9)
    verified = torch.tensor([outcome == "verified" for outcome in result.outcomes])
    if verified.any():
        found = pgd(model, x[verified], labels[verified], eps, steps=30, restarts=6, seed=5, **threat)
        assert bool((found.margin >= result.margins[verified]).all()) and bool((found.margin > 0).all())
    undecided = torch.tensor([outcome == "undecided" for outcome in result.outcomes])
    assert not (undecided & (result.margins > 1e-6)).any()


@pytest.mark.parametrize("name", THREATS)
def test_every_outcome_is_true(name):
    threat, eps = THREATS[name]
    model, x, labels = question()
    result = cascade(model, x, labels, eps, effort=QUICK, **threat)
    check(result, model, x, labels, eps, **threat)
    assert {"wrong", "broken", "verified"} <= set(result.outcomes)
    assert len(set(result.settled_by)) >= 5  # the test is about several stages


def test_what_a_cascade_says_adds_up():
    model, x, labels = question()
    result = cascade(model, x, labels, 0.1, norm=INF, effort=QUICK)
    assert [cost.stage for cost in result.costs] == [CLEAN, *DEFAULT_STAGES]
    left = len(x)
    for cost in result.costs:
        assert cost.settled == result.count(cost.stage) <= cost.tried <= left
        assert cost.seconds >= 0 and cost.processor_seconds >= 0
        left -= cost.settled
    assert left == len(result.undecided) == result.outcomes.count("undecided")
    assert result.costs[0].tried == len(x) and result.costs[1].tried == len(x) - result.count(CLEAN)
    assert sum(result.share(outcome) for outcome in OUTCOMES) == pytest.approx(1.0)
    assert result.share("verified", "undecided") == pytest.approx(1 - result.share("wrong") - result.share("broken"))


def test_outcomes_are_those_of_samples_by_themselves():
    model, x, labels = question(batch=10)
    how = Effort(stages=("ibp", "runner-up", "crown"), patience=None)
    whole = cascade(model, x, labels, 0.1, norm=INF, effort=how)
    for sample in range(len(x)):
        own = slice(sample, sample + 1)
        alone = cascade(model, x[own], labels[own], 0.1, norm=INF, effort=how)
        assert (alone.outcomes[0], alone.settled_by[0]) == (whole.outcomes[sample], whole.settled_by[sample])


def test_cheap_passes_take_more_samples_at_once():
    """No coefficients, or those of the margins only, have to fit into a processor's cache."""
    torch.manual_seed(0)
    model = SequenceClassifier(nn.LSTM(4, 64, batch_first=True), nn.Linear(64, 10))
    problem = margin_problem(model, torch.rand(2, 3, 4), [0, 1])
    sizes = [problem.by(name).at_once(DTYPE) for name in ("crown", "crown-ibp", "ibp")]
    assert sizes == sorted(sizes) and sizes[0] < 20 < 100 < sizes[1] and sizes[2] > 500


def test_more_stages_decide_no_less_and_curve_can_be_asked_for():
    model, x, labels = question(batch=24)
    before = None
    for count in (2, 3, 4, 5, 8):
        effort = replace(QUICK, stages=STAGES[:count], patience=None)
        outcomes = cascade(model, x, labels, 0.1, norm=INF, effort=effort).outcomes
        if before is not None and STAGES[count - 1] not in ("alpha", "curve", "bab"):  # those depend on time
            assert all(old in ("undecided", new) for old, new in zip(before, outcomes, strict=True))
        before = outcomes


def test_a_stage_gives_up_after_so_many_in_vain(monkeypatch):
    """The most promising come first: those are settled, and patience only leaves out the others."""
    monkeypatch.setitem(run.AT_ONCE, "crown", 2)
    model, x, labels = question(batch=40)
    stages = ("runner-up", "crown")
    whole = cascade(model, x, labels, 0.15, norm=INF, effort=Effort(stages=stages, patience=None))
    some = cascade(model, x, labels, 0.15, norm=INF, effort=Effort(stages=stages, patience=6))
    assert some.costs[-1].tried < whole.costs[-1].tried
    assert 0 < some.costs[-1].settled <= whole.costs[-1].settled
    for few, all_ in zip(some.outcomes, whole.outcomes, strict=True):
        assert few in (all_, "undecided")


def test_tuned_stages_keep_their_limits(monkeypatch):
    asked, tuned = [], []
    bound, tune = run.certify_until, MarginProblem.tune
    monkeypatch.setattr(run, "certify_until", lambda *args: asked.append(args[2] - run.now()) or bound(*args))

    def watched(problem, *args, pace, **how):
        tuned.append(pace.deadline - run.now())
        return tune(problem, *args, pace=pace, **how)

    model, x, labels = question(batch=30)
    limits = {"time_limit": 0.05, "total_limit": 0.3, "patience": None}
    with monkeypatch.context() as patched:
        patched.setattr(MarginProblem, "tune", watched)
        alpha = cascade(model, x, labels, 0.12, norm=INF, effort=Effort(stages=("alpha",), **limits))
    assert tuned and max(tuned) <= 0.3 and alpha.costs[-1].seconds < 2.0
    result = cascade(model, x, labels, 0.12, norm=INF, effort=Effort(stages=("bab",), **limits))
    assert asked and max(asked) <= 0.05 and result.costs[-1].tried == len(asked) < 26
    assert result.costs[-1].seconds < 2.0 and result.count("") > 0


def test_tuned_slopes_settle_some_and_truly():
    model, x, labels = question()
    threat, eps = THREATS["inf"]
    effort = Effort(stages=("runner-up", "crown", "alpha"), patience=None)
    result = cascade(model, x, labels, eps, effort=effort, **threat)
    assert result.count("alpha") > 0
    check(result, model, x, labels, eps, **threat)


def test_an_eps_below_the_floats_of_x_verifies_nothing():
    model, x, labels = question(batch=10)
    how = Effort(stages=("ibp", "crown", "alpha"), total_limit=0.5)
    assert cascade(model, x.float(), labels, 1e-12, effort=how).share("verified") == 0
    assert cascade(model, x, labels, 1e-12, effort=how).share("verified") > 0
    assert cascade(model, x.float(), labels, 0.0, effort=how).share("verified") > 0


def test_any_module_and_radii_of_samples_and_frames():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.rand(20, 2, 3, dtype=DTYPE)
    labels = model(x).argmax(dim=1)
    eps = torch.linspace(0.001, 0.6, 20, dtype=DTYPE)
    result = cascade(model, x, labels, eps, norm=INF, effort=QUICK)
    assert result.outcomes[0] == "verified" and "broken" in result.outcomes
    network, x, labels = question(batch=12)
    by_frame = torch.tensor([0.0, 0.1, 0.0], dtype=DTYPE).expand(12, 3)
    result = cascade(network, x, labels, by_frame, norm=INF, effort=QUICK)
    check(result, network, x, labels, 0.1, norm=INF, frames=1)


class TwoScores(nn.Module):
    """0 and a score: a margin of these is the score, or minus it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        score = self.model(x)
        return torch.cat((torch.zeros_like(score), score), dim=1)


def test_one_score_is_two_of_which_one_is_0():
    torch.manual_seed(4)
    one = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 1)).double().eval()
    x = normal(30, 3, 3, seed=4)
    labels = (one(x)[:, 0] > 0).long()
    labels[::5] = 1 - labels[::5]
    effort = replace(QUICK, stages=("ibp", "runner-up", "pgd", "crown", "alpha"))
    for model in (one, nn.Sequential(one, nn.Sigmoid())):
        result = cascade(model, x, labels, 0.1, norm=INF, effort=effort)
        pairs = cascade(TwoScores(one), x, labels, 0.1, norm=INF, effort=effort)
        assert result.outcomes == pairs.outcomes and {"wrong", "broken", "verified"} <= set(result.outcomes)
        torch.testing.assert_close(result.margins, pairs.margins, rtol=1e-5, atol=1e-6)
        check(result, TwoScores(one), x, labels, 0.1, norm=INF)


class Masked(nn.Module):
    """Sums over the steps that count, of which each sample has a number of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x, lengths):
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        return self.last(torch.tanh(self.first(x) * mask[..., None]).sum(dim=1))


def test_samples_of_several_kinds():
    """Each is settled as it is by itself, and the shares of the time are those of a call."""
    torch.manual_seed(2)
    model, x = Masked().double().eval(), normal(20, 3, 3, seed=6)
    lengths = torch.tensor([3, 1, 2, 2, 3] * 4)
    labels = model(x, lengths).argmax(dim=1)
    labels[::6] = (labels[::6] + 1) % 3
    effort = replace(QUICK, stages=("ibp", "runner-up", "pgd", "crown"), patience=None)
    result = cascade(model, x, labels, 0.08, norm=INF, effort=effort, extra=lengths)
    assert set(result.outcomes) >= {"wrong", "broken", "verified"}
    assert [cost.stage for cost in result.costs] == [CLEAN, *effort.stages] and result.costs[0].tried == 20
    for k in range(len(x)):
        own = slice(k, k + 1)
        alone = cascade(model, x[own], labels[own], 0.08, norm=INF, effort=effort, extra=lengths[own])
        assert alone.outcomes == [result.outcomes[k]] and alone.settled_by == [result.settled_by[k]]
        torch.testing.assert_close(alone.margins, result.margins[own], rtol=1e-5, atol=1e-6)
        if k in result.examples:
            score = model(result.examples[k][None], lengths[own])[0]
            assert score.argmax() != labels[k] and float((result.examples[k] - x[k]).abs().max()) <= 0.08


def test_a_class_in_every_step():
    """A sample is wrong if any step is, broken if any can be, and verified if none."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x = normal(16, 2, 3, seed=8)
    labels = model(x).argmax(dim=2)
    labels[0, 1], labels[1, 0] = (labels[0, 1] + 1) % 3, -100
    effort = replace(QUICK, stages=("ibp", "runner-up", "pgd", "crown"), patience=None)
    result = cascade(model, x, labels, 0.15, norm=INF, effort=effort)
    assert result.outcomes[0] == "wrong" and result.outcomes.count("wrong") == 1
    attacked = pgd(model, x, labels, 0.15, norm=INF, steps=40, restarts=4).margin < 0
    bounded = certified_margin(model, x, labels, 0.15, norm=INF).amin(dim=(1, 2)) > 0
    for outcome, broken, safe in zip(result.outcomes[1:], attacked[1:], bounded[1:], strict=True):
        assert outcome == ("broken" if broken else "verified" if safe else "undecided")
    assert bool(attacked[1:].any()) and bool(bounded.any())
    verdicts = [found.verdict for found in decide(model, x[:4], labels[:4], 0.15, norm=INF, time_limit=0.3)]
    assert verdicts[0] == "falsified"
    for verdict, outcome in zip(verdicts[1:], result.outcomes[1:4], strict=True):
        assert (verdict, outcome) not in (("certified", "broken"), ("falsified", "verified"))


@pytest.mark.parametrize(
    "words, make",
    [
        ("unknown stage", lambda: Effort(stages=("ibp", "magic"))),
        ("from cheap to dear", lambda: Effort(stages=("crown", "ibp"))),
        ("patience", lambda: Effort(patience=0)),
        ("time_limit", lambda: Effort(time_limit=0.0)),
        ("lengths", lambda: cascade(*question(), 0.1, lengths=[3] * 45)),
        ("norm", lambda: cascade(*question(), 0.1, norm=3)),
    ],
)
def test_bad_arguments_are_refused(words, make):
    with pytest.raises(ValueError, match=words):
        make()


def estimates(problem, eps, dtype, chosen=slice(None), sound=True):
    """What would count if estimates or bounds in little precision did."""
    return MARGINS(problem, 0.5 * eps, dtype, chosen, sound=False)


def all_right(self, chosen):
    margins = self.problem.clean_margins(DTYPE, chosen)
    return margins.amin(dim=1), torch.zeros(len(chosen), dtype=torch.bool)


def target_only(self, stage, chosen):
    """The margin of the runner-up class alone, as if it were the worst."""
    margins = self.problem.by(stage).margins(self.eps[chosen], DTYPE, chosen).amax(dim=1)
    return self._keep_bounds(stage, chosen, margins, margins > 0)


def broken_without_example(self, stage, chosen):
    margins, broken = ATTACKED(self, stage, chosen)
    more = ~broken & (margins < 0.05)
    self._record("broken", stage, chosen[more], margins[more])
    return margins, broken | more


MARGINS, ATTACKED = MarginProblem.margins, run._Cascade._attacked


@pytest.mark.parametrize(
    "owner, name, wrong",
    [
        (MarginProblem, "margins", estimates),
        (run._Cascade, "_misclassified", all_right),
        (run._Cascade, "_bounded", target_only),
        (run._Cascade, "_attacked", broken_without_example),
    ],
)
def test_broken_cascades_are_caught(monkeypatch, owner, name, wrong):
    threat, eps = THREATS["inf"]
    model, x, labels = question()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, wrong)
        result = cascade(model, x, labels, eps, effort=QUICK, **threat)
    with pytest.raises((AssertionError, KeyError)):
        check(result, model, x, labels, eps, **threat)


def test_no_sample_is_settled_twice(monkeypatch):
    model, x, labels = question(batch=20)
    monkeypatch.setattr(CascadeResult, "undecided", torch.arange(20))
    with pytest.raises(RuntimeError, match="settled twice"):
        cascade(model, x, labels, 0.01, norm=INF, effort=Effort(stages=("ibp", "crown")))
