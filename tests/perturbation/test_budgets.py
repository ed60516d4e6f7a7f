"""Maxima over rooms that share a budget: against other solvers, exact arithmetic, and levels that are wrong."""

from __future__ import annotations

import itertools
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from helpers import normal
from scipy.optimize import linprog, minimize

from utils.perturbation import budgets
from utils.perturbation.budgets import largest_sum, most, nearest_within


def cases(norm, count=12, size=6, dtype=torch.float64):
    """Sizes, rooms and eps, some of them 0, and budgets from far too small to large enough for all."""
    sizes = normal(count, size, seed=1).abs()
    rooms = 0.7 * normal(count, size, seed=2).abs()
    eps = torch.linspace(0.0, 3.0 if norm == 1.0 else 1.6, count, dtype=torch.float64)
    rooms[::3, :2], sizes[1::4, 3], sizes[2::4, 4] = 0.0, 0.0, 1e-9
    sizes[5], rooms[7] = 0.0, 0.0
    sizes[8] = 1.0  # all alike
    return tuple(part.to(dtype) for part in (sizes, rooms, eps))


def solved(sizes, rooms, eps, norm):
    """The maximum by scipy."""
    bounds = [(0.0, float(room)) for room in rooms]
    if norm == 1.0:
        return -linprog(-sizes.numpy(), A_ub=np.ones((1, len(sizes))), b_ub=[float(eps)], bounds=bounds).fun
    ball = {"type": "ineq", "fun": lambda d: float(eps) ** 2 - d @ d, "jac": lambda d: -2.0 * d}
    start, options = 0.1 * float(eps) * rooms.numpy(), {"ftol": 1e-15, "maxiter": 1000}
    return -minimize(
        lambda d: -(sizes.numpy() @ d),
        start,
        jac=lambda d: -sizes.numpy(),
        bounds=bounds,
        constraints=[ball],
        method="SLSQP",
        options=options,
    ).fun


@pytest.mark.parametrize("norm", (1.0, 2.0))
def test_maxima_are_those_of_other_solvers(norm):
    sizes, rooms, eps = cases(norm)
    found = most(sizes, rooms, eps, norm)
    for k in range(len(eps)):
        expected = solved(sizes[k], rooms[k], eps[k], norm)
        assert abs(float(found[k]) - expected) < 1e-6 * (1.0 + expected), k


def exact_l1(sizes, rooms, eps):
    total, left = Fraction(0), Fraction(float(eps))
    for size, room in sorted(zip(sizes.tolist(), rooms.tolist(), strict=True), reverse=True):
        move = min(Fraction(room), left)
        total, left = total + Fraction(size) * move, left - move
    return mpmath.mpf(total.numerator) / total.denominator


def exact_l2(sizes, rooms, eps):
    c, r = [[mpmath.mpf(v) for v in part.tolist()] for part in (sizes, rooms)]
    eps = mpmath.mpf(float(eps))
    moved = [k for k in range(len(c)) if c[k] > 0 and r[k] > 0]
    if sum(r[k] ** 2 for k in moved) <= eps**2:
        return sum((c[k] * r[k] for k in moved), mpmath.mpf(0))
    low, high = mpmath.mpf(0), max(r[k] / c[k] for k in moved)
    for _ in range(230):
        middle = (low + high) / 2
        inside = sum(min(middle * c[k], r[k]) ** 2 for k in moved) <= eps**2
        low, high = (middle, high) if inside else (low, middle)
    return sum((c[k] * min(low * c[k], r[k]) for k in moved), mpmath.mpf(0))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize(("norm", "exact"), ((1.0, exact_l1), (2.0, exact_l2)))
def test_sixty_digits(norm, exact, dtype):
    sizes, rooms, eps = cases(norm, dtype=dtype)
    found, unit = most(sizes, rooms, eps, norm), torch.finfo(dtype).eps
    for k in range(len(eps)):
        expected = exact(sizes[k], rooms[k], eps[k])
        assert abs(mpmath.mpf(float(found[k])) - expected) <= 64 * unit * (expected + unit), k


@pytest.mark.parametrize("norm", (1.0, 2.0))
def test_any_level_is_above_the_maximum(norm, monkeypatch):
    """A search that ends too early costs tightness only; without the share of what is beyond, it would be unsound."""
    sizes, rooms, eps = cases(norm)
    best = most(sizes, rooms, eps, norm)
    monkeypatch.setattr(budgets, "ROUNDS", 1)
    monkeypatch.setattr(budgets, "_level_of_sizes", lambda c, r, eps: 0.5 * c.amax(dim=-1))
    early = most(sizes, rooms, eps, norm)
    assert (early >= best - 1e-12).all() and (early > best + 1e-3).any()


@pytest.mark.parametrize("norm", (0.0, 1.0, 2.0))
def test_gradients(norm):
    sizes, rooms = normal(3, 5, seed=3).abs().requires_grad_(), (0.4 * normal(3, 5, seed=4).abs()).requires_grad_()
    eps = torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64) * (3.0 if norm == 0.0 else 1.0)
    assert torch.autograd.gradcheck(lambda c, r: most(c, r, eps, norm), (sizes, rooms))


def test_largest_sums_count():
    gains = normal(4, 6, seed=5).abs()
    for count in range(8):
        found = largest_sum(gains, torch.full((4,), float(count), dtype=torch.float64))
        chosen = itertools.combinations(range(6), min(count, 6))
        expected = torch.stack([gains[:, list(places)].sum(dim=1) for places in chosen]).amax(dim=0)
        torch.testing.assert_close(found, expected)
    mixed = largest_sum(gains, torch.tensor([0.0, 1.0, 2.5, 9.0], dtype=torch.float64))
    ordered = gains.sort(dim=1, descending=True).values
    expected = [0.0, ordered[1, 0], ordered[2, :2].sum() + 0.5 * ordered[2, 2], ordered[3].sum()]
    torch.testing.assert_close(mixed, torch.tensor([float(value) for value in expected], dtype=torch.float64))


@pytest.mark.parametrize("norm", (1.0, 2.0))
def test_nearest_points(norm):
    """They are in the set, and no other point of it that scipy comes to from there is nearer."""
    moves, rooms, eps = cases(norm)
    found = nearest_within(moves, rooms, eps, norm)
    assert (found >= 0).all() and (found <= rooms).all()
    assert (torch.linalg.vector_norm(found, ord=norm, dim=-1) <= eps * (1.0 + 1e-12)).all()
    for k in range(1, len(eps)):
        left = {1.0: lambda d, e: e - d.sum(), 2.0: lambda d, e: e**2 - d @ d}[norm]
        ball = {"type": "ineq", "fun": left, "args": (float(eps[k]),)}
        options = {"ftol": 1e-14, "maxiter": 1000}
        other = minimize(
            lambda d, k=k: ((d - moves[k].numpy()) ** 2).sum(),
            0.5 * found[k].numpy(),
            bounds=[(0.0, float(room)) for room in rooms[k]],
            constraints=[ball],
            method="SLSQP",
            options=options,
        )
        assert float(((found[k] - moves[k]) ** 2).sum()) <= other.fun + 1e-6
