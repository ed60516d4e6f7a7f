"""The scripts of spoken digits on made-up tones: training, verdicts, resumed runs, counter-examples, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_bound_scripts import assert_one_line, call

from data.speech import as_chunks, made_up_tones, read_wav
from utils.network import load_checkpoint
from utils.network.speech.threats import SpeechThreat
from utils.runs.results import read_record
from utils.runs.rows import read_rows
from utils.speech.bound import UtteranceRow

TRAIN, BOUND = "gru/train_gru_speech_classifier.py", "gru/bound_gru_speech.py"
SIZE = ("--hidden-size", 6, "--sample", "--threads", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GRU that has learnt the tones."""
    folder = tmp_path_factory.mktemp("speech")
    done = call(TRAIN, *SIZE, "--epochs", 6, "--batch-size", 8, "--bands", 8, "--lr", 3e-2, "--save-dir", folder)
    assert done.code == 0, done.err
    return folder


def bound(folder, *flags):
    return call(BOUND, *SIZE, "--work-dir", folder, "--N", 3, *flags)


def rows_of(folder):
    return read_rows(folder / "certified_bound.csv", UtteranceRow)[0]


def test_a_trained_model_is_saved_with_its_features(folder):
    model, config = load_checkpoint(folder / "gru_6" / "gru")
    assert config["features"] == {"hop": 200, "bands": 8, "floor": 1e-3, "rate": 8000}
    assert config["test_accuracy"] > 0.5 and len(config["input_mean"]) == 8
    one = made_up_tones().test[0]
    assert model(as_chunks([one], 200)[0]).shape == (1, 10)


def test_verdicts_are_those_of_the_library_and_resumed(folder, tmp_path):
    done = bound(folder, "--out-dir", tmp_path / "out", "--level", -70)
    assert done.code == 0, done.err
    (results,) = (tmp_path / "out").rglob("certified_bound.csv")
    rows = rows_of(results.parent)
    assert {row.verdict for row in rows} == {"verified"} and all(row.margin > 0 for row in rows)
    assert read_record(results.parent)["summary"]["verified"] == len(rows)
    kept = results.read_text()
    results.write_text("".join(kept.splitlines(keepends=True)[:-1]))
    again = bound(folder, "--out-dir", tmp_path / "out", "--level", -70, "--resume")
    assert again.code == 0 and f"{len(rows) - 1} of {len(rows)} rows are there" in again.out
    assert [row.name for row in rows_of(results.parent)] == [row.name for row in rows]


@pytest.mark.parametrize("method", ["alpha", "curve", "bab"])
def test_tuned_methods_keep_a_time_limit_and_are_no_worse_than_planes(folder, tmp_path, method):
    flags = ("--level", -50, "--N", 4, "--no-attack")
    for name, own in (("plain", ()), ("tuned", ("--method", method, "--time-limit", 0.5))):
        done = bound(folder, "--out-dir", tmp_path / name, *flags, *own)
        assert done.code == 0, done.err
    pairs = zip(rows_of(tmp_path / "plain"), rows_of(tmp_path / "tuned"), strict=True)
    assert all(tuned.margin >= plain.margin - 1e-9 and tuned.seconds < 1.5 for plain, tuned in pairs)


def test_loud_noise_is_falsified_and_can_be_heard(folder, tmp_path):
    done = bound(folder, "--out-dir", tmp_path, "--level", -6, "--method", "ibp", "--attack-steps", 20)
    assert done.code == 0, done.err
    (results,) = tmp_path.rglob("certified_bound.csv")
    broken = [row for row in rows_of(results.parent) if row.verdict == "falsified"]
    assert broken and all(row.attack_margin < 0 for row in broken)
    clean = {one.name: one for one in made_up_tones().test}
    for row in broken:
        found, own = read_wav(results.parent / "falsified" / f"{row.name}.wav"), clean[row.name]
        scale = min(own.peak, 1.0 / np.abs(own.samples).max())
        assert len(found) == len(own.samples) and np.abs(found - scale * own.samples).max() > 1e-3


def test_levels_and_radii_are_inverse():
    x = torch.randn(3, 4, 200, dtype=torch.float64)
    for kind, level in (("noise", -60.0), ("snr", 30.0), ("features", 0.02)):
        threat = SpeechThreat(kind, level)
        torch.testing.assert_close(threat.level_of(threat.eps(x), x), torch.full((3,), level).double())
    assert float(SpeechThreat("noise", -20.0).eps(x)[0]) == pytest.approx(0.1)
    assert float(SpeechThreat("snr", 20.0).eps(x)[1]) == pytest.approx(0.1 * float(x[1].norm()))


def test_a_span_moves_the_chunks_that_lie_in_it(folder):
    model, _ = load_checkpoint(folder / "gru_6" / "gru")
    settings = SpeechThreat("noise", -60.0, (0.03, 0.05)).settings(model, 5)
    assert settings["frames"].tolist() == [False, True, False, False, False] and settings["norm"] == math.inf
    with pytest.raises(ValueError, match="no chunk lies between"):
        SpeechThreat("noise", -60.0, (3.0, 4.0)).settings(model, 5)


def test_searched_levels_lie_below_attacked_ones_and_figures_are_drawn(folder, tmp_path):
    done = call(
        *(BOUND, *SIZE, "--work-dir", folder, "--N", 1, "--out-dir", tmp_path, "--threat", "snr", "--level", 40),
        *("--search", "--tol", 0.5, "--attack-steps", 2, "--draw", 1, "--method", "ibp", "--span", 0, 0.05),
    )
    assert done.code == 0, done.err
    (results,) = tmp_path.rglob("certified_bound.csv")
    (row,) = rows_of(results.parent)
    assert row.certified_level > row.attacked_level and (results.parent / "spectrograms.png").stat().st_size > 1000


def test_a_radius_above_an_attack_s_stops_the_script(folder, tmp_path, monkeypatch):
    from utils.speech import bound as module

    monkeypatch.setattr(module, "certified_radius", lambda model, x, labels, **how: torch.full((len(x),), 1e3))
    flags = ("--search", "--tol", 0.5, "--attack-steps", 2, "--method", "ibp", "--out-dir", tmp_path)
    done = call(BOUND, *SIZE, "--work-dir", folder, "--N", 1, *flags)
    assert done.code == 3 and done.err.startswith("CONTRADICTION: ") and done.err.count("\n") == 1
    assert len(list(tmp_path.rglob("contradiction.pt"))) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--N", 999), "--N 999 is more than the 40 test utterances of tones"),
        (("--search", "--method", "curve"), "--search has no time limit: leave out --method curve"),
        (("--hidden-size", 7), "train it by python gru/train_gru_speech_classifier.py --hidden-size 7"),
        (("--level", 1e9), "levels must be from -300 to 300 for noise, not 1000000000.0"),
        (("--threat", "features", "--level", -1), "levels must be from 0 to 300 for features, not -1.0"),
        (("--span", 8, 9), "no chunk lies between 8 and 9 seconds"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, flags, message):
    assert_one_line(bound(folder, *flags), message)
