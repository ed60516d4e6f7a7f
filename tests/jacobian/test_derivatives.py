"""Ranges of derivatives and lines around a factor times a value: sound over the reals, and tight."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch
from helpers import intervals, normal

from utils.relaxation import ACTIVATIONS
from utils.relaxation.derivatives import CHAINS, DERIVATIVES, derivative_ranges, factor_interval, relax_factor
from utils.relaxation.lines import Plane, Relaxation

DTYPES = (torch.float32, torch.float64)
SCALES = (0.01, 1.0, 20.0, 400.0, 1e8, 1e30)


def tanh_slope(y):
    return 1 / mpmath.cosh(y) ** 2


def gate(y):
    return 1 / (1 + mpmath.exp(-y))


def gate_slope(y):
    return tanh_slope(y / 2) / 4


# Of each non-linearity, its derivative in each operand.
EXACT = {
    "tanh": (tanh_slope,),
    "sigmoid": (gate_slope,),
    "arctan": (lambda y: 1 / (1 + y**2),),
    "softplus": (gate,),
    "elu": (lambda y: min(mpmath.mpf(1), mpmath.exp(y)),),
    "x*sigmoid(y)": (lambda x, y: gate(y), lambda x, y: x * gate_slope(y)),
    "tanh(x)*sigmoid(y)": (lambda x, y: tanh_slope(x) * gate(y), lambda x, y: mpmath.tanh(x) * gate_slope(y)),
}
KINKED = {"relu": ([0.0], [0.0, 1.0]), "leaky_relu(0.2)": ([0.0], [0.2, 1.0]), "hardtanh": ([-1.0, 1.0], [0, 1, 0])}


def boxes(name: str, dtype: torch.dtype) -> list[tuple]:
    """Intervals of each operand."""
    l, u = intervals(SCALES, dtype, per_scale=3)  # noqa: E741
    order = torch.randperm(len(l), generator=torch.Generator().manual_seed(1))
    return [(l, u), (l[order], u[order])][: len(EXACT[name])]


def check_ranges(name: str, operands: list[tuple], ranges: tuple) -> None:
    """Fail unless derivatives at ends, middles and 0 lie in the ranges, whose ends some point comes near to."""
    info = torch.finfo(operands[0][0].dtype)
    for number, (exact, (low, high)) in enumerate(zip(EXACT[name], ranges, strict=True)):
        for k, ends in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            axes = []
            for l, u in operands:  # noqa: E741
                left, right = mpmath.mpf(l[k].item()), mpmath.mpf(u[k].item())
                axes.append([left, right, (left + right) / 2, min(max(mpmath.mpf(0), left), right)])
            values = [exact(*point) for point in itertools.product(*axes)]
            label = f"derivative {number} of {name} over {[tuple(end[k].item() for end in pair) for pair in operands]}"
            assert ends[0] <= min(values) and max(values) <= ends[1], f"{label} leaves {ends}"
            size = 1 + max(abs(end) for axis in axes for end in axis)  # of what may multiply the smallest numbers
            room = 32 * info.eps * max(abs(value) for value in values) + 8 * info.tiny * size
            assert ends[0] >= min(values) - room and ends[1] <= max(values) + room, f"{ends} is wider than {label}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_ranges_hold_all_derivatives_and_hardly_more(name, dtype):
    operands = boxes(name, dtype)
    check_ranges(name, operands, derivative_ranges(name, *operands))


@pytest.mark.parametrize("name", EXACT)
def test_ranges_of_the_middle_alone_are_noticed(name):
    operands = boxes(name, torch.float64)
    middles = [(0.5 * low + 0.5 * high,) * 2 for low, high in operands]
    with pytest.raises(AssertionError, match="leaves"):
        check_ranges(name, operands, derivative_ranges(name, *middles))


@pytest.mark.parametrize("name", EXACT)
def test_ranges_that_are_not_rounded_outward_are_noticed(name, monkeypatch):
    monkeypatch.setattr("utils.relaxation.derivatives.outward", lambda low, high: (low, high))
    operands = boxes(name, torch.float64)
    with pytest.raises(AssertionError, match="leaves"):
        check_ranges(name, operands, derivative_ranges(name, *operands))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINKED)
def test_pieces_count_where_they_are_touched(name, dtype):
    knots, slopes = KINKED[name]
    ends = torch.tensor([-1e30, -2.0, -1.0, -0.5, -torch.finfo(dtype).tiny, 0.0, 0.5, 1.0, 2.0, 1e30], dtype=dtype)
    l, u = torch.tensor(list(itertools.combinations_with_replacement(ends.tolist(), 2)), dtype=dtype).T  # noqa: E741
    ((low, high),) = derivative_ranges(name, (l, u))
    borders = [-torch.inf, *knots, torch.inf]
    for left, right, *found in zip(l.tolist(), u.tolist(), low.tolist(), high.tolist(), strict=True):
        pieces = zip(slopes, borders[:-1], borders[1:], strict=True)
        touched = [slope for slope, start, end in pieces if left <= end and right >= start]
        assert found == pytest.approx([min(touched), max(touched)], rel=1e-6)


def test_the_whole_line_has_the_global_range():
    whole = (torch.tensor([-torch.inf]), torch.tensor([torch.inf]))
    for name, most in (("tanh", 1.0), ("sigmoid", 0.25), ("relu", 1.0)):
        ((low, high),) = derivative_ranges(name, whole)
        torch.testing.assert_close(torch.stack((low, high)), torch.tensor([[0.0], [most]]))
    _, (low, high) = derivative_ranges("x*sigmoid(y)", whole, whole)
    assert low == -torch.inf and high == torch.inf


def test_nan_has_no_range():
    nan = torch.tensor([torch.nan]).double()
    for low, high in derivative_ranges("x*sigmoid(y)", (nan, nan), (nan, nan)):
        assert low.isnan().all() or high.isnan().all()


def test_unknown_non_linearities_are_refused():
    with pytest.raises(ValueError, match="no range of the derivative of 'sine' is known"):
        derivative_ranges("sine", (torch.zeros(1), torch.ones(1)))


# --- lines ------------------------------------------------------------------------------------------------------------


def factors(dtype: torch.dtype) -> list[torch.Tensor]:
    """low, high, l, u: factors of both signs, sure ones, and values of all kinds."""
    l, u = intervals((1e-3, 1.0, 1e8), dtype, per_scale=4)  # noqa: E741
    pairs = [(0.0, 1.0), (0.2, 1.0), (1.0, 1.0), (0.0, 0.0), (-0.7, 0.4), (-0.9, -0.3), (-2.0, 0.0), (0.1, 0.1 + 1e-9)]
    pairs += normal(4, 2, seed=8).sort(dim=1).values.tolist()
    low, high = torch.tensor(pairs, dtype=dtype).unbind(1)
    grids = [part.expand(len(pairs), -1) for part in (l, u)]
    wide = [part[:, None].expand(-1, len(l)) for part in (low, high)]
    return [part.reshape(-1) for part in (*wide, *grids)]


def check_factor_lines(low, high, l, u, relaxation: Relaxation) -> None:  # noqa: E741
    """Fail unless kappa * a lies between the lines for all kappa and a: for those it is enough to look at the ends.

    Element-wise, in exact numbers, but for what underflows.
    """
    tiny = torch.finfo(l.dtype).tiny
    for sign, ((slopes,), intercepts) in ((1, relaxation.lower), (-1, relaxation.upper)):
        assert slopes.isfinite().all() and intercepts.isfinite().all()
        columns = (part.tolist() for part in (low, high, l, u, slopes.expand_as(l), intercepts))
        for values in zip(*columns, strict=True):
            below, above, left, right, slope, intercept = map(mpmath.mpf, values)
            for kappa, a in itertools.product((below, above), (left, right)):
                gap = sign * (kappa * a - slope * a - intercept)
                assert gap >= -tiny, f"a line around [{values[0]}, {values[1]}] * [{values[2]}, {values[3]}] crosses"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_lines_hold_every_factor_times_every_value(chain, dtype):
    low, high, l, u = factors(dtype)  # noqa: E741
    check_factor_lines(low, high, l, u, relax_factor(low, high, (l, u), chain))


@pytest.mark.parametrize("chain", CHAINS)
def test_an_intercept_without_one_end_is_noticed(chain):
    low, high, l, u = factors(torch.float64)  # noqa: E741
    lower, upper = relax_factor(low, high, (l, u), chain)
    for end in (l, u):
        (slope,) = upper.slopes
        broken = Plane((slope,), torch.maximum(low * end, high * end) - slope * end)
        with pytest.raises(AssertionError, match="crosses"):
            check_factor_lines(low, high, l, u, Relaxation(lower, broken))


@pytest.mark.parametrize("chain", CHAINS)
def test_lines_are_inside_the_interval_or_the_product_itself(chain):
    """Nowhere above the greatest product, and where the value's sign or the factor is known that is the line."""
    low, high, l, u = factors(torch.float64)  # noqa: E741
    lower, upper = relax_factor(low, high, (l, u), chain)
    _, most = factor_interval(low, high, (l, u))
    room = 1e-12 * (1.0 + torch.maximum(l.abs(), u.abs()))
    for a in (l, u):
        line = upper.slopes[0] * a + upper.intercept
        assert (line <= most.clamp(min=0.0) + room).all()
        exact = torch.maximum(low * a, high * a)
        sure = (l >= 0) | (u <= 0) | (low == high) if chain == "recurjac" else torch.ones_like(l, dtype=torch.bool)
        assert ((line - exact).abs() <= 1e3 * room)[sure].all()


@pytest.mark.parametrize(
    "name", [name for name, known in ACTIVATIONS.items() if known.steepest and name in DERIVATIVES]
)
def test_the_greatest_derivative_is_that_of_balls(name):
    """``Activation.steepest``, which norm balls go by, and the range over the whole line say the same."""
    whole = torch.tensor([1e3], dtype=torch.float64)
    ((_, high),) = derivative_ranges(name, (-whole, whole))
    assert float(high) == pytest.approx(ACTIVATIONS[name].steepest, rel=1e-12)
