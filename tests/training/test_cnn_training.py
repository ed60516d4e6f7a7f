"""Certified training of convolutional networks: normalisation over the clean batch, changed images, scripts."""

from __future__ import annotations

import copy

import pytest
import torch
from cifar_files import make_images
from mnist_files import write_mnist_folder
from test_bound_scripts import assert_one_line, call
from torch import nn

from data.mnist import as_frames
from utils.certify import certified_margin
from utils.network import CNN_KINDS, load_checkpoint, make_cnn
from utils.training.certified.clean_pass import clean_pass
from utils.training.certified.losses import LOSSES
from utils.training.certified.objective import Certified
from utils.training.certified.recipe import Recipe
from utils.training.images.changes import random_change
from utils.training.images.cnn import settle_statistics
from utils.training.images.mnist import shift_of_frames

MNIST, CIFAR = "cnn/train_cnn_mnist_classifier.py", "cnn/train_cnn_cifar_classifier.py"
SMALL = ("--width", 2, "--batch-size", 50, "--threads", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mnist_folder(tmp_path_factory.mktemp("data"))


def batch(seed: int = 0, count: int = 6, size: int = 12):
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, size, size, generator=random, dtype=torch.float64)
    return x, torch.randint(10, (count,), generator=random)


def network(kind: str = "small", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make_cnn(kind, 1, 12, width=2, batch_norm=True, mean=0.5, std=0.25).double()


@pytest.mark.parametrize("kind", CNN_KINDS)
def test_with_no_room_the_loss_and_its_gradients_are_those_of_plain_training(kind):
    """Statistics of the batch included, through which gradients flow, too; running ones move in the same way."""
    torch.manual_seed(0)
    model = make_cnn(kind, 1, 16, width=2, batch_norm=True).double()
    twin = copy.deepcopy(model)
    x, y = batch(size=16)
    objective = Certified(Recipe("ibp", eps=1e-13, input_penalty=0.0))
    objective.loss(model, x, y, 1.0).backward()
    nn.functional.cross_entropy(twin(x), y).backward()
    for mine, plain in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-4)
    for mine, plain in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_bounds_what_attacks_find_under_the_same_statistics(loss):
    """Sabr bounds its small ball only, and mtl-ibp has a share of an attack: they are above the clean loss."""
    model, (x, y) = network(), batch()
    recipe = Recipe(loss, eps=0.05, kappa=(0.0, 0.0), beta=(0.5, 0.5), overshoot=1.0, input_penalty=0.0)
    value = float(Certified(recipe).loss(model, x, y, 1.0).detach())
    assert model.training and all(layer.training for layer in model.modules())
    with clean_pass(model, x):
        found = max(
            float(nn.functional.cross_entropy(model(x + 0.05 * (2 * torch.rand_like(x) - 1).sign()), y).detach())
            for _ in range(50)
        )
        clean = float(nn.functional.cross_entropy(model(x), y).detach())
    assert found > clean and value > (clean if loss in ("sabr", "mtl-ibp") else found)


def test_running_statistics_in_place_of_the_batch_s_would_be_noticed():
    model, (x, y) = network(), batch()
    own = float(Certified(Recipe("ibp", eps=0.05, input_penalty=0.0)).loss(model, x, y, 1.0).detach())
    model.eval()
    assert own != pytest.approx(
        float(Certified(Recipe("ibp", eps=0.05, input_penalty=0.0)).loss(model, x, y, 1.0).detach()), rel=1e-3
    )


def test_a_normalisation_that_is_used_twice_is_refused():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 4), norm)
    with pytest.raises(ValueError, match="used twice"), clean_pass(model, torch.rand(5, 3)):
        pass
    assert not norm._forward_pre_hooks


def test_a_failure_leaves_the_layers_as_they_were():
    model = network()
    before = [buffer.clone() for buffer in model.buffers() if buffer.is_floating_point()]
    x, _ = batch()
    with pytest.raises(RuntimeError), clean_pass(model, x):
        raise RuntimeError
    assert all(layer.training for layer in model.modules())
    after = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))  # running ones have moved
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_settled_statistics_are_those_of_all_images():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))
    x = torch.randn(6000, 2, 2) * torch.tensor([1.0, 5.0]) + 3.0
    model[1].running_mean += 7.0
    settle_statistics(model, x)
    torch.testing.assert_close(model[1].running_mean, x.flatten(1).mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[1].running_var, x.flatten(1).var(dim=0), rtol=2e-2, atol=0.0)
    assert not model.training and model[1].momentum == 0.1
    settle_statistics(nn.Linear(2, 2), x)


# --- changed images ---


def test_shifts_and_mirror_images_are_those_and_no_others():
    image = torch.rand(1, 2, 4, 5)
    padded = nn.functional.pad(image, (1,) * 4)
    known = []
    for mirrored in (padded, padded.flip(3)):
        known += [mirrored[0, :, r : r + 4, c : c + 5] for r in range(3) for c in range(3)]
    found = random_change(1, True)(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    seen = {next(i for i, one in enumerate(known) if torch.equal(one, changed)) for changed in found}
    assert seen == set(range(18))
    still = random_change(1, False)(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    assert len({next(i for i, one in enumerate(known) if torch.equal(one, changed)) for changed in still}) == 9
    assert random_change(0, False) is None


def test_slices_of_an_image_are_moved_together():
    images = torch.rand(1, 1, 28, 28).expand(200, -1, -1, -1)
    frames = as_frames(images.squeeze(1), 7)
    moved = shift_of_frames(1)(frames, torch.Generator().manual_seed(0))
    wanted = random_change(1, False)(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved, as_frames(wanted.squeeze(1), 7)) and moved.shape == frames.shape
    assert len({tuple(one.flatten().tolist()) for one in moved}) == 9
    assert shift_of_frames(0) is None


# --- the scripts ---


def test_what_a_training_writes_and_that_its_figures_are_true(tmp_path, data):
    flags = ("--batch-norm", "--certified", "ibp", "--train-eps", 0.05, "--clip", "--held-back", 40)
    outcome = call(MNIST, *SMALL, *flags, "--epochs", 3, "--lr", 0.01, "--data-dir", data, "--save-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "l_inf 0.05 around every image" in outcome.out
    path = tmp_path / "cnn_small_2_bn_ibp_inf_0.05_clip" / "cnn"
    model, config = load_checkpoint(path)
    assert config["certified"]["input_penalty"] == 0.0 and path.with_name("training_curve.png").exists()
    from data.mnist import load_mnist

    test = load_mnist(data)
    x = test.test_x[:, None]
    margins = certified_margin(model, x, test.test_y, 0.05, norm="inf", method="ibp", clip=(0.0, 1.0))
    assert (margins > 0).all(dim=1).double().mean().item() == pytest.approx(config["test_verified"], abs=0.011)


def test_a_resumed_training_ends_with_equal_weights_changed_images_included(tmp_path, data):
    flags = (*SMALL, "--batch-norm", "--shift", 2, "--flip", "--data-dir", data)
    assert call(MNIST, *flags, "--epochs", 2, "--save-dir", tmp_path / "whole").code == 0
    stop = "utils.training.loop.train_epoch"
    from utils.training import loop

    original, calls = loop.train_epoch, []

    def cut(*args, **settings):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop, cut)
        call(MNIST, *flags, "--epochs", 2, "--save-dir", tmp_path / "cut")
    assert call(MNIST, *flags, "--epochs", 2, "--save-dir", tmp_path / "cut", "--resume").code == 0
    whole, cut_one = (load_checkpoint(tmp_path / name / "cnn_small_2_bn" / "cnn")[0] for name in ("whole", "cut"))
    for a, b in zip(whole.state_dict().values(), cut_one.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_colour_images(tmp_path):
    data = make_images(tmp_path)
    outcome = call(
        CIFAR, *SMALL, "--epochs", 1, "--data-dir", data, "--save-dir", tmp_path / "models", "--model", "resnet"
    )
    assert outcome.code == 0, outcome.err
    _, config = load_checkpoint(tmp_path / "models" / "cnn_resnet_2" / "cnn")
    assert config["channels"] == 3 and config["flip"] and config["shift"] == 4 and len(config["input_mean"]) == 3


def test_without_data_there_is_one_clear_line(tmp_path):
    outcome = call(CIFAR, *SMALL, "--data-dir", tmp_path)
    assert_one_line(outcome)
    assert "no CIFAR-10" in outcome.err
