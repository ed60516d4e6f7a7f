"""Planes around x*sigmoid(y) and tanh(x)*sigmoid(y): sound over the reals, touching, and the best where they say so.

Nothing here uses the formulas of ``utils.relaxation``. Extremes of f(x, y) - a x - b y over a box are searched: for a
fixed y the best x is one of a few, known from calculus in one variable, and y is searched on a grid and refined.
"""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import torch
from helpers import normal

import utils.relaxation.planes
from utils.choices import RELAXATIONS
from utils.relaxation.lines import Plane, Relaxation
from utils.relaxation.planes import PRODUCTS, Box, relax_product

NAMES = tuple(PRODUCTS)
LINEAR, TANH = NAMES
DTYPES = (torch.float64, torch.float32)
GOLDEN = (5**0.5 - 1) / 2


# --- boxes and slopes -----------------------------------------------------------------------------------------------

SIGNS = ("negative", "mixed", "positive")
# (width of x, width of y, size of x, size of y): how far the boxes reach; None for l == u.
KINDS = {
    "wide": (1.0, 1.0, 3.0, 3.0),
    "narrow": (1e-3, 1e-3, 1.0, 1.0),
    "flat": (1e-9, 1.0, 1.0, 3.0),
    "thin": (1.0, 1e-9, 1.0, 3.0),
    "x exact": (None, 1.0, 1.0, 4.0),
    "y exact": (1.0, None, 3.0, 2.0),
    "both exact": (None, None, 1.0, 2.0),
    "y saturated": (1.0, 1.0, 2.0, 200.0),
    "x saturated": (1.0, 1.0, 200.0, 3.0),
    "both saturated": (1.0, 1.0, 90.0, 90.0),
    "x large": (1.0, 1.0, 1e8, 3.0),
    "x large, y saturated": (1.0, 1.0, 1e8, 100.0),
}


def interval_of(sign: str, width: float | None, size: float, draws: np.ndarray) -> tuple[float, float]:
    """An interval below, around or above 0; ``draws`` are two numbers in (0, 1)."""
    near, far = size * draws[0], size * (draws[0] + draws[1])
    if width is None:
        return {"negative": (-far, -far), "mixed": (0.0, 0.0), "positive": (far, far)}[sign]
    if sign == "mixed":
        return -near * width, size * draws[1] * width
    far = near + size * draws[1] * width
    return (-far, -near) if sign == "negative" else (near, far)


def boxes(kind: str, per_case: int = 3, seed: int = 0, dtype=torch.float64) -> Box:
    """``per_case`` boxes of each of the nine sign cases."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    x_width, y_width, x_size, y_size = KINDS[kind]
    ends = [
        (*interval_of(sx, x_width, x_size, rng.random(2)), *interval_of(sy, y_width, y_size, rng.random(2)))
        for sx, sy in itertools.product(SIGNS, SIGNS)
        for _ in range(per_case)
    ]
    if x_width is not None and y_width is not None:  # ends at 0 exactly
        ends += [(0.0, x_size, -y_size, y_size), (-x_size, 0.0, -y_size, 0.0), (-x_size, x_size, 0.0, y_size)]
    return Box(*torch.tensor(ends, dtype=torch.float64).to(dtype).unbind(dim=1))


def gradient(name: str, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slopes of the tangent plane of a product at (x, y)."""
    s = y.sigmoid()
    factor, derivative = (x, torch.ones_like(x)) if name == LINEAR else (x.tanh(), 1 - x.tanh() ** 2)
    return derivative * s, factor * s * (1 - s)


FIXED_SLOPES = ("random", "negative", "huge", "tiny", "zero", "tangent", "gate only", "state only")


def fixed_slopes(kind: str, name: str, box: Box, seed: int = 5):
    """((a, b) of the lower plane, (a, b) of the upper plane) that have nothing to do with good ones."""
    one, two = (normal(2, len(box.lx), seed=seed + k, dtype=box.lx.dtype) for k in (1, 2))
    scale = torch.maximum(box.lx.abs(), box.ux.abs()).clamp(min=1.0) if name == LINEAR else torch.ones_like(box.lx)
    low, high = (one[0].sigmoid(), 0.2 * scale * one[1]), (two[0].sigmoid(), 0.2 * scale * two[1])
    if kind == "tangent":
        shares = normal(4, len(box.lx), seed=seed, dtype=box.lx.dtype).sigmoid()
        at = [
            (box.lx + shares[k] * (box.ux - box.lx), box.ly + shares[k + 1] * (box.uy - box.ly)) for k in range(0, 4, 2)
        ]
        return tuple(gradient(name, x, y) for x, y in at)
    factors = {
        "random": (1.0, 1.0),
        "negative": (-3.0, -3.0),
        "huge": (1e6, -1e6),
        "tiny": (1e-7, 1e-7),
        "zero": (0.0, 0.0),
        "gate only": (0.0, 1.0),
        "state only": (1.0, 0.0),
    }[kind]
    return tuple((factors[0] * a, factors[1] * b) for a, b in (low, high))


def inner_minima(count: int, dtype=torch.float64, seed: int = 0, merging: tuple[float, ...] = ()):
    """Boxes and lower slopes for which tanh(x)*sigmoid(y) - a x - b y has a minimum well inside, and for some alone.

    A stationary point with t = tanh x < 0 and s = sigmoid y is a minimum if t^2 > (1 - s) / (3 s - 1). At equality it
    merges with a saddle; ``merging`` are relative distances from there.
    """
    rng = np.random.default_rng([seed, 99])
    s = 0.5 + 0.5 * rng.uniform(0.02, 0.98, count)
    least = (1 - s) / (3 * s - 1)
    square = least + (1 - least) * rng.uniform(0.02, 0.98, count)
    if merging:
        square = least * (1 + np.resize(merging, count))
    x, y = -np.arctanh(np.sqrt(np.minimum(square, 1 - 1e-12))), np.log(s / (1 - s))
    reach = 10.0 ** rng.uniform(-3, 0.5, (4, count))
    ends = (x - reach[0], x + reach[1], y - reach[2], y + reach[3])
    to = {"dtype": dtype}
    slopes = gradient(TANH, torch.tensor(x), torch.tensor(y))
    return Box(*(torch.tensor(end).to(**to) for end in ends)), tuple(slope.to(**to) for slope in slopes)


# --- the extremes of f(x, y) - a x - b y, searched ------------------------------------------------------------------


def sigmoid(y: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(y))
    return np.where(y >= 0, 1.0, small) / (1 + small)


def factor_of(name: str, x):
    return x if name == LINEAR else np.tanh(x)


def x_candidates(name: str, a, lx, ux):
    """Functions of y, one of which gives the x in [lx, ux] at which f(x, y) - a x is least, another where it is most.

    These are the ends and where tanh'(x) sigmoid(y) = a.
    """

    def stationary(y, sign):
        with np.errstate(all="ignore"):
            root = np.arctanh(np.sqrt(1 - a / sigmoid(y)))
        return np.clip(sign * np.where(np.isfinite(root), root, 0.0), lx, ux)

    ends = [lambda y: lx + 0 * y, lambda y: ux + 0 * y]
    return ends if name == LINEAR else [*ends, lambda y: stationary(y, 1), lambda y: stationary(y, -1)]


def lowest_points(name: str, sign: int, slopes, box: Box, grid: int = 65, steps: int = 45):
    """Points (x, y), (count, n), one of them where sign * (f - a x - b y) is least; the others corners and grid points.

    Everything in float64. With x as a function of y, the best y of a grid is refined by golden sections.
    """
    a, b = (slope.double().numpy() for slope in slopes)
    lx, ux, ly, uy = (end.double().numpy() for end in box)
    ys = [ly + share * (uy - ly) for share in 0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, grid))]  # denser at the ends
    for turn, share in zip(np.linspace(-40, 40, 81), np.linspace(0.0013, 0.9978, 81), strict=True):
        # A wide interval may have all that matters around 0, where the gate turns.
        ys.append(np.where((ly < turn) & (turn < uy), turn, ly + share * (uy - ly)))
    ys = np.sort(np.stack(ys), axis=0)
    found = []
    for x_of in x_candidates(name, a, lx, ux):

        def value(y, x_of=x_of):
            x = x_of(y)
            return sign * (factor_of(name, x) * sigmoid(y) - a * x - b * y)

        values = value(ys)
        valley = np.full_like(values, np.inf)  # the best inside, which need not be the best of all
        inside = (values[1:-1] <= values[:-2]) & (values[1:-1] <= values[2:]) & (ys[1:-1] > ly) & (ys[1:-1] < uy)
        valley[1:-1][inside] = values[1:-1][inside]
        k = np.stack((values.argmin(axis=0), valley.argmin(axis=0)))
        low, best, high = (np.take_along_axis(ys, j.clip(0, len(ys) - 1), 0) for j in (k - 1, k, k + 1))
        for _ in range(steps):
            left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
            of_left, of_right = value(np.stack((left, right)))
            falls = of_right < of_left
            low, high = np.where(falls, left, low), np.where(falls, high, right)
        found += [(x_of(y), y) for y in (*best, *(0.5 * (low + high)))]
        found += [(x_of(y), y) for y in (ly, uy)]
    # Against a mistake in the candidates: a coarse grid over the box, corners included.
    found += [(lx + p * (ux - lx), ly + q * (uy - ly)) for p, q in itertools.product(np.linspace(0, 1, 7), repeat=2)]
    xs, ys = np.stack([x for x, _ in found]), np.stack([y for _, y in found])
    return np.clip(xs, lx, ux), np.clip(ys, ly, uy)


SIDES = ((1, "lower"), (-1, "upper"))


def check_planes(name: str, box: Box, relaxation: Relaxation, loose: float = 1e-12) -> None:
    """Fail unless both planes are sound on the boxes and touch the product, but for rounding.

    Judged in float64. ``loose`` is room for the touching, relative to the numbers in the inequality.
    """
    info = torch.finfo(box.lx.dtype)
    for (sign, side), plane in zip(SIDES, relaxation, strict=True):
        assert all(part.isfinite().all() for part in (*plane.slopes, plane.intercept)), f"{side}: not finite"
        xs, ys = lowest_points(name, sign, plane.slopes, box)
        a, b, c = (part.double().numpy() for part in (*plane.slopes, plane.intercept))
        f = factor_of(name, xs) * sigmoid(ys)
        gaps = sign * (f - a * xs - b * ys - c)
        sizes = np.abs(f) + np.abs(a * xs) + np.abs(b * ys) + np.abs(c)
        underflow = info.tiny * (1 + np.abs(xs))
        wrong = gaps < -(4e-16 * sizes + underflow)
        if wrong.any():
            point, n = np.argwhere(wrong)[0]
            where = f"at ({xs[point, n]!r}, {ys[point, n]!r}) of {[end[n].item() for end in box]}"
            pytest.fail(f"{side} plane of {name} crosses it by {-gaps[point, n]:.3g} {where}, slopes {a[n]}, {b[n]}")
        apart = gaps.min(axis=0) > (64 * info.eps + loose) * sizes.max(axis=0) + info.tiny**0.5
        if apart.any():
            n = np.argwhere(apart)[0][0]
            where = f"of {[end[n].item() for end in box]}, slopes {a[n]}, {b[n]}"
            pytest.fail(f"{side} plane of {name} stays {gaps.min(axis=0)[n]:.3g} away {where}")


def exact_value(name: str, x, y):
    return (x if name == LINEAR else mpmath.tanh(x)) / (1 + mpmath.exp(-y))


def polished(name: str, a, b, x: float, y: float, box: list) -> tuple:
    """A stationary point near (x, y), in high precision, by Newton's method in the coordinates that are inside."""
    lx, ux, ly, uy = box
    x, y = mpmath.mpf(x), mpmath.mpf(y)
    free_x, free_y = lx < x < ux and name == TANH, ly < y < uy
    for _ in range(6):
        s, t = 1 / (1 + mpmath.exp(-y)), x if name == LINEAR else mpmath.tanh(x)
        d = 1 if name == LINEAR else 1 - t * t
        gx, gy = d * s - a, t * s * (1 - s) - b
        hxx, hxy, hyy = (0 if name == LINEAR else -2 * t * d * s), d * s * (1 - s), t * s * (1 - s) * (1 - 2 * s)
        if free_x and free_y:
            det = hxx * hyy - hxy * hxy
            step = (0, 0) if det == 0 else ((hyy * gx - hxy * gy) / det, (hxx * gy - hxy * gx) / det)
        else:
            step = (gx / hxx if free_x and hxx else 0, gy / hyy if free_y and hyy else 0)
        x, y = min(max(x - step[0], lx), ux), min(max(y - step[1], ly), uy)
    return x, y


def check_planes_exactly(name: str, box: Box, relaxation: Relaxation, lowest: int = 5) -> None:
    """Fail unless the planes are sound over the reals, without any tolerance, where the search found them nearest.

    In 60-digit arithmetic: slopes, intercepts and ends count as the exact reals that they are.
    """
    tiny = torch.finfo(box.lx.dtype).tiny
    for (sign, side), plane in zip(SIDES, relaxation, strict=True):
        xs, ys = lowest_points(name, sign, plane.slopes, box)
        numbers = torch.stack((*plane.slopes, plane.intercept, *box)).double().T.tolist()
        for n, values in enumerate(numbers):
            a, b, c, *ends = (mpmath.mpf(value) for value in values)
            f = factor_of(name, xs[:, n]) * sigmoid(ys[:, n])
            nearest = np.argsort(sign * (f - values[0] * xs[:, n] - values[1] * ys[:, n]))[:lowest]
            points = [(mpmath.mpf(xs[k, n]), mpmath.mpf(ys[k, n])) for k in nearest]
            points.append(polished(name, a, b, xs[nearest[0], n], ys[nearest[0], n], ends))
            gap = min(sign * (exact_value(name, x, y) - a * x - b * y - c) for x, y in points)
            room = tiny * (1 + max(abs(ends[0]), abs(ends[1])))
            assert gap >= -room, f"{side} plane of {name} crosses it by {mpmath.nstr(-gap)}: {values}"


# --- sound and exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_planes_of_any_slopes_are_sound_and_touch(name, dtype, kind):
    box = boxes(kind, dtype=dtype)
    for number, slopes in enumerate(FIXED_SLOPES):
        given = fixed_slopes(slopes, name, box, seed=10 * number)
        check_planes(name, box, relax_product(name, box[:2], box[2:], slopes=given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", RELAXATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_planes_of_chosen_slopes_are_sound_and_touch(name, dtype, choice, kind):
    box = boxes(kind, dtype=dtype)
    check_planes(name, box, relax_product(name, box[:2], box[2:], choice))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_planes_are_sound_in_exact_arithmetic(name, dtype, kind):
    box = boxes(kind, per_case=1, seed=7, dtype=dtype)
    for choice in ("plane", "line", "constant"):
        check_planes_exactly(name, box, relax_product(name, box[:2], box[2:], choice))
    for number, slopes in enumerate(("random", "huge", "tangent")):
        given = fixed_slopes(slopes, name, box, seed=10 * number + 3)
        check_planes_exactly(name, box, relax_product(name, box[:2], box[2:], slopes=given))


@pytest.mark.parametrize("count", [300, pytest.param(1500, marks=pytest.mark.full)])
def test_planes_on_many_random_boxes(count):
    rng = np.random.default_rng(3)
    centre, reach = rng.normal(0, 3, (2, count)), 10 ** rng.uniform(-4, 1, (2, count))
    ends = np.stack((centre[0] - reach[0], centre[0] + reach[0], centre[1] - reach[1], centre[1] + reach[1]))
    box = Box(*torch.tensor(ends))
    for name in NAMES:
        for choice in ("plane", "line", "constant"):
            check_planes(name, box, relax_product(name, box[:2], box[2:], choice))
        for slopes in ("random", "tangent"):
            given = fixed_slopes(slopes, name, box)
            check_planes(name, box, relax_product(name, box[:2], box[2:], slopes=given))


def with_upper(slopes, box: Box) -> tuple[Box, tuple]:
    """The same problem for the upper plane too: the boxes once more, mirrored in x."""
    a, b = slopes
    both = Box(*(torch.cat(pair) for pair in ((box.lx, -box.ux), (box.ux, -box.lx), (box.ly,) * 2, (box.uy,) * 2)))
    return both, ((torch.cat((a, a)), torch.cat((b, -b))),) * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_minima_of_the_tanh_product(dtype):
    """Slopes of a tangent plane at a minimum inside, which is then often the only contact point."""
    box, slopes = inner_minima(400, dtype)
    xs, ys = lowest_points(TANH, 1, slopes, box)
    a, b = (slope.double().numpy() for slope in slopes)
    best = (np.tanh(xs) * sigmoid(ys) - a * xs - b * ys).argmin(axis=0)[None]
    x, y = (np.take_along_axis(points, best, 0)[0] for points in (xs, ys))
    lx, ux, ly, uy = (end.double().numpy() for end in box)
    active = (lx < x) & (x < ux) & (ly < y) & (y < uy)
    assert active.sum() > 150, f"only {active.sum()} of {len(active)} boxes have their minimum inside"
    both, pair = with_upper(slopes, box)
    relaxation = relax_product(TANH, both[:2], both[2:], slopes=pair)
    check_planes(TANH, both, relaxation)
    some = torch.arange(0, len(both.lx), 8)
    check_planes_exactly(TANH, Box(*(end[some] for end in both)), _chosen(relaxation, some))


def _chosen(relaxation: Relaxation, rows: torch.Tensor) -> Relaxation:
    return Relaxation(*(Plane(tuple(s[rows] for s in plane.slopes), plane.intercept[rows]) for plane in relaxation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_minima_that_merge_with_the_saddle(dtype):
    box, slopes = inner_minima(210, dtype, seed=1, merging=(1e-2, 1e-4, 1e-6, 1e-10, 0.0, -1e-10, -1e-4))
    both, pair = with_upper(slopes, box)
    relaxation = relax_product(TANH, both[:2], both[2:], slopes=pair)
    check_planes(TANH, both, relaxation, loose=1e-6)
    some = torch.arange(0, len(both.lx), 6)
    check_planes_exactly(TANH, Box(*(end[some] for end in both)), _chosen(relaxation, some))


def test_inner_minima_just_inside_the_upper_end_of_the_gate():
    """A minimum found slightly beyond the end was once taken for the end's: the plane crossed by 3e-15."""
    for merging in (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1.0):
        box, slopes = inner_minima(60, seed=3, merging=(merging,))
        rng = np.random.default_rng([3, 99])
        s = torch.tensor(0.5 + 0.5 * rng.uniform(0.02, 0.98, 60))  # the gates that ``inner_minima`` drew
        y = torch.logit(s)
        for beside in (1e-6, 1e-5, 1e-3):
            narrow = Box(box.lx - 1, box.ux + 1, y - 1e-3, y + beside)
            both, pair = with_upper(slopes, narrow)
            relaxation = relax_product(TANH, both[:2], both[2:], slopes=pair)
            check_planes(TANH, both, relaxation, loose=1e-6)
            some = torch.arange(0, len(both.lx), 20)
            check_planes_exactly(TANH, Box(*(end[some] for end in both)), _chosen(relaxation, some))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_minima_of_extreme_slopes(dtype):
    """a near 0 and 1, b near 0: the minimum runs off to saturated x and y."""
    powers = (1e-1, 1e-3, 1e-6, 1e-8, 1e-12, 1e-15)
    slopes = [(a, -b) for a in (*powers, *(1 - p for p in powers)) for b in (0.2, *powers, 1e-20, 1e-40)]
    ends = ((-60.0, 0.0, -1.0, 60.0), (-5.0, -1e-4, 0.0, 20.0), (-300.0, 2.0, -300.0, 300.0), (-1e-3, 0.0, 0.0, 45.0))
    rows = torch.tensor([(*s, *e) for s in slopes for e in ends], dtype=torch.float64).to(dtype)
    a, b, *box = rows.unbind(dim=1)
    both, pair = with_upper((a, b), Box(*box))
    relaxation = relax_product(TANH, both[:2], both[2:], slopes=pair)
    check_planes(TANH, both, relaxation, loose=1e-12 if dtype == torch.float64 else 1e-5)
    some = torch.arange(0, len(both.lx), 5)
    check_planes_exactly(TANH, Box(*(end[some] for end in both)), _chosen(relaxation, some))


@pytest.mark.parametrize("choice", RELAXATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_point_gives_the_value(name, choice):
    box = boxes("both exact")
    relaxation = relax_product(name, box[:2], box[2:], choice)
    value = PRODUCTS[name].function(box.lx, box.ly)
    for (a, b), c in relaxation:
        room = 1e-13 * (1 + (a * box.lx).abs() + (b * box.ly).abs())
        assert ((a * box.lx + b * box.ly + c - value).abs() <= room).all()


def test_operands_of_shapes_that_broadcast():
    x, y = normal(4, 1, 3, seed=1), normal(5, 1, seed=2)
    for name, choice in itertools.product(NAMES, RELAXATIONS):
        small = relax_product(name, (x - 0.5, x + 0.5), (y - 0.2, y + 0.7), choice)
        full_x, full_y = torch.broadcast_tensors(x, y)
        full = relax_product(name, (full_x - 0.5, full_x + 0.5), (full_y - 0.2, full_y + 0.7), choice)
        for one, other in zip(small, full, strict=True):
            assert one.intercept.shape == (4, 5, 3)
            torch.testing.assert_close(one.intercept, other.intercept)
            torch.testing.assert_close(one.slopes, other.slopes)


# --- the slopes are the best of their kind --------------------------------------------------------------------------

WELL_SIZED = ("wide", "narrow", "x exact", "y exact", "y saturated", "x saturated")


def height_at_centre(name: str, slopes, box: Box) -> torch.Tensor:
    """Of the lower plane; the volume between a plane and the product depends on it alone."""
    a, b = slopes
    mx, my = box.middle
    return PRODUCTS[name].lower_intercept((a, b), box) + a * mx + b * my


def highest(height, low: torch.Tensor, high: torch.Tensor, steps: int = 80) -> torch.Tensor:
    """Largest value of a concave function on [low, high], by golden sections."""
    for _ in range(steps):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        rises = height(right) > height(left)
        low, high = torch.where(rises, left, low), torch.where(rises, high, right)
    return height(0.5 * (low + high))


def room_of(name: str, box: Box, share: float) -> torch.Tensor:
    """A share of how much the product changes over the box, at most."""
    low, high = PRODUCTS[name].factor(box.lx), PRODUCTS[name].factor(box.ux)
    largest = torch.maximum(low.abs(), high.abs())
    return share * (largest * (box.uy.sigmoid() - box.ly.sigmoid()) + high - low) + 1e-10 * (1 + largest)


@pytest.mark.parametrize("kind", WELL_SIZED)
@pytest.mark.parametrize("name", NAMES)
def test_contracting_slopes(name, kind):
    """a = sigmoid(ly) times the chord of the factor, and no b is better at the centre."""
    box = boxes(kind, per_case=8, seed=2)
    a, b = PRODUCTS[name].contracting(box)
    width = box.ux - box.lx
    wide = width > 1e-6
    rise = PRODUCTS[name].factor(box.ux) - PRODUCTS[name].factor(box.lx)
    chord = torch.where(wide, rise / torch.where(wide, width, 1.0), a / box.ly.sigmoid())
    torch.testing.assert_close(a, box.ly.sigmoid() * chord, rtol=1e-9, atol=1e-12)
    reach = torch.maximum(box.lx.abs(), box.ux.abs()) if name == LINEAR else torch.ones_like(a)
    best = highest(lambda b: height_at_centre(name, (a, b), box), -0.3 * reach, 0.3 * reach)
    # Beside a very wide interval of y the contact point is found only roughly.
    share = 2e-2 if kind == "y saturated" else 1e-6
    assert (height_at_centre(name, (a, b), box) >= best - room_of(name, box, share)).all()


@pytest.mark.parametrize("kind", WELL_SIZED)
@pytest.mark.parametrize("name", NAMES)
def test_no_slopes_have_less_volume_than_the_volume_optimal(name, kind):
    box = boxes(kind, per_case=4, seed=4)
    product, mirror = PRODUCTS[name], box.stacked_with_mirror()
    best = height_at_centre(name, RELAXATIONS["volume"](product, mirror), mirror)
    room = room_of(name, box, 2e-3)
    for choice in ("plane", "line", "constant"):
        assert (height_at_centre(name, RELAXATIONS[choice](product, mirror), mirror) <= best + room).all(), choice
    for seed in range(40):
        low, high = fixed_slopes("random" if seed % 2 else "tangent", name, box, seed=100 + seed)
        for (a, b), side in ((low, 0), (high, 1)):
            one_side = Box(*(end[side] for end in mirror))
            other = (a, -b if side else b)
            assert (height_at_centre(name, other, one_side) <= best[side] + room).all()


@pytest.mark.parametrize("kind", WELL_SIZED)
@pytest.mark.parametrize("name", NAMES)
def test_lines_are_the_better_of_the_two_kinds(name, kind):
    box = boxes(kind, per_case=8, seed=6)
    a, b = RELAXATIONS["line"](PRODUCTS[name], box)
    assert ((a == 0) | (b == 0)).all()
    got = height_at_centre(name, (a, b), box)
    zero = torch.zeros_like(a)
    reach = torch.maximum(box.lx.abs(), box.ux.abs()) if name == LINEAR else torch.ones_like(a)
    upright = highest(lambda a: height_at_centre(name, (a, zero), box), zero, zero + 1)
    across = highest(lambda b: height_at_centre(name, (zero, b), box), -0.3 * reach, 0.3 * reach)
    room = room_of(name, box, 1e-3)
    assert (got >= torch.maximum(upright, across) - room).all()
    assert (got >= height_at_centre(name, (zero, zero), box) - room).all()


def test_constants_are_the_range():
    for name, kind in itertools.product(NAMES, KINDS):
        box = boxes(kind)
        lower, upper = relax_product(name, box[:2], box[2:], "constant")
        corners = torch.stack([PRODUCTS[name].function(x, y) for x in box[:2] for y in box[2:]])
        assert all((slope == 0).all() for slope in (*lower.slopes, *upper.slopes))
        torch.testing.assert_close(lower.intercept, corners.amin(dim=0), rtol=1e-14, atol=1e-300)
        torch.testing.assert_close(upper.intercept, corners.amax(dim=0), rtol=1e-14, atol=1e-300)


# --- gradients ------------------------------------------------------------------------------------------------------


def parts(relaxation: Relaxation) -> torch.Tensor:
    return torch.stack([part for plane in relaxation for part in (*plane.slopes, plane.intercept)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite(name, dtype, kind):
    box = [end.requires_grad_() for end in boxes(kind, dtype=dtype)]
    for choice in RELAXATIONS:
        total = parts(relax_product(name, box[:2], box[2:], choice)).sum()
        for gradients in torch.autograd.grad(total, box, allow_unused=True, materialize_grads=True):
            assert gradients.isfinite().all(), choice
    for kind in FIXED_SLOPES:
        with torch.no_grad():
            given = fixed_slopes(kind, name, Box(*box))
        leaves = [slope.requires_grad_() for pair in given for slope in pair]
        lower, upper = relax_product(name, box[:2], box[2:], slopes=(leaves[:2], leaves[2:]))
        total = lower.intercept.sum() + upper.intercept.sum()
        for gradients in torch.autograd.grad(total, [*box, *leaves], allow_unused=True, materialize_grads=True):
            assert gradients.isfinite().all(), kind


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_intercepts_match_finite_differences(name):
    """In slopes and box, at generic points; in the slopes that is minus the contact point."""
    box = boxes("wide", per_case=10, seed=8)
    leaves = [*box, *itertools.chain(*fixed_slopes("random", name, box))]

    def intercepts(leaves):
        lower, upper = relax_product(name, leaves[:2], leaves[2:4], slopes=(leaves[4:6], leaves[6:]))
        return lower.intercept - 0.7 * upper.intercept

    _compare_gradients(intercepts, leaves)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_contracting_planes_match_finite_differences(name):
    """What counts is the plane's height: the contact point of its slope is approximate and taken as fixed."""
    box = boxes("wide", per_case=10, seed=9)
    mx, my = box.middle

    def heights(leaves):
        (a, b), c = relax_product(name, leaves[:2], leaves[2:])[0]
        return a * mx + b * my + c

    _compare_gradients(heights, list(box), rtol=6e-2)


def _compare_gradients(function, leaves: list[torch.Tensor], rtol: float = 1e-4, share: float = 0.97) -> None:
    """Kinks, where the contact point jumps, are few: all but some elements must agree."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    gradients = torch.autograd.grad(function(leaves).sum(), leaves)
    for number, slope in enumerate(gradients):
        step = 1e-6 * (1 + leaves[number].detach().abs())
        ends = []
        for sign in (1, -1):
            moved = [leaf.detach() for leaf in leaves]
            moved[number] = moved[number] + sign * step
            ends.append(function(moved).detach())
        numeric = (ends[0] - ends[1]) / (2 * step)
        near = (slope - numeric).abs() <= rtol * (1 + numeric.abs())
        assert near.double().mean() >= share, (number, (slope - numeric).abs().max())


# --- the checks have teeth ------------------------------------------------------------------------------------------


def caught(check, *arguments) -> bool:
    try:
        check(*arguments)
    except (AssertionError, pytest.fail.Exception):
        return True
    return False


@pytest.mark.parametrize("check", [check_planes, check_planes_exactly])
@pytest.mark.parametrize("name", NAMES)
def test_the_check_catches_broken_planes(name, check):
    box = boxes("wide", per_case=1)
    good = relax_product(name, box[:2], box[2:])
    lower, upper = good
    assert not caught(check, name, box, good)
    smaller = relax_product(name, (box.lx + 0.01, box.ux - 0.01), (box.ly + 0.01, box.uy - 0.01))
    one = torch.zeros_like(box.lx)
    one[4] = 1e-9
    broken = {
        "lower plane too high": Relaxation(Plane(lower.slopes, lower.intercept + 1e-6), upper),
        "upper plane too low": Relaxation(lower, Plane(upper.slopes, upper.intercept - 1e-6)),
        "one element": Relaxation(Plane(lower.slopes, lower.intercept + one), upper),
        "swapped": Relaxation(upper, lower),
        "b of the upper plane not mirrored": Relaxation(lower, Plane((upper.slopes[0], -upper.slopes[1]), upper[1])),
        "planes of a smaller box": smaller,
        "slope without its intercept": Relaxation(Plane((lower.slopes[0] + 1e-3, lower.slopes[1]), lower[1]), upper),
        "not finite": Relaxation(lower, Plane(upper.slopes, upper.intercept * torch.nan)),
    }
    for kind, relaxation in broken.items():
        assert caught(check, name, box, relaxation), f"not caught: {kind}"


def test_the_check_catches_loose_planes():
    box = boxes("wide")
    for name in NAMES:
        lower, upper = relax_product(name, box[:2], box[2:])
        assert caught(check_planes, name, box, Relaxation(Plane(lower.slopes, lower.intercept - 1e-6), upper))
        assert caught(check_planes, name, box, Relaxation(lower, Plane(upper.slopes, upper.intercept + 1e-6)))


def test_the_check_catches_a_forgotten_inner_minimum(monkeypatch):
    box, slopes = inner_minima(50)
    both, pair = with_upper(slopes, box)
    for check in (check_planes, check_planes_exactly):
        assert not caught(check, TANH, both, relax_product(TANH, both[:2], both[2:], slopes=pair))
    monkeypatch.setattr(utils.relaxation.planes, "_inner_minimum", lambda a, b: (torch.inf + 0 * b, torch.inf + 0 * b))
    for check in (check_planes, check_planes_exactly):
        assert caught(check, TANH, both, relax_product(TANH, both[:2], both[2:], slopes=pair))


@pytest.mark.parametrize("name", NAMES)
def test_the_check_catches_a_forgotten_edge(name, monkeypatch):
    box = boxes("wide")
    given = fixed_slopes("tangent", name, box)
    assert not caught(check_planes, name, box, relax_product(name, box[:2], box[2:], slopes=given))
    monkeypatch.setattr(
        utils.relaxation.planes, "gate_stationary_point", lambda factor, b: torch.zeros_like(factor * b)
    )
    assert caught(check_planes, name, box, relax_product(name, box[:2], box[2:], slopes=given))


@pytest.mark.parametrize("name", NAMES)
def test_the_check_catches_planes_without_guard_in_exact_arithmetic(name, monkeypatch):
    """Rounding alone makes planes cross the product, by less than 1e-14: only the exact check sees it."""
    box = boxes("wide", per_case=4)
    monkeypatch.setattr("utils.relaxation.lines.GUARD_ULPS", 0.0)
    assert caught(check_planes_exactly, name, box, relax_product(name, box[:2], box[2:]))
