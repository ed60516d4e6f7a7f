"""Curved bounds of piecewise-linear functions: exact intercepts, in 60 digits, and where tuning starts."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch
from helpers import FUNCTIONS, KNOTS, intervals, normal, seeded

from utils.relaxation import curves as module
from utils.relaxation.curves import CURVED, Curves, curved_relaxation, smooth_curves

mpmath.mp.dps = 60
PIECES = {"relu": (0, 1), "leaky_relu": (mpmath.mpf(0.01), 1), "hardtanh": (0, 1, 0)}
KINDS = ("drawn", "line", "nearly a line", "steep", "of a piece")


def drawn(kind: str, l: torch.Tensor, u: torch.Tensor):  # noqa: E741
    """Centres, and slopes and curvatures of some kind, for boxes [l, u]."""
    count, dtype = len(l), l.dtype
    center = l + (u - l) * torch.rand(count, generator=seeded(1), dtype=torch.float64).to(dtype)
    slopes = [normal(count, seed=seed).to(dtype) for seed in (2, 3)]
    bends = [normal(count, seed=seed).abs().to(dtype) for seed in (4, 5)]
    if kind == "of a piece":
        slopes = [torch.ones_like(l), torch.zeros_like(l)]
    factor = {"line": 0.0, "nearly a line": 1e-30, "steep": 1e6}.get(kind, 1.0)
    return center.clamp(l, u), Curves(*((slope,) for slope in slopes), *((factor * bend,) for bend in bends))


def least_height(name: str, sign: int, low, high, center, slope, bend):
    """Minimum of ``sign f(z) - a z + q d^2 / 2`` on [low, high] in high precision, and the size of its terms there."""
    knots = [mpmath.mpf(knot) for knot in KNOTS[name]]
    where = [low, high, *(knot for knot in knots if low < knot < high)]
    if bend > 0:
        ends = [-mpmath.inf, *knots, mpmath.inf]
        turns = [center + (slope - sign * p) / bend for p in PIECES[name]]
        pieces = zip(turns, itertools.pairwise(ends), strict=True)
        where += [z for z, (left, right) in pieces if max(low, left) < z < min(high, right)]
    return min(sign * FUNCTIONS[name](z) - slope * z + bend * (z - center) ** 2 / 2 for z in where)


def check_intercepts(name: str, l: torch.Tensor, u: torch.Tensor, kind: str) -> None:  # noqa: E741
    """Fail unless both intercepts are sound, without tolerance, and exact but for rounding."""
    center, curves = drawn(kind, l, u)
    relaxation = curved_relaxation(CURVED.get(name), (center,), ((l, u),), curves)
    info = torch.finfo(l.dtype)
    sides = (1, relaxation.lower, curves.lower_curvatures), (-1, relaxation.upper, curves.upper_curvatures)
    for sign, plane, (bends,) in sides:
        assert plane.intercept.isfinite().all()
        parts = (l, u, center, *plane.slopes, bends, plane.intercept)
        for values in zip(*(part.tolist() for part in parts), strict=True):
            low, high, middle, slope, bend, intercept = (mpmath.mpf(value) for value in values)
            exact = least_height(name, sign, low, high, middle, sign * slope, bend)
            assert sign * intercept <= exact + info.tiny, f"{name}, {sign}: above the minimum at {values}"
            size = max(abs(low), abs(high))
            room = 512 * info.eps * size * (1 + abs(slope) + bend * (high - low + size)) + info.tiny**0.5
            assert sign * intercept >= exact - room, f"{name}, {sign}: below the minimum at {values}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(PIECES))
def test_intercepts_of_pieces_are_exact(name, dtype, kind):
    check_intercepts(name, *intervals((1e-6, 0.1, 1.0, 30.0, 1e4), dtype, per_scale=8), kind)


@pytest.mark.parametrize("name", sorted(PIECES))
def test_the_check_catches_a_minimum_between_ends_and_knots_that_is_forgotten(name, monkeypatch):
    def only_planes(pieces, sign, centers, box, slopes, curvatures):
        points = (*box[0], *(torch.full_like(box[0][0], knot).clamp(*box[0]) for knot in pieces.knots))
        heights = [
            sign * pieces.function(z) - slopes[0] * z + 0.5 * curvatures[0] * (z - centers[0]) ** 2 for z in points
        ]
        return module.least(heights) - module._guard(box[0][1].abs(), box, centers, slopes, curvatures)

    monkeypatch.setattr(module, "_lowest_pieces", only_planes)
    monkeypatch.setattr(module, "CURVED", module.CurvedFunctions())
    monkeypatch.setitem(CURVED, name, module.CURVED.get(name))
    with pytest.raises(AssertionError, match="above the minimum"):
        check_intercepts(name, *intervals((1.0,), torch.float64), "drawn")


@pytest.mark.parametrize("name", ["relu", "leaky_relu(0.3)", "hardtanh(0, 6)", "hardtanh(-2, 0.5)"])
def test_first_curves_of_pieces(name):
    """They are the function where it does not bend, and lose less than a line's gap where it does."""
    l, u = intervals((0.1, 1.0, 30.0), torch.float64)  # noqa: E741
    center = 0.5 * (l + u)
    curves = CURVED.get(name).tangent((center,), ((l, u),))
    relaxation = curved_relaxation(CURVED.get(name), (center,), ((l, u),), curves)
    value = {"relu": torch.relu, "leaky_relu(0.3)": lambda z: torch.maximum(z, 0.3 * z)}.get(name)
    value = value or (lambda z: z.clamp(*map(float, name[9:-1].split(","))))
    below, above = (plane.slopes[0] * center + plane.intercept for plane in relaxation)
    gap = above - below
    assert (gap >= -1e-12 * (1.0 + center.abs())).all()
    secant = (value(u) - value(l)) / (u - l).clamp(min=1e-300)
    middle = value(l) + secant * (center - l)
    bent = (middle - value(center)).abs() > 1e-9 * (1.0 + center.abs())
    assert bent.any() and (~bent).any()
    if name != "hardtanh(-2, 0.5)" and name != "hardtanh(0, 6)":
        knotless = (l >= 0) | (u <= 0)
        assert (gap[knotless] <= 1e-9 * (1.0 + center[knotless].abs())).all()
        assert all((part[0][knotless] == 0).all() for part in curves[2:])


def test_names_without_curves():
    assert CURVED.get("softmax") is None and "softmax" not in CURVED
    with pytest.raises(KeyError):
        CURVED["softmax"]
    assert CURVED["leaky_relu(0.25)"] is CURVED.get("leaky_relu(0.25)")


@pytest.mark.parametrize("bend", [1.0, 0.5])
def test_curves_of_a_users_own_smooth_function(bend):
    """Of the sine, whose second derivative is 1 at most; with less than that some intercept is too high."""

    def tangent(centers, box):
        one = torch.full_like(centers[0], bend)
        return Curves((centers[0].cos(),), (centers[0].cos(),), (one,), (one,))

    sine = smooth_curves(torch.sin, lambda box: (bend,), tangent)
    center = torch.linspace(-4.0, 4.0, 301, dtype=torch.float64)
    low, high = center - 9.0, center + 7.0
    curves = sine.tangent((center,), ((low, high),))
    curves = curves._replace(lower_curvatures=(0.0 * center,), upper_curvatures=(0.0 * center,))
    lower, upper = curved_relaxation(sine, (center,), ((low, high),), curves)
    z = low[:, None] + (high - low)[:, None] * torch.linspace(0.0, 1.0, 4001, dtype=torch.float64)
    below, above = (plane.slopes[0][:, None] * z + plane.intercept[:, None] for plane in (lower, upper))
    assert bool((below <= z.sin()).all() and (z.sin() <= above).all()) == (bend == 1.0)
