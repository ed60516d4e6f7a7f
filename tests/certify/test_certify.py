"""Certified radii: brackets, attacks, symmetries, precisions and bad arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import THREATS, Threat, attack, classifier, lowest_margins, margins_of, normal

from utils.bounds.passes import METHODS
from utils.certify import certified_margin, certified_radius, margin_problem, search_radius
from utils.network.unroll import unroll
from utils.perturbation.lp_ball import INF
from utils.question import frame_mask, margin_rows
from utils.relaxation.lines import ACTIVATIONS, Plane, Relaxation

BATCH, FRAMES, SIZE, CLASSES = 5, 3, 3, 4
TOL = 1e-3
MASKS = {
    "all": None,
    "last": FRAMES - 1,
    "list": [0, 2],
    "mixed": torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 1, 0]]).bool(),
}


def samples(model, batch: int = BATCH, seed: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and the classes the model gives them."""
    x = (0.5 * normal(batch, FRAMES, SIZE, seed=seed)).clamp(-1, 1)
    return x, model(x).argmax(dim=1)


def net(**options):
    return classifier(classes=CLASSES, **options)


def options_of(threat: Threat) -> dict:
    return {"norm": threat.norm, "ball": threat.ball, "clip": threat.clip}


def worst(model, x, labels, eps, frames=None, **options) -> torch.Tensor:
    """Worst certified margin in float64, less the slack of a verdict."""
    bound = certified_margin(model, x, labels, eps, frames=frames, dtype=torch.float64, **options)
    return (bound - margin_problem(model, x, labels).slack(torch.float64)).amin(dim=1)


# --- what a radius means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["all", "last", pytest.param("list", marks=pytest.mark.full), "mixed"])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_certified_at_the_radius_failed_just_above_and_not_attacked_inside(threat, mask):
    frames = MASKS[mask]
    for kind in ({}, {"activation": "relu"}, {"layers": 2, "bidirectional": True, "pooling": "mean"}):
        model = net(**kind)
        x, labels = samples(model)
        found = search_radius(margin_problem(model, x, labels, frames=frames, **options_of(threat)), tol=TOL)
        radius = found.radius
        assert (radius > 0).all()
        options = {"frames": frames, **options_of(threat)}
        assert (worst(model, x, labels, radius, **options) > 0).all()
        torch.testing.assert_close(worst(model, x, labels, radius, **options), found.margin, rtol=1e-6, atol=1e-9)
        failed = found.failed.isfinite()
        if threat.clip is None:
            assert failed.all()
        above = torch.where(failed, found.failed, 2 * radius)
        assert (radius[failed] >= (1 - TOL) * above[failed]).all()
        # Failed in the search's precision: hardly above 0 in the verdict's.
        beyond = worst(model, x, labels, 1.01 * above, **options)
        assert (beyond[failed] <= 0).all()
        graph, eps = unroll(model, FRAMES), radius[:, None] * frame_mask(frames, BATCH, FRAMES)
        assert (lowest_margins(graph, x, eps, margin_rows(labels, CLASSES).double(), threat) > 0).all()


def test_an_attack_succeeds_somewhere_beyond():
    """The attack of these tests has teeth: it breaks every sample at a few times its radius."""
    model = net()
    x, labels = samples(model)
    graph, rows = unroll(model, FRAMES), margin_rows(labels, CLASSES).double()
    for norm in (1, 2, INF):
        eps = 4 * certified_radius(model, x, labels, norm=norm)[:, None].expand(-1, FRAMES)

        def value(y):
            return margins_of(graph, y, rows).amin(dim=1)

        assert (value(attack(value, x, eps, Threat(float(norm)))) < 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", [1, 2, INF])
def test_every_method_is_certified_and_crown_is_not_worse_than_intervals(method, norm):
    model = net()
    x, labels = samples(model)
    radius = certified_radius(model, x, labels, norm=norm, method=method)
    assert (worst(model, x, labels, radius, norm=norm, method=method) > 0).all()
    eps = radius[:, None].expand(-1, FRAMES)
    found = lowest_margins(unroll(model, FRAMES), x, eps, margin_rows(labels, CLASSES).double(), Threat(float(norm)))
    assert (found > 0).all()
    if method != "ibp":
        assert (
            worst(model, x, labels, certified_radius(model, x, labels, norm=norm, method="ibp"), norm=norm) > 0
        ).all()


@pytest.mark.parametrize("norm", [1, 2, INF])
def test_untargeted_is_the_worst_target(norm):
    model = net()
    x, labels = samples(model)
    untargeted = certified_radius(model, x, labels, norm=norm)
    others = torch.tensor([[c for c in range(CLASSES) if c != label] for label in labels.tolist()])
    by_target = [certified_radius(model, x, labels, norm=norm, targets=target) for target in others.T]
    torch.testing.assert_close(untargeted, torch.stack(by_target).amin(dim=0), rtol=TOL, atol=0.0)
    pair = certified_radius(model, x, labels, norm=norm, targets=others[:, :2])
    torch.testing.assert_close(pair, torch.stack(by_target[:2]).amin(dim=0), rtol=TOL, atol=0.0)


def test_misclassified_samples_have_radius_zero():
    model = net()
    x, labels = samples(model)
    wrong = torch.tensor([True, False, True, False, False])
    radius = certified_radius(model, x, torch.where(wrong, (labels + 1) % CLASSES, labels), tol=TOL)
    assert (radius[wrong] == 0).all()
    # Rounding, which a batch's size changes, may end a search elsewhere in its bracket: what is certified is compared.
    alone = certified_radius(model, x[~wrong], labels[~wrong], tol=TOL)
    assert (worst(model, x[~wrong], labels[~wrong], radius[~wrong]) > 0).all()
    torch.testing.assert_close(radius[~wrong], alone, rtol=TOL, atol=0.0)


def test_one_radius_a_frame():
    """A frame alone may move at least as far as with the others."""
    model = net()
    x, labels = samples(model)
    together = certified_radius(model, x, labels)
    alone = torch.stack([certified_radius(model, x, labels, frames=t) for t in range(FRAMES)])
    assert (alone >= together * (1 - 0.05)).all()
    mask = torch.eye(FRAMES).bool()[torch.arange(BATCH) % FRAMES]
    mixed = certified_radius(model, x, labels, frames=mask)
    torch.testing.assert_close(mixed, alone.T[mask], rtol=TOL, atol=0.0)


def test_one_frame_and_one_ball_are_the_same_threat():
    model = net()
    x, labels = samples(model)
    for norm in (1, 2, INF):
        frame = certified_radius(model, x, labels, norm=norm, frames=1)
        torch.testing.assert_close(certified_radius(model, x, labels, norm=norm, frames=1, ball="sequence"), frame)
    box = certified_radius(model, x, labels, norm=INF)
    torch.testing.assert_close(certified_radius(model, x, labels, norm=INF, ball="sequence"), box)


# --- what does not matter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"eps0": 1e-6},
        {"eps0": 0.5},
        {"eps0": 1e3},
        {"batch_size": 1},
        {"batch_size": 2},
        {"search_dtype": torch.float64},
        {"dtype": torch.float32},
        {"tol": 1e-4},
        {"max_eps": 50.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["plain", "small logits", "near ties"])
def test_settings_of_the_search_do_not_change_the_radius(changes, kind):
    """Within tol, also for samples whose margin is below what the search's precision can tell from 0."""
    if "dtype" in changes and kind != "plain":
        pytest.skip("a verdict in float32 has its own slack")
    model = net()
    x, labels = samples(model, batch=8)
    if kind == "small logits":
        for parameter in model.head.parameters():
            parameter.data *= 1e-5
    if kind == "near ties":  # the head's biases make two classes nearly tie
        logits = model(x[:1])[0]
        model.head.bias.data += logits.max() - logits + 2e-4 * torch.arange(CLASSES)
        labels = model(x).argmax(dim=1)
        assert model(x).topk(2).values.diff().abs().min() < 1e-3
    expected = certified_radius(model, x, labels, search_dtype=torch.float64)
    assert (expected > 0).all()
    radius = certified_radius(model, x, labels, **changes).double()
    if "dtype" in changes:  # what is taken off for its rounding makes the radius a little smaller
        assert (radius <= expected * (1.0 + TOL)).all()
    torch.testing.assert_close(radius, expected, rtol=5 * TOL if "dtype" in changes else TOL, atol=0.0)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 2.0**-10])
def test_units_of_the_input_do_not_matter(scale):
    model, scaled = net(), net()
    scaled.rnn.weight_ih_l0.data /= scale
    normalised = net(std=scale)
    x, labels = samples(model)
    for norm in (1, 2, INF):
        radius = certified_radius(model, x, labels, norm=norm)
        for other in (scaled, normalised):
            again = certified_radius(other, scale * x, labels, norm=norm)
            torch.testing.assert_close(again, scale * radius, rtol=TOL, atol=0.0)


def test_the_mean_only_shifts_the_input():
    x, labels = samples(net())
    mean = normal(SIZE, seed=9)
    radius = certified_radius(net(mean=mean), x + mean, labels)
    torch.testing.assert_close(radius, certified_radius(net(), x, labels), rtol=TOL, atol=0.0)


def test_repeated_calls_agree_and_leave_the_model_alone():
    model = net().float().requires_grad_(True)
    x, labels = samples(net())
    x = x.float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = certified_radius(model, x, labels)
    assert torch.equal(first, certified_radius(model, x, labels))
    assert first.dtype == torch.float64 and not first.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(first, certified_radius(model, x, labels))


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search_dtype", [torch.float32, torch.float64], ids=str)
def test_a_model_that_nothing_can_change(search_dtype):
    constant, saturating = net(), net()
    constant.head.weight.data.zero_()
    saturating.head.bias.data[0] += 50.0
    for model in (constant, saturating):
        x, labels = samples(model)
        result = search_radius(margin_problem(model, x, labels), search_dtype=search_dtype, max_eps=1e9)
        assert (result.radius == 1e9).all() and result.failed.isinf().all()


def test_samples_without_perturbed_frames_reach_the_largest_eps():
    model = net()
    x, labels = samples(model)
    mask = torch.ones(BATCH, FRAMES, dtype=torch.bool)
    mask[2] = False
    radius = certified_radius(model, x, labels, frames=mask, max_eps=10.0)
    assert radius[2] == 10.0 and (radius[[0, 1, 3, 4]] < 10.0).all()


def test_huge_eps_gives_vacuous_finite_margins():
    for kind in ({}, {"activation": "relu"}, {"layers": 2}):
        model = net(**kind)
        x, labels = samples(model)
        for dtype in (torch.float32, torch.float64):
            for method in METHODS:
                margin = certified_margin(model, x, labels, 1e12, method=method, dtype=dtype)
                assert margin.isfinite().all() and (margin < 0).any(dim=1).all()


def test_overflow_is_an_error():
    model = net(activation="relu", gain=1e30)
    x, labels = samples(model)
    with pytest.raises(ArithmeticError, match="overflow"):
        certified_radius(model, x, labels, search_dtype=torch.float32, eps0=1e6)


def test_clipping_can_only_help():
    model = net()
    x, labels = samples(model)
    plain = certified_radius(model, x, labels, norm=INF)
    inside = plain < (1 - x.abs()).flatten(1).amin(dim=1)
    clipped = certified_radius(model, x, labels, norm=INF, clip=(-1.0, 1.0))
    torch.testing.assert_close(clipped[inside], plain[inside], rtol=TOL, atol=0.0)
    wide = certified_radius(model, x, labels, norm=INF, clip=(-1e3, 1e3))
    torch.testing.assert_close(wide, plain, rtol=TOL, atol=0.0)


def test_a_broken_relaxation_is_caught(monkeypatch):
    """Lines that cut the curve give radii inside which the attack succeeds."""
    good = ACTIVATIONS["tanh"]

    def relax(l, u, slopes=None):  # noqa: E741
        lower, upper = good.relax(l, u, slopes)
        shift = 0.3 * (u - l)
        return Relaxation(Plane(lower.slopes, lower.intercept + shift), Plane(upper.slopes, upper.intercept - shift))

    model = net()
    x, labels = samples(model)
    rows, graph = margin_rows(labels, CLASSES).double(), unroll(model, FRAMES)

    def least_margin_inside() -> torch.Tensor:
        eps = certified_radius(model, x, labels, max_eps=10.0)[:, None].expand(-1, FRAMES)
        return lowest_margins(graph, x, eps, rows, Threat(2.0))

    assert (least_margin_inside() > 0).all()
    monkeypatch.setitem(ACTIVATIONS, "tanh", good._replace(relax=relax))
    assert (least_margin_inside() < 0).any()


# --- arguments ------------------------------------------------------------------------------------------------------


def test_margin_rows():
    labels = torch.tensor([0, 2])
    untargeted = [[[1, -1, 0], [1, 0, -1]], [[-1, 0, 1], [0, -1, 1]]]
    assert margin_rows(labels, 3).tolist() == untargeted
    assert margin_rows(labels, 3, torch.tensor([2, 1])).tolist() == [[[1, 0, -1]], [[0, -1, 1]]]
    assert margin_rows(labels, 3, torch.tensor([[1, 2], [0, 1]])).tolist() == untargeted


def test_frame_masks():
    expected = [[True, False, True]] * 2
    for frames in ([0, 2], (2, 0), torch.tensor([0, 2]), np.array([0, 2]), torch.tensor([True, False, True])):
        assert frame_mask(frames, 2, 3).tolist() == expected
    assert frame_mask([True, False, True], 2, 3).tolist() == expected  # a mask, not frames 1 and 0
    for last in (2, np.int64(2), torch.tensor(2)):
        assert frame_mask(last, 2, 3).tolist() == [[False, False, True]] * 2
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert frame_mask(mask, 2, 3).tolist() == mask.tolist()


def with_value(model, name: str, value: float):
    dict((*model.named_parameters(), *model.named_buffers()))[name].data.fill_(value)
    return model


BAD = {
    "p must be 1, 2 or inf": {"norm": 3},
    "ball must be one of": {"ball": "word"},
    "method must be one of": {"method": "fast"},
    "give clip": {"norm": 0},
    "method curve knows no set of p = 0": {"norm": 0, "clip": (-9.0, 9.0), "method": "curve"},
    "method bab knows no set of p = 0": {"norm": 0, "clip": (-9.0, 9.0), "method": "bab"},
    "method spectral knows no set": {"norm": 0, "clip": (-9.0, 9.0), "method": "spectral"},
    "together is for p = 0": {"together": "frame"},
    "take ball='sequence'": {"norm": 0, "clip": (-9.0, 9.0), "together": "frame"},
    "together must be 'frame'": {"norm": 0, "clip": (-9.0, 9.0), "together": "pixel"},
    "leave out scales": {"norm": 0, "clip": (-9.0, 9.0), "scales": [1.0, 2.0, 1.0]},
    "inputs lie outside the range": {"norm": INF, "clip": (0.0, 0.1)},
    "x must be .batch, T, n. with at least one": {"x": torch.zeros(0, FRAMES, SIZE)},
    r"x must be .batch, T, n. with at least one sample and frame, not \(5, 3\)": {"x": torch.zeros(BATCH, FRAMES)},
    "x has 2 values a frame, the model takes 3": {"x": torch.zeros(BATCH, FRAMES, 2)},
    "x must be finite floating-point": {"x": torch.full((BATCH, FRAMES, SIZE), math.nan)},
    "x must be finite": {"x": torch.zeros(BATCH, FRAMES, SIZE, dtype=torch.long)},
    "labels must be .5,. of integers": {"labels": torch.zeros(BATCH)},
    "labels must be": {"labels": torch.zeros(BATCH - 1, dtype=torch.long)},
    "labels must be .5,. of integers, not .5,. of torch.bool": {"labels": torch.zeros(BATCH, dtype=torch.bool)},
    "a label is not one of the classes": {"labels": torch.full((BATCH,), CLASSES)},
    "a label is not one of the classes 0": {"labels": torch.full((BATCH,), -1)},
    "a target is not one of": {"targets": torch.full((BATCH,), CLASSES)},
    "a target is the sample's own label": {"targets": torch.zeros(BATCH, dtype=torch.long)},
    "targets must be": {"targets": torch.ones(2 * BATCH, dtype=torch.long)},
    "targets must be .batch,.": {"targets": torch.ones(BATCH)},
    "there is no class to compare": {"targets": torch.zeros(BATCH, 0, dtype=torch.long)},
    "frames must be from 0 ... 2, not .3.": {"frames": 3},
    "frames must be from 0 ... 2, not .-1.": {"frames": -1},
    "frames must be": {"frames": []},
    "frames must be from 0 ... 2, not .0.5.": {"frames": [0.5]},
    "a frame mask is": {"frames": torch.ones(FRAMES + 1).bool()},
    "parameter head.bias is not finite": {"model": with_value(net(), "head.bias", math.nan)},
    "parameter mean is not finite": {"model": with_value(net(), "mean", math.inf)},
    "std of 0": {"model": with_value(net(), "std", 0.0)},
}
BAD_SEARCH = {
    "tol must be": {"tol": 0.0},
    "tol must be between": {"tol": 1.0},
    "tol must be between 0 and 1, not nan": {"tol": math.nan},
    "eps0 must be": {"eps0": 0.0},
    "eps0 must be a positive": {"eps0": math.inf},
    "max_eps must be": {"max_eps": 0.0},
    "batch_size must be": {"batch_size": 0},
    "a radius is searched in": {"search_dtype": torch.float16},
    "a radius is searched in torch.float32 or": {"dtype": torch.bfloat16},
}
BAD_MARGIN = {
    "eps must be a finite number >= 0": {"eps": -0.1},
    "eps must be a finite": {"eps": math.nan},
    "eps must be a finite number": {"eps": math.inf},
    "eps must be a number, .batch,. or": {"eps": torch.ones(BATCH + 1)},
    "eps must be a number, .batch,. or .batch, T.": {"eps": torch.ones(BATCH, FRAMES, SIZE)},
    "one eps a sample": {"ball": "sequence", "eps": torch.tensor([0.1, 0.2, 0.3]).expand(BATCH, -1)},
}


def arguments() -> dict:
    x = torch.full((BATCH, FRAMES, SIZE), 0.5).double()
    return {"model": net(), "x": x, "labels": torch.zeros(BATCH, dtype=torch.long)}


@pytest.mark.parametrize("message", [*BAD, *BAD_SEARCH])
def test_bad_arguments_of_a_radius(message):
    """Also for samples that are misclassified, for which nothing is bounded."""
    with pytest.raises(ValueError, match=message):
        certified_radius(**{**arguments(), **{**BAD, **BAD_SEARCH}[message]})


@pytest.mark.parametrize("message", [*BAD, *BAD_MARGIN])
def test_bad_arguments_of_a_margin(message):
    with pytest.raises(ValueError, match=message):
        certified_margin(**{"eps": 0.1, **arguments(), **{**BAD, **BAD_MARGIN}[message]})
