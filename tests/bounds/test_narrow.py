"""Waveforms in few coordinates: operands stay between their lines for any basis, and sums of squares are bounded."""

from __future__ import annotations

import pytest
import torch
from helpers import check_below, normal
from test_speech import BANDS, CHUNKS, ROWS, small
from torch import nn

from utils.attack import pgd
from utils.bounds import CurvedPass
from utils.bounds.waves import Narrow
from utils.certify import certified_margin
from utils.network.models import SequenceClassifier
from utils.network.speech import MelFeatures, SpeechClassifier
from utils.network.unroll import unroll
from utils.perturbation.lp_ball import INF
from utils.perturbation.sets import Perturbation

WIDE = 24  # samples of a chunk, of which two windows of bands read it in 6 ways
SETS = [(INF, "frame"), (2.0, "frame"), (2.0, "sequence")]


def wide() -> SpeechClassifier:
    model = small("gru")
    return SpeechClassifier(MelFeatures(WIDE, BANDS, 0.3), model.rnn, model.head, mean=1.0, std=2.0).double()


def moves(norm: float, ball: str, eps: float) -> list[torch.Tensor]:
    found = []
    for seed in range(60):
        move = normal(2, CHUNKS, WIDE, seed=seed)
        if norm == INF:
            move = move.sign()
        elif ball == "frame":
            move = move / move.norm(dim=-1, keepdim=True)
        else:
            move = move / move.flatten(1).norm(dim=1)[:, None, None]
        found.append(eps * move)
    return found


def check_operands(norm: float, ball: str, eps: float = 0.1) -> None:
    """Operands of curves, at points of the set, are where linear parts and the rest say; so are squares and lines."""
    model, x = wide(), normal(2, CHUNKS, WIDE, seed=7)
    graph = unroll(model.requires_grad_(False), CHUNKS)
    bounds = CurvedPass(graph, Perturbation(x, torch.full((2, CHUNKS), eps).double(), norm, ball))
    bounds.margin(ROWS)
    assert bounds._narrow is not None and max(bounds._narrow.widths) <= 2 * BANDS
    chosen = [node for node, known in bounds._linear.items() if node.index > max(f.index for f in graph.frames)]
    jacobian = torch.cat([bounds._linear[node].slopes for node in chosen], dim=1)
    weights = normal(2, 5, jacobian.shape[1], seed=3).abs()
    most = bounds._joint_linear(weights, jacobian, None, bounds._frames)
    lines = [3.0 * normal(2, 5, WIDE, seed=20 + t) for t in range(CHUNKS)]
    most_beside = bounds._deviation(lines) + bounds._joint_linear(weights, jacobian, lines, bounds._frames)
    for move in moves(norm, ball, eps):
        y = torch.cat([(move[:, t, None] @ basis)[:, 0] for t, basis in enumerate(bounds._narrow.bases)], dim=-1)
        values = graph._values(x + move, tuple(chosen))
        for node in chosen:
            known = bounds._linear[node]
            away = (values[node.index] - known.center - (known.slopes @ y[..., None]).squeeze(-1)).abs()
            check_below(away, known.remainder + 1e-12, node.__class__.__name__)
        squares = (weights * ((jacobian @ y[..., None]).squeeze(-1) ** 2)[:, None]).sum(dim=-1)
        check_below(squares, most)
        line = sum((part @ move[:, t, :, None]).squeeze(-1) for t, part in enumerate(lines))
        check_below(line.abs() + squares, most_beside)


@pytest.mark.parametrize("norm, ball", SETS)
def test_operands_are_between_their_lines(norm, ball):
    check_operands(norm, ball)


@pytest.fixture
def poor(monkeypatch):
    """Bases that miss all but one direction."""
    make = Narrow.__init__

    def cut(self, *arguments):
        make(self, *arguments)
        self.bases = [basis[..., :1] for basis in self.bases]
        self.widths = [1] * len(self.bases)

    monkeypatch.setattr(Narrow, "__init__", cut)


@pytest.mark.parametrize("norm, ball", SETS)
def test_a_basis_that_misses_directions_is_sound(norm, ball, poor):
    check_operands(norm, ball)


def test_what_a_basis_misses_must_be_counted(poor, monkeypatch):
    reduced = Narrow.reduced
    monkeypatch.setattr(
        Narrow, "reduced", lambda self, parts: (reduced(self, parts)[0], [0.0 * part for part in parts])
    )
    with pytest.raises(AssertionError):
        check_operands(INF, "frame")


def test_a_smaller_ball_is_caught(monkeypatch):
    ellipsoid = Narrow.ellipsoid

    def smaller(self, *arguments):
        scales, size = ellipsoid(self, *arguments)
        return scales, 0.05 * size

    monkeypatch.setattr(Narrow, "ellipsoid", smaller)
    with pytest.raises(AssertionError):
        check_operands(INF, "frame")


@pytest.mark.parametrize("norm, ball", SETS)
def test_curves_of_waveforms_hold_and_are_no_worse_than_planes(norm, ball):
    model, x = wide(), normal(2, CHUNKS, WIDE, seed=7)
    labels = model(x).argmax(dim=1)
    eps = 0.02 if norm == INF else 0.1
    how = {"norm": norm, "ball": ball}
    curved = certified_margin(model, x, labels, eps, method="curve", alpha_steps=2, curve_steps=3, **how)
    assert (curved >= certified_margin(model, x, labels, eps, **how) - 1e-9).all()
    check_below(curved.amin(dim=1), pgd(model, x, labels, eps, steps=10, restarts=1, **how).margin)


def test_frames_that_others_read_keep_their_coordinates():
    """Chunks with as many directions as samples, and frames of an ordinary network."""

    plain = SequenceClassifier(nn.GRU(WIDE, 3, batch_first=True), nn.Linear(3, 3)).double()
    for model, width in ((small("gru"), 8), (plain, WIDE)):
        graph = unroll(model.requires_grad_(False), CHUNKS)
        x = normal(2, CHUNKS, width, seed=7)
        bounds = CurvedPass(graph, Perturbation(x, torch.full((2, CHUNKS), 0.01).double(), INF))
        assert bounds._narrow is None
