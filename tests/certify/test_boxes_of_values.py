"""Boxes with ends of their own for every value, in which x need not be the middle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import INF, classifier, normal
from torch import nn

from utils.attack.pgd import pgd
from utils.certify import certified_margin, certified_radius
from utils.certify.bab import decide
from utils.perturbation.sets import Perturbation
from utils.question.elements import box_of

BATCH, FRAMES, SIZE = 3, 2, 2


def question():
    net = classifier(inputs=SIZE)
    x = normal(BATCH, FRAMES, SIZE, seed=1)
    lower, upper = (
        x - 0.4 * normal(BATCH, FRAMES, SIZE, seed=2).abs(),
        x + 0.2 * normal(BATCH, FRAMES, SIZE, seed=3).abs(),
    )
    lower[0, 0, 0], upper[1, 1, 1] = x[0, 0, 0], x[1, 1, 1]
    return net, x, net(x).argmax(dim=1), (lower, upper)


def least(net, labels, lower, upper) -> torch.Tensor:
    """The least margin, (batch,), over a grid of the box with its corners."""
    grid = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=FRAMES * SIZE)), dtype=lower.dtype)
    points = lower[:, None] + grid.view(1, -1, FRAMES, SIZE) * (upper - lower)[:, None]
    scores = net(points.flatten(0, 1)).view(len(lower), len(grid), -1)
    own = scores.gather(2, labels[:, None, None].expand(-1, len(grid), 1))
    return (own - scores).scatter(2, labels[:, None, None].expand(-1, len(grid), 1), INF).amin(dim=(1, 2))


@pytest.mark.parametrize("method", ("ibp", "crown-ibp", "crown", "alpha", "curve", "jacobian"))
def test_bounds_hold_in_the_box_and_are_those_about_its_middle(method):
    net, x, labels, (lower, upper) = question()
    bound = certified_margin(net, x, labels, 1.0, norm=INF, box=(lower, upper), method=method, curve_steps=3)
    assert (bound.amin(dim=1) <= least(net, labels, lower, upper) + 1e-9).all()
    center, sides = box_of(lower, upper)
    if method in ("ibp", "crown-ibp", "crown"):
        again = certified_margin(net, center, labels, 1.0, norm=INF, scales=sides, method=method)
        torch.testing.assert_close(bound, again)


def test_a_box_that_is_taken_for_a_symmetric_one_is_caught(monkeypatch):
    net, x, labels, (lower, upper) = question()
    told = {"norm": INF, "box": (x - 1e-3, upper), "method": "crown"}
    uneven = Perturbation._uneven_box

    def even(self):
        self.above = None
        return uneven(self)

    monkeypatch.setattr(Perturbation, "_uneven_box", even)
    wrong = certified_margin(net, x, labels, 1.0, **told).amin(dim=1)
    assert (wrong > least(net, labels, x - 1e-3, upper) + 1e-9).any()


def test_attacks_and_shares():
    net, x, labels, box = question()
    found = pgd(net, x, labels, 1.0, norm=INF, box=box, steps=20)
    assert (found.x >= box[0] - 1e-12).all() and (found.x <= box[1] + 1e-12).all()
    assert (found.margin <= least(net, labels, *box) + 0.02).all()
    share = certified_radius(net, x, labels, norm=INF, box=box, max_eps=1.0)
    assert (share <= 1.0).all()
    for k, s in enumerate(share.tolist()):
        own = slice(k, k + 1)
        inner = [x[own] + s * (end[own] - x[own]) for end in box]
        assert float(least(net, labels[own], *inner)) > 0
    for own, margin in zip(decide(net, x, labels, 1.0, norm=INF, box=box, time_limit=2.0), found.margin, strict=True):
        assert (own.verdict == "falsified") == (float(margin) < 0)


def test_shapes_numbers_and_single_precision():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double().requires_grad_(False)
    x = normal(BATCH, 4, seed=4)
    labels = net(x).argmax(dim=1)
    low, high = float(x.min()), float(x.max())
    whole = certified_margin(net, x, labels, 1.0, norm="inf", box=(low, high))
    clipped = certified_margin(net, x, labels, 99.0, norm="inf", clip=(low, high))
    torch.testing.assert_close(whole, clipped)
    same = certified_margin(net, x, labels, 1.0, norm="inf", box=(np.full(4, low), torch.full((BATCH, 4), high)))
    torch.testing.assert_close(whole, same)
    single = certified_margin(net, x, labels, 1.0, norm="inf", box=(low, high), dtype=torch.float32)
    assert (single.double() <= whole + 1e-6).all()


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("norm = inf", {"norm": 2, "box": (-9.0, 9.0)}),
        ("x must lie in the box", {"norm": INF, "box": (0.0, 0.1)}),
        ("box must be .lower, upper.", {"norm": INF, "box": 3.0}),
        ("leave out scales", {"norm": INF, "box": (-9.0, 9.0), "scales": [1.0, 2.0]}),
        ("leave out scales, features and clip", {"norm": INF, "box": (-9.0, 9.0), "clip": (-9.0, 9.0)}),
        ("upper must be", {"norm": INF, "box": (-9.0, torch.ones(7))}),
    ],
)
def test_what_does_not_fit(message, told):
    net, x, labels, _ = question()
    with pytest.raises(ValueError, match=message):
        certified_margin(net, x, labels, 1.0, **told)
