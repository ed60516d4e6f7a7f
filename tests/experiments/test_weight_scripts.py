"""The scripts of moves of weights, run tiny: training against them, radii, bits, and landscapes."""

from __future__ import annotations

import csv

import pytest
import torch
from mnist_files import write_mnist_folder
from test_bound_scripts import call

from data.mnist import load_mnist
from utils.network.checkpoint import load_checkpoint
from utils.training.certified.weights import MovingWeights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and a perceptron that was trained against moves of its weights."""
    folder = write_mnist_folder(tmp_path_factory.mktemp("weights"))
    flags = ("--layers", 6, "--epochs", 3, "--batch-size", 16, "--lr", 0.02, "--weight-decay", 0)
    flags = (*flags, "--perturb", "weights", "--perturb-eps", 0.05, "--data-dir", folder, "--save-dir", folder)
    outcome = call("mlp/train_mlp_mnist_classifier.py", *flags)
    assert outcome.code == 0, outcome.err
    return folder


def test_training_is_recorded_and_makes_radii_larger(folder):
    model, config = load_checkpoint(folder / "mlp_6_relu_weights" / "mlp")
    assert config["perturb"] == "weights" and config["perturb_eps"] == 0.05
    data = load_mnist(folder)
    verified = MovingWeights(0.05, 2.0).measure(model, data.test_x.flatten(1), data.test_y)
    assert verified["verified"] > 0.0
    torch.manual_seed(0)
    objective = MovingWeights(0.05, 2.0, "crown-ibp")
    model.requires_grad_(True)
    x, y = data.train_x[:8].flatten(1), data.train_y[:8]
    clean, late = objective.loss(model, x, y, 0.0), objective.loss(model, x, y, 1.0)
    late.backward()
    assert late.item() > clean.item()
    assert all(bool(value.grad.abs().sum() > 0) for value in model.parameters())


def test_radii_bits_and_landscapes(folder, tmp_path):
    where = ("--data-dir", folder, "--model", folder / "mlp_6_relu_weights" / "mlp")
    outcome = call("scripts/bound_weights.py", *where, "--p", 2, "--N", 6, "--attack", "--out-dir", tmp_path / "radii")
    assert outcome.code == 0, outcome.err
    with (tmp_path / "radii" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(0 < float(row["radius"]) < float(row["attacked"]) for row in rows)
    outcome = call("scripts/bound_weights.py", *where, "--bits", "--N", 6)
    assert outcome.code == 0, outcome.err
    proved, tried = (next(line for line in outcome.out.splitlines() if text in line) for text in ("proved", "really"))
    assert int(proved.split()[0]) >= int(tried.split()[5])
    assert call("scripts/bound_weights.py", *where, "--bits", "--p", 2).code == 2
    folders = ("--models", where[3], "--data-dir", folder, "--N", 3, "--grid", 3, "--out-dir", tmp_path / "drawn")
    outcome = call("scripts/draw_weight_landscape.py", *folders)
    assert outcome.code == 0, outcome.err
    with (tmp_path / "drawn" / "landscape.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and all(float(row["certified"]) < float(row["clean"]) for row in rows)
    assert (tmp_path / "drawn" / "landscape.png").stat().st_size > 1000
    assert call("benchmarks/forward_mode.py", "--quick").code == 0
