"""Features of speech as layers: what they compute, and bounds through them against points, corners and attacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    THREATS,
    Threat,
    check_below,
    check_intervals,
    lowest_margins,
    normal,
    random_points,
)
from torch import nn

from utils.attack import pgd
from utils.bounds import BoundPass
from utils.bounds.waves import SharedSquares
from utils.certify import certified_margin, certified_radius, save_certificates
from utils.graph import power
from utils.graph.graph import Graph
from utils.graph.nodes import Frame, Linear
from utils.graph.power import BandPower
from utils.network import export_onnx
from utils.network.speech import MelFeatures, SpeechClassifier, check_features, hann
from utils.network.unroll import unroll
from utils.perturbation.lp_ball import INF
from utils.perturbation.sets import Perturbation

HOP, CHUNKS, BANDS = 8, 4, 3
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
ROWS = torch.tensor([[[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]]]).double()


def small(kind: str = "lstm", power_of: str = "bands", floor: float = 0.3) -> SpeechClassifier:
    rnn, head = KINDS[kind](BANDS, 3, batch_first=True), nn.Linear(3, 3)
    for number, parameter in enumerate((*rnn.parameters(), *head.parameters())):
        parameter.data = normal(*parameter.shape, seed=number)
    features = MelFeatures(HOP, BANDS, floor)
    model = SpeechClassifier(features, rnn, head, power=power_of, mean=1.0, std=2.0)
    return model.double().requires_grad_(False)


def waves(batch: int = 2) -> torch.Tensor:
    """Noise, of which the first sample begins in silence."""
    x = normal(batch, CHUNKS, HOP, seed=7)
    x[0, :2] = 0.0
    return x


def test_features_are_those_of_an_ordinary_transform():
    features = MelFeatures(hop=200, bands=20, floor=1e-3).double()
    x = normal(1, 3, 200, seed=1)
    found = features.energies(x)[0]
    window = np.sin(np.pi * (np.arange(400) + 0.5) / 400) ** 2
    for t in range(2):
        spectrum = np.abs(np.fft.rfft(x[0, t : t + 2].flatten().numpy() * window)) ** 2
        used = np.flatnonzero(features.mel.sum(dim=0).numpy())
        first = int(round(features.wave.shape[0] / 2))
        assert len(used) == first
        lowest = 200 + 1 - 1 - first  # Nyquist has no weight, the bins below 60 Hz have none
        expected = features.mel.numpy() @ spectrum[lowest : lowest + first]
        np.testing.assert_allclose(found[t].numpy(), expected, rtol=1e-9)


def test_white_noise_has_a_mean_energy_of_one():
    energies = MelFeatures().double().energies(normal(8, 12, 200, seed=2))
    torch.testing.assert_close(energies.mean(dim=(0, 1)), torch.ones(20).double(), rtol=0.35, atol=0.0)


@pytest.mark.parametrize("power_of", ["bands", "squares"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_what_the_module_does(kind, power_of):
    model, x = small(kind, power_of), waves(3)
    lengths = torch.tensor([4, 3, 2])
    torch.testing.assert_close(unroll(model, CHUNKS).evaluate(x), model(x), rtol=1e-12, atol=1e-12)
    found = unroll(model, CHUNKS, lengths=lengths).evaluate(x)
    torch.testing.assert_close(found, model(x, lengths), rtol=1e-12, atol=1e-12)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row], model(x[row : row + 1, :length])[0], rtol=1e-12, atol=1e-12)


CASES = [*((threat, "bands") for threat in THREATS), (Threat(INF), "squares"), (Threat(2.0), "squares")]


@pytest.mark.parametrize("threat, power_of", CASES, ids=str)
def test_bounds_hold_at_points_corners_and_attacks(threat, power_of):
    x, eps = waves()[:, :3].clamp(-1.0, 1.0), torch.full((2, 3), 0.1).double()
    if threat.ball == "frame":
        eps[1, 1] = 0.0
    graph = unroll(small("rnn", power_of), 3)
    lowest = lowest_margins(graph, x, eps, ROWS[:, :1], threat)
    for method in ("ibp", "crown", "crown-ibp"):
        bounds = BoundPass(graph, threat.around(x, eps), method)
        check_below(bounds.margin(ROWS[:, :1]), lowest, method)
    points = random_points(x, eps, threat, 4, 3)
    check_intervals(bounds, points)
    rough = threat.around(x, eps)
    rough.rough = True
    check_intervals(BoundPass(graph, rough, "ibp"), points)


def test_energies_lie_between_their_planes():
    """At corners and vertices, where the quadratic part is greatest, and along eigenvectors."""
    model, x = small(), waves()
    graph = unroll(model, CHUNKS)
    node = next(node for node in graph.nodes if isinstance(node, BandPower))
    for threat in (Threat(INF), Threat(2.0), Threat(2.0, "sequence"), Threat(1.0)):
        eps = torch.full((2, CHUNKS), 0.3).double()
        bounds = BoundPass(graph, threat.around(x, eps), "ibp")
        check_planes(node, bounds, x, extremes(node, x, eps, threat))


def extremes(node: BandPower, x, eps, threat):
    """Points of the set at which energies are great: random ones and corners along rows and eigenvectors."""
    points = [*random_points(x, eps, threat, 20, 5)]
    for weights in node.mel:
        form = (node.wave.T * weights) @ node.wave
        vector = torch.linalg.eigh(form).eigenvectors[:, -1]
        for direction in (vector, *node.wave[weights > 0][:4]):
            parts = direction.reshape(2, HOP)
            if threat.norm == INF:
                move = 0.3 * parts.sign()
            elif threat.ball == "sequence" or threat.norm == 1.0:
                move = 0.3 * parts / torch.linalg.vector_norm(parts, ord=threat.norm)
            else:
                move = 0.3 * parts / parts.norm(dim=1, keepdim=True)
            for sign in (1.0, -1.0):
                point = x.clone()
                point[:, :2] += sign * move
                points.append(point)
    return points


def check_planes(node, bounds, x, points):
    energy, kappa, slopes = node.expansion(bounds)
    low, high = bounds.interval(node)
    for point in points:
        value = node.value(point[:, 0], point[:, 1])
        line = energy + (slopes @ (point - x)[:, :2].flatten(1)[..., None]).squeeze(-1)
        for bound, other in ((line, value), (value, line + kappa), (low, value), (value, high)):
            check_below(bound, other)


@pytest.mark.parametrize("broken", ["halved", "frame", "slopes"])
def test_the_check_of_planes_catches_broken_ones(monkeypatch, broken):
    model, x = small(), waves()
    graph = unroll(model, CHUNKS)
    node = next(node for node in graph.nodes if isinstance(node, BandPower))
    node.shared.clear()
    caught = 0
    for threat in (Threat(INF), Threat(2.0)):
        eps = torch.full((2, CHUNKS), 0.3).double()
        bounds = BoundPass(graph, threat.around(x, eps), "ibp")
        energy, kappa, slopes = node.expansion(bounds)
        changed = {
            "halved": (energy, (0.4 if threat.norm == INF else 0.9) * kappa, slopes),
            "frame": (energy, 0.5 * kappa if threat.norm == 2.0 else 0.2 * kappa, slopes),  # of one frame for both
            "slopes": (energy, kappa, 0.3 * slopes),
        }[broken]
        bounds._made[node] = changed
        try:
            check_planes(node, bounds, x, extremes(node, x, eps, threat))
        except AssertionError:
            caught += 1
    assert caught == 2


SETS = (Threat(INF), Threat(2.0), Threat(2.0, "sequence"), Threat(1.0))
SIGNS = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -0.7, -0.5], [-1.0, 0.5, -1.0], [1.0, 1.0, 1.0], [0.0, -1.0, 0.0]])


def check_rows(threat) -> float:
    """Rows of energies at points where their quadratic parts are greatest; what is lost together, of that apart."""
    model, x = small(), waves()
    graph = unroll(model, CHUNKS)
    node = next(node for node in graph.nodes if isinstance(node, BandPower))
    eps = torch.full((2, CHUNKS), 0.3).double()
    bounds = BoundPass(graph, threat.around(x, eps), "ibp")
    energy, kappa, slopes = node.expansion(bounds)
    rows = SIGNS.double()[None]
    lost = node._lost(rows.clamp(max=0.0), kappa, bounds)
    whole = torch.cat([node.mel, (-SIGNS).clamp(min=0.0).double() @ node.mel])
    twin = BandPower(node.parents, node.wave, whole[whole.sum(dim=1) > 0], node.window)
    for point in extremes(twin, x, eps, threat):
        line = energy + (slopes @ (point - x)[:, :2].flatten(1)[..., None]).squeeze(-1)
        check_below(
            (rows * line[:, None]).sum(dim=-1) + lost,
            (rows * node.value(point[:, 0], point[:, 1])[:, None]).sum(dim=-1),
        )
    return float((lost[:, 0] / (rows[:, 0].clamp(max=0.0) * kappa).sum(dim=-1)).min())


@pytest.mark.parametrize("threat", SETS, ids=str)
def test_what_bands_lose_together_is_less_and_holds(threat):
    assert check_rows(threat) < 0.9


@pytest.mark.parametrize("share", [0.45, 0.0])
def test_the_check_of_rows_catches_less(monkeypatch, share):
    whole = BandPower._whole
    monkeypatch.setattr(BandPower, "_whole", lambda self, bounds: share * whole(self, bounds))
    for threat in SETS[:3]:
        with pytest.raises(AssertionError):
            check_rows(threat)


def loudest_sum(bounds_of=BoundPass) -> tuple[float, float]:
    """(what a pass says, what there is) of the greatest sum of all energies in silence, for a ball around all of it."""
    features, x = MelFeatures(HOP, BANDS, 0.3).double(), torch.zeros(1, CHUNKS, HOP).double()
    graph = Graph()
    frames = [graph.add(Frame(HOP, k)) for k in range(CHUNKS)]
    both = torch.cat((features.mel, features.mel), dim=1)
    pairs = zip(frames[:-1], frames[1:], strict=True)
    energies = [graph.add(BandPower(pair, features.wave, both, hann(2 * HOP))) for pair in pairs]
    ones = torch.ones(1, BANDS).double()
    graph.add(Linear(tuple(energies), (ones,) * len(energies), torch.zeros(1).double()))
    eps = torch.full((1, CHUNKS), 0.5).double()
    bounds = bounds_of(graph, Perturbation(x, eps, 2.0, "sequence"))
    form = torch.autograd.functional.hessian(lambda d: features.energies(d.reshape(1, CHUNKS, HOP)).sum(), x.flatten())
    return -float(bounds.lower_bound(graph.output, -ones[:, :1, None].expand(1, 1, 1))), 0.25 * float(
        torch.linalg.eigvalsh(0.5 * form)[-1]
    )


def test_windows_that_share_a_ball_cannot_all_be_at_their_worst(monkeypatch):
    said, true = loudest_sum()
    assert true <= said <= 2.8 * true  # samples are in two windows
    take = SharedSquares.take
    monkeypatch.setattr(SharedSquares, "take", lambda self, frames, lost: take(self, frames, lost / CHUNKS))
    assert loudest_sum()[0] < true  # a budget that is shared out evenly is caught
    monkeypatch.setattr(BoundPass, "lose", lambda self, frames, lost: -lost)
    assert loudest_sum()[0] > 1.4 * said


def test_eigenvalues_are_bounded_and_nearly_met():
    features = MelFeatures(hop=200, bands=20).double()
    both = torch.cat((features.mel, features.mel), dim=1)
    found = power.heaviest(features.wave, both)
    for weights, bound in zip(both, found, strict=True):
        scaled = features.wave[weights > 0] * weights[weights > 0].sqrt()[:, None]
        true = torch.linalg.eigvalsh(scaled @ scaled.T)[-1]
        assert true <= bound <= 1.2 * true


def test_silence_is_bounded_by_the_floor():
    """In silence energies are 0, and move by kappa alone."""
    model = small(floor=0.5)
    graph = unroll(model, CHUNKS)
    x, eps = torch.zeros(1, CHUNKS, HOP).double(), torch.full((1, CHUNKS), 0.1).double()
    for threat in (Threat(INF), Threat(2.0)):
        bounds = BoundPass(graph, threat.around(x, eps))
        check_below(bounds.margin(ROWS), lowest_margins(graph, x, eps, ROWS, threat))
        node = next(node for node in graph.nodes if isinstance(node, BandPower))
        assert (bounds.interval(node)[0] <= 0).all() and (bounds.interval(node)[1] < 0.2).all()


@pytest.mark.parametrize("ball", ["frame", "sequence"])
@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_bounds_hold_where_samples_move_unevenly(norm, ball):
    """Scales with zeros, of which a frame has none; and they are what a module computes that scales its input."""
    model, x, labels = small(), waves(), torch.tensor([0, 1])
    scales = normal(CHUNKS, HOP, seed=9).abs() + 0.1
    scales[0], scales[1:, :3] = 0.0, 0.0
    for eps in (0.0, 0.3):
        bound = certified_margin(model, x, labels, eps, norm=norm, ball=ball, scales=scales)
        found = pgd(model, x, labels, eps, norm=norm, ball=ball, scales=scales, steps=20, restarts=2).margin
        assert (bound.amin(dim=1) <= found + 1e-9).all()
    even = certified_margin(model, x, labels, 0.3, norm=norm, ball=ball)
    twice = certified_margin(model, x, labels, 0.15, norm=norm, ball=ball, scales=torch.full((HOP,), 2.0))
    torch.testing.assert_close(even, twice, rtol=1e-9, atol=1e-9)


def test_bounds_hold_in_single_precision_two_layers_and_one_frame():
    """Scales of the input from quiet to far beyond the floor, where sums of squares cancel nothing but are large."""
    rnn, head = nn.LSTM(BANDS, 3, 2, batch_first=True), nn.Linear(3, 3)
    for number, parameter in enumerate((*rnn.parameters(), *head.parameters())):
        parameter.data = normal(*parameter.shape, seed=number).float()
    model = SpeechClassifier(MelFeatures(HOP, BANDS, 0.3), rnn, head, mean=1.0, std=2.0).requires_grad_(False)
    labels = torch.tensor([0, 1])
    for loudness in (1e-3, 1.0, 1e3):
        for norm in (1.0, 2.0, INF):
            x, eps = loudness * waves(), 0.2 * loudness
            how = {"norm": norm, "frames": [2]}
            exact = certified_margin(model.double(), x, labels, eps, **how)
            found = pgd(model.double(), x, labels, eps, steps=20, restarts=2, **how).margin
            single = certified_margin(model.float(), x.float(), labels, eps, **how)
            assert (single.double().amin(dim=1) <= found + 1e-9).all() and (exact.amin(dim=1) <= found + 1e-9).all()
            assert (single.double() <= exact + 1e-4 * (1.0 + exact.abs())).all()


@pytest.mark.parametrize("method", ["alpha", "curve"])
def test_tuned_bounds_hold(method):
    model, x = small("rnn"), waves()[:, :3]
    labels = model(x).argmax(dim=1)
    for norm in (2.0, INF):
        eps = 0.05
        tuned = certified_margin(model, x, labels, eps, norm=norm, method=method, alpha_steps=3, curve_steps=3)
        plain = certified_margin(model, x, labels, eps, norm=norm)
        found = pgd(model, x, labels, eps, norm=norm, steps=8, restarts=1)
        assert (tuned >= plain - 1e-9).all()
        check_below(tuned.amin(dim=1), found.margin)


def test_bands_are_tighter_than_squares():
    x = waves()
    labels = small()(x).argmax(dim=1)
    for norm in (2.0, INF):
        radii = [certified_radius(small(power_of=kind), x, labels, norm=norm) for kind in ("bands", "squares")]
        assert (radii[0] >= 0.999 * radii[1]).all() and radii[0].sum() > radii[1].sum()


def test_lengths_count_chunks():
    model, x, lengths = small(), waves(3), torch.tensor([4, 3, 2])
    labels = model(x, lengths).argmax(dim=1)
    together = certified_margin(model, x, labels, 0.01, norm=INF, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = certified_margin(model, x[row : row + 1, :length], labels[row : row + 1], 0.01, norm=INF)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_is_said(tmp_path):
    with pytest.raises(ValueError, match="3 features, the recurrent layer takes 5"):
        SpeechClassifier(MelFeatures(HOP, 3), nn.GRU(5, 3, batch_first=True), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="too many"):
        MelFeatures(HOP, 30)
    with pytest.raises(ValueError, match="x has 5 values a frame, the model takes 8"):
        certified_margin(small(), torch.zeros(1, 3, 5).double(), torch.tensor([0]), 0.1)
    with pytest.raises(ValueError, match="cannot be written"):
        export_onnx(small(), CHUNKS, tmp_path / "speech.onnx")
    with pytest.raises(ValueError, match="bound energies as bands, not as squares"):
        save_certificates(tmp_path, small(power_of="squares"), waves(), torch.tensor([0, 0]), 0.1)
    with pytest.raises(ValueError, match="no rules for curved bounds"):
        save_certificates(tmp_path, small(), waves(), torch.tensor([0, 0]), 0.1, method="curve")
    for wrong in ({"hop": 8}, {"hop": 8, "bands": 3, "floor": -1.0, "rate": 8000}):
        with pytest.raises(ValueError, match="features in the config"):
            check_features(wrong, 3)
