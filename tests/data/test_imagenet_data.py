"""TinyImageNet and downscaled ImageNet, in generated files of the published layouts."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_cifar10_data import as_python_2

from data.imagenet import TINY_FOLDER, as_floats, load_downscaled_imagenet, load_tiny_imagenet
from data.mnist import DataError

WNIDS = ("n02124075", "n01443537", "n12267677")  # in no order, as published
EACH, SIDE = 2, 8


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def color_of(label: int, number: int) -> tuple[int, int, int]:
    return 60 * label + 40, 200 - 50 * label, 30 + 90 * number


@pytest.fixture
def tiny(tmp_path):
    """Images of one colour each, which JPEG keeps within a little; one is grey."""
    folder = tmp_path / TINY_FOLDER
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    lines = []
    for label, name in enumerate(WNIDS):
        place = folder / "train" / name / "images"
        place.mkdir(parents=True)
        for number in range(EACH):
            Image.new("RGB", (64, 64), color_of(label, number)).save(place / f"{name}_{number}.JPEG", quality=95)
    for number, label in enumerate((2, 0, 1, 1)):
        image = Image.new("L", (64, 64), 77) if number == 3 else Image.new("RGB", (64, 64), color_of(label, 0))
        image.save(folder / "val" / "images" / f"val_{number}.JPEG", quality=95)
        lines.append(f"val_{number}.JPEG\t{WNIDS[label]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize("place", ["", TINY_FOLDER])
def test_tiny_imagenet(tiny, place):
    data = load_tiny_imagenet(tiny / place)
    assert data.class_names == WNIDS and data.test_y.tolist() == [2, 0, 1, 1]
    assert data.test_x.shape == (4, 3, 64, 64) and data.test_x.dtype == torch.uint8
    images, labels = data.train_at_once()
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and labels.dtype == torch.int64 and len(list(data.train())) == 3
    expected = torch.tensor([color_of(label, number) for label in range(3) for number in range(EACH)])
    assert (images.float().mean(dim=(2, 3)) - expected).abs().max() < 3 and images.float().std(dim=(2, 3)).max() < 3
    assert (data.test_x[3].float() - 77).abs().max() < 2
    assert as_floats(images).max() <= 1.0 and as_floats(images).dtype == torch.float32


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "wnids.txt").unlink(), "no TinyImageNet in"),
        (lambda f: (f / "val" / "val_annotations.txt").unlink(), "val_annotations.txt is missing"),
        (lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn0\n"), "line 1: 'n0' is no class"),
        (lambda f: (f / "val" / "val_annotations.txt").write_text(""), "lists no images"),
        (lambda f: (f / "val" / "images" / "val_2.JPEG").unlink(), "val_2.JPEG is missing"),
        (lambda f: (f / "val" / "images" / "val_2.JPEG").write_bytes(b"no"), "cannot be read as an image"),
        (lambda f: Image.new("RGB", (32, 64)).save(f / "val" / "images" / "val_2.JPEG"), "has 32 by 64 pixels"),
    ],
)
def test_what_is_wrong_with_tiny_imagenet_is_named(tiny, spoil, message):
    spoil(tiny / TINY_FOLDER)
    with pytest.raises(DataError, match=re.escape(message)) as found:
        load_tiny_imagenet(tiny)
    assert "\n" not in str(found.value)


def test_a_class_without_images_is_named(tiny):
    for path in (tiny / TINY_FOLDER / "train" / WNIDS[1] / "images").iterdir():
        path.unlink()
    data = load_tiny_imagenet(tiny)
    with pytest.raises(DataError, match=f"{WNIDS[1]}.*holds no images"):
        data.train_at_once()


@pytest.fixture(params=["python 2", "python 3"])
def downscaled(tmp_path, request):
    """Twelve files, so that 10 comes after 9, and labels from 1 on."""
    for number in (*range(1, 13), 0):
        content = {"data": pixels(number, 3, 3 * SIDE * SIDE), "labels": [number + 1, 1000, 1]}
        content |= {"mean": np.zeros(3 * SIDE * SIDE)} if number else {}
        name = f"train_data_batch_{number}" if number else "val_data"
        if request.param == "python 2":  # whose arrays are pickled in other ways
            content = {key: np.asarray(value).tolist() for key, value in content.items()}
        (tmp_path / name).write_bytes(as_python_2(content) if request.param == "python 2" else pickle.dumps(content))
    return tmp_path


def test_downscaled_imagenet(downscaled):
    data = load_downscaled_imagenet(downscaled, SIDE)
    assert data.name == "imagenet8" and len(data.class_names) == 1000 and data.test_y.tolist() == [0, 999, 0]
    assert torch.equal(data.test_x, torch.from_numpy(pixels(0, 3, 3 * SIDE * SIDE)).reshape(3, 3, SIDE, SIDE))
    images, labels = data.train_at_once()
    assert labels.tolist()[::3] == list(range(1, 13)) and images.shape == (36, 3, SIDE, SIDE)
    assert torch.equal(images[27:30].flatten(1), torch.from_numpy(pixels(10, 3, 3 * SIDE * SIDE)))


@pytest.mark.parametrize(
    ("spoil", "side", "message"),
    [
        (lambda f: (f / "val_data").unlink(), SIDE, "no downscaled ImageNet in"),
        (lambda f: (f / "train_data_batch_4").unlink(), SIDE, "train_data_batch_4 is missing"),
        (lambda f: None, 16, "not those of 16 by 16"),
        (lambda f: (f / "val_data").write_bytes(b"nothing"), SIDE, "damaged file"),
        (lambda f: (f / "val_data").write_bytes(pickle.dumps({"data": [1]})), SIDE, "labels"),
        (
            lambda f: (f / "val_data").write_bytes(
                pickle.dumps({"data": pixels(0, 1, 3 * SIDE * SIDE), "labels": [0]})
            ),
            SIDE,
            "no labels from 1 to 1000",
        ),
        (lambda f: (f / "val_data").write_bytes(pickle.dumps(re.compile("x"))), SIDE, "it asks for"),
    ],
)
def test_what_is_wrong_with_downscaled_imagenet_is_named(downscaled, spoil, side, message):
    spoil(downscaled)
    with pytest.raises(DataError, match=re.escape(message)) as found:
        load_downscaled_imagenet(downscaled, side)
    assert "\n" not in str(found.value)
