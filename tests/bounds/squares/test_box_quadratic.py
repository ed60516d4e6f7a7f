"""Bounds of lines and weighted squares over boxes, against corners."""

from __future__ import annotations

import itertools

import pytest
import torch

from utils.bounds.squares import box_quadratic
from utils.bounds.squares.box_quadratic import line_and_squares_over_box, squares_over_box
from utils.bounds.squares.quadratic import Guesses, largest_eigenvalue


def problem(rows: int, directions: int, size: int, dtype: torch.dtype = torch.float64):
    """Lines, none for the first row; weights, none for the second; directions; boxes, one flat in part."""
    generator = torch.Generator().manual_seed(rows + size)
    jacobian = torch.randn(2, directions, size, generator=generator, dtype=dtype)
    jacobian = jacobian * torch.logspace(0, -1, directions, dtype=dtype)[:, None]
    weights = torch.rand(2, rows, directions, generator=generator, dtype=dtype) ** 4
    lines = torch.randn(2, rows, size, generator=generator, dtype=dtype)
    lines = lines * torch.logspace(-3, 3, rows, dtype=dtype)[:, None] * (torch.arange(rows) > 0)[:, None]
    weights[:, 1] = 0.0
    radii = 0.2 + torch.rand(2, size, generator=generator, dtype=dtype)
    if size > 2:
        radii[1, : size // 3] = 0.0
    return lines, weights, jacobian * (radii > 0)[:, None], radii


def value_at(points, lines, weights, jacobian):
    """g.y + sum_k w_k (J_k y)^2 at points, (batch, rows, n)."""
    return (lines * points).sum(-1) + (weights * (points @ jacobian.mT) ** 2).sum(-1)


def highest_corner(lines, weights, jacobian, radii, starts: int = 30):
    """The greatest value met at corners: all of few coordinates', or those to which the gradient leads."""
    size = radii.shape[-1]
    best = torch.full(weights.shape[:2], -torch.inf, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    signs = itertools.product((-1.0, 1.0), repeat=size) if size <= 8 else range(starts)
    for sign in signs:
        if size <= 8:
            points = torch.tensor(sign, dtype=torch.float64) * radii[:, None]
            best = torch.maximum(best, value_at(points, lines, weights, jacobian))
            continue
        points = torch.randn(*weights.shape[:2], size, generator=generator, dtype=torch.float64).sign() * radii[:, None]
        for _ in range(50):
            best = torch.maximum(best, value_at(points, lines, weights, jacobian))
            gradient = lines + 2.0 * (weights * (points @ jacobian.mT)) @ jacobian
            points = torch.where(gradient >= 0, radii[:, None], -radii[:, None])
    return best


SHAPES = [(6, 5, 1), (6, 3, 7), (5, 30, 8), (12, 40, 90), (8, 200, 120), (4, 150, 300)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_squares_are_bounded_from_above_and_not_far(shape, dtype, scale):
    _, weights, jacobian, radii = problem(*shape, dtype)
    bound = squares_over_box(scale * weights, scale * jacobian, radii / scale)
    best = scale * highest_corner(torch.zeros(()), *(tensor.double() for tensor in (weights, jacobian, radii)))
    assert (bound >= best).all()
    assert (bound <= 1.8 * best).all()
    assert (bound[:, 1] == 0.0).all()  # no weights, no squares


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_lines_and_squares_are_bounded_from_above_and_not_far(shape, scale):
    lines, weights, jacobian, radii = problem(*shape)
    bound = line_and_squares_over_box(lines * scale, weights, jacobian * scale, radii / scale)
    best = highest_corner(lines, weights, jacobian, radii)
    assert (bound >= best * (1.0 - 1e-9)).all()
    assert (bound <= 1.6 * best + 1e-12).all()
    alone = (lines.abs() * radii[:, None]).sum(-1)[:, 1]  # no weights: the line's deviation
    assert (bound[:, 1] <= 1.02 * alone).all()


def test_the_box_is_less_than_the_ball_around_it():
    _, weights, jacobian, radii = problem(12, 60, 200)
    weights, unit = weights[:, 2:], jacobian * radii[:, None]
    ball = radii.shape[-1] * largest_eigenvalue(weights, unit)
    ratio = squares_over_box(weights, unit, torch.ones_like(radii)) / ball
    assert float(ratio.mean()) < 0.8


def test_rows_in_parts_have_the_same_bounds(monkeypatch):
    lines, weights, jacobian, radii = problem(12, 40, 90)
    bounds = []
    for numbers in (2**23, 1):
        monkeypatch.setattr(box_quadratic, "PART_NUMBERS", numbers)
        squares = squares_over_box(weights, jacobian, radii)
        bounds.append((squares, line_and_squares_over_box(lines, weights, jacobian, radii)))
    for one, other in zip(*bounds, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_single_precision_is_far_inside_its_guard(monkeypatch, shape, share):
    """Bounds of the same D in single precision are above those in double, even with a tenth of the guard."""
    _, weights, jacobian, radii = problem(*shape)
    seen = []
    honest = box_quadratic._bound_with
    monkeypatch.setattr(box_quadratic, "_bound_with", lambda *parts: seen.append(parts) or honest(*parts))
    squares_over_box(weights, jacobian, radii)
    form, radii, d, beside = seen[0]
    assert d.dtype == torch.float32
    monkeypatch.setattr(box_quadratic, "GUARD_ULPS", share * box_quadratic.GUARD_ULPS)
    single = honest(form, radii, d, beside)
    wide = type(form)(*(part if part is None else part.double() for part in form))
    exact = honest(wide, radii.double(), d.double(), beside.double())
    assert (single >= exact).all()
    assert (single <= 1.02 * exact + 1e-5 * exact.amax()).all()


def without_cross(honest):
    return lambda *parts: honest(*parts)._replace(beside=torch.zeros(()))


def without_norm(honest):
    return lambda *parts: honest(*parts)._replace(norm=torch.zeros(()))


def too_short(honest):
    return lambda *parts: (0.9 * honest(*parts)[0], honest(*parts)[1])


def without_own(honest):
    return lambda form, *parts: honest(form._replace(own_weights=0.0 * form.own_weights), *parts)


BROKEN = [
    ("rest_of", without_cross, 0, False),
    ("rest_of", without_norm, 0, False),
    ("rest_of", without_norm, 0, True),
    ("_root_of_gram", too_short, 3, False),
    ("_root_of_gram", too_short, 3, True),
    ("_dual_of", without_own, 3, False),
    ("_dual_of", without_own, 3, True),
]


@pytest.mark.parametrize(("part", "broken", "own", "beside"), BROKEN, ids=lambda one: getattr(one, "__name__", one))
def test_the_tests_catch_a_broken_bound(monkeypatch, part, broken, own, beside):
    monkeypatch.setattr(box_quadratic, "LEADING", 1)
    monkeypatch.setattr(box_quadratic, "OWN", own)

    def try_all():
        for shape in [(80, 2, 2), (80, 2, 4), *SHAPES]:
            lines, weights, jacobian, radii = problem(*shape)
            lines = 0.0 * lines if beside else torch.zeros(())
            if beside:
                bound = line_and_squares_over_box(lines, weights, jacobian, radii)
            else:
                bound = squares_over_box(weights, jacobian, radii)
            assert (bound >= highest_corner(lines, weights, jacobian, radii) * (1.0 - 1e-9)).all()

    try_all()
    monkeypatch.setattr(box_quadratic, part, broken(getattr(box_quadratic, part)))
    with pytest.raises(AssertionError):
        try_all()


def test_a_root_that_was_not_found_gives_no_bound(monkeypatch):
    lines, weights, jacobian, radii = problem(6, 12, 30)
    honest = box_quadratic._root_of_gram
    monkeypatch.setattr(box_quadratic, "_root_of_gram", lambda *parts: (0.5 * honest(*parts)[0], ~honest(*parts)[1]))
    assert squares_over_box(weights, jacobian, radii)[:, 2:].isinf().all()
    assert line_and_squares_over_box(lines, weights, jacobian, radii).isinf().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_estimates_are_near_and_not_above(shape):
    lines, weights, jacobian, radii = problem(*shape)
    pairs = [
        (squares_over_box(weights, jacobian, radii, sound), line_and_squares_over_box(*problem(*shape), sound))
        for sound in (False, True)
    ]
    for estimate, bound in zip(*pairs, strict=True):
        assert (estimate <= bound * (1 + 1e-6) + 1e-12).all()
        assert (estimate >= 0.5 * bound - 1e-12).all()


def test_gradients_of_estimates_are_those_of_the_maximum(monkeypatch):
    """With V converged, a step of the weights changes the maximum as the gradient says."""
    monkeypatch.setattr(box_quadratic, "ESTIMATE_STEPS", 300)
    lines, weights, jacobian, radii = problem(6, 20, 30)
    move = torch.rand(weights.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * weights
    for function in (squares_over_box, lambda *parts: line_and_squares_over_box(lines, *parts)):
        asked = weights.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(asked, jacobian, radii, False).sum(), asked)
        ahead, behind = (function(weights + h * move, jacobian, radii, False).sum() for h in (1e-2, -1e-2))
        assert float((gradient * move).sum()) == pytest.approx(float((ahead - behind) / 2e-2), rel=0.02)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e200])
def test_squares_that_overflow_have_no_bound(broken):
    lines, weights, jacobian, radii = problem(6, 12, 30)
    weights[0, 2, 0] = broken
    for bound in (
        squares_over_box(weights, jacobian, radii),
        line_and_squares_over_box(lines, weights, jacobian, radii),
    ):
        assert not bound.isnan().any() and bool(bound[0, 2] > 1e150)
        assert bool(bound[1:].isfinite().all())


def test_estimates_that_keep_guesses_are_as_high_as_bounds_were(monkeypatch):
    lines, *squares = problem(8, 200, 120)

    def both(sound: bool, *guesses: Guesses) -> torch.Tensor:
        beside = line_and_squares_over_box(lines, *squares, sound, *guesses)
        return torch.cat((squares_over_box(*squares, sound, *guesses), beside), dim=1)

    def agree(found: torch.Tensor) -> bool:
        return torch.allclose(found, bound, rtol=0.1, atol=1e-9)

    bound, plain = both(True), both(False)
    assert not agree(plain)
    for kept in (False, True):  # the factor measured, and as it was
        guesses = Guesses()
        squares_over_box(*squares, False, guesses) if kept else None
        assert agree(torch.cat((squares_over_box(*squares, False, guesses), bound[:, 8:]), dim=1))
    guesses = Guesses()
    for _ in range(2):
        beside = line_and_squares_over_box(lines, *squares, False, guesses)
        assert agree(torch.cat((bound[:, :8], beside), dim=1))
    monkeypatch.setattr(box_quadratic, "MOST_EXCESS", 1.0)
    assert not agree(both(False, Guesses()))


def test_guesses_say_when_an_estimate_measures_again():
    _, *squares = problem(4, 6, 5)
    guesses, due = Guesses(), []
    for _ in range(2 * box_quadratic.EXCESS_TIMES + 2):
        due.append(guesses.due)
        squares_over_box(*squares, False, guesses)
    assert due[0] and due[box_quadratic.EXCESS_TIMES + 1]  # the passes that bound in full
    assert not all(due[1:])
