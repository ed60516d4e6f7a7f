"""The adapted Carlini-Wagner attack: exact on linear models, above certificates, as strong as PGD."""

from __future__ import annotations

import math

import pytest
import torch
from test_attack import NORMS, T, inputs, linear_distance, linear_model, recurrent_model
from torch import nn

from utils.attack.carlini_wagner import carlini_wagner
from utils.attack.pgd import attack_radius
from utils.certify import certified_radius


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ball", ("frame", "sequence"))
@pytest.mark.parametrize("frames", (None, [1]))
def test_exact_on_a_linear_model(norm, ball, frames):
    model = linear_model()
    x, labels = inputs(model)
    mask = torch.ones(T) if frames is None else torch.tensor([0.0, 1.0, 0.0])
    distance = linear_distance(model, x, labels, norm, ball, mask)
    found = carlini_wagner(model, x, labels, norm=norm, ball=ball, frames=frames, steps=60, searches=2)
    assert (found.radius >= distance * (1 - 1e-9)).all()
    assert (found.radius <= 1.02 * distance).all()
    assert (found.margin < 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_between_certificate_and_pgd(norm):
    model = recurrent_model()
    x, labels = inputs(model, 10)
    certified = certified_radius(model, x, labels, norm=norm)
    found = carlini_wagner(model, x, labels, norm=norm, steps=80)
    by_pgd = attack_radius(model, x, labels, norm=norm, steps=30)
    broken = found.radius.isfinite() & by_pgd.radius.isfinite()
    assert broken.sum() > 5
    assert (found.radius >= certified).all()
    assert (found.radius / by_pgd.radius)[broken].mean() < 1.1


@pytest.mark.parametrize("kind", (nn.LSTM, nn.GRU))
def test_reported_size_and_margin_are_those_of_the_input(kind):
    model = recurrent_model(kind, scale=3.0)
    x, labels = inputs(model)
    found = carlini_wagner(model, x, labels, norm=2, frames=[0, 2], clip=(-1.0, 2.0), steps=60)
    broken = found.radius.isfinite()
    assert broken.any()
    delta = found.x - x.double()
    torch.testing.assert_close(delta.norm(dim=2).amax(dim=1)[broken], found.radius[broken])
    assert (delta[:, 1] == 0).all() and found.x.min() >= -1.0 and found.x.max() <= 2.0
    assert (model.double()(found.x).argmax(dim=1)[broken] != labels[broken]).all()


def test_misclassified_inputs():
    model = recurrent_model()
    x, labels = inputs(model)
    wrong = carlini_wagner(model, x, (labels + 1) % 3, norm=math.inf, steps=5)
    assert (wrong.radius == 0).all() and torch.equal(wrong.x, x.double())
