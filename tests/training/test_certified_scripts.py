"""Certified training by the train scripts: what it writes, resumes and shares, and that bound scripts find it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mnist_files import ROOT, write_mnist_folder
from test_bound_scripts import assert_one_line, call

from data.mnist import as_frames, load_mnist
from utils.certify import certified_margin
from utils.network.checkpoint import load_checkpoint
from utils.network.models import SequenceClassifier
from utils.training.held_back import hold_back

RNN = "vanilla_rnn/train_rnn_mnist_classifier.py"
LSTM = "lstm/train_lstm_mnist_classifier.py"
GRU = "gru/train_gru_mnist_classifier.py"
SMALL = ("--time-step", 4, "--hidden-size", 8, "--batch-size", 25, "--threads", 1, "--held-back", 40)
BALLS = ("--certified", "ibp", "--train-eps", 0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mnist_folder(tmp_path_factory.mktemp("data"))


def weights(path: Path) -> list[torch.Tensor]:
    return list(load_checkpoint(path)[0].state_dict().values())


@pytest.mark.parametrize(
    ("script", "flags", "name"),
    [
        (RNN, ("--pooling", "mean", *BALLS), "rnn_4_8_tanh_mean_ibp_inf_0.05/rnn"),
        (RNN, ("--certified", "crown-ibp", "--train-eps", 1, "--p", 0), "rnn_4_8_tanh_crown-ibp_0_1/rnn"),
        (
            LSTM,
            ("--certified", "crown-ibp", "--train-eps", 0.1, "--p", 2, "--loss-fusion"),
            "lstm_4_8_crown-ibp_2_0.1/lstm",
        ),
        (
            GRU,
            ("--certified", "sabr", "--train-eps", 0.1, "--frames", 0, 2, "--clip"),
            "gru_4_8_sabr_inf_0.1_frames_0_2_clip/gru",
        ),
        (
            GRU,
            ("--certified", "mtl-ibp", "--train-eps", 1, "--p", 2, "--ball", "sequence"),
            "gru_4_8_mtl-ibp_2_1_sequence/gru",
        ),
    ],
)
def test_what_a_training_writes(tmp_path, data, script, flags, name):
    outcome = call(script, *SMALL, *flags, "--epochs", 1, "--data-dir", data, "--save-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "verified test accuracy" in outcome.out
    _, config = load_checkpoint(tmp_path / name)
    assert Path(name).parent.name.endswith(config["recipe"])
    assert config["certified"]["loss"] == flags[flags.index("--certified") + 1]
    assert 0.0 <= config["test_verified"] <= config["test_accuracy"] <= 1.0
    assert (tmp_path / name).with_name("training_curve.png").stat().st_size > 0


def test_training_for_the_bound_pays_and_its_figures_are_true(tmp_path, data):
    """Verified shares of a certified and a plain model of equal size; the former's is what its config says."""
    shares, test = {}, load_mnist(data)
    x, y = as_frames(test.test_x, 4), test.test_y
    for name, flags in (("certified", BALLS), ("plain", ())):
        usual = SMALL if flags else SMALL[:-2]
        flags = (*usual, *flags, "--epochs", 40, "--lr", 0.02, "--data-dir", data, "--save-dir", tmp_path / name)
        assert call(RNN, *flags).code == 0
        model, config = load_checkpoint(next((tmp_path / name).rglob("rnn")))
        verified = (certified_margin(model, x, y, 0.05, norm="inf", method="ibp") > 0).all(dim=1)
        shares[name] = verified.double().mean().item()
    assert shares["certified"] > shares["plain"] + 0.2
    kept = json.loads(json.dumps(load_checkpoint(next((tmp_path / "certified").rglob("rnn")))[1]["test_verified"]))
    assert kept == pytest.approx(shares["certified"], abs=1.5 / len(y))  # single against double precision


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, data, monkeypatch):
    from utils.training.certified.objective import Certified

    flags = (*SMALL, *BALLS, "--shift", 1, "--epochs", 4, "--data-dir", data)
    assert call(RNN, *flags, "--save-dir", tmp_path / "whole").code == 0
    stock, calls = Certified.measure, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stock(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Certified, "measure", interrupted)
        assert call(RNN, *flags, "--save-dir", tmp_path / "cut").code != 0
    name = "rnn_4_8_tanh_ibp_inf_0.05/rnn"
    assert not (tmp_path / "cut" / name).exists()
    assert call(RNN, *flags, "--save-dir", tmp_path / "cut", "--resume").code == 0
    pairs = zip(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("script", "checkpoint"), [(RNN, "rnn"), (LSTM, "lstm"), (GRU, "gru")])
def test_images_are_shifted_where_that_is_asked_for(tmp_path, data, script, checkpoint):
    found, flags = [], (*SMALL, *BALLS, "--epochs", 1, "--data-dir", data)
    for shift in ((), ("--shift", 1)):
        folder = tmp_path / f"shift{len(shift)}"
        assert call(script, *flags, *shift, "--save-dir", folder).code == 0
        path = next(folder.rglob(checkpoint))
        found.append((weights(path), load_checkpoint(path)[1].get("shift")))
    (still, none), (moved, one) = found
    assert none is None and one == 1
    assert any(not torch.allclose(a, b) for a, b in zip(still, moved, strict=True))
    outcome = call(script, *flags, "--shift", 28, "--dry-run")
    assert outcome.code == 2 and "--shift 28 moves images of 28 x 28 pixels out of their frame" in outcome.err


@pytest.mark.full
@pytest.mark.parametrize("more", [("--shift", 1), ("--start-size", 12, "--narrow-shares", 0, 1)])
def test_two_processes_train_the_weights_of_one(tmp_path, data, more):
    flags = [str(word) for word in (*SMALL, *BALLS, *more, "--epochs", 2, "--data-dir", data)]
    assert call(RNN, *flags, "--save-dir", tmp_path / "one").code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / RNN), *flags, "--save-dir", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.count("verified test accuracy") == 1, done.stderr
    name = "rnn_4_8_tanh_ibp_inf_0.05/rnn"
    for one, other in zip(weights(tmp_path / "one" / name), weights(tmp_path / "two" / name), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_bound_scripts_find_the_model(tmp_path, data):
    flags = ("--pooling", "mean", "--time-step", 4, "--hidden-size", 8)
    usual = ("--data-dir", data, "--threads", 1)
    trained = (*SMALL, *flags, *BALLS, "--epochs", 15, "--lr", 0.02, *usual, "--save-dir", tmp_path)
    assert call("gru/train_gru_mnist_classifier.py", *trained).code == 0
    bounded = (*flags, "--recipe", "ibp_inf_0.05", "--N", 20, "--method", "ibp", *usual, "--work-dir", tmp_path)
    outcome = call("gru/bound_gru.py", *bounded)
    assert outcome.code == 0 and "gru_4_8_mean_ibp_inf_0.05" in outcome.out, outcome.err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--train-eps", 0.1), "give --certified too"),
        (("--held-back", 10), "give --certified too"),
        (("--certified", "ibp"), "needs --train-eps"),
        ((*BALLS, "--beta", 1, 0), "--beta has no effect with --certified ibp"),
        ((*BALLS, "--loss-fusion"), "--loss-fusion has no effect"),
        ((*BALLS, "--small-box", 0.5), "it is for sabr"),
        ((*BALLS[:2], "--train-eps", 1, "--p", 0, "--clip"), "--p 0 lets values change"),
        ((*BALLS, "--frames", 4), "--frames must be from 0 to 3"),
        ((*BALLS, "--held-back", 10**6), "leaves nothing"),
        ((*BALLS, "--ramp-share", 0.01), "the ramp must end after the clean steps"),
        ((*BALLS, "--held-back", 40, "--activation", "relu", "--lr", 1e30, "--epochs", 3), "diverged in epoch"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, data, flags, word):
    usual = ("--time-step", 4, "--hidden-size", 4, "--epochs", 1, "--data-dir", data, "--save-dir", tmp_path)
    assert_one_line(call(RNN, *usual, *flags), word)
    assert not list(tmp_path.rglob("rnn"))


def test_what_is_held_back_is_the_same_for_every_seed():
    x, y = torch.arange(20.0).reshape(20, 1, 1), torch.arange(20)
    torch.manual_seed(3)
    (train_x, watched_x), (train_y, watched_y) = hold_back([x, x[:5]], [y, y[:5]], 6)
    assert sorted(torch.cat((train_y, watched_y)).tolist()) == list(range(20)) and len(watched_y) == 6
    assert torch.equal(train_x.flatten().long(), train_y) and torch.equal(watched_x.flatten().long(), watched_y)
    torch.manual_seed(4)
    assert torch.equal(hold_back([x, x], [y, y], 6)[1][1], watched_y)
    assert hold_back([x, x[:5]], [y, y[:5]], None)[0][1] is not None


def test_any_module_can_be_trained():
    """The losses take whatever can be read, not only the scripts' models."""
    from torch import nn

    from utils.training.certified.objective import Certified
    from utils.training.certified.recipe import Recipe

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.rand(60, 3, 4)
    y = x.sum(dim=2).argmax(dim=1)
    objective, adam = Certified(Recipe(eps=0.02)), torch.optim.Adam(model.parameters(), 0.02)
    before = objective.measure(model, x, y)["verified"]
    for step in range(150):
        adam.zero_grad()
        objective.loss(model, x, y, step / 150).backward()
        adam.step()
    assert objective.measure(model, x, y)["verified"] > before + 0.3
    assert isinstance(model, nn.Module) and not isinstance(model, SequenceClassifier)


def test_the_images_held_back_are_those_of_the_training(tmp_path, data):
    """The benchmark's shares of clean and, by intervals, verified images are those that the training kept."""
    flags = (*SMALL, *BALLS, "--epochs", 30, "--lr", 0.02, "--data-dir", data, "--save-dir", tmp_path)
    assert call(RNN, *flags).code == 0
    path = tmp_path / "rnn_4_8_tanh_ibp_inf_0.05" / "rnn"
    _, config = load_checkpoint(path)
    usual = ("--data-dir", data, "--threads", 1)
    outcome = call("benchmarks/verify_held_back.py", path, *usual)
    assert outcome.code == 0, outcome.err
    name, *shares, count = outcome.out.splitlines()[-1].split(" | ")
    clean, unbroken, intervals, verified = (float(share) / 100 for share in shares)
    assert (name, count) == (path.parent.name, "40")
    assert clean == pytest.approx(config["held_back_accuracy"], abs=1e-3)
    assert intervals == pytest.approx(config["held_back_verified"], abs=1e-3)
    assert 0.0 < intervals <= verified <= unbroken <= clean < 1.0
    plain = ROOT / "models" / "mnist_classifier" / "rnn_4_32_tanh" / "rnn"
    assert_one_line(call("benchmarks/verify_held_back.py", plain, *usual), "from certified training")
