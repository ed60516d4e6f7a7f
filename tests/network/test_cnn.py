"""Convolutional classifiers: their sizes, their checkpoints, and that what is read of them is sound."""

from __future__ import annotations

import pytest
import torch

from utils.certify import certified_margin
from utils.network import CNN_KINDS, CheckpointError, build_model, load_checkpoint, make_cnn, save_checkpoint
from utils.network.checkpoint import model_name


def config_of(kind: str = "small", **changes):
    config = {"architecture": "cnn", "kind": kind, "batch_norm": False, "width": 2, "channels": 3, "size": 16}
    return config | {"num_classes": 4, "input_mean": [0.4, 0.5, 0.6], "input_std": 0.25} | changes


@pytest.mark.parametrize(
    ("kind", "channels", "size", "count"), [("small", 1, 28, 166_406), ("large", 1, 28, 1_974_762)]
)
def test_published_sizes(kind, channels, size, count):
    """Parameters of Wong and Kolter's networks for MNIST."""
    assert sum(weight.numel() for weight in make_cnn(kind, channels, size).parameters()) == count


@pytest.mark.parametrize("kind", CNN_KINDS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_images_of_both_data_sets(kind, channels, size):
    model = make_cnn(kind, channels, size, classes=7, width=2, mean=[0.5] * channels, std=0.25).eval()
    x = torch.rand(2, channels, size, size)
    assert model(x).shape == (2, 7)


def test_normalisation_is_the_model_s_own():
    plain, own = (make_cnn("small", 3, 16, width=2, **how) for how in ({}, {"mean": [0.1, 0.2, 0.3], "std": 0.5}))
    own.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(own(x), plain((x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5))


def test_what_makes_no_network():
    with pytest.raises(ValueError, match="kind of network must be one of small, large"):
        make_cnn("tiny")
    with pytest.raises(ValueError, match=r"images must be \(batch, channels"):
        make_cnn("small")(torch.rand(2, 28, 28))
    with pytest.raises(ValueError, match="too small for densenet"):
        make_cnn("densenet", size=8, width=2)


@pytest.mark.parametrize("kind", CNN_KINDS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_checkpoints(tmp_path, kind, batch_norm):
    config = config_of(kind, batch_norm=batch_norm)
    model, x = build_model(config), torch.rand(3, 3, 16, 16)
    model(x)  # moves the running statistics
    path = tmp_path / model_name(config) / "cnn"
    save_checkpoint(path, model, config)
    loaded, kept = load_checkpoint(path)
    assert kept == config and torch.equal(loaded(x), model.eval()(x))


def test_names():
    assert model_name(config_of()) == "cnn_small_2"
    assert model_name(config_of(batch_norm=True, recipe="ibp_inf_0.1")) == "cnn_small_2_bn_ibp_inf_0.1"
    assert model_name(config_of("cnn7", batch_norm=True)) == model_name(config_of("cnn7")) == "cnn_cnn7_2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "huge"}, "kind in the config"),
        ({"width": 0}, "width in the config"),
        ({"batch_norm": 1}, "batch_norm in the config"),
        ({"input_mean": [0.5, 0.5]}, "input_mean in the config"),
        ({"size": 20}, "the config makes it"),
    ],
)
def test_configs_of_another_model(tmp_path, change, message):
    config = config_of(size=16)
    model = build_model(config)
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "cnn", model, config | change)


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("mnist_classifier/cnn_small_16", "cnn/train_cnn_mnist_classifier.py --model small --width 16"),
        (
            "cifar10_classifier/cnn_wide_resnet_4_ibp_inf_0.1_clip",
            "cnn/train_cnn_cifar_classifier.py --model wide_resnet --width 4 --certified ibp --p inf --train-eps 0.1 "
            "--clip",
        ),
        ("x/cnn_large_8_bn", "cnn/train_cnn_mnist_classifier.py --model large --width 8 --batch-norm"),
    ],
)
def test_a_missing_model_s_command(tmp_path, folder, command):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / folder / "cnn")
    assert str(caught.value).endswith(f"train it by python {command}")


@pytest.mark.parametrize("kind", CNN_KINDS)
def test_bounds_of_every_kind_lie_below_attacks(kind):
    torch.manual_seed(0)
    model = make_cnn(kind, 1, 16, width=2, classes=4)
    model(torch.rand(8, 1, 16, 16))
    model, x, y = model.eval(), torch.rand(2, 1, 16, 16), torch.tensor([0, 1])
    methods = ("ibp", "crown-ibp") if kind == "densenet" else ("ibp", "crown-ibp", "crown")  # whose crown is slow
    margins = {method: certified_margin(model, x, y, 0.02, norm="inf", method=method) for method in methods}
    points = [x + 0.02 * (2 * torch.rand_like(x) - 1).sign() for _ in range(20)]
    with torch.no_grad():
        scores = torch.stack([model(point) for point in points])
    others = [[c for c in range(4) if c != int(label)] for label in y]
    found = torch.stack([(scores[:, i, y[i], None] - scores[:, i, others[i]]).amin(dim=0) for i in range(2)])
    for margin in margins.values():
        assert (margin <= found + 1e-6).all()
        assert (margin >= margins["ibp"] - 1e-5).all()
