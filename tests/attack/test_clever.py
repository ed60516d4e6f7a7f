"""CLEVER scores: the extreme-value fit, closed forms on linear models, order with certificate and attack."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from test_attack import NORMS, T, inputs, linear_distance, linear_model, recurrent_model

from utils.attack.clever import clever, reverse_weibull_location
from utils.attack.pgd import attack_radius
from utils.certify import certified_radius

FEW = {"batches": 10, "points": 16}


@pytest.mark.parametrize("scale", (1e-6, 1.0, 1e6))
def test_location_of_a_known_distribution(scale):
    generator = np.random.default_rng(0)
    maxima = scale * stats.weibull_max.rvs(2.0, loc=5.0, scale=1.0, size=400, random_state=generator)
    location = reverse_weibull_location(maxima)
    assert location >= maxima.max()
    assert abs(location - 5.0 * scale) < 0.05 * scale


def test_location_of_degenerate_maxima():
    assert reverse_weibull_location(np.full(20, 3.0)) == 3.0
    assert reverse_weibull_location(np.zeros(20)) == 0.0
    assert reverse_weibull_location(np.array([1.0, 2.0])) == 2.0
    rising = np.array([1.0] * 19 + [2.0])
    assert 2.0 <= reverse_weibull_location(rising) <= 2.0 + 2.0 * rising.std()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ball", ("frame", "sequence"))
@pytest.mark.parametrize("frames", (None, [1]))
def test_exact_on_a_linear_model(norm, ball, frames):
    model = linear_model()
    x, labels = inputs(model)
    mask = torch.ones(T) if frames is None else torch.tensor([0.0, 1.0, 0.0])
    distance = linear_distance(model, x, labels, norm, ball, mask)
    score = clever(model, x, labels, norm=norm, ball=ball, frames=frames, dtype=torch.float64, **FEW)
    torch.testing.assert_close(score, distance, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_between_certificate_and_attack(norm):
    model = recurrent_model(scale=2.0)
    x, labels = inputs(model, 6)
    score = clever(model, x, labels, norm=norm, **FEW)
    certified = certified_radius(model, x, labels, norm=norm)
    attacked = attack_radius(model, x, labels, norm=norm, steps=25).radius
    # The L_t are maxima at different points: on a net this small a tight certificate can lie a little above the score.
    assert ((0.9 * certified <= score) & (score <= attacked)).double().mean() >= 0.9


def test_directed_points_see_larger_gradients():
    model = recurrent_model(scale=2.0)
    x, labels = inputs(model, 4)
    even, directed = (clever(model, x, labels, norm=math.inf, sampling=s, **FEW) for s in ("even", "directed"))
    assert directed.mean() < even.mean()


def test_eps0_limits_the_score():
    model = recurrent_model()
    x, labels = inputs(model)
    assert torch.equal(clever(model, x, labels, eps0=1e-3, **FEW), torch.full((len(x),), 1e-3, dtype=torch.float64))


def test_misclassified_inputs_and_repetition():
    model = recurrent_model()
    x, labels = inputs(model, 2)
    assert (clever(model, x, (labels + 1) % 3, **FEW) == 0).all()
    first, second = (clever(model, x, labels, **FEW) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, clever(model, x, labels, seed=1, **FEW))


@pytest.mark.parametrize(
    "bad", ({"eps0": 0.0}, {"batches": 0}, {"sampling": "odd"}, {"norm": 3}, {"clip": (0.0, 1.0)}), ids=str
)
def test_bad_arguments(bad):
    model = recurrent_model()
    x, labels = inputs(model)
    with pytest.raises(ValueError):
        clever(model, x, labels, **bad)
