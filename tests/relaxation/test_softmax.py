"""Planes and ranges of a softmax: below and above at corners, at random points, of narrow and of wide boxes."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch

from utils.relaxation import softmax
from utils.relaxation.softmax import mean_below, relax_softmax, softmax_range

T = 5
WIDTHS = (0.0, 1e-12, 1e-7, 0.1, 1.0, 15.0, 40.0, 1000.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boxes(width: float, count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    low = 3.0 * normal(count, T)
    return low, low + width * normal(count, T, seed=1).abs().clamp(max=2.0)


def points(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Corners and random points of the boxes, (points, boxes, T)."""
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=T)), dtype=torch.float64)
    shares = torch.cat((corners, torch.rand(200, T, dtype=torch.float64, generator=torch.Generator().manual_seed(2))))
    return torch.where(shares[:, None] == 1.0, high, low + (high - low) * shares[:, None])


def heights(plane: softmax.RowPlane, scores: torch.Tensor) -> torch.Tensor:
    return plane.own * scores + plane.shared * (plane.direction * scores).sum(-1, keepdim=True) + plane.intercept


def largest_crossing(low: torch.Tensor, high: torch.Tensor) -> float:
    """How far a plane is on the wrong side anywhere, relative to its terms."""
    below, above = relax_softmax(low, high)
    scores = points(low, high)
    share, sizes = scores.softmax(dim=-1), torch.maximum(low.abs(), high.abs())
    wrong = [
        (sign * (heights(plane, scores) - share) / (1.0 + softmax.terms(plane, sizes) + plane.intercept.abs())).amax()
        for plane, sign in ((below, 1.0), (above, -1.0))
    ]
    return max(map(float, wrong))


@pytest.mark.parametrize("width", WIDTHS)
def test_planes_are_below_and_above(width):
    low, high = boxes(width)
    for plane in relax_softmax(low, high):
        assert all(field.isfinite().all() for field in plane)
    assert largest_crossing(low, high) < 1e-13


def test_planes_that_take_the_logarithm_of_a_sum_with_a_small_number_are_noticed(monkeypatch):
    """As where log(p + 1e-8) stands for log p: of wide boxes the plane above cuts the function."""
    honest = softmax.log_range
    monkeypatch.setattr(softmax, "log_range", lambda *ends: tuple((end.exp() + 1e-8).log() for end in honest(*ends)))
    assert largest_crossing(*boxes(40.0)) > 1e-6


def test_chords_too_low_are_noticed(monkeypatch):
    low, high = boxes(1.0)
    below, above = relax_softmax(low, high)
    lifted = below._replace(direction=0.9 * below.direction)
    monkeypatch.setattr(softmax, "relax_softmax", lambda *ends: (lifted, above))
    scores = points(low, high)
    assert (heights(lifted, scores) - scores.softmax(dim=-1)).amax() > 1e-3


@pytest.mark.parametrize("width", WIDTHS)
def test_ranges_hold_and_are_met_at_corners(width):
    low, high = boxes(width)
    least, most = softmax_range(low, high)
    shares = points(low, high).softmax(dim=-1)
    assert (least <= shares.amin(dim=0)).all() and (shares.amax(dim=0) <= most).all()
    torch.testing.assert_close(least, shares.amin(dim=0), rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(most, shares.amax(dim=0), rtol=1e-9, atol=1e-300)


def test_planes_and_ranges_in_sixty_digits():
    low, high = boxes(15.0, 3)
    below, above = relax_softmax(low, high)
    least, most = softmax_range(low, high)
    sizes = torch.maximum(low.abs(), high.abs())
    room = [1e-13 * (1.0 + softmax.terms(plane, sizes) + plane.intercept.abs()) for plane in (below, above)]
    with mpmath.workdps(60):
        for box, point in itertools.product(range(3), range(0, 232, 7)):
            scores = [mpmath.mpf(float(value)) for value in points(low, high)[point, box]]
            powers = [mpmath.exp(value) for value in scores]
            for i in range(T):
                share = powers[i] / sum(powers)
                assert float(least[box, i]) <= share <= float(most[box, i])
                for plane, sign, lost in ((below, 1, room[0]), (above, -1, room[1])):
                    mixed = sum(mpmath.mpf(float(d)) * s for d, s in zip(plane.direction[box], scores, strict=True))
                    own, shared, intercept = (
                        mpmath.mpf(float(part[box, i])) for part in (plane[0], plane[1], plane[3])
                    )
                    assert sign * (own * scores[i] + shared * mixed + intercept - share) <= float(lost[box, i])


@pytest.mark.parametrize("width", WIDTHS)
def test_means_are_least_at_a_corner(width):
    low, high = boxes(width)
    values = normal(len(low), T, 3, seed=4)
    found = mean_below(low, high, values)
    means = (points(low, high).softmax(dim=-1)[..., None] * values).sum(dim=-2)
    assert (found <= means.amin(dim=0) + 1e-13).all()
    if width <= 40.0:  # of wider ones weights underflow
        torch.testing.assert_close(found, means[:32].amin(dim=0), rtol=0, atol=1e-11)


def test_scores_at_their_lowest_alone_give_no_least_mean():
    """The broken version, with one choice of scores for all, lies above."""
    low, high = boxes(1.0)
    values = normal(len(low), T, 3, seed=4)
    assert ((low.softmax(dim=-1)[..., None] * values).sum(dim=-2) > mean_below(low, high, values) + 1e-3).any()
