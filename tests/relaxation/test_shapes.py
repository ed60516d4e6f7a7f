"""Lines from the table of shapes: sound in 60 digits, touching, and nearly of the least volume."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch

from utils.relaxation import shapes
from utils.relaxation.lines import ACTIVATIONS

mpmath.mp.dps = 60


def _erfc(y):
    return mpmath.erfc(y)


EXACT = {
    "silu": lambda y: y / (1 + mpmath.exp(-y)),
    "gelu": lambda y: y * _erfc(-y / mpmath.sqrt(2)) / 2,
    "mish": lambda y: y * mpmath.tanh(mpmath.log1p(mpmath.exp(y))),
    "hardswish": lambda y: y * min(max(y + 3, 0), 6) / 6,
    "softsign": lambda y: y / (1 + abs(y)),
    "tanhshrink": lambda y: y - mpmath.tanh(y),
    "logsigmoid": lambda y: -mpmath.log1p(mpmath.exp(-y)),
    "exp": mpmath.exp,
    "abs": abs,
    "erf": mpmath.erf,
    "elu(1.7,1.1,0.6)": lambda y: (
        (y if y > 0 else mpmath.mpf(1.7) * mpmath.expm1(y / mpmath.mpf(0.6))) * mpmath.mpf(1.1)
    ),
    "power(2)": lambda y: y**2,
    "power(3)": lambda y: y**3,
    "rsqrt(0.5)": lambda y: 1 / mpmath.sqrt(max(y, mpmath.mpf(-0.25)) + mpmath.mpf(0.5)),
    "softshrink(0.5)": lambda y: y - 0.5 if y > 0.5 else y + 0.5 if y < -0.5 else mpmath.mpf(0),
}
TORCH = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "mish": torch.nn.functional.mish,
    "hardswish": torch.nn.functional.hardswish,
    "logsigmoid": torch.nn.functional.logsigmoid,
}


def test_every_shape_is_tested():
    assert set(shapes.SHAPES) <= set(EXACT)
    assert {name.partition("(")[0] for name in EXACT if "(" in name} == set(shapes.SHAPE_FAMILIES)


def intervals(dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends (count,): points, narrow and wide intervals, around the turns and far from them."""
    centers, widths = (-30.0, -4.0, -2.4, -1.4, -0.3, 0.0, 0.7, 2.2, 3.0, 25.0), (0.0, 1e-6, 0.4, 3.0, 40.0)
    pairs = torch.tensor(list(itertools.product(centers, widths)), dtype=dtype)
    low = pairs[:, 0] - 0.4 * pairs[:, 1]
    return low, torch.maximum(low, pairs[:, 0] + 0.6 * pairs[:, 1])


def points_of(name, l, u, a) -> torch.Tensor:  # noqa: E741
    """Ends, turns, and where a search in each of 8 parts finds f - a y least and most, (n, count), all inside."""
    shares = torch.linspace(0.0, 1.0, 401, dtype=l.dtype)
    grid = (l[:, None] + (u - l)[:, None] * shares).clamp(l[:, None], u[:, None])
    turns = torch.tensor([float(turn) for turn in _shape(name).turns], dtype=l.dtype).expand(len(l), -1)
    function, best = ACTIVATIONS[name].function, [turns]
    for sign in (1.0, -1.0):
        value = sign * (function(grid) - a[:, None] * grid)
        k = value[:, :400].unflatten(1, (8, 50)).argmin(dim=2) + 50 * torch.arange(8)
        low, high = (grid.gather(1, (k + step).clamp(0, 400)) for step in (-1, 1))
        for _ in range(50):  # by thirds
            third = (high - low) / 3
            left, right = low + third, high - third
            falls = sign * (function(right) - a[:, None] * right) < sign * (function(left) - a[:, None] * left)
            low, high = torch.where(falls, left, low), torch.where(falls, high, right)
        best += [grid.gather(1, k), 0.5 * (low + high)]
    return torch.cat((l[:, None], u[:, None], *best), dim=1).clamp(l[:, None], u[:, None])


def _shape(name):
    family, _, numbers = name.removesuffix(")").partition("(")
    return (
        shapes.SHAPES[name] if name in shapes.SHAPES else shapes.SHAPE_FAMILIES[family](*map(float, numbers.split(",")))
    )


def check_lines(name: str, dtype, slopes=None, loose: float = 1e-6) -> None:
    """In 60-digit arithmetic: slopes, intercepts and ends count as the exact reals that they are."""
    l, u = intervals(dtype)  # noqa: E741
    if name == "exp":
        l, u = l.clamp(max=20.0), u.clamp(max=20.0)  # noqa: E741
    given = None if slopes is None else tuple(torch.full_like(l, slope) for slope in slopes)
    relaxation = ACTIVATIONS[name].relax(l, u, given)
    for sign, plane in zip((1, -1), relaxation, strict=True):
        a, c = plane.slopes[0], plane.intercept
        points = points_of(name, l, u, a)
        for n in range(len(l)):
            slope, intercept = mpmath.mpf(float(a[n])), mpmath.mpf(float(c[n]))
            gaps, size = [], 1.0
            for y in set(points[n].tolist()):
                value = EXACT[name](mpmath.mpf(y))
                gaps.append(sign * (value - slope * mpmath.mpf(y) - intercept))
                size = max(size, float(abs(value) + abs(slope * y) + abs(y)))
            assert min(gaps) >= 0, f"{name}: {float(min(gaps)):.3g} on [{float(l[n])}, {float(u[n])}], slope {slope}"
            assert min(gaps) <= loose * size, f"{name}: {float(min(gaps)):.3g} away on [{float(l[n])}, {float(u[n])}]"


@pytest.mark.parametrize("name", EXACT)
def test_lines_are_sound_and_touch(name):
    for slopes in (None, (0.0, 0.0), (0.31, -0.17), (5.0, -3.0)):
        check_lines(name, torch.float64, slopes, loose=1e-12)
    check_lines(name, torch.float32, loose=1e-4)


@pytest.mark.parametrize("name", [name for name in EXACT if ACTIVATIONS[name].steepest is not None])
def test_nothing_is_steeper_than_is_said(name):
    """``Activation.steepest``, which norm balls go by: above all derivatives, and hardly above their greatest."""
    y = torch.linspace(-40.0, 40.0, 400_001, dtype=torch.float64)
    values = ACTIVATIONS[name].function(y)
    found = float(((values[1:] - values[:-1]) / (y[1:] - y[:-1])).abs().max())
    assert found <= ACTIVATIONS[name].steepest * (1.0 + 1e-9)
    assert ACTIVATIONS[name].steepest <= 1.02 * found


def test_a_wrong_turn_and_a_bracket_ended_on_the_wrong_side_are_noticed(monkeypatch):
    silu = shapes.SHAPES["silu"]
    for broken in (silu._replace(turns=(-1.0, 1.0)), silu._replace(convex=(False, False, False))):
        monkeypatch.setitem(ACTIVATIONS, "silu", shapes.activation_of(broken))
        with pytest.raises(AssertionError):
            check_lines("silu", torch.float64, (0.0, 0.0), loose=2.0)
    monkeypatch.undo()
    monkeypatch.setitem(shapes.HALVINGS, torch.float64, 3)
    check_lines("silu", torch.float64, (0.31, -0.17), loose=2.0)  # a wide bracket is loose, and sound
    monkeypatch.setattr(shapes, "_touching", lambda *of, whole=shapes._touching: (whole(*of)[0], 0.0, 0.0))
    with pytest.raises(AssertionError):
        check_lines("silu", torch.float64, (0.31, -0.17), loose=2.0)


@pytest.mark.parametrize("name", EXACT)
def test_ranges_hold_and_are_tight(name):
    l, u = intervals(torch.float64)  # noqa: E741
    l, u = l.clamp(max=20.0), u.clamp(max=20.0)  # noqa: E741
    low, high = ACTIVATIONS[name].image(l, u)
    values = ACTIVATIONS[name].function(l[:, None] + (u - l)[:, None] * torch.linspace(0, 1, 2001).double())
    room = 1e-5 * (1.0 + values.abs().amax(dim=1))
    assert (low <= values.amin(dim=1)).all() and (low >= values.amin(dim=1) - room - 1e-3 * (u - l)).all()
    assert (values.amax(dim=1) <= high).all() and (high <= values.amax(dim=1) + room + 1e-3 * (u - l)).all()


@pytest.mark.parametrize("name", EXACT)
def test_default_slopes_are_nearly_the_best(name):
    """No slope of many gives a line that is noticeably higher at the midpoint."""
    l, u = intervals(torch.float64)  # noqa: E741
    l, u = l.clamp(-8.0, 8.0), u.clamp(-8.0, 8.0)  # noqa: E741
    middle = 0.5 * (l + u)
    shape = _shape(name)
    lower = shapes.line_below(shape, l, u, None)
    steep = shape.derivative(l[:, None] + (u - l)[:, None] * torch.linspace(0, 1, 301).double())
    tried = steep.T
    best = (shapes.intercept_below(shape, l, u, tried) + tried * middle).amax(dim=0)
    height = lower.slopes[0] * middle + lower.intercept
    assert (height >= best - 0.02 * (steep.amax(dim=1) - steep.amin(dim=1)) * (u - l) - 1e-9).all()


@pytest.mark.parametrize("name", TORCH)
def test_values_are_torchs(name):
    y = torch.linspace(-30.0, 30.0, 4001, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name].function(y), TORCH[name](y), rtol=1e-12, atol=1e-14)
