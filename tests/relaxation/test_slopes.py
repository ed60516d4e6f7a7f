"""Ranges of the derivatives of shapes, half lines and waves: sound in 60 digits, and hardly wider than need be."""

from __future__ import annotations

import mpmath
import pytest
import torch
from test_shapes import intervals

from utils.relaxation import shapes
from utils.relaxation.derivatives import derivative_ranges
from utils.relaxation.lines import ACTIVATIONS

mpmath.mp.dps = 60
BESIDE = mpmath.mpf(10) ** -40  # of a jump


def gate(y):
    return 1 / (1 + mpmath.exp(-y))


def mish(y):
    t = mpmath.tanh(mpmath.log1p(mpmath.exp(y)))
    return t + y * (1 - t**2) * gate(y)


def elu(y):
    return mpmath.mpf(1.1) * (1 if y > 0 else mpmath.mpf(1.7) / mpmath.mpf(0.6) * mpmath.exp(y / mpmath.mpf(0.6)))


def rsqrt(y):
    return -((y + mpmath.mpf(0.5)) ** mpmath.mpf(-1.5)) / 2 if y >= mpmath.mpf(-0.25) else mpmath.mpf(0)


ROOT = mpmath.sqrt(2 * mpmath.pi)
# By name: the derivative, where it turns or jumps, and the domain's lower end.
EXACT = {
    "silu": (lambda y: gate(y) * (1 + y * gate(-y)), (-shapes.SILU_TURN, shapes.SILU_TURN)),
    "gelu": (
        lambda y: mpmath.erfc(-y / mpmath.sqrt(2)) / 2 + y * mpmath.exp(-y * y / 2) / ROOT,
        (-mpmath.sqrt(2), mpmath.sqrt(2)),
    ),
    "mish": (mish, shapes.MISH_TURNS),
    "hardswish": (lambda y: mpmath.mpf(0) if y < -3 else mpmath.mpf(1) if y > 3 else (2 * y + 3) / 6, (-3, 3)),
    "softsign": (lambda y: (1 + abs(y)) ** -2, (0,)),
    "tanhshrink": (lambda y: mpmath.tanh(y) ** 2, (0,)),
    "logsigmoid": (lambda y: gate(-y), ()),
    "exp": (mpmath.exp, ()),
    "abs": (lambda y: mpmath.mpf(1 if y > 0 else -1), (0,)),
    "erf": (lambda y: 2 * mpmath.exp(-y * y) / mpmath.sqrt(mpmath.pi), (0,)),
    "elu(1.7,1.1,0.6)": (elu, (0,)),
    "power(2)": (lambda y: 2 * y, ()),
    "power(3)": (lambda y: 3 * y**2, (0,)),
    "rsqrt(0.5)": (rsqrt, (-0.25,)),
    "softshrink(0.5)": (lambda y: mpmath.mpf(abs(y) > 0.5), (-0.5, 0.5)),
    "log(0.1)": (lambda y: 1 / y if y >= mpmath.mpf(0.1) else mpmath.mpf(0), (0.1,)),
    "log(0.0)": (lambda y: 1 / y, (), 0.0),
    "reciprocal(0.2)": (lambda y: -1 / y**2 if y >= mpmath.mpf(0.2) else mpmath.mpf(0), (0.2,)),
    "reciprocal(0.0)": (lambda y: -1 / y**2, (), 0.0),
    "sqrt(1)": (lambda y: 1 / (2 * mpmath.sqrt(y)), (), 0.0),
    "log1p": (lambda y: 1 / (1 + y) if y > 0 else mpmath.mpf(0), (0,)),
    "sin": (mpmath.cos, [k * mpmath.pi / 2 for k in range(-40, 40)]),
    "cos": (lambda y: -mpmath.sin(y), [k * mpmath.pi / 2 for k in range(-40, 40)]),
}


def check(name: str, l, u, low, high, exact, turns) -> None:  # noqa: E741
    """Fail unless the derivative at ends, middles and turns lies in the ranges, whose ends some point comes near to."""
    eps = torch.finfo(l.dtype).eps
    for left, right, least, most in zip(l.tolist(), u.tolist(), low.tolist(), high.tolist(), strict=True):
        a, b = mpmath.mpf(left), mpmath.mpf(right)
        points = [a + k * (b - a) / 4 for k in range(5)]
        points += [y for turn in turns for y in (turn - BESIDE, turn, turn + BESIDE) if a <= y <= b]
        values = [exact(y) for y in points]
        where = f"the derivative of {name} over [{left}, {right}]"
        assert least <= min(values) and max(values) <= most, f"{where} leaves [{least}, {most}]"
        room = 200 * eps * (2 + max(abs(value) for value in values))
        if name in ("sin", "cos"):  # these come from lines, whose intercepts are bracketed
            room += 1e-3 * (b - a) + 200 * eps * abs(a)
        assert a == b or (least >= min(values) - room and most <= max(values) + room), (
            f"[{least}, {most}]: wide {where}"
        )


def question(name: str, dtype):
    exact, turns, *lowest = EXACT[name]
    l, u = intervals(dtype)  # noqa: E741
    inside = (l > lowest[0]) if lowest else torch.ones_like(l, dtype=torch.bool)
    inside &= u < 60  # of exp and powers in little precision
    return l[inside], u[inside], exact, turns


def test_all_are_tested():
    made = {*shapes.SHAPES, *shapes.SHAPE_FAMILIES, "log", "reciprocal", "sqrt", "sin", "cos", "log1p"}
    assert made == {name.partition("(")[0] for name in EXACT}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_ranges_hold_all_derivatives_and_hardly_more(name, dtype):
    l, u, exact, turns = question(name, dtype)  # noqa: E741
    ((low, high),) = derivative_ranges(name, (l, u))
    check(name, l, u, low, high, exact, turns)


@pytest.mark.parametrize("name", ["silu", "gelu", "mish", "hardswish", "power(3)", "log(0.1)"])
def test_ranges_that_know_no_turns_are_noticed(name):
    l, u, exact, turns = question(name, torch.float64)  # noqa: E741
    shape = ACTIVATIONS[name].slopes.args[0]
    with pytest.raises(AssertionError, match="leaves"):
        check(name, l, u, *shapes.slopes_of(shape._replace(turns=()), l, u), exact, turns)


@pytest.mark.parametrize("name", ["silu", "gelu", "mish", "exp", "log(0.0)"])
def test_ranges_that_are_not_rounded_outward_are_noticed(name, monkeypatch):
    monkeypatch.setattr(shapes, "SLOPE_ULPS", 0.0)
    l, u, exact, turns = question(name, torch.float64)  # noqa: E741
    ((low, high),) = derivative_ranges(name, (l, u))
    with pytest.raises(AssertionError, match="leaves"):
        check(name, l, u, low, high, exact, turns)


def test_outside_of_the_domain_there_is_none():
    below = (torch.tensor([-1.0]), torch.tensor([2.0]))
    for name in ("log(0.0)", "reciprocal(0.0)", "sqrt(0)"):
        with pytest.raises(ValueError, match="where it has no bound"):
            derivative_ranges(name, below)
    ((low, high),) = derivative_ranges("sqrt(1)", below)
    assert high == torch.inf and 0 < low <= 0.5 / 2.0**0.5
