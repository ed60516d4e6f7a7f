"""Bounds of eigenvalues: above the truth whatever the routines return, near it, and for every kind of matrix."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from utils.bounds.squares import eigenvalues
from utils.bounds.squares.box_quadratic import line_and_squares_over_box, squares_over_box
from utils.bounds.squares.eigenvalues import eigenvalue_bound, eigh_guess, norm_by_powers
from utils.bounds.squares.quadratic import Guesses, in_single, largest_eigenvalue, line_and_squares
from utils.certify import certified_margin
from utils.network.models import SequenceClassifier

KINDS = ("random", "semidefinite", "rank one", "graded", "negative", "zero", "diagonal", "equal")


def symmetric(kind: str, m: int, count: int = 7) -> torch.Tensor:
    """Symmetric matrices, (count, m, m), float64."""
    generator = torch.Generator().manual_seed(m)
    a = torch.randn(count, m, m, generator=generator, dtype=torch.float64)
    shades = 10.0 ** (-14.0 * torch.rand(count, m, 1, generator=generator, dtype=torch.float64))
    made = {
        "random": a + a.mT,
        "semidefinite": a @ a.mT,
        "rank one": a[..., :1] @ a[..., :1].mT,
        "graded": (shades * a) @ (shades * a).mT,
        "negative": -(a @ a.mT) - torch.eye(m),
        "zero": torch.zeros_like(a),
        "diagonal": torch.diag_embed(a[..., 0]),
        "equal": torch.eye(m, dtype=a.dtype).expand(count, m, m),
    }
    return made[kind].contiguous()


def exact(matrices: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvalsh(matrices.double())[..., -1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 19, 80])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_a_bound_is_above_and_near(kind, m, dtype, scale):
    matrices = (scale * symmetric(kind, m)).to(dtype)
    size = matrices.double().norm(dim=(-2, -1))
    bound, truth = eigenvalue_bound(matrices), exact(matrices)
    assert (bound >= truth - 1e-14 * size).all()
    near = 1e-9 if dtype == torch.float64 else 1e-4
    assert (bound <= truth + near * (size + torch.finfo(dtype).tiny) + 1e-140).all()  # squares below that vanish


@pytest.mark.parametrize("m", [1, 7, 60])
def test_what_is_proved_of_a_guess_holds_in_exact_arithmetic(m):
    """Matrices of rank one of whole numbers, whose eigenvalue is known, and guesses a few units above and below it."""
    vectors = torch.randint(-999, 1000, (40, m), generator=torch.Generator().manual_seed(m)).double()
    vectors[:, 0] += 1000.0
    matrices, greatest = vectors[..., None] @ vectors[:, None], (vectors**2).sum(dim=1)
    size = eigenvalues._norm(matrices)
    assert all(Fraction(float(norm)) >= Fraction(float(most)) for norm, most in zip(size, greatest, strict=True))
    for units in (-64, -8, -1, 0, 1, 8, 64):
        found = eigenvalues._proved(matrices, greatest * (1.0 + units * torch.finfo(torch.float64).eps), size)
        assert (found >= greatest).all() and (found <= greatest * (1.0 + 1e-9)).all()


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1.0, 1e100])
def test_frobenius_norms_are_rounded_up(scale):
    matrices = scale * symmetric("random", 9)
    for matrix, norm in zip(matrices, eigenvalues._norm(matrices), strict=True):
        assert Fraction(float(norm)) ** 2 >= sum(Fraction(float(number)) ** 2 for number in matrix.flatten())


def check_norm_by_powers(kind: str, m: int, dtype: torch.dtype, scale: float) -> None:
    matrices = (scale * symmetric(kind, m)).to(dtype)
    truth = torch.linalg.eigvalsh(matrices.double()).abs().amax(dim=-1)
    bound = norm_by_powers(matrices)
    assert (bound >= truth * (1.0 - 1e-13)).all()
    most = m ** (0.5 / 2**eigenvalues.SQUARINGS) * (1.0 + 2e-3)  # and what rounding adds in single precision
    vanishing = 1e-140 if dtype == torch.float64 else 1e-34  # squares below vanish
    assert (bound <= most * truth + vanishing).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 19, 80])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_a_norm_by_powers_is_above_and_near(kind, m, dtype, scale):
    check_norm_by_powers(kind, m, dtype, scale)


def test_norms_by_powers_without_the_rounding_of_products_are_caught(monkeypatch):
    """Products that lose what they may lose: the bound must pay for it."""
    product = torch.Tensor.__matmul__

    def low(a, b):
        found = product(a, b)
        return found * (1.0 - a.shape[-1] * torch.finfo(a.dtype).eps) if a.dtype == torch.float32 else found

    monkeypatch.setattr(torch.Tensor, "__matmul__", low)
    check_norm_by_powers("rank one", 19, torch.float32, 1.0)
    monkeypatch.setattr(eigenvalues, "torch", _WithoutEps(torch))
    with pytest.raises(AssertionError):
        check_norm_by_powers("rank one", 19, torch.float32, 1.0)


class _WithoutEps:
    """torch, whose rounding in single precision is taken for that of double."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    def finfo(self, dtype):
        return torch.finfo(torch.float64)


@pytest.mark.parametrize("kind", ["nothing", "noise", "another problem's"])
def test_no_bound_rests_on_guesses(kind):
    generator = torch.Generator().manual_seed(3)
    weights, jacobian = torch.rand(2, 5, 40, generator=generator), torch.randn(2, 40, 30, generator=generator)
    guesses = Guesses()
    found = {"nothing": torch.zeros(2, 30, 30), "noise": torch.randn(2, 30, 30, generator=generator)}.get(kind)
    if found is None:
        largest_eigenvalue(weights.flip(-1), jacobian.flip(-1), False, guesses)
    else:
        guesses.keep("directions", found)
    form = jacobian.double().mT.unsqueeze(1) @ (weights.double().unsqueeze(-1) * jacobian.double().unsqueeze(1))
    for _ in range(2):
        bound = largest_eigenvalue(weights, jacobian, guesses=guesses)
        assert (bound.double() >= exact(form)).all()


def wrong(values):
    return torch.zeros_like(values)


def half_nan(values):
    values = values.clone()
    values[..., 0] = torch.nan
    values[..., -1] = 0.0
    return values


def all_nan(values):
    return torch.full_like(values, torch.nan)


def huge(values):
    return values + 1e30


def refuse(values):
    raise torch.linalg.LinAlgError("failed to converge")


LIES = (wrong, half_nan, all_nan, huge, refuse)


def squares(rows: int = 5, k: int = 9, n: int = 4):
    generator = torch.Generator().manual_seed(k)
    weights = torch.rand(2, rows, k, generator=generator, dtype=torch.float64)
    return weights, torch.randn(2, k, n, generator=generator, dtype=torch.float64)


def corners(n: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * n)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("only_single", [True, False], ids=["single", "both precisions"])
def test_no_verdict_rests_on_a_routine(monkeypatch, lie, only_single):
    """Eigenvalues that are wrong, not finite or not there: every bound stays above the maximum."""
    eigvalsh, eigh = torch.linalg.eigvalsh, torch.linalg.eigh

    def lies(matrices):
        return eigvalsh(matrices) if only_single and matrices.dtype == torch.float64 else lie(eigvalsh(matrices))

    def lies_twice(matrices):
        values, vectors = eigh(matrices)
        return (values, vectors) if only_single and matrices.dtype == torch.float64 else (lie(values), vectors)

    matrices = symmetric("semidefinite", 19).float()
    weights, jacobian = squares()
    lines = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.einsum("brk,bkp->brp", weights, (jacobian @ corners(4).mT) ** 2)
    most, with_line = values.amax(dim=-1), (values + lines @ corners(4).mT).amax(dim=-1)
    greatest = exact(torch.einsum("brk,bki,bkj->brij", weights, jacobian, jacobian))
    truth = exact(matrices)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lies)
    monkeypatch.setattr(torch.linalg, "eigh", lies_twice)
    radii = torch.ones(2, 4, dtype=torch.float64)
    assert (eigenvalue_bound(matrices) >= truth).all()
    assert (largest_eigenvalue(weights, jacobian) >= greatest).all()
    for precision in (torch.float32, torch.float64):
        asked = [tensor.to(precision) for tensor in (lines, weights, jacobian)]
        assert (line_and_squares_over_box(*asked, radii.to(precision)) >= with_line * (1.0 - 1e-6)).all()
        assert (line_and_squares(*asked, torch.full((2,), 4.0, dtype=precision)) >= with_line * (1.0 - 1e-6)).all()
        assert (squares_over_box(*asked[1:], radii.to(precision)) >= most * (1.0 - 1e-6)).all()
    if only_single and lie is not huge:
        assert (eigenvalue_bound(matrices) <= truth * 1.001).all()


@pytest.mark.parametrize("seed", [15, 20, 63, 164, 228, 244, 278, 1430, 1518])
def test_matrices_on_which_a_routine_fails(seed):
    """Graded squares of low rank, on which one raised an error, or returned numbers near 0 beside NaN."""
    n, k = ((1, 90), (2, 200), (3, 40), (6, 20))[seed % 4]
    generator = torch.Generator().manual_seed(seed)
    weights, shades, kept = torch.rand(3, 100, k, generator=generator, dtype=torch.float64)
    weights = (weights * 10.0 ** (-14.0 * shades) * (kept < 0.5))[None]
    shades = torch.rand(k, 1, generator=generator, dtype=torch.float64)
    jacobian = torch.randn(1, k, n, generator=generator, dtype=torch.float64) * 10.0 ** (
        -14.0 * shades * (seed % 8 > 3)
    )
    most = (weights @ (jacobian @ corners(n).reshape(-1, n).mT) ** 2).amax(dim=-1)
    assert (squares_over_box(weights, jacobian, torch.ones(1, n, dtype=torch.float64)) >= most).all()
    form = torch.einsum("brk,bki,bkj->brij", weights, jacobian, jacobian)
    assert (largest_eigenvalue(weights, jacobian) >= exact(form)).all()


def test_extreme_units_do_not_underflow():
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for size in (1e-30, 1e-21, 1e21, 1e30):
        assert 1.0 <= float(squares_over_box(one, size * one, one[0] / size)) < 1.001
    assert float(largest_eigenvalue(one.float(), 1e-24 * one.float())) > 0.0


def test_less_precise_products_are_not_relied_on():
    """Where torch may take TF32 for products of single precision, forms are set up in double."""
    weights, jacobian = squares()
    plain = largest_eigenvalue(weights, jacobian)
    try:
        torch.set_float32_matmul_precision("high")
        w, j, _ = in_single(weights, jacobian)
        bound = largest_eigenvalue(weights, jacobian)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert w.dtype == j.dtype == torch.float64
    assert in_single(weights, jacobian)[0].dtype == torch.float32
    form = torch.einsum("brk,bki,bkj->brij", weights, jacobian, jacobian)
    assert (bound >= exact(form)).all() and (bound <= plain).all()


def test_what_is_not_finite_has_no_bound():
    for bad in (torch.nan, torch.inf, -torch.inf):
        matrices = symmetric("random", 5)
        matrices[2, 1, 1] = bad
        bound = eigenvalue_bound(matrices)
        assert bound[2] == torch.inf and bound[[0, 1, 3, 4, 5, 6]].isfinite().all()
        powers = norm_by_powers(matrices)
        assert powers[2] == torch.inf and powers[[0, 1, 3, 4, 5, 6]].isfinite().all()
        assert (bound[3:] >= exact(matrices[3:])).all()


def test_a_bound_without_the_proof_is_caught(monkeypatch):
    """If what the factor leaves were not counted, a wrong eigenvalue would be believed."""
    monkeypatch.setattr("utils.bounds.squares.eigenvalues._proved", lambda matrices, guess, size: guess)
    with pytest.raises(AssertionError):
        test_no_verdict_rests_on_a_routine(monkeypatch, wrong, False)


def test_guesses_never_raise(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    values, vectors = eigh_guess(symmetric("random", 4), vectors=True)
    assert values.isnan().all() and vectors.isnan().all() and values.shape == (7, 4) and vectors.shape == (7, 4, 4)


@pytest.mark.parametrize("norm", [1.0, 2.0, torch.inf])
@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
def test_margins_with_curves_have_a_gradient(cell, norm):
    """It predicts how the margin changes with the weights, the squares' part included."""
    torch.manual_seed(0)
    model = SequenceClassifier(cell(3, 6, batch_first=True), nn.Linear(6, 3)).double()
    x, eps = torch.rand(2, 3, 3, dtype=torch.float64), 0.2
    labels = model(x).argmax(dim=1)

    def margin():
        return certified_margin(model, x, labels, eps, norm=norm, method="curve", curve_steps=1, alpha_steps=1).sum()

    weight = model.rnn.weight_hh_l0
    (gradient,) = torch.autograd.grad(margin(), weight)
    assert gradient.isfinite().all()
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        weight += step
        above = margin()
        weight -= 2.0 * step
        below = margin()
    assert 0.5 < float((above - below) / (2.0 * step * gradient).sum()) < 2.0
