"""CIFAR-10 in both forms: what is read, and one line about what cannot be."""

from __future__ import annotations

import os
import pickle
import pickletools
import re

import numpy as np
import pytest
import torch
from cifar_files import ROWS, make_images, pixels_of

from data.cifar10 import BATCHES, CLASS_NAMES, STORED, load_cifar10
from data.mnist import DataError


@pytest.fixture
def batches(tmp_path):
    """A data set in torchvision's files: rows of 3,072 bytes, first all reds, line by line."""
    folder = tmp_path / STORED
    folder.mkdir()
    for seed, name in enumerate((*BATCHES["train"], *BATCHES["test"])):
        content = {b"data": pixels_of(seed).reshape(ROWS, -1), b"labels": [seed, 9, 0, 3], b"filenames": [b"x"] * ROWS}
        with (folder / name).open("wb") as file:
            pickle.dump(content, file, protocol=2 if seed else 4)
    return tmp_path


@pytest.mark.parametrize("place", ["", STORED])
def test_torchvisions_files(batches, place):
    data = load_cifar10(batches / place)
    assert (data.name, data.source, data.class_names) == ("cifar10", "cifar10", CLASS_NAMES)
    assert data.train_x.shape == (5 * ROWS, 3, 32, 32) and data.test_x.dtype == torch.float32
    assert torch.equal(data.test_x, torch.from_numpy(pixels_of(5)).float() / 255)
    assert torch.equal(data.train_x[ROWS : 2 * ROWS], torch.from_numpy(pixels_of(1)).float() / 255)
    assert data.test_y.tolist() == [5, 9, 0, 3] and data.train_y.tolist()[::ROWS] == [0, 1, 2, 3, 4]
    only = load_cifar10(batches / place, train=False)
    assert len(only.train_y) == 0 and torch.equal(only.test_x, data.test_x)


def as_python_2(content) -> bytes:
    """As Python 2 pickled the published files: all texts are strings of bytes."""
    written = pickletools.optimize(pickle.dumps(content, protocol=2))
    return re.sub(rb"X(.\0\0\0)", rb"T\1", written, flags=re.DOTALL)


def test_files_written_by_python_2(batches):
    content = {"data": [[0] * 3072] * 3, "labels": [1, 2, 3]}
    (batches / STORED / "test_batch").write_bytes(as_python_2(content))
    assert load_cifar10(batches, train=False).test_y.tolist() == [1, 2, 3]


def test_folders_of_images(tmp_path):
    make_images(tmp_path / "cifar10")
    data = load_cifar10(tmp_path)
    assert data.class_names == ("bird", "cat") and data.source == "cifar10 as images"
    assert data.train_y.tolist() == data.test_y.tolist() == [0, 0, 1, 1]
    expected = np.concatenate([pixels_of(2, 2), pixels_of(3, 2)])
    assert torch.equal(data.test_x, torch.from_numpy(expected).float() / 255)
    assert len(load_cifar10(tmp_path, train=False).train_x) == 0


def test_lossy_images_are_named(tmp_path):
    assert load_cifar10(make_images(tmp_path, ".jpg")).source == "cifar10 as JPEG"


def break_batch(folder, content: bytes):
    (folder / STORED / "test_batch").write_bytes(content)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / STORED / "data_batch_3").unlink(), "data_batch_3 is missing"),
        (lambda folder: break_batch(folder, b"nothing"), "damaged file .*test_batch"),
        (lambda folder: break_batch(folder, pickle.dumps({b"data": pixels_of(0), b"labels": [0, 1]})), "damaged"),
        (lambda folder: break_batch(folder, pickle.dumps({b"data": pixels_of(0), b"labels": [0, 1, 2, 10]})), "0 to 9"),
        (lambda folder: break_batch(folder, pickle.dumps(Evil())), "asks for .*mkdir"),
    ],
)
def test_damaged_files_are_one_line_and_run_nothing(batches, damage, words, monkeypatch):
    monkeypatch.chdir(batches)
    damage(batches)
    with pytest.raises(DataError, match=words) as caught:
        load_cifar10(batches)
    assert "\n" not in str(caught.value) and not (batches / "evil").exists()


def test_damaged_folders_are_one_line(tmp_path):
    with pytest.raises(DataError, match="no CIFAR-10 in .*--data-dir"):
        load_cifar10(tmp_path)
    with pytest.raises(DataError, match="64 by 64 pixels, not 32 by 32"):
        load_cifar10(make_images(tmp_path / "large", size=64))
    folder = make_images(tmp_path / "broken")
    (folder / "test" / "cat" / "0001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        load_cifar10(folder)
    for path in (folder / "train" / "bird").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="bird holds no images"):
        load_cifar10(folder)
