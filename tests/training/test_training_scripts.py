"""The train scripts, run tiny from another folder: what they write, and that bad input ends in one line."""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from mnist_files import ROOT, assert_one_line_error, run_script, write_mnist_folder
from test_bound_scripts import assert_one_line, call

from data.mnist import as_frames, load_mnist
from utils.network.checkpoint import load_checkpoint
from utils.runs import cli
from utils.training import loop
from utils.training.loop import accuracy, rate_factor
from utils.training.state import STATE_NAME

RNN = "vanilla_rnn/train_rnn_mnist_classifier.py"
LSTM = "lstm/train_lstm_mnist_classifier.py"
GRU = "gru/train_gru_mnist_classifier.py"
TINY = ("--hidden-size", 8, "--epochs", 1, "--batch-size", 50, "--threads", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mnist_folder(tmp_path_factory.mktemp("data"))


def files_under(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("script", "flags", "name"),
    [
        (RNN, ("--activation", "relu", "--time-step", 4), "rnn_4_8_relu/rnn"),
        (LSTM, ("--num-layers", 2, "--bidirectional"), "lstm_4_8_2layer_bi/lstm"),
        pytest.param(GRU, ("--time-step", 14), "gru_14_8/gru", marks=pytest.mark.full),
    ],
)
def test_scripts_train_from_another_folder(tmp_path, data, script, flags, name):
    result = run_script(script, *TINY, *flags, "--data-dir", data, "--save-dir", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and "test accuracy" in result.stdout
    model, config = load_checkpoint(tmp_path / "out" / name)
    assert (tmp_path / "out" / name).with_name("training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert config["data_source"] == "mnist" and config["versions"]["torch"] == str(torch.__version__)
    assert str(tmp_path) not in str(config)
    test = load_mnist(data)
    x = as_frames(test.test_x, config["num_frames"])
    assert accuracy(model, x, test.test_y) == config["test_accuracy"]


@pytest.mark.parametrize("script", [RNN, LSTM, GRU])
def test_training_learns_and_repeats(tmp_path, data, script):
    architecture = Path(script).name.split("_")[1]
    for run in ("one", "two"):
        flags = ("--time-step", 7, "--hidden-size", 16, "--epochs", 25, "--batch-size", 25, "--lr", 0.02)
        flags = (*flags, "--weight-decay", 0.1, "--data-dir", data, "--save-dir", tmp_path / run)
        assert call(script, *flags).code == 0
    one, two = (next((tmp_path / run).rglob(architecture)) for run in ("one", "two"))
    (model, config), (again, _) = load_checkpoint(one), load_checkpoint(two)
    assert config["test_accuracy"] > 0.8
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_dry_run_writes_nothing(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = call(RNN, "--data-dir", data, "--dry-run", "--save-dir", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "nothing written" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_help_shows_defaults(tmp_path):
    result = run_script(RNN, "--help", cwd=tmp_path)
    assert result.returncode == 0
    for flag in ("--hidden-size", "--time-step", "--epochs", "--save-dir", "--data-dir", "--cuda", "--dry-run"):
        assert flag in result.stdout
    assert "(default: 30)" in result.stdout and "default: None" not in result.stdout


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--time-step", 5), "do not divide the 28 rows"),
        (("--data-dir", "nowhere"), "no MNIST in nowhere"),
        (("--save-dir", "file/models"), "file"),
        (("--epochs", 0), "--epochs"),
        (("--epoch", 1), "--epoch"),
        (("--device", "toaster"), "unknown device"),
        (("--lr", 1e30, "--epochs", 3), "diverged in epoch"),
    ],
)
def test_bad_input_is_one_line_and_keeps_earlier_results(tmp_path, data, monkeypatch, flags, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    earlier = tmp_path / "out" / "rnn_7_8_relu"
    earlier.mkdir(parents=True)
    (earlier / "rnn").write_text("earlier")
    before = files_under(tmp_path)
    usual = (*TINY, "--activation", "relu", "--data-dir", data, "--save-dir", "out")
    assert_one_line(call(RNN, *usual, *flags), word)
    assert files_under(tmp_path) == before


def test_a_mistyped_flag_is_one_line_of_the_process(tmp_path):
    assert_one_line_error(run_script(RNN, "--epoch", 1, cwd=tmp_path), "--epoch")


def test_damaged_data_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = write_mnist_folder(tmp_path / "data", 20, 10) / "MNIST" / "raw"
    (raw / "train-images-idx3-ubyte").write_bytes(b"damaged")
    assert_one_line(call(RNN, *TINY, "--data-dir", "data"), "damaged MNIST training file")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there(tmp_path, data):
    assert_one_line(call(RNN, *TINY, "--data-dir", data, "--cuda", "--save-dir", tmp_path), "no CUDA device")


def test_interruption_leaves_the_earlier_checkpoint(tmp_path, data):
    earlier = tmp_path / "rnn_7_8_tanh" / "rnn"
    earlier.parent.mkdir()
    earlier.write_text("earlier")
    flags = ("--hidden-size", "8", "--epochs", "1000000", "--threads", "1", "--save-dir", str(tmp_path))
    command = [sys.executable, str(ROOT / RNN), *flags, "--data-dir", str(data)]
    # A marker in place of the first evaluation tells that the training goes on.
    code = (
        "import runpy, signal, sys, torch; sys.argv = sys.argv[1:]; "
        # A shell's background jobs, and their children, ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.path.insert(0, {str(ROOT)!r}); import utils.training.loop as t; stock = t.accuracy; "
        "t.accuracy = lambda *a: (print('training', flush=True), stock(*a))[1]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command[1:1] = ["-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stdout.readline() == "training\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and errors.endswith("--resume continues\ninterrupted\n")
    kept = files_under(tmp_path)
    assert kept.pop(f"rnn_7_8_tanh/{STATE_NAME}") and kept == {"rnn_7_8_tanh/rnn": b"earlier"}


def test_learning_rate_rises_then_falls_to_zero():
    factors = [rate_factor(step, 100) for step in range(101)]
    assert factors[9] == factors[10] == 1 and factors[100] == pytest.approx(0, abs=1e-12)
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert rate_factor(0, 1) == 1


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("2", 2.0), ("inf", math.inf), ("2.0", 2.0)])
def test_norms(text, value):
    assert cli.norm_value(text) == value


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (cli.norm_value, ("3", "0", "-inf", "nan", "two", "")),
        (cli.positive_int, ("0", "-1", "1.5", "x", "9" * 30)),
        (cli.non_negative_int, ("-1", "1.5")),
        (cli.positive_float, ("0", "-1", "nan", "inf", "x")),
        (cli.non_negative_float, ("-1", "nan", "inf")),
    ],
)
def test_values_that_are_refused(kind, texts):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "error: two lines\n"),
        (PermissionError(13, "Permission denied", "/x"), "error: /x: Permission denied\n"),
        (OSError("disk on fire"), "error: disk on fire\n"),
    ],
)
def test_expected_errors_become_one_line(capsys, monkeypatch, error, line):
    def main():
        raise error

    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.run_main(main)
    assert caught.value.code == 2 and capsys.readouterr().err == line
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(type(error)):
        cli.run_main(main)


@pytest.mark.parametrize("error", [TypeError, AssertionError, IndexError, RuntimeError])
def test_mistakes_in_the_program_pass_through(error):
    def main():
        raise error("a bug")

    with pytest.raises(error):
        cli.run_main(main)


def test_git_commit(tmp_path):
    assert cli.git_commit(tmp_path) is None
    commit = cli.git_commit(ROOT)
    assert commit is None or len(commit) >= 40
    assert cli.git_commit(ROOT / "utils") is None


# --- interrupted trainings --------------------------------------------------------------------------------------------

TEXTS = "gru/train_gru_question_classifier.py"


def training_flags(script, data) -> tuple:
    flags = ("--hidden-size", 6, "--epochs", 4, "--batch-size", 20, "--threads", 1)
    if script == TEXTS:
        return (*flags, "--sample", "--embedding-size", 5)
    return (*flags, "--data-dir", data)


@pytest.mark.parametrize("script", [RNN, TEXTS])
def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, data, script):
    flags = training_flags(script, data)
    assert call(script, *flags, "--save-dir", tmp_path / "whole").code == 0
    stock, epochs = loop.train_epoch, []

    def interrupted(*given):
        epochs.append(given)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return stock(*given)

    with mock.patch.object(loop, "train_epoch", interrupted):
        stopped = call(script, *flags, "--save-dir", tmp_path / "parts")
    assert stopped.code == 130 and "2 of 4 epochs are kept in" in stopped.err and "--resume continues" in stopped.err
    (state,) = (tmp_path / "parts").rglob(STATE_NAME)
    assert_one_line(call(script, *flags, "--lr", 0.5, "--save-dir", tmp_path / "parts", "--resume"), "--lr was", "0.5")
    assert call(script, *flags, "--save-dir", tmp_path / "parts", "--resume").code == 0
    assert not state.exists()
    name = state.with_name(Path(script).parts[0].removeprefix("vanilla_")).relative_to(tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / run / name, weights_only=True)["state_dict"] for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_damaged_state_of_training_is_one_line(tmp_path, data):
    flags = (*training_flags(RNN, data), "--save-dir", tmp_path)
    assert call(RNN, *flags).code == 0
    (folder,) = {path.parent for path in tmp_path.rglob("rnn") if path.is_file()}
    (folder / STATE_NAME).write_bytes(b"nothing")
    before = (folder / "rnn").read_bytes()
    assert_one_line(call(RNN, *flags, "--resume"), STATE_NAME, "remove it")
    assert (folder / "rnn").read_bytes() == before
    assert "--resume would continue it" in call(RNN, *flags).out


def test_an_interrupt_while_modules_are_imported_is_one_line(tmp_path):
    """torch is replaced by a module that waits: Ctrl-C comes in the middle of an import."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / RNN)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs, and their children, ignore the signal.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=environment, preexec_fn=heed, **pipes) as run:
        assert run.stdout.readline() == "importing\n"
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=20)
    assert run.returncode == 130 and err == "interrupted\n"
