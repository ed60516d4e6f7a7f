"""Lines around derivatives and planes around derivatives times adjoints: sound over the reals, and tight."""

from __future__ import annotations

import itertools
from unittest import mock

import mpmath
import pytest
import torch
from helpers import intervals, normal
from test_derivatives import EXACT

from utils.relaxation import bells, joint
from utils.relaxation.derivatives import derivative_ranges, relax_factor
from utils.relaxation.joint import FACTORS, relax_jointly
from utils.relaxation.lines import Plane, Relaxation

DTYPES = (torch.float32, torch.float64)
LINES = {"tanh": bells.relax_bell, "sigmoid": bells.relax_gate_bell}
LINES |= {"arctan": bells.relax_arctan_bell, "elu": bells.relax_elu_step}


# --- lines around derivatives -----------------------------------------------------------------------------------------


def check_lines(name: str, l, u, relaxation: Relaxation) -> None:  # noqa: E741
    """Fail unless the derivative is between the lines at points of each interval, over the reals."""
    (exact,) = EXACT[name]
    shares = [mpmath.mpf(k) / 12 for k in range(13)]
    tiny = torch.finfo(l.dtype).tiny
    columns = [part.tolist() for plane in relaxation for part in (plane.slopes[0], plane.intercept)]
    for left, right, *lines in zip(l.tolist(), u.tolist(), *columns, strict=True):
        low_slope, low, high_slope, high = map(mpmath.mpf, lines)
        ends = mpmath.mpf(left), mpmath.mpf(right)
        inner = [min(max(mpmath.mpf(y), ends[0]), ends[1]) for y in (-0.6585, 0, 0.6585, -1.317, 1.317)]
        for y in [*(ends[0] + (ends[1] - ends[0]) * share for share in shares), *inner]:
            value = exact(y)
            assert low_slope * y + low <= value + tiny, f"a line crosses {name}' in [{left}, {right}] at {y}"
            assert value <= high_slope * y + high + tiny, f"a line crosses {name}' in [{left}, {right}] at {y}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINES)
def test_lines_hold_the_derivative(name, dtype):
    l, u = intervals((0.01, 1.0, 5.0, 400.0), dtype, per_scale=3)  # noqa: E741
    check_lines(name, l, u, LINES[name](l, u))


def test_lines_without_stationary_points_are_noticed():
    l, u = intervals((1.0, 5.0), torch.float64, per_scale=3)  # noqa: E741
    with mock.patch.object(bells, "_stationary", lambda slopes: []), pytest.raises(AssertionError, match="crosses"):
        check_lines("tanh", l, u, bells.relax_bell(l, u))


def test_lines_touch_the_bell():
    """On a dense grid some point is as near to each line as rounding: intercepts are the exact ones."""
    l, u = intervals((0.1, 1.0, 4.0), torch.float64, per_scale=6)  # noqa: E741
    kept = u - l > 1e-3
    l, u = l[kept], u[kept]  # noqa: E741
    y = l + (u - l) * torch.linspace(0, 1, 4001).double()[:, None]
    value = 1.0 / y.cosh() ** 2
    for sign, (slopes, intercept) in zip((1.0, -1.0), bells.relax_bell(l, u), strict=True):
        gap = (sign * (value - slopes[0] * y - intercept)).amin(dim=0)
        assert (gap >= 0).all() and (gap <= 1e-6 * (u - l).clamp(max=1.0) + 1e-12).all()


def test_lines_are_about_as_near_as_the_best():
    """At the midpoint the gap is hardly more than that of a search over slopes."""
    l, u = intervals((0.3, 1.0, 3.0), torch.float64, per_scale=8)  # noqa: E741
    kept = u - l > 1e-3
    l, u = l[kept], u[kept]  # noqa: E741
    shape = bells.Shape(
        bells.tanh_derivative,
        lambda y: -2.0 * y.tanh() * bells.tanh_derivative(y),
        (-0.6584789484624084, 0.6584789484624084),
        (True, False, True),
    )
    gaps = []
    for lower, upper in (bells.relax_bell(l, u), bells.relax_shape(shape, l, u)):
        middle = 0.5 * (l + u)
        gaps.append((upper.slopes[0] - lower.slopes[0]) * middle + upper.intercept - lower.intercept)
    assert (gaps[0] <= 1.5 * gaps[1] + 1e-9).all() and gaps[0].mean() <= 1.05 * gaps[1].mean()


# --- planes around derivatives times adjoints -------------------------------------------------------------------------

PAIRS = [(name, number) for name, factors in FACTORS.items() for number in range(len(factors))]


def boxes(name: str, dtype: torch.dtype, scales) -> tuple:
    """Intervals of the adjoint and of each operand."""
    l, u = intervals(scales, dtype, per_scale=6)  # noqa: E741
    orders = [torch.randperm(len(l), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    pairs = [(l[order], u[order]) for order in orders]
    return pairs[0], pairs[1 : 1 + len(EXACT[name])]


def relaxed(name: str, number: int, adjoint, operands) -> Relaxation:
    return relax_jointly(FACTORS[name][number], derivative_ranges(name, *operands)[number], adjoint, operands)


def check_planes(name: str, number: int, adjoint, operands, planes: Relaxation) -> None:
    """Fail unless kappa * a is between the planes at ends, middles and random points of each box, over the reals."""
    exact, info = EXACT[name][number], torch.finfo(adjoint[0].dtype)
    for k in range(len(adjoint[0])):
        axes = []
        for l, u in (adjoint, *operands):  # noqa: E741
            left, right = mpmath.mpf(l[k].item()), mpmath.mpf(u[k].item())
            axes.append([left, right, (left + right) / 2, left + mpmath.mpf("0.23") * (right - left)])
        axes[0] = axes[0][:3]
        for a, *point in itertools.product(*axes):
            value = exact(*point) * a
            for sign, (slopes, intercept) in zip((1, -1), planes, strict=True):
                terms = [
                    mpmath.mpf(s.expand_as(intercept)[k].item()) * y for s, y in zip(slopes, (a, *point), strict=True)
                ]
                gap = sign * (value - sum(terms) - mpmath.mpf(intercept[k].item()))
                assert gap >= -info.tiny * (1 + sum(map(abs, (a, *point)))), f"a plane crosses {name} in box {k}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "number"), PAIRS)
def test_planes_hold_every_derivative_times_every_adjoint(name, number, dtype):
    adjoint, operands = boxes(name, dtype, (0.1, 2.0))
    check_planes(name, number, adjoint, operands, relaxed(name, number, adjoint, operands))


@pytest.mark.parametrize("name", ["tanh", "tanh(x)*sigmoid(y)"])
def test_and_of_huge_and_of_tiny_boxes(name):
    for scales in ((1e8,), (1e-7,)):
        adjoint, operands = boxes(name, torch.float64, scales)
        check_planes(name, 0, adjoint, operands, relaxed(name, 0, adjoint, operands))


def without_the_lines_of_signs(self, factor):
    return self.upper.scaled(factor)


def half_of_the_constant(f, g, share, whole=joint.product_above):
    form = whole(f, g, share)
    return form._replace(intercept=form.intercept - 0.05 * (f.high - f.low) * (g.high - g.low))


def no_mirror(f, g, share):
    return joint.product_above(f, g, 1.0 - share), joint.product_above(f, g, share)


BROKEN = {
    "signs": ("utils.relaxation.joint.Bounded.above", without_the_lines_of_signs),
    "constant": ("utils.relaxation.joint.product_above", half_of_the_constant),
    "lower planes": ("utils.relaxation.joint.product_between", no_mirror),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize(("name", "number"), [("tanh", 0), ("x*sigmoid(y)", 1)])
def test_what_is_broken_is_noticed(name, number, fault):
    adjoint, operands = boxes(name, torch.float64, (0.1, 2.0))
    with mock.patch(*BROKEN[fault]), pytest.raises(AssertionError, match="crosses"):
        check_planes(name, number, adjoint, operands, relaxed(name, number, adjoint, operands))


def test_planes_of_narrow_boxes_are_nearer_than_chords():
    """The error is of second order in the box, that of the chord of first."""
    middle = normal(40, 2, seed=3)
    gaps = []
    for width in (0.1, 0.01):
        adjoint, operand = ((m - width, m + width) for m in middle.unbind(1))
        known = derivative_ranges("tanh", operand)[0]
        found = []
        for planes in (relaxed("tanh", 0, adjoint, (operand,)), relax_factor(*known, adjoint)):
            at = middle.unbind(1)
            above, below = (
                sum(s * y for s, y in zip(p.slopes, at, strict=False)) + p.intercept
                for p in (planes.upper, planes.lower)
            )
            found.append((above - below).mean())
        gaps.append(found)
    assert gaps[0][0] / gaps[1][0] > 50 and gaps[0][1] / gaps[1][1] < 20
    assert gaps[1][0] < 0.1 * gaps[1][1]


def test_boxes_without_end_have_the_chord():
    adjoint = torch.tensor([-1.0]).double(), torch.tensor([2.0]).double()
    whole = torch.tensor([-torch.inf]).double(), torch.tensor([torch.inf]).double()
    chord = relax_factor(*derivative_ranges("tanh", whole)[0], adjoint)
    for plane, line in zip(relaxed("tanh", 0, adjoint, (whole,)), chord, strict=True):
        assert isinstance(plane, Plane) and plane.slopes[1] == 0
        assert plane.slopes[0] == line.slopes[0] and plane.intercept == line.intercept
