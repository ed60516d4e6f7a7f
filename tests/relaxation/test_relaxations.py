"""Lines around tanh, sigmoid and relu: sound over the reals, tight, volume-optimal and differentiable."""

from __future__ import annotations

import pytest
import torch
from helpers import check_lines, intervals, normal

from utils.relaxation.lines import ACTIVATIONS, Plane, Relaxation
from utils.relaxation.shapes import SHAPES

OWN = (*SHAPES, "sin", "cos")  # have tests of their own
NAMES = tuple(name for name in ACTIVATIONS if name not in OWN)
DTYPES = (torch.float32, torch.float64)
SCALES = {"small": (0.01, 0.3, 1.0), "middle": (3.0, 10.0, 30.0), "large": (1e3, 1e5, 1e8)}


def moved(relaxation: Relaxation, *, lower=0.0, upper=0.0) -> Relaxation:
    """The same lines with other intercepts."""
    low, high = relaxation
    return Relaxation(Plane(low.slopes, low.intercept + lower), Plane(high.slopes, high.intercept + upper))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_default_lines_are_sound_and_tight(name, dtype, scales):
    l, u = intervals(SCALES[scales], dtype)  # noqa: E741
    check_lines(name, l, u, ACTIVATIONS[name].relax(l, u))


@pytest.mark.parametrize("kind", ["random", "outside", "zero", "negative", "huge", "tiny", "end"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_lines_of_any_slope_are_sound_and_tight(name, dtype, kind):
    l, u = intervals((0.01, 1.0, 10.0, 1e8), dtype, per_scale=5)  # noqa: E741
    draws = normal(2, len(l), seed=3, dtype=dtype)
    slopes = {
        "random": draws.sigmoid(),
        "outside": 1.0 + draws.abs(),
        "zero": torch.zeros_like(draws),
        "negative": -draws.abs(),
        "huge": 1e6 * draws,
        "tiny": 1e-6 * draws,
        "end": torch.stack((torch.ones_like(l), torch.nextafter(torch.ones_like(l), torch.zeros_like(l)))),
    }[kind]
    check_lines(name, l, u, ACTIVATIONS[name].relax(l, u, tuple(slopes)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_lines_are_finite_up_to_the_largest_numbers(name, dtype):
    ends = torch.tensor([1e8, 1e12, 1e18, 1e30], dtype=dtype)
    one = torch.ones_like(ends)
    for l, u in ((-ends, ends), (-one, ends), (-ends, one), (ends, 2 * ends), (-ends, -ends)):  # noqa: E741
        check_lines(name, l, u, ACTIVATIONS[name].relax(l, u), points=3)


@pytest.mark.parametrize("name", NAMES)
def test_degenerate_interval_gives_the_value(name):
    y = torch.cat((normal(20, seed=5), torch.tensor([0.0, 30.0, -30.0, 1e8, -1e8])))
    lower, upper = ACTIVATIONS[name].relax(y, y)
    for (slope,), intercept in (lower, upper):
        torch.testing.assert_close(slope * y + intercept, ACTIVATIONS[name].function(y), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 30.0, 1e3, 1e6])
def test_no_other_slope_is_nearer_at_the_midpoint(name, scale):
    """The volume between a line and the curve depends on the line's height at the midpoint alone."""
    relax = ACTIVATIONS[name].relax
    l, u = (scale * normal(40, 2, seed=11)).sort(dim=1).values.unbind(dim=1)  # noqa: E741
    middle = 0.5 * (l + u)

    def heights(relaxation):
        return [line.slopes[0] * middle + line.intercept for line in relaxation]

    best_below, best_above = heights(relax(l, u))
    fractions = torch.cat((torch.linspace(0.0, 1.0, 401), torch.logspace(-9, 0, 200))).tolist()
    for slope in fractions:
        slopes = torch.full_like(l, slope)
        below, above = heights(relax(l, u, (slopes, slopes)))
        assert (below <= best_below + 1e-6).all() and (above >= best_above - 1e-6).all(), slope


def test_relu_lines_are_those_of_the_textbook():
    l = torch.tensor([-1.0, -3.0, 1.0, -2.0, 0.0, -2.0])  # noqa: E741
    u = torch.tensor([3.0, 1.0, 2.0, -1.0, 2.0, 0.0])
    lower, upper = ACTIVATIONS["relu"].relax(l, u)
    assert lower.slopes[0].tolist() == [1, 0, 1, 0, 1, 0]
    assert upper.slopes[0].tolist() == [0.75, 0.25, 1, 0, 1, 0]
    torch.testing.assert_close(upper.intercept, torch.tensor([0.75, 0.75, 0.0, 0.0, 0.0, 0.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["leaky_relu(0)", "leaky_relu(0.3)", "leaky_relu(2.5)", "hardtanh(0,6)", "hardtanh(-inf,0.8)"]
)
def test_members_of_families_by_their_numbers(name):
    l, u = intervals((0.3, 1.0, 10.0), torch.float64)  # noqa: E741
    relax, function = ACTIVATIONS[name].relax, ACTIVATIONS[name].function
    points = l + (u - l) * torch.linspace(0.0, 1.0, 501, dtype=torch.float64)[:, None]
    points = torch.cat((points, *(torch.full_like(l, knot).clamp(l, u)[None] for knot in (0.0, 6.0, 0.8))))
    for slopes in (None, (torch.full_like(l, 0.4), torch.full_like(l, -1.3))):
        lower, upper = relax(l, u, slopes)
        below, above = (line.slopes[0] * points + line.intercept for line in (lower, upper))
        room = 1e-12 * (1.0 + l.abs() + u.abs())
        assert (below <= function(points) + room).all() and (above >= function(points) - room).all()
        assert ((function(points) - below).amin(dim=0) <= room).all() and (
            (above - function(points)).amin(dim=0) <= room
        ).all()


@pytest.mark.parametrize(
    "name", ["leaky_relu(-0.1)", "leaky_relu(inf)", "leaky_relu(nan)", "hardtanh(1,1)", "hardtanh(2,1)"]
)
def test_families_refuse_numbers_that_make_no_monotone_function(name):
    with pytest.raises(ValueError, match="needs a"):
        ACTIVATIONS[name]
    with pytest.raises(KeyError):
        ACTIVATIONS["sine"]


def test_relu_is_the_piecewise_linear_function_that_it_is():
    l, u = intervals((0.3, 1.0, 10.0), torch.float64)  # noqa: E741
    lines = [ACTIVATIONS[name].relax(l, u) for name in ("relu", "leaky_relu(0)", "hardtanh(0,inf)")]
    middle = 0.5 * (l + u)
    for own, *others in zip(*lines, strict=True):
        for other in others:
            torch.testing.assert_close(
                own.slopes[0] * middle + own.intercept,
                other.slopes[0] * middle + other.intercept,
                rtol=1e-12,
                atol=1e-12,
            )


@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences(name):
    """At generic points, where neither the case nor the contact point changes kind."""
    ends = (2.0 * normal(60, 2, seed=23)).sort(dim=1).values
    l, u = ends[ends[:, 1] - ends[:, 0] > 0.2].unbind(dim=1)  # noqa: E741

    def lines(l, u):  # noqa: E741
        lower, upper = ACTIVATIONS[name].relax(l, u)
        return torch.stack((lower.slopes[0], lower.intercept, upper.slopes[0], upper.intercept))

    for which in range(2):
        at = [l.clone(), u.clone()]
        at[which].requires_grad_()
        output = lines(*at)
        gradient = torch.stack(
            [
                torch.autograd.grad(row.sum(), at[which], retain_graph=True, allow_unused=True, materialize_grads=True)[
                    0
                ]
                for row in output
            ]
        )
        step = 1e-6 * torch.ones_like(l)
        more, less = ([a.detach() + s for a, s in zip((l, u), steps, strict=True)] for steps in _steps(which, step))
        numeric = (lines(*more) - lines(*less)) / 2e-6
        torch.testing.assert_close(gradient, numeric, rtol=1e-3, atol=1e-3)


def _steps(which, step):
    zero = torch.zeros_like(step)
    plus = (step, zero) if which == 0 else (zero, step)
    return plus, tuple(-s for s in plus)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite(name, dtype):
    l, u = (end.requires_grad_() for end in intervals((0.01, 1.0, 30.0, 1e4, 1e8), dtype))  # noqa: E741
    for slopes in (None, (torch.full_like(l, 0.3), torch.full_like(l, -2.0))):
        lower, upper = ACTIVATIONS[name].relax(l, u, slopes)
        total = sum(
            (part * part.detach().sign()).sum() for part in (*lower.slopes, *upper.slopes) if part.requires_grad
        )
        total = total + lower.intercept.sum() + upper.intercept.sum()
        for gradient in torch.autograd.grad(total, (l, u)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_check_catches_broken_lines(name):
    l, u = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.tensor([2.0, 1.0, 0.7]).double()  # noqa: E741
    good = ACTIVATIONS[name].relax(l, u)
    lower, upper = good
    check_lines(name, l, u, good)
    steeper = [Plane((plane.slopes[0] + 1e-3,), plane.intercept) for plane in good]
    broken = {
        "lower line too high": moved(good, lower=1e-6),
        "upper line too low": moved(good, upper=-1e-6),
        "lower line loose": moved(good, lower=-1e-6),
        "upper line loose": moved(good, upper=1e-6),
        "one element": moved(good, lower=torch.tensor([0.0, 0.0, 1e-9])),
        "swapped": Relaxation(upper, lower),
        "lower slope without its intercept": Relaxation(steeper[0], upper),
        "upper slope without its intercept": Relaxation(lower, steeper[1]),
        "lines of another interval": ACTIVATIONS[name].relax(l + 0.1, u - 0.1),
        "not finite": moved(good, lower=torch.nan),
    }
    for kind, relaxation in broken.items():
        try:
            check_lines(name, l, u, relaxation)
        except AssertionError:
            continue
        pytest.fail(f"not caught: {kind}")
