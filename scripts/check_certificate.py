"""Confirm or reject robustness certificates, by a program of its own: NumPy and this one file.

    python scripts/check_certificate.py FOLDER/certificates            # every certificate of a folder
    python scripts/check_certificate.py sample_00012.npz --weights weights.npz

A certificate (docs/certificates.md describes the files) names a network by the hash of its weights, an input, a set of
perturbed inputs, a label and classes to beat, and gives slopes for a linear relaxation of every non-linear operation.
Slopes prove nothing by themselves and any are allowed. The checker unrolls the network anew, finds for every slope an
intercept of its own that makes the relaxation sound, bounds every operand by backward substitution to the input, and
in the end the margins: label's logit less another class's. It confirms if all lower bounds are above 0.

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
TINY = 1e-290  # more than all that underflow can take away, even if it flushes to zero
LARGEST = 1e15  # numbers above are refused: so TINY is enough, and nothing sensible is so large
MAX_BYTES, MAX_HEADER, MAX_FRAMES = 2**28, 2**20, 10**4  # of a file packed or not, of its header, of a sequence

# Relaxed operations of a cell's time step, in the order of the certificate's format, with their number of operands.
OPERATIONS = {
    "rnn": {"activation": 1},
    "lstm": {"kept": 2, "written": 2, "output": 2},
    "gru": {"reset": 2, "new": 2, "kept": 2},
}
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


# --- intercepts: the largest c with f >= slopes . operands + c on a box, but for rounding -----------------------------


def relu_intercept(slope, low, high):
    kink = np.minimum(np.maximum(0.0, low), high)
    return np.minimum.reduce([_less(np.maximum(y, 0.0), slope * y) for y in (low, high, kink)])


def minus_relu_intercept(slope, low, high):
    kink = np.minimum(np.maximum(0.0, low), high)
    return np.minimum.reduce([_less(-np.maximum(y, 0.0), slope * y) for y in (low, high, kink)])


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


# --- the network ----------------------------------------------------------------------------------------------------


class Node:
    """A vector of the unrolled network: ``low <= node <= high`` for every input of the set."""

    index = -1
    low = high = None
    tight = False

    def __init__(self, size, parents=()):
        self.size, self.parents = size, tuple(parents)
        self.perturbed = any(parent.perturbed for parent in self.parents)

    @property
    def magnitude(self):
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def own_range(self):
        """(low, high) from the parents' ranges, or None if a backward step of the node itself is to give it."""
        return None

    def backward(self, rows):
        """Replace rows . node by what is below it: ([(parent, coefficients)], constant, error of both), per row."""
        raise NotImplementedError


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
        self.x, self.box = x, None
        low, high = np.nextafter(x - eps, -np.inf), np.nextafter(x + eps, np.inf)
        if clip is not None:
            low, high = np.maximum(low, clip[0]), np.minimum(high, clip[1])
            self.box = (low, high)
        if not self.perturbed:
            low = high = x
        ends = [(end - mean) / std for end in (low, high)]
        room = [4 * U * np.abs(end) + TINY for end in ends]
        self.low, self.high = ends[0] - room[0], ends[1] + room[1]


class Affine(Node):
    """sum_i matrices[i] @ parents[i] + bias."""

    def __init__(self, parents, matrices, bias):
        super().__init__(len(bias), parents)
        self.matrices, self.bias, self.sizes = matrices, bias, None

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

    def own_range(self):
        pairs = list(zip(self.parents, self.factors, strict=True))
        low = sum(p.low if f > 0 else -p.high for p, f in pairs) / self.divisor
        high = sum(p.high if f > 0 else -p.low for p, f in pairs) / self.divisor
        room = gamma(len(pairs)) * sum(p.magnitude for p in self.parents) / self.divisor
        return low - room - TINY, high + room + TINY

    def backward(self, rows):
        handed = [(p, f * rows / self.divisor) for p, f in zip(self.parents, self.factors, strict=True)]
        return handed, 0.0, gamma(1) * sum(np.abs(rows) @ p.magnitude for p in self.parents) / self.divisor


class Relaxed(Node):
    """A non-linear operation between two planes: ``slopes`` is (2, operands, size), lower and upper."""

    def __init__(self, kind, parents, slopes):
        super().__init__(parents[0].size, parents)
        self.kind, self.slopes, self.intercepts = kind, slopes, None

    def own_range(self):
        x = self.parents[0]
        if self.kind == "relu":
            return np.maximum(x.low, 0.0), np.maximum(x.high, 0.0)
        low, high = tanh_range(x.low, x.high) if self.kind.startswith("tanh") else (x.low, x.high)
        if len(self.parents) == 1:
            return low, high
        gate_low, gate_high = sigmoid_range(self.parents[1].low, self.parents[1].high)
        gate_low = np.maximum(gate_low, 0.0)
        low, high = low * np.where(low >= 0, gate_low, gate_high), high * np.where(high >= 0, gate_high, gate_low)
        return low - 2 * U * np.abs(low) - TINY, high + 2 * U * np.abs(high) + TINY

    def find_intercepts(self):
        """On the ranges that the operands have by now. An upper plane is a lower one of the function mirrored in x."""
        x = self.parents[0]
        (a, *b), (a_up, *b_up) = self.slopes
        if self.kind == "relu":
            self.intercepts = relu_intercept(a, x.low, x.high), -minus_relu_intercept(-a_up, x.low, x.high)
            return
        low, high = np.stack((x.low, -x.high)), np.stack((x.high, -x.low))
        if self.kind == "tanh":
            below, above = tanh_intercept(np.stack((a, a_up)), low, high)
        else:
            y = self.parents[1]
            intercept = tanh_gate_intercept if self.kind == "tanh*sigmoid" else gate_intercept
            below, above = intercept(np.stack((a, a_up)), np.stack((b[0], -b_up[0])), low, high, y.low, y.high)
        self.intercepts = below, -above

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


class Sum:
    """A lower bound as it grows, a number per row: the terms so far and what their errors may amount to."""

    def __init__(self, count):
        self.total, self.slack = np.zeros(count), np.zeros(count)

    def add(self, term, error):
        self.total = self.total + term
        self.slack = self.slack + error + 4 * U * np.abs(self.total) + TINY

    def below(self):
        return np.nextafter(self.total - 2 * self.slack, -np.inf)


class Network:
    """The unrolled classifier, with the ranges of its nodes over one set of inputs."""

    def __init__(self, norm, ball, by_intervals):
        self.nodes, self.norm, self.ball, self.by_intervals = [], norm, ball, by_intervals

    def add(self, node):
        """Append a node and find its range from its parents' ranges."""
        node.index = len(self.nodes)
        self.nodes.append(node)
        if node.low is None:
            found = node.own_range()
            node.low, node.high = self._by_rows(node, deep=False) if found is None else found
        return node

    def relax(self, kind, parents, slopes):
        """Append a non-linear operation, once the ranges of its operands have been tightened."""
        for parent in parents:
            self.tighten(parent)
        return self.add(Relaxed(kind, parents, slopes))

    def tighten(self, node):
        """Bound an operand by backward substitution to the input; once."""
        if isinstance(node, Mix) and len(node.parents) == 1:
            self.tighten(node.parents[0])
            node.low, node.high = node.own_range()
        elif node.perturbed and not node.tight and not self.by_intervals:
            low, high = self._by_rows(node, deep=True)
            node.low, node.high = np.maximum(node.low, low), np.minimum(node.high, high)
            if not (node.low <= node.high).all():
                raise Rejected("the range of an operand is empty or not a number")
            node.tight = True

    def _by_rows(self, node, deep):
        identity = np.eye(node.size)
        bound = self.lower_bound(node, np.concatenate((identity, -identity)), deep)
        return bound[: node.size], -bound[node.size :]

    def lower_bound(self, node, rows, deep):
        """Below rows . node: through all relaxations to the input, or (not deep) from the parents' ranges.

        Coefficients are rounded when they are handed to a parent. What that changes is at most their error times the
        parent's magnitude, and goes to the slack.
        """
        result, pending, frames = Sum(len(rows)), {node.index: rows}, []
        for index in range(node.index, -1, -1):
            if index not in pending:
                continue
            current, coefficients = self.nodes[index], pending.pop(index)
            if isinstance(current, Frame) and current.perturbed:
                frames.append((current, coefficients))
            elif index != node.index and not (deep and current.perturbed):
                result.add(*_over_box(coefficients, current.low, current.high))
            else:
                handed, constant, error = current.backward(coefficients)
                for parent, passed in handed:
                    if parent.index in pending:
                        passed = pending[parent.index] + passed
                        error = error + gamma(0) * (np.abs(passed) @ parent.magnitude)
                    pending[parent.index] = passed
                result.add(constant, error)
        self._meet_inputs(frames, result)
        return result.below()

    def _meet_inputs(self, frames, result):
        norms = []
        for frame, coefficients in frames:
            scaled = coefficients / frame.std
            if frame.box is not None:
                ends = [end - frame.mean for end in frame.box]
                term, error = _over_box(scaled, *ends)
                result.add(term, 2 * error)
                continue
            center = frame.x - frame.mean
            result.add(scaled @ center, gamma(frame.size) * (np.abs(scaled) @ np.abs(center)))
            norms.append(frame.eps * dual_norm(scaled, self.norm))
        if norms:
            total = sum(norms) if self.ball == "frame" else dual_norm(np.stack(norms, axis=-1), self.norm)
            result.add(-total, gamma(len(norms)) * total)


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


def rnn_step(net, gates, state, slopes, kind):
    """h = tanh or relu (z)."""
    return (net.relax(kind, [gates(0, "both", state[0])], slopes["activation"]),)


def lstm_step(net, gates, state, slopes, kind):
    """c' = sigmoid(f) c + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c')."""
    h, c = state
    i, f, g, o = (gates(k, "both", h) for k in range(4))
    kept = net.relax("x*sigmoid", [c, f], slopes["kept"])
    written = net.relax("tanh*sigmoid", [g, i], slopes["written"])
    c = net.add(Mix([kept, written]))
    return net.relax("tanh*sigmoid", [c, o], slopes["output"]), c


def gru_step(net, gates, state, slopes, kind):
    """n = W x + b + sigmoid(r) (W h + b),  h' = sigmoid(-z) tanh(n) + sigmoid(z) h."""
    (h,) = state
    net.tighten(h)  # an operand below: the ranges of what comes before gain by it, too
    r, z = (gates(k, "both", h) for k in range(2))
    reset = net.relax("x*sigmoid", [gates(2, "hidden", h), r], slopes["reset"])
    n = net.add(Mix([gates(2, "input", h), reset]))
    new = net.relax("tanh*sigmoid", [n, net.add(Mix([z], [-1.0]))], slopes["new"])
    return (net.add(Mix([new, net.relax("x*sigmoid", [h, z], slopes["kept"])])),)


STEPS = {"rnn": rnn_step, "lstm": lstm_step, "gru": gru_step}


def run_layer(net, inputs, model, weights, layer, direction, slopes):
    """States of one layer and direction, in the order of the frames."""
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

        own = {name: values[t] for name, values in slopes.items()}
        state = STEPS[model["architecture"]](net, gates, state, own, model["activation"])
        states[t] = state[0]
    return states


def rigorous_margins(model, weights, certificate):
    """Lower bounds of the label's logit less each target's over the certificate's set of inputs."""
    net = Network(certificate["norm"], certificate["ball"], by_intervals=not certificate["slopes"])
    settings = certificate["clip"], weights["mean"], weights["std"]
    frames = zip(certificate["x"], certificate["eps"], strict=True)
    inputs = [[net.add(Frame(x, eps, *settings))] for x, eps in frames]
    directions = ("forward", "backward")[: 2 if model["bidirectional"] else 1]
    for layer in range(model["num_layers"]):
        runs = []
        for direction in directions:
            slopes = {}
            for name, operands in OPERATIONS[model["architecture"]].items():
                shape = (len(inputs), 2, operands, model["hidden_size"])
                slopes[name] = certificate["slopes"].get((layer, direction, name), np.zeros(shape))
            runs.append(run_layer(net, inputs, model, weights, layer, direction, slopes))
        inputs = [list(parts) for parts in zip(*runs, strict=True)]
    if model["pooling"] == "mean":
        pooled = [net.add(Mix(list(run), divisor=len(inputs))) for run in zip(*inputs, strict=True)]
    else:
        pooled = [inputs[-1 if k == 0 else 0][k] for k in range(len(directions))]
    splits = np.cumsum([part.size for part in pooled])[:-1]
    head = Affine(pooled, np.split(weights["head.weight"], splits, axis=1), weights["head.bias"])
    head.low = head.high = np.zeros(head.size)  # the logits' own ranges are not needed
    net.add(head)
    rows = np.zeros((len(certificate["targets"]), head.size))
    rows[:, certificate["label"]] = 1.0
    rows[np.arange(len(rows)), certificate["targets"]] = -1.0
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
    require(model.get("activation") in activations, "the activation is unknown")
    require(model.get("pooling") in ("last", "mean"), "the pooling is unknown")
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
    require(shapes.get("eps") == (x[0],), f"eps has not one number for each of the {x[0]} frames")
    for name, shape in shapes.items():
        sliced = len(shape) == 4 and shape[:2] == (x[0], 2) and shape[2] in (1, 2)
        require(name in ("x", "eps") or sliced, f"{name} has shape {shape}: no slopes of {x[0]} frames")


def read_certificate(path):
    """The certificate as a dictionary; ``check`` fits it to its model."""
    header, arrays = read_npz(path, check_certificate_shapes)
    norms = {"1": 1.0, "2": 2.0, "inf": np.inf}
    require(header.get("norm") in tuple(norms), "the norm is not 1, 2 or inf")
    require(header.get("ball") in ("frame", "sequence"), "the ball is unknown")
    x, clip = usable(arrays["x"], arrays["x"].shape, "x"), header.get("clip")
    eps = usable(arrays["eps"], (len(x),), "eps")
    require(bool((eps >= 0).all()), "eps holds negative numbers")
    if header["ball"] == "sequence":
        require(len(set(eps[eps > 0].tolist())) <= 1, "a ball around the sequence has one eps")
    if clip is not None:
        numbers = isinstance(clip, list) and len(clip) == 2 and all(type(end) in (int, float) for end in clip)
        require(numbers and abs(clip[0]) <= LARGEST and abs(clip[1]) <= LARGEST, "clip is not (lowest, highest)")
        require(header["norm"] == "inf", "only l_inf boxes are cut to a range")
        require(bool(((x >= clip[0]) & (x <= clip[1])).all()), "x lies outside the range it is cut to")
    label, targets = header.get("label"), header.get("targets")
    require(type(label) is int and label >= 0, "the label is no class")
    require(isinstance(targets, list) and targets and all(type(k) is int and k >= 0 for k in targets), "no targets")
    require(label not in targets, "the label is a target")
    weights, sample = header.get("weights"), header.get("sample")
    for part, names in ((weights, ("file", "sha256")), (sample, ("sha256",))):
        require(isinstance(part, dict) and all(isinstance(part.get(n), str) for n in names), "a hash is missing")
    require(Path(weights["file"]).name == weights["file"], "the weights are not beside the certificate")
    slopes = {name: array for name, array in arrays.items() if name not in ("x", "eps")}
    return {
        "x": x,
        "eps": eps,
        "norm": norms[header["norm"]],
        "ball": header["ball"],
        "clip": None if clip is None else tuple(map(float, clip)),
        "label": label,
        "targets": sorted(set(targets)),
        "weights": weights,
        "x_hash": hash_arrays({"x": arrays["x"]}),
        "x_stated": sample["sha256"],
        "slope_arrays": slopes,
    }


def fit(certificate, model):
    """Check that the certificate's arrays are those of the model, and sort the slopes by where they belong."""
    require(certificate["x"].shape[1] == model["input_size"], "x does not fit the model")
    classes = [certificate["label"], *certificate["targets"]]
    require(max(classes) < model["num_classes"], "a class is unknown to the model")
    found, arrays = {}, dict(certificate["slope_arrays"])
    if arrays:
        for layer in range(model["num_layers"]):
            for direction in ("forward", "backward")[: 2 if model["bidirectional"] else 1]:
                for name, operands in OPERATIONS[model["architecture"]].items():
                    key = f"slopes.l{layer}.{direction}.{name}"
                    shape = (len(certificate["x"]), 2, operands, model["hidden_size"])
                    found[layer, direction, name] = usable(arrays.pop(key, None), shape, key)
        require(not arrays, f"{next(iter(arrays), None)} has no place in the model")
    certificate["slopes"] = found


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
    with np.errstate(all="ignore"):  # what overflows ends as NaN or infinity, and is rejected
        margin = float(rigorous_margins(model, weights, certificate).min())
    if not 0 < margin < np.inf:
        raise Rejected(f"the rigorous margin is {margin:.6g}, not above 0")
    return certificate, model, margin


def describe(certificate, model, margin):
    """What has been proved, in one line."""
    perturbed = np.flatnonzero(certificate["eps"])
    eps = certificate["eps"][perturbed]
    size = " to ".join(f"{end:.8g}" for end in sorted({min(eps, default=0.0), max(eps, default=0.0)}))
    place = "every frame" if len(perturbed) == len(certificate["x"]) else f"frames {perturbed.tolist()}"
    place = f"one ball around {place}" if certificate["ball"] == "sequence" else place
    clip = "" if certificate["clip"] is None else ", cut to [{:g}, {:g}]".format(*certificate["clip"])
    targets = sorted(set(certificate["targets"]))
    others = "all others" if len(targets) == model["num_classes"] - 1 else ", ".join(map(str, targets))
    hashes = f"input {certificate['x_hash'][:12]}, model {certificate['weights']['sha256'][:12]}"
    return (
        f"margin {margin:.6g}, l_{certificate['norm']:g} eps {size} on {place}{clip}, "
        f"class {certificate['label']} against {others}, {hashes}"
    )


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
