"""Certificates of waveforms: what the checker confirms and rejects, and its own rules for features against points."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from helpers import normal
from test_bound_scripts import assert_one_line, call
from test_certificate import checker, larger_eps, moved_input, read, run_checker, save
from torch import nn

from utils.attack import pgd
from utils.certify import certified_margin, certified_radius, save_certificates
from utils.network.speech import MelFeatures, SpeechClassifier

HOP, CHUNKS, BANDS = 8, 4, 3
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
INF = float("inf")
CASES = {
    "lstm": ("lstm", {"norm": INF}),
    "gru, l_2": ("gru", {"norm": 2.0}),
    "lstm, signal to noise": ("lstm", {"norm": 2.0, "ball": "sequence"}),
    "rnn, a span": ("rnn", {"norm": INF, "frames": [1, 2]}),
    "rnn, l_1": ("rnn", {"norm": 1.0}),
    "rnn, alpha": ("rnn", {"norm": INF, "method": "alpha", "alpha_steps": 3}),
    "rnn, intervals": ("rnn", {"norm": INF, "method": "ibp"}),
    "lstm, lengths": ("lstm", {"norm": INF, "lengths": torch.tensor([4, 2])}),
}


def small(kind: str = "lstm", dtype=torch.float64) -> SpeechClassifier:
    rnn, head = KINDS[kind](BANDS, 3, batch_first=True), nn.Linear(3, 3)
    for number, parameter in enumerate((*rnn.parameters(), *head.parameters())):
        parameter.data = normal(*parameter.shape, seed=number)
    model = SpeechClassifier(MelFeatures(HOP, BANDS, 0.3), rnn, head, mean=1.0, std=2.0)
    return model.to(dtype).requires_grad_(False)


def waves() -> torch.Tensor:
    """Noise, of which the first sample begins in silence."""
    x = normal(2, CHUNKS, HOP, seed=7)
    x[0, :2] = 0.0
    return x


def written(folder, kind, share=0.999, **threat):
    """(paths, x, labels, eps, engine margins) at a share of the radii."""
    net, x = small(kind), waves()
    labels = net(x, threat.get("lengths")).argmax(dim=1)
    eps = share * certified_radius(net, x, labels, **threat)
    margins = certified_margin(net, x, labels, eps, **threat).amin(dim=1)
    return save_certificates(folder, net, x, labels, eps, **threat), x, labels, eps, margins


@pytest.mark.parametrize("name", CASES)
def test_certificates_near_the_radius_are_confirmed(name, tmp_path):
    kind, threat = CASES[name]
    paths, _, _, eps, margins = written(tmp_path, kind, **threat)
    assert len(paths) == 2 and (eps > 0).all()
    for path, margin in zip(paths, margins.tolist(), strict=True):
        rigorous = checker.check(path)[2]
        assert rigorous > 0 and (rigorous >= margin - 1e-6 or "alpha" in name)


@pytest.mark.parametrize("kind", KINDS)
def test_margins_are_rigorous_for_any_slopes(kind, tmp_path):
    """Where noise breaks the network the margin is below what it reaches, whatever the hints are."""
    paths, x, labels, _, _ = written(tmp_path, kind, norm=INF)
    reached = pgd(small(kind), x, labels, 0.4, norm=INF, steps=20, restarts=2).margin.tolist()
    random = np.random.default_rng(1)
    for path, value in zip(paths, reached, strict=True):
        for scale in (0.0, 0.5, 2.0):
            header, arrays = read(path)
            arrays["eps"][:] = 0.4
            for key in [key for key in arrays if key.startswith("slopes")]:
                arrays[key] = arrays[key] + scale * random.normal(size=arrays[key].shape)
            save(path, header, arrays)
            certificate = checker.read_certificate(path)
            model, weights, _ = checker.read_weights(path.parent / "weights.npz")
            checker.fit(certificate, model)
            assert checker.rigorous_margins(model, weights, certificate).min() <= value + 1e-9


# --- its rules, one by one ----------------------------------------------------------------------------------------


def energies(norm, ball="frame", eps=0.3):
    """(node, frames' centers, a function from deviations (n, 2 hop) to energies)."""
    net, x = small(), waves()[1].numpy()
    wave, mel = net.features.wave.numpy(), net.features.mel.numpy()
    frames = [checker.Frame(row, eps, None, np.zeros(HOP), np.ones(HOP)) for row in x[:2]]
    node = checker.Energies(frames, checker.MelBank(wave, mel, 0.3), norm, ball)
    center = x[:2].ravel()
    both = np.concatenate((mel, mel), axis=1) / 0.3
    return node, center, lambda d: ((center + d) @ wave.T) ** 2 @ both.T


ROWS = np.array([[-1.0, -1.0, -1.0], [-1.0, -0.7, -0.5], [-1.0, 0.5, -1.0]])


def deviations(norm, ball, eps=0.3):
    """Where the quadratic part is large: along eigenvectors and rows, and at random corners, in the set."""
    features = small().features
    mel, wave = features.mel.numpy(), features.wave.numpy()
    both = np.concatenate((mel, mel), axis=1)
    found = [np.linalg.eigh((wave.T * row) @ wave)[1][:, -1] for row in (*both, *(-np.minimum(ROWS, 0.0) @ both))]
    found += [*wave, *np.random.default_rng(2).normal(size=(20, 2 * HOP))]
    moves = []
    for direction in found:
        parts = direction.reshape(2, HOP)
        if norm == INF:
            move = np.sign(parts)
        elif ball == "sequence":
            move = parts / np.linalg.norm(parts)
        else:
            move = parts / np.linalg.norm(parts, axis=1, keepdims=True)
        moves += [eps * move.ravel(), -eps * move.ravel()]
    return np.array(moves)


SETS = ((INF, "frame"), (2.0, "frame"), (2.0, "sequence"))


def check_energies():
    for norm, ball in SETS:
        node, center, value = energies(norm, ball)
        moves = deviations(norm, ball)
        true = value(moves)
        line = (center + moves) @ node.slopes.T - node.energy
        low, high = node.own_range()
        for bound, other in ((line, true), (true, line + node.kappa), (low, true), (true, high)):
            assert (bound <= other + 1e-12).all()
        handed, constant, error = node.backward(ROWS)
        if node.shares:
            assert all(frame.perturbed for frame, _ in node.squares(ROWS))
            constant = constant - node.squares(ROWS)[0][1]
        below = (center + moves) @ np.concatenate([part for _, part in handed], axis=1).T + constant - error
        assert (below <= true @ ROWS.T + 1e-12).all()
        assert constant[0] + ROWS[0] @ node.energy > 0.95 * ROWS[0] @ node.kappa  # less than each by itself


def test_energies_lie_between_their_planes():
    check_energies()
    node, _, _ = energies(INF)
    rows = np.array([[1.0, -2.0, 0.5]])
    handed, constant, error = node.backward(rows)
    assert constant[0] == pytest.approx(float(-rows[0] @ node.energy - 2.0 * node.kappa[1])) and 0 < error[0] < 1e-9
    assert np.concatenate([part for _, part in handed], axis=1) == pytest.approx(rows @ node.slopes)


def broken_eigenvalue(rows, weights):
    scaled = rows * np.sqrt(weights)[:, None]
    return 0.8 * np.linalg.eigvalsh(scaled @ scaled.T)[-1]


def one_frame_s_kappa(self, frames, norm, ball):
    return KAPPA(
        self,
        frames[:1] if norm != INF else [frames[0], checker.Frame(frames[1].center, 0.0, None, 0.0, 1.0)],
        norm,
        ball,
    )


KAPPA = checker.MelBank.kappa


@pytest.mark.parametrize("broken", ["eigenvalue", "one frame", "slopes", "together"])
def test_the_check_of_energies_catches_broken_rules(monkeypatch, broken):
    if broken == "eigenvalue":
        monkeypatch.setattr(checker, "_largest_form", broken_eigenvalue)
    elif broken == "one frame":
        monkeypatch.setattr(checker.MelBank, "kappa", one_frame_s_kappa)
    elif broken == "together":
        most = checker.MelBank.most
        monkeypatch.setattr(checker.MelBank, "most", lambda *arguments: 0.4 * most(*arguments))
    else:
        make = checker.Energies.__init__

        def init(self, *arguments):
            make(self, *arguments)
            self.slopes = 0.9 * self.slopes

        monkeypatch.setattr(checker.Energies, "__init__", init)
    with pytest.raises(AssertionError):
        check_energies()


def test_logarithms_are_between_their_ends_in_higher_precision():
    numbers = np.concatenate(([0.0, 1e-300, 1e-16, 1e15], 10.0 ** np.linspace(-12, 9, 60)))
    low, high = checker.log_range(numbers)
    with mpmath.workdps(40):
        true = [mpmath.log1p(mpmath.mpf(float(y))) for y in numbers]
        assert all(a <= t <= b for a, t, b in zip(low.tolist(), true, high.tolist(), strict=True))
    assert (high - low <= 1e-13 * (1 + numbers**0)).all()


def check_log_lines():
    """Slopes that fit and that do not, over narrow and wide ranges, silence included, against a grid."""
    low = np.array([0.0, 0.0, 1e-3, 0.5, 3.0, 200.0, 2.0])
    high = np.array([0.0, 5.0, 2e-3, 40.0, 3.1, 1e5, 2.0])
    grid = low + (high - low) * np.linspace(0.0, 1.0, 2001)[:, None]
    for slope in (-0.3, 0.0, 1e-4, 0.05, 0.4, 1.0, 3.0):
        parent = checker.Fixed(low)
        parent.low, parent.high = low, high
        node = checker.Logarithm(parent, np.full((2, 1, len(low)), slope))
        node.find_intercepts()
        gaps = np.log1p(grid) - slope * grid - node.intercepts[0], slope * grid + node.intercepts[1] - np.log1p(grid)
        room = 1e-12 * (1 + np.abs(slope) * high)
        assert all((gap >= -room).all() for gap in gaps)
        assert all((gap.min(axis=0) <= 1e-4 + room).all() for gap in gaps)


def test_lines_of_the_logarithm_hold_and_touch():
    check_log_lines()


def test_the_check_of_lines_catches_a_broken_one(monkeypatch):
    find = checker.Logarithm.find_intercepts

    def only_the_ends(self):
        find(self)
        y = np.stack((self.parents[0].low, self.parents[0].high))
        self.intercepts = self.intercepts[0], (np.log1p(y) - self.slopes[1, 0] * y).max(axis=0)

    monkeypatch.setattr(checker.Logarithm, "find_intercepts", only_the_ends)
    with pytest.raises(AssertionError):
        check_log_lines()


# --- files ---------------------------------------------------------------------------------------------------------


def lower_floor(header, arrays):
    header["model"]["features"]["floor"] *= 0.5


def louder_band(header, arrays):
    arrays["features.mel"][1] *= 2.0


def other_wave(header, arrays):
    arrays["features.wave"][0] *= -1.5


@pytest.mark.parametrize("tamper", [lower_floor, louder_band, other_wave], ids=lambda one: one.__name__)
def test_other_features_are_another_model(tamper, tmp_path, capsys):
    path = written(tmp_path, "lstm", norm=INF)[0][0]
    header, arrays = read(tmp_path / "weights.npz")
    tamper(header, arrays)
    save(tmp_path / "weights.npz", header, arrays)
    code, out, _ = run_checker(capsys, path)
    assert code == 1 and "another model" in out


@pytest.mark.parametrize("tamper", [larger_eps, moved_input], ids=lambda one: one.__name__)
def test_tampered_certificates_are_rejected(tamper, tmp_path, capsys):
    path = written(tmp_path, "lstm", share=1.0, norm=INF)[0][0]
    header, arrays = read(path)
    tamper(header, arrays, None)
    if tamper is larger_eps:
        arrays["eps"] *= 1.05
    else:
        arrays["x"] += 0.5
        header["sample"]["sha256"] = checker.hash_arrays({"x": arrays["x"]})
    save(path, header, arrays)
    assert run_checker(capsys, path)[0] == 1


DAMAGES = {
    "no log": lambda header, arrays: arrays.pop("slopes.features.log"),
    "steps": lambda header, arrays: arrays.update({"slopes.features.log": arrays["slopes.features.log"][1:]}),
    "one chunk": lambda header, arrays: arrays.update({"x": arrays["x"][:1], "eps": arrays["eps"][:1]}),
    "width": lambda header, arrays: arrays.update({"x": arrays["x"][:, 1:]}),
    "curved": lambda header, arrays: arrays.update(
        {key.replace("slopes", "curvatures"): np.abs(value) for key, value in arrays.items() if "slopes" in key}
    ),
}
WEIGHTS = {
    "floor": lambda header, arrays: header["model"]["features"].update(floor=0.0),
    "floor text": lambda header, arrays: header["model"]["features"].update(floor="0.1"),
    "no hop": lambda header, arrays: header["model"]["features"].pop("hop"),
    "features a list": lambda header, arrays: header["model"].update(features=[]),
    "negative mel": lambda header, arrays: arrays["features.mel"].__imul__(-1.0),
    "negative std": lambda header, arrays: arrays["std"].__imul__(-1.0),
    "wave": lambda header, arrays: arrays.update({"features.wave": arrays["features.wave"][1:]}),
    "no mel": lambda header, arrays: arrays.pop("features.mel"),
}


@pytest.mark.parametrize("name", [*DAMAGES, *WEIGHTS])
def test_damaged_files_end_in_one_line(name, tmp_path, capsys):
    path = written(tmp_path, "lstm", norm=INF)[0][0]
    file = path if name in DAMAGES else tmp_path / "weights.npz"
    header, arrays = read(file)
    (DAMAGES | WEIGHTS)[name](header, arrays)
    save(file, header, arrays)
    code, out, err = run_checker(capsys, path)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_the_script_writes_what_the_checker_confirms(tmp_path, capsys):
    size = ("--hidden-size", 6, "--sample", "--threads", 1)
    train = ("--epochs", 4, "--batch-size", 8, "--bands", 6, "--lr", 3e-2, "--save-dir", tmp_path)
    assert call("lstm/train_lstm_speech_classifier.py", *size, *train).code == 0
    flags = ("--work-dir", tmp_path, "--N", 2, "--save-certificate", "--out-dir", tmp_path / "out", "--level", -80)
    for more in (("--threat", "features", "--level", 1e-4), ("--span", 0.05, 0.1)):
        done = call("lstm/bound_lstm_speech.py", *size, *flags, *more, "--overwrite")
        assert done.code == 0 and "check them by" in done.out, done.err
        (folder,) = (tmp_path / "out").rglob("certificates")
        code, out, _ = run_checker(capsys, folder)
        assert code == 0 and "confirmed" in out and len(list(folder.glob("sample_*.npz"))) >= 1
        for path in sorted((tmp_path / "out").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    done = call("lstm/bound_lstm_speech.py", *size, *flags, "--method", "curve")
    assert_one_line(done, "--save-certificate has rules for planes and bands")
