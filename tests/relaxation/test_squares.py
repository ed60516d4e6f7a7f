"""Lines around squares: sound over the reals, tight; those of log1p are tested with the other activations."""

from __future__ import annotations

import pytest
import torch
from helpers import check_lines, intervals, normal

from utils.relaxation.lines import Plane, Relaxation
from utils.relaxation.squares import relax_square

SCALES = {"small": (0.01, 0.3, 1.0), "large": (30.0, 1e3, 1e8)}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_default_lines_of_squares(dtype, scales):
    l, u = intervals(SCALES[scales], dtype)  # noqa: E741
    check_lines("square", l, u, relax_square(l, u))


@pytest.mark.parametrize("scale", [1.0, 0.0, -3.0, 1e6, 1e-6])
def test_lines_of_squares_of_any_slope(scale):
    l, u = intervals((0.01, 1.0, 10.0, 1e8), torch.float64, per_scale=5)  # noqa: E741
    check_lines("square", l, u, relax_square(l, u, tuple(scale * normal(2, len(l), seed=3))))


def test_degenerate_intervals_give_the_square():
    y = torch.cat((normal(20, seed=5), torch.tensor([0.0, 30.0, -1e4]).double()))
    for (slope,), intercept in relax_square(y, y):
        torch.testing.assert_close(slope * y + intercept, y**2, rtol=1e-13, atol=1e-13)


def test_the_check_catches_broken_lines_of_squares():
    l, u = torch.tensor([-1.0, -2.0, 0.5]).double(), torch.tensor([2.0, 1.0, 0.7]).double()  # noqa: E741
    good = relax_square(l, u)
    lower, upper = good
    check_lines("square", l, u, good)
    for broken in (
        Relaxation(Plane(lower.slopes, lower.intercept + 1e-9), upper),
        Relaxation(lower, Plane(upper.slopes, upper.intercept - 1e-9)),
        Relaxation(Plane((lower.slopes[0] + 1e-3,), lower.intercept), upper),
        Relaxation(upper, lower),
        relax_square(l + 0.1, u - 0.05),
    ):
        with pytest.raises(AssertionError):
            check_lines("square", l, u, broken)
