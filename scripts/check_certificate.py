"""Confirm or reject robustness certificates, by a program of its own: NumPy and this one file.

    python scripts/check_certificate.py FOLDER/certificates            # every certificate of a folder
    python scripts/check_certificate.py sample_00012.npz --weights weights.npz

A certificate (docs/certificates.md describes the files) names a network by the hash of its weights, an input, a set of
perturbed inputs (balls, or sequences in which at most k frames are replaced, each by one of a list of its own), a label
and classes to beat, and gives slopes for a linear relaxation of every non-linear operation, and curvatures if these are
curved. Of a classifier of waveforms the input is the waveform: its log mel energies are layers of the network. The
hints prove nothing by themselves and any are allowed. The checker unrolls the network anew, finds for every slope an
intercept of its own that makes the relaxation sound, bounds every operand by
backward substitution to the input, what curvatures lose over all neurons together by eigenvalues that Cholesky factors
prove, and in the end the margins: label's logit less another class's. It confirms if all lower bounds are above 0.

The bounds hold for the network over the real numbers, with the weights as stored, although they are computed in
float64: every rounding error is bounded and subtracted (``gamma``, ``Sum.slack``). Trusted are IEEE-754 float64
arithmetic in round-to-nearest, sums of n products in the usual n^3 manner whatever their order, and numpy.exp to
``EXP_ULPS`` units in the last place. It shares no code with the program that wrote the certificate.

Exit code: 0 all confirmed, 1 some rejected, 2 a file is damaged or not a certificate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np

FORMAT, VERSION = "recurrent-robustness-certificate", 1
WEIGHTS_FORMAT = "recurrent-classifier-weights"

U = 2.0**-53  # unit roundoff of float64
EXP_ULPS = 8  # trusted: numpy.exp is off by at most so many units in the last place
# sigmoid from an exponential: 1.5 times its relative error and three roundings, made larger by a half.
SIGMOID_ERROR = (1.5 * 2 * EXP_ULPS + 3) * U * 1.5
VALUE_ERROR = SIGMOID_ERROR + 16 * U  # of F sigmoid(y) - b y and of its derivative, relative to the size of the terms
LOG_ERROR = (2 * EXP_ULPS + 8) * U  # of (1 + y) / exp(g), relative
GUARD = 64  # of quadratic forms, see ``Forms``: relative to their trace, in units of gamma
TINY = 1e-290  # more than all that underflow can take away, even if it flushes to zero
LARGEST = 1e15  # numbers above are refused: so TINY is enough, and nothing sensible is so large
POINT_WIDTH = 1e-3  # wider values at single substitutes are not kept apart: planes may do better
MAX_BYTES, MAX_HEADER, MAX_FRAMES = 2**28, 2**20, 10**4  # of a file packed or not, of its header, of a sequence

# Choices that matter to how tight bounds of squares are, not to whether they hold: how many common directions, squares
# of a row's own, columns and steps in the search for a metric; how R is weighed against the linear part, and so on.
LEADING, OWN, COLUMNS, STEPS = 96, 24, 3, 8
OWN_SHARE, FINAL_SHARES, CROSS_SHARE = 0.5, (0.5, 0.7), 0.6

# Relaxed operations of a cell's time step, in the order of the certificate's format, with their number of operands.
OPERATIONS = {
    "rnn": {"activation": 1},
    "lstm": {"kept": 2, "written": 2, "output": 2},
    "gru": {"reset": 2, "new": 2, "kept": 2},
}
LOG_HINTS = "features", "log"  # where slopes of the logarithms of a classifier of waveforms are kept
GATES = {"rnn": 1, "lstm": 4, "gru": 3}


class Damaged(Exception):
    """A file that is no certificate or no weights file of this format."""


class Rejected(Exception):
    """A certificate that does not prove what it states."""


def gamma(n: int) -> float:
    """Relative error of a sum of n products, in any order; twice Higham's bound.

    The factor two pays for the rounding of the error terms themselves: sums of positive terms, whose relative error
    is far below one half.
    """
    return 2 * (n + 4) * U


# --- functions of one variable --------------------------------------------------------------------------------------


def sigmoid(y):
    """sigmoid(y), to a relative error of SIGMOID_ERROR."""
    e = np.exp(-np.abs(y))
    return np.where(y >= 0, 1.0, e) / (1.0 + e)


def sigmoid_range(low, high):
    """Numbers below sigmoid(low) and above sigmoid(high)."""
    below, above = sigmoid(low) * (1 - 2 * SIGMOID_ERROR), sigmoid(high) * (1 + 2 * SIGMOID_ERROR)
    return below - TINY, np.minimum(above + TINY, 1.0)


def tanh_range(low, high):
    """Numbers below tanh(low) and above tanh(high), from tanh(y) = 2 sigmoid(2 y) - 1."""
    below, above = sigmoid_range(2 * low, 2 * high)
    return np.maximum(2 * below - 1 - 4 * U, -1.0), np.minimum(2 * above - 1 + 4 * U, 1.0)


def valley(factor, b, low, high):
    """A number below factor*sigmoid(y) - b*y for all y in [low, high], element-wise; tight but for rounding.

    The function is convex on one side of 0 (left if factor >= 0) and concave on the other. Where it is concave it is
    least at an end. Where it is convex it lies above its tangent at any point p, so the least value of the tangent
    is a bound: it is tight because p is close to the stationary point, but sound for every p.
    """
    rising = factor >= 0
    start, end = np.where(rising, low, np.maximum(low, 0.0)), np.where(rising, np.minimum(high, 0.0), high)
    ratio = np.clip(b / np.where(factor == 0, 1.0, factor), 1e-300, 0.25)
    root = np.sqrt(1.0 - 4.0 * ratio)
    point = np.where(rising, -1.0, 1.0) * (2.0 * np.log1p(root) - np.log(4.0 * ratio))
    p = np.minimum(np.maximum(np.where(np.isfinite(point), point, 0.0), start), end)
    e = np.exp(-np.abs(p))
    value = _below(factor * (np.where(p >= 0, 1.0, e) / (1.0 + e)), b * p)
    steep = factor * (e / (1.0 + e) ** 2)
    slope, error = steep - b, VALUE_ERROR * (np.abs(steep) + np.abs(b)) + TINY
    drop = np.maximum(np.maximum(error - slope, 0.0) * (end - p), np.maximum(slope + error, 0.0) * (p - start))
    tangent = np.where(start <= end, value - (1 + 16 * U) * drop - 2 * U * np.abs(value) - TINY, np.inf)
    ends = np.minimum(_below(factor * sigmoid(low), b * low), _below(factor * sigmoid(high), b * high))
    return np.minimum(tangent, ends)


def _below(first, second):
    """A number below first - second, where ``first`` is a multiple of a computed sigmoid."""
    return first - second - VALUE_ERROR * (np.abs(first) + np.abs(second)) - TINY


def _less(value, *terms):
    """A number below value - sum(terms)."""
    size = np.abs(value)
    for term in terms:
        value, size = value - term, size + np.abs(term)
    return value - gamma(len(terms)) * size - TINY


def log_range(y):
    """Numbers below and above log(1 + y), y >= 0, from exp alone: log(1 + y) = g + log((1 + y) / e^g) for any g."""
    guess = np.log1p(y)
    ratio = (1.0 + y) / np.exp(guess)
    error = LOG_ERROR * ratio
    low, high = ratio - 1.0 - error, ratio - 1.0 + error  # r / (1 + r) <= log(1 + r) <= r
    room = 4 * U * (1.0 + np.abs(guess))
    return guess + low / (1.0 + low) - room, guess + high + room


# --- intercepts: the largest c with f >= slopes . operands + c on a box, but for rounding -----------------------------


def tanh_intercept(slope, low, high, factor=1.0):
    """Of factor * tanh, factor >= 0."""
    return _less(valley(2.0 * factor, 0.5 * slope, 2.0 * low, 2.0 * high), factor)


def gate_intercept(a, b, lx, ux, ly, uy):
    """Of x*sigmoid(y), which is linear in x: at an end of x."""
    return np.minimum(*(_less(valley(x, b, ly, uy), a * x) for x in (lx, ux)))


def tanh_gate_intercept(a, b, lx, ux, ly, uy):
    """Of tanh(x)*sigmoid(y).

    With s = sigmoid(y), m(s) = min over x of s tanh(x) - a x is a minimum of linear functions of s, so it is concave
    and lies above its chord on any cell [s1, s2]; what is left on the cell is k sigmoid(y) - b y with the chord's
    slope k, a ``valley``. The loss is of the order of the cell's width squared: cells are small where the minimum is
    likely to be, at the ends and at a stationary point. It is sound for every choice of cells.
    """
    a, b, lx, ux, ly, uy = (v[..., None] for v in np.broadcast_arrays(a, b, lx, ux, ly, uy))

    def m(s):
        return tanh_intercept(a, lx, ux, s)

    y = _cells(lambda y: m(sigmoid(y)) - b * y, ly, uy)
    s = sigmoid(y)
    at = m(s)
    s1, s2, m1, m2 = s[..., :-1], s[..., 1:], at[..., :-1], at[..., 1:]
    width = s2 - s1
    chord = np.where(width > 0, (m2 - m1) / np.where(width > 0, width, 1.0), 0.0)
    chord = np.clip(chord, -1.0, 1.0)  # as |tanh| <= 1
    constant = np.minimum(_less(m1, chord * s1), _less(m2, chord * s2))
    # sigmoid(y) may lie outside the computed [s1, s2] by its error; m and the chord change by no more than that.
    least = _less(valley(chord, b, y[..., :-1], y[..., 1:]), -constant) - 4 * SIGMOID_ERROR
    return least.min(axis=-1)


def _cells(function, low, high, count: int = 32, levels: int = 30):
    """Points of [low, high], ends included, in order, (..., m): dense at the ends and at a local minimum inside."""
    grid = np.linspace(0.0, 1.0, count + 1)
    y = low + (high - low) * grid
    value = function(y)
    local = (value[..., 1:-1] <= value[..., :-2]) & (value[..., 1:-1] <= value[..., 2:])
    best = 1 + np.where(local, value[..., 1:-1], np.inf).argmin(axis=-1)[..., None]
    left, right = (np.take_along_axis(y, best + side, axis=-1) for side in (-1, 1))
    for _ in range(9):
        fine = left + (right - left) * np.linspace(0.0, 1.0, 9)
        best = np.clip(function(fine).argmin(axis=-1)[..., None], 1, 7)
        left, right = (np.take_along_axis(fine, best + side, axis=-1) for side in (-1, 1))
    middle = 0.5 * (left + right)
    shares = 1.5 ** -np.arange(0.0, levels)
    points = [y, middle, middle + (high - middle) * shares, middle + (low - middle) * shares]
    points += [low + (high - low) * shares, high + (low - high) * shares]
    points = np.clip(np.sort(np.concatenate(points, axis=-1), axis=-1), low, high)
    points[..., :1], points[..., -1:] = low, high
    return points


# --- curved bounds: the largest c with f >= slopes . z + c - curvatures . d^2 / 2 on a box, d = z - center ------------


def _bowl(slope, bend, center, low, high):
    """A number below slope*z + bend*(z - center)^2/2 for all z in [low, high], bend >= 0; tight but for rounding.

    The least is where the derivative vanishes, if that is inside. The point is wrong by a few units of rounding of
    its and the center's size, and its value by their squares.
    """
    bottom = center - slope / np.where(bend > 0, bend, 1.0)
    z = np.clip(np.where(bend > 0, bottom, np.where(slope > 0, low, high)), low, high)
    value = slope * z + 0.5 * bend * (z - center) ** 2
    return value - gamma(8) * (np.abs(slope * z) + bend * (np.abs(z) + np.abs(center)) ** 2) - TINY


def relu_intercept(slope, low, high, sign=1.0, bend=0.0, center=0.0):
    """Of sign * relu: a bowl on either side of the kink."""
    left = np.where(low <= 0, _bowl(-slope, bend, center, low, np.minimum(high, 0.0)), np.inf)
    right = np.where(high >= 0, _bowl(sign - slope, bend, center, np.maximum(low, 0.0), high), np.inf)
    return np.minimum(left, right)


def curved_intercept(kind, slopes, bends, centers, low, high):
    """Of tanh, x*sigmoid(y) or tanh(x)*sigmoid(y), by branch and bound; all arguments are (operands, ...).

    The box is cut into cells, and the cells of the lowest bounds into smaller ones. Every cell's bound holds, whichever
    cells there are, so the least of them does; it is wrong by the square of the deciding cell's width.
    """
    shape = low.shape[1:]
    a, q, m, low, high = (v.reshape(len(low), -1, 1) for v in np.broadcast_arrays(slopes, bends, centers, low, high))
    parts, chosen, splits, rounds = (32, 6, 4, 7) if len(low) == 1 else (8, 30, 3, 7)
    low, high = _split(low, high, parts)
    bound = _on_cell(kind, a, q, m, low, high)
    for _ in range(rounds):
        order = np.argsort(bound, axis=-1)  # a bound that is no number is last, and stays
        low, high = (np.take_along_axis(end, order[None], axis=-1) for end in (low, high))
        bound = np.take_along_axis(bound, order, axis=-1)
        inner = _split(low[..., :chosen], high[..., :chosen], splits)
        finer = _on_cell(kind, a, q, m, *inner)
        rest = low[..., chosen:], high[..., chosen:]
        low, high = (np.concatenate(pair, axis=-1) for pair in zip(inner, rest, strict=True))
        bound = np.concatenate((finer, bound[..., chosen:]), axis=-1)
    return bound.min(axis=-1).reshape(shape)


def _split(low, high, parts):
    """Cells (operands, numbers, cells) cut into ``parts`` along every operand; together they cover what was cut."""
    edges = low[..., None] + (high - low)[..., None] * (np.arange(parts + 1) / parts)
    edges = np.clip(edges, low[..., None], high[..., None])
    edges[..., -1] = high
    ends = edges[..., :-1], edges[..., 1:]
    if len(low) == 1:
        return tuple(end.reshape(*low.shape[:2], -1) for end in ends)
    pairs = (np.broadcast_arrays(end[0][..., :, None], end[1][..., None, :]) for end in ends)
    return tuple(np.stack(pair).reshape(*low.shape[:2], -1) for pair in pairs)


def _on_cell(kind, a, q, m, low, high):
    """A number below f(z) - a z + q d^2 / 2 on cells: below f lies a line, exact at both ends or nearly.

    For products, T S = t S + s T - t s + (T - t)(S - s) with numbers t and s in the middle of the factors' ranges.
    """
    x_low, x_high = low[0], high[0]
    if len(low) == 1:
        k = _secant(np.tanh, 1.0, x_low, x_high)
        return _less(tanh_intercept(k, x_low, x_high), -_bowl(k - a[0], q[0], m[0], x_low, x_high))
    t_ends = tanh_range(x_low, x_high) if kind == "tanh*sigmoid" else (x_low, x_high)
    s_ends = sigmoid_range(low[1], high[1])
    t, s = (0.5 * (ends[0] + ends[1]) for ends in (t_ends, s_ends))
    s = np.maximum(s, 0.0)
    apart = [np.maximum(ends[1] - middle, middle - ends[0]) for middle, ends in ((t, t_ends), (s, s_ends))]
    k = _secant(sigmoid, t, low[1], high[1])
    y_part = valley(t, k, low[1], high[1])
    y_bowl = _bowl(k - a[1], q[1], m[1], low[1], high[1])
    k, x_part = s, np.zeros_like(s)
    if kind == "tanh*sigmoid":
        k = _secant(np.tanh, s, x_low, x_high)
        x_part = tanh_intercept(k, x_low, x_high, s)
    x_bowl = _bowl(k - a[0], q[0], m[0], x_low, x_high)
    return _less(y_part, -y_bowl, -x_part, -x_bowl, t * s, apart[0] * apart[1] * (1 + 8 * U))


def _secant(function, factor, low, high):
    width = high - low
    return factor * (function(high) - function(low)) / np.where(width > 0, width, 1.0)


# --- the network ----------------------------------------------------------------------------------------------------


class Node:
    """A vector of the unrolled network: ``low <= node <= high`` for every input of the set."""

    index = -1
    low = high = None
    tight = False
    points = None  # (low, high) at x and at each substitute of the only word that it reads, (S + 1, size) each
    line = None  # (J, R, center) of an operand that a backward step has bounded: |node - center - J delta| <= R

    def __init__(self, size, parents=()):
        self.size, self.parents = size, tuple(parents)
        self.perturbed = any(parent.perturbed for parent in self.parents)
        self.reads = frozenset().union(*(parent.reads for parent in self.parents))  # words that may be replaced

    @property
    def magnitude(self):
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def own_range(self):
        """(low, high) from the parents' ranges, or None if a backward step of the node itself is to give it."""
        return self.range_by(whole)

    def range_by(self, ends):
        """(low, high) by interval arithmetic from ``ends`` (``whole`` or ``apart``) of nodes before it."""
        raise NotImplementedError

    def squares(self, rows):
        """(frame, what its move costs each row at most) of terms that a backward step leaves to be added up."""
        return []

    def find_points(self):
        """If it reads one word, and rounding has not grown too much: all its values, each in a small interval.

        Whether it is a node with ``points`` or one between planes, what is derived is sound.
        """
        known = all(parent.points is not None for parent in self.parents if parent.perturbed)
        if len(self.reads) != 1 or not known:
            return
        low, high = self.range_by(apart)
        if (high - low <= POINT_WIDTH * (1 + np.abs(low))).all():
            self.take_points(low, high)

    def take_points(self, low, high):
        self.points, self.tight = (low, high), True
        self.low, self.high = low.min(axis=0), high.max(axis=0)

    def backward(self, rows):
        """Replace rows . node by what is below it: ([(parent, coefficients)], constant, error of both), per row."""
        raise NotImplementedError


def whole(node):
    """The node's range over all inputs of the set."""
    return node.low, node.high


def apart(node):
    """Its ranges at x and at each substitute of a word; of an exact node the only one."""
    return whole(node) if node.points is None else node.points


class Fixed(Node):
    """A known vector."""

    def __init__(self, vector):
        super().__init__(len(vector))
        self.low = self.high = vector


class Frame(Node):
    """The normalised input (x_t - mean) / std of a time step."""

    def __init__(self, x, eps, clip, mean, std):
        super().__init__(len(x))
        self.perturbed, self.eps, self.mean, self.std = eps > 0, eps, mean, std
        self.center, self.sides = x, np.full(len(x), eps)  # of the box around the ball; x' = center + delta
        low, high = np.nextafter(x - eps, -np.inf), np.nextafter(x + eps, np.inf)
        if clip is not None:
            low, high = np.maximum(low, clip[0]), np.minimum(high, clip[1])
            self.center = 0.5 * (low + high)
            self.sides = np.nextafter(np.maximum(high - self.center, self.center - low), np.inf)
        if not self.perturbed:
            low = high = x
        ends = [(end - mean) / std for end in (low, high)]
        room = [4 * U * np.abs(end) + TINY for end in ends]
        self.low, self.high = ends[0] - room[0], ends[1] + room[1]


class Word(Node):
    """The normalised input of a time step that is one of several: first x_t itself, then its substitutes."""

    def __init__(self, place, vectors, mean, std):
        super().__init__(vectors.shape[1])
        values = (vectors - mean) / std
        room = 4 * U * np.abs(values) + TINY
        if len(vectors) > 1:
            self.perturbed, self.reads = True, frozenset([place])
            self.take_points(values - room, values + room)
        else:
            self.low, self.high = (values - room)[0], (values + room)[0]


class Affine(Node):
    """sum_i matrices[i] @ parents[i] + bias."""

    def __init__(self, parents, matrices, bias):
        super().__init__(len(bias), parents)
        self.matrices, self.bias, self.sizes = matrices, bias, None

    def own_range(self):
        return None

    def range_by(self, ends):
        """From the middles of the parents' ranges, so that the error is that of a matrix product."""
        middle, reach = self.bias, gamma(1) * np.abs(self.bias) + TINY
        for matrix, parent in zip(self.matrices, self.parents, strict=True):
            center, radius = middle_of(*ends(parent))
            middle = middle + center @ matrix.T
            reach = reach + (radius + gamma(parent.size + 2) * np.abs(center)) @ np.abs(matrix.T)
            reach = reach + 4 * U * np.abs(middle)
        return middle - 2 * reach, middle + 2 * reach

    def backward(self, rows):
        if self.sizes is None:
            pairs = zip(self.matrices, self.parents, strict=True)
            self.sizes = np.abs(self.bias) + sum(np.abs(w) @ parent.magnitude for w, parent in pairs)
        handed = [(parent, rows @ w) for parent, w in zip(self.parents, self.matrices, strict=True)]
        return handed, rows @ self.bias, gamma(self.size) * (np.abs(rows) @ self.sizes)


class Mix(Node):
    """sum_i factors[i] * parents[i] / divisor, factors 1 or -1."""

    def __init__(self, parents, factors=None, divisor=1):
        super().__init__(parents[0].size, parents)
        self.factors, self.divisor = factors or [1.0] * len(parents), float(divisor)

    def range_by(self, ends):
        pairs = [(ends(parent), factor) for parent, factor in zip(self.parents, self.factors, strict=True)]
        low = sum(low if f > 0 else -high for (low, high), f in pairs) / self.divisor
        high = sum(high if f > 0 else -low for (low, high), f in pairs) / self.divisor
        room = gamma(len(pairs)) * sum(p.magnitude for p in self.parents) / self.divisor
        return low - room - TINY, high + room + TINY

    def backward(self, rows):
        handed = [(p, f * rows / self.divisor) for p, f in zip(self.parents, self.factors, strict=True)]
        return handed, 0.0, gamma(1) * sum(np.abs(rows) @ p.magnitude for p in self.parents) / self.divisor


class GateMix(Mix):
    """sigmoid(-z) tanh(n) + sigmoid(z) h: for every z a mean of tanh(n) and h, linear in sigmoid(z)."""

    def range_by(self, ends):
        (n, _), (h, z) = (product.parents for product in self.parents)
        gates = [np.clip(gate, 0.0, 1.0) for gate in sigmoid_range(*ends(z))]
        sums, (h_low, h_high) = super().range_by(ends), ends(h)
        (t_low, t_high), found = tanh_range(*ends(n)), []
        for new, kept, least in ((t_low, h_low, np.minimum), (t_high, h_high, np.maximum)):
            first, last = ((1.0 - gate) * new + gate * kept for gate in gates)
            found.append((least(first, last), 8 * U * (np.abs(new) + np.abs(kept)) + TINY))
        (low, low_room), (high, high_room) = found
        return np.maximum(sums[0], low - low_room), np.minimum(sums[1], high + high_room)


class Relaxed(Node):
    """A non-linear operation between two planes: ``slopes`` is (2, operands, size), lower and upper.

    With ``bends``, of the same shape, curved bounds lie outside of the planes, by bends . d^2 / 2.
    """

    def __init__(self, kind, parents, slopes, bends=None):
        super().__init__(parents[0].size, parents)
        self.kind, self.slopes, self.bends, self.intercepts = kind, slopes, bends, None
        self.operands = [operand_of(parent) for parent in parents]
        if bends is None or any(operand.line is None for operand, _ in self.operands):
            self.bends = None

    def range_by(self, ends):
        low, high = ends(self.parents[0])
        if self.kind == "relu":
            return np.maximum(low, 0.0), np.maximum(high, 0.0)
        if self.kind.startswith("tanh"):
            low, high = tanh_range(low, high)
        if len(self.parents) == 1:
            return low, high
        gate_low, gate_high = sigmoid_range(*ends(self.parents[1]))
        gate_low = np.maximum(gate_low, 0.0)
        low, high = low * np.where(low >= 0, gate_low, gate_high), high * np.where(high >= 0, gate_high, gate_low)
        return low - 2 * U * np.abs(low) - TINY, high + 2 * U * np.abs(high) + TINY

    def find_intercepts(self):
        """On the ranges that the operands have by now. An upper plane is a lower one of the function mirrored in x."""
        x = self.parents[0]
        (a, *b), (a_up, *b_up) = self.slopes
        low, high = np.stack((x.low, -x.high)), np.stack((x.high, -x.low))
        if self.kind == "relu":
            bends, center = (0.0, 0.0), 0.0
            if self.bends is not None:
                bends, center = self.bends[:, 0], self.operands[0][0].line[2]
            below = relu_intercept(a, x.low, x.high, 1.0, bends[0], center)
            above = relu_intercept(-a_up, x.low, x.high, -1.0, bends[1], center)
        elif self.kind == "tanh":
            below, above = tanh_intercept(np.stack((a, a_up)), low, high)
        else:
            y = self.parents[1]
            intercept = tanh_gate_intercept if self.kind == "tanh*sigmoid" else gate_intercept
            below, above = intercept(np.stack((a, a_up)), np.stack((b[0], -b_up[0])), low, high, y.low, y.high)
        if self.bends is not None and self.kind != "relu":  # where they are 0, planes are tighter
            curved = self._curved_intercepts()
            below, above = np.maximum(below, curved[0]), np.maximum(above, curved[1])
        self.intercepts = below, -above

    def _curved_intercepts(self):
        centers = np.stack([sign * operand.line[2] for operand, sign in self.operands])
        ends = np.stack([(parent.low, parent.high) for parent in self.parents], axis=1)  # (low or high, operands, size)
        flip = np.where(np.arange(len(centers)) == 0, -1.0, 1.0)[:, None]  # mirrors x
        slopes = np.stack((self.slopes[0], -flip * self.slopes[1]), axis=1)
        mirrored = ends.copy()
        mirrored[:, 0] = -ends[::-1, 0]
        low, high = (np.stack(pair, axis=1) for pair in zip(ends, mirrored, strict=True))
        centers = np.stack((centers, flip * centers), axis=1)
        bends = np.swapaxes(self.bends, 0, 1)
        return curved_intercept(self.kind, slopes, bends, centers, low, high)

    def losses(self, rows):
        """[(operand, weights w)]: how much curved bounds lose against the planes is sum_k w_k d_k^2, per row."""
        if self.bends is None:
            return []
        up, down = np.maximum(rows, 0.0), np.maximum(-rows, 0.0)
        bends = zip(*self.bends, strict=True)
        weights = [0.5 * (up * low + down * high) * (1 + 8 * U) + TINY for low, high in bends]
        return [(operand, w) for (operand, _), w in zip(self.operands, weights, strict=True)]

    def backward(self, rows):
        if self.intercepts is None:
            self.find_intercepts()
        below, above = self.intercepts
        positive = rows > 0
        constant = np.where(positive, rows, 0.0) @ below + np.where(positive, 0.0, rows) @ above
        error = gamma(2 * self.size) * (np.abs(rows) @ np.maximum(np.abs(below), np.abs(above)))
        handed = []
        for parent, low, high in zip(self.parents, *self.slopes, strict=True):
            handed.append((parent, rows * np.where(positive, low, high)))
            error = error + gamma(0) * (np.abs(handed[-1][1]) @ parent.magnitude)
        return handed, constant, error


class MelBank:
    """Energies  E_m(v) = sum_k mel_mk (wave_k . v)^2  of windows v, in units of the floor, and bounds of their parts.

    Over deviations d of v from c,  E(v) = 2 c'Q v - E(c) + d'Q d  with  0 <= d'Q d <= kappa  for

        d'Q d <= lambda(Q) |d|^2,        d'Q d <= lambda(W^-1 Q W^-1) sum_j (w_j d_j)^2,
        (wave_k . d)^2 <= (|wave_k| . |d|)^2,

    W = diag(w) for any w > 0: of the Hann window that the waves have in them the second is good. Energies of several
    bands, a >= 0 of each, have  sum_m a_m d'Q_m d <= max_k (a'mel)_k sum_k (wave_k . d)^2,  which is bounded alike.
    """

    def __init__(self, wave, mel, floor):
        self.wave, self.size = wave, np.abs(wave)
        self.mel = np.concatenate((mel, mel), axis=1) / floor
        self.window = np.sin(np.pi * (np.arange(wave.shape[1]) + 0.5) / wave.shape[1]) ** 2
        self.terms = 4 * sum(wave.shape) + len(mel) + 64  # more than rounding there is on any way through
        self.largest = np.array([_largest_form(wave, row) for row in self.mel])
        self.largest_unwindowed = np.array([_largest_form(wave / self.window, row) for row in self.mel])
        ones = np.ones(len(wave))
        self.whole, self.whole_unwindowed = _largest_form(wave, ones), _largest_form(wave / self.window, ones)

    def kappa(self, frames, norm, ball):
        """A number above d'Q d of each band, over what the window's frames can do."""
        if norm != np.inf:
            return self.largest * _squared_radius(frames, ball) * (1 + gamma(8)) + TINY
        sides = _sides(frames)
        together = self.largest_unwindowed * ((self.window * sides) ** 2).sum()
        single = (self.size @ sides) ** 2 @ self.mel.T
        return np.minimum(together, single) * (1 + gamma(self.terms)) + TINY

    def most(self, frames, norm, ball):
        """A number above sum_k (wave_k . d)^2, likewise."""
        if norm != np.inf:
            return self.whole * _squared_radius(frames, ball) * (1 + gamma(8)) + TINY
        return self.whole_unwindowed * ((self.window * _sides(frames)) ** 2).sum() * (1 + gamma(self.terms)) + TINY


def _squared_radius(frames, ball):
    squares = [frame.eps**2 for frame in frames]
    return sum(squares) if ball == "frame" else max(squares)


def _sides(frames):
    return np.concatenate([frame.sides if frame.perturbed else np.zeros(frame.size) for frame in frames])


def _largest_form(rows, weights):
    """A number above the greatest eigenvalue of sum_k weights_k rows_k rows_k'."""
    scaled = rows[weights > 0] * np.sqrt(weights[weights > 0])[:, None]
    if not scaled.size:
        return TINY
    return eigenvalue_above(_gram(scaled)) + 2 * gamma(sum(scaled.shape) + 8) * (scaled**2).sum() + TINY


class Energies(Node):
    """The mel energies of two frames side by side, between their tangent plane at the center and that plane + kappa."""

    def __init__(self, frames, bank, norm, ball):
        super().__init__(len(bank.mel), frames)
        center = np.concatenate([frame.center for frame in frames])
        waves, sizes = bank.wave @ center, bank.size @ np.abs(center)
        self.energy, self.energy_size = bank.mel @ waves**2, bank.mel @ sizes**2
        self.slopes = (2.0 * waves * bank.mel) @ bank.wave
        self.kappa = bank.kappa(frames, norm, ball) if self.perturbed else np.zeros(self.size)
        self.mel, self.most = bank.mel, bank.most(frames, norm, ball) if self.perturbed else 0.0
        self.shares = ball != "frame" and norm != np.inf
        reach = (2.0 * sizes * bank.mel) @ bank.size @ np.concatenate([frame.magnitude for frame in frames])
        self.room = gamma(bank.terms) * (reach + self.energy_size + self.kappa) + TINY

    def own_range(self):
        """The root of an energy is a seminorm, so that it moves by sqrt(kappa) at most."""
        room = self.room
        low, high = np.sqrt(np.maximum(self.energy - room, 0.0)), np.sqrt(self.energy + room)
        most = np.sqrt(self.kappa)
        low = np.maximum(low - most, 0.0) ** 2 - 16 * U * (self.energy + self.kappa) - TINY
        return np.maximum(low, 0.0), (high + most) ** 2 * (1 + 16 * U) + TINY

    def backward(self, rows):
        """E >= slopes . v - E(c), and <= that + kappa; of many bands together they leave that by less."""
        parts = np.split(rows @ self.slopes, [self.parents[0].size], axis=1)
        constant = (0.0 if self.shares else -self._lost(rows)) - rows @ self.energy
        return list(zip(self.parents, parts, strict=True)), constant, np.abs(rows) @ self.room

    def _lost(self, rows):
        negative = -np.minimum(rows, 0.0)
        together = (negative @ self.mel).max(axis=1) * (1 + gamma(len(self.mel) + 8)) * self.most
        return np.minimum(negative @ self.kappa, together)

    def squares(self, rows):
        """(frame, what it costs): sum |a_m| d'Q_m d <= lost |d|^2 / radius^2, and |d|^2 is the sum of both frames'."""
        if not self.shares:
            return []
        lost = self._lost(rows)
        return [(frame, lost) for frame in self.parents if frame.perturbed]


class Logarithm(Relaxed):
    """log(1 + y) of energies y >= 0."""

    def __init__(self, parent, slopes):
        super().__init__("log", [parent], slopes)

    def range_by(self, ends):
        low, high = ends(self.parents[0])
        return np.maximum(log_range(np.maximum(low, 0.0))[0], 0.0), log_range(np.maximum(high, 0.0))[1]

    def find_intercepts(self):
        """It is concave: less a line it is least at an end, and below its tangent at any point p."""
        ends = np.maximum(self.parents[0].low, 0.0), np.maximum(self.parents[0].high, 0.0)
        (a,), (b,) = self.slopes
        below = np.minimum(*(_less(log_range(y)[0], a * y) for y in ends))
        p = np.clip(1.0 / np.clip(b, 1e-100, None) - 1.0, *ends)
        steep = 1.0 / (1.0 + p)
        slope, error = steep - b, 8 * U * (steep + np.abs(b))
        rise = np.maximum(
            np.maximum(slope + error, 0.0) * (ends[1] - p), np.maximum(error - slope, 0.0) * (p - ends[0])
        )
        self.intercepts = below, -_less(-log_range(p)[1], -b * p, rise * (1 + 8 * U))


class Normalised(Node):
    """(parent - mean) / std, std > 0."""

    def __init__(self, parent, mean, std):
        super().__init__(parent.size, [parent])
        self.mean, self.std = mean, std

    def range_by(self, ends):
        low, high = ((end - self.mean) / self.std for end in ends(self.parents[0]))
        room = [8 * U * (np.abs(end) + np.abs(self.mean) / self.std) + TINY for end in (low, high)]
        return low - room[0], high + room[1]

    def backward(self, rows):
        (parent,), scaled = self.parents, rows / self.std
        error = gamma(self.size + 4) * (np.abs(scaled) @ (parent.magnitude + np.abs(self.mean)))
        return [(parent, scaled)], -(scaled @ self.mean), error


def operand_of(node):
    """(node, sign) such that the given one is sign * node, and node is bounded by backward substitution."""
    if isinstance(node, Mix) and len(node.parents) == 1:
        operand, sign = operand_of(node.parents[0])
        return operand, sign * node.factors[0]
    return node, 1.0


class Sum:
    """A lower bound as it grows, a number per row: the terms so far and what their errors may amount to."""

    def __init__(self, *shape):
        self.total, self.slack = np.zeros(shape), np.zeros(shape)

    def add(self, term, error):
        self.total = self.total + term
        self.slack = self.slack + error + 4 * U * np.abs(self.total) + TINY

    def below(self):
        return np.nextafter(self.total - 2 * self.slack, -np.inf)


class Network:
    """The unrolled classifier, with the ranges of its nodes over one set of inputs."""

    def __init__(self, by_intervals, curved=False):
        self.nodes, self.by_intervals, self.curved = [], by_intervals, curved
        self.inputs = None

    def add(self, node):
        """Append a node and find its range from its parents' ranges."""
        node.index = len(self.nodes)
        self.nodes.append(node)
        if node.low is None:
            node.find_points()
        if node.low is None:
            found = node.own_range()
            node.low, node.high = self._ends(self._lines(node, deep=False)) if found is None else found
        return node

    def add_inputs(self, frames, gather):
        """Append all frames; ``gather`` makes the set of those that are perturbed."""
        added = [self.add(frame) for frame in frames]
        self.inputs = gather([frame for frame in added if frame.perturbed])
        return added

    def relax(self, kind, parents, slopes, bends):
        """Append a non-linear operation, once the ranges of its operands have been tightened."""
        for parent in parents:
            self.tighten(parent)
        return self.add(Relaxed(kind, parents, slopes, bends))

    def tighten(self, node):
        """Bound an operand by backward substitution to the input; once."""
        if node.points is not None:
            return
        if isinstance(node, Mix) and len(node.parents) == 1:
            self.tighten(node.parents[0])
            node.low, node.high = node.own_range()
        elif node.perturbed and not node.tight and not self.by_intervals:
            lines = self._lines(node, deep=True)
            low, high = self._ends(lines)
            node.low, node.high = np.maximum(node.low, low), np.minimum(node.high, high)
            if not (node.low <= node.high).all():
                raise Rejected("the range of an operand is empty or not a number")
            if self.curved:
                node.line = self._middle(node, *lines)
            node.tight = True

    def narrow(self, node):
        """Bound a node also by the lines that its own backward step gives, if that is a step from the input."""
        low, high = self._ends(self._lines(node, deep=False))
        node.low, node.high, node.tight = np.maximum(node.low, low), np.minimum(node.high, high), True

    def _lines(self, node, deep):
        """(c, S) of lines below the node and below its negative."""
        identity = np.eye(node.size)
        result, slopes, losses = self._substitute(node, np.concatenate((identity, -identity)), deep)
        if losses:
            result.add(-self.joint_loss(losses), 0.0)
        return result.below(), slopes

    def _ends(self, lines):
        at_center, slopes = lines
        below = np.nextafter(at_center - self.inputs.deviation(slopes), -np.inf)
        return tuple(np.split(below, 2) * np.array([[1.0], [-1.0]]))

    def _middle(self, node, at_center, slopes):
        """(J, R, center) halfway between the lines below and above, with a center in the node's range."""
        (first, second), (below, above) = np.split(at_center, 2), np.split(slopes, 2)
        half = 0.5 * below - 0.5 * above
        low, high = first - self.inputs.deviation(below - half), self.inputs.deviation(above + half) - second
        center = np.clip(0.5 * (low + high), node.low, node.high)
        remainder = np.maximum(np.maximum(high - center, center - low), 0.0)
        return half, remainder + 4 * U * (np.abs(low) + np.abs(high) + np.abs(center)) + TINY, center

    def lower_bound(self, node, rows, deep):
        """Below rows . node: through all relaxations to the input, or (not deep) from the parents' ranges.

        What curved bounds lose is bounded beside the line that is left, and together with it.
        """
        result, slopes, losses = self._substitute(node, rows, deep)
        fall = self.inputs.deviation(slopes)
        if losses:
            apart = (fall + self.joint_loss(losses)) * (1 + 2 * U)
            together = [self.joint_loss(losses, slopes, share) for share in FINAL_SHARES]
            fall = np.fmin(apart, np.fmin.reduce(together))
        result.add(-fall, 0.0)
        return result.below()

    def _substitute(self, node, rows, deep):
        """(sum, S, losses) with  rows . node >= sum + S delta - losses,  these as weights w by operand.

        Coefficients are rounded when they are handed to a parent. What that changes is at most their error times the
        parent's magnitude, and goes to the slack.
        """
        result, pending, met, losses, moves = Sum(len(rows)), {node.index: rows}, {}, {}, {}
        for index in range(node.index, -1, -1):
            if index not in pending:
                continue
            current, coefficients = self.nodes[index], pending.pop(index)
            if self.inputs.takes(current):
                met[current] = coefficients
            elif index != node.index and not (deep and current.perturbed):
                result.add(*_over_box(coefficients, current.low, current.high))
            else:
                handed, constant, error = current.backward(coefficients)
                if isinstance(current, Relaxed):
                    for operand, weights in current.losses(coefficients):
                        losses[operand] = losses.get(operand, 0.0) + weights
                for frame, squares in current.squares(coefficients):
                    moves[frame] = moves.get(frame, 0.0) + squares
                for parent, passed in handed:
                    if parent.index in pending:
                        passed = pending[parent.index] + passed
                        error = error + gamma(0) * (np.abs(passed) @ parent.magnitude)
                    pending[parent.index] = passed
                result.add(constant, error)
        if moves:  # squares of moves that share a budget: all of it may be at the dearest frame
            result.add(-np.max(list(moves.values()), axis=0) * (1 + gamma(len(self.nodes))), 0.0)
        return result, self.inputs.meet(met, result), losses

    def joint_loss(self, losses, lines=None, share=OWN_SHARE):
        """A number above  sum_k w_k d_k^2  (less ``lines`` delta) on the whole set, per row.

        d = J delta + rho, |rho| <= R, and (a + b)^2 <= (1 + t) a^2 + (1 + 1/t) b^2 for every t > 0.
        """
        weights = np.concatenate(list(losses.values()), axis=1) * (1 + 2 * len(self.nodes) * U)
        slopes, remainder, center = (np.concatenate(part) for part in zip(*(node.line for node in losses), strict=True))
        low, high = (np.concatenate([getattr(node, end) for node in losses]) for end in ("low", "high"))
        reach = np.maximum(high - center, center - low) * (1 + 4 * U)
        likely = share * np.maximum(self.inputs.deviation(slopes), 1e-6)
        t = np.maximum(remainder, 1e-6) / likely
        joint = remainder + likely < reach  # ranges may be tighter than the lines: then by themselves
        apart = np.where(joint, (1 + 1 / t) * remainder**2, reach**2)
        room = 1 + gamma(len(reach) + 16)
        rest = (weights @ apart) * room
        squares = (weights * (1 + t) * room)[:, joint], slopes[joint]
        if lines is not None:
            return (self.inputs.line_and_squares(lines, *squares) + rest) * room
        return np.fmin((weights @ reach**2) * room, (self.inputs.squares(*squares) + rest) * room)


class Inputs:
    """The deviations delta of all frames that move from their centers, side by side: what they can do together."""

    def __init__(self, frames, norm, ball):
        self.frames, self.norm, self.ball = frames, norm, ball
        self.widths = [frame.size for frame in frames]
        self.splits = np.cumsum(self.widths)[:-1]
        self.sides = np.concatenate([frame.sides for frame in frames]) if frames else np.zeros(0)

    def takes(self, node):
        """Whether backward substitution ends at a node."""
        return isinstance(node, Frame) and node.perturbed

    def meet(self, found, result):
        """S of rows whose coefficients at the frames are ``found``; the centers' terms are added to the result."""
        slopes = [np.zeros((len(result.total), frame.size)) for frame in self.frames]
        for place, frame in enumerate(self.frames):
            if frame in found:
                slopes[place] = scaled = found[frame] / frame.std
                center = frame.center - frame.mean
                result.add(scaled @ center, gamma(frame.size) * (np.abs(scaled) @ np.abs(center)))
        slopes = np.concatenate(slopes, axis=1) if slopes else np.zeros((len(result.total), 0))
        result.add(0.0, 4 * U * self.deviation(slopes))
        return slopes

    def deviation(self, rows):
        """A number above |row . delta|, for every row."""
        if not self.frames:
            return np.zeros(len(rows))
        if self.norm == np.inf:
            return (np.abs(rows) @ self.sides) * (1 + gamma(rows.shape[1]))
        parts = zip(self.frames, np.split(rows, self.splits, axis=1), strict=True)
        own = np.stack([frame.eps * dual_norm(part, self.norm) for frame, part in parts], axis=-1)
        total = own.sum(axis=-1) if self.ball == "frame" else dual_norm(own, self.norm)
        return total * (1 + gamma(len(self.frames)))

    # --- squares: bounds of  max of sum_k w_k (J_k delta)^2,  for every row w >= 0 ---

    def squares(self, weights, jacobian):
        if not jacobian.size:
            return np.zeros(len(weights))
        scale = self._scale(weights.mean(axis=0) @ jacobian**2)
        forms, sides = Forms(weights, jacobian * scale, OWN if self.norm == np.inf else 0), self.sides / scale
        if self.norm == np.inf:
            return np.array([self._over_box(*forms.factor(row), sides) for row in range(len(weights))])
        bound = self._size(scale) * np.array([forms.largest(row) for row in range(len(weights))]) * (1 + gamma(4))
        return np.fmin(bound, self._at_vertices(weights, jacobian)) if self.norm == 1.0 else bound

    def _scale(self, squares):
        """Units of the coordinates, after their squares of coefficients: any are sound."""
        if self.norm != np.inf and self.ball == "sequence":
            return np.ones(len(squares))
        if self.norm != np.inf:
            parts = np.split(squares, self.splits)
            squares = np.concatenate([np.full(len(part), part.sum()) for part in parts])
        root = np.sqrt(squares + 1e-8 * squares.mean() + 1e-100)
        return np.sqrt(np.maximum(self.sides, 1e-100) / root)

    def _size(self, scale):
        """A number above ||delta / scale||^2. A box's units may be any, those of balls are common to a frame."""
        if self.norm == np.inf:
            return ((self.sides / scale) ** 2).sum() * (1 + gamma(len(scale) + 4))
        ends = np.split(self.sides / scale, self.splits)
        sizes = np.array([part[0] ** 2 for part in ends])
        return (sizes.sum() if self.ball == "frame" else sizes.max()) * (1 + gamma(len(sizes) + 4))

    def _over_box(self, factor, rest, sides):
        """Of  Z Z^T + rest  for |y_j| <= sides_j:  lambda sum D_j sides_j^2,  lambda that of D^-1/2 Z Z^T D^-1/2."""
        root = _metric(lambda columns: factor @ (factor.T @ columns), sides, 0.1)
        turned = factor * root[:, None]
        trace = (turned**2).sum()
        largest = eigenvalue_above(_gram(turned)) + 2 * gamma(sum(factor.shape) + 4) * trace
        cost = ((sides / root) ** 2).sum()
        return (largest * cost + rest * (sides**2).sum()) * (1 + gamma(len(sides) + 16))

    def _at_vertices(self, weights, jacobian):
        """Over l_1 balls a convex function is greatest at a vertex of each."""
        diagonal = (weights @ jacobian**2) * (1 + gamma(len(jacobian) + 4))
        parts = zip(self.frames, np.split(diagonal, self.splits, axis=1), strict=True)
        roots = np.stack([frame.eps * np.sqrt(part.max(axis=1)) for frame, part in parts])
        total = roots.sum(axis=0) if self.ball == "frame" else roots.max(axis=0)
        return total**2 * (1 + gamma(2 * len(roots) + 8))

    # --- a line beside them: bounds of  max of sum_k w_k (J_k delta)^2 - g delta  ---

    def line_and_squares(self, lines, weights, jacobian):
        if self.norm == 1.0:
            return np.array([self._line_at_vertices(*row, jacobian) for row in zip(lines, weights, strict=True)])
        # How much coordinates matter, to each row by itself and to all of them.
        squares = weights @ jacobian**2 + lines**2 / (self.deviation(lines) + 1e-100)[:, None]
        mean = squares.mean(axis=0)
        rows = zip(lines, weights, squares, strict=True)
        return np.array([self._line_and_squares(g, w, (own, mean), jacobian) for g, w, own in rows])

    def _line_and_squares(self, line, weights, squares, jacobian):
        """The best of several diagonal metrics: units common to a frame for balls, any for a box."""
        if self.norm != np.inf:
            units = [self._scale(one) for one in squares[: 1 if self.ball == "sequence" else 2]]
            return min(self._in_units(scale, line, weights, jacobian) for scale in units)
        first, fall = self._scale(squares[0]), float(self.deviation(line[None])[0])
        sides, half = self.sides / first, 0.5 * line * first
        scaled = jacobian * first

        def image(columns):
            """Of the form and the line as the form of one more coordinate, with a surplus on its own."""
            inner = scaled.T @ (weights[:, None] * (scaled @ columns[1:])) + half[:, None] * columns[:1]
            return np.concatenate((half[None] @ columns[1:] + 0.5 * fall * columns[:1], inner))

        found = [_metric(image, np.concatenate(([1.0], sides)), floor, 60)[1:] for floor in (0.003, 0.03)]
        return min(self._in_units(first * root, line, weights, jacobian) for root in found)

    def _in_units(self, scale, line, weights, jacobian):
        scaled = jacobian * scale
        form = scaled.T @ (weights[:, None] * scaled)
        trace = float(weights @ (scaled**2).sum(axis=1))
        error = GUARD * gamma(sum(scaled.shape)) * trace
        bound = _s_lemma(line * scale, _symmetric(form), error, self._size(scale))
        return bound + 8 * U * float(self.deviation(line[None])[0])

    def _line_at_vertices(self, line, weights, jacobian):
        """Convex, so greatest at a vertex of each ball; of the products of different balls the greatest count."""
        scale = np.concatenate([np.full(frame.size, frame.eps) for frame in self.frames])
        scaled = jacobian * scale
        form = np.abs(scaled.T @ (weights[:, None] * scaled))
        error = GUARD * gamma(sum(scaled.shape)) * float(weights @ (scaled**2).sum(axis=1))
        own = np.split(np.abs(line) * scale * (1 + 4 * U) + np.diag(form), self.splits)
        own = np.array([part.max() for part in own]) + error
        if self.ball == "sequence":
            return float(own.max()) * (1 + 4 * U)
        starts = np.concatenate(([0], self.splits))
        across = np.maximum.reduceat(np.maximum.reduceat(form, starts, axis=0), starts, axis=1) + error
        total = own.sum() + across.sum() - np.trace(across)
        return float(total) * (1 + gamma(len(starts) ** 2)) + gamma(len(starts) ** 2) * float(across.sum())


class Replacements:
    """At most ``budget`` words are replaced, each by one of its own substitutes: what that does to rows of nodes.

    Backward substitution ends at nodes with ``points``, which read one word each. Let f_t(s) be the sum of all terms of
    word t at its s-th substitute, s = 0 being x_t itself. The sum over words is at least

        sum_t f_t(0)  +  the sum of the k least  min(0, min_s f_t(s) - f_t(0)),

    as words that gain nothing need not be replaced.
    """

    def __init__(self, budget):
        self.budget = budget

    def takes(self, node):
        return node.points is not None

    def meet(self, found, result):
        """What each word can take from each row at most, (rows, words), all <= 0; f_t(0) is added to the result."""
        changes = {}
        for node, coefficients in found.items():
            (word,) = node.reads
            middle, radius = middle_of(*node.points)
            size, error = np.abs(coefficients), radius + gamma(node.size + 2) * np.abs(middle)
            result.add(coefficients @ middle[0], size @ error[0])
            change = changes.setdefault(word, Sum(len(coefficients), len(middle) - 1))
            change.add(coefficients @ (middle[1:] - middle[0]).T, size @ (error[1:] + error[0]).T)
        falls = [np.minimum(change.below().min(axis=1), 0.0) for change in changes.values()]
        return np.stack(falls, axis=1) if falls else np.zeros((len(result.total), 0))

    def deviation(self, falls):
        """A number above what the ``budget`` words that take most take together, for every row."""
        falls = np.where(np.isnan(falls), -np.inf, falls)  # these would be sorted behind all numbers
        taken = np.sort(falls, axis=1)[:, : self.budget]
        return -taken.sum(axis=1) * (1 + gamma(taken.shape[1]))


def middle_of(low, high):
    """(middle, radius) of intervals."""
    middle = 0.5 * (low + high)
    return middle, np.maximum(high - middle, middle - low) * (1 + 4 * U) + TINY


class Forms:
    """Quadratic forms A = J^T diag(w) J, one for every row w >= 0, in the order I of matrices: what is above them.

    Of few squares or coordinates they are taken as they are. Of more, a block in some common directions F is, and with
    it, if asked for, the squares of a row that are greatest outside of F. For the others there are Frobenius norms: c
    of the block beside the one in F and f of the block outside. F is orthonormal but for rounding; an error of ``unit``
    times the trace pays for that, and for all sums.
    """

    def __init__(self, weights, jacobian, own=0):
        self.weights, self.jacobian = weights, jacobian
        self.lengths = (jacobian**2).sum(axis=1)
        self.trace = weights @ self.lengths * (1 + gamma(sum(jacobian.shape)))
        self.unit = GUARD * gamma(sum(jacobian.shape))
        self.few = min(jacobian.shape) <= LEADING if own == 0 else len(jacobian) <= LEADING + own
        if self.few:
            return
        self.basis = _leading_directions(weights.mean(axis=0), jacobian)
        self.unit += 4 * _frobenius(self.basis.T @ self.basis - np.eye(self.basis.shape[1]))
        self.head = jacobian @ self.basis
        inside = self.head @ self.head.T
        outside = jacobian @ jacobian.T - inside
        self.own = np.argsort(weights * np.diag(outside), axis=1)[:, len(jacobian) - own :]
        self.shared = weights.copy()
        np.put_along_axis(self.shared, self.own, 0.0, axis=1)
        lost = 8 * self.unit * self.trace**2
        beside, square = (((self.shared @ (one * outside)) * self.shared).sum(axis=1) for one in (inside, outside))
        self.beside, self.norm = np.maximum(beside, 0.0) + lost, np.sqrt(np.maximum(square, 0.0) + lost)

    def largest(self, row):
        """A number above the greatest eigenvalue."""
        error = 4 * self.unit * self.trace[row] + TINY
        if self.few:
            return eigenvalue_above(_gram(self._root(row).T)) + error
        inside = eigenvalue_above(self._block(row)) + error
        # lambda I - A is not negative if (lambda - inside) (lambda - norm) >= beside.
        least = 0.5 * (inside + self.norm[row]) + math.sqrt(0.25 * (inside - self.norm[row]) ** 2 + self.beside[row])
        return least * (1 + 32 * U)

    def factor(self, row):
        """(Z, g) with A <= Z Z^T + g I."""
        if self.few:
            return self._root(row).T, 4 * self.unit * self.trace[row] + TINY
        tau = CROSS_SHARE * math.sqrt(self.beside[row]) + 1e-100
        rest = (self.norm[row] + self.beside[row] / tau) * (1 + 16 * U)
        block = self._block(row) + (tau - rest) * np.eye(self.basis.shape[1])
        values, vectors = np.linalg.eigh(block)
        above, below = (vectors * np.sqrt(np.maximum(sign * values, 0.0)) for sign in (1.0, -1.0))
        # What is below is taken off, so that it may be left out.
        left = _frobenius(block - above @ above.T + below @ below.T)
        size = (above**2).sum() + (below**2).sum() + _frobenius(block)
        error = 4 * self.unit * (self.trace[row] + tau + rest + size)
        own = self.jacobian[self.own[row]] * np.sqrt(self.weights[row, self.own[row]])[:, None]
        return np.concatenate((self.basis @ above, own.T), axis=1), (rest + 2 * left + error) * (1 + 8 * U) + TINY

    def _root(self, row):
        return np.sqrt(self.weights[row])[:, None] * self.jacobian

    def _block(self, row):
        shared = self.shared[row]
        return _symmetric(self.head.T @ (shared[:, None] * self.head))


def _leading_directions(weights, jacobian):
    """Nearly the leading directions of J^T diag(w) J, orthonormal but for rounding, (n, m); any would be sound."""
    scaled = np.sqrt(weights + 1e-3 * weights.mean())[:, None] * jacobian
    found = np.random.default_rng(0).standard_normal((scaled.shape[1], min(LEADING, *scaled.shape)))
    for _ in range(3):
        found = np.linalg.qr(scaled.T @ (scaled @ found))[0]
    return found


def _metric(image, sides, floor, steps=STEPS):
    """D^-1/2 for a box of such sides, any is sound: columns of length sides_j that make the form's trace large."""
    columns = np.random.default_rng(0).standard_normal((len(sides), COLUMNS))
    columns *= (sides / np.sqrt((columns**2).sum(axis=1)))[:, None]
    for _ in range(steps):
        images = image(columns)
        lengths = np.sqrt((images**2).sum(axis=1))
        columns = images * (sides / (lengths + 1e-100))[:, None]
    metric = np.where(sides > 0, lengths / np.where(sides > 0, sides, 1.0), 0.0)
    mean = (metric * sides**2).sum() / ((sides**2).sum() + 1e-100)
    return 1.0 / np.sqrt(np.where(sides > 0, metric / (mean + 1e-100) + floor, 1e12))


def _gram(factor):
    """Z^T Z or Z Z^T, whichever is smaller: both have the same greatest eigenvalue."""
    return _symmetric(factor.T @ factor if factor.shape[1] < factor.shape[0] else factor @ factor.T)


def _symmetric(matrix):
    return 0.5 * (matrix + matrix.T)


def _frobenius(matrix):
    """A number above the Frobenius norm."""
    return math.sqrt(float((matrix * matrix).sum())) * (1 + gamma(matrix.size)) + 1e-140


def _lack(matrix):
    """A number e such that the symmetric matrix + e I has no negative eigenvalue, by what a Cholesky factor leaves."""
    try:
        factor = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return np.inf
    rounding = gamma(len(matrix) + 4) * float((factor * factor).sum())
    return _frobenius(matrix - factor @ factor.T) + 2 * rounding + gamma(4) * _frobenius(matrix)


def eigenvalue_above(matrix):
    """A number above the greatest eigenvalue of a symmetric matrix, and above 0: a guess, and a proof of it."""
    size = _frobenius(matrix)
    if not size < np.inf:
        return np.inf
    guess = max(float(np.linalg.eigvalsh(matrix)[-1]), 0.0) + gamma(len(matrix)) * size
    return np.fmin(guess + _lack(guess * np.eye(len(matrix)) - matrix), size) * (1 + 2 * U)


def _s_lemma(line, form, error, size):
    """A number above  y.A y - line.y  for ||y||^2 <= size, A being ``form`` but for ``error``.

    It is  beta + lambda size  if the matrix [[beta, line/2], [line/2, lambda I - A]] has no negative eigenvalue.
    """
    if not (np.isfinite(form).all() and np.isfinite(line).all()):
        return np.inf
    values, vectors = np.linalg.eigh(form)
    squares = (vectors.T @ line) ** 2
    least = max(values[-1], 0.0)
    unit = 0.5 * math.sqrt(squares.sum() / size) + 1e-6 * least + 1e-100
    levels, width = np.linspace(-16.0, 1.0, 200), 17.0 / 199
    for _ in range(2):
        trial = least + unit * np.exp(levels)
        bounds = size * trial + 0.25 * (squares / (trial[:, None] - values)).sum(axis=1)
        best = levels[bounds.argmin()]
        levels = np.linspace(best - width, best + width, 50)
    trial = least + unit * math.exp(best)
    beta = 0.25 * float((squares / (trial - values)).sum())
    matrix = np.empty((len(line) + 1, len(line) + 1))
    matrix[0, 1:] = matrix[1:, 0] = 0.5 * line
    matrix[1:, 1:] = -form
    spare = 4 * gamma(len(line)) * (beta + abs(trial) + float(np.abs(values).sum()) / len(line))
    matrix[0, 0], matrix[1:, 1:] = beta + spare, matrix[1:, 1:] + (trial + spare) * np.eye(len(line))
    more = _lack(matrix)
    return (matrix[0, 0] + more + size * (trial + spare + more + error)) * (1 + 16 * U)


def _over_box(rows, low, high):
    """rows . v is at least the first number for low <= v <= high, but for an error of the second."""
    value = np.maximum(rows, 0.0) @ low + np.minimum(rows, 0.0) @ high
    return value, gamma(2 * len(low)) * (np.abs(rows) @ np.maximum(np.abs(low), np.abs(high)))


def dual_norm(rows, norm):
    """A number above ||row||_q, 1/p + 1/q = 1, of every row."""
    if norm == 1.0:
        value = np.abs(rows).max(axis=-1)
    elif norm == 2.0:
        value = np.sqrt((rows * rows).sum(axis=-1)) + 1e-140  # squares may underflow
    else:
        value = np.abs(rows).sum(axis=-1)
    return value * (1 + gamma(rows.shape[-1]))


# --- cells, in torch's order of gates --------------------------------------------------------------------------------


def rnn_step(net, gates, state, hints, kind):
    """h = tanh or relu (z)."""
    return (net.relax(kind, [gates(0, "both", state[0])], *hints["activation"]),)


def lstm_step(net, gates, state, hints, kind):
    """c' = sigmoid(f) c + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c')."""
    h, c = state
    i, f, g, o = (gates(k, "both", h) for k in range(4))
    kept = net.relax("x*sigmoid", [c, f], *hints["kept"])
    written = net.relax("tanh*sigmoid", [g, i], *hints["written"])
    c = net.add(Mix([kept, written]))
    return net.relax("tanh*sigmoid", [c, o], *hints["output"]), c


def gru_step(net, gates, state, hints, kind):
    """n = W x + b + sigmoid(r) (W h + b),  h' = sigmoid(-z) tanh(n) + sigmoid(z) h."""
    (h,) = state
    net.tighten(h)  # an operand below: the ranges of what comes before gain by it, too
    r, z = (gates(k, "both", h) for k in range(2))
    reset = net.relax("x*sigmoid", [gates(2, "hidden", h), r], *hints["reset"])
    n = net.add(Mix([gates(2, "input", h), reset]))
    new = net.relax("tanh*sigmoid", [n, net.add(Mix([z], [-1.0]))], *hints["new"])
    return (net.add(GateMix([new, net.relax("x*sigmoid", [h, z], *hints["kept"])])),)


STEPS = {"rnn": rnn_step, "lstm": lstm_step, "gru": gru_step}


def run_layer(net, inputs, model, weights, layer, direction, hints):
    """States of one layer and direction, in the order of the frames; ``hints`` are slopes and bends by operation."""
    backwards = direction == "backward"
    suffix = f"_l{layer}" + "_reverse" * backwards
    w_ih, w_hh, b_ih, b_hh = (weights[name + suffix] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    size, row = model["hidden_size"], layer * (2 if model["bidirectional"] else 1) + backwards
    state = [net.add(Fixed(weights[name][row])) for name in ("h0", "c0") if name in weights]
    splits = np.cumsum([part.size for part in inputs[0]])[:-1]
    states = [None] * len(inputs)
    for t in reversed(range(len(inputs))) if backwards else range(len(inputs)):

        def gates(k, which, h, t=t):
            """Node of the k-th gate's sum, with the parts of the input, the hidden state or both."""
            rows = slice(k * size, (k + 1) * size)
            parents, matrices, bias = [], [], np.zeros(size)
            if which != "hidden":
                parents += inputs[t]
                matrices += np.split(w_ih[rows], splits, axis=1)
                bias = bias + b_ih[rows]
            if which != "input":
                parents.append(h)
                matrices.append(w_hh[rows])
                bias = bias + b_hh[rows]  # the rounding of this sum is within the room that gamma leaves
            return net.add(Affine(parents, matrices, bias))

        own = {name: [None if part is None else part[t] for part in parts] for name, parts in hints.items()}
        state = STEPS[model["architecture"]](net, gates, state, own, model["activation"])
        states[t] = state[0]
    return states


def rigorous_margins(model, weights, certificate):
    """Lower bounds of the label's logit less each target's over the certificate's set of inputs.

    Hints that are given for every target by itself prove its margin alone.
    """
    slopes, targets = certificate["slopes"], certificate["targets"]
    bends = certificate.get("bends", {})
    if not any(values.ndim == 5 for values in slopes.values()):
        return _margins(model, weights, certificate, targets, slopes, bends)
    found = []
    for k, target in enumerate(targets):
        own = ({key: values[k] for key, values in hints.items()} for hints in (slopes, bends))
        found.append(_margins(model, weights, certificate, [target], *own))
    return np.concatenate(found)


def add_features(net, frames, model, weights, certificate, slopes):
    """Log mel energies of every two frames that follow each other, normalised; ``slopes`` is (T - 1, 2, 1, bands)."""
    bank = MelBank(weights["features.wave"], weights["features.mel"], model["features"]["floor"])
    made = []
    for pair, own in zip(zip(frames, frames[1:]), slopes):  # noqa: B905 - of T frames T - 1 pairs
        energies = net.add(Energies(pair, bank, certificate["norm"], certificate["ball"]))
        net.narrow(energies)
        made.append(net.add(Normalised(net.add(Logarithm(energies, own)), weights["mean"], weights["std"])))
    return made


def _inputs(certificate, mean, std):
    """The frames of a certificate's set, and what gathers those that are perturbed."""
    if "substitutes" in certificate:
        lists, budget = certificate["substitutes"], certificate["budget"]
        pairs = zip(certificate["x"], lists if budget else [part[:0] for part in lists], strict=True)
        words = [Word(t, np.concatenate((x[None], new)), mean, std) for t, (x, new) in enumerate(pairs)]
        return words, lambda perturbed: Replacements(budget)
    frames = zip(certificate["x"], certificate["eps"], strict=True)
    frames = [Frame(x, eps, certificate["clip"], mean, std) for x, eps in frames]
    return frames, lambda perturbed: Inputs(perturbed, certificate["norm"], certificate["ball"])


def _margins(model, weights, certificate, targets, slopes, bends):
    net = Network(by_intervals=not slopes, curved=bool(bends))
    speech = "features" in model
    units = (np.zeros(model["features"]["hop"]), np.ones(model["features"]["hop"])) if speech else ()
    frames = net.add_inputs(*_inputs(certificate, *(units or (weights["mean"], weights["std"]))))
    if speech:
        own = slopes.get(LOG_HINTS, np.zeros((len(frames) - 1, 2, 1, model["input_size"])))
        frames = add_features(net, frames, model, weights, certificate, own)
    inputs = [[frame] for frame in frames]
    directions = ("forward", "backward")[: 2 if model["bidirectional"] else 1]
    for layer in range(model["num_layers"]):
        runs = []
        for direction in directions:
            hints = {}
            for name, operands in OPERATIONS[model["architecture"]].items():
                none = np.zeros((len(inputs), 2, operands, model["hidden_size"]))
                place = layer, direction, name
                hints[name] = slopes.get(place, none), bends.get(place)
            runs.append(run_layer(net, inputs, model, weights, layer, direction, hints))
        inputs = [list(parts) for parts in zip(*runs, strict=True)]
    if model["pooling"] == "mean":
        pooled = [net.add(Mix(list(run), divisor=len(inputs))) for run in zip(*inputs, strict=True)]
    else:
        pooled = [inputs[-1 if k == 0 else 0][k] for k in range(len(directions))]
    splits = np.cumsum([part.size for part in pooled])[:-1]
    head = Affine(pooled, np.split(weights["head.weight"], splits, axis=1), weights["head.bias"])
    head.low = head.high = np.zeros(head.size)  # the logits' own ranges are not needed
    net.add(head)
    rows = np.zeros((len(targets), head.size))
    rows[:, certificate["label"]] = 1.0
    rows[np.arange(len(rows)), targets] = -1.0
    margins = net.lower_bound(head, rows, deep=False)
    return margins if net.by_intervals else np.maximum(margins, net.lower_bound(head, rows, deep=True))


# --- files ----------------------------------------------------------------------------------------------------------


def read_npz(path, fits):
    """Header and arrays of a file; nothing in it is ever executed.

    ``fits(header, shapes)`` raises Damaged if the arrays' shapes, by name, are not those that the header calls for. It
    is asked before they are unpacked: a file of a few kilobytes can unfold to gigabytes.
    """
    try:
        require(path.stat().st_size <= MAX_BYTES, "it is too large")
        with zipfile.ZipFile(path) as archive:
            members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            require(len(members) == len(archive.infolist()), "two arrays have one name")
            kinds = {name: read_kind(archive, entry) for name, entry in members.items()}
            shape, dtype = kinds.pop("header")
            require(dtype == np.uint8 and len(shape) == 1 and shape[0] <= MAX_HEADER, "its header is no text")
            header = json.loads(read_array(archive, members["header"]).tobytes().decode("utf-8"))
            require(isinstance(header, dict), "its header is no table")
            for name, (_, dtype) in kinds.items():
                require(dtype in (np.dtype("<f4"), np.dtype("<f8")), f"{name} is not of float32 or float64")
            numbers = sum(math.prod(shape) for shape, _ in kinds.values())
            require(numbers <= MAX_BYTES // 8, f"it would unfold to {numbers} numbers, too many to be checked")
            fits(header, {name: shape for name, (shape, _) in kinds.items()})
            return header, {name: read_array(archive, members[name]) for name in kinds}
    except Damaged:
        raise
    except OSError as error:
        raise Damaged(error.strerror or "it cannot be read") from None
    except Exception as error:  # a damaged file fails in whatever way its bytes lead to
        raise Damaged(f"it is no .npz file with a header ({type(error).__name__})") from None


def read_kind(archive, entry):
    """(shape, dtype) of an array, which must be all that its entry holds, from the first bytes."""
    require(entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), f"{entry.filename} is packed otherwise")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(file)
        require(all(size >= 0 for size in shape), f"{entry.filename} has a negative size")
        whole = entry.file_size == file.tell() + math.prod(shape) * dtype.itemsize
        require(whole, f"{entry.filename} is cut or padded")
    return shape, dtype


def read_array(archive, entry):
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def hash_arrays(arrays, header=None):
    """SHA-256 over the header as JSON with sorted keys, then every array's name, type, shape and bytes by name."""
    digest = hashlib.sha256()
    if header is not None:
        digest.update(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def require(condition, message):
    if not condition:
        raise Damaged(message)


def is_count(value):
    return type(value) is int and 1 <= value < 10**6


def usable(array, shape, name):
    """The array in float64, if it has the shape and all its numbers are of sensible size."""
    require(array is not None, f"{name} is missing")
    require(array.shape == shape, f"{name} has shape {array.shape}, not {shape}")
    array = array.astype(np.float64)
    require(bool((np.abs(array) <= LARGEST).all()), f"{name} holds NaN, infinite or huge numbers")
    return array


def read_weights(path):
    """(model, weights in float64, hash) of a weights file."""
    header, arrays = read_npz(path, lambda header, shapes: check_shapes(read_model(header), shapes))
    model = header["model"]
    weights = {name: usable(array, array.shape, name) for name, array in arrays.items()}
    require(bool((np.abs(weights["std"]) >= 1 / LARGEST).all()), "std holds 0")
    if "features" in model:
        require(bool((weights["features.mel"] >= 0).all()), "features.mel holds numbers below 0")
        require(bool((weights["std"] > 0).all()), "std holds numbers below 0")
    return model, weights, hash_arrays(arrays, header)


def read_model(header):
    """How the network of a weights file is wired."""
    require(header.get("format") == WEIGHTS_FORMAT and header.get("version") == VERSION, "it is no weights file")
    model = header.get("model")
    require(isinstance(model, dict), "it has no model")
    for name in ("input_size", "hidden_size", "num_layers", "num_classes"):
        require(is_count(model.get(name)), f"{name} is no positive integer")
    require(model.get("architecture") in tuple(OPERATIONS), "the architecture is unknown")
    require(type(model.get("bidirectional")) is bool, "bidirectional is not true or false")
    activations = ("tanh", "relu") if model["architecture"] == "rnn" else (None,)
    require("activation" in model and model["activation"] in activations, "the activation is unknown")
    require(model.get("pooling") in ("last", "mean"), "the pooling is unknown")
    if "features" in model:
        found = model["features"]
        require(isinstance(found, dict) and is_count(found.get("hop")), "hop is no positive integer")
        floor = found.get("floor")
        require(type(floor) is float and 1 / LARGEST <= floor <= LARGEST, "the floor is no sensible number above 0")
    return model


def check_shapes(model, found):
    """Damaged unless the arrays, shapes by name, are those of the model."""
    directions = 2 if model["bidirectional"] else 1
    hidden, rows = model["hidden_size"], GATES[model["architecture"]] * model["hidden_size"]
    shapes = {
        "mean": (model["input_size"],),
        "std": (model["input_size"],),
        "head.weight": (model["num_classes"], hidden * directions),
        "head.bias": (model["num_classes"],),
        "h0": (model["num_layers"] * directions, hidden),
    }
    if model["architecture"] == "lstm":
        shapes["c0"] = shapes["h0"]
    if "features" in model:
        bins = (found.get("features.mel", ()) + (0, 0))[1]
        require(0 < bins <= model["features"]["hop"] + 1, "features.mel has not a column for each frequency")
        shapes["features.mel"] = (model["input_size"], bins)
        shapes["features.wave"] = (2 * bins, 2 * model["features"]["hop"])
    others = "its arrays are not those of the model"
    require(len(found) == len(shapes) + 4 * directions * model["num_layers"], others)  # before layers are counted out
    for layer in range(model["num_layers"]):
        for suffix in ("", "_reverse")[:directions]:
            width = model["input_size"] if layer == 0 else hidden * directions
            for name, shape in (("weight_ih", (rows, width)), ("weight_hh", (rows, hidden))):
                shapes[f"{name}_l{layer}{suffix}"] = shape
            for name in ("bias_ih", "bias_hh"):
                shapes[f"{name}_l{layer}{suffix}"] = (rows,)
    require(set(found) == set(shapes), others)
    for name, shape in shapes.items():
        require(found[name] == shape, f"{name} has shape {found[name]}, not {shape}")


def check_certificate_shapes(header, shapes):
    """Damaged unless it is a certificate whose arrays, shapes by name, are those of one sequence."""
    require(header.get("format") == FORMAT and header.get("version") == VERSION, "it is no certificate")
    x = shapes.get("x", ())
    require(len(x) == 2 and min(x) > 0, "x is missing or not (T, n)")
    require(x[0] <= MAX_FRAMES, f"x has {x[0]} frames, more than {MAX_FRAMES}")
    if "substitutions" in header:
        _, counts = read_substitutions(header, x[0])
        most, found = (sum(counts), x[1]), shapes.get("substitutes")
        require(found == most, f"substitutes has shape {found}, not {most}")
    else:
        require(shapes.get("eps") == (x[0],), f"eps has not one number for each of the {x[0]} frames")
    given = "x", "substitutes" if "substitutions" in header else "eps"
    for name, shape in shapes.items():
        steps = (x[0], x[0] - 1)  # windows of a waveform are fewer by one
        sliced = len(shape) in (4, 5) and shape[-4] in steps and shape[-3] == 2 and shape[-2] in (1, 2)
        require(name in given or sliced, f"{name} has shape {shape}: no slopes of {x[0]} frames")


def read_substitutions(header, frames):
    """(budget, number of substitutes of each frame)."""
    found = header["substitutions"]
    require(isinstance(found, dict), "substitutions is no table")
    budget, counts = found.get("budget"), found.get("counts")
    require(type(budget) is int and 0 <= budget <= frames, f"the budget is no number of at most {frames} frames")
    whole_numbers = isinstance(counts, list) and all(type(count) is int and 0 <= count < 10**6 for count in counts)
    require(whole_numbers and len(counts) == frames, f"counts has not one number for each of the {frames} frames")
    return budget, counts


def read_certificate(path):
    """The certificate as a dictionary; ``check`` fits it to its model."""
    header, arrays = read_npz(path, check_certificate_shapes)
    x = usable(arrays["x"], arrays["x"].shape, "x")
    read_set = read_replacements if "substitutions" in header else read_balls
    set_ = read_set(header, arrays, x)
    label, targets = header.get("label"), header.get("targets")
    require(type(label) is int and label >= 0, "the label is no class")
    require(isinstance(targets, list) and targets and all(type(k) is int and k >= 0 for k in targets), "no targets")
    require(label not in targets, "the label is a target")
    weights, sample = header.get("weights"), header.get("sample")
    for part, names in ((weights, ("file", "sha256")), (sample, ("sha256",))):
        require(isinstance(part, dict) and all(isinstance(part.get(n), str) for n in names), "a hash is missing")
    require(Path(weights["file"]).name == weights["file"], "the weights are not beside the certificate")
    hints = {name: array for name, array in arrays.items() if name not in ("x", "eps", "substitutes")}
    stated = {"x_stated": sample["sha256"], "weights": weights}
    return {"x": x, "label": label, "targets": targets, "hints": hints, **stated, **set_}


def read_balls(header, arrays, x):
    """What a certificate says of balls around x, and the hash of x."""
    norms = {"1": 1.0, "2": 2.0, "inf": np.inf}
    require(header.get("norm") in tuple(norms), "the norm is not 1, 2 or inf")
    require(header.get("ball") in ("frame", "sequence"), "the ball is unknown")
    clip = header.get("clip")
    eps = usable(arrays["eps"], (len(x),), "eps")
    require(bool((eps >= 0).all()), "eps holds negative numbers")
    if header["ball"] == "sequence":
        require(len(set(eps[eps > 0].tolist())) <= 1, "a ball around the sequence has one eps")
    if clip is not None:
        numbers = isinstance(clip, list) and len(clip) == 2 and all(type(end) in (int, float) for end in clip)
        require(numbers and abs(clip[0]) <= LARGEST and abs(clip[1]) <= LARGEST, "clip is not (lowest, highest)")
        require(header["norm"] == "inf", "only l_inf boxes are cut to a range")
        require(bool(((x >= clip[0]) & (x <= clip[1])).all()), "x lies outside the range it is cut to")
    clip = None if clip is None else tuple(map(float, clip))
    hashes = {"x_hash": hash_arrays({"x": arrays["x"]})}
    return {"eps": eps, "norm": norms[header["norm"]], "ball": header["ball"], "clip": clip, **hashes}


def read_replacements(header, arrays, x):
    """Substitutes of every frame, how many frames may be replaced, and hashes: of this set, and of the whole file."""
    budget, counts = read_substitutions(header, len(x))
    given = usable(arrays["substitutes"], arrays["substitutes"].shape, "substitutes")
    require(isinstance(header.get("sha256"), str), "a hash is missing")
    set_ = {name: arrays[name] for name in ("x", "substitutes")}
    rest = {key: value for key, value in header.items() if key != "sha256"}
    hashes = {"x_hash": hash_arrays(set_, header["substitutions"]), "hash": hash_arrays(arrays, rest)}
    lists = np.split(given, np.cumsum(counts)[:-1])
    return {"substitutes": lists, "budget": budget, **hashes, "stated": header["sha256"]}


def fit(certificate, model):
    """Check that the certificate's arrays are those of the model, and sort the hints by where they belong."""
    speech = "features" in model
    width = model["features"]["hop"] if speech else model["input_size"]
    require(certificate["x"].shape[1] == width, "x does not fit the model")
    require(not speech or len(certificate["x"]) > 1, "a waveform has two frames or more")
    require(not speech or "eps" in certificate, "there are no rules for waveforms whose frames are replaced")
    classes = [certificate["label"], *certificate["targets"]]
    require(max(classes) < model["num_classes"], "a class is unknown to the model")
    arrays = dict(certificate["hints"])
    certificate["slopes"] = take_hints("slopes", certificate, model, arrays)
    certificate["bends"] = take_hints("curvatures", certificate, model, arrays)
    require(not speech or not certificate["bends"], "there are no rules for curvatures of waveforms")
    require(all((bends >= 0).all() for bends in certificate["bends"].values()), "a curvature is negative")
    planes = "substitutes" not in certificate or not certificate["bends"]
    require(planes, "there are no rules for curvatures where frames are replaced")
    require(bool(certificate["slopes"]) or not certificate["bends"], "there are curvatures without slopes")
    require(not arrays, f"{next(iter(arrays), None)} has no place in the model")


def take_hints(kind, certificate, model, arrays):
    """The slopes or curvatures by (layer, direction, operation), out of the arrays; nothing if there are none at all.

    Either all have an axis for targets in front or none has.
    """
    found, own = {}, {len(array.shape) for array in arrays.values()} == {5}
    steps = len(certificate["x"]) - ("features" in model)
    if "features" in model and any(name.startswith(f"{kind}.") for name in arrays):
        found[LOG_HINTS] = _taken(f"{kind}.features.log", (steps, 2, 1, model["input_size"]), certificate, arrays, own)
    for layer in range(model["num_layers"] if any(name.startswith(f"{kind}.") for name in arrays) else 0):
        for direction in ("forward", "backward")[: 2 if model["bidirectional"] else 1]:
            for name, operands in OPERATIONS[model["architecture"]].items():
                key = f"{kind}.l{layer}.{direction}.{name}"
                shape = (steps, 2, operands, model["hidden_size"])
                found[layer, direction, name] = _taken(key, shape, certificate, arrays, own)
    return found


def _taken(key, shape, certificate, arrays, own):
    shape = (len(certificate["targets"]), *shape) if own else shape
    return usable(arrays.pop(key, None), shape, key)


def check(path, weights_path=None, cache=None):
    """(certificate, model, least rigorous margin) of a file that is confirmed.

    Raises:
        Damaged: a file cannot be read or is not what it should be.
        Rejected: it can, but it does not prove what it states.
    """
    path = Path(path)
    certificate = read_certificate(path)
    weights_path = Path(weights_path) if weights_path else path.parent / certificate["weights"]["file"]
    cache = {} if cache is None else cache
    if weights_path not in cache:
        try:
            cache[weights_path] = read_weights(weights_path)
        except Damaged as error:
            raise Damaged(f"its weights {weights_path.name}: {error}") from None
    model, weights, weights_hash = cache[weights_path]
    if weights_hash != certificate["weights"]["sha256"]:
        raise Rejected("it is about another model: the weights' hash differs")
    fit(certificate, model)
    if certificate["x_hash"] != certificate["x_stated"]:
        raise Rejected("it is about another input: the hash of x differs")
    if certificate.get("hash") != certificate.get("stated"):
        raise Rejected("it has been changed: the hash of the file's content differs")
    try:
        with np.errstate(all="ignore"):  # what overflows ends as NaN or infinity, and is rejected
            margin = float(rigorous_margins(model, weights, certificate).min())
    except np.linalg.LinAlgError as error:
        raise Rejected(f"no bound was found: {error}") from None
    if not 0 < margin < np.inf:
        raise Rejected(f"the rigorous margin is {margin:.6g}, not above 0")
    return certificate, model, margin


def describe(certificate, model, margin):
    """What has been proved, in one line."""
    set_ = describe_replacements(certificate) if "substitutes" in certificate else describe_balls(certificate)
    targets = sorted(set(certificate["targets"]))
    others = "all others" if len(targets) == model["num_classes"] - 1 else ", ".join(map(str, targets))
    hashes = f"input {certificate['x_hash'][:12]}, model {certificate['weights']['sha256'][:12]}"
    return f"margin {margin:.6g}, {set_}, class {certificate['label']} against {others}, {hashes}"


def describe_balls(certificate):
    perturbed = np.flatnonzero(certificate["eps"])
    eps = certificate["eps"][perturbed]
    size = " to ".join(f"{end:.8g}" for end in sorted({min(eps, default=0.0), max(eps, default=0.0)}))
    place = "every frame" if len(perturbed) == len(certificate["x"]) else f"frames {perturbed.tolist()}"
    place = f"one ball around {place}" if certificate["ball"] == "sequence" else place
    clip = "" if certificate["clip"] is None else ", cut to [{:g}, {:g}]".format(*certificate["clip"])
    return f"l_{certificate['norm']:g} eps {size} on {place}{clip}"


def describe_replacements(certificate):
    sizes = [len(given) for given in certificate["substitutes"]]
    most = f"at most {certificate['budget']} of {len(sizes)} frames replaced, each by one of its own list"
    return f"{most} ({sum(sizes)} in all, of {np.count_nonzero(sizes)} frames)"


def one_line(reason):
    """A message without line breaks and signs that a terminal may lack: names in it come from files."""
    return " ".join(str(reason).split()).encode("ascii", "backslashreplace").decode()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="certificates, or folders of them")
    parser.add_argument("--weights", type=Path, help="weights file (default: the one named, beside the certificate)")
    args = parser.parse_args()
    files = []
    for path in args.paths:
        inside = sorted(path.glob("sample_*.npz")) if path.is_dir() else [path]
        files += inside
        if not inside:
            print(f"error: {path} holds no sample_*.npz", file=sys.stderr)
            sys.exit(2)
    counts, cache = {"confirmed": 0, "rejected": 0, "damaged": 0}, {}
    for path in files:
        try:
            print(f"confirmed: {path.name}: {describe(*check(path, args.weights, cache))}")
            counts["confirmed"] += 1
        except Rejected as reason:
            print(f"rejected: {path.name}: {one_line(reason)}")
            counts["rejected"] += 1
        except Damaged as reason:
            sys.stdout.flush()
            print(f"error: {path}: {one_line(reason)}", file=sys.stderr)
            counts["damaged"] += 1
    if len(files) > 1:
        print(", ".join(f"{count} {word}" for word, count in counts.items()))
    sys.exit(2 if counts["damaged"] else 1 if counts["rejected"] else 0)


if __name__ == "__main__":
    main()
