"""Certified losses: above the loss at every point of the ball, what they are made of, and their schedules."""

from __future__ import annotations

import math
from argparse import Namespace

import pytest
import torch
from helpers import THREATS, normal, random_points
from torch import Tensor, nn

from utils.network.models import SequenceClassifier
from utils.perturbation.lp_ball import INF, lp_norm
from utils.question import margin_rows
from utils.training.certified import losses
from utils.training.certified.losses import Batch, fused_loss, of_margins, robust_loss
from utils.training.certified.objective import Certified, start_shifted
from utils.training.certified.penalties import input_weights, tightness
from utils.training.certified.recipe import LOSSES, Moment, Recipe, moment_of, rate_factor, smoothed
from utils.training.loop import make_optimizer

FRAMES, SIZE, CLASSES, BATCH = 3, 4, 4, 6
EPS = 0.2
KINDS = {
    "relu": lambda: nn.RNN(SIZE, 5, nonlinearity="relu", batch_first=True),
    "tanh": lambda: nn.RNN(SIZE, 5, batch_first=True),
    "lstm": lambda: nn.LSTM(SIZE, 5, batch_first=True),
    "gru": lambda: nn.GRU(SIZE, 5, batch_first=True),
}


def model_of(kind: str, pooling: str = "last", gain: float = 1.5) -> SequenceClassifier:
    torch.manual_seed(0)
    model = SequenceClassifier(KINDS[kind](), nn.Linear(5, CLASSES), pooling=pooling).double()
    for parameter in model.parameters():
        parameter.data *= gain
    return model


def batch_of(kind: str, moment: Moment | None = None, pooling: str = "last", **recipe) -> Batch:
    x = 0.5 + 0.4 * normal(BATCH, FRAMES, SIZE, seed=1).clamp(-1.2, 1.2)
    y = torch.arange(BATCH) % CLASSES
    told = Recipe(**{"eps": EPS} | recipe)
    return Batch(model_of(kind, pooling), x, y, told, moment or Moment(EPS, 0.0, 1.0, 1.0))


def greatest_loss(batch: Batch, count: int = 300) -> Tensor:
    """(batch,): the greatest cross entropy at random points of the ball, and where an attack ends."""
    eps = torch.full((BATCH, FRAMES), batch.moment.eps).double()
    recipe = batch.recipe
    threat = next(t for t in THREATS if (t.norm, t.ball, t.clip is not None) == (recipe.p, recipe.ball, recipe.clip))
    points = random_points(batch.x, eps, threat, count, seed=2)  # (count, batch, T, n)
    found = batch.attacked()[None]
    with torch.no_grad():
        logits = batch.model(torch.cat((points, found)).flatten(0, 1))
    values = nn.functional.cross_entropy(logits, batch.y.repeat(count + 1), reduction="none")
    return values.reshape(count + 1, BATCH).amax(dim=0)


BOUNDS = [
    {"loss": "ibp"},
    {"loss": "crown-ibp"},
    {"loss": "crown"},
    {"loss": "crown-ibp", "fusion": True},
    {"loss": "crown", "fusion": True},
]
BALLS = [{"p": INF}, {"p": 2.0}, {"p": 1.0}, {"p": 2.0, "ball": "sequence"}]


@pytest.mark.parametrize(
    "ball", [*BALLS[:2], *(pytest.param(one, marks=pytest.mark.full) for one in BALLS[2:])], ids=str
)
@pytest.mark.parametrize("recipe", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_point_of_the_ball_has_a_greater_loss(kind, recipe, ball):
    for beta in (1.0, 0.3):
        batch = batch_of(kind, Moment(EPS, 0.0, beta, 1.0), attack_steps=5, **recipe, **ball)
        assert (robust_loss(batch) >= greatest_loss(batch) - 1e-9).all()


@pytest.mark.parametrize("recipe", BOUNDS, ids=str)
def test_without_a_ball_it_is_the_cross_entropy(recipe):
    batch = batch_of("lstm", Moment(0.0, 0.0, 1.0, 1.0), **recipe)
    clean = nn.functional.cross_entropy(batch.model(batch.x), batch.y, reduction="none")
    torch.testing.assert_close(robust_loss(batch), clean)


def test_the_check_catches_a_tangent_in_place_of_the_chord(monkeypatch):
    """exp lies above its tangents: a fused loss made of these is no bound."""

    def tangent(bounds, y, beta=1.0):
        output = bounds.graph.output
        rows = margin_rows(y, output.size).to(bounds.perturbation.x)
        upper, lower = -bounds.interval_lower_bound(output, rows), bounds.interval_lower_bound(output, -rows)
        slope = (0.5 * (lower + upper)).exp()
        constant = (slope - slope * 0.5 * (lower + upper)).sum(dim=1)
        return (1.0 + constant - bounds.lower_bound(output, slope.unsqueeze(1) @ rows).squeeze(1)).clamp(min=1e-9).log()

    monkeypatch.setattr(losses, "fused_loss", tangent)
    with pytest.raises(AssertionError):
        for kind in KINDS:
            test_no_point_of_the_ball_has_a_greater_loss(kind, {"loss": "crown", "fusion": True}, {"p": INF})


def test_fusion_is_one_row_and_exact_where_nothing_moves():
    batch = batch_of("tanh", Moment(1e-9, 0.0, 1.0, 1.0))
    bounds = batch.bounds("crown-ibp")
    asked = []
    stock = bounds.lower_bound
    bounds.lower_bound = lambda node, rows: (asked.append(rows.shape[1]), stock(node, rows))[1]
    clean = nn.functional.cross_entropy(batch.model(batch.x), batch.y, reduction="none")
    torch.testing.assert_close(fused_loss(bounds, batch.y), clean, rtol=1e-5, atol=1e-6)
    assert asked == [1]


def test_losses_of_margins():
    margins = normal(7, CLASSES - 1, seed=3)
    torch.testing.assert_close(of_margins(margins), (1.0 + (-margins).exp().sum(dim=1)).log())


def test_a_mean_of_bounds_lies_between_them():
    loss = {}
    for beta in (0.0, 0.5, 1.0):
        loss[beta] = robust_loss(batch_of("tanh", Moment(EPS, 0.0, beta, 1.0), loss="crown-ibp"))
    torch.testing.assert_close(loss[0.0], robust_loss(batch_of("tanh", loss="ibp")))
    low, high = torch.minimum(loss[0.0], loss[1.0]), torch.maximum(loss[0.0], loss[1.0])
    assert ((loss[0.5] >= low - 1e-12) & (loss[0.5] <= high + 1e-12)).all()


@pytest.mark.parametrize("ball", BALLS, ids=str)
def test_points_lie_in_their_balls(ball):
    batch = batch_of("gru", attack_steps=3, **ball)
    for share in (1.0, 0.6):
        delta = batch.attacked(share) - batch.x
        whole = delta.flatten(1)[:, None] if batch.recipe.ball == "sequence" else delta
        assert (lp_norm(whole, batch.recipe.p) <= share * EPS * (1 + 1e-9)).all()


def test_attacks_raise_the_loss():
    batch = batch_of("lstm", attack_steps=5)
    clean, attacked = (nn.functional.cross_entropy(batch.model(x), batch.y) for x in (batch.x, batch.attacked()))
    assert attacked > clean + 0.01


def test_small_boxes_and_mixed_losses_are_at_most_the_interval_loss():
    """A small box inside of the ball, and a point of it, have no greater bound."""
    interval = robust_loss(batch_of("lstm", loss="ibp"))
    for name in ("sabr", "mtl-ibp"):
        torch.manual_seed(0)
        assert (robust_loss(batch_of("lstm", loss=name)) <= interval + 1e-9).all()
    whole = robust_loss(batch_of("lstm", loss="sabr", box=1.0))
    torch.testing.assert_close(whole, interval)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind, loss):
    batch = batch_of(kind, Moment(EPS, 0.5, 0.5, 0.5), loss=loss, tightness=0.5, kappa=(0.5, 0.5))
    value = Certified(batch.recipe).loss(batch.model, batch.x, batch.y, 0.5)
    for gradient in torch.autograd.grad(value, list(batch.model.parameters())):
        assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_schedules():
    recipe = Recipe(eps=0.1, clean=0.1, ramp=0.6, overshoot=2.0, kappa=(1.0, 0.5), beta=(1.0, 0.0))
    assert moment_of(recipe, 0.05) == Moment(0.0, 1.0, 1.0, 0.0)
    middle, end = moment_of(recipe, 0.35), moment_of(recipe, 0.8)
    assert (
        middle.eps == pytest.approx(0.1) and middle.kappa == pytest.approx(0.75) and middle.beta == pytest.approx(0.5)
    )
    assert (end.eps, end.kappa, end.beta) == (0.2, 0.5, 0.0)
    assert [rate_factor(recipe, at) for at in (0.0, 0.6, 0.8, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.02])


def test_the_rate_falls_as_often_as_is_asked():
    """Once it is as without; else every fall goes through all of the rates, of the training's own steps too."""
    recipe, steps = Recipe(ramp=0.4, falls=3), 1000
    objective = Certified(recipe)
    rates = torch.tensor([objective.rate(step, steps) for step in range(steps)])
    assert bool((rates[:401] == 1.0).all())
    fall = torch.linspace(1.0, 0.0, 201)[:-1].clamp(min=0.02)
    others = (rates[400:] - fall.repeat(3)).abs() > 1e-6
    assert int(others.sum()) <= 2  # rounding: a step earlier or later at the two new beginnings
    once = torch.tensor([rate_factor(recipe, step / steps) for step in range(steps)])
    torch.testing.assert_close(once[400:], torch.linspace(1.0, 0.0, 601)[:-1].clamp(min=0.02))


def test_a_smooth_ramp_has_no_corner():
    steps = torch.linspace(0, 1, 10001).tolist()
    values = [smoothed(step) for step in steps]
    slopes = [10000 * (b - a) for a, b in zip(values, values[1:], strict=False)]
    assert values[0] == 0.0 and values[-1] == pytest.approx(1.0)
    assert max(abs(b - a) for a, b in zip(slopes, slopes[1:], strict=False)) < 3e-3 and min(slopes) >= 0


def test_penalties():
    batch = batch_of("lstm", p=2.0)
    weight = batch.model.rnn.weight_ih_l0
    torch.testing.assert_close(input_weights(batch.graph, 2.0), weight.norm(dim=1).sum())
    torch.testing.assert_close(input_weights(batch.graph, INF), weight.abs().sum())
    grown = model_of("relu", gain=6.0)
    small, large = (
        tightness(Batch(model, batch.x, batch.y, batch.recipe, batch.moment).bounds("ibp"))
        for model in (model_of("relu", gain=0.3), grown)
    )
    assert small < large < 0.5


def test_every_loss_has_a_name_for_the_command_line():
    assert tuple(losses.LOSSES) == LOSSES


def test_points_stay_in_the_valid_range():
    """Also where x + delta is rounded out of it; small boxes around such points are refused otherwise."""
    batch = batch_of("tanh", loss="sabr", clip=True)
    single = Batch(
        batch.model.float(), torch.rand(64, FRAMES, SIZE), torch.arange(64) % CLASSES, batch.recipe, batch.moment
    )
    points = single.attacked()
    assert points.min() >= 0.0 and points.max() <= 1.0
    assert robust_loss(single).isfinite().all()


def test_a_network_without_activations_has_no_tightness():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(FRAMES * SIZE, CLASSES)).double()
    batch = batch_of("tanh")
    assert tightness(Batch(linear, batch.x, batch.y, batch.recipe, batch.moment).bounds("ibp")) == 0.0


def test_impossible_recipes():
    for wrong in ({"loss": "pgd"}, {"clean": 0.7, "ramp": 0.6}, {"ramp": 1.5}):
        with pytest.raises(ValueError):
            Recipe(**wrong)


def test_what_is_watched_is_verified():
    """The share of the training curve is that of sound bounds."""
    batch = batch_of("tanh")
    labels = batch.model(batch.x).argmax(dim=1)
    for eps, least in ((1e-6, 1.0), (5.0, 0.0)):
        measured = Certified(Recipe(eps=eps)).measure(batch.model, batch.x, labels)
        assert measured == {"accuracy": 1.0, "verified": least}
    assert not math.isnan(rate_factor(Recipe(ramp=1.0), 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_hands_states_on(kind):
    """Without other weights the part of the state that is new is the last one's, moved by one unit."""
    model = model_of(kind)
    before = model.rnn.weight_hh_l0.detach().clone()
    Certified(Recipe(hidden_scale=0.5, hidden_shift=0.75)).prepare(model)
    added = (model.rnn.weight_hh_l0.detach() - 0.5 * before).split(5)
    new = 0 if kind in ("relu", "tanh") else 2  # of (i, f, g, o) and (r, z, n)
    state = normal(5, seed=3)
    for block, rows in enumerate(added):
        expected = 0.75 * state[[4, 0, 1, 2, 3]] if block == new else 0.0 * state
        assert torch.allclose(rows @ state, expected)


def test_a_shift_keeps_the_size_of_boxes():
    weight = normal(6, 6, seed=4)
    start_shifted(weight, 0.0, 1.0)
    widths = normal(6, seed=5).abs()
    assert (weight.abs() @ widths).sum().isclose(widths.sum())


def test_weights_that_meet_the_input_learn_faster():
    """A first step of Adam is as long as the rate, wherever there is a gradient."""
    rnn = nn.GRU(SIZE, 5, num_layers=2, bidirectional=True, batch_first=True)
    model = SequenceClassifier(rnn, nn.Linear(10, CLASSES))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    args = Namespace(lr=1e-3, weight_decay=0.0, batch_size=BATCH, seed=0)
    optimizer = make_optimizer(model, args, 10, Certified(Recipe(input_rate=4.0, adam_beta2=0.9)))
    assert {group["betas"] for group in optimizer.adam.param_groups} == {(0.9, 0.9)}
    sum(value.sum() for value in model.parameters()).backward()
    optimizer.adam.step()
    fast = {"rnn.weight_ih_l0", "rnn.weight_ih_l0_reverse"}
    for name, value in model.named_parameters():
        moved = (before[name] - value.detach()).mean().item()
        assert math.isclose(moved, 4e-3 if name in fast else 1e-3, rel_tol=1e-3), name
