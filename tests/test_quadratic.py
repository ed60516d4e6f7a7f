"""Bounds of quadratic forms over balls, against the exact maxima."""

from __future__ import annotations

import pytest
import torch

from utils import quadratic
from utils.quadratic import largest_eigenvalue, line_and_squares


def problem(directions: int, size: int, dtype: torch.dtype = torch.float64):
    """Lines of very different lengths, weights and directions, and two squared radii."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -1, size, dtype=dtype)
    jacobian = torch.randn(2, directions, size, generator=generator, dtype=dtype) * decay
    weights = torch.rand(2, 6, directions, generator=generator, dtype=dtype) ** 3
    lengths = torch.tensor([0.0, 1e-6, 1.0, 10.0, 100.0, 1e6], dtype=dtype)[:, None]
    lines = lengths * torch.randn(2, 6, size, generator=generator, dtype=dtype)
    return lines, weights, jacobian, torch.tensor([0.3, 2.0], dtype=dtype)


def form_of(weights, jacobian):
    return jacobian.mT[:, None] @ (weights[..., None] * jacobian[:, None])


def exact_maximum(lines, weights, jacobian, size):
    """Of g.y + y.A y over ||y||^2 <= size: attained on the sphere at a lambda above all eigenvalues, by bisection."""
    values, vectors = torch.linalg.eigh(form_of(weights, jacobian))
    inner = (vectors.mT @ lines[..., None]).squeeze(-1) ** 2
    low, high = torch.full_like(values[..., -1], -60.0), torch.full_like(values[..., -1], 60.0)
    for _ in range(200):
        middle = 0.5 * (low + high)
        room = values[..., -1:] + middle.exp()[..., None] - values
        inside = 0.25 * (inner / room**2).sum(dim=-1) < size[:, None]
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    multiplier = values[..., -1] + high.exp()
    return size[:, None] * multiplier + 0.25 * (inner / (multiplier[..., None] - values)).sum(dim=-1)


SHAPES = [(60, 100), (200, 80), (5, 8), (1, 1), (40, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_line_and_squares_is_above_the_maximum_and_near(shape, dtype):
    asked = problem(*shape, dtype)
    bound, exact = line_and_squares(*asked), exact_maximum(*(tensor.double() for tensor in asked))
    slack = 1e-9 if dtype == torch.float64 else 1e-4
    assert (bound >= exact * (1.0 - slack)).all()
    assert (bound <= exact * 1.2).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_line_and_squares_is_above_every_point(shape):
    lines, weights, jacobian, size = problem(*shape)
    bound, form = line_and_squares(lines, weights, jacobian, size), form_of(weights, jacobian)
    # From ten starts up to a fixed point: the gradient's direction never goes down for a convex form.
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        y = torch.randn(lines.shape, generator=generator, dtype=lines.dtype)
        for _ in range(50):
            y = size.sqrt()[:, None, None] * torch.nn.functional.normalize(y, dim=-1)
            moved = (form @ y[..., None]).squeeze(-1)
            assert (((lines + moved) * y).sum(-1) <= bound * (1 + 1e-9)).all()
            y = lines + 2.0 * moved


def test_the_test_catches_a_form_without_its_rest(monkeypatch):
    """Without the squares outside of the leading directions, the bound is too low somewhere."""
    monkeypatch.setattr(quadratic, "LEADING", 1)
    honest = torch.Tensor.clamp
    monkeypatch.setattr(torch.Tensor, "clamp", lambda self, *a, **k: 0.0 * honest(self, *a, **k))
    with pytest.raises(AssertionError):
        for shape in SHAPES:
            test_line_and_squares_is_above_the_maximum_and_near(shape, torch.float64)


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.3, 0.7, 0.9, 1.0, 1.5, 100.0])
@pytest.mark.parametrize("leading", [1, 4, 32])
def test_no_multiplier_gives_a_wrong_bound(monkeypatch, share, leading):
    """The best multiplier is only sought for tightness: of a wrong one there is no bound, or a sound one."""
    best = quadratic._best_multiplier
    monkeypatch.setattr(quadratic, "LEADING", leading)
    monkeypatch.setattr(quadratic, "_best_multiplier", lambda *parts: share * best(*parts))
    for shape in SHAPES:
        asked = problem(*shape)
        assert (line_and_squares(*asked) >= exact_maximum(*asked) * (1.0 - 1e-9)).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e200])
def test_numbers_that_overflow_have_no_bound(broken):
    lines, weights, jacobian, size = problem(5, 8)
    weights[0, 0, 0] = broken
    bound = line_and_squares(lines, weights, jacobian, size)
    assert not bound.isnan().any()
    assert bool(bound[0, 0] > 1e150)


def test_gradients_are_those_of_the_bound():
    lines, weights, jacobian, size = problem(20, 12)
    lines, weights = lines[:, 2:5], weights[:, 2:5].clone().requires_grad_()
    total = line_and_squares(lines, weights, jacobian, size).sum()
    (gradient,) = torch.autograd.grad(total, weights)
    move = torch.rand(weights.shape, generator=torch.Generator().manual_seed(2), dtype=weights.dtype)
    fixed = weights.detach()
    ahead, behind = (line_and_squares(lines, fixed + h * move, jacobian, size).sum() for h in (1e-5, -1e-5))
    assert float((gradient * move).sum()) == pytest.approx(float(ahead - behind) / 2e-5, rel=2e-2)


def test_eigenvalue_is_bounded_from_above_and_not_far():
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(3, 12, 30, generator=generator, dtype=torch.float64)
    weights = torch.rand(3, 5, 12, generator=generator, dtype=torch.float64) ** 3
    weights[:, 0] = 0.0
    weights[:, 1, 3:] = 0.0
    bound = largest_eigenvalue(weights, jacobian)
    exact = torch.linalg.eigvalsh(form_of(weights, jacobian))[..., -1]
    assert (bound >= exact * (1 - 1e-12)).all()
    assert (bound[:, 1:] <= 3.0 * exact[:, 1:]).all()
    assert (bound[:, 0] < 1e-9).all()
