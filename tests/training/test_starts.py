"""Trainings that begin with a trained model, and the best of several short trainings that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mnist_files import write_mnist_folder
from test_bound_scripts import assert_one_line, call

from utils.network.checkpoint import load_checkpoint, save_checkpoint
from utils.training.certified.ramp import check_recipe
from utils.training.certified.recipe import LOSSES, Recipe, moment_of, rate_factor

RNN = "vanilla_rnn/train_rnn_mnist_classifier.py"
GRU = "gru/train_gru_mnist_classifier.py"
MLP = "mlp/train_mlp_mnist_classifier.py"
CNN = "cnn/train_cnn_mnist_classifier.py"
BEST = "scripts/train_from_best.py"
SMALL = ("--time-step", 4, "--hidden-size", 8, "--batch-size", 25, "--threads", 1)
BALLS = ("--certified", "ibp", "--train-eps", 0.05, "--held-back", 40)
FULL = ("--clean-share", 0, "--ramp-share", 0)
NAME = "rnn_4_8_tanh_ibp_inf_0.05/rnn"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mnist_folder(tmp_path_factory.mktemp("data"))


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)[0].state_dict()


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (RNN, (*SMALL, *BALLS, "--hidden-shift", 0.9)),
        (GRU, (*SMALL, *BALLS)),
        (MLP, ("--layers", 6, "--batch-size", 25, *BALLS)),
        (CNN, ("--width", 1, "--batch-size", 25, *BALLS)),
    ],
)
def test_a_training_begins_with_the_weights_it_is_given(tmp_path, data, script, flags):
    """Steps that are too small to be seen leave them; what is started anew has others. The config says whose."""
    flags = (*flags, "--data-dir", data, "--epochs", 1)
    assert call(script, *flags, "--save-dir", tmp_path / "first", "--seed", 3).code == 0
    (first,) = (path for path in (tmp_path / "first").glob("*/*") if path.suffix == "")
    tiny = (*flags, *FULL, "--lr", 1e-12, "--seed", 5)
    for name, more in (("on", ("--start-from", first)), ("anew", ())):
        outcome = call(script, *tiny, *more, "--save-dir", tmp_path / name)
        assert outcome.code == 0, outcome.err
    on, anew = (tmp_path / name / first.relative_to(tmp_path / "first") for name in ("on", "anew"))
    assert furthest(state_of(first), state_of(on)) < 1e-6 < furthest(state_of(first), state_of(anew))
    config, before = load_checkpoint(on)[1], load_checkpoint(first)[1]
    assert config["started_from"]["seed"] == 3 and config["seed"] == 5
    assert config["started_from"]["certified"] == before["certified"] != config["certified"]
    assert config["started_from"]["held_back_verified"] == before["held_back_verified"]
    assert "started_from" not in before and "started_from" not in load_checkpoint(anew)[1]


def test_another_kind_of_model_is_refused(tmp_path, data):
    flags = (*SMALL, "--data-dir", data, "--epochs", 1)
    assert call(RNN, *flags, "--save-dir", tmp_path).code == 0
    first = tmp_path / "rnn_4_8_tanh" / "rnn"
    for more, words in (
        (("--hidden-size", 9), "hidden_size is 8, not 9"),
        (("--activation", "relu"), "activation is tanh, not relu"),
        (("--pooling", "mean"), "pooling is last, not mean"),
    ):
        assert_one_line(call(RNN, *flags, *more, "--start-from", first, "--save-dir", tmp_path / "no"), words)
    assert_one_line(call(GRU, *flags, "--start-from", first, "--save-dir", tmp_path / "no"), "architecture is rnn")
    assert_one_line(call(RNN, *flags, "--start-from", tmp_path / "none", "--save-dir", tmp_path / "no"), "none")
    assert not (tmp_path / "no").exists()
    assert_one_line(call(RNN, *flags, *BALLS, "--clean-share", 0.1, "--ramp-share", 0, "--dry-run"), "both be 0")


def test_images_that_were_trained_on_are_not_held_back_silently(tmp_path, data):
    flags = (*SMALL, "--data-dir", data, "--epochs", 1, "--save-dir", tmp_path)
    assert call(RNN, *flags).code == 0 and call(RNN, *flags, *BALLS).code == 0
    for start, held_back, told in (
        ("rnn_4_8_tanh/rnn", 40, True),
        (NAME, 41, True),
        (NAME, 40, False),
        (NAME, 39, False),
    ):
        more = (*BALLS, "--held-back", held_back, "--start-from", tmp_path / start, "--dry-run")
        outcome = call(RNN, *flags, *more)
        assert outcome.code == 0 and ("trained on images that are held back" in outcome.out) == told


def test_balls_are_full_from_the_first_step():
    recipe = Recipe(eps=0.2, overshoot=1.0, clean=0.0, ramp=0.0, kappa=(1.0, 0.5))
    check_recipe(recipe, LOSSES)
    assert moment_of(recipe, 0.0) == moment_of(recipe, 1.0)
    assert (moment_of(recipe, 0.0).eps, moment_of(recipe, 0.0).kappa) == (0.2, 0.5)
    assert [rate_factor(recipe, at) for at in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.02])


def test_the_best_start_goes_on(tmp_path, data):
    """Of three, the most verified; what is there is not trained again, and other seeds or flags have other starts."""
    training = (RNN, *SMALL, *BALLS, "--data-dir", data, "--lr", 0.02)
    given = ("--starts", 3, "--start-epochs", 6, "--epochs", 2, "--jobs", 2, "--starts-dir", tmp_path / "starts")
    told = (*given, "--last", "--batch-size 50", "--save-dir", tmp_path / "last", "--", *training)
    outcome = call(BEST, *told)
    assert outcome.code == 0, outcome.err
    (folder,) = (tmp_path / "starts").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["seed_0", "seed_1", "seed_2"]
    for seed, share in enumerate((0.1, 0.3, 0.2)):  # whatever they came to
        model, config = load_checkpoint(folder / f"seed_{seed}" / NAME)
        save_checkpoint(folder / f"seed_{seed}" / NAME, model, config | {"held_back_verified": share})
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("rnn")}
    assert call(BEST, *told).code == 0
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("rnn")}
    config = load_checkpoint(tmp_path / "last" / NAME)[1]
    assert (config["started_from"]["seed"], config["started_from"]["held_back_verified"]) == (1, 0.3)
    assert (config["certified"]["ramp"], config["epochs"], config["batch_size"]) == (0.0, 2, 50)
    planned = call(BEST, "--seed", 1, "--dry-run", *told).out
    assert [f"--seed {seed} " in planned for seed in (3, 4, 5)] == [True] * 3 and "--seed 0" not in planned
    assert folder.name not in call(BEST, "--dry-run", *told, "--hidden-shift", 0.9).out
    assert_one_line(call(BEST, *told, "--dry-run"), "left no model")


def test_a_wide_start_goes_on_narrow(tmp_path, data):
    wide = ("--first", "--hidden-size 12", "--last", "--start-size 12", "--save-dir", tmp_path / "last")
    given = ("--starts", 1, "--start-epochs", 1, "--epochs", 2, "--starts-dir", tmp_path / "starts", *wide)
    outcome = call(BEST, *given, "--", RNN, *SMALL, *BALLS, "--data-dir", data)
    assert outcome.code == 0, outcome.err
    model, config = load_checkpoint(tmp_path / "last" / NAME)
    assert (model.rnn.hidden_size, config["started_from"]["hidden_size"]) == (8, 12)


def test_starts_without_a_bound_cannot_be_compared(tmp_path, data):
    flags = ("--starts", 2, "--start-epochs", 1, "--starts-dir", tmp_path, "--", RNN, *SMALL, "--data-dir", data)
    assert_one_line(call(BEST, *flags), "nothing to choose by")


def test_none_is_begun_after_one_has_failed(tmp_path, data, capfd):
    flags = ("--starts", 3, "--starts-dir", tmp_path, "--", RNN, *SMALL, *BALLS, "--lr", -1, "--data-dir", data)
    assert_one_line(call(BEST, *flags), "see above")
    assert capfd.readouterr().err.count("--lr") == 1 and not list(tmp_path.rglob("rnn"))
