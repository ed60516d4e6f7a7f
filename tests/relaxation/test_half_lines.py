"""Lines around log, 1 / y, sqrt, sin and cos: sound in 60 digits on fine grids; domains; broken ones."""

from __future__ import annotations

import mpmath
import pytest
import torch

from utils.relaxation import half_lines
from utils.relaxation.lines import ACTIVATIONS

mpmath.mp.dps = 60
EXACT = {
    "log(0.0)": mpmath.log,
    "log(0.5)": lambda y: mpmath.log(max(y, mpmath.mpf(0.5))),
    "reciprocal(0.0)": lambda y: 1 / y,
    "reciprocal(0.01)": lambda y: 1 / max(y, mpmath.mpf(0.01)),
    "sqrt(0)": mpmath.sqrt,
    "sqrt(1)": lambda y: mpmath.sqrt(max(y, 0)),
    "sin": mpmath.sin,
    "cos": mpmath.cos,
}
SLOPES = (None, (0.0, 0.0), (0.4, 0.3), (-0.7, -0.2), (9.0, -8.0), (-300.0, 300.0))


def intervals(name: str, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Points, narrow and wide, around 0 and turns, far away; of functions on half lines only what is in there."""
    starts = [-1e4, -40.0, -6.3, -3.2, -1.6, -0.6, -1e-7, 0.0, 1e-9, 0.01, 0.3, 0.5, 1.5, 3.1, 5.9, 77.0, 1e6]
    pairs = [(start, start + width) for start in starts for width in (0.0, 1e-6, 0.3, 2.0, 6.2, 6.4, 50.0)]
    if name in ("log(0.0)", "reciprocal(0.0)", "sqrt(0)"):
        pairs = [pair for pair in pairs if pair[0] > 0 or (name == "sqrt(0)" and pair[0] == 0)]
    ends = torch.tensor(pairs, dtype=dtype)
    return ends[:, 0], ends[:, 1]


def grid(name: str, l, u, a) -> torch.Tensor:  # noqa: E741
    """Even and geometric points, and a finer grid around those where the function less a y is least and greatest."""
    shares = torch.cat((torch.linspace(0, 1, 101), torch.logspace(-9, 0, 60))).double()
    points = (l[:, None] + (u - l)[:, None] * shares).clamp(l[:, None], u[:, None])
    for _ in range(3):
        gaps = ACTIVATIONS[name].function(points) - a[:, None] * points
        step = (u - l)[:, None] * (points.shape[1] ** -1.0)
        best = [points.gather(1, of(dim=1, keepdim=True)) for of in (gaps.argmin, gaps.argmax)]
        around = torch.linspace(-1, 1, 9).double() * step
        points = torch.cat([points, *(one + around for one in best)], dim=1).clamp(l[:, None], u[:, None])
    return points


def check(name: str, dtype=torch.float64) -> None:
    l, u = intervals(name, dtype)  # noqa: E741
    for slopes in SLOPES:
        given = None if slopes is None else tuple(torch.full_like(l, slope) for slope in slopes)
        for sign, plane in zip((1, -1), ACTIVATIONS[name].relax(l, u, given), strict=True):
            a, c = plane.slopes[0].double(), plane.intercept.double()
            points = grid(name, l.double(), u.double(), a)
            gaps = sign * (ACTIVATIONS[name].function(points) - a[:, None] * points - c[:, None])
            for n in range(len(l)):
                for k in gaps[n].topk(3, largest=False).indices.tolist():
                    y = mpmath.mpf(float(points[n, k]))
                    gap = sign * (EXACT[name](y) - mpmath.mpf(float(a[n])) * y - mpmath.mpf(float(c[n])))
                    assert gap >= 0, f"{name}: {float(gap):.3g} on [{float(l[n])}, {float(u[n])}], slope {float(a[n])}"
            if dtype == torch.float64 and name not in ("sin", "cos"):
                size = 1.0 + ACTIVATIONS[name].function(points).abs().amax(dim=1) + (a.abs() * points.abs().amax(dim=1))
                assert (gaps.amin(dim=1) <= 1e-2 * size).all()  # they touch, as near as the grid is


@pytest.mark.parametrize("name", EXACT)
def test_lines_are_sound(name):
    check(name)
    check(name, torch.float32)


@pytest.mark.parametrize("name", EXACT)
def test_ranges_hold(name):
    l, u = intervals(name)  # noqa: E741
    low, high = ACTIVATIONS[name].image(l, u)
    values = ACTIVATIONS[name].function(grid(name, l, u, torch.zeros_like(l)))
    assert (low <= values.amin(dim=1)).all() and (values.amax(dim=1) <= high).all()


@pytest.mark.parametrize("name", ["log(0.0)", "reciprocal(0.0)", "sqrt(0)"])
def test_intervals_that_leave_the_domain_are_said(name):
    l, u = torch.tensor([0.5, -0.25]), torch.tensor([1.0, 1.0])  # noqa: E741
    for of in (ACTIVATIONS[name].relax, ACTIVATIONS[name].image):
        with pytest.raises(ValueError, match="as low as -0.25"):
            of(l, u)


def test_a_wave_with_a_wrong_turn_and_one_moved_by_half_a_turn_are_noticed(monkeypatch):
    monkeypatch.setitem(
        ACTIVATIONS, "sin", half_lines.wave(half_lines.SINE._replace(convex=(False,) * 6), half_lines.COSINE)
    )
    with pytest.raises(AssertionError):
        check("sin")
    monkeypatch.undo()
    monkeypatch.setattr(half_lines, "TURN", 3.0)
    with pytest.raises(AssertionError):
        check("sin")


def test_a_root_that_is_not_looked_at_where_it_touches_is_noticed(monkeypatch):
    monkeypatch.setattr(half_lines, "least", lambda points: points[0])
    with pytest.raises(AssertionError):
        check("sqrt(1)")


def test_lines_above_roots_of_huge_numbers_touch_where_they_have_to():
    l, u = torch.tensor([0.0, 1.0, 5e14]), torch.full((3,), 1e30)  # noqa: E741
    for slopes in (None, (torch.zeros(3), torch.full((3,), 1e-13))):
        (a,), c = ACTIVATIONS["sqrt(0)"].relax(l, u, slopes).upper
        points = (l[:, None] + (u - l)[:, None] * torch.logspace(-15, 0, 300)).double()
        assert (a[:, None].double() * points + c[:, None].double() >= points.sqrt()).all()
