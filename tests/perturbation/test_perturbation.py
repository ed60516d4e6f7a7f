"""Perturbation sets: how far A x' strays from A x, against brute force over the set."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import THREATS, Threat, normal, project_ball, random_points, steepest

from utils.perturbation.lp_ball import INF, dual_norm
from utils.perturbation.sets import Perturbation

BATCH, FRAMES, SIZE = 3, 2, 3
EPS = torch.tensor([[0.3, 0.3], [0.0, 0.7], [1.5, 1.5]], dtype=torch.float64)


def vertices(norm: float, size: int) -> torch.Tensor:
    """Extreme points of the unit ball: all of them for l_1 and l_inf, many for l_2."""
    if norm == INF:
        return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=torch.float64)
    if norm == 1.0:
        return torch.cat((torch.eye(size), -torch.eye(size))).double()
    return torch.nn.functional.normalize(normal(200_000, size, seed=1))


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_dual_norm_is_the_maximum_over_the_ball(norm, size):
    coefficients = torch.cat((normal(6, size, seed=2), torch.zeros(1, size), torch.ones(1, size)))
    brute_force = (coefficients @ vertices(norm, size).T).amax(dim=1)
    dual = dual_norm(coefficients, norm)
    assert (brute_force <= dual + 1e-12).all()
    torch.testing.assert_close(brute_force, dual, rtol=1e-3 if norm == 2.0 else 1e-14, atol=1e-14)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_deviation_is_reached_and_never_passed(threat):
    x, coefficients = 0.3 * normal(BATCH, FRAMES, SIZE, seed=3), normal(BATCH, 5, FRAMES, SIZE, seed=4)
    perturbation = threat.around(x, EPS)
    center = torch.stack([perturbation.center(t) for t in range(FRAMES)], dim=1)
    frames = [perturbation.frame_deviation(t, coefficients[:, :, t]) for t in range(FRAMES)]
    most = perturbation.total_deviation(frames)
    reached = torch.full_like(most, -INF)
    for row in range(5):
        worst = x + steepest(coefficients[:, row], EPS, threat)
        points = torch.cat((random_points(x, EPS, threat, 60, seed=5), worst[None]))
        if threat.clip is not None:
            points = points.clamp(*threat.clip)
        change = ((points - center) * coefficients[:, row]).flatten(2).sum(-1).abs()
        reached[:, row] = change.amax(dim=0)
    torch.testing.assert_close(reached, most, rtol=1e-12, atol=1e-12)


def test_a_common_ball_is_smaller_than_a_ball_a_frame():
    x, coefficients = normal(BATCH, FRAMES, SIZE, seed=3), normal(BATCH, 5, FRAMES, SIZE, seed=4)
    for norm in (1.0, 2.0, INF):
        totals = {}
        for ball in ("frame", "sequence"):
            perturbation = Perturbation(x, EPS, norm=norm, ball=ball)
            deviations = [perturbation.frame_deviation(t, coefficients[:, :, t]) for t in range(FRAMES)]
            totals[ball] = perturbation.total_deviation(deviations)
        joint = EPS.amax(dim=1, keepdim=True) * dual_norm((coefficients * (EPS > 0)[:, None, :, None]).flatten(2), norm)
        torch.testing.assert_close(totals["sequence"], joint)
        assert (totals["sequence"] <= totals["frame"] + 1e-12).all()
        if norm == INF:
            torch.testing.assert_close(totals["sequence"], totals["frame"])


def test_coefficients_shared_by_the_batch():
    x, shared = normal(BATCH, FRAMES, SIZE, seed=3), normal(1, 5, SIZE, seed=4)
    for threat in THREATS:
        perturbation = threat.around(x.clamp(-1, 1), EPS)
        torch.testing.assert_close(
            perturbation.frame_deviation(1, shared), perturbation.frame_deviation(1, shared.expand(BATCH, -1, -1))
        )


def test_a_cut_box_has_its_own_centre_and_width():
    x = torch.tensor([[[0.0, 0.1, 0.5, 0.95, 1.0]]], dtype=torch.float64)
    perturbation = Perturbation(x, torch.tensor([[0.2]]).double(), norm=INF, clip=(0.0, 1.0))
    expected = torch.tensor([[0.1, 0.15, 0.5, 0.875, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(perturbation.center(0), expected)
    widths = perturbation.frame_deviation(0, torch.eye(5, dtype=torch.float64)[None])
    torch.testing.assert_close(widths, torch.tensor([[0.1, 0.15, 0.2, 0.125, 0.1]], dtype=torch.float64))


def test_a_frame_is_exact_only_if_no_sample_perturbs_it():
    x = normal(2, 3, SIZE, seed=3)
    perturbation = Perturbation(x, torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.0, 0.2]]).double())
    assert [perturbation.is_exact(t) for t in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("p must be 1, 2 or inf", {"norm": 3.0}),
        ("p must be 1, 2 or inf", {"norm": float("nan")}),
        ("ball must be one of", {"ball": "word"}),
        ("are CutBalls", {"norm": 2.0, "clip": (0.0, 1.0)}),
        ("outside the range", {"norm": INF, "clip": (0.0, 0.1)}),
        (r"eps \(batch, T\)", {"eps": torch.ones(BATCH)}),
        (r"eps \(batch, T\)", {"eps": torch.ones(BATCH, FRAMES + 1)}),
        (r"x must be \(batch, T, n\)", {"x": torch.ones(FRAMES, SIZE)}),
        ("finite number >= 0", {"eps": torch.full((BATCH, FRAMES), -1.0)}),
        ("finite number >= 0", {"eps": torch.full((BATCH, FRAMES), float("nan"))}),
        ("finite number >= 0", {"eps": torch.full((BATCH, FRAMES), INF)}),
        ("one eps a sample", {"ball": "sequence", "eps": torch.tensor([[0.1, 0.2]]).expand(BATCH, 2)}),
    ],
)
def test_errors(message, changes):
    valid = {"x": torch.full((BATCH, FRAMES, SIZE), 0.5), "eps": torch.ones(BATCH, FRAMES)}
    Perturbation(**valid)
    with pytest.raises(ValueError, match=message):
        Perturbation(**{**valid, **changes})


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_the_projection_of_these_tests_gives_the_nearest_point(norm):
    far, eps = 2 * normal(50, 3, seed=7), torch.full((50,), 0.8, dtype=torch.float64)
    nearest = project_ball(far, eps, norm)
    assert (torch.linalg.vector_norm(nearest, norm, dim=-1) <= 0.8 + 1e-12).all()
    distance = (far - nearest).norm(dim=-1)
    for other in 0.8 * vertices(norm, 3)[:500]:
        for share in (0.3, 1.0):
            between = nearest + share * (other - nearest)
            assert (distance <= (far - between).norm(dim=-1) + 1e-12).all()
    inside = 0.1 * normal(50, 3, seed=8).clamp(-2, 2)
    torch.testing.assert_close(project_ball(inside, eps, norm), inside)


def test_threats_have_readable_names():
    assert str(Threat(INF, clip=(0.0, 1.0))) == "linf-frame-clip"
