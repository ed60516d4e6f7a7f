"""Bounds of quadratic forms over balls, against the exact maxima."""

from __future__ import annotations

import pytest
import torch

from utils.bounds.squares import quadratic
from utils.bounds.squares.quadratic import largest_eigenvalue, line_and_squares


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


def check_above() -> None:
    for shape in SHAPES:
        asked = problem(*shape)
        assert (line_and_squares(*asked) >= exact_maximum(*asked) * (1.0 - 1e-9)).all()


@pytest.mark.parametrize("part", ["beside", "norm"])
def test_the_test_catches_lines_and_squares_without_a_part_of_the_rest(monkeypatch, part):
    """Without the squares outside of the leading directions, the bound is too low somewhere."""
    for name in ("LEADING", "LEADING_BESIDE_LINES"):
        monkeypatch.setattr(quadratic, name, 1)
    check_above()
    honest = quadratic.rest_of
    monkeypatch.setattr(quadratic, "rest_of", lambda *parts: honest(*parts)._replace(**{part: torch.zeros(())}))
    with pytest.raises(AssertionError):
        check_above()


def test_a_basis_that_misses_the_lines_is_sound(monkeypatch):
    monkeypatch.setattr(quadratic, "_basis_of_lines", lambda lines, directions: directions)
    check_above()


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.3, 0.7, 0.9, 1.0, 1.5, 100.0])
@pytest.mark.parametrize("leading", [1, 4, 32])
def test_no_multiplier_gives_a_wrong_bound(monkeypatch, share, leading):
    """The best multiplier is only sought for tightness: of a wrong one there is no bound, or a sound one."""
    best = quadratic._best_multiplier
    for name in ("LEADING", "LEADING_BESIDE_LINES"):
        monkeypatch.setattr(quadratic, name, leading)
    monkeypatch.setattr(quadratic, "_best_multiplier", lambda *parts: share * best(*parts))
    check_above()


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


def squares_of(rank: int, directions: int, size: int, dtype: torch.dtype = torch.float64):
    """Weights, none or few of them in the first rows, and directions of forms with ``rank`` comparable eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(3, directions, rank, generator=generator, dtype=dtype) @ torch.randn(
        3, rank, size, generator=generator, dtype=dtype
    )
    weights = torch.rand(3, 5, directions, generator=generator, dtype=dtype) ** 3
    weights[:, 0], weights[:, 1, 3:] = 0.0, 0.0
    return weights, jacobian


FORMS = [(12, 12, 30), (5, 300, 20), (100, 300, 120), (120, 90, 500), (1, 1, 1)]


@pytest.mark.parametrize("rank_and_shape", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_eigenvalue_is_bounded_from_above_and_not_far(rank_and_shape, dtype, scale):
    weights, jacobian = squares_of(*rank_and_shape, dtype)
    bound = largest_eigenvalue(scale * weights, scale * jacobian)
    exact = torch.linalg.eigvalsh(form_of(scale * weights.double(), scale * jacobian.double()))[..., -1]
    assert (bound >= exact).all()
    assert (bound[:, 1:] <= 1.5 * exact[:, 1:]).all()
    assert (bound[:, 0] == 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forms_far_below_the_greatest_numbers_are_bounded(dtype):
    """Rows with neurons of their own, down to 1e-20 of the first row's: their squares vanish in single precision."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(2, 200, 150, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, 5, 200, generator=generator, dtype=torch.float64)
    for row, sizes in enumerate(torch.logspace(0, -20, 5, dtype=torch.float64)):
        own = torch.arange(200) // 40 == row
        jacobian[:, own] *= sizes
        weights[:, row, ~own] = 0.0
    roots = weights.sqrt().unsqueeze(-1) * jacobian.unsqueeze(1)
    unit = roots.abs().amax(dim=(-2, -1), keepdim=True)
    exact = (torch.linalg.matrix_norm(roots / unit, 2) * unit[..., 0, 0]) ** 2
    assert (largest_eigenvalue(weights.to(dtype), jacobian.to(dtype)) >= exact * (1.0 - 1e-5)).all()


def test_the_test_catches_an_eigenvalue_without_its_rest(monkeypatch):
    def check() -> None:
        for rank_and_shape in FORMS:
            weights, jacobian = squares_of(*rank_and_shape)
            exact = torch.linalg.eigvalsh(form_of(weights, jacobian))[..., -1]
            assert (largest_eigenvalue(weights, jacobian) >= exact).all()

    monkeypatch.setattr(quadratic, "LEADING", 2)
    check()
    monkeypatch.setattr(quadratic, "_squared_rest", lambda weights, jacobian, inner, guard: 0.0 * guard)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("rank_and_shape", FORMS, ids=str)
def test_what_a_basis_leaves_is_not_less_for_rounding(rank_and_shape):
    """Norms in single precision against those of the same numbers in double, of bases that leave much and nothing."""
    weights, jacobian, _ = quadratic.in_single(*squares_of(*rank_and_shape))
    weights = weights[:, 1:]
    for leading in (1, 8, 64):
        basis = quadratic.leading_directions(weights, jacobian, leading)
        inner, guard = quadratic.block(weights, jacobian @ basis), quadratic.rounding_guard(weights, jacobian)
        whole = form_of(weights.double(), jacobian.double()).square().sum(dim=(-2, -1))
        basis = torch.linalg.qr(basis.double())[0]
        exact = whole - quadratic.block(weights.double(), jacobian.double() @ basis).square().sum(dim=(-2, -1))
        assert (quadratic._squared_rest(weights, jacobian, inner, guard) >= exact).all()


@pytest.mark.parametrize("rank_and_shape", FORMS, ids=str)
def test_single_precision_is_far_inside_the_guard(rank_and_shape):
    """The norms of the rest, from rounded Gram matrices, are above the exact ones though the guard be much smaller."""
    weights, jacobian = squares_of(*rank_and_shape)
    weights = weights[:, 1:]
    basis = quadratic.leading_directions(weights, jacobian, 8)
    w, j, unit = quadratic.in_single(weights, jacobian)
    rounded = quadratic.rest_of(w, j @ basis.float(), j)
    form, trace = form_of(weights, jacobian), quadratic._weighted_lengths(weights, jacobian)
    inside = basis.mT[:, None] @ form @ basis[:, None]
    aside = (form @ basis[:, None]).square().sum((-1, -2)) - inside.square().sum((-1, -2))
    outside = form.square().sum((-1, -2)) - 2.0 * aside - inside.square().sum((-1, -2))
    for found, exact in ((rounded.beside.double(), aside), (rounded.norm.double() ** 2, outside)):
        guard = quadratic.GUARD_ULPS * torch.finfo(torch.float32).eps * (trace / unit) ** 2
        error = found - guard - exact / unit**2
        assert (error.abs() <= 0.1 * guard + 1e-12).all()


@pytest.mark.parametrize("rank_and_shape", FORMS, ids=str)
def test_estimates_are_near_and_not_above(rank_and_shape):
    weights, jacobian = squares_of(*rank_and_shape)
    estimate, bound = largest_eigenvalue(weights, jacobian, sound=False), largest_eigenvalue(weights, jacobian)
    assert (estimate <= bound).all() and (estimate >= 0.5 * bound)[:, 1:].all()
    lines, _, _, size = problem(60, rank_and_shape[2])
    asked = (lines[:1].expand(3, -1, -1)[:, :5], weights, jacobian, size[:1].expand(3))
    estimate, bound = line_and_squares(*asked, sound=False), line_and_squares(*asked)
    assert (estimate <= bound * (1 + 1e-6)).all() and (estimate >= 0.5 * bound)[:, 1:].all()


def test_gradients_of_estimates_are_those_of_the_eigenvalue():
    weights, jacobian = (tensor.requires_grad_() for tensor in squares_of(6, 40, 20))
    estimate = largest_eigenvalue(weights, jacobian, sound=False)[:, 2:].sum()
    exact = torch.linalg.eigvalsh(form_of(weights, jacobian))[:, 2:, -1].sum()
    pairs = zip(*(torch.autograd.grad(total, (weights, jacobian)) for total in (estimate, exact)), strict=True)
    for found, sought in pairs:
        assert torch.nn.functional.cosine_similarity(found.flatten(), sought.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e200])
def test_an_eigenvalue_that_overflows_has_no_bound(broken):
    weights, jacobian = squares_of(12, 12, 30)
    weights[0, 2, 0] = broken
    bound = largest_eigenvalue(weights, jacobian)
    assert not bound.isnan().any() and bool(bound[0, 2] > 1e150)
    assert bool(bound[1:].isfinite().all())


def share_of_guard(count: int, value: float) -> float:
    """Of what is added for rounding, the error of a sum of ``count`` equal squares in single precision."""
    weights, jacobian = torch.full((1, 1, count), 0.9), torch.full((1, count, 1), value)
    exact = (weights.double() @ jacobian.double() ** 2).item()
    return abs(quadratic.block(weights, jacobian).item() - exact) / quadratic.rounding_guard(weights, jacobian).item()


def test_guards_grow_with_the_number_of_neurons(monkeypatch):
    """Sums of equal squares round to the same side again and again."""
    asked = [(count, value) for count in (448, 20_000, 200_000) for value in (0.7, 1.0 / 3.0, 0.9)]
    assert max(share_of_guard(*one) for one in asked) < 0.25
    monkeypatch.setattr(quadratic, "GUARD_TERMS", 10**9)
    assert max(share_of_guard(*one) for one in asked) > 1.0


@pytest.mark.parametrize("rows", (5, 512))
def test_norms_in_parts_are_those_of_the_whole_form(rows, monkeypatch):
    """Columns that a part has no numbers in are left out, wherever they are, and nothing else."""
    monkeypatch.setattr(quadratic, "GRAM_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(2, 23, 12, generator=generator, dtype=torch.float64)
    jacobian[:, :7, 4:] = 0.0  # early steps, forward and backward
    jacobian[:, 7:15, :9] = 0.0
    jacobian[0, 20:] = 0.0  # of one sample alone
    weights = torch.rand(2, 4, 23, generator=generator, dtype=torch.float64)
    forms = torch.einsum("brk,bki,bkj->brij", weights, jacobian, jacobian)
    expected = (forms**2).sum(dim=(-2, -1))
    assert torch.allclose(quadratic._squared_norm(weights, jacobian), expected, rtol=1e-12)
    assert torch.equal(quadratic._squared_norm(weights, 0.0 * jacobian), torch.zeros(2, 4, dtype=torch.float64))
