"""Certificates with curved bounds: confirmed at the radius, rejected where they were tampered with, and rigorous."""

from __future__ import annotations

import itertools
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from helpers import THREATS, Threat, lowest_margins
from test_bound_scripts import make_place
from test_certificate import (
    CLASSES,
    INF,
    STATE,
    batch_of,
    checker,
    mp_sigmoid,
    read,
    run_checker,
    save,
    small_net,
)

from utils.certify import margin_problem, search_radius
from utils.certify.certificate import save_certificates, write_certificates
from utils.network.unroll import unroll
from utils.question import margin_rows

FEW = {"method": "curve", "alpha_steps": 1, "curve_steps": 3}


def write(folder, net, count=1, frames=2, mask=None, share=1.0, **threat):
    """Certificates of a batch at ``share`` of the edge of what one set of curves certifies: (paths, eps)."""
    x = batch_of(net, count)[0][:, :frames]
    labels = net(x, threat.get("lengths")).argmax(dim=1)
    problem = margin_problem(net, x, labels, frames=mask, **FEW, **threat)
    low, high = torch.zeros(count, dtype=torch.float64), torch.full((count,), 0.5, dtype=torch.float64)
    problem.tune_curves(0.3 * high, torch.float32, 2)
    for _ in range(10):
        middle = 0.5 * (low + high)
        certified = (problem.margins(middle, torch.float64) > problem.slack(torch.float64)).all(dim=1)
        low, high = torch.where(certified, middle, low), torch.where(certified, high, middle)
    return write_certificates(folder, problem, share * low, [str(n) for n in range(count)]), share * low


def is_curved(path) -> bool:
    return any(name.startswith("curvatures") and array.any() for name, array in read(path)[1].items())


# --- confirmed ------------------------------------------------------------------------------------------------------

CASES = {
    **{
        f"{kind}, l_{norm:g}": ({"kind": kind}, {"norm": norm})
        for kind, norm in itertools.product(("rnn", "lstm", "gru"), (1.0, 2.0, INF))
    },
    "rnn, clip": (
        {"kind": "rnn", "mean": 0.1, "std": 0.5},
        {"norm": INF, "clip": (-1.5, 1.0), "count": 2},
    ),
    "rnn, sequence, l_1": ({"kind": "rnn"}, {"norm": 1.0, "ball": "sequence", "frames": 3}),
    "lstm, sequence, state": ({"kind": "lstm", "state": [part[:1] for part in STATE]}, {"ball": "sequence"}),
    "gru, one frame": ({"kind": "gru", "bidirectional": True, "pooling": "mean"}, {"mask": [0]}),
    "rnn, lengths": ({"kind": "rnn", "layers": 2}, {"lengths": torch.tensor([3, 2]), "frames": 3, "count": 2}),
    "relu": ({"kind": "relu"}, {}),
    "relu, one frame of two layers": ({"kind": "relu", "layers": 2}, {"frames": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_certificates_at_the_edge_are_confirmed(name, tmp_path):
    options, threat = CASES[name]
    paths, edge = write(tmp_path, small_net(**options), **threat)
    assert len(paths) == int((edge > 1e-3).sum()) == threat.get("count", 1)
    assert all(map(is_curved, paths))
    for path, eps in zip(paths, edge.tolist(), strict=True):
        certificate, _, margin = checker.check(path)
        assert margin > 0 and certificate["eps"].max() == eps


def test_curves_are_tuned_anew_where_none_are_at_hand(tmp_path):
    net = small_net("rnn")
    x, labels = batch_of(net, 2)
    radius = search_radius(margin_problem(net, x, labels, **FEW)).radius
    paths = save_certificates(tmp_path, net, x, labels, radius, **FEW)
    assert len(paths) == 2 and all(checker.check(path)[2] > 0 for path in paths)


def test_a_file_without_curvatures_is_what_it_was(tmp_path):
    """Curvatures of 0 give the same margins as none, but for rounding: planes."""
    net = small_net("gru")
    x, labels = batch_of(net, 1)
    radius = search_radius(margin_problem(net, x, labels)).radius
    header, arrays = read(save_certificates(tmp_path, net, x, labels, radius)[0])
    assert not any(name.startswith("curvatures") for name in arrays)
    plain = checker.check(save(tmp_path / "plain.npz", header, arrays))[2]
    flat = {name.replace("slopes", "curvatures"): 0 * array for name, array in arrays.items() if "slopes" in name}
    assert abs(checker.check(save(tmp_path / "flat.npz", header, arrays | flat))[2] - plain) < 1e-6


def test_targets_may_have_hints_of_their_own(tmp_path):
    """What "bab" tunes for each target by itself proves that target's margin alone."""
    net = small_net("rnn")
    question = {"method": "bab", "alpha_steps": 1, "curve_steps": 3, "time_limit": 1.5}
    x, labels = batch_of(net, 1)
    radius = 0.99 * search_radius(margin_problem(net, x, labels, **question)).radius  # at its edge time decides
    (path,) = save_certificates(tmp_path, net, x, labels, radius, **question)
    assert checker.check(path)[2] > 0
    header, arrays = read(path)
    hints = {name: array for name, array in arrays.items() if "." in name}
    if next(iter(hints.values())).ndim == 4:
        hints = {name: np.stack([array, array]) for name, array in hints.items()}
    assert checker.check(save(tmp_path / "own.npz", header, arrays | hints))[2] > 0
    key = "curvatures.l0.forward.activation"
    for damaged in ({key: hints[key][:1]}, {key: hints[key][0]}, {key: np.stack([hints[key][0]] * 3)}):
        with pytest.raises(checker.Damaged):
            checker.check(save(tmp_path / "damaged.npz", header, arrays | hints | damaged))
    spoilt = {name: array + (10.0 * (np.arange(2) == 1))[:, None, None, None, None] for name, array in hints.items()}
    with pytest.raises(checker.Rejected):
        checker.check(save(tmp_path / "spoilt.npz", header, arrays | spoilt))


# --- tampering ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of an LSTM: its folder, header and arrays."""
    folder = tmp_path_factory.mktemp("curved")
    paths, _ = write(folder, small_net("lstm"))
    assert is_curved(paths[0])
    return folder, *read(paths[0])


WRITTEN, BENT = "slopes.l0.forward.written", "curvatures.l0.forward.output"


def changed(name, function):
    return lambda header, arrays: arrays.update({name: function(arrays[name])})


def swap(header, arrays):
    header["label"], header["targets"] = header["targets"][0], [header["label"]]


REJECTED = {
    "eps": changed("eps", lambda eps: 1.1 * eps),
    "classes": swap,
    "input": changed("x", lambda x: x + 0.01),
    "another norm": lambda header, arrays: header.update(norm="inf"),
    "slopes": changed(WRITTEN, lambda slopes: slopes + 3.0),
    "curvatures": changed(BENT, lambda bends: 50.0 + bends),
    "no curvatures": lambda header, arrays: [arrays.pop(name) for name in list(arrays) if "curvatures" in name],
    "model": lambda header, arrays: header["weights"].update(sha256="0" * 64),
}
DAMAGED = {
    "negative": changed(BENT, lambda bends: -1e-9 - bends),
    "NaN": changed(BENT, lambda bends: np.where(bends >= 0, np.nan, bends)),
    "infinite": changed(BENT, lambda bends: bends + np.inf),
    "huge": changed(BENT, lambda bends: bends + 1e16),
    "shape": changed(BENT, lambda bends: bends[:, :, :1]),
    "frames": changed(BENT, lambda bends: bends[1:]),
    "integers": changed(BENT, lambda bends: bends.astype(np.int64)),
    "one missing": lambda header, arrays: arrays.pop(BENT),
    "no slopes": lambda header, arrays: [arrays.pop(name) for name in list(arrays) if "slopes" in name],
    "unknown": lambda header, arrays: arrays.update({"curvatures.l1.forward.output": arrays[BENT]}),
}


@pytest.mark.parametrize("kind", [*REJECTED, *DAMAGED])
def test_tampered_certificates_are_not_confirmed(kind, certificate, tmp_path, capsys):
    folder, header, arrays = certificate
    header, arrays = {**header, "weights": dict(header["weights"])}, dict(arrays)
    (REJECTED | DAMAGED)[kind](header, arrays)
    path = save(tmp_path / "sample_0.npz", header, arrays)
    code, out, err = run_checker(capsys, path, "--weights", folder / "weights.npz")
    assert code == (1 if kind in REJECTED else 2) and (out + err).count("\n") == 1, (out, err)
    assert kind not in REJECTED or out.startswith("rejected: ")


@pytest.mark.parametrize(
    ("kind", "threat"),
    list(zip(("rnn", "lstm", "gru", "relu", "rnn", "rnn", "lstm"), THREATS, strict=True)),
    ids=str,
)
def test_margins_are_below_what_an_attack_reaches_for_any_hints(kind, threat, tmp_path):
    """Slopes and curvatures are hints: wild ones give a low margin, never a wrong one."""
    net = small_net(kind)
    x, labels = batch_of(net, count=1)
    x = x[:, :2].clamp(-1.0, 1.0)
    labels = net(x).argmax(dim=1)
    eps = torch.full((1, 2), 0.25, dtype=torch.float64)
    rows = margin_rows(labels, CLASSES).double()
    reached = float(lowest_margins(unroll(net, 2), x, eps, rows, threat).min())
    question = {"norm": threat.norm, "ball": threat.ball, "clip": threat.clip}
    (path,) = save_certificates(tmp_path, net, x, labels, 1e-3, **question)
    header, arrays = read(path)
    arrays["eps"][:] = 0.25
    found, generator = [], np.random.default_rng(1)
    for scale, bend in ((0.0, 0.01), (0.0, 0.3), (0.3, 0.1), (2.0, 30.0)):
        own = dict(arrays)
        for name in [name for name in arrays if name.startswith("slopes")]:
            own[name] = arrays[name] + scale * generator.normal(size=arrays[name].shape)
            own[name.replace("slopes", "curvatures")] = bend * generator.exponential(size=arrays[name].shape)
        try:
            found.append(checker.check(save(tmp_path / "other.npz", header, own))[2])
        except checker.Rejected as reason:
            found.append(float(str(reason).split(",")[0].split()[-1]))
    assert max(found) <= reached and max(found) > -100.0


# --- intercepts -----------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "tanh": (np.tanh, mpmath.tanh),
    "x*sigmoid": (lambda x, y: x / (1 + np.exp(-y)), lambda x, y: x * mp_sigmoid(y)),
    "tanh*sigmoid": (lambda x, y: np.tanh(x) / (1 + np.exp(-y)), lambda x, y: mpmath.tanh(x) * mp_sigmoid(y)),
}


def curved_boxes(operands, count, seed):
    """Slopes, curvatures, centers and ends, (operands, count) each; narrow, degenerate and flat ones among them."""
    generator = np.random.default_rng(seed)
    scale = 10.0 ** generator.uniform(-2, 0.7, (operands, count))
    low, high = np.sort(scale * generator.normal(size=(2, operands, count)), axis=0)
    high[:, ::7] = low[:, ::7]
    center = low + (high - low) * generator.uniform(0.0, 1.0, low.shape)
    slopes = 0.5 * generator.normal(size=low.shape)
    bends = generator.exponential(size=low.shape) * generator.choice([0.0, 0.05, 0.5], size=low.shape)
    return slopes, bends, center, low, high


def least_on_grid(function, numbers, points=201, zooms=3):
    """The least of f - a z + q d^2 / 2 on a grid, and on finer ones around the least point."""
    slopes, bends, center, low, high = (v[..., None] for v in numbers)
    ends, best = (low, high), np.inf
    for _ in range(zooms):
        axes = ends[0] + (ends[1] - ends[0]) * np.linspace(0.0, 1.0, points)
        terms = 0.5 * bends * (axes - center) ** 2 - slopes * axes
        if len(axes) == 1:
            heights = function(axes[0]) + terms[0]
            place = (heights.argmin(axis=-1),)
        else:
            heights = function(axes[0][..., None], axes[1][:, None]) + terms[0][..., None] + terms[1][:, None]
            heights = heights.reshape(len(heights), -1)
            place = np.divmod(heights.argmin(axis=-1), points)
        best = np.minimum(best, heights.min(axis=-1))
        at = np.stack([np.take_along_axis(axis, own[:, None], axis=-1) for axis, own in zip(axes, place, strict=True)])
        step = (ends[1] - ends[0]) / (points - 1)
        ends = np.maximum(at - step, low), np.minimum(at + step, high)
    return best


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_curved_intercepts_are_tight(kind):
    numbers = curved_boxes(1 if kind == "tanh" else 2, 150, seed=3)
    loss = least_on_grid(FUNCTIONS[kind][0], numbers) - checker.curved_intercept(kind, *numbers)
    assert loss.min() > -1e-14 and loss.max() < 1e-5 and np.quantile(loss, 0.95) < 1e-7


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_curved_intercepts_are_below_in_exact_arithmetic(kind):
    numbers = curved_boxes(1 if kind == "tanh" else 2, 40, seed=4)
    found = checker.curved_intercept(kind, *numbers)
    with mpmath.workdps(60):
        for k, c in enumerate(found.tolist()):
            a, q, m, low, high = ([mpmath.mpf(v) for v in part[:, k].tolist()] for part in numbers)
            axes = [[lo + (hi - lo) * i / 6 for i in range(7)] for lo, hi in zip(low, high, strict=True)]
            for z in itertools.product(*axes):
                terms = zip(z, a, q, m, strict=True)
                value = FUNCTIONS[kind][1](*z) - sum(s * v - b * (v - o) ** 2 / 2 for v, s, b, o in terms)
                assert value >= c


@pytest.mark.parametrize("sign", [1, -1])
def test_relu_intercepts_are_exact_but_for_rounding(sign):
    slopes, bends, center, low, high = (part[0] for part in curved_boxes(1, 400, seed=5))
    found = checker.relu_intercept(slopes, low, high, float(sign), bends, center)
    for a, q, m, lo, hi, c in zip(slopes, bends, center, low, high, found, strict=True):
        a, q, m, lo, hi = (Fraction(float(v)) for v in (a, q, m, lo, hi))
        points = [lo, hi, Fraction(0)] + [m + (a - p) / q for p in (0, sign) if q]
        points = [z for z in points if lo <= z <= hi]
        least = min(sign * max(z, Fraction(0)) - a * z + q * (z - m) ** 2 / 2 for z in points)
        assert c <= least <= Fraction(float(c)) + Fraction(1, 10**12)


def test_a_sloppy_intercept_is_caught(monkeypatch):
    """The tests above notice an error of a millionth."""
    own = checker._on_cell
    monkeypatch.setattr(checker, "_on_cell", lambda *arguments: own(*arguments) + 1e-6)
    with pytest.raises(AssertionError):
        test_curved_intercepts_are_tight("tanh*sigmoid")


# --- squares over the set -------------------------------------------------------------------------------------------


def inputs_of(norm, ball, sizes=(2, 3), clip=None):
    frames = [checker.Frame(np.zeros(n), 0.3 + 0.2 * t, clip, np.zeros(n), np.ones(n)) for t, n in enumerate(sizes)]
    if ball == "sequence":
        frames = [checker.Frame(np.zeros(n), 0.4, clip, np.zeros(n), np.ones(n)) for n in sizes]
    return checker.Inputs(frames, norm, ball)


def points_of(inputs, count=4000, seed=0):
    """Points of the set, most of them on its boundary: corners of a box, vertices and others of balls."""
    generator = np.random.default_rng(seed)
    width = sum(inputs.widths)
    if inputs.norm == INF:
        return inputs.sides * np.array(list(itertools.product((-1.0, 1.0), repeat=width)))
    order = 1 if inputs.norm == 1.0 else 2
    directions = generator.normal(size=(count, width))
    directions[::2] *= generator.uniform(size=(count, width))[::2] < 0.4
    if order == 1:
        parts = [np.eye(n)[generator.integers(n, size=count)] for n in inputs.widths]
        directions[1::2] = (np.concatenate(parts, axis=1) * generator.choice([-1.0, 1.0], size=(count, width)))[1::2]
        directions[1::4] *= np.eye(width)[generator.integers(width, size=count)][1::4] + 1e-300
    if inputs.ball == "sequence":
        size = np.linalg.norm(directions, ord=order, axis=1, keepdims=True)
        return inputs.frames[0].eps * directions / np.where(size > 0, size, 1.0)
    own = []
    for frame, part in zip(inputs.frames, np.split(directions, inputs.splits, axis=1), strict=True):
        size = np.linalg.norm(part, ord=order, axis=1, keepdims=True)
        own.append(frame.eps * part / np.where(size > 0, size, 1.0))
    return np.concatenate(own, axis=1)


SETS = [*itertools.product((1.0, 2.0, INF), ("frame", "sequence"))]


def brute_force(norm, ball, rows=4, squares=9):
    """Bounds of squares, with and without a line, over what points of the set reach: (without, with)."""
    inputs, generator = inputs_of(norm, ball), np.random.default_rng(2)
    points = points_of(inputs)
    weights = generator.exponential(size=(rows, squares)) * (generator.uniform(size=(rows, squares)) < 0.7)
    jacobian, lines = generator.normal(size=(squares, 5)), 2.0 * generator.normal(size=(rows, 5))
    reached = weights @ (jacobian @ points.T) ** 2
    assert (inputs.deviation(lines) >= (lines @ points.T).max(axis=1)).all()
    first = inputs.squares(weights, jacobian) / reached.max(axis=1)
    second = inputs.line_and_squares(lines, weights, jacobian) / (reached - lines @ points.T).max(axis=1)
    return first, second


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("norm", "ball"), SETS)
def test_squares_are_above_and_near_what_points_reach(norm, ball, few, monkeypatch):
    if not few:  # a basis, squares of a row's own, and norms of the rest
        monkeypatch.setattr(checker, "LEADING", 2)
        monkeypatch.setattr(checker, "OWN", 2)
    for found, most in zip(brute_force(norm, ball), (2.0 if few else 3.0, 1.6), strict=True):
        assert (found >= 1.0).all() and (found <= most).all(), found


@pytest.mark.parametrize(("norm", "ball"), SETS)
def test_broken_bounds_of_squares_are_caught(norm, ball, monkeypatch):
    monkeypatch.setattr(checker, "eigenvalue_above", lambda matrix: 0.5 * np.linalg.eigvalsh(matrix)[-1])
    monkeypatch.setattr(checker, "_s_lemma", lambda line, form, error, size: 0.5 * size * np.linalg.eigvalsh(form)[-1])
    monkeypatch.setattr(checker.np, "diag", lambda matrix: 0.0 * np.diagonal(matrix))
    monkeypatch.setattr(checker.Inputs, "_at_vertices", lambda self, w, j: np.full(len(w), np.inf))
    first, second = brute_force(norm, ball)
    assert (first < 1.0).any() and (second < 1.0).any()


def test_eigenvalues_are_proved_not_believed(monkeypatch):
    generator = np.random.default_rng(3)
    matrices = [a @ np.diag(10.0 ** np.linspace(0, -12, 8)) @ a.T for a in generator.normal(size=(20, 8, 8))]
    matrices = [0.5 * (matrix + matrix.T) for matrix in matrices]
    exact = [float(np.linalg.eigvalsh(matrix)[-1]) for matrix in matrices]
    for matrix, value in zip(matrices, exact, strict=True):
        assert value <= checker.eigenvalue_above(matrix) <= value * (1 + 1e-10)
    own = np.linalg.eigvalsh
    for wrong in (
        lambda matrix: 0.9 * own(matrix),
        lambda matrix: 0.0 * own(matrix),
        lambda matrix: np.nan * own(matrix),
    ):
        monkeypatch.setattr(checker.np.linalg, "eigvalsh", wrong)
        for matrix, value in zip(matrices, exact, strict=True):
            assert checker.eigenvalue_above(matrix) >= value


def test_forms_pay_for_rounding(monkeypatch):
    """Of one square the greatest eigenvalue is w |J|^2, exactly; without room for rounding it would be missed."""
    generator = np.random.default_rng(4)
    missed = 0
    for _ in range(20):
        w, j = generator.exponential(size=(1, 1)), generator.normal(size=(1, 7))
        exact = Fraction(float(w[0, 0])) * sum(Fraction(float(v)) ** 2 for v in j[0])
        assert exact <= Fraction(checker.Forms(w, j).largest(0)) <= exact * (1 + Fraction(1, 10**9))
        with monkeypatch.context() as patch:
            patch.setattr(checker, "gamma", lambda n: 0.0)
            for name in ("U", "TINY"):
                patch.setattr(checker, name, 0.0)
            patch.setattr(checker, "eigenvalue_above", lambda matrix: float(matrix[0, 0]))
            missed += Fraction(checker.Forms(w, j).largest(0)) < exact
    assert missed > 0


@pytest.mark.parametrize("threat", [Threat(1.0), Threat(2.0), Threat(INF)], ids=str)
def test_many_neurons_share_a_basis(threat, tmp_path, monkeypatch):
    """With few directions taken as they are, margins are lower, and confirmed all the same below the radius."""
    net = small_net("rnn", layers=2)
    (path,), _ = write(tmp_path, net, share=0.9, norm=threat.norm, ball=threat.ball)
    margin = checker.check(path)[2]
    monkeypatch.setattr(checker, "LEADING", 4)
    monkeypatch.setattr(checker, "OWN", 3)
    assert 0 < checker.check(path)[2] <= margin + 0.05


def test_bound_script_writes_certificates_of_tuned_methods(tmp_path, capsys):
    place = make_place(tmp_path, "rnn")
    flags = ("--alpha-steps", 1, "--curve-steps", 2, "--N", 4)
    assert place.bound("--save-certificate", "--method", "curve", *flags).code == 0
    folder = place.folder("2_norm_bound_curve")
    certified = [row for row in place.rows(folder.name) if row.radius > 0]
    code, out, _ = run_checker(capsys, folder / "certificates")
    assert code == 0 and out.count("confirmed: ") == len(certified) > 1
